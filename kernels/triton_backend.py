"""Registers Triton implementations without importing Triton: that happens at their first use."""

import importlib
import importlib.util
import os
from typing import Any

from kernels import backends

INTERPRETER = "TRITON_INTERPRET"
"""Set to 1 before the first use, Triton runs its kernels in Python on the CPU: slow, and meant for tests."""


def register(op: str, module: str, function: str) -> None:
    """Make ``function`` of ``module`` the Triton backend of ``op``, or record why there is none."""
    devices = ("cuda", "cpu") if os.environ.get(INTERPRETER) == "1" else ("cuda",)
    # find_spec does not run the package: importing triton takes longer than most scripts that never launch a kernel.
    if importlib.util.find_spec("triton") is None:
        backends.register_missing(op, "triton", "triton is not installed; run: pip install triton", devices)
        return

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments)

    backends.register(op, "triton", launch, devices)
