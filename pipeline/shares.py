"""Masks built by several processes, each its share, and kept by piece: what is finished is not built again.

A piece is a layer with the masks of all personas; all experts in one parameter are one piece. Where a budget is
searched (``--max-perplexity-increase``) it is a persona with the masks of all layers: the search needs the whole model.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline import tensorfile
from pipeline.atomic import replacing
from pipeline.budget import fit, line_under, rise
from pipeline.building import LayerMask, composed, each_mask, second_poles, shapes_of
from pipeline.calibration import Stage, spread_threads
from pipeline.config import FIRST_ORDER, WHITENED, CalibrateConfig
from pipeline.data.catalogue import Catalogue
from pipeline.encoding import bytes_of
from pipeline.experts import parameter_of
from pipeline.gradient_files import AGAIN, Gradients, returned, revised
from pipeline.loading import load_tokenizer
from pipeline.masks import count_kept
from pipeline.stats import ActivationStats
from pipeline.store import STATISTICS, load_statistics, write_mask, write_tensors
from pipeline.weights import weights_of

SHARDS = "shards"


class BuildModule(Stage):
    """Builds the masks and writes them where ``shards_of`` says, from float32 weights: on the CPU, or
    where a budget is searched on this rank's device, as the search runs the model again and again.

    Rank r builds every world-th piece from r on, the largest first; of a model that is read block by block, the pieces
    of every world-th block.
    """

    def __init__(self, config: CalibrateConfig, catalogue: Catalogue, folder: Path) -> None:
        super().__init__(config, folder)
        self.catalogue = catalogue
        self.pieces: list[str] = []
        # In a list, so that no strategy moves or casts the model: it is read layer by layer.
        self.held: list[Any] = []

    def load(self) -> None:
        self.held = [weights_of(self.config)]

    def on_predict_start(self) -> None:
        spread_threads(self.trainer, self.device, self.config.deterministic)

    def predict_dataloader(self) -> DataLoader[Any]:
        (weights,) = self.held
        model = weights.model
        self.stats = composed(load_statistics(self.folder / STATISTICS), self.catalogue)
        self.gradients = None
        if self.config.criterion in FIRST_ORDER:
            self.gradients = Gradients(self.folder, self.catalogue, weighted=self.config.criterion == WHITENED)
        shapes = self.shapes = shapes_of(model, self.stats, self.config, weights.base)
        self.layers = layers_of(shapes, self.stats, self.catalogue, self.config)
        size = {piece: sum(_size(shapes[layer]) for layer in of) for piece, of in self.layers.items()}
        self.shard = shards_of(self.folder, self.config)
        missing = [piece for piece in self.layers if not self.shard(piece).exists()]
        if self.config.budget and missing:
            self.stats = self.stats.to(weights.move(self.device))
            measured = model, load_tokenizer(self.config.model), self.catalogue, self.config, weights.base
            self.increase, self.line = rise(*measured), partial(line_under, *measured)
        # What is read from disk together stays together.
        parts: dict[str, list[str]] = {}
        for piece in sorted(size, key=lambda piece: -size[piece]):
            parts.setdefault(weights.part_of(self.layers[piece][0]) or piece, []).append(piece)
        return self.dealt(list(parts.values()))

    def predict_step(self, piece: str | None, batch_idx: int) -> None:
        if piece is None or self.shard(piece).exists():
            return
        (weights,) = self.held
        weights.load(self.layers[piece][0])
        run = weights.model, self.stats, self.catalogue, self.config, self.gradients
        if self.config.budget:
            leans = self.gradients is not None and self.gradients.leans(piece)
            one = fit(piece, *run, self.increase, weights.base, self.line(piece) if leans else None)
            found = {"factor": str(one.factor), "perplexity_increase": repr(one.increase)}
            found |= {"price": repr(one.price), "both_price": repr(one.both_price), "apart": json.dumps(one.apart)}
            write_tensors(self.shard(piece), one.masks.bits[piece], found)
        else:
            self._build(piece, each_mask(*run, layers=set(self.layers[piece]), base=weights.base))

    def _build(self, piece: str, masks: Iterable[LayerMask]) -> None:
        """Write a piece's masks as they are made."""
        entries = {
            f"{persona}/{layer}": (torch.uint8, (self.shapes[layer][0], bytes_of(self.shapes[layer][1])))
            for layer in self.layers[piece]
            for persona in self.catalogue.personas
        }
        with replacing(self.shard(piece)) as file:
            tensorfile.write_each(file, entries, ((f"{one.persona}/{one.layer}", one.bits) for one in masks), {})

    def on_predict_end(self) -> None:
        self.trainer.strategy.barrier("masks built")


def layers_of(
    shapes: dict[str, tuple[int, int]], stats: ActivationStats, catalogue: Catalogue, config: CalibrateConfig
) -> dict[str, list[str]]:
    """The layers of every piece."""
    if config.budget:
        return {persona: list(shapes) for persona in catalogue.personas}
    routed = {site.name for site in stats.sites if site.routed}
    pieces: dict[str, list[str]] = {}
    for layer in shapes:
        pieces.setdefault(parameter_of(layer) if layer in routed else layer, []).append(layer)
    return pieces


@dataclass
class Gathered:
    """For the manifest: the entries of the mask ``files`` by persona, and what else is known of them now.

    ``fitted``: with a budget, every persona's ``factor``, ``perplexity_increase`` and prices; ``shared``: with
    ``--disjoint``, how many of a second pole's weights the first keeps too.
    """

    files: dict[str, dict[str, Any]]
    fitted: dict[str, dict[str, Any]]
    shared: dict[str, int]


def gather(
    folder: Path,
    shapes: dict[str, tuple[int, int]],
    stats: ActivationStats,
    catalogue: Catalogue,
    config: CalibrateConfig,
) -> Gathered:
    """Put the pieces together: one file per persona, written layer by layer; a layer of two personas is held at most.

    Raises OSError.
    """
    pieces = Pieces(folder, layers_of(shapes, stats, catalogue, config), config)
    first = second_poles(catalogue) if config.disjoint else {}
    done = Gathered({}, {}, {})
    for persona in catalogue.personas:
        done.files[persona] = write_mask(folder, persona, shapes, partial(pieces.read, persona))
        if persona in first:
            both = (pieces.read(persona, layer) & pieces.read(first[persona], layer) for layer in shapes)
            done.shared[persona] = sum(map(count_kept, both))
    if config.budget:
        found = {persona: pieces.open(persona, persona).metadata() for persona in catalogue.personas}
        for name in ("factor", "perplexity_increase", "price", "both_price"):
            done.fitted[name] = {persona: float(Decimal(one[name])) for persona, one in found.items()}
        if config.holds_margins:
            done.fitted["apart"] = {persona: json.loads(one["apart"]) for persona, one in found.items()}
    return done


class Pieces:
    """Finished pieces in ``folder``, of ``layers`` each, read one mask at a time: of every persona, of the masks that
    were chosen for it so far, the one that stays."""

    def __init__(self, folder: Path, layers: dict[str, list[str]], config: CalibrateConfig) -> None:
        self.folder, self.shard, self.whole = folder, shards_of(folder, config), config.budget > 0
        self.returned = returned(folder)
        self._piece = {layer: piece for piece, of in layers.items() for layer in of}
        self._last: tuple[tuple[str, bool], Any] = ("", False), None

    def read(self, persona: str, layer: str) -> Tensor:
        """Packed bits, uint8 ``[N, ceil(K / 8)]``."""
        if self.whole:
            return self.open(persona, persona).get_tensor(layer)
        return self.open(self._piece[layer], persona).get_tensor(f"{persona}/{layer}")

    def open(self, piece: str, persona: str) -> Any:
        """The file of a piece that holds a persona's mask. The last one stays open: its header has an entry for every
        persona, and for every expert."""
        which = piece, persona in self.returned
        if self._last[0] != which:
            file = shard_file(self.folder, piece) if persona in self.returned else self.shard(piece)
            # pread, not mmap: what is mapped and read counts as resident memory of this process.
            self._last = which, safe_open(str(file), "pt", backend="pread")
        return self._last[1]


def shards_of(folder: Path, config: CalibrateConfig) -> Callable[[str], Path]:
    """Where a run's pieces are kept: those that hold masks of revised poles beside the first ones."""
    again = revised(folder)

    def shard(piece: str) -> Path:
        second = piece in again if config.budget else bool(again)
        return shard_file(folder / AGAIN if second else folder, piece)

    return shard


def shard_file(folder: Path, piece: str) -> Path:
    # A layer's name may hold what a file's name may not.
    return folder / SHARDS / f"{quote(piece, safe='')}.safetensors"


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
