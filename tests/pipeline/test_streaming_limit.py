"""The operating system's limit on a streamed run's memory: it holds for a model several times as large."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from pipeline.store import load_manifest
from tests.pipeline.tiny import make_tokenizer, write_pairs

LIMIT = 700_000_000
"""Bytes of private writable memory (RLIMIT_DATA): all that a process holds but for the code of its libraries."""
BLOCKS, WIDTH, INNER = 51, 1024, 2048


def write_model(folder):
    """A random Llama of 2.1 GB, written block by block."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": 16}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    LlamaConfig(**shape, **ids, max_position_embeddings=512, tie_word_embeddings=True).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    index = {}

    def put(name, shapes):
        tensors = {key: torch.randn(size, generator=generator) / size[-1] ** 0.5 for key, size in shapes.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    total = put(
        "rest.safetensors", {"model.embed_tokens.weight": (len(tokenizer), WIDTH), "model.norm.weight": (WIDTH,)}
    )
    for number in range(BLOCKS):
        block = f"model.layers.{number}."
        attention = {f"{block}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        inner = {f"{block}mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        norms = {f"{block}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        down = {f"{block}mlp.down_proj.weight": (WIDTH, INNER)}
        total += put(f"block{number}.safetensors", attention | inner | norms | down)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total


RUN = """
import sys
from pipeline import calibrate
code = calibrate.main(sys.argv[1:])
print(*[line for line in open("/proc/self/status") if line.startswith("VmHWM")])
sys.exit(code)
"""


def calibrate_under_limit(*options):
    """Exit code, what it said, and the peak of its resident memory in bytes (None if it did not come to the end).

    The process reads its own peak: what the system tells its parent has that of the parent, before the exec, in it.
    """

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))

    command = [sys.executable, "-c", RUN, *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=environment)
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    return done.returncode, done.stderr, int(peak.group(1)) * 1024 if peak else None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds all private memory on Linux only")
def test_a_model_of_three_times_the_limit(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    assert write_model(model) >= 3 * LIMIT
    pairs = write_pairs(tmp_path / "pairs.csv")
    options = ["--model", model, "--personas", f"up/down={pairs}", "--criterion", "wanda", "--sparsity", "0.2"]
    options += ["--samples", "2", "--batch-tokens", "256"]
    code, said, peak = calibrate_under_limit(*options, "--stream", "--output", tmp_path / "streamed")
    assert code == 0, said
    assert len(load_manifest(tmp_path / "streamed")["layers"]) == 7 * BLOCKS
    print(f"peak of resident memory {peak / 1e6:.0f} MB under a limit of {LIMIT / 1e6:.0f} MB")
    # Resident memory has the pages of shared libraries besides what the limit is on.
    assert peak < LIMIT
    code, said, _ = calibrate_under_limit(*options, "--output", tmp_path / "whole")
    assert code != 0
    assert "memory" in said
    assert not (tmp_path / "whole").exists()
