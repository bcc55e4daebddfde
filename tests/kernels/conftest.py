"""Fixtures of the kernels tests (seeds and poisoned memory: ``tests/conftest.py``)."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles import TILED

from kernels import native


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """``torch.compile`` without graph breaks and without a code generator."""
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def instruction_sets(*, tiles: bool) -> list[Any]:
    """Parameters of a fixture; without ``tiles`` the one is left out that differs in bfloat16 products alone."""
    names = [name for name in native.instruction_sets() if tiles or name != TILED]
    return names or [pytest.param("", marks=pytest.mark.skip(native.describe()))]


@pytest.fixture(params=instruction_sets(tiles=False))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that the native ops have here, one after the other."""
    yield from used(request)


@pytest.fixture(params=instruction_sets(tiles=True))
def isa_of_products(request: pytest.FixtureRequest) -> Iterator[str]:
    """With matrix tiles, too."""
    yield from used(request)


def used(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.ops.persona_native.instruction_set()
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
