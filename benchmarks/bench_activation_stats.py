"""Fused activation statistics: one op on rotated buffers, and as a share of a bare forward pass of SmolLM2."""

import torch

from benchmarks.harness import Bench, Timing, duration, rotating, run
from benchmarks.hooks import BATCH, TOKENS, Hooks, fused, new_sums, plain, reference_style, roles
from benchmarks.shapes import LLAMA3_8B, SMOLLM2, smollm2
from kernels import backends
from kernels.ops.activation_stats import activation_stats
from kernels.ops.activation_stats.reference import activation_stats_reference
from pipeline.sites import find_linears, find_sites

OURS = "activation_stats"


def agrees(x: torch.Tensor) -> bool:
    """The op's sums are within 2e-6 of float64 on the same activations (signed sums: of the sum of magnitudes)."""
    role, persona = roles(x.shape[0], x.shape[1])
    sums, exact = new_sums(x.shape[2]), new_sums(x.shape[2])
    activation_stats(x, role, persona, sums)
    activation_stats_reference(x.double(), role, persona, exact)
    scale = exact.clone()
    scale[:, 4], scale[:, 7] = exact[:, 3], exact[:, 6]
    return bool(((sums - exact).abs() <= 2e-6 * scale).all())


def one_op(bench: Bench, dtype: torch.dtype, channels: int) -> None:
    """x beyond the caches: a read of memory is the bound."""
    nbytes = BATCH * TOKENS * channels * dtype.itemsize
    buffers = rotating(lambda: torch.randn(BATCH, TOKENS, channels).to(dtype), nbytes)
    (role, persona), sums, total = roles(), new_sums(channels), torch.zeros(channels)

    def norm() -> None:
        total.add_(next(buffers).float().norm(p=2, dim=(0, 1)) ** 2)

    candidates = {
        backends.choose(OURS, "cpu"): lambda: activation_stats(next(buffers), role, persona, sums),
        "plain": lambda: activation_stats_reference(next(buffers), role, persona, sums),
        "reference-style": norm,
    }
    bench.compare(
        OURS,
        f"x [{BATCH}, {TOKENS}, {channels}]",
        dtype,
        candidates,
        nbytes=nbytes,
        peer="reference-style",
        check=lambda name: agrees(next(buffers)),
    )


def share_of_forward(bench: Bench, dtype: torch.dtype) -> None:
    """Time inside the hooks of live passes over the time of bare passes, alternating in one process."""
    causal = smollm2(dtype)
    model, ids = causal.model, torch.randint(49152, (BATCH, TOKENS))
    linears = find_linears(causal)
    found, _ = find_sites(causal, linears, torch.device("cpu"))
    sites = {site.name: linears[site.name] for site in found}
    widths = {name: module.in_features for name, module in linears.items()}
    every = len(linears)
    ways = {
        backends.choose(OURS, "cpu"): Hooks(sites, fused(widths)),
        f"{backends.choose(OURS, 'cpu')} on {every}": Hooks(linears, fused(widths)),
        "plain": Hooks(sites, plain(widths)),
        "reference-style": Hooks(linears, reference_style(widths)),
    }
    bare, inside = [], {name: [] for name in ways}
    model(ids)
    for _ in range(2 if bench.quick else 7):
        bare.append(duration(lambda: model(ids)))
        for name, hooks in ways.items():
            hooks.seconds = 0.0
            with hooks:
                model(ids)
            inside[name].append(hooks.seconds)
    forward = Timing.of(bare)
    nbytes = BATCH * TOKENS * sum(site.width for site in found) * dtype.itemsize
    bench.add("forward", "SmolLM2 8x256, bare", dtype, "torch", "torch", forward, forward, 0)
    peer = Timing.of(inside["reference-style"])
    for name, samples in inside.items():
        timing = Timing.of(samples)
        bench.add(
            OURS, f"in hooks, {len(ways[name].modules)} linears", dtype, name, "reference-style", timing, peer, nbytes
        )
        print(f"    = {100 * timing.median / forward.median:.2f} % of the bare forward")


def main(bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        widths = [SMOLLM2.linears[0][2], SMOLLM2.linears[-1][2], LLAMA3_8B.linears[0][2], LLAMA3_8B.linears[-1][2]]
        for channels in widths[: 2 if bench.quick else 4]:
            one_op(bench, dtype, channels)
        share_of_forward(bench, dtype)


if __name__ == "__main__":
    run(main, __doc__)
