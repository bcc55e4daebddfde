"""The sparse product in Triton: rows on their own and tiles, several blocks of groups, bits that say too much."""

import pytest
import torch
from oracles import assert_as_accurate, strided
from test_sparse_linear import problem
from torch.nn import functional as F

from kernels import SparseWeight, sparse_linear
from kernels.ops.sparse_linear import sparse_linear_packed
from kernels.ops.sparse_linear import triton as sparse


@pytest.fixture(params=[0, 1], ids=["tiles", "rows"])
def kernel(request, monkeypatch):
    monkeypatch.setattr(sparse, "use_rows", lambda rows: bool(request.param))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("MNK", [(1, 5, 1129), (19, 9, 70), (2, 1, 1)], ids=str)
def test_both_kernels(MNK, density, dtype, kernel):
    x, weight, mask, bias = problem(MNK, dtype, density)
    gated = torch.where(mask, weight, 0)
    y = sparse_linear(strided(x), SparseWeight.from_dense(weight, mask), strided(bias))
    assert_as_accurate(y, F.linear(x, gated, bias), F.linear(x.double(), gated.double(), bias.double()))


def test_no_value_of_another_row_is_read(kernel):
    x, weight, mask, _ = problem((3, 4, 37), torch.float32)
    w = SparseWeight.from_dense(weight, mask)
    values = w.values.clone()
    values[int(w.offsets[2]) :] = torch.nan
    # The second row's bits say that it keeps everything, its offsets that it keeps less.
    bits = w.bits.clone()
    bits[1] = 255
    y = sparse_linear_packed(x, values, bits, w.offsets)
    assert not y[:, :2].isnan().any()
    assert y[:, 2].isnan().all()
