"""The hidden states between two blocks, batch by batch: in memory up to a limit, then on disk."""

from pathlib import Path

import torch
from torch import Tensor


class HiddenStates:
    """One tensor per batch, any dtype; ``put`` replaces it. What exceeds ``limit`` bytes in all lies in ``folder``."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._held: dict[int, Tensor] = {}
        self._stored: dict[int, tuple[torch.Size, torch.dtype]] = {}

    @property
    def on_disk(self) -> int:
        """How many batches lie on disk."""
        return len(self._stored)

    def put(self, batch: int, states: Tensor) -> None:
        """Raises OSError if the disk is full."""
        states = states.detach().cpu().contiguous()
        others = sum(t.nbytes for number, t in self._held.items() if number != batch)
        if others + states.nbytes <= self.limit:
            self._held[batch] = states
            self._drop(batch)
            return
        self._held.pop(batch, None)
        self._stored[batch] = states.shape, states.dtype
        self.folder.mkdir(exist_ok=True)
        states.view(torch.uint8).numpy().tofile(self._path(batch))

    def get(self, batch: int) -> Tensor:
        if batch in self._held:
            return self._held[batch]
        shape, dtype = self._stored[batch]
        content = bytearray(self._path(batch).read_bytes())
        return torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(shape)

    def clear(self) -> None:
        self._held.clear()
        for batch in list(self._stored):
            self._drop(batch)
        if self.folder.exists():
            self.folder.rmdir()

    def _drop(self, batch: int) -> None:
        if self._stored.pop(batch, None) is not None:
            self._path(batch).unlink()

    def _path(self, batch: int) -> Path:
        return self.folder / f"{batch}.bin"
