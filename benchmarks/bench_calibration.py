"""A whole calibration of two personas on SmolLM2 (on a GPU on eight blocks of Llama-3-8B, too): bare passes, ours with
masks, and reference-style hooks, in turn."""

import torch

from benchmarks.harness import Bench, Timing, duration, here, run
from benchmarks.hooks import BATCH, Hooks, reference_style, roles, tokens
from benchmarks.shapes import GPU_BLOCKS, LLAMA3_8B, SMOLLM2, Shapes, random_model
from kernels import backends
from kernels.ops.mask_select import mask_select
from pipeline.collector import Collector
from pipeline.scoring import wanda
from pipeline.sites import find_linears, find_sites, matrix
from pipeline.stats import ActivationStats

PERSONAS = ("plus", "minus")


def calibrate(bench: Bench, shapes: Shapes, dtype: torch.dtype, blocks: int) -> None:
    """Per batch: forward alone; forward under the collector; forward under a norm at every linear."""
    causal = random_model(shapes, dtype, blocks)
    linears = find_linears(causal)
    sites, _ = find_sites(causal, linears, torch.device(here()))
    stats = ActivationStats.zeros(PERSONAS, sites, here())
    collector = Collector(causal, stats)
    role, persona = roles()
    sources = [str(b) for b in range(BATCH)]
    norms = Hooks(linears, reference_style({name: matrix(module).shape[1] for name, module in linears.items()}))

    def ours(ids: torch.Tensor) -> None:
        with collector.collecting(), collector.batch(role, persona, sources):
            causal.model(ids)

    def reference(ids: torch.Tensor) -> None:
        with norms:
            causal.model(ids)

    passes = {"torch": causal.model, backends.choose("activation_stats", here()): ours, "reference-style": reference}
    samples: dict[str, list[float]] = {name: [] for name in passes}
    causal.model(torch.randint(shapes.vocabulary, (BATCH, tokens())))
    for _ in range(3 if bench.quick else 8):
        ids = torch.randint(shapes.vocabulary, (BATCH, tokens()))
        for name, forward in passes.items():
            samples[name].append(duration(forward, ids))
    bare, batch = Timing.of(samples["torch"]), f"{shapes.name} {BATCH}x{tokens()}"
    for name, values in samples.items():
        timing = Timing.of(values)
        bench.add("calibration", f"{batch}, {blocks} blocks, a batch", dtype, name, "torch", timing, bare, 0)
        print(f"    = {100 * (timing.median / bare.median - 1):+.2f} % on the bare forward")
    masks(bench, f"{shapes.name}, {blocks} blocks", dtype, stats, linears)


def masks(bench: Bench, case: str, dtype: torch.dtype, stats: ActivationStats, linears: dict) -> None:
    """Wanda masks of both personas at 50 % from the statistics above: scores, selection, packing."""

    def select() -> None:
        for site in stats.sites:
            for name in PERSONAS:
                score = wanda(stats.channels(name, site.name).mean_abs).float()
                for linear in site.linears:
                    weight = matrix(linears[linear])
                    mask_select(weight, score, weight.shape[1] // 2)

    samples = []
    for _ in range(2 if bench.quick else 5):
        samples.append(duration(select))
    timing = Timing.of(samples)
    weights = sum(matrix(module).numel() for module in linears.values())
    nbytes = 2 * (weights * dtype.itemsize + weights // 8)
    backend = backends.choose("mask_select", here())
    case = f"{case}, wanda masks of {len(PERSONAS)} personas"
    bench.add("calibration", case, dtype, backend, backend, timing, timing, nbytes)


def main(bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        calibrate(bench, SMOLLM2, dtype, 4 if bench.quick else SMOLLM2.blocks)
    if here() == "cuda":
        calibrate(bench, LLAMA3_8B, torch.bfloat16, GPU_BLOCKS)


if __name__ == "__main__":
    run(main, __doc__, gpu=True)
