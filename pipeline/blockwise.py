"""Run a model's own forward, but only one decoder block of it.

The blocks before it hand on what they are given, the one behind it records its input and ends the pass. So the block
gets the position embeddings, masks and whatever else its model hands to it, and what the model does between two blocks
is done, without a line of code for any architecture.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError


class _Reached(Exception):  # noqa: N818 - no error: the pass has come to where it was to end
    """The pass has come to the block behind."""


class Blockwise:
    """A model whose forward runs one block at a time.

    ``run(number, ids, attention, hidden)`` gives the input of block ``number + 1`` from that of block ``number``;
    -1 stands for what is before the first block. Inside ``with``, the model's blocks are changed.
    """

    def __init__(self, model: Any, blocks: dict[str, nn.Module]) -> None:
        self.model, self.names, self.blocks = model, list(blocks), list(blocks.values())
        self._at = -1
        self._hidden: Tensor | None = None
        self._reached: Tensor | None = None
        self._form: int | None = None
        self._extra: tuple[Tensor, ...] = ()

    @contextmanager
    def replaced(self) -> Iterator["Blockwise"]:
        """The blocks' forward is this class's inside, their own again on leaving."""
        for number, block in enumerate(self.blocks):
            block.forward = self._replacement(number, block.forward)  # type: ignore[method-assign]
        try:
            yield self
        finally:
            for block in self.blocks:
                del block.forward

    def run(self, number: int, ids: Tensor, attention: Tensor, hidden: Tensor | None) -> Tensor | None:
        """The input of the next block ``[B, T, D]``; None behind the last, whose pass goes on to the model's end."""
        self._at, self._hidden, self._reached = number, hidden, None
        try:
            self.model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
        except _Reached:
            return self._reached
        if number + 1 < len(self.blocks):
            raise UserError(f"--stream: the model did not call block {self.names[number + 1]}")
        return None

    def _replacement(self, number: int, forward: Any) -> Any:
        def replaced(*arguments: Any, **options: Any) -> Any:
            given, rest, named = _hidden_states(self.names[number], arguments, options)
            if number < self._at:
                return self._passed_on(given)
            if number > self._at:
                if number != self._at + 1:
                    raise UserError(f"--stream: block {self.names[number]} is called out of order")
                self._reached = given
                if any(value is extra for value in (*rest, *named.values()) for extra in self._extra):
                    raise UserError(f"--stream: block {self.names[self._at]} hands on more than hidden states")
                raise _Reached
            sizes = _sizes(named)
            result = forward(self._hidden, *rest, **named)
            if _sizes(named) != sizes:
                raise UserError(f"--stream: block {self.names[number]} leaves something behind for later blocks")
            self._note_form(number, result)
            return result

        return replaced

    def _note_form(self, number: int, result: Any) -> None:
        """How many values a block returns (None: a bare tensor). Those behind the first may be attention weights to be
        reported, but nothing that the next block reads."""
        self._form, self._extra = None, ()
        if isinstance(result, Tensor):
            return
        if not isinstance(result, tuple) or not isinstance(result[0], Tensor):
            raise UserError(f"--stream: block {self.names[number]} returns a {type(result).__name__}")
        self._form, self._extra = len(result), tuple(value for value in result[1:] if isinstance(value, Tensor))

    def _passed_on(self, hidden: Tensor) -> Any:
        return hidden if self._form is None else (hidden, *[None] * (self._form - 1))


def _hidden_states(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, tuple, dict]:
    """A block's first input, and its other arguments."""
    if arguments and isinstance(arguments[0], Tensor):
        return arguments[0], arguments[1:], options
    if isinstance(options.get("hidden_states"), Tensor):
        return options["hidden_states"], arguments, {k: v for k, v in options.items() if k != "hidden_states"}
    raise UserError(f"--stream: block {name} is called without hidden states")


def _sizes(options: dict[str, Any]) -> dict[str, int]:
    return {name: len(value) for name, value in options.items() if isinstance(value, dict | list)}


def silence(embedding: Any, dtype: torch.dtype) -> None:
    """Let an embedding give zeros from now on: behind the first block nothing reads what it gives."""
    width = embedding.weight.shape[1]

    def zeros(ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, width, dtype=dtype, device=ids.device)

    embedding.forward = zeros
