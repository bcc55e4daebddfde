"""Measure every pair of personas of a run under every condition asked for."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from pipeline.abilities import abilities_of, measured_settings, wanted_tasks
from pipeline.baselines.steering import Steering
from pipeline.conditions import check, settings
from pipeline.data.catalogue import PersonaSet, neutral_texts
from pipeline.efficiency import efficiency_of
from pipeline.evaluation import Contrast, Record, State, contrasts_of, place, records_of
from pipeline.likelihood import perplexity
from pipeline.protocol import forms_of, margins
from pipeline.setting import UNMASKED, Ground, Setting, applied, poles
from pipeline.textual import SPEAKING, chosen_items, generation_entry, texts_of

EFFICIENCY_QUESTIONS = 5
"""Held-out questions on which speed is measured."""


@dataclasses.dataclass
class Results:
    """What an evaluation measured, as in the JSON (docs/evaluation.md); ``settings`` by the pair's first pole, to be
    used again."""

    records: list[Record] = dataclasses.field(default_factory=list)
    contrasts: list[Contrast] = dataclasses.field(default_factory=list)
    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    steering: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    generation: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    efficiency: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    abilities: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    settings: dict[str, list[Setting]] = dataclasses.field(default_factory=dict)


def measure_all(ground: Ground, pairs: Sequence[PersonaSet]) -> Results:
    """Every pair under every condition asked for, the text they write, and if asked what they cost to serve."""
    check(ground, pairs)
    tasks = wanted_tasks(ground.config.tasks)
    results = _scores(ground, pairs)
    _generate(ground, pairs, results)
    results.answers = _answers(results.generation, ground.config.questions)
    if ground.config.efficiency:
        _efficiency(ground, pairs[0], results)
    if tasks:
        _abilities(ground, pairs, tasks, results)
    return results


def _scores(ground: Ground, pairs: Sequence[PersonaSet]) -> Results:
    config, wanted = ground.config, ground.config.wanted
    cost = costs(ground)
    results = Results()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("evaluating", total=(1 + len(wanted)) * len(pairs))
        for pair in pairs:
            base = _measure(ground, pair, UNMASKED, cost)
            progress.advance(task)
            states = []
            used = results.settings[pair.plus] = []
            for name in wanted:
                for setting in settings(name, ground, pair):
                    used.append(setting)
                    states.append(_measure(ground, pair, setting, cost))
                    if name == "mask":
                        states.append(_from_the_other_side(states[-1], pair))
                    if setting.steering:
                        results.steering.append(_steering_entry(ground, pair, setting, setting.steering))
                progress.advance(task)
            options: dict[str, Any] = {"resamples": config.bootstrap, "seed": config.seed}
            criterion = ground.model.masks.manifest["criterion"]
            results.records += records_of(pair, base, states, criterion=criterion, **options)
            results.contrasts += contrasts_of(pair, base, states, **options)
    results.records.sort(key=lambda r: (r.pair, r.form, place(r.condition)))
    return results


def _measure(ground: Ground, pair: PersonaSet, setting: Setting, cost: Callable[[Setting], float]) -> State:
    model, prompter, limits = ground.model, ground.prompter, ground.limits
    words: dict[str, Any] = {"system": setting.system, "earlier": setting.earlier, "limits": limits}
    with applied(ground, setting):
        measured = {
            form: margins(model.model, prompter, pair.items, form, **words)
            for form in forms_of(pair.items, ground.config.options)
        }
    removed = 1 - model.masks.density(setting.mask) if setting.mask else 0.0
    return State(setting.condition, setting.persona, setting.system, removed, cost(setting), measured, setting.opposite)


def costs(ground: Ground) -> Callable[[Setting], float]:
    """Measures the perplexity of the neutral texts under a setting, once for each mask."""
    limits, seen = ground.limits, dict[str | None, float]()
    texts = limits.cut([ground.prompter.encode("", text) for text in neutral_texts()[: ground.config.texts or None]])

    def measured(setting: Setting) -> float:
        with applied(ground, setting):
            return perplexity(ground.model, texts, batch_tokens=limits.batch_tokens, pad=limits.pad)

    def cost(setting: Setting) -> float:
        # A vector or an adapter belongs to one setting; a mask may be on in several.
        if setting.steering or setting.adapter:
            return measured(setting)
        if setting.mask not in seen:
            seen[setting.mask] = measured(setting)
        return seen[setting.mask]

    return cost


def _steering_entry(ground: Ground, pair: PersonaSet, setting: Setting, steering: Steering) -> dict[str, Any]:
    wanted = ground.config.steering_strength
    return {
        "pair": f"{pair.plus}/{pair.minus}",
        "persona": setting.persona,
        "layers": list(steering.vectors),
        "by": wanted if wanted in ("shift", "cost") else "given",
        **dataclasses.asdict(steering.strength),
    }


def _from_the_other_side(state: State, pair: PersonaSet) -> State:
    """The same state as the opponent sees it."""
    return dataclasses.replace(state, condition="opponent mask", persona=dict(poles(pair))[state.persona])


def _generate(ground: Ground, pairs: Sequence[PersonaSet], results: Results) -> None:
    """Text under every setting that speaks: of the first pair, or with ``--generate`` of all."""
    config = ground.config
    for pair in pairs if config.generate else pairs[:1]:
        items = chosen_items(pair, max(config.questions, config.generate))
        if not items:
            continue
        known = results.settings[pair.plus]
        own = [] if "mask" in config.wanted else settings("mask", ground, pair)
        speaking = [UNMASKED, *(s for s in known if s.condition in SPEAKING), *own]
        for temperature in (0.0, config.temperature) if config.temperature else (0.0,):
            unmasked = texts_of(ground, UNMASKED, items, temperature)
            for setting in speaking:
                texts = unmasked if setting == UNMASKED else texts_of(ground, setting, items, temperature)
                results.generation.append(generation_entry(ground, pair, setting, texts, unmasked, temperature))


def _efficiency(ground: Ground, pair: PersonaSet, results: Results) -> None:
    """What the first pair's settings cost to serve."""
    questions = [item.question for item in chosen_items(pair, EFFICIENCY_QUESTIONS)]
    known = [setting for setting in results.settings[pair.plus] if setting.condition in SPEAKING]
    for setting in (UNMASKED, *known):
        entry = efficiency_of(ground, setting, questions)
        results.efficiency.append({"pair": f"{pair.plus}/{pair.minus}", **dataclasses.asdict(entry)})


def _abilities(ground: Ground, pairs: Sequence[PersonaSet], tasks: Sequence[str], results: Results) -> None:
    """Every pair's settings on lm-eval's tasks; the unmasked model once."""
    done = False
    for pair in pairs:
        for setting in measured_settings(results.settings[pair.plus])[done:]:
            whose = {"pair": f"{pair.plus}/{pair.minus}", "condition": setting.condition, "persona": setting.persona}
            results.abilities += [{**whose, **entry} for entry in abilities_of(ground, setting, tasks)]
        done = True


def _answers(generation: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first pair's greedy answers, unmasked and under its masks, question by question."""
    greedy = [e for e in generation if e["pair"] == generation[0]["pair"] and not e["temperature"]]
    plain = [entry for entry in greedy if entry["condition"] in ("unmasked", "own mask")]
    return [
        {key: entry["answers"][number][key] for key in ("question", "answer")} | {"persona": entry["persona"]}
        for number in range(min(count, *(entry["n"] for entry in plain)) if plain else 0)
        for entry in plain
    ]
