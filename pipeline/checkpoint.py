"""One rank's sums on disk while it measures, with how far it is."""

import time
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.collector import Collector
from pipeline.errors import UserError
from pipeline.store import load_statistics, save_statistics

SHARE = 20
"""A checkpoint that took t seconds is followed by none for so many times t: it may cost 5 % of the time."""


class Checkpoint:
    """``rank-R-of-W.safetensors`` in ``folder``, replaced whole whenever ``every`` seconds have passed."""

    def __init__(self, folder: Path, rank: int, world: int, every: float) -> None:
        self.folder, self.world, self.every = folder, world, every
        self.path = folder / f"rank-{rank}-of-{world}.safetensors"
        self._next = time.monotonic() + every

    def load(self, collector: Collector) -> int:
        """Add the sums so far to those of ``collector``; the number of steps that are in them, 0 if there are none.

        Raises UserError if they are of another number of ranks, or of other personas or layers.
        """
        stats = collector.stats
        for other in self.folder.glob("rank-*-of-*.safetensors"):
            world = other.stem.rpartition("-")[2]
            if world != str(self.world):
                raise UserError(f"the run was started on {world} devices, now {self.world}; their shares differ")
        if not self.path.exists():
            return 0
        saved = load_statistics(self.path)
        if saved.personas != stats.personas or saved.sites != stats.sites:
            raise UserError(f"{self.path}: of other personas or layers; begin anew with --overwrite")
        try:
            with safe_open(str(self.path), "pt") as file:
                position = int(file.metadata()["position"])
                for site, sums in collector.exact.items():
                    sums.pieces += file.get_tensor(f"exact/{site}").to(sums.pieces.device)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path}: not a checkpoint ({error}); begin anew with --overwrite") from error
        stats.merge(saved.to(stats.counts.device))
        return position

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def save(self, collector: Collector, position: int) -> None:
        """Write the sums of the first ``position`` steps. Raises OSError; what was there before then stays."""
        started = time.monotonic()
        exact = {f"exact/{site}": sums.pieces for site, sums in collector.exact.items()}
        save_statistics(collector.stats, self.path, exact, position=str(position))
        now = time.monotonic()
        self._next = now + max(self.every, SHARE * (now - started) if self.every else 0)


def discard(folder: Path) -> None:
    """Remove every rank's checkpoint: the reduced statistics have taken their place."""
    for file in folder.glob("rank-*-of-*.safetensors"):
        file.unlink()
