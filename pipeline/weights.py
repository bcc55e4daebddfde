"""The weights that masks are chosen from, in float32: all at once, or no more than a block of them."""

from collections.abc import Iterable

import torch

from pipeline.cli import note
from pipeline.config import CalibrateConfig
from pipeline.fingerprint import layer_fingerprint
from pipeline.loading import load_model
from pipeline.memory import is_out_of_memory
from pipeline.shards import Shards
from pipeline.sites import find_layers, matrix
from pipeline.stacking import pruned


class WholeModel:
    """All weights of ``model`` are in memory, on the CPU at first; those that the mask ``on`` removes are zero."""

    def __init__(self, name: str, on: str) -> None:
        self.model, self.base = pruned(load_model(name), on)

    def part_of(self, layer: str) -> str:
        """The part of the model that ``load`` reads with this layer."""
        return ""

    def load(self, layer: str) -> None:
        """See that the layer's weight is in memory."""

    def move(self, device: torch.device) -> torch.device:
        """Move the model to ``device`` where it fits, or say that it does not; where it is now."""
        try:
            self.model.to(device)
            return device
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.model.to("cpu")
        note(f"the model in float32 does not fit on {device}: what the masks cost is measured on the CPU, slower")
        return torch.device("cpu")


class BlockByBlock:
    """Of ``model``, one decoder block (or what is outside all blocks) is in memory, the rest on the meta device."""

    base = None

    def __init__(self, name: str, option: str) -> None:
        self.shards = Shards(name, torch.float32, torch.device("cpu"), option=option)
        self.model = self.shards.model
        self._loaded: str | None = None

    def part_of(self, layer: str) -> str:
        """The part of the model that ``load`` reads with this layer."""
        return self.shards.part_of(layer)

    def load(self, layer: str) -> None:
        """See that the layer's weight is in memory; those of other parts go. Raises UserError."""
        part = self.part_of(layer)
        if part == self._loaded:
            return
        if self._loaded is not None:
            self.shards.release(self._loaded)
        self.shards.load(part, torch.float32, torch.device("cpu"))
        self._loaded = part


def weights_of(config: CalibrateConfig) -> WholeModel | BlockByBlock:
    """The model of a run: block by block if it is one for several devices."""
    return BlockByBlock(config.model, "--strategy fsdp") if config.sharded else WholeModel(config.model, config.on)


def fingerprints(weights: WholeModel | BlockByBlock, names: Iterable[str]) -> dict[str, str]:
    """The fingerprint of every layer named that the model has, by name."""
    layers, found = find_layers(weights.model), {}
    for name in names:
        if name in layers:
            weights.load(name)
            found[name] = layer_fingerprint(matrix(layers[name]))
    return found
