"""What every benchmark shares: the bound measured in the same run, alternating candidates, quantiles, one CSV form.

A candidate is timed only after its result was compared with the reference's; buffers are rotated so that no
cache is measured where a real run would not find the data in one. ``--device cuda`` makes the GPU torch's default
device, where every tensor of a benchmark then is.
"""

import argparse
import csv
import datetime
import importlib.metadata
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from kernels import backends
from pipeline.atomic import write_text

BEYOND_CACHES = 512 * 2**20
"""Bytes: more than the last-level cache of any CPU or GPU that this runs on."""
GRAPH_CALLS = 64
"""Calls in one CUDA graph: so many that the start of a graph is lost in them."""


@dataclass(frozen=True)
class Row:
    """One measurement. ``ratio_to_peer`` is the peer's median over this one's (above 1: faster than the peer);
    ``ratio_to_bound`` this median over the time that its bytes take at the read ceiling (1 is perfect)."""

    op: str
    case: str
    dtype: str
    threads: int
    backend: str
    peer: str
    median_us: float
    q20_us: float
    q80_us: float
    gbytes_per_s: float
    ratio_to_peer: float
    ratio_to_bound: float
    device: str
    torch: str
    date: str


@dataclass(frozen=True)
class Timing:
    """Microseconds."""

    median: float
    q20: float
    q80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        ordered = sorted(1e6 * s for s in seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


class CheckError(AssertionError):
    """A candidate's result is wrong: it is not timed."""


class Bench:
    """Collects rows and prints them. One instance is one run on one machine."""

    def __init__(self, quick: bool, output: Path | None) -> None:
        self.quick, self.output = quick, output
        self.rows: list[Row] = []
        self.ceiling = read_ceiling(0.2 if quick else 1.0)
        where = device_name() if here() == "cuda" else f"{device_name()}, {torch.get_num_threads()} threads"
        print(f"{where}, read ceiling {self.ceiling:.1f} GB/s")

    def compare(
        self,
        op: str,
        case: str,
        dtype: torch.dtype,
        candidates: dict[str, Callable[[], Any]],
        *,
        nbytes: int,
        peer: str,
        check: Callable[[str], bool],
        seconds: float = 1.0,
        graph: bool = True,
    ) -> dict[str, Timing]:
        """Time ``candidates`` in turn, each for about ``seconds``; ``peer`` is the one that ratios refer to.

        On a GPU each is captured in a CUDA graph, unless ``graph`` is False: for what waits for the device.
        Raises CheckError if ``check`` is false for one of them.
        """
        for name in candidates:
            if not check(name):
                raise CheckError(f"{op} {case} {dtype}: {name} gives a wrong result; nothing is timed")
        if graph and here() == "cuda":
            candidates = {name: Replay(run) for name, run in candidates.items()}
        timings = alternate(candidates, seconds / 5 if self.quick else seconds)
        for name, timing in timings.items():
            self.add(op, case, dtype, name, peer, timing, timings[peer], nbytes)
        return timings

    def add(
        self, op: str, case: str, dtype: torch.dtype, name: str, peer: str, timing: Timing, other: Timing, nbytes: int
    ) -> None:
        """Record and print one measurement."""
        bound = nbytes / self.ceiling / 1e3
        row = Row(
            op=op,
            case=case,
            dtype=str(dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            backend=name,
            peer=peer,
            median_us=round(timing.median, 1),
            q20_us=round(timing.q20, 1),
            q80_us=round(timing.q80, 1),
            gbytes_per_s=round(nbytes / timing.median / 1e3, 2),
            ratio_to_peer=round(other.median / timing.median, 2),
            ratio_to_bound=round(timing.median / bound, 2) if bound else 0.0,
            device=device_name(),
            torch=torch.__version__,
            date=datetime.date.today().isoformat(),
        )
        self.rows.append(row)
        print(
            f"{op:18} {case:34} {row.dtype:9} {name:18} {row.median_us:>12.1f} us {row.gbytes_per_s:>7.2f} GB/s"
            f"  {row.ratio_to_peer:>8.2f} x {peer}  {row.ratio_to_bound:>7.2f} x bound"
        )

        self._write()

    def close(self) -> None:
        """Say where the CSV is, if one was asked for."""
        if self.output is not None:
            print(f"written to {self.output}")

    def _write(self) -> None:
        """The CSV, if one was asked for, after every row: a benchmark that is stopped leaves what it measured."""
        if self.output is None:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_text(self.output, text.getvalue())


def alternate(candidates: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Timing]:
    """Run the candidates in turn, so that a change of the machine's speed meets all of them.

    The fast ones run several times a turn; there are three turns or more, and for about ``seconds``, but only two
    where a turn takes longer than five seconds.
    """
    first = {name: duration(run) for name, run in candidates.items()}
    longest = max(first.values())
    repeats = {name: max(1, min(200, int(longest / max(took, 1e-7) / 4))) for name, took in first.items()}
    turns = max(2 if sum(first.values()) > 5 else 3, min(200, int(seconds / max(longest, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, run in candidates.items():
            samples[name] += [duration(run) for _ in range(repeats[name])]
    return {name: Timing.of(values) for name, values in samples.items()}


class Replay:
    """``GRAPH_CALLS`` calls of ``run`` in one CUDA graph: the kernels alone, as the host that launches them is slower.

    ``run`` must not wait for the device. The results of a call are overwritten by the next.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # What compiles or allocates at a first call.
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(GRAPH_CALLS):
                run()
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> float:
        """Seconds of one call."""
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3 / GRAPH_CALLS


def duration(run: Callable[..., Any], *arguments: Any) -> float:
    """Seconds that ``run(*arguments)`` takes, on a GPU until its last kernel has ended."""
    if isinstance(run, Replay):
        return run()
    wait()
    start = time.perf_counter()
    run(*arguments)
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the GPU is idle, where there is one."""
    if here() == "cuda":
        torch.cuda.synchronize()


def here() -> str:
    """The device type that this benchmark runs on."""
    return torch.get_default_device().type


def implementations(op: str, run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """``run`` by the backend that ``op`` chooses here; on a GPU by Triton, too."""
    chosen = backends.choose(op, here())

    def by_triton() -> Any:
        os.environ[backends.ENVIRONMENT] = f"{op}=triton"
        try:
            return run()
        finally:
            del os.environ[backends.ENVIRONMENT]

    return {chosen: run} if chosen != "cuda" else {chosen: run, "triton": by_triton}


def rotating(make: Callable[[], Any], nbytes: int, limit: int = BEYOND_CACHES) -> Iterator[Any]:
    """Endless turns through so many buffers of ``nbytes`` bytes that none is in a cache when its turn comes."""
    return itertools.cycle([make() for _ in range(max(2, -(-limit // nbytes)))])


def read_ceiling(seconds: float) -> float:
    """GB/s of the fastest pass over memory beyond all caches: on torch's threads; a GPU's copy, both ways."""
    size = BEYOND_CACHES * (8 if here() == "cuda" else 1)
    buffer = torch.ones(size // 4)
    target = torch.empty_like(buffer) if here() == "cuda" else None
    passes: list[float] = []
    start = time.perf_counter()
    while not passes or time.perf_counter() - start < seconds:
        passes.append(duration(buffer.sum) if target is None else duration(target.copy_, buffer) / 2)
    return size / min(passes) / 1e9


def device_name() -> str:
    """GPU and the version of Triton, or CPU model and the vector instructions that matter here; no host name."""
    if here() == "cuda":
        return f"{torch.cuda.get_device_name()}, triton {importlib.metadata.version('triton')}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in wanted if flag in facts.get("flags", "").split()]
    return " ".join([facts.get("model name", "CPU"), *flags])


def run(main: Callable[[Bench], None], description: str, *, gpu: bool = False) -> None:
    """The command line of a benchmark; ``gpu``: it can run on one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions: under a minute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    if gpu:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what is measured (default: cpu)")
    parser.add_argument("--output", type=Path, help="write the rows to this CSV file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if gpu and options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU")
        torch.set_default_device("cuda")
    bench = Bench(options.quick, options.output)
    with torch.inference_mode():
        main(bench)
    bench.close()
