"""What the benchmarks of the masked products share: problems, the honest base, the bound over a peer."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Bench, Timing, rotating
from kernels import pack_bits

Pool = Iterator[Tensor]
"""Weights of one shape and dtype, beyond the caches."""
OWN_DENSE = "own dense"
"""The masked kernel with no persona: the honest base where torch's product of one row is slow."""


def persona_of(index: int) -> Tensor:
    """One persona for all rows; -1: none."""
    return torch.tensor([index], dtype=torch.int32)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Within a few roundings of the largest value: by up to 9 of them 4096 products differ that are added in two right
    orders in float32 (accuracy itself is a matter of the tests)."""
    error = (actual.double() - expected.double()).abs().max()
    return bool(error <= 16 * torch.finfo(actual.dtype).eps * expected.double().abs().max())


def weights(rows: int, columns: int, dtype: torch.dtype) -> Pool:
    return rotating(lambda: torch.randn(rows, columns).to(dtype), rows * columns * dtype.itemsize)


def masks(personas: int, rows: int, columns: int, density: float) -> Tensor:
    return torch.stack([pack_bits(torch.rand(rows, columns) < density) for _ in range(personas)])


def against(timings: dict[str, Timing], ours: str, peer: str, bound: float) -> None:
    """Print how much of what the bytes allow over ``peer`` was reached."""
    reached = timings[peer].median / timings[ours].median
    print(f"{'':18} bytes allow {bound:.2f} x {peer}, reached {reached:.2f} x: {reached / bound:.2f} of it")


def problems(bench: Bench) -> Iterator[Pool]:
    """Pools of weights of real layer shapes in float32 and bfloat16."""
    shapes = [(4096, 4096)] if bench.quick else [(4096, 4096), (14336, 4096), (4096, 14336), (1536, 576)]
    for rows, columns in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            yield weights(rows, columns, dtype)
