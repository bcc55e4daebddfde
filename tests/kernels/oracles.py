"""What the kernels tests compare with, written without the code under test: numpy and loops in float64."""

import os

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILED = "amx_bf16"
"""The instruction set with matrix tiles, for bfloat16."""
INTERPRETED = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []
"""The backend that Triton's interpreter adds on the CPU."""


def assert_as_accurate(actual: Tensor, plain: Tensor, oracle: Tensor) -> None:
    """The error against the float64 oracle is at most twice that of plain PyTorch in the same dtype.

    Where plain PyTorch happens to be exact, one correct rounding of the largest value is allowed.
    """
    assert oracle.dtype == torch.float64
    assert (actual.dtype, actual.shape) == (plain.dtype, plain.shape)
    assert actual.shape == oracle.shape
    assert actual.isfinite().all()
    if actual.numel() == 0:
        return
    rounding = oracle.abs().max() * torch.finfo(actual.dtype).eps / 2
    allowed = 2 * (plain.double() - oracle).abs().max() + rounding
    error = (actual.double() - oracle).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def packed(mask: Tensor) -> Tensor:
    """8 columns a byte, column 8 j + i in bit i of byte j."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def unpacked(bits: Tensor, columns: int) -> Tensor:
    wide = np.unpackbits(bits.numpy(), axis=-1, count=columns, bitorder="little")
    return torch.from_numpy(wide.astype(bool))


def random_masks(personas: int, rows: int, columns: int, removed: float = 0.5) -> Tensor:
    """bool ``[P, N, K]``, half removed; the first row is fully masked, the last one (if another) fully kept."""
    masks = torch.rand(personas, rows, columns) > removed
    masks[:, 0] = False
    if rows > 1:
        masks[:, -1] = True
    return masks


def strided(tensor: Tensor) -> Tensor:
    """The same values in every second element of reversed dimensions: no stride is what a kernel hopes for."""
    order = tuple(reversed(range(tensor.dim())))
    view = tensor.permute(order).repeat_interleave(2, dim=-1)[..., ::2].permute(order)
    assert torch.equal(view, tensor)
    assert tensor.numel() < 2 or not view.is_contiguous()
    return view


def masked_product_float64(
    x: Tensor, weight: Tensor, masks: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """``y_m = (W * G_p(m)) x_m + b``, one row at a time."""
    wide, y = weight.double(), torch.zeros(len(x), len(weight), dtype=torch.float64)
    for row, index in enumerate(persona.expand(len(x)).tolist()):
        gate = torch.ones_like(wide)
        if index >= 0:
            gate[~masks[index]] = gamma
        y[row] = (wide * gate) @ x[row].double() + (0 if bias is None else bias.double())
    return y


def masked_product_plain(
    x: Tensor, weight: Tensor, masks: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """What one would write in PyTorch: a dense product for every persona, then every row takes its own.

    Every product reads its weights in the layout of ``weight``: torch adds up in another order for another layout.
    """
    weights = [weight] + [torch.empty_like(weight).copy_(torch.where(mask, weight, weight * gamma)) for mask in masks]
    outputs = torch.stack([F.linear(x, w, bias) for w in weights])
    return outputs[persona.expand(len(x)).long() + 1, torch.arange(len(x))]
