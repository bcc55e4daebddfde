"""The product with a compressed weight, one row and prefill: a persona shipped alone. On a GPU also N:M masks in
torch's semi-structured form, at prefill."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.harness import Bench, here, rotating, run
from benchmarks.products import OWN_DENSE, Pool, against, close, masks, persona_of, problems
from kernels import SparseWeight, backends, mask_select_nm, masked_linear, sparse_linear, unpack_bits


def compressed(bench: Bench, pool: Pool, sparsity: float, count: int = 1) -> None:
    """``count`` rows, the kept weights alone."""
    weight = next(pool)
    rows, columns, dtype = *weight.shape, weight.dtype
    ours, nobody = backends.choose("sparse_linear", here()), persona_of(-1)
    bits = masks(1, rows, columns, 1 - sparsity)
    mask, x = torch.rand(rows, columns) >= sparsity, torch.randn(count, columns).to(dtype)
    packed = SparseWeight.from_dense(weight, mask)
    right = close(sparse_linear(x, packed), F.linear(x, torch.where(mask, weight, 0)))
    sparse = rotating(
        lambda: SparseWeight(packed.values.clone(), packed.bits.clone(), packed.offsets.clone(), columns), packed.nbytes
    )
    candidates: dict[str, Callable[[], Any]] = {
        ours: lambda: sparse_linear(x, next(sparse)),
        "F.linear": lambda: F.linear(x, next(pool)),
        OWN_DENSE: lambda: masked_linear(x, next(pool), bits, nobody),
    }
    if count == 1 and dtype == torch.float32 and here() == "cpu":
        once = (weight * mask).to_sparse_csr()
        csr = rotating(once.clone, 12 * once.values().numel())
        candidates["torch.sparse CSR"] = lambda: next(csr) @ x[0]
    timings = bench.compare(
        "sparse_linear",
        f"{rows}x{columns}, {sparsity:.0%} removed" + (f", {count} rows" if count > 1 else ""),
        dtype,
        candidates,
        nbytes=packed.nbytes,
        peer="F.linear",
        check=lambda _: right,
    )
    against(timings, ours, OWN_DENSE, dtype.itemsize / (dtype.itemsize * (1 - sparsity) + 1 / 8))


def semi_structured(bench: Bench, pool: Pool, count: int) -> None:
    """``count`` rows with a 2:4 mask: our masked product, and the sparse tensor cores behind torch's form of it."""
    weight = next(pool)
    rows, columns, dtype = *weight.shape, weight.dtype
    bits, first = mask_select_nm(weight, torch.ones(columns), 2, 4), persona_of(0)
    premasked = weight * unpack_bits(bits, columns)
    form, x = torch.sparse.to_sparse_semi_structured(premasked), torch.randn(count, columns).to(dtype)
    ours = backends.choose("masked_linear", here())
    candidates: dict[str, Callable[[], Any]] = {
        ours: lambda: masked_linear(x, weight, bits[None], first),
        "semi-structured": lambda: F.linear(x, form),
        "premasked": lambda: F.linear(x, premasked),
    }
    expected = F.linear(x, premasked)
    bench.compare(
        "masked_linear",
        f"{rows}x{columns}, 2:4, {count} rows",
        dtype,
        candidates,
        nbytes=rows * columns * dtype.itemsize + bits.numel(),
        peer="premasked",
        check=lambda name: close(candidates[name](), expected),
        graph=False,
    )


def main(bench: Bench) -> None:
    for pool in problems(bench):
        for sparsity in (0.4, 0.5, 0.6, 0.7):
            compressed(bench, pool, sparsity)
        compressed(bench, pool, 0.5, 64)
        if here() == "cuda" and next(pool).dtype == torch.bfloat16:
            for count in (1024, 4096):
                semi_structured(bench, pool, count)


if __name__ == "__main__":
    run(main, __doc__, gpu=True)
