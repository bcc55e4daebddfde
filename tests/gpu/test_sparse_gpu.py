"""The sparse product and the correction form on a GPU: error against float64 at most twice that of plain PyTorch."""

import pytest
import torch
from oracles import DTYPES, assert_as_accurate, masked_product_float64, masked_product_plain
from torch.nn import functional as F

from kernels import SparseWeight, correction_linear, removed_lists, sparse_linear
from kernels.ops.pack_bits import pack_bits

SHAPES = [
    (1, 576, 1536),
    (16, 576, 576),
    (1, 4096, 4096),
    (5, 1024, 4096),
    (300, 576, 1536),
    (19, 33, 70),
    (3, 100, 96),
]


def problem(MNK, dtype, density):
    M, N, K = MNK
    weight, mask = torch.randn(N, K) / K**0.5, torch.rand(N, K) < density
    mask[0], mask[-1] = False, True
    return torch.randn(M, K).to(dtype).cuda(), weight.to(dtype).cuda(), mask.cuda(), torch.randn(N).to(dtype).cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("MNK", SHAPES, ids=str)
def test_sparse_product(MNK, density, dtype, backend):
    backend("sparse_linear")
    x, weight, mask, bias = problem(MNK, dtype, density)
    gated, packed = torch.where(mask, weight, 0), SparseWeight.from_dense(weight, mask)
    y = sparse_linear(x, packed, bias)
    assert_as_accurate(y, F.linear(x, gated, bias), F.linear(x.double(), gated.double(), bias.double()))
    assert torch.equal(sparse_linear(x, packed, bias), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("MNK", SHAPES, ids=str)
def test_correction(MNK, gamma, dtype, backend):
    backend("correction_linear")
    x, weight, mask, bias = problem(MNK, dtype, 0.98)
    masks = torch.stack([mask, mask.roll(1, 1)])
    persona = (torch.arange(MNK[0]).cuda() % 3 - 1).int()
    arguments = (x, weight, masks, persona, gamma, bias)
    y = correction_linear(x, weight, *removed_lists(pack_bits(masks), MNK[2]), persona, gamma, bias)
    on_cpu = [one.cpu() if isinstance(one, torch.Tensor) else one for one in arguments]
    assert_as_accurate(y.cpu(), masked_product_plain(*arguments).cpu(), masked_product_float64(*on_cpu))
