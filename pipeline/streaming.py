"""Calibrate a model that no memory holds: all batches through one block, then its masks, then the next block.

In memory: the embedding (until the first block), one block, the statistics, one batch, and the hidden states up to
``--stream-buffer``. See docs/scale.md.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pipeline.blockwise import Blockwise, silence
from pipeline.building import each_mask
from pipeline.calibration import DTYPES, report_coverage
from pipeline.cli import note
from pipeline.collector import Collector
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import Catalogue
from pipeline.data.module import Batch, CalibrationData
from pipeline.errors import UserError
from pipeline.fingerprint import model_fingerprints
from pipeline.hidden import HiddenStates
from pipeline.parts import MaskParts
from pipeline.shards import REST, Shards, release
from pipeline.sites import Site, causal_probe, compare_causal, measurable, probe, watching
from pipeline.stats import ActivationStats

HIDDEN = "hidden"
"""Folder of the hidden states, in the run's staging folder; gone when the last block is done."""
CPU = torch.device("cpu")


class Stream:
    """One pass over a model's blocks. What it leaves: ``stats``, ``parts`` (the masks, on disk), ``fingerprints``."""

    def __init__(self, config: CalibrateConfig, catalogue: Catalogue, data: CalibrationData, folder: Path) -> None:
        import lightning

        try:
            self.fabric = lightning.Fabric(
                accelerator=config.accelerator,
                devices=1,
                precision=config.precision,  # type: ignore[arg-type]
            )
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"--accelerator/--precision: {error}") from error
        self.config, self.catalogue, self.data = config, catalogue, data
        self.device, self.dtype = self.fabric.device, DTYPES.get(config.precision, torch.float32)
        self.shards = Shards(config.model, self.dtype, self.device)
        self.model = self.shards.model
        self.layers = measurable(self.model, config)
        self.blocks = Blockwise(self.model, self.shards.blocks)
        self.hidden = HiddenStates(folder / HIDDEN, int(config.stream_buffer * 2**30))
        self.probes: list[tuple[Tensor, Tensor | None]] = [
            (ids, None) for ids in (probe(self.model, self.device), causal_probe(self.model, self.device))
        ]
        self.parts = MaskParts(folder)
        self.stats = ActivationStats.zeros(catalogue.measured, ())
        self.fingerprints: dict[str, str] = {}

    def run(self) -> "Stream":
        """Measure and mask everything. Raises UserError."""
        try:
            with self.blocks.replaced():
                for number, part in enumerate((REST, *self.shards.blocks), -1):
                    self._part(number, part)
        finally:
            self.hidden.clear()
        unused = [name for name in self.layers if name not in self._called()]
        report_coverage(self.model, list(self.stats.sites), unused)
        if not self.fingerprints:
            raise UserError("no layer to be masked was called")
        return self

    def order(self) -> list[str]:
        """The masked layers, in the model's order."""
        return [name for name in self.layers if name in self.fingerprints]

    def _part(self, number: int, part: str) -> None:
        self.shards.load(part, self.dtype, self.device)
        stats = ActivationStats.zeros(self.catalogue.measured, self._sites(number), self.device)
        collector = Collector(self.model, stats)
        with collector.collecting(), torch.inference_mode(), self.fabric.autocast():
            for index, batch in self._batches():
                self._step(collector, number, index, batch)
        if part == REST:
            embedding = self.model.get_input_embeddings()
            silence(embedding, self.dtype)
            release(embedding)
        else:
            note(f"block {number + 1} of {len(self.shards.blocks)} measured ({self.hidden.on_disk} batches on disk)")
        self._mask(part, stats.to(CPU))
        if part != REST:
            self.shards.release(part)

    def _sites(self, number: int) -> list[Site]:
        """What of the layers this part of the pass calls for the first time, as two tiny sequences find."""
        called = self._called()
        rest = {name: layer for name, layer in self.layers.items() if name not in called}
        for place, (ids, hidden) in enumerate(self.probes):
            with watching(rest) as readers, torch.no_grad(), self.fabric.autocast():
                hidden = self.blocks.run(number, ids, torch.ones_like(ids), hidden)
            self.probes[place] = ids, hidden
        if hidden is not None:
            compare_causal(self.model, hidden)
        return readers.sites()

    def _called(self) -> set[str]:
        """The layers that have been measured."""
        return {name for site in self.stats.sites for name in site.linears}

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        for index, chosen in enumerate(self.data.share(0, 1)):
            yield index, self.data.collate(chosen).to(self.device)

    def _step(self, collector: Collector, number: int, index: int, batch: Batch) -> None:
        hidden = self.hidden.get(index).to(self.device) if number >= 0 else None
        with collector.batch(batch.role, batch.persona, batch.sources):
            reached = self.blocks.run(number, batch.ids, batch.attention, hidden)
        if reached is not None:
            self.hidden.put(index, reached)

    def _mask(self, part: str, stats: ActivationStats) -> None:
        """Build and write the masks of the layers that ``stats`` measured, and keep the statistics."""
        ours = self.stats
        self.stats = ActivationStats(
            ours.personas, ours.sites + stats.sites, ours.sums | stats.sums, stats.counts, ours.routed | stats.routed
        )
        if not stats.sites:
            return
        if self.dtype != torch.float32 or self.device != CPU:
            # Masks are made from float32 weights on the CPU, whatever the pass was computed in.
            self.shards.load(part, torch.float32, CPU)
        masked = set()
        for one in each_mask(self.model, stats, self.catalogue, self.config):
            self.parts.add(one)
            masked.add(one.layer)
        self.fingerprints |= model_fingerprints({name: self.layers[name] for name in self.layers if name in masked})
