"""The kernels under the address and undefined-behaviour sanitizers, without torch: ``sanitize.cpp``."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++").split()[0]
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"]


def compile_(arguments, folder):
    return subprocess.run([COMPILER, "-std=c++17", *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler ({COMPILER})")
    folder = tmp_path_factory.mktemp("sanitize")
    (folder / "empty.cpp").write_text("int main() {}\n")
    done = compile_([*SANITIZE, "empty.cpp", "-o", "empty"], folder)
    if done.returncode or subprocess.run([folder / "empty"]).returncode:
        pytest.skip(f"{COMPILER} has no working sanitizers: {done.stderr[:200]}")
    return folder


def instruction_flags():
    spec = importlib.util.spec_from_file_location("persona_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.INSTRUCTIONS


def test_odd_shapes_are_clean(compiler):
    flags = instruction_flags()
    for source in [*ROOT.glob("csrc/simd/*.cpp"), ROOT / "tests/kernels/sanitize.cpp"]:
        done = compile_([*SANITIZE, f"-I{ROOT}/csrc", *flags.get(source.stem, []), "-c", str(source)], compiler)
        assert done.returncode == 0, done.stderr[-3000:]
    done = compile_([*SANITIZE, *sorted(str(p) for p in compiler.glob("*.o")), "-o", "sanitize"], compiler)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([compiler / "sanitize"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert "portable" in done.stdout
