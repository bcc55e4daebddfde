"""N:M mask selection in plain PyTorch: a row-wise selection whose rows are the groups."""

from torch import Tensor

from kernels.ops.mask_select.reference import above_threshold, reject_unordered
from kernels.ops.pack_bits.reference import pack_bits_reference


def mask_select_nm_reference(weight: Tensor, channel_score: Tensor, n: int, m: int) -> Tensor:
    """Packed mask of the ``n`` largest ``|W_ij| * a_j`` of every ``m`` consecutive columns."""
    scores = weight.float().abs() * channel_score
    reject_unordered("scores", scores)
    kept = above_threshold(scores.reshape(-1, m), n)
    return pack_bits_reference(kept.reshape(weight.shape))
