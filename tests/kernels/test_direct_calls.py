"""Native ops called past their Python checks: they raise, and never leave their tensors (see ``direct_calls``)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import native
from tests.kernels.test_sanitizers import COMPILER, ROOT, compile_, compiler, instruction_flags  # noqa: F401

pytestmark = pytest.mark.skipif(native.problem() is not None, reason=native.describe())
SANITIZE = ["-O1", "-g1", "-fPIC", "-fsanitize=address", "-ffp-contract=off"]


def storm(calls, *words, **environment):
    command = [sys.executable, "-m", "tests.kernels.direct_calls", str(calls), "0", *map(str, words)]
    # Allocations of absurd sizes fail, as they do without the sanitizer; Python itself leaks by design.
    options = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | options, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[:6000]
    returned, raised = map(int, done.stdout.split())
    assert returned + raised == calls
    assert min(returned, raised) > calls / 10


def test_random_direct_calls_raise_or_return():
    storm(1300)


@pytest.mark.slow
def test_random_direct_calls_stay_inside_their_tensors(compiler):  # noqa: F811
    """The whole library with the address sanitizer; the interpreter must load its runtime first."""
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000", '-DPERSONA_TORCH_VERSION=""', '-DPERSONA_FLAGS=""']
    flags, objects = instruction_flags(), []
    for number, source in enumerate(sorted(ROOT.glob("csrc/**/*.cpp"))):
        objects.append(f"direct{number}.o")
        extra = flags.get(source.stem, [])
        done = compile_([*SANITIZE, *includes, *defines, *extra, "-c", str(source), "-o", objects[-1]], compiler)
        assert done.returncode == 0, done.stderr[-3000:]
    libraries = [f"-L{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    done = compile_(["-shared", "-fsanitize=address", *objects, "-o", "direct.so", *libraries], compiler)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip(f"{COMPILER} has no shared sanitizer runtime")
    storm(13000, compiler / "direct.so", LD_PRELOAD=" ".join(found))


def test_sizes_whose_product_overflows():
    """2^59 bytes in each of 32 rows are 0 bytes modulo 2^64."""
    bits, mask = torch.zeros(32, 0, dtype=torch.uint8), torch.zeros(0, dtype=torch.bool)
    for room in (mask, mask.view(0, 1), torch.zeros(32, 0, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match="must have"):
            torch.ops.persona_native.unpack_bits(bits, 2**62, room)
    with pytest.raises(RuntimeError, match="columns must be at least 0, got -5"):
        torch.ops.persona_native.unpack_bits(bits[:0], -5, mask.view(0, 0))


def test_columns_of_a_weight_that_has_none():
    weight, y = torch.zeros(9, 0), torch.ones(3, 9)
    columns, offsets = torch.full((18,), 7, dtype=torch.uint16), torch.arange(0, 20, 2, dtype=torch.int32)
    torch.ops.persona_native.subtract_removed(torch.zeros(0, 64), weight, columns, offsets, 1.0, y)
    assert torch.equal(y, torch.ones(3, 9))


def test_tensors_of_another_kind():
    bits, scores = torch.zeros(8, 1, dtype=torch.uint8), torch.eye(8)
    for bad in (scores.to("meta"), scores.to_sparse(), scores.int(), scores.cfloat(), scores[0], None):
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.ops.persona_native.mask_select(bad, None, None, 3, bits)
