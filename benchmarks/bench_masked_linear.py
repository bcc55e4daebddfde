"""The products of masked layers: personas of one batch on one weight, compressed weights, corrections, prefill."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Bench, Timing, rotating, run
from kernels import SparseWeight, backends, correction_linear, masked_linear, pack_bits, removed_lists, sparse_linear
from kernels.ops.masked_linear.reference import gated_weight, masked_linear_reference

PLAIN = torch.tensor([-1], dtype=torch.int32)
FIRST = torch.tensor([0], dtype=torch.int32)
OURS = backends.choose("masked_linear", "cpu")
Pool = Iterator[Tensor]
"""Weights of one shape and dtype, beyond the caches."""
OWN_DENSE = "own dense"
"""The masked kernel with no persona: the honest base where torch's product of one row is slow."""


def close(actual: Tensor, expected: Tensor) -> bool:
    """Within a few roundings of the largest value (accuracy itself is a matter of the tests)."""
    error = (actual.double() - expected.double()).abs().max()
    return bool(error <= 8 * torch.finfo(actual.dtype).eps * expected.double().abs().max())


def weights(rows: int, columns: int, dtype: torch.dtype) -> Pool:
    return rotating(lambda: torch.randn(rows, columns).to(dtype), rows * columns * dtype.itemsize)


def masks(personas: int, rows: int, columns: int, density: float) -> Tensor:
    return torch.stack([pack_bits(torch.rand(rows, columns) < density) for _ in range(personas)])


def against(timings: dict[str, Timing], ours: str, peer: str, bound: float) -> None:
    """Print how much of what the bytes allow over ``peer`` was reached."""
    reached = timings[peer].median / timings[ours].median
    print(f"{'':18} bytes allow {bound:.2f} x {peer}, reached {reached:.2f} x: {reached / bound:.2f} of it")


def of_personas(bench: Bench, pool: Pool, personas: int) -> None:
    """A batch with a row for each persona. Copies that were masked before cost what any dense weights cost."""
    weight = next(pool)
    rows, columns, dtype = *weight.shape, weight.dtype
    bits = masks(personas, rows, columns, 0.5)
    x, persona = torch.randn(personas, columns).to(dtype), torch.arange(personas, dtype=torch.int32)
    kept = torch.rand(rows, columns) < 0.5
    right = close(masked_linear(x, weight, bits, persona), masked_linear_reference(x, weight, bits, persona, 0.0, None))
    candidates: dict[str, Callable[[], Any]] = {
        OURS: lambda: masked_linear(x, next(pool), bits, persona),
        "premasked, loop": lambda: [F.linear(row, next(pool)) for row in x.split(1)],
        "F.linear": lambda: F.linear(x, next(pool)),
        OWN_DENSE: lambda: masked_linear(x, next(pool), bits, PLAIN),
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
    against(timings, OURS, "premasked, loop", personas * size / (size + personas / 8))
    if personas == 1:
        against(timings, OURS, OWN_DENSE, size / (size + 1 / 8))


def prefill(bench: Bench, pool: Pool, count: int) -> None:
    """Many rows of one persona, against the dense product with a weight that was masked before."""
    weight = next(pool)
    rows, columns, dtype = *weight.shape, weight.dtype
    bits = masks(1, rows, columns, 0.5)
    x = torch.randn(count, columns).to(dtype)
    right = close(masked_linear(x, weight, bits, FIRST), F.linear(x, gated_weight(weight, bits[0], 0.0)))
    bench.compare(
        "masked_linear",
        f"{rows}x{columns}, {count} rows",
        dtype,
        {OURS: lambda: masked_linear(x, next(pool), bits, FIRST), "premasked": lambda: F.linear(x, next(pool))},
        nbytes=rows * columns * dtype.itemsize + bits.numel(),
        peer="premasked",
        check=lambda _: right,
    )


def compressed(bench: Bench, pool: Pool, sparsity: float) -> None:
    """One row, the kept weights alone."""
    weight = next(pool)
    rows, columns, dtype = *weight.shape, weight.dtype
    bits = masks(1, rows, columns, 1 - sparsity)
    mask, x = torch.rand(rows, columns) >= sparsity, torch.randn(1, columns).to(dtype)
    packed = SparseWeight.from_dense(weight, mask)
    right = close(sparse_linear(x, packed), F.linear(x, torch.where(mask, weight, 0)))
    sparse = rotating(
        lambda: SparseWeight(packed.values.clone(), packed.bits.clone(), packed.offsets.clone(), columns), packed.nbytes
    )
    candidates: dict[str, Callable[[], Any]] = {
        OURS: lambda: sparse_linear(x, next(sparse)),
        "F.linear": lambda: F.linear(x, next(pool)),
        OWN_DENSE: lambda: masked_linear(x, next(pool), bits, PLAIN),
    }
    if dtype == torch.float32:
        once = (weight * mask).to_sparse_csr()
        csr = rotating(once.clone, 12 * once.values().numel())
        candidates["torch.sparse CSR"] = lambda: next(csr) @ x[0]
    timings = bench.compare(
        "sparse_linear",
        f"{rows}x{columns}, {sparsity:.0%} removed",
        dtype,
        candidates,
        nbytes=packed.nbytes,
        peer="F.linear",
        check=lambda _: right,
    )
    against(timings, OURS, OWN_DENSE, dtype.itemsize / (dtype.itemsize * (1 - sparsity) + 1 / 8))


def correction(bench: Bench, pool: Pool, removed: float, count: int) -> None:
    """``count`` rows, each with a persona of its own (64: all with one)."""
    personas = 1 if count == 64 else count
    weight = next(pool)
    rows, columns, dtype = *weight.shape, weight.dtype
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
            OURS: lambda: correction_linear(x, next(pool), *lists, persona),
            "masked_linear": lambda: masked_linear(x, next(pool), bits, persona),
            "F.linear": lambda: F.linear(x, next(pool)),
        },
        nbytes=rows * columns * dtype.itemsize + lists[0].nbytes,
        peer="F.linear",
        check=lambda _: right,
    )
    against(timings, OURS, "F.linear", dtype.itemsize / (dtype.itemsize + 2 * removed * personas))


def main(bench: Bench) -> None:
    shapes = [(4096, 4096)] if bench.quick else [(4096, 4096), (14336, 4096), (4096, 14336), (1536, 576)]
    for rows, columns in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            pool = weights(rows, columns, dtype)
            for personas in (1, 4, 16):
                of_personas(bench, pool, personas)
            for count in (64,) if bench.quick else (64, 256, 1024):
                prefill(bench, pool, count)
            for sparsity in (0.4, 0.5, 0.6, 0.7):
                compressed(bench, pool, sparsity)
            for removed in (0.01, 0.02, 0.05):
                for count in (1, 16, 64):
                    correction(bench, pool, removed, count)


if __name__ == "__main__":
    run(main, __doc__)
