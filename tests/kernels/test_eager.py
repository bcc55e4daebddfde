"""Which calls of an op go past torch's wrapper, and that both ways are one op."""

import pytest
import torch
from oracles import packed, random_masks
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import SparseWeight, correction_linear, masked_linear, removed_lists, sparse_linear
from kernels.ops import eager
from kernels.ops.eager import plain


def test_plain_tensors_are_those_that_nobody_watches():
    x, parameter = torch.randn(2, 3), torch.nn.Parameter(torch.randn(2, 3))
    assert plain(x, None, x.bfloat16())
    assert not plain(x, parameter)
    with torch.no_grad():
        assert plain(x, parameter)
    with torch.inference_mode():
        assert plain(x + 1, parameter)
    with FakeTensorMode():
        assert not plain(torch.randn(2, 3))
    assert not plain(x.as_subclass(type("Own", (torch.Tensor,), {})))


def test_not_while_compiling():
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def asked(x):
        return x + 1 if plain(x) else x - 1

    seen.append(asked(torch.zeros(1)).item())
    assert seen == [-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_ways_are_one_op(dtype, monkeypatch):
    masks = random_masks(2, 9, 40)
    x, weight, bias = torch.randn(3, 40).to(dtype), torch.randn(9, 40).to(dtype), torch.randn(9).to(dtype)
    persona, compressed = torch.tensor([0, -1, 1], dtype=torch.int32), SparseWeight.from_dense(weight, masks[0])

    def results():
        yield masked_linear(x, weight, packed(masks), persona, 0.25, bias)
        yield correction_linear(x, weight, *removed_lists(packed(masks), 40), persona, 0.25, bias)
        yield sparse_linear(x, compressed, bias)

    past = list(results())
    for name in ("masked_linear", "correction_linear", "sparse_linear"):
        monkeypatch.setattr(f"kernels.ops.{name}.plain", lambda *_: False)
    assert all(torch.equal(a, b) for a, b in zip(past, results(), strict=True))
    assert (torch.Tensor, torch.nn.Parameter) == eager.PLAIN
