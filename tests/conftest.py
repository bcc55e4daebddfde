"""Fixtures for all tests: fixed seeds, and uninitialised memory full of NaN."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

LONG = ("sanitizers", "streaming", "embedded", "whole_runs", "resume", "triton_interpreter", "efficiency", "processes")
"""Files that take longest: dealt out first, so that the workers end together."""


def pytest_collection_modifyitems(items):
    first = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.stem, len(first)))


def pytest_collection_finish():
    """What is imported and collected by now stays: the garbage collector need not look at it in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Kernels that leave an output element unwritten show it: torch fills new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
