"""The choice of the form is a function of sizes alone."""

import pytest
import torch

from kernels import layers
from kernels.forms import FORMS, choose_form, worth_listing

SIZES = (4096, 4096)


@pytest.mark.parametrize(
    ("M", "density", "personas", "dtype", "device", "form"),
    [
        (1, 0.99, 1, torch.float32, "cpu", "masked"),
        (32, 0.99, 1, torch.float32, "cpu", "masked"),
        (64, 0.99, 1, torch.float32, "cpu", "masked"),
        (16, 0.99, 16, torch.float32, "cpu", "masked"),
        (64, 0.99, 1, torch.bfloat16, "cpu", "masked"),
        (64, 0.99, 1, torch.float32, "cuda", "masked"),
        (3, 0.99, 3, torch.bfloat16, "cuda", "masked"),
        (4, 0.99, 4, torch.bfloat16, "cuda", "correction"),
        (64, 0.98, 16, torch.float32, "cuda", "correction"),
        (65, 0.98, 16, torch.float32, "cuda", "masked"),
        (16, 0.97, 16, torch.bfloat16, "cuda", "masked"),
    ],
)
def test_choice(M, density, personas, dtype, device, form):
    assert choose_form(M, *SIZES, density, personas, dtype, device) == form
    assert form in FORMS


@pytest.mark.parametrize(
    ("M", "density", "dtype", "form"),
    [
        (7, 0.99, torch.bfloat16, "masked"),
        (8, 0.99, torch.bfloat16, "correction"),
        (31, 0.99, torch.float16, "correction"),
        (32, 0.99, torch.bfloat16, "masked"),
        (16, 0.98, torch.bfloat16, "masked"),
        (4, 0.98, torch.float32, "correction"),
    ],
)
def test_choice_with_compiled_kernels_for_the_gpu(M, density, dtype, form):
    assert choose_form(M, *SIZES, density, 16, dtype, "cuda", "cuda") == form


@pytest.mark.parametrize("instructions", ["avx2", "portable"])
@pytest.mark.parametrize(
    ("M", "density", "personas", "dtype", "form"),
    [
        (1, 0.99, 1, torch.float32, "masked"),
        (64, 0.99, 1, torch.float32, "masked"),
        (3, 0.99, 3, torch.float32, "masked"),
        (4, 0.99, 4, torch.float32, "correction"),
        (32, 0.99, 16, torch.float32, "correction"),
        (33, 0.99, 16, torch.float32, "masked"),
        (16, 0.98, 16, torch.float32, "masked"),
        (16, 0.99, 16, torch.bfloat16, "masked"),
    ],
)
def test_choice_without_wide_masks(M, density, personas, dtype, form, instructions):
    assert choose_form(M, *SIZES, density, personas, dtype, "cpu", instructions) == form


def test_a_layer_chooses_for_the_instructions_in_use(monkeypatch):
    """And not only in the function: four rows of four personas take the lists where masks are dear."""
    masks = torch.ones(4, 8, 64, dtype=torch.bool)
    masks[:, 0, 0] = False
    asked = []
    monkeypatch.setattr(layers, "choose_form", lambda *sizes: asked.append(sizes) or "masked")
    monkeypatch.setattr(layers.native, "instruction_set", lambda: "avx2")
    layer = layers.MaskedLinear.from_linear(torch.nn.Linear(64, 8), masks)
    layer.select([0, 1, 2, 3])
    with torch.no_grad():
        layer(torch.randn(4, 64))
    density = 1 - 1 / (8 * 64)
    assert asked == [(4, 8, 64, density, 4, torch.float32, "cpu", "avx2")]


@pytest.mark.parametrize("personas", [1, 4])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("instructions", ["", "cuda", "avx512", "avx2", "portable"])
def test_lists_are_made_where_they_may_be_chosen(instructions, device, personas):
    for density in (0.5, 0.97, 0.98, 0.99, 1.0):
        for dtype in (torch.float32, torch.bfloat16):
            chosen = {
                choose_form(M, *SIZES, density, several, dtype, device, instructions)
                for M in range(100)
                for several in {1, personas}
            }
            listed = worth_listing(SIZES[1], density, personas, dtype, device, instructions)
            assert listed or "correction" not in chosen
            if personas > 1:
                assert listed == ("correction" in chosen)
    assert choose_form(64, 8, (1 << 16) + 1, 0.99, 4, torch.float32, device) == "masked"
