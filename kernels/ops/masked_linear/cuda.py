"""The masked product in CUDA (``csrc/masked_linear/cuda.cu``), half precision: tensor cores for several rows of x.

What it has no kernel for goes to the next backend (Triton's): float32, one row, many rows of one persona, and
columns that no 16 bytes hold evenly.
"""

import torch
from torch import Tensor

from kernels import backends
from kernels.ops import checks

MOST_ROWS_ALIKE = 32
"""Rows of one persona: for more a dense product of a gated panel is as fast."""


def masked_linear_cuda(
    x: Tensor, weight: Tensor, bits: Tensor, persona: Tensor, gamma: float, bias: Tensor | None
) -> Tensor:
    """See ``kernels.ops.masked_linear``. Never waits for the device."""
    if not (worthwhile(x.shape[0], persona.shape[0] > 1) and served(x, weight, bits)):
        rest = backends.after("masked_linear", "cuda", x.device.type)
        return rest(x, weight, bits, persona, gamma, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    torch.ops.persona_native.masked_linear(x, weight, bits, persona, gamma, bias, y)
    return y


def worthwhile(rows: int, apart: bool) -> bool:
    """Whether tensor cores with the gate in registers are the fastest way for so many rows.

    One H200, 4096 x 4096, bfloat16, microseconds with this kernel and without: one row 14, 12; 8 rows of one persona
    15, 27; 32 rows 21, 27; 64 rows 32, 27; 4 and 16 rows with a persona each 20, 32 and 55, 115; 64 rows of 16 personas
    103, 290.
    """
    return rows >= 2 if apart else 2 <= rows <= MOST_ROWS_ALIKE


def served(x: Tensor, weight: Tensor, bits: Tensor) -> bool:
    """Whether the kernel can read these: half precision, whole mask words, rows that begin at multiples of 16 bytes."""
    return (
        half_in_words(x)
        and rows_at_16(x)
        and rows_at_16(weight)
        and bits.stride(2) == 1
        and bits.stride(1) % 4 == bits.stride(0) % 4 == bits.data_ptr() % 4 == 0
    )


def half_in_words(x: Tensor) -> bool:
    """Whether x is in half precision and the masks of its columns are whole words of 32 bits."""
    return x.dtype in checks.HALVES and x.shape[1] > 0 and x.shape[1] % 32 == 0


def rows_at_16(x: Tensor) -> bool:
    """Whether the rows of a half-precision matrix have adjacent columns and begin at multiples of 16 bytes."""
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
