"""Which implementation runs: preference, forcing by the environment, one warning for a missing one, the report."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kernels import backends, mask_select_scores

ROOT = Path(__file__).parents[2]


def make(name):
    return lambda: name


@pytest.fixture
def ops(monkeypatch):
    """Two ops of our own: "op" with reference, triton (CUDA) and a missing cpp; "other" with reference."""
    monkeypatch.setattr(backends, "_OPS", {})
    monkeypatch.setattr(backends, "_WARNED", set())
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    backends.register("op", "reference", make("op reference"))
    backends.register("op", "triton", make("op triton"), devices=("cuda",))
    backends.register_missing("op", "cpp", "run make build", devices=("cpu",))
    backends.register("other", "reference", make("other reference"))

    def force(value):
        monkeypatch.setenv(backends.ENVIRONMENT, value)

    return force


def test_fastest_backend_of_the_device(ops):
    assert backends.implementation("op", "cuda")() == "op triton"
    with pytest.warns(UserWarning, match="run make build"):
        assert backends.implementation("op", "cpu")() == "op reference"
    assert backends.implementation("other", "cuda")() == "other reference"


def test_preference_not_order_of_registration(ops):
    backends.register("op", "cpp", make("op cpp"), devices=("cuda",))
    assert backends.choose("op", "cuda") == "cpp"


def test_compiled_cuda_comes_before_triton(ops):
    backends.register("op", "cuda", make("op cuda"), devices=("cuda",))
    assert backends.choose("op", "cuda") == "cuda"
    assert backends.explain()["op"]["cuda"] == "present"
    ops("op=cuda")
    with pytest.raises(backends.BackendError, match="forces 'cuda' for 'op', which does not run on 'cpu'"):
        backends.choose("op", "cpu")


def test_without_compiled_cuda_it_is_said_what_is_slower(ops):
    backends.register_missing("op", "cuda", "built without CUDA", devices=("cuda",))
    with pytest.warns(UserWarning, match="op: backend 'cuda' is missing, a slower one is used: built without CUDA"):
        assert backends.choose("op", "cuda") == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.choose("other", "cuda")


def test_what_comes_after_a_backend(ops):
    backends.register("op", "cuda", make("op cuda"), devices=("cuda",))
    assert backends.after("op", "cuda", "cuda")() == "op triton"
    backends.register_missing("other", "triton", "not installed", devices=("cuda",))
    with pytest.warns(UserWarning, match="other: backend 'triton' is missing, a slower one is used: not installed"):
        assert backends.after("other", "cuda", "cuda")() == "other reference"
    with pytest.raises(backends.BackendError, match="'op' has no backend behind 'reference' for device 'cpu'"):
        backends.after("op", "reference", "cpu")


def test_missing_backend_warns_once(ops):
    with pytest.warns(UserWarning, match="op: backend 'cpp' is missing, a slower one is used: run make build") as heard:
        backends.choose("op", "cpu")
    assert len(heard) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.choose("op", "cpu")
        backends.choose("op", "cuda")
        backends.choose("other", "cpu")


def test_backend_that_appears_is_missing_no_more(ops):
    backends.register("op", "cpp", make("op cpp"), devices=("cpu",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.implementation("op", "cpu")() == "op cpp"
        assert backends.explain()["op"]["cpp"] == "present"


def test_no_backend_for_the_device(ops):
    backends.register("narrow", "triton", make("narrow"), devices=("cuda",))
    with pytest.raises(backends.BackendError, match="op 'narrow' has no backend for device 'cpu'"):
        backends.choose("narrow", "cpu")


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        ("reference", ("reference", "reference")),
        ("op=reference", ("reference", "reference")),
        ("other=reference", ("triton", "reference")),
        ("op=triton,other=reference", ("triton", "reference")),
        (" op=reference , other=reference,", ("reference", "reference")),
        ("op = reference", ("reference", "reference")),
        ("", ("triton", "reference")),
    ],
    ids=repr,
)
def test_forcing(ops, value, chosen):
    ops(value)
    assert tuple(backends.choose(op, "cuda") for op in ("op", "other")) == chosen


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fast", "unknown backend 'fast'; known are cpp, cuda, triton, reference"),
        ("op=fast", "unknown backend 'fast'"),
        ("op=", "unknown backend ''"),
        ("cpp", "PERSONA_BACKEND forces 'cpp' for 'op', which is missing: run make build"),
        ("op=cuda", "forces 'cuda' for 'op', which is missing: this version has no such implementation"),
        ("triton", "forces 'triton' for 'op', which does not run on 'cpu'"),
    ],
    ids=repr,
)
def test_bad_force_raises(ops, value, message):
    ops(value)
    with pytest.raises(backends.BackendError, match=message):
        backends.implementation("op", "cpu")


def test_unknown_names_are_not_registered(ops):
    with pytest.raises(backends.BackendError, match="unknown backend 'fast'"):
        backends.register("op", "fast", make("fast"))
    with pytest.raises(backends.BackendError, match="unknown backend 'fast'"):
        backends.register_missing("op", "fast", "why", ())


def test_an_op_obeys(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, "pack_bits=reference,mask_select_scores=cuda")
    with pytest.raises(backends.BackendError, match="forces 'cuda' for 'mask_select_scores'"):
        mask_select_scores(torch.ones(1, 8), 1)
    monkeypatch.setenv(backends.ENVIRONMENT, "mask_select_scores=reference")
    assert mask_select_scores(torch.ones(1, 8), 3).tolist() == [[0b111]]


def test_explain(ops):
    with pytest.warns(UserWarning, match="run make build"):
        row = backends.explain()["op"]
    assert row["reference"] == row["triton"] == "present"
    assert row["cpp"] == "missing: run make build"
    assert row["chosen on cpu"] == "reference"


def test_explain_reports_a_bad_force_instead_of_failing(ops):
    ops("cpp")
    assert "run make build" in backends.explain()["op"]["chosen on cpu"]


@pytest.mark.parametrize("force", ["", "pack_bits=reference"])
def test_report_on_the_command_line(force, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT, force)
    done = subprocess.run([sys.executable, "-m", "kernels"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    paragraphs = {lines[0]: lines[1:] for lines in (p.splitlines() for p in done.stdout.split("\n\n"))}
    for op in ("activation_stats", "mask_select", "mask_select_scores", "masked_linear", "pack_bits", "unpack_bits"):
        assert "  reference        present" in paragraphs[op]
    assert torch.__version__ in done.stdout
    assert (f"{backends.ENVIRONMENT}=" in done.stdout) == bool(force)
