"""The neutral mask of a run: the run's own recipe with the neutral set in the persona's place."""

from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.budget import NEUTRAL_TEXTS
from pipeline.cli import note
from pipeline.config import FIRST_ORDER, Sparsity
from pipeline.controls import run_statistics
from pipeline.criteria import CRITERIA, Layer, Slopes
from pipeline.data.catalogue import PersonaSet, neutral_set
from pipeline.data.forms import NEUTRAL
from pipeline.errors import UserError
from pipeline.gradients import Moments, ObjectiveData, accumulating, backward, backward_tokens
from pipeline.masks import PersonaMasks
from pipeline.objectives import objective_of
from pipeline.pooling import Pooled
from pipeline.sites import is_transposed


class NeutralMasks:
    """Makes the neutral masks of a run's pairs, and adds them to the model.

    Args:
        model: the ``PersonaModel`` of the run, with no persona on when a mask is made.
        run: the run's folder.
        prompter: of the model's tokenizer.
        batch_tokens: of a forward pass; a backward pass takes half of it.
    """

    def __init__(self, model: Any, run: Path, prompter: Any, batch_tokens: int) -> None:
        self.model, self.run, self.prompter, self.batch_tokens = model, run, prompter, batch_tokens
        self.manifest: dict[str, Any] = model.masks.manifest

    def add(self, pair: PersonaSet) -> str:
        """The name of a pair's neutral mask, which is added to the model.

        Raises UserError with the reason where the run's recipe has none.
        """
        criterion = self.manifest["criterion"]
        if on := self.manifest["options"].get("on"):
            raise UserError(f"the run's masks stand on {on}; --conditions base measures that mask alone")
        if NEUTRAL in self.model.personas:
            return NEUTRAL
        if criterion not in (*FIRST_ORDER, "wanda", "sparse"):
            raise UserError(_REASONS.get(criterion, f"{criterion} needs an opponent, and neutral text has none"))
        if criterion not in FIRST_ORDER and NEUTRAL not in self._statistics.personas:
            raise UserError(
                "the run has no statistics of neutral text; calibrate one with --criterion neutral, and this one again "
                "with --statistics and the folder of that one"
            )
        name = f"{NEUTRAL}-{len(self.model.personas)}"
        bits = {layer: CRITERIA[criterion](self._layer(layer, pair)) for layer in self.model.masks.shapes}
        self.model.add(PersonaMasks(self.model.masks.shapes, {name: bits}, self.manifest))
        return name

    def _layer(self, name: str, pair: PersonaSet) -> Layer:
        """A first-order criterion has neutral text's likelihood for its margin, and the pair's pool to choose from."""
        options, stats = self.manifest["options"], self._statistics
        assert pair.minus is not None
        (site,) = (site.name for site in stats.sites if name in site.linears)
        weight = self.model.weight(name).detach().cpu()
        signed = self.manifest["criterion"] in FIRST_ORDER
        factor = self.manifest["sparsity"].get("factor", {}).get(pair.plus, 1)
        sparsity = Sparsity.parse(options["sparsity"]).scaled(Decimal(str(factor)))
        own, *opponent = self._channels((pair.plus, pair.minus) if signed else (NEUTRAL,), site)
        return Layer(
            name,
            weight,
            NEUTRAL,
            own,
            opponent[0] if opponent else None,
            sparsity.keep(name, weight.shape[1]),
            seed=options["seed"],
            slopes=self._slopes(name) if signed else None,
            pool=options["pool"],
            evidence=options["evidence"],
        )

    def _channels(self, personas: Sequence[str], site: str) -> list[Any]:
        return Pooled(self._statistics, self.manifest["options"].get("expert_tokens", 1)).channels(personas, site)

    def _slopes(self, name: str) -> Slopes:
        def matrix(value: Tensor) -> Tensor:
            return (value.T if is_transposed(self._layers[name]) else value).cpu()

        mean, error = matrix(self._moments.total[name]), matrix(self._moments.error(name))
        # Neutral text is what this mask is for: there is nothing to hold it in balance against.
        return Slopes(mean, error, mean.new_zeros(mean.shape), error.square())

    @cached_property
    def _statistics(self) -> Any:
        return run_statistics(self.run, self.manifest)

    @cached_property
    def _layers(self) -> dict[str, Any]:
        return {name: self.model.original(name) for name in self.model.masks.shapes}

    @cached_property
    def _moments(self) -> Moments:
        """The gradient of the likelihood of neutral answers under the unmasked model."""
        note(f"neutral mask: a backward pass over {NEUTRAL_TEXTS} neutral texts")
        limits = {"count": NEUTRAL_TEXTS, "max_length": self.manifest["options"]["max_length"]}
        units = objective_of(neutral_set(), self.prompter, **limits, seed=self.manifest["options"]["seed"])
        steps = ObjectiveData({NEUTRAL: units}, backward_tokens(self.batch_tokens)).steps(0, 1)
        with self.model.using(None), accumulating(self._layers) as moments:
            for step in steps:
                moments.share = step.share
                backward(self.model.model, step.terms, self.prompter.tokenizer.pad_token_id, step.share)
                moments.batches += 1
        return moments


_REASONS = {
    "neutral": "the masks of this run are neutral masks themselves",
    "magnitude": "magnitude looks at no data, so the run's own masks are what neutral text gives",
    "random": "random masks look at no data, so the run's own masks are what neutral text gives",
}
