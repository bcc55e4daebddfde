"""Loading the native library: what runs, what is said when it is missing, and what PERSONA_BUILD forces."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import kernels
from kernels import backends, native

ROOT = Path(__file__).parents[2]
NATIVE_OPS = (
    "activation_stats",
    "mask_select",
    "mask_select_scores",
    "mask_select_nm",
    "mask_select_threshold",
    "masked_linear",
    "sparse_linear",
    "correction_linear",
)
needs_library = pytest.mark.skipif(native.problem() is not None, reason=native.describe())


def start(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_library
@pytest.mark.parametrize("op", NATIVE_OPS)
def test_native_is_chosen(op):
    getattr(kernels, op)
    assert backends.choose(op, "cpu") == "cpp"


@needs_library
def test_instruction_set_is_forced_by_the_environment():
    code = (
        "from kernels import native; native.problem(); import torch; print(torch.ops.persona_native.instruction_set())"
    )
    for name in native.instruction_sets():
        assert start("-c", code, PERSONA_ISA=name).stdout.split() == [name]


@needs_library
def test_impossible_instruction_set_raises():
    with pytest.raises(backends.BackendError, match="'neon' is not available; this CPU and build have .*portable"):
        native.use_instruction_set("neon")
    done = start("-c", "import kernels; kernels.mask_select", PERSONA_ISA="neon")
    assert "PERSONA_ISA: 'neon' is not available" in done.stderr


@needs_library
def test_description_names_instruction_set_build_and_flags(isa):
    line = native.describe()
    assert f"instruction set {isa} of " in line
    assert "built with torch 2." in line
    assert "-O3" in line


@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="the library may have CUDA")
@pytest.mark.parametrize("op", ["activation_stats", "mask_select", "mask_select_scores"])
def test_cuda_is_missing_with_what_to_do(op):
    getattr(kernels, op)
    state = backends.explain()[op]["cuda"]
    assert state.startswith("missing: the native ops are built without CUDA; PERSONA_BUILD=cuda demands it")


@needs_library
def test_cuda_kernels_are_a_backend_of_their_own(monkeypatch):
    monkeypatch.setattr(backends, "_OPS", {})
    monkeypatch.setattr(torch.ops.persona_native, "has_cuda", lambda: True)
    native.register("op", lambda: "native", cuda=lambda: "native")
    assert backends.choose("op", "cpu") == "cpp"
    assert backends.choose("op", "cuda") == "cuda"
    assert backends.implementation("op", "cuda")() == "native"


@pytest.fixture
def missing(monkeypatch, tmp_path):
    """A package whose library is not there, and no op registered yet."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.abi3.so")
    monkeypatch.setattr(backends, "_OPS", {})
    monkeypatch.setattr(backends, "_WARNED", set())
    native.problem.cache_clear()
    yield native.LIBRARY
    native.problem.cache_clear()


def test_missing_library_is_said_once_with_what_to_do(missing):
    backends.register("op", "reference", lambda: "slow")
    native.register("op", lambda: "fast")
    with pytest.warns(UserWarning, match="op: backend 'cpp' is missing.*not built; run `make setup`") as heard:
        chosen = [backends.choose("op", "cpu") for _ in range(2)]
    assert chosen == ["reference", "reference"]
    assert len(heard) == 1
    assert native.instruction_sets() == []
    assert native.describe().startswith("missing: the native ops are not built")


@needs_library
def test_older_library_is_reported(monkeypatch):
    native.problem.cache_clear()
    monkeypatch.setattr(torch.ops, "persona_native", types.SimpleNamespace())
    assert native.problem() == f"{native.LIBRARY.name} is older than these sources; {native.REBUILD}"
    native.problem.cache_clear()


def test_broken_library_is_reported(missing):
    missing.write_bytes(b"not a library")
    assert f"does not load into torch {torch.__version__}" in native.problem()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("fast", "PERSONA_BUILD=fast: must be one of none, cpu, cuda"),
        ("cpu", "PERSONA_BUILD=cpu cannot be built: there is no C++ compiler (nothing-of-the-sort)"),
        ("cuda", "PERSONA_BUILD=cuda cannot be built: there is no C++ compiler (nothing-of-the-sort)"),
    ],
)
def test_forced_and_impossible_build_ends_in_one_sentence(choice, message):
    done = start("setup.py", "--name", PERSONA_BUILD=choice, CXX="nothing-of-the-sort")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("choice", "said"), [("none", False), ("", True)])
def test_package_builds_without_native_ops(choice, said):
    done = start("setup.py", "--name", PERSONA_BUILD=choice, CXX="nothing-of-the-sort")
    assert done.returncode == 0, done.stderr
    assert "persona-subnetworks" in done.stdout
    assert ("the native ops are left out" in done.stderr) == said


@pytest.mark.parametrize("broken", ["compiler", "check"])
def test_cpu_part_is_built_where_the_cuda_part_fails(tmp_path, broken):
    """With two small sources in the place of csrc, one of which does not compile or is refused before that."""
    (tmp_path / "fine.cpp").write_text('extern "C" void* PyInit_tiny() { return nullptr; }')
    (tmp_path / "broken.cpp").write_text('#error "no such CUDA"')
    (tmp_path / "build.py").write_text(f"""
import importlib.util, sys
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension
spec = importlib.util.spec_from_file_location("persona_setup", {str(ROOT / "setup.py")!r})
persona = importlib.util.module_from_spec(spec)
spec.loader.exec_module(persona)

def extension(parts, optional):
    cuda = "cuda" in parts
    built = Extension("tiny", ["fine.cpp", *["broken.cpp"] * cuda], py_limited_api=True, optional=optional)
    built.parts = parts
    return built

def refuse(build, check=BuildExtension._check_abi):
    if {broken == "check"} and "cuda" in build.extensions[0].parts:
        raise RuntimeError("the detected CUDA version differs")
    return check(build)

persona.extension = extension
BuildExtension._check_abi = refuse
sys.argv = ["build.py", "build_ext", "--inplace"]
setup(name="tiny", ext_modules=[extension(("cpu", "cuda"), True)], cmdclass={{"build_ext": persona.command()}})
""")
    done = subprocess.run([sys.executable, "build.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no such CUDA" in done.stderr or "the detected CUDA version differs" in done.stderr
    assert "the CUDA part cannot be built, see above; building without it" in done.stderr
    assert list(tmp_path.glob("tiny*.so"))
