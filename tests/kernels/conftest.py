"""Fixtures of the kernels tests (seeds and poisoned memory: ``tests/conftest.py``)."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """``torch.compile`` without graph breaks and without a code generator."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
