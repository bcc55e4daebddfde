"""Masks built by several processes, each its share, and kept by piece: what is finished is not built again.

A piece is a layer with the masks of all personas; all experts in one parameter are one piece. Where a budget is
searched (``--max-perplexity-increase``) it is a persona with the masks of all layers: the search needs the whole model.
"""

from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.budget import fit, rise
from pipeline.building import build_masks, composed, shapes_of
from pipeline.calibration import Stage, spread_threads
from pipeline.config import FIRST_ORDER, CalibrateConfig
from pipeline.data.catalogue import Catalogue
from pipeline.experts import parameter_of
from pipeline.gradients import Gradients
from pipeline.loading import load_model, load_tokenizer
from pipeline.masks import PersonaMasks
from pipeline.stacking import base_masks, pruned
from pipeline.stats import ActivationStats
from pipeline.store import STATISTICS, load_statistics, write_tensors

SHARDS = "shards"


class BuildModule(Stage):
    """Builds the masks and writes them to ``folder / SHARDS / PIECE.safetensors``, on the CPU in float32.

    Rank r builds every world-th piece from r on, the largest first.
    """

    def __init__(self, config: CalibrateConfig, catalogue: Catalogue, folder: Path) -> None:
        super().__init__(config, folder)
        self.catalogue = catalogue
        self.pieces: list[str] = []
        # In a list, so that no strategy moves or casts the model: it is read layer by layer.
        self.held: list[Any] = []

    def load(self) -> None:
        self.base = base_masks(self.config.on)
        self.held = [pruned(load_model(self.config.model), self.base)]

    def on_predict_start(self) -> None:
        spread_threads(self.trainer, self.device, self.config.deterministic)

    def predict_dataloader(self) -> DataLoader[Any]:
        (model,) = self.held
        self.stats = composed(load_statistics(self.folder / STATISTICS), self.catalogue)
        self.gradients = Gradients(self.folder, self.catalogue) if self.config.criterion in FIRST_ORDER else None
        shapes = shapes_of(model, self.stats, self.config, self.base)
        self.layers = layers_of(shapes, self.stats, self.catalogue, self.config)
        pieces = sorted(self.layers, key=lambda piece: -sum(_size(shapes[layer]) for layer in self.layers[piece]))
        missing = [piece for piece in pieces if not shard(self.folder, piece).exists()]
        if self.config.budget and missing:
            self.increase = rise(model, load_tokenizer(self.config.model), self.catalogue, self.config)
        mine: list[str | None] = list(pieces[self.trainer.global_rank :: self.trainer.world_size])
        # All ranks take equally many steps.
        mine += [None] * (-(-len(pieces) // self.trainer.world_size) - len(mine))
        return DataLoader(mine, batch_size=None, collate_fn=lambda piece: piece)  # type: ignore[arg-type]

    def predict_step(self, piece: str | None, batch_idx: int) -> None:
        if piece is None or shard(self.folder, piece).exists():
            return
        (model,) = self.held
        run = model, self.stats, self.catalogue, self.config, self.gradients
        if self.config.budget:
            one = fit(piece, *run, self.increase, self.base)
            found = {"factor": str(one.factor), "perplexity_increase": repr(one.increase)}
            write_tensors(shard(self.folder, piece), one.masks.bits[piece], found)
        else:
            masks = build_masks(*run, layers=set(self.layers[piece]), base=self.base)
            tensors = {f"{persona}/{layer}": bits for persona, of in masks.bits.items() for layer, bits in of.items()}
            write_tensors(shard(self.folder, piece), tensors, {})

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


def gather(
    folder: Path,
    shapes: dict[str, tuple[int, int]],
    stats: ActivationStats,
    catalogue: Catalogue,
    config: CalibrateConfig,
) -> tuple[PersonaMasks, dict[str, dict[str, float]]]:
    """All pieces together; and, for the manifest, every persona's ``factor`` and ``perplexity_increase``."""
    bits: dict[str, dict[str, Tensor]] = {persona: {} for persona in catalogue.personas}
    fitted: dict[str, dict[str, float]] = {"factor": {}, "perplexity_increase": {}}
    for piece, layers in layers_of(shapes, stats, catalogue, config).items():
        with safe_open(str(shard(folder, piece)), "pt") as file:
            if config.budget:
                bits[piece] = {layer: file.get_tensor(layer) for layer in layers}
                for name, values in fitted.items():
                    values[piece] = float(Decimal(file.metadata()[name]))
            else:
                for persona, of in bits.items():
                    of.update({layer: file.get_tensor(f"{persona}/{layer}") for layer in layers})
    return PersonaMasks(shapes, bits), fitted if config.budget else {}


def shard(folder: Path, piece: str) -> Path:
    """Where a piece is kept; a layer's name may hold what a file's name may not."""
    return folder / SHARDS / f"{quote(piece, safe='')}.safetensors"


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
