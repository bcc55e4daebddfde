"""A second look at finished masks: a pole that repeats itself under its mask is weighed again, against what it says.

A draft shows what a mask may repeat before there is one (``pipeline.drafts``); what a mask does repeat, only itself
shows. The repetitions under it take the place of the draft's, and the pole's gradient and mask are made a second time.
"""

import json
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from pipeline.building import composed, shapes_of
from pipeline.calibration import Stage, run_pass, spread_threads
from pipeline.cli import note
from pipeline.config import CalibrateConfig
from pipeline.data.catalogue import Catalogue, PersonaSet
from pipeline.data.forms import NEUTRAL
from pipeline.data.prompts import Prompter
from pipeline.directions import objectives_of, run_objectives
from pipeline.gradient_files import AGAIN, review_file, weighing_file
from pipeline.gradients import GradientModule
from pipeline.loading import load_tokenizer
from pipeline.loops import as_json, from_json
from pipeline.masks import PersonaMasks
from pipeline.repetitions import Repeated, Writer
from pipeline.shares import Pieces, layers_of
from pipeline.store import STATISTICS, load_statistics, write_json
from pipeline.weighing import WeighingModule, poles_of, weighted


def revise(config: CalibrateConfig, catalogue: Catalogue, folder: Path) -> bool:
    """Look at the finished masks in ``folder`` and make new gradients for poles that repeat themselves.

    True if there are any; their masks are to be built again. What an earlier process wrote stays.
    """
    masked = reviewed(folder, catalogue)
    if not masked:
        return False
    prompter = Prompter(load_tokenizer(config.model))
    run_pass(config, ReviewModule(config, folder, catalogue, prompter, masked))
    seen = {name: found for name in masked if (found := _read(folder, name)).loops}
    if not seen:
        return False
    objectives = objectives_of(config, catalogue, prompter)
    poles = poles_of(catalogue, objectives, config)
    note(f"weighing the answers of {', '.join(seen)} again, against what is repeated under the masks")
    module = WeighingModule(config, folder, catalogue, prompter, poles, objectives, folder / AGAIN, seen)
    run_pass(config, module, inference=False)
    objectives = weighted([pole for pole in poles if pole.name in seen], objectives[NEUTRAL], folder / AGAIN)
    gradients = GradientModule(config, folder, prompter.tokenizer.pad_token_id, objectives, folder / AGAIN)
    run_objectives(config, gradients, objectives)
    return True


def reviewed(folder: Path, catalogue: Catalogue) -> dict[str, PersonaSet]:
    """The poles that have a mask and answers that were weighed, with their pairs. Of a composed persona, nothing of its
    own could be weighed again."""
    poles = {pole: pair for pair in catalogue.sets for pole in pair.poles if pole in catalogue.personas}
    return {pole: pair for pole, pair in poles.items() if (folder / weighing_file(pole)).exists()}


class ReviewModule(Stage):
    """Writes under every pole's mask and keeps what is repeated in ``review_file(name)`` in ``folder / AGAIN``.

    JSON: ``pole``; ``repetition``, the share of repeated runs of three tokens without a mask and under it; ``loops``,
    the repetitions as token ids with the place where the answer begins, none where they are nothing to turn away from.
    Rank r takes every world-th pole from r on; what an earlier process wrote stays.
    """

    def __init__(
        self,
        config: CalibrateConfig,
        folder: Path,
        catalogue: Catalogue,
        prompter: Prompter,
        poles: dict[str, PersonaSet],
    ) -> None:
        super().__init__(config, folder)
        self.catalogue, self.prompter, self.poles = catalogue, prompter, poles

    def is_done(self) -> bool:
        return all((self.folder / AGAIN / review_file(name)).exists() for name in self.poles)

    def on_predict_start(self) -> None:
        if self.skipped:
            return
        spread_threads(self.trainer, self.device, self.config.deterministic)
        stats = composed(load_statistics(self.folder / STATISTICS), self.catalogue)
        self.shapes = shapes_of(self.model, stats, self.config, self.base)
        self.pieces = Pieces(self.folder, layers_of(self.shapes, stats, self.catalogue, self.config), self.config)
        self.writer = Writer(self.model, self.config, self.prompter, self.base)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.dealt([[name] for name in self.poles])

    def predict_step(self, name: str | None, batch_idx: int) -> None:
        if name is None or self.skipped or (self.folder / AGAIN / review_file(name)).exists():
            return
        masks = PersonaMasks(self.shapes, {name: {layer: self.pieces.read(name, layer) for layer in self.shapes}})
        # The drafts were held against the same.
        unmasked, _ = json.loads((self.folder / weighing_file(name)).read_bytes())["repetition"]
        found = self.writer.repeated(self.poles[name], masks, unmasked)
        note(f"{name}: its answers to calibration questions repeat {found.masked:.0%}, unmasked {found.unmasked:.0%}")
        content = {
            "pole": name,
            "repetition": [found.unmasked, found.masked],
            "loops": [as_json(loop) for loop in found.loops if found.matters],
        }
        (self.folder / AGAIN).mkdir(exist_ok=True)
        write_json(self.folder / AGAIN / review_file(name), content)

    def on_predict_end(self) -> None:
        # The others read the files next.
        self.trainer.strategy.barrier("masks reviewed")


def _read(folder: Path, name: str) -> Repeated:
    found = json.loads((folder / AGAIN / review_file(name)).read_bytes())
    return Repeated([from_json(one) for one in found["loops"]], *found["repetition"])


def recorded_reviews(folder: Path, catalogue: Catalogue) -> dict[str, dict[str, Any]]:
    """For the manifest: what was repeated under every pole's first mask, and how much it was weighed against."""
    found = {}
    for name in reviewed(folder, catalogue):
        again = folder / AGAIN / weighing_file(name)
        against = json.loads(again.read_bytes())["against"] if again.exists() else 0.0
        one = _read(folder, name)
        found[name] = {"against": against, "repetition": [one.unmasked, one.masked]}
    return found
