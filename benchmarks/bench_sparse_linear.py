"""The product with a compressed weight, one row: a persona shipped alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.harness import Bench, rotating, run
from benchmarks.products import OWN_DENSE, PLAIN, Pool, against, close, masks, problems
from kernels import SparseWeight, backends, masked_linear, sparse_linear

OURS = backends.choose("sparse_linear", "cpu")


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


def main(bench: Bench) -> None:
    for pool in problems(bench):
        for sparsity in (0.4, 0.5, 0.6, 0.7):
            compressed(bench, pool, sparsity)


if __name__ == "__main__":
    run(main, __doc__)
