"""The compiled ops: loads ``kernels/_native.abi3.so`` once, and says why where it cannot.

``PERSONA_ISA=portable|avx2|avx512|avx512_bf16|amx_bf16`` forces the instruction set; by default it is the best that the
CPU has.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels import backends

LIBRARY = Path(__file__).parent / "_native.abi3.so"
ENVIRONMENT = "PERSONA_ISA"
REBUILD = "run `make setup`, or `pip install --no-build-isolation -e .` with a C++ compiler"


@functools.cache
def problem() -> str | None:
    """Loads the library; the reason and what to do if that failed, else None.

    Raises BackendError if the environment forces an instruction set that is not there.
    """
    if not LIBRARY.exists():
        return f"the native ops are not built; {REBUILD}"
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} does not load into torch {torch.__version__} ({error}); {REBUILD}"
    if not hasattr(torch.ops.persona_native, "has_cuda"):
        return f"{LIBRARY.name} is older than these sources; {REBUILD}"
    if forced := os.environ.get(ENVIRONMENT):
        use_instruction_set(forced)
    return None


def register(op: str, function: Callable[..., Any], *, cuda: Callable[..., Any] | None = None) -> None:
    """Register ``function`` as the cpp backend of ``op``, or the reason why there is none.

    ``cuda``: the function of the cuda backend, if the library has kernels for CUDA devices too.
    """
    reason = problem()
    _register(op, "cpp", function, reason, "cpu")
    if cuda is not None:
        if reason is None and not has_cuda():
            reason = (
                "the native ops are built without CUDA; PERSONA_BUILD=cuda demands it (nvcc, a CUDA build of torch)"
            )
        _register(op, "cuda", cuda, reason, "cuda")


def _register(op: str, backend: str, function: Callable[..., Any], reason: str | None, device: str) -> None:
    if reason is None:
        backends.register(op, backend, function, devices=(device,))
    else:
        backends.register_missing(op, backend, reason, devices=(device,))


def instruction_sets() -> list[str]:
    """The instruction sets that this build and this CPU have, the best first; empty without the library."""
    return torch.ops.persona_native.instruction_sets().split() if problem() is None else []


def instruction_set() -> str:
    """The instruction set in use; empty without the library."""
    return torch.ops.persona_native.instruction_set() if problem() is None else ""


def has_cuda() -> bool:
    """Whether the library has kernels for CUDA devices."""
    return problem() is None and torch.ops.persona_native.has_cuda()


def program(device: str) -> str:
    """What multiplies on a device type: the instruction set on "cpu", "cuda" where kernels are compiled for it.

    Empty for neither.
    """
    if device == "cpu":
        return instruction_set()
    return "cuda" if device == "cuda" and has_cuda() else ""


def use_instruction_set(name: str) -> None:
    """Use ``name`` from now on, in every thread. Raises BackendError if this CPU or build lacks it."""
    if not torch.ops.persona_native.use_instruction_set(name):
        present = torch.ops.persona_native.instruction_sets().replace(" ", ", ")
        raise backends.BackendError(f"{ENVIRONMENT}: {name!r} is not available; this CPU and build have {present}")


def describe() -> str:
    """One line: instruction set, torch version and flags of the build, or why there is none."""
    reason = problem()
    if reason is not None:
        return f"missing: {reason}"
    ops = torch.ops.persona_native
    return f"instruction set {instruction_set()} of {', '.join(instruction_sets())}; built with {ops.build_info()}"
