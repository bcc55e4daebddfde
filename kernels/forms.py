"""Which form a masked layer's product takes."""

import torch

FORMS = ("masked", "correction")
"""``masked_linear`` on the packed masks, or ``correction_linear`` on lists of the removed weights."""

LISTED_DENSITY, LISTED_DENSITY_NARROW = 0.98, 0.99
"""Masks that keep less are never listed unless that is forced; with the instructions of ``NARROW``."""
NARROW = ("avx2", "portable")
"""Instruction sets that have no masks in their instructions."""


def worth_listing(
    K: int, density: float, personas: int, dtype: torch.dtype, device: str, instructions: str = ""
) -> bool:
    """Whether ``choose_form`` can ever choose the lists, so that a layer of so many ``personas`` should make them."""
    if K > 1 << 16:
        return False
    if device == "cuda":
        return personas > 1 and density >= LISTED_DENSITY
    least = LISTED_DENSITY_NARROW if instructions in NARROW else LISTED_DENSITY
    return device == "cpu" and dtype == torch.float32 and density >= least


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
    """
    if not worth_listing(K, density, personas, dtype, device, instructions):
        return "masked"
    if device == "cuda":
        return "correction" if 4 <= M <= 64 else "masked"
    listed = personas >= 4 and M <= 32 if instructions in NARROW else personas == 1 and 32 < M <= 64
    return "correction" if listed else "masked"
