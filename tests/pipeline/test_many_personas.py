"""Two hundred personas: memory grows by the channels, never by the weights."""

import json
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import calibrate, shares, streaming
from pipeline.sites import Site
from pipeline.stats import ActivationStats
from pipeline.store import load_masks
from tests.pipeline.tiny import make_tokenizer

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


def write_texts(path, count):
    """Two plain texts for each of ``count`` personas."""
    rows = ({"persona": f"p{p}", "text": f"number {p} likes dog {i}"} for p in range(count) for i in range(2))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


class Alive:
    """Counts the bytes of tensors that live at one time."""

    def __init__(self):
        self.now = self.most = self.seen = 0

    def watch(self, tensor):
        self.now, self.seen = self.now + tensor.nbytes, self.seen + tensor.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._gone, tensor.nbytes)
        return tensor

    def _gone(self, size):
        self.now -= size


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=["whole", "streamed"])
def test_masks_alive_do_not_grow_with_the_personas(words, tmp_path, monkeypatch, options):
    """From the moment a mask is chosen to its file: two layers of it at a time, however many personas there are."""
    most = {}
    for count in (2, 12):
        alive, build, read = Alive(), shares.each_mask, shares.Pieces.read

        def each(*arguments, alive=alive, build=build, **some):
            for one in build(*arguments, **some):
                alive.watch(one.bits)
                yield one

        with monkeypatch.context() as patch:
            for place in (shares, streaming):
                patch.setattr(place, "each_mask", each)
            patch.setattr(shares.Pieces, "read", lambda *a, alive=alive, read=read: alive.watch(read(*a)))
            run = tmp_path / str(count)
            personas = str(write_texts(tmp_path / f"{count}.jsonl", count))
            assert calibrate.main(words(run, "--criterion", "wanda", *options, personas=personas)) == 0
        masks = load_masks(run)
        one = sum(bits.nbytes for bits in masks.bits["p0"].values())
        assert alive.seen >= count * one
        assert alive.now == 0
        most[count] = alive.most / max(bits.nbytes for bits in masks.bits["p0"].values())
    assert most[12] == most[2] <= 2


@pytest.fixture
def wide(tmp_path):
    """A model whose masks outweigh its statistics: 0.5 MB against 0.03 MB a persona, in ``up_proj`` alone."""
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.slow
def test_memory_of_two_hundred_personas(wide, words, tmp_path):
    held = {}
    for count in (10, 200):
        lines, run = write_texts(tmp_path / f"{count}.jsonl", count), tmp_path / str(count)
        more = ("--criterion", "wanda", "--sparsity", "0.3", "--accelerator", "cpu", "--include", "up_proj")
        # Small batches: as large for ten personas as for two hundred.
        more += ("--batch-tokens", "128")
        options = words(run, *more, model=wide, personas=str(lines))
        done = subprocess.run([sys.executable, "-c", PROGRAM, *options], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        held[count] = int(done.stdout.split()[-1]) / 1024
    # 100 MB of masks. 6.6 MB of statistics, held twice while they are written; the rest is the allocator's.
    print(f"resident memory at most, MB: {held}")
    assert sum(file.stat().st_size for file in (tmp_path / "200" / "masks").iterdir()) > 100e6
    assert held[200] - held[10] < 60
