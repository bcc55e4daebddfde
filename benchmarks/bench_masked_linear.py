"""The masked product: personas of one batch on one weight, prefill, and both at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.harness import Bench, here, run
from benchmarks.products import OWN_DENSE, Pool, against, close, masks, persona_of, problems
from kernels import backends, masked_linear
from kernels.ops.masked_linear.reference import gated_weight, masked_linear_reference


def of_personas(bench: Bench, pool: Pool, personas: int) -> None:
    """A batch with a row for each persona. Copies that were masked before cost what any dense weights cost."""
    weight = next(pool)
    rows, columns, dtype = *weight.shape, weight.dtype
    ours, nobody = backends.choose("masked_linear", here()), persona_of(-1)
    bits = masks(personas, rows, columns, 0.5)
    x, persona = torch.randn(personas, columns).to(dtype), torch.arange(personas, dtype=torch.int32)
    kept = torch.rand(rows, columns) < 0.5
    right = close(masked_linear(x, weight, bits, persona), masked_linear_reference(x, weight, bits, persona, 0.0, None))
    candidates: dict[str, Callable[[], Any]] = {
        ours: lambda: masked_linear(x, next(pool), bits, persona),
        "premasked, loop": lambda: [F.linear(row, next(pool)) for row in x.split(1)],
        "F.linear": lambda: F.linear(x, next(pool)),
        OWN_DENSE: lambda: masked_linear(x, next(pool), bits, nobody),
    }
    if personas == 1:
        candidates["W * M each call"] = lambda: F.linear(x, next(pool) * kept)
    size = dtype.itemsize
    timings = bench.compare(
        "masked_linear",
        f"{rows}x{columns}, {personas} personas",
        dtype,
        candidates,
        nbytes=rows * columns * size + personas * bits[0].numel(),
        peer="premasked, loop",
        check=lambda _: right,
    )
    against(timings, ours, "premasked, loop", personas * size / (size + personas / 8))
    if personas == 1:
        against(timings, ours, OWN_DENSE, size / (size + 1 / 8))


def prefill(bench: Bench, pool: Pool, count: int) -> None:
    """Many rows of one persona, against the dense product with a weight that was masked before."""
    weight = next(pool)
    rows, columns, dtype = *weight.shape, weight.dtype
    ours, first = backends.choose("masked_linear", here()), persona_of(0)
    bits = masks(1, rows, columns, 0.5)
    x = torch.randn(count, columns).to(dtype)
    right = close(masked_linear(x, weight, bits, first), F.linear(x, gated_weight(weight, bits[0], 0.0)))
    bench.compare(
        "masked_linear",
        f"{rows}x{columns}, {count} rows",
        dtype,
        {ours: lambda: masked_linear(x, next(pool), bits, first), "premasked": lambda: F.linear(x, next(pool))},
        nbytes=rows * columns * dtype.itemsize + bits.numel(),
        peer="premasked",
        check=lambda _: right,
    )


def mixed(bench: Bench, pool: Pool, count: int, personas: int) -> None:
    """Many rows of several personas in turn, against a dense product for each with a weight that was masked before."""
    weight = next(pool)
    rows, columns, dtype = *weight.shape, weight.dtype
    ours = backends.choose("masked_linear", here())
    bits = masks(personas, rows, columns, 0.5)
    x, persona = torch.randn(count, columns).to(dtype), torch.arange(count, dtype=torch.int32) % personas
    parts = [x[one::personas].contiguous() for one in range(personas)]
    right = close(masked_linear(x, weight, bits, persona), masked_linear_reference(x, weight, bits, persona, 0.0, None))
    size = dtype.itemsize
    timings = bench.compare(
        "masked_linear",
        f"{rows}x{columns}, {count} rows of {personas} personas",
        dtype,
        {
            ours: lambda: masked_linear(x, next(pool), bits, persona),
            "premasked, loop": lambda: [F.linear(part, next(pool)) for part in parts],
        },
        nbytes=rows * columns * size + personas * bits[0].numel(),
        peer="premasked, loop",
        check=lambda _: right,
    )
    against(timings, ours, "premasked, loop", personas * size / (size + personas / 8))


def main(bench: Bench) -> None:
    for pool in problems(bench):
        for personas in (1, 4, 16):
            of_personas(bench, pool, personas)
        for count in (64, 256, 1024):
            prefill(bench, pool, count)
        for count, personas in ((64, 4), (64, 16), (256, 16)):
            mixed(bench, pool, count, personas)


if __name__ == "__main__":
    run(main, __doc__, gpu=True)
