"""A state of the model and what stands before a question, and the model in that state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.baselines.finetuning import Adapter, adapted
from pipeline.baselines.steering import Steering, Strength, steered
from pipeline.config import EvaluateConfig
from pipeline.data.catalogue import PersonaSet
from pipeline.data.forms import NEUTRAL
from pipeline.errors import UserError
from pipeline.masks import PersonaMasks
from pipeline.neutral import NeutralMasks
from pipeline.protocol import Earlier, Limits


@dataclass(frozen=True)
class Setting:
    """A state of the model (mask, vector, adapter) and what stands before a question; without any, the base model.

    ``persona`` is the pole that it speaks for, "" for both. ``opposite`` names the condition that such a setting is
    held against.
    """

    condition: str
    persona: str
    mask: str | None = None
    system: str | None = None
    earlier: Earlier | None = None
    steering: Steering | None = None
    adapter: Adapter | None = None
    opposite: str = ""


UNMASKED = Setting("unmasked", "")
NOTHING_ADDED = Steering({}, Strength(0.0, 0.0, 0.0, True))


@dataclass(frozen=True)
class Ground:
    """What settings are made from: the model with its masks, and how to feed it."""

    model: Any
    prompter: Any
    limits: Limits
    config: EvaluateConfig
    others: dict[str, str] = field(default_factory=dict)
    """Personas of ``--other-runs``, with their opponents ("" for none)."""

    @cached_property
    def neutral(self) -> NeutralMasks:
        """Kept, because all pairs share one gradient of neutral text."""
        return NeutralMasks(self.model, self.config.run, self.prompter, self.limits.batch_tokens)


def ground_of(config: EvaluateConfig) -> Ground:
    """Load the run's masks and the model they were made for. Raises UserError."""
    import torch

    from pipeline.data.prompts import Prompter
    from pipeline.loading import pick_device
    from pipeline.model import PersonaModel

    dtype, device = getattr(torch, config.precision), pick_device(config.device)
    model = PersonaModel.from_pretrained(config.run, config.model, dtype=dtype, device=device)
    limits = Limits(config.max_length, config.batch_tokens, model.tokenizer.pad_token_id)
    others = add_runs(model, config.other_runs)
    return Ground(model, Prompter(model.tokenizer), limits, config, others)


def add_runs(model: Any, runs: Sequence[str]) -> dict[str, str]:
    """Add the masks of further runs to ``model``. Returns their personas, each with its opponent ("" for none).

    Raises UserError where a run was made for another model, or a persona has the name of one that is there.
    """
    from pipeline.store import load_masks

    added: dict[str, str] = {}
    together = model.masks
    fingerprint = together.manifest["model"]["fingerprint"]
    for run in runs:
        masks = load_masks(Path(run))
        theirs = masks.manifest["model"]["fingerprint"]
        if any(theirs[layer] != fingerprint[layer] for layer in theirs.keys() & fingerprint.keys()):
            raise UserError(f"--other-runs: {run} was made for other weights ({masks.manifest['model']['id']!r})")
        own = {name: bits for name, bits in masks.bits.items() if name != NEUTRAL}
        try:
            together |= PersonaMasks(masks.shapes, own)
        except ValueError as error:
            raise UserError(f"--other-runs: {run} cannot be added ({error})") from error
        opponents = masks.manifest["personas"]["opponents"]
        added |= {name: opponents.get(name, "") for name in own}
    if added:
        # All at once: each time the layers' masks are put side by side anew.
        model.add(PersonaMasks(together.shapes, {name: together.bits[name] for name in added}))
    return added


@contextmanager
def applied(ground: Ground, setting: Setting) -> Iterator[None]:
    """The model as the setting says, for the time of a block; words are up to who asks."""
    added = setting.steering or NOTHING_ADDED
    with (
        adapted(ground.model, setting.adapter),
        ground.model.using(setting.mask, ground.config.gamma if setting.mask else 0.0),
        steered(ground.model.model, added.vectors, added.strength.value),
    ):
        yield


def prompt_ids(ground: Ground, setting: Setting, question: str) -> list[int]:
    """The tokens that the model reads before it answers a question under a setting."""
    turns = setting.earlier(question) if setting.earlier else ()
    return ground.prompter.ids(ground.prompter.prompt(question, setting.system, turns))


def poles(pair: PersonaSet) -> tuple[tuple[str, str], tuple[str, str]]:
    """Each pole with its opponent."""
    assert pair.minus is not None
    return (pair.plus, pair.minus), (pair.minus, pair.plus)
