"""The masked product on a GPU: error against float64 at most twice that of plain PyTorch, in every dtype."""

import pytest
import torch
from oracles import DTYPES, assert_as_accurate

from kernels import masked_linear
from kernels.ops.masked_linear.reference import masked_linear_reference
from kernels.ops.pack_bits.reference import pack_bits_reference

SHAPES = [
    (1, 576, 1536),
    (16, 576, 576),
    (1, 4096, 4096),
    (5, 1024, 4096),
    (300, 576, 1536),
    (64, 14336, 4096),
    (19, 33, 70),
    (2, 100, 96),
    (20, 130, 608),
    (40, 300, 1024),
    (130, 257, 2048),
]


def problem(MNK, kind, dtype, personas=3):
    M, N, K = MNK
    x, weight, bias = torch.randn(M, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    bits = pack_bits_reference(torch.rand(personas, N, K) > 0.5)
    persona = (
        torch.arange(M) % (personas + 1) - 1 if kind == "mixed" else torch.tensor([1 if kind == "uniform" else -1])
    )
    tensors = [t.to(dtype).cuda() for t in (x, weight, bias)]
    return *tensors[:2], bits.cuda(), persona.int().cuda(), tensors[2]


@pytest.fixture(autouse=True)
def _full_precision_reference():
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mixed", "uniform", "unmasked"])
@pytest.mark.parametrize("MNK", SHAPES, ids=str)
def test_product(MNK, kind, dtype, backend):
    backend("masked_linear")
    x, weight, bits, persona, bias = problem(MNK, kind, dtype)
    for gamma in (0.0, 0.3):
        plain = masked_linear_reference(x, weight, bits, persona, gamma, bias)
        oracle = masked_linear_reference(x.double(), weight.double(), bits, persona, gamma, bias.double())
        assert_as_accurate(masked_linear(x, weight, bits, persona, gamma, bias), plain, oracle)


@pytest.mark.parametrize("M", [1, 8, 200])
def test_runs_are_bit_identical(M, backend):
    backend("masked_linear")
    arguments = problem((M, 1536, 576), "mixed", torch.bfloat16)
    results = [masked_linear(*arguments[:4], 0.3, arguments[4]) for _ in range(5)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("M", [3, 200])
def test_absent_persona_fills_its_row_with_nan(M, backend):
    backend("masked_linear")
    x, weight, bits, persona, _ = problem((M, 576, 576), "mixed", torch.bfloat16)
    persona[1] = 3
    y = masked_linear(x, weight, bits, persona)
    assert y[1].isnan().all()
    assert not y[0].isnan().any()
    assert not y[2:].isnan().any()


def test_transposed_weight(backend):
    backend("masked_linear")
    x, weight, bits, persona, bias = problem((40, 576, 1536), "mixed", torch.bfloat16)
    plain = masked_linear_reference(x, weight, bits, persona, 0.3, bias)
    oracle = masked_linear_reference(x.double(), weight.double(), bits, persona, 0.3, bias.double())
    assert_as_accurate(masked_linear(x, weight.T.contiguous().T, bits, persona, 0.3, bias), plain, oracle)
