"""Two hundred personas: memory grows by the channels, never by the weights."""

import json
import subprocess
import sys

import pytest

from pipeline.sites import Site
from pipeline.stats import ActivationStats
from pipeline.store import load_masks

PROGRAM = """
import resource, sys
from pipeline import calibrate
assert calibrate.main(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_statistics_take_64_bytes_per_persona_and_channel():
    sites = (Site("a", 640, ("a", "b")), Site("c", 1536, ("c",)))
    stats = ActivationStats.zeros([f"p{i}" for i in range(200)], sites)
    assert sum(sums.nbytes for sums in stats.sums.values()) == 200 * 64 * (640 + 1536)


@pytest.mark.slow
def test_memory_of_two_hundred_personas(words, tmp_path):
    held = {}
    for count in (10, 200):
        lines, run = tmp_path / f"{count}.jsonl", tmp_path / str(count)
        rows = ({"persona": f"p{p}", "text": f"number {p} likes dog {i}"} for p in range(count) for i in range(2))
        lines.write_text("\n".join(map(json.dumps, rows)))
        options = words(run, "--criterion", "wanda", "--sparsity", "0.3", "--accelerator", "cpu", personas=str(lines))
        done = subprocess.run([sys.executable, "-c", PROGRAM, *options], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        held[count] = int(done.stdout.split()[-1]) / 1024
        assert len(load_masks(run).personas) == count
    # 4.4 MB of statistics, held twice while they are written, 0.5 MB of masks; the rest is the allocator's.
    assert held[200] - held[10] < 40
