"""From the calibration answers to the gradient that each persona's weights are chosen by."""

from pathlib import Path

from pipeline.budget import NEUTRAL_TEXTS
from pipeline.calibration import run_pass
from pipeline.cli import note
from pipeline.config import WHITENED, CalibrateConfig
from pipeline.data.catalogue import Catalogue, neutral_set
from pipeline.data.forms import NEUTRAL
from pipeline.data.prompts import Prompter
from pipeline.gradient_files import ANSWERS, WEIGHTED
from pipeline.gradients import GradientModule, ObjectiveData, backward_tokens
from pipeline.leaning import answer_units
from pipeline.objectives import Unit, objective_of
from pipeline.sketching import SketchedGradients
from pipeline.weighing import WeighingModule, poles_of, weighted
from pipeline.yes_no import FEWEST, one_sided, yes_no_of, yes_no_units


def differentiate(config: CalibrateConfig, catalogue: Catalogue, prompter: Prompter, folder: Path) -> None:
    """Write the gradient of every pair's margin and that of neutral text to ``folder``.

    For ``WHITENED`` then how much each answer counts, and the gradients with the answers so weighted; where a budget is
    searched, also what makes one of a pair's two answers likelier on all items, if it has the same two on all.
    """
    objectives = objectives_of(config, catalogue, prompter)
    pad = prompter.tokenizer.pad_token_id
    for one in catalogue.sets:
        if not config.holds_yes_no:
            said = one_sided(one, count=config.samples, seed=config.seed)
        elif (name := yes_no_of(one.plus)) not in objectives:
            why = f"fewer than {FEWEST} answers begin so, or all are these two words"
            said = f"no margin of {name} to leave alone: {why}"
        else:
            said = None
        if said:
            note(said)
    note(f"gradients of {len(catalogue.sets)} margins and of neutral text")
    whitened = config.criterion == WHITENED
    first = (SketchedGradients if whitened else GradientModule)(config, folder, pad, objectives)
    run_objectives(config, first, objectives)
    poles = poles_of(catalogue, objectives, config) if whitened else []
    if not poles:
        return
    note(f"weighing the answers of {len(catalogue.sets)} pairs")
    module = WeighingModule(config, folder, catalogue, prompter, poles, objectives)
    run_pass(config, module, inference=False)
    answers = {pole.pair.plus: answer_units(objectives[pole.pair.plus]) for pole in poles if config.budget}
    objectives = weighted(poles, objectives[NEUTRAL], folder)
    note(f"gradients of {len(objectives)} margins of weighted answers")
    run_objectives(config, GradientModule(config, folder, pad, objectives, folder / WEIGHTED), objectives)
    for place, name in enumerate(ANSWERS):
        some = {pair: units[place] for pair, units in answers.items() if units}
        if some:
            note(f"gradients of the {name.replace('-', ' ')} of {len(some)} pairs that have two")
            run_objectives(config, GradientModule(config, folder, pad, some, folder / name), some)


def objectives_of(config: CalibrateConfig, catalogue: Catalogue, prompter: Prompter) -> dict[str, list[Unit]]:
    """What the first pass differentiates: every pair's margin, what else is left alone, and neutral text."""
    limits = {"count": config.samples, "max_length": config.max_length, "seed": config.seed}
    objectives = {s.plus: objective_of(s, prompter, **limits) for s in catalogue.sets}
    if config.holds_yes_no:
        asked = {yes_no_of(s.plus): yes_no_units(s, objectives[s.plus], prompter, **limits) for s in catalogue.sets}
        objectives |= {name: units for name, units in asked.items() if units}
    limits["count"] = min(config.samples or NEUTRAL_TEXTS, NEUTRAL_TEXTS)
    return {**objectives, NEUTRAL: objective_of(neutral_set(), prompter, **limits)}


def run_objectives(config: CalibrateConfig, module: GradientModule, objectives: dict[str, list[Unit]]) -> None:
    """One pass for the gradients of all ``objectives``."""
    data = ObjectiveData(objectives, backward_tokens(config.batch_tokens), shared=config.sharded)
    run_pass(config, module, data, inference=False)
