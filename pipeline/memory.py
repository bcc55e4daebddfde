"""A batch that does not fit into memory is split, and split again; a single sample that does not fit is an error."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from pipeline.cli import note
from pipeline.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
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


def in_halves(
    do: Callable[[Sequence[T]], list[R]], items: Sequence[T], what: str, alone: Callable[[T], str], whole: str = ""
) -> list[R]:
    """``do(items)``, one result for each; if memory is short, of one half and then of the other.

    ``what``, ``whole``: as in ``make_room``. Raises UserError with ``alone`` of a single item that does not fit.
    """
    try:
        return do(items)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if len(items) == 1:
        raise UserError(f"out of memory {alone(items[0])}: lower --max-length")
    make_room(what, len(items), whole)
    return [one for half in halves(items) for one in in_halves(do, half, what, alone, whole)]
