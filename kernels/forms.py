"""Which form a masked layer's product takes."""

import torch

FORMS = ("masked", "correction")
"""``masked_linear`` on the packed masks, or ``correction_linear`` on lists of the removed weights."""

LISTED_DENSITY = 0.98
"""Masks that keep less are never listed unless that is forced."""


def worth_listing(K: int, density: float, dtype: torch.dtype, device: str) -> bool:
    """Whether ``choose_form`` can ever choose the lists, so that a layer should make them."""
    return device == "cpu" and dtype == torch.float32 and K <= 1 << 16 and density >= LISTED_DENSITY


def choose_form(
    M: int, N: int, K: int, density: float, personas: int, dtype: torch.dtype, device: str, instructions: str = ""
) -> str:
    """One of ``FORMS`` for M rows of x, a weight ``[N, K]`` and masks of which the least dense keeps ``density``.

    ``personas`` is how many the rows may have (1: all have one), ``device`` a device type, ``instructions`` what
    ``kernels.native.instruction_set`` says. Lists need K <= 2^16.

    Measured with 4096 x 4096 weights, one thread of a busy machine with AVX-512 (milliseconds, dense product of torch,
    masked, correction):

    - Few rows: both read the weight once at the memory's speed, and the masks are 1/32 of it in float32. The masked
      kernel is never the slower one (16 rows, 2 % removed: float32 18, 21, 39; bfloat16 21, 16, 46).
    - 33 to 64 rows of one persona: torch's product of the whole weight and then the lists beat torch's products of
      gated panels while little is removed (float32, 64 rows: 41, 60, 48 at 2 % and 37, 57, 60 at 5 %; bfloat16 45, 57,
      57 at 2 %).
    - More rows: the lists cost as much per row as before, the gating of panels is spread over more rows (float32,
      256 rows, 2 %: 102, 139, 153).

    Without AVX-512 a mask takes several instructions per vector of weights and persona (AVX2, float32; masked, lists):

    - One persona: masked at any number of rows (16 rows, 2 %: 15, 21; 64 rows: 36, 47).
    - A persona for each of four rows and more: the lists, up to 2 % removed (16 rows of 16 personas: 29, 24 at 2 % and
      30, 30 at 4 %; 16 rows of 2 personas: 26, 23 at 2 %); of portable code all the more (1536 x 576, 2 %, 16 rows of
      16 personas: 13.3, 5.4).
    - Beyond 32 rows it depends on how many personas are different (64 rows, 2 %: of 16 personas 104, 94, of 2 personas
      51, 63), which a compiled graph must not know: masked.

    On GPUs nothing has been measured yet.
    """
    if not worth_listing(K, density, dtype, device):
        return "masked"
    narrow = instructions in ("avx2", "portable")
    listed = personas >= 4 and M <= 32 if narrow else personas == 1 and 32 < M <= 64
    return "correction" if listed else "masked"
