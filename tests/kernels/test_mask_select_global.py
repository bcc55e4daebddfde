"""Selection by one threshold against ``sorted`` over all scores, on every backend of this machine."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import INTERPRETED, packed, strided
from torch.library import opcheck

from kernels import mask_select_global, mask_select_threshold, native
from kernels.ops.mask_select_global import cpp, reference

SHAPES = [(5, 37), (4, 64), (1, 1), (0, 9), (3, 130), (2, 0)]


def best(scores, keep):
    """The ``keep`` best of all matrices, equal scores by matrix, row, column; packed."""
    values = torch.cat([matrix.flatten() for matrix in scores]).tolist()
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[ranked[:keep]] = True
    parts = mask.split([matrix.numel() for matrix in scores])
    return [packed(part.view(matrix.shape)) for part, matrix in zip(parts, scores, strict=True)]


@pytest.fixture(params=["reference", *INTERPRETED, *native.instruction_sets()])
def backend(request):
    if request.param == "reference":
        yield reference.mask_select_global_reference, reference.mask_select_threshold_reference
        return
    if request.param == "triton":
        from kernels.ops.mask_select_global import triton

        yield triton.mask_select_global_triton, triton.mask_select_threshold_triton
        return
    before = torch.ops.persona_native.instruction_set()
    native.use_instruction_set(request.param)
    yield cpp.mask_select_global_cpp, cpp.mask_select_threshold_cpp
    native.use_instruction_set(before)


def equal(actual, expected):
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("levels", [2, 5, 0], ids=["2 levels", "5 levels", "all different"])
def test_keeps_the_largest_of_all_matrices(backend, levels):
    select, _ = backend
    scores = [torch.randint(levels, s).float() - 1 if levels else torch.randn(s) for s in SHAPES]
    total = sum(matrix.numel() for matrix in scores)
    for keep in (0, 1, 186, total // 2, total - 1, total):
        assert equal(select(scores, keep), best(scores, keep))
        assert equal(select([strided(s) if s.numel() else s for s in scores], keep), best(scores, keep))


def test_one_matrix_has_a_budget_of_its_own(backend):
    select, _ = backend
    scores = torch.randn(33, 65)
    assert equal(select([scores], 1000), best([scores], 1000))


VALUES = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-45, -1e-45, 2.0, 3e38])


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_scores(backend, data):
    select, _ = backend
    row = st.lists(VALUES | st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20)
    scores = [torch.tensor([values]) for values in data.draw(st.lists(row, min_size=1, max_size=4))]
    keep = data.draw(st.integers(0, sum(matrix.numel() for matrix in scores)))
    assert equal(select(scores, keep), best(scores, keep))


@pytest.mark.parametrize("threshold", [-math.inf, -0.0, 0.0, 1.0, -1.0, 1e39, 1e-46])
@pytest.mark.parametrize("ties", [0, 1, 50, 10**6])
def test_threshold(backend, threshold, ties):
    _, select = backend
    scores = torch.randint(-2, 3, (7, 65)).float()
    scores[3, 3] = -math.inf
    border = torch.tensor(threshold, dtype=torch.float32)
    left, mask = ties, torch.zeros_like(scores, dtype=torch.bool)
    for position in torch.cartesian_prod(torch.arange(7), torch.arange(65)).tolist():
        value = scores[*position]
        mask[*position] = value > border or (value == border and left > 0)
        left -= int(value == border)
    assert torch.equal(select(scores, threshold, ties), packed(mask))


def test_threads_change_no_bit(backend, threads):
    select, threshold = backend
    scores = [torch.randint(9, (129, 577)).float(), torch.randint(9, (64, 1536)).float()]
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append([*select(scores, 70000), threshold(scores[0], 4.0, 1234)])
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_named(backend, bad):
    select, threshold = backend
    scores = torch.randn(3, 16)
    scores[1, 6] = scores[2, 0] = bad
    for keep in (0, 7):
        with pytest.raises(ValueError, match=rf"scores\[1, 6\] is {bad} \(2 of 48"):
            select([torch.randn(2, 2), scores], keep)
    for ties in (0, 3):
        with pytest.raises(ValueError, match=rf"scores\[1, 6\] is {bad} \(2 of 48"):
            threshold(scores, 0.0, ties)


def test_input_is_checked():
    scores = torch.ones(2, 9)
    with pytest.raises(ValueError, match=r"keep must lie in 0\.\.18, got 19"):
        mask_select_global([scores], 19)
    with pytest.raises(ValueError, match="scores holds no matrix"):
        mask_select_global([], 0)
    with pytest.raises(TypeError, match="scores must be one of float32, got .* bfloat16"):
        mask_select_global([scores, scores.bfloat16()], 3)
    with pytest.raises(ValueError, match="ties must not be negative, got -1"):
        mask_select_threshold(scores, 0.5, -1)
    for threshold in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"threshold must be a number below infinity, got {threshold}"):
            mask_select_threshold(scores, threshold)


def test_opcheck():
    scores = [torch.randn(shape) for shape in SHAPES]
    opcheck(torch.ops.persona.mask_select_global, (scores, 100))
    opcheck(torch.ops.persona.mask_select_threshold, (strided(scores[0]), 0.5, 2))


def test_compile(compiled):
    scores = [torch.randn(5, 37), torch.randn(4, 64)]
    select = compiled(lambda a, b: mask_select_global([a.round(), b.round()], 100))
    assert equal(select(*scores), best([s.round() for s in scores], 100))
    above = compiled(lambda a: mask_select_threshold(a, 0.5))
    assert torch.equal(above(scores[0]), packed(scores[0] > 0.5))
