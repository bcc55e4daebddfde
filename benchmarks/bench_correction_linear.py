"""The dense product less the listed removed weights: one persona, and a persona for each row."""

import torch
from torch.nn import functional as F

from benchmarks.harness import Bench, here, run
from benchmarks.products import Pool, against, close, masks, problems
from kernels import backends, correction_linear, masked_linear, removed_lists
from kernels.ops.masked_linear.reference import masked_linear_reference


def correction(bench: Bench, pool: Pool, removed: float, count: int) -> None:
    """``count`` rows, each with a persona of its own (64: all with one)."""
    personas = 1 if count == 64 else count
    weight = next(pool)
    rows, columns, dtype = *weight.shape, weight.dtype
    ours = backends.choose("correction_linear", here())
    bits = masks(personas, rows, columns, 1 - removed)
    lists, x = removed_lists(bits, columns), torch.randn(count, columns).to(dtype)
    persona = torch.arange(personas, dtype=torch.int32)
    expected = masked_linear_reference(x, weight, bits, persona, 0.0, None)
    right = close(correction_linear(x, weight, *lists, persona), expected)
    timings = bench.compare(
        "correction_linear",
        f"{rows}x{columns}, {removed:.0%}, {count} rows, {personas} personas",
        dtype,
        {
            ours: lambda: correction_linear(x, next(pool), *lists, persona),
            "masked_linear": lambda: masked_linear(x, next(pool), bits, persona),
            "F.linear": lambda: F.linear(x, next(pool)),
        },
        nbytes=rows * columns * dtype.itemsize + lists[0].nbytes,
        peer="F.linear",
        check=lambda _: right,
    )
    against(timings, ours, "F.linear", dtype.itemsize / (dtype.itemsize + 2 * removed * personas))


def main(bench: Bench) -> None:
    for pool in problems(bench):
        for removed in (0.01, 0.02, 0.05):
            for count in (1, 16, 64):
                correction(bench, pool, removed, count)


if __name__ == "__main__":
    run(main, __doc__, gpu=True)
