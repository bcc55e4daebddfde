"""A calibration by 1 and by 2 processes, against two independent ones, and the seconds of its stages.

Whole programs are timed, with one thread per process; samples per second are of the measuring alone.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import Bench, Timing, duration, run
from pipeline.data.catalogue import load_catalogue
from pipeline.data.module import make_samples
from pipeline.data.prompts import Prompter
from pipeline.loading import load_model, load_tokenizer
from pipeline.provenance import RUN

PERSONAS = "dichotomies"


def start(folder: Path, samples: int, devices: int) -> "subprocess.Popen[bytes]":
    """A calibration of the embedded model with ``samples`` items per pair."""
    command = [sys.executable, "-m", "pipeline.calibrate", "--personas", PERSONAS, "--samples", str(samples)]
    command += ["--criterion", "wanda", "--sparsity", "0.3", "--accelerator", "cpu", "--devices", str(devices)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*command, "--output", str(folder)], env=environment, **quiet)  # type: ignore[call-overload]


def finish(*programs: "subprocess.Popen[bytes]") -> None:
    for program in programs:
        if program.wait():
            raise RuntimeError(f"a calibration ended with code {program.returncode}")


def measuring(*folders: Path) -> float:
    """Seconds of the measuring: of the slowest, where several ran side by side."""
    return max(json.loads((folder / RUN).read_text(encoding="utf-8"))["seconds"]["measuring"] for folder in folders)


def stages(bench: Bench, samples: int) -> int:
    """Times what happens before the first batch; returns the number of samples."""

    def note(stage: str, seconds: float) -> None:
        timing = Timing.of([seconds])
        bench.add("scaling", f"stage: {stage}", torch.float32, "cpu", "cpu", timing, timing, 0)

    note("imports", duration(subprocess.run, [sys.executable, "-c", "import lightning, transformers"]))
    began = time.perf_counter()
    tokenizer = load_tokenizer("smollm2")
    note("tokenizer", time.perf_counter() - began)
    note("model", duration(load_model, "smollm2"))
    catalogue, limits = load_catalogue(PERSONAS), {"count": samples, "max_length": 512, "seed": 0}
    began = time.perf_counter()
    made, _ = make_samples(catalogue.sets, Prompter(tokenizer), **limits)
    note(f"tokenising {len(made)} samples", time.perf_counter() - began)
    return len(made)


def main(bench: Bench) -> None:
    items = 1 if bench.quick else 40
    samples = stages(bench, items)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds: dict[str, float] = {}
        for devices in (1, 2):
            finish(start(folder / str(devices), items, devices))
            seconds[f"{devices} processes"] = measuring(folder / str(devices))
        finish(*(start(folder / one, items, 1) for one in ("a", "b")))
        # Two independent programs measure every sample twice.
        seconds["2 independent"] = measuring(folder / "a", folder / "b") / 2
    peer = "2 independent"
    for backend, value in seconds.items():
        timing, other = Timing.of([value]), Timing.of([seconds[peer]])
        bench.add("scaling", f"measuring {samples} samples", torch.float32, backend, peer, timing, other, 0)
        print(f"    = {samples / value:.2f} samples/s, efficiency {seconds[peer] / value:.0%} of two independent ones")


if __name__ == "__main__":
    run(main, __doc__ or "")
