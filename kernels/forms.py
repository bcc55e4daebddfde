"""Which form a masked layer's product takes."""

import math

import torch

from kernels.ops import checks

FORMS = ("masked", "correction")
"""``masked_linear`` on the packed masks, or ``correction_linear`` on lists of the removed weights."""

LISTED_DENSITY = {"cuda": 0.98, "cpu": 0.99}
"""Masks that keep less are never listed unless that is forced."""
COMPILED_DENSITY = 0.99
"""The same where the compiled CUDA kernels multiply, which read masks faster: in half precision."""
NARROW = ("avx2", "portable")
"""Instruction sets that have no masks in their instructions."""


def worth_listing(
    K: int, density: float, personas: int, dtype: torch.dtype, device: str, instructions: str = ""
) -> bool:
    """Whether ``choose_form`` can ever choose the lists, so that a layer of so many ``personas`` should make them."""
    if K > 1 << 16:
        return False
    if device == "cpu" and not (dtype == torch.float32 and instructions in NARROW):
        return False
    least = COMPILED_DENSITY if _compiled(dtype, device, instructions) else LISTED_DENSITY.get(device, math.inf)
    return personas > 1 and density >= least


def _compiled(dtype: torch.dtype, device: str, instructions: str) -> bool:
    return device == "cuda" and instructions == "cuda" and dtype in checks.HALVES


def choose_form(
    M: int, N: int, K: int, density: float, personas: int, dtype: torch.dtype, device: str, instructions: str = ""
) -> str:
    """One of ``FORMS`` for M rows of x, a weight ``[N, K]`` and masks of which the least dense keeps ``density``.

    ``personas`` is how many the rows may have (1: all have one), ``device`` a device type, ``instructions`` what
    ``kernels.native.program`` says of it. Lists need K <= 2^16.

    Measured with 4096 x 4096 weights, one thread with AVX-512 (milliseconds, dense product of torch, masked, correction
    with 2 % removed): one row in float32 4.6, 4.8, 5.0, 16 rows of 16 personas 15.9, 13.0, 16.6, 64 rows 21.8, 22.7,
    26.4; on tiles in bfloat16 3.2, 2.4, 2.7, 16 rows 3.7, 11.4, 13.5, 64 rows 5.1, 4.4, 10.1. Masked at any number of
    rows.

    Without AVX-512 a mask takes several instructions per vector of weights and persona (AVX2, float32; masked, lists):

    - One persona: masked at any number of rows (16 rows, 2 %: 15, 21; 64 rows: 36, 47).
    - A persona for each of four rows and more: the lists, up to 1 % removed (16 rows of 16 personas: 29, 22 at 1 % and
      29, 24 at 2 %; of 2 personas, which share gated weights, 18, 19 and 18, 23: a compiled graph must not know how
      many there are); of portable code all the more (1536 x 576, 1 %, 16 rows of 16 personas: 11.5, 5.0).
    - Beyond 32 rows those of a persona share even more (64 rows of 2 personas, 2 %: 51, 63): masked.

    On a GPU (one H200, microseconds, masked, correction):

    - One persona: masked (one row in bfloat16 12, 21 at 2 %; 64 rows 27, 118).
    - A persona for each row: the lists, up to 2 % removed (16 rows of 16 personas: bfloat16 115, 40 at 1 % and 115, 58
      at 2 %, 115, 96 at 5 %; float32 150, 82 and 150, 103 and 150, 153). A row costs 7 masked and 2 to 3 by lists,
      beside 12 for the dense product: from 4 rows on. Beyond 16 rows masked tiles make a pass for every persona (64
      rows of 16 personas 290 in bfloat16).
    - With the compiled CUDA kernels in half precision masks cost 3 us a row with a persona of its own (4, 8, 16 and 32
      rows of as many personas, the last of 16: 20, 31, 55, 66): the lists for 8 to 31 rows, up to 1 % removed (16 rows
      54, 40 at 1 % and 54, 58 at 2 %).
    """
    if not worth_listing(K, density, personas, dtype, device, instructions):
        return "masked"
    if _compiled(dtype, device, instructions):
        listed = 8 <= M < 32
    else:
        listed = 4 <= M <= 64 if device == "cuda" else personas >= 4 and M <= 32
    return "correction" if listed else "masked"
