"""Sums that do not depend on the order of their terms, for ``--deterministic``.

Every term is cut into pieces on three fixed grids. Multiples of a grid's step add up in float64 without rounding as
long as the sum stays below 2^53 steps, so any order and any division over devices give the same bits.
The idea of adding on grids that are fixed beforehand is that of reproducible summation (Demmel and Nguyen 2013).
"""

from torch import Tensor

STEPS = (1.0, 2.0**-36, 2.0**-72)
"""Terms below 2^51, at most 2^18 of them; what is below 2^-73 of a term is dropped."""
LARGEST = 2.0**51


class ExactSums:
    """The sum of any number of float64 tensors of one shape; ``pieces`` float64 ``[3, *shape]`` add up over devices."""

    def __init__(self, like: Tensor) -> None:
        self.pieces = like.new_zeros((len(STEPS), *like.shape))

    def add(self, rows: Tensor, terms: Tensor) -> None:
        """Add ``terms`` to the rows (int64, each once) of the first dimension."""
        rest = terms
        for piece, step in zip(self.pieces, STEPS, strict=True):
            # Adding 1.5 * 2^52 steps leaves no bit below one step.
            shift = 1.5 * 2.0**52 * step
            cut = (rest + shift) - shift
            piece.index_add_(0, rows, cut)
            rest = rest - cut

    def value(self) -> Tensor:
        """The sum, rounded in one fixed order. Raises OverflowError where it is too large to be exact."""
        if bool((self.pieces[0].abs() >= LARGEST).any()):
            raise OverflowError("sums of 2^51 and more are not exact")
        return self.pieces[0] + (self.pieces[1] + self.pieces[2])
