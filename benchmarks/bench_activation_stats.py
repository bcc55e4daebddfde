"""Fused activation statistics: one op on rotated buffers, and as a share of a bare forward pass of SmolLM2 (on a GPU
of eight blocks of Llama-3-8B, too)."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Bench, Timing, duration, here, implementations, rotating, run
from benchmarks.hooks import BATCH, Hooks, fused, new_sums, plain, reference_style, roles, tokens
from benchmarks.shapes import GPU_BLOCKS, LLAMA3_8B, SMOLLM2, Shapes, random_model
from kernels import backends
from kernels.ops.activation_stats import activation_stats
from kernels.ops.activation_stats.reference import activation_stats_reference
from pipeline.sites import find_linears, find_sites, matrix

OURS = "activation_stats"
FIRST = ".layers.0."
QUICK_BLOCKS = 4
"""The share of the forward pass does not depend on the number of equal blocks."""


def agrees(x: torch.Tensor) -> bool:
    """The op's sums are within 2e-6 of float64 on the same activations (signed sums: of the sum of magnitudes)."""
    role, persona = roles()
    sums, exact = new_sums(x.shape[2]), new_sums(x.shape[2])
    activation_stats(x, role, persona, sums)
    activation_stats_reference(x.double(), role, persona, exact)
    scale = exact.clone()
    scale[:, 4], scale[:, 7] = exact[:, 3], exact[:, 6]
    return bool(((sums - exact).abs() <= 2e-6 * scale).all())


def one_op(bench: Bench, dtype: torch.dtype, channels: int) -> None:
    """x beyond the caches: a read of memory is the bound."""
    nbytes = BATCH * tokens() * channels * dtype.itemsize
    buffers = rotating(lambda: torch.randn(BATCH, tokens(), channels).to(dtype), nbytes)
    (role, persona), sums, total = roles(), new_sums(channels), torch.zeros(channels)

    def norm() -> None:
        total.add_(next(buffers).float().norm(p=2, dim=(0, 1)) ** 2)

    candidates = implementations(OURS, lambda: activation_stats(next(buffers), role, persona, sums))
    if here() == "cpu":
        candidates["plain"] = lambda: activation_stats_reference(next(buffers), role, persona, sums)
    candidates["reference-style"] = norm
    bench.compare(
        OURS,
        f"x [{BATCH}, {tokens()}, {channels}]",
        dtype,
        candidates,
        nbytes=nbytes,
        peer="reference-style",
        check=lambda name: agrees(next(buffers)),
    )


def share_of_forward(bench: Bench, shapes: Shapes, dtype: torch.dtype, blocks: int) -> None:
    """The hooks of a whole pass against the bare pass, all in turn in one process, measured in two ways.

    "live" is the time inside the hooks of a running pass, which on a GPU is the host's alone and left out; "isolated"
    calls them on the inputs of the first block, once for every block of the model.
    """
    causal = random_model(shapes, dtype, blocks)
    model, ids = causal.model, torch.randint(shapes.vocabulary, (BATCH, tokens()))
    linears = find_linears(causal)
    found, _ = find_sites(causal, linears, torch.device(here()))
    sites = {site.name: linears[site.name] for site in found}
    widths = {name: matrix(module).shape[1] for name, module in linears.items()}
    ours = backends.choose(OURS, here())
    ways = {
        ours: Hooks(sites, fused(widths)),
        f"{ours} on every linear": Hooks(linears, fused(widths)),
        "plain": Hooks(sites, plain(widths)),
        "reference-style": Hooks(linears, reference_style(widths)),
    }
    inputs: dict[str, torch.Tensor] = {}
    # The first block's alone: all of them would be a gigabyte.
    with Hooks({name: m for name, m in linears.items() if FIRST in name}, inputs.__setitem__):
        model(ids)
    bare: list[float] = []
    live: dict[str, list[float]] = {name: [] for name in ways}
    isolated: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        bare.append(duration(model, ids))
        for name, hooks in ways.items():
            live[name].append(seconds_inside(hooks, lambda: model(ids)))
            isolated[name].append(duration(on_first_block, hooks, inputs))
    forward = Timing.of(bare)
    bench.add(
        "forward",
        f"{shapes.name} {BATCH}x{tokens()}, bare, {blocks} blocks",
        dtype,
        "torch",
        "torch",
        forward,
        forward,
        0,
    )
    measured = {"live": live, "isolated": isolated} if here() == "cpu" else {"isolated": isolated}
    for way, samples in measured.items():
        for name, values in samples.items():
            timing, read = Timing.of(values), sum(widths[linear] for linear in ways[name].modules)
            bench.add(
                OURS,
                f"{way}, {len(ways[name].modules)} linears of {shapes.name}",
                dtype,
                name,
                "reference-style",
                timing,
                Timing.of(samples["reference-style"]),
                BATCH * tokens() * read * dtype.itemsize,
            )
            print(f"    = {100 * timing.median / forward.median:.2f} % of the bare forward")


def seconds_inside(hooks: Hooks, forward: Callable[[], Any]) -> float:
    hooks.seconds = 0.0
    with hooks:
        forward()
    return hooks.seconds


def on_first_block(hooks: Hooks, inputs: dict[str, torch.Tensor]) -> None:
    """The hooks of one block, as often as the model has blocks."""
    first = [name for name in hooks.modules if FIRST in name]
    for _ in range(len(hooks.modules) // len(first)):
        for name in first:
            hooks.measure(name, inputs[name])


def main(bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        widths = [SMOLLM2.linears[0][2], SMOLLM2.linears[-1][2], LLAMA3_8B.linears[0][2], LLAMA3_8B.linears[-1][2]]
        for channels in widths[: 2 if bench.quick else 4]:
            one_op(bench, dtype, channels)
        share_of_forward(bench, SMOLLM2, dtype, QUICK_BLOCKS if bench.quick else SMOLLM2.blocks)
    if here() == "cuda":
        share_of_forward(bench, LLAMA3_8B, torch.bfloat16, GPU_BLOCKS)


if __name__ == "__main__":
    run(main, __doc__, gpu=True)
