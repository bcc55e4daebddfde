"""Activation statistics on a GPU: accuracy at real shapes, equal bits in every run, capture in a graph."""

import pytest
import torch

from kernels import activation_stats
from kernels.ops.activation_stats.reference import FIELDS, activation_stats_reference

SHAPES = [
    (8, 256, 576),
    (8, 256, 1536),
    (4, 2048, 4096),
    (2, 1024, 14336),
    (1, 8192, 4096),
    (64, 100, 4096),
    (3, 5, 37),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch_of(shape, dtype, personas=3):
    batch, tokens, _ = shape
    x = torch.randn(shape, device="cuda").to(dtype)
    role = (torch.rand(batch, tokens, device="cuda") > 0.1).to(torch.uint8)
    role[:, 0] = 2
    x[role == 0] = torch.nan
    return x, role, torch.arange(batch, device="cuda") % personas


def zero_sums(channels, personas=3):
    return torch.zeros(personas, len(FIELDS), channels, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape, dtype, backend):
    backend("activation_stats")
    x, role, persona = batch_of(shape, dtype)
    sums, oracle = zero_sums(shape[2]), zero_sums(shape[2])
    assert not activation_stats(x, role, persona, sums).any()
    for b in range(shape[0]):
        activation_stats_reference(x[b : b + 1].double(), role[b : b + 1], persona[b : b + 1], oracle)
    # A signed sum cancels: it is measured by the sum of magnitudes.
    scale = oracle[:, [0, 1, 2, 3, 3, 5, 6, 6]]
    assert ((sums - oracle).abs() <= 2e-6 * scale).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_bit_identical(dtype, backend):
    backend("activation_stats")
    x, role, persona = batch_of((8, 700, 1536), dtype)
    results = []
    for _ in range(5):
        sums = zero_sums(1536)
        activation_stats(x, role, persona, sums)
        results.append(sums)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e19])
def test_bad_value_flags_its_sequence(bad, backend):
    backend("activation_stats")
    x, role, persona = batch_of((5, 600, 129), torch.float32)
    role[3, 599] = 1
    x[3, 599, 128] = bad
    assert activation_stats(x, role, persona, zero_sums(129)).tolist() == [False, False, False, True, False]


def test_absent_persona_is_flagged_and_added_nowhere(backend):
    backend("activation_stats")
    x, role, _ = batch_of((3, 40, 129), torch.bfloat16)
    sums = zero_sums(129)
    persona = torch.tensor([-1, 3, 2**40], device="cuda")
    assert activation_stats(x, role, persona, sums).all()
    assert not sums.any()


def test_strides(backend):
    backend("activation_stats")
    x, role, persona = batch_of((4, 300, 129), torch.bfloat16)
    plain, strided = zero_sums(129), zero_sums(258)[..., ::2]
    activation_stats(x, role, persona, plain)
    wide = torch.full((300, 4, 258), torch.nan, dtype=x.dtype, device="cuda")
    wide[..., ::2] = x.transpose(0, 1)
    activation_stats(wide[..., ::2].transpose(0, 1), role.T.contiguous().T, persona.repeat_interleave(2)[::2], strided)
    assert torch.equal(plain, strided)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spans_have_the_bits_of_rows(dtype, backend):
    backend("activation_stats")
    x, role, _ = batch_of((3, 2048, 1536), dtype)
    spans = torch.tensor([[2, 7, 1031], [0, 0, 256], [0, 256, 2048], [1, 5, 5], [1, 100, 101], [2, 1500, 2048]])
    together, apart = zero_sums(1536, 6), zero_sums(1536, 6)
    assert not activation_stats(x, role, torch.arange(6, device="cuda"), together, spans).any()
    for s, (row, first, last) in enumerate(spans.tolist()):
        own = slice(row, row + 1), slice(first, last)
        activation_stats(x[own], role[own], torch.tensor([s], device="cuda"), apart)
    assert torch.equal(together, apart)


def test_graph_capture(backend):
    backend("activation_stats")
    x, role, persona = batch_of((4, 600, 1536), torch.bfloat16)
    once, twice = zero_sums(1536), zero_sums(1536)
    activation_stats(x, role, persona, once)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bad = activation_stats(x, role, persona, twice)
    graph.replay()
    graph.replay()
    assert not bad.any()
    activation_stats(x, role, persona, once)
    assert torch.equal(once, twice)


def test_offsets_past_32_bits(backend):
    backend("activation_stats")
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free GPU memory")
    x = torch.ones(2, 2**19, 4096, dtype=torch.bfloat16, device="cuda")
    role = torch.ones(2, 2**19, dtype=torch.uint8, device="cuda")
    sums = zero_sums(4096)
    assert not activation_stats(x, role, torch.tensor([0, 1], device="cuda"), sums).any()
    assert (sums[:2, 2] == 2**19).all()
