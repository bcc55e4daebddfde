"""Every CUDA source compiled with nvcc, without a GPU and against the headers of any torch: none may spill."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/*/cuda.cu"))
FLAGS = ["-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas", "-v"]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc (CUDA toolkit) on the PATH")


def compiled(source, target, capability):
    """What nvcc and ptxas say of ``source``: device code alone ("-cubin") or the whole object ("-c")."""
    includes = [f"-I{path}" for path in include_paths("cpu")]
    command = ["nvcc", *target, f"-arch=sm_{capability}", *FLAGS, *includes, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def assert_no_spills(report):
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) > 1
    assert {frame for frame in frames if frame != ("0", "0", "0")} == set()


def test_sources_are_found():
    assert ROOT / "csrc/activation_stats/cuda.cu" in SOURCES


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_device_code_does_not_spill(source, tmp_path):
    assert_no_spills(compiled(source, ["-cubin", "-o", str(tmp_path / "out.cubin")], 90))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.parent.name)
def test_object_compiles(source, capability, tmp_path):
    assert_no_spills(compiled(source, ["-c", "-Xcompiler", "-fPIC", "-o", str(tmp_path / "out.o")], capability))
