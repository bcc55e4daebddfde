"""The masked product in Triton: tiles with several personas, rows on their own, personas that do not exist."""

import pytest
import torch
from oracles import assert_as_accurate, masked_product_float64, masked_product_plain, packed
from test_masked_linear import call, problem

from kernels import masked_linear
from kernels.ops.masked_linear import triton as linear


@pytest.fixture(params=[0, 10**6], ids=["tiles", "rows"])
def kernel(request, monkeypatch):
    monkeypatch.setattr(linear, "use_rows", lambda rows, apart: bool(request.param))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["mixed", "uniform", "unmasked"])
@pytest.mark.parametrize("MNKP", [(1, 5, 129, 2), (19, 9, 70, 3)], ids=str)
def test_both_kernels(MNKP, kind, dtype, kernel):
    arguments = problem(MNKP, kind, 0.3, True, dtype)
    assert_as_accurate(call(*arguments), masked_product_plain(*arguments), masked_product_float64(*arguments))


def test_nan_stays_in_its_row(kernel):
    x, weight, masks, persona, gamma, bias = problem((19, 5, 37, 2), "mixed", 0.3, True, torch.float32)
    before = call(x, weight, masks, persona, gamma, bias)
    x[3] = torch.nan
    after = call(x, weight, masks, persona, gamma, bias)
    assert after[3].isnan().all()
    others = torch.arange(19) != 3
    assert torch.equal(after[others & (persona != persona[3])], before[others & (persona != persona[3])])
    assert not after[others].isnan().any()


def test_removed_weights_that_are_not_finite_do_no_harm(kernel):
    x, weight, masks, persona, _, bias = problem((19, 5, 37, 2), "uniform", 0.0, True, torch.float32)
    masks[:, 3, 4], masks[:, 1, 36] = False, False
    expected = call(x, weight, masks, persona, 0.0, bias)
    weight[3, 4], weight[1, 36] = torch.nan, torch.inf
    assert torch.equal(call(x, weight, masks, persona, 0.0, bias), expected)
    assert not call(x, weight, masks, persona, 0.5, bias)[:, [1, 3]].isfinite().any()


def test_absent_persona_fills_its_row_with_nan(kernel, monkeypatch):
    # As on a GPU, where nobody waits for the values to check them.
    monkeypatch.setattr(linear, "check_personas", lambda persona, count: None)
    x, weight, masks, _, _, _ = problem((3, 5, 37, 2), "mixed", 0.0, False, torch.float32)
    persona = torch.tensor([1, 2, -2], dtype=torch.int32)
    y = masked_linear(x, weight, packed(masks), persona)
    assert y.isnan().all(1).tolist() == [False, True, True]
    assert not y[0].isnan().any()


def test_no_masks_at_all(kernel):
    arguments = problem((3, 5, 37, 0), "unmasked", 0.0, True, torch.float32)
    assert_as_accurate(call(*arguments), masked_product_plain(*arguments), masked_product_float64(*arguments))


@pytest.mark.parametrize("kind", ["mixed", "uniform"])
def test_no_columns_at_all(kind):
    arguments = problem((19, 5, 0, 2), kind, 0.0, True, torch.float32)
    assert torch.equal(call(*arguments), arguments[-1].expand(19, 5))


def test_several_panels(monkeypatch):
    monkeypatch.setattr(linear, "PANEL_BYTES", 128 * 70 * 4)
    arguments = problem((19, 300, 70, 2), "uniform", 0.3, True, torch.float32)
    assert_as_accurate(call(*arguments), masked_product_plain(*arguments), masked_product_float64(*arguments))


def test_columns_are_split_for_more_programs():
    assert linear.splits_of(64, 4096, 132) == 9
    assert linear.splits_of(64, 500, 132) == 1
    assert linear.splits_of(10**6, 4096, 132) == 1
