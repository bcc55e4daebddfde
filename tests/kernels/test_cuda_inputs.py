"""Which products the compiled CUDA kernels take, and which they leave to the next backend."""

import pytest
import torch

from kernels.ops.masked_linear import cuda as masked
from kernels.ops.sparse_linear import cuda as sparse

HALVES = (torch.bfloat16, torch.float16)


def operands(dtype=torch.bfloat16, K=96):
    return torch.zeros(4, K).to(dtype), torch.zeros(6, K).to(dtype), torch.zeros(2, 6, K // 8, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", HALVES)
def test_masked_product_in_half_precision(dtype):
    assert masked.served(*operands(dtype))
    assert masked.served(*operands(dtype, K=32))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w, b: (x.float(), w.float(), b),
        lambda x, w, b: (x[:, :40], w[:, :40], b[:, :, :5]),
        lambda x, w, b: (x[:, :0], w[:, :0], b[:, :, :0]),
        lambda x, w, b: (x.T.contiguous().T, w, b),
        lambda x, w, b: (x[:, 4:36], w[:, :32], b[:, :, :4]),
        lambda x, w, b: (x[:, :32], w[:, 60:92], b[:, :, :4]),
        lambda x, w, b: (x[:, :32], w[:, :32], b[:, :, 1:5]),
        lambda x, w, b: (x, w, b.transpose(1, 2).contiguous().transpose(1, 2)),
    ],
    ids=[
        "float32",
        "half words",
        "no columns",
        "x by columns",
        "x off 16",
        "weight off 16",
        "masks off 4",
        "masks by columns",
    ],
)
def test_masked_product_left_to_the_next_backend(change):
    assert not masked.served(*change(*operands()))


def test_rows_of_the_masked_product():
    assert [rows for rows in (1, 2, 32, 33, 4096) if masked.worthwhile(rows, apart=False)] == [2, 32]
    assert [rows for rows in (1, 2, 33, 4096) if masked.worthwhile(rows, apart=True)] == [2, 33, 4096]


def test_sparse_product():
    values, bits = torch.zeros(64).bfloat16(), torch.zeros(6, 12, dtype=torch.uint8)
    x = torch.zeros(4, 96).bfloat16()
    assert sparse.served(x, values, bits)
    assert not sparse.served(x.float(), values.float(), bits)
    assert not sparse.served(x[:, :40], values, bits[:, :5])
    assert not sparse.served(x, values[1:], bits)
    wide = torch.zeros(sparse.MOST_ROWS + 1, 104).bfloat16()
    assert not sparse.served(wide[:4, 4:100], values, bits)
    # Many rows go through a dense product, which reads any.
    assert sparse.served(wide[:, 4:100], values, bits)
