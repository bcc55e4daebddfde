"""Tests that need a GPU: skipped, with the reason, where there is none."""

import sys
from pathlib import Path

import pytest
import torch

# What the tests of the kernels compare with.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        reason = "no GPU: torch.cuda.is_available() is False"
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["triton", "cuda"])
def backend(request, monkeypatch):
    """Each GPU backend that the ops of a test have; the others are skipped with what is missing."""
    from kernels import backends

    def force(*ops):
        for op in ops:
            state = backends.explain()[op].get(request.param, "missing: not in this version")
            if state.startswith("missing"):
                pytest.skip(f"{op}: {request.param} {state}")
        monkeypatch.setenv(backends.ENVIRONMENT, ",".join(f"{op}={request.param}" for op in ops))

    return force
