"""A whole calibration of two personas on SmolLM2: bare passes, ours with masks, and reference-style hooks, in turn."""

import time

import torch

from benchmarks.harness import Bench, Timing, duration, run
from benchmarks.hooks import BATCH, TOKENS, Hooks, reference_style, roles
from benchmarks.shapes import SMOLLM2, smollm2
from kernels import backends
from kernels.ops.mask_select import mask_select
from pipeline.collector import Collector
from pipeline.scoring import wanda
from pipeline.sites import find_linears, find_sites, matrix
from pipeline.stats import ActivationStats

PERSONAS = ("plus", "minus")


def calibrate(bench: Bench, dtype: torch.dtype) -> None:
    """Per batch: forward alone; forward under the collector; forward under a norm at every linear."""
    blocks = 4 if bench.quick else SMOLLM2.blocks
    causal = smollm2(dtype, blocks)
    linears = find_linears(causal)
    sites, _ = find_sites(causal, linears, torch.device("cpu"))
    stats = ActivationStats.zeros(PERSONAS, sites)
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

    passes = {"torch": causal.model, backends.choose("activation_stats", "cpu"): ours, "reference-style": reference}
    samples: dict[str, list[float]] = {name: [] for name in passes}
    causal.model(torch.randint(49152, (BATCH, TOKENS)))
    for _ in range(3 if bench.quick else 4):
        ids = torch.randint(49152, (BATCH, TOKENS))
        for name, forward in passes.items():
            samples[name].append(duration(forward, ids))
    bare = Timing.of(samples["torch"])
    for name, values in samples.items():
        timing = Timing.of(values)
        bench.add(
            "calibration", f"SmolLM2 {BATCH}x{TOKENS}, {blocks} blocks, a batch", dtype, name, "torch", timing, bare, 0
        )
        print(f"    = {100 * (timing.median / bare.median - 1):+.2f} % on the bare forward")
    masks(bench, dtype, stats, linears)


def masks(bench: Bench, dtype: torch.dtype, stats: ActivationStats, linears: dict) -> None:
    """Wanda masks of both personas at 50 % from the statistics above: scores, selection, packing."""
    samples = []
    for _ in range(2 if bench.quick else 5):
        start = time.perf_counter()
        for site in stats.sites:
            for name in PERSONAS:
                score = wanda(stats.channels(name, site.name).mean_abs).float()
                for linear in site.linears:
                    weight = matrix(linears[linear])
                    mask_select(weight, score, weight.shape[1] // 2)
        samples.append(time.perf_counter() - start)
    timing = Timing.of(samples)
    weights = sum(matrix(module).numel() for module in linears.values())
    nbytes = 2 * (weights * dtype.itemsize + weights // 8)
    backend = backends.choose("mask_select", "cpu")
    bench.add("calibration", "SmolLM2, wanda masks of 2 personas", dtype, backend, backend, timing, timing, nbytes)


def main(bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        calibrate(bench, dtype)


if __name__ == "__main__":
    run(main, __doc__)
