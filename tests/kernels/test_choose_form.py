"""The choice of the form is a function of sizes alone."""

import pytest
import torch

from kernels.forms import FORMS, choose_form, worth_listing

SIZES = (4096, 4096)


@pytest.mark.parametrize(
    ("M", "density", "personas", "dtype", "device", "form"),
    [
        (1, 0.99, 1, torch.float32, "cpu", "masked"),
        (32, 0.99, 1, torch.float32, "cpu", "masked"),
        (33, 0.99, 1, torch.float32, "cpu", "correction"),
        (64, 0.98, 1, torch.float32, "cpu", "correction"),
        (65, 0.99, 1, torch.float32, "cpu", "masked"),
        (64, 0.97, 1, torch.float32, "cpu", "masked"),
        (64, 0.99, 4, torch.float32, "cpu", "masked"),
        (64, 0.99, 1, torch.bfloat16, "cpu", "masked"),
        (64, 0.99, 1, torch.float32, "cuda", "masked"),
    ],
)
def test_choice(M, density, personas, dtype, device, form):
    assert choose_form(M, *SIZES, density, personas, dtype, device) == form
    assert form in FORMS


def test_lists_are_made_where_they_may_be_chosen():
    for density in (0.5, 0.97, 0.98, 1.0):
        for dtype in (torch.float32, torch.bfloat16):
            chosen = {choose_form(M, *SIZES, density, 1, dtype, "cpu") for M in range(100)}
            assert worth_listing(SIZES[1], density, dtype, "cpu") == ("correction" in chosen)
    assert choose_form(64, 8, (1 << 16) + 1, 0.99, 1, torch.float32, "cpu") == "masked"
