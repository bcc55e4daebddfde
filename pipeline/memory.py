"""A batch that does not fit into memory is split, and split again; a single sample that does not fit is an error."""

import gc
from collections.abc import Sequence
from typing import TypeVar

import torch

from pipeline.cli import note
from pipeline.errors import UserError

T = TypeVar("T")
_MESSAGES = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
_told: set[str] = set()


def is_out_of_memory(error: Exception) -> bool:
    """Is the error about memory? The CPU's allocator and some libraries raise a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The first half, rounded up, and the rest."""
    middle = -(-len(items) // 2)
    return items[:middle], items[middle:]


def make_room(what: str, count: int, whole: str = "") -> None:
    """Free what can be freed, and say once per process that a batch of ``count`` is being split.

    Raises UserError where an option, ``whole``, forbids it.
    """
    if whole:
        raise UserError(
            f"out of memory on a batch of {count} {what}, which {whole} does not split: lower --batch-tokens"
        )
    if what not in _told:
        _told.add(what)
        note(f"out of memory on a batch of {count} {what}: it goes in halves (a smaller --batch-tokens is faster)")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
