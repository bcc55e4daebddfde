"""The package as others meet it: imports, backends, the name it shares."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import kernels
from kernels import backends

ROOT = Path(kernels.__file__).parent


def run(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_nothing_above_them(path):
    names = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
    assert not names & {"pipeline", "transformers", "lightning", "datasets"}


def test_importing_is_cheap_and_has_no_version(tmp_path):
    code = "import sys, kernels; assert 'torch' not in sys.modules; assert not hasattr(kernels, '__version__')"
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_transformers_works_beside_it(place, tmp_path):
    code = (
        "import torch, transformers as t; c = t.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32,"
        "num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1); m = t.AutoModelForCausalLM.from_config(c);"
        "print(m.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, do_sample=False).shape[1] >= 4)"
    )
    result = run(code, ROOT.parent if place == "root" else tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("True")


def test_report(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "kernels"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert all(f"\n{op}\n" in result.stdout for op in ("activation_stats", "mask_select", "masked_linear", "pack_bits"))


def test_unknown_name_lists_the_known():
    with pytest.raises(AttributeError, match="masked_linear"):
        kernels.nonsense  # noqa: B018


@pytest.fixture
def op():
    backends.register("toy", "reference", lambda: "slow")
    yield "toy"
    backends._OPS.pop("toy")


def test_forcing(op, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert backends.implementation(op, "cpu")() == "slow"
    monkeypatch.setenv(backends.ENVIRONMENT, "other=cpp")
    assert backends.choose(op, "cpu") == "reference"
    monkeypatch.setenv(backends.ENVIRONMENT, "toy=cpp")
    with pytest.raises(backends.BackendError, match=r"forces 'cpp' for 'toy'"):
        backends.choose(op, "cpu")
    monkeypatch.setenv(backends.ENVIRONMENT, "nonsense")
    with pytest.raises(backends.BackendError, match="unknown backend"):
        backends.choose(op, "cpu")


def test_a_missing_backend_is_told_once(op):
    backends.register_missing(op, "cpp", "no compiler; install g++", devices=("cpu",))
    with pytest.warns(UserWarning, match="no compiler; install g"):
        assert backends.choose(op, "cpu") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.choose(op, "cpu")
    backends.register(op, "cpp", lambda: "fast", devices=("cpu",))
    assert backends.implementation(op, "cpu")() == "fast"
