"""One rank's sums on disk while it measures, with how far it is."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from pipeline.errors import UserError
from pipeline.sites import Site
from pipeline.stats import ActivationStats
from pipeline.store import load_statistics, save_statistics

SHARE = 20
"""A checkpoint that took t seconds is followed by none for so many times t: it may cost 5 % of the time."""


class Checkpoint:
    """``rank-R-of-W.safetensors`` in ``folder``, replaced whole whenever ``every`` seconds have passed."""

    def __init__(self, folder: Path, rank: int, world: int, every: float) -> None:
        self.folder, self.world, self.every = folder, world, every
        self.path = folder / f"rank-{rank}-of-{world}.safetensors"
        self._next = time.monotonic() + every

    def load(
        self, personas: Sequence[str], sites: Sequence[Site], device: torch.device | str
    ) -> tuple[ActivationStats, int]:
        """The sums so far and the number of steps that are in them; zeros and 0 if there are none.

        Raises UserError if they are of another number of ranks, or of other personas or layers.
        """
        stats = ActivationStats.zeros(personas, sites, device)
        for other in self.folder.glob("rank-*-of-*.safetensors"):
            world = other.stem.rpartition("-")[2]
            if world != str(self.world):
                raise UserError(f"the run was started on {world} devices, now {self.world}; their shares differ")
        if not self.path.exists():
            return stats, 0
        saved = load_statistics(self.path)
        if saved.personas != stats.personas or saved.sites != stats.sites:
            raise UserError(f"{self.path}: of other personas or layers; begin anew with --overwrite")
        with safe_open(str(self.path), "pt") as file:
            position = int(file.metadata()["position"])
        return stats.merge(saved.to(device)), position

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def save(self, stats: ActivationStats, position: int) -> None:
        """Write the sums of the first ``position`` steps. Raises OSError; what was there before then stays."""
        started = time.monotonic()
        save_statistics(stats, self.path, position=str(position))
        now = time.monotonic()
        self._next = now + max(self.every, SHARE * (now - started) if self.every else 0)


def discard(folder: Path) -> None:
    """Remove every rank's checkpoint: the reduced statistics have taken their place."""
    for file in folder.glob("rank-*-of-*.safetensors"):
        file.unlink()
