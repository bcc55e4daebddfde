"""The correction form in Triton: lists of several blocks, personas and columns that do not exist."""

import pytest
import torch
from oracles import assert_as_accurate, masked_product_float64, masked_product_plain, packed, strided
from test_correction_linear import call, problem

from kernels import correction_linear, removed_lists
from kernels.ops.correction_linear import triton as correction


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["mixed", "one"])
@pytest.mark.parametrize("density", [0.3, 0.95])
def test_lists_of_several_blocks(density, kind, dtype):
    arguments = problem((5, 40, 200, 3), dtype, kind, density)
    arguments = (*arguments[:4], 0.3, arguments[4])
    plain, oracle = masked_product_plain(*arguments), masked_product_float64(*arguments)
    assert_as_accurate(call(correction_linear, *arguments), plain, oracle)


def test_layout():
    x, weight, masks, persona, bias = problem((5, 33, 75, 3), torch.float32)
    lists = removed_lists(packed(masks), 75)
    expected = correction_linear(x, weight, *lists, persona, 0.0, bias)
    y = correction_linear(strided(x), strided(weight), *map(strided, lists), strided(persona), 0.0, strided(bias))
    torch.testing.assert_close(y, expected)


def test_absent_persona_fills_its_row_with_nan(monkeypatch):
    # As on a GPU, where nobody waits for the values to check them.
    monkeypatch.setattr(correction, "check_personas", lambda persona, count, op: None)
    x, weight, masks, _, _ = problem((3, 5, 37, 2), torch.float32)
    persona = torch.tensor([1, 2, -2], dtype=torch.int32)
    y = correction_linear(x, weight, *removed_lists(packed(masks), 37), persona)
    assert y.isnan().all(1).tolist() == [False, True, True]
    assert not y[0].isnan().any()


def test_a_column_that_does_not_exist_is_not_read():
    x, weight, masks, persona, _ = problem((3, 5, 9, 2), torch.float32)
    columns, offsets = removed_lists(packed(masks), 9)
    y = correction_linear(x, weight, torch.full_like(columns.int(), 60000).to(torch.uint16), offsets, persona)
    torch.testing.assert_close(y, x @ weight.T)
