"""User errors inside forked processes look like those of one process: one line, exit code 2, nothing left."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from pipeline.calibrate import main
from pipeline.loading import load_model
from tests.pipeline.tiny import make_model


def calibrate(*words):
    command = [sys.executable, "-m", "pipeline.calibrate", *words, "--accelerator", "cpu", "--devices", "2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def broken(ground, tmp_path):
    """The tiny Llama with NaN in one weight."""
    model = load_model(str(ground.llama))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for file in [*ground.llama.glob("tokenizer*"), *ground.llama.glob("*.jinja")]:
        shutil.copy(file, tmp_path / "broken")
    return tmp_path / "broken"


def test_nan_in_a_forked_process(broken, words, tmp_path):
    done = calibrate(*words(tmp_path / "out", "--criterion", "wanda", model=broken))
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]
    assert re.search(r"^error: layer model\.layers\.1\.mlp\.down_proj: NaN.*pairs\.csv:\d+", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_an_encoder_in_a_forked_process(words, tmp_path):
    make_model(tmp_path / "bert", "bert")
    done = calibrate(*words(tmp_path / "out", "--criterion", "wanda", model=tmp_path / "bert"))
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]
    assert "not a causal language model" in done.stderr.splitlines()[-1]
    assert done.returncode == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_devices_that_the_machine_lacks(words, tmp_path, capsys):
    assert main(words(tmp_path / "out", "--accelerator", "tpu")) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --devices/--accelerator")
    assert main(words(tmp_path / "out", "--accelerator", "gpu", "--devices", "7")) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --devices/--accelerator")
    assert list(tmp_path.iterdir()) == []
