"""A second look at finished masks: a pole that repeats itself under its mask is weighed again, against what it says.

A draft shows what a mask may repeat before there is one (``pipeline.drafts``); what a mask does repeat, only itself
shows. The repetitions under it take the place of the draft's, and the pole's gradient and mask are made a second time.
Then the second mask is looked at too: where the model repeats itself more under it, the first one stays.
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
from pipeline.gradient_files import AGAIN, returned, review_file, revised, second_review_file, weighing_file
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
    seen = {name: found for name in masked if (found := _read(folder, review_file(name))).loops}
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


def compare(config: CalibrateConfig, catalogue: Catalogue, folder: Path) -> None:
    """Look at the second masks in ``folder`` too. ``pipeline.gradient_files.returned`` says whose first mask stays."""
    masked = {name: pair for name, pair in reviewed(folder, catalogue).items() if name in revised(folder)}
    prompter = Prompter(load_tokenizer(config.model))
    run_pass(config, ReviewModule(config, folder, catalogue, prompter, masked, second=True))
    for name in sorted(returned(folder)):
        note(f"{name}: repeats itself more under its second mask, so the first one stays")


def reviewed(folder: Path, catalogue: Catalogue) -> dict[str, PersonaSet]:
    """The poles that have a mask and answers that were weighed, with their pairs. Of a composed persona, nothing of its
    own could be weighed again."""
    poles = {pole: pair for pair in catalogue.sets for pole in pair.poles if pole in catalogue.personas}
    return {pole: pair for pole, pair in poles.items() if (folder / weighing_file(pole)).exists()}


class ReviewModule(Stage):
    """Writes under every pole's mask, or ``second`` one, and keeps what is repeated in ``review_file(name)``, or
    ``second_review_file(name)``, in ``folder / AGAIN``.

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
        *,
        second: bool = False,
    ) -> None:
        super().__init__(config, folder)
        self.catalogue, self.prompter, self.poles, self.second = catalogue, prompter, poles, second

    def is_done(self) -> bool:
        return all(self._file(name).exists() for name in self.poles)

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
        if name is None or self.skipped or self._file(name).exists():
            return
        masks = PersonaMasks(self.shapes, {name: {layer: self.pieces.read(name, layer) for layer in self.shapes}})
        # The drafts were held against the same.
        unmasked, _ = json.loads((self.folder / weighing_file(name)).read_bytes())["repetition"]
        found = self.writer.repeated(self.poles[name], masks, unmasked)
        mask = "second mask" if self.second else "mask"
        what = f"repeat {found.masked:.0%}, unmasked {found.unmasked:.0%}"
        note(f"{name}: answers to calibration questions under its {mask} {what}")
        content = {
            "pole": name,
            "repetition": [found.unmasked, found.masked],
            "loops": [as_json(loop) for loop in found.loops if found.matters],
        }
        (self.folder / AGAIN).mkdir(exist_ok=True)
        write_json(self._file(name), content)

    def _file(self, name: str) -> Path:
        return self.folder / AGAIN / (second_review_file if self.second else review_file)(name)

    def on_predict_end(self) -> None:
        # The others read the files next.
        self.trainer.strategy.barrier("masks reviewed")


def _read(folder: Path, file: str) -> Repeated:
    found = json.loads((folder / AGAIN / file).read_bytes())
    return Repeated([from_json(one) for one in found["loops"]], *found["repetition"])


def recorded_reviews(folder: Path, catalogue: Catalogue) -> dict[str, dict[str, Any]]:
    """For the manifest: what was repeated under every pole's first mask, and how much it was weighed against; and of
    poles that have a second one, what was repeated under that, and whether the first stayed."""
    found: dict[str, dict[str, Any]] = {}
    stays = returned(folder)
    for name in reviewed(folder, catalogue):
        again = folder / AGAIN / weighing_file(name)
        against = json.loads(again.read_bytes())["against"] if again.exists() else 0.0
        one = _read(folder, review_file(name))
        found[name] = {"against": against, "repetition": [one.unmasked, one.masked]}
        if again.exists():
            found[name] |= {"again": _read(folder, second_review_file(name)).masked, "returned": name in stays}
    return found
