"""``python -m pipeline.evaluate RUN``: what the masks do on held-out items, with controls and cost."""

import dataclasses
import datetime
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.cli import note, parse, quiet_libraries, run
from pipeline.config import EvaluateConfig
from pipeline.errors import UserError

DESCRIPTION = (
    "Evaluate the masks of a run on held-out items: for every pair of opposing personas the two-way accuracy of both "
    "poles, the shift of the margin between the two answers with a 95 % bootstrap interval, and perplexity on neutral "
    "text, for the unmasked model, a persona prompt, the own, the opponent's and a random mask."
)


EFFICIENCY_QUESTIONS = 5
"""Held-out questions on which speed is measured."""


@dataclasses.dataclass
class Results:
    """What an evaluation measured, as in the JSON (docs/evaluation.md); ``settings`` by the pair's first pole, to be
    used again."""

    records: list[Any] = dataclasses.field(default_factory=list)
    contrasts: list[Any] = dataclasses.field(default_factory=list)
    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    steering: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    generation: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    efficiency: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    settings: dict[str, list[Any]] = dataclasses.field(default_factory=dict)


def evaluate(config: EvaluateConfig) -> list[Any]:
    """Run the evaluation; prints the tables, writes the plot and, if asked, the JSON. Returns the records."""
    import torch

    from pipeline.conditions import Ground
    from pipeline.data.prompts import Prompter
    from pipeline.evaluation import held_out
    from pipeline.loading import pick_device
    from pipeline.model import PersonaModel
    from pipeline.protocol import Limits
    from pipeline.report import plot, print_efficiency, print_generation, print_table
    from pipeline.store import load_manifest

    manifest = load_manifest(config.run)
    pairs = _chosen(held_out(manifest, config.data, config.strict, note), config)
    dtype = getattr(torch, config.precision)
    model = PersonaModel.from_pretrained(config.run, config.model, dtype=dtype, device=pick_device(config.device))
    prompter = Prompter(model.tokenizer)
    limits = Limits(config.max_length, config.batch_tokens, model.tokenizer.pad_token_id)
    ground = Ground(model, prompter, limits, config)
    results = _run_all(ground, pairs)
    _generate(ground, pairs, results)
    if config.efficiency:
        _efficiency(ground, pairs[0], results)
    results.answers = _answers(results.generation, config.questions)
    records, criterion = results.records, manifest["criterion"]
    print_table(records, results.contrasts, criterion)
    print_generation(results.generation, config.questions)
    print_efficiency(results.efficiency)
    assert config.plot is not None
    try:
        plot(records, config.plot, f"{manifest['model']['id']}, {criterion}, sparsity {manifest['sparsity']['option']}")
        note(f"plot: {config.plot}")
        if config.json:
            _write(config, manifest, results)
            note(f"records: {config.json}")
    except OSError as error:
        raise UserError(f"could not write the results: {error}") from error
    return records


def _chosen(pairs: list[Any], config: EvaluateConfig) -> list[Any]:
    from pipeline.data.catalogue import PersonaSet
    from pipeline.data.module import draw

    if config.pairs:
        wanted = [p.strip() for p in config.pairs.split(",")]
        if unknown := set(wanted) - {p.plus for p in pairs}:
            raise UserError(
                f"--pairs: no pair begins with {', '.join(sorted(unknown))}; known {[p.plus for p in pairs]}"
            )
        pairs = [p for p in pairs if p.plus in wanted]
    return [PersonaSet(p.plus, p.minus, tuple(draw(p.items, config.samples, config.seed)), p.source) for p in pairs]


def _run_all(ground: Any, pairs: Sequence[Any]) -> Results:
    """Every pair under every condition asked for."""
    from rich.console import Console
    from rich.progress import Progress

    from pipeline.conditions import UNMASKED, settings
    from pipeline.evaluation import contrasts_of, place, records_of

    config, wanted = ground.config, ground.config.wanted
    cost = _costs(ground)
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
                        results.steering.append(_steering_entry(pair, setting))
                progress.advance(task)
            options = {"resamples": config.bootstrap, "seed": config.seed}
            criterion = ground.model.masks.manifest["criterion"]
            results.records += records_of(pair, base, states, criterion=criterion, **options)
            results.contrasts += contrasts_of(pair, base, states, **options)
    results.records.sort(key=lambda r: (r.pair, r.form, place(r.condition)))
    return results


def _measure(ground: Any, pair: Any, setting: Any, cost: Callable[[Any], float]) -> Any:
    """The state of the model under one setting."""
    from pipeline.conditions import applied
    from pipeline.evaluation import State, measure_state

    model, config = ground.model, ground.config
    words = {"system": setting.system, "earlier": setting.earlier}
    with applied(ground, setting):
        measured = measure_state(
            model.model, ground.prompter, pair, options=config.options, limits=ground.limits, **words
        )
    removed = 1 - model.masks.density(setting.mask) if setting.mask else 0.0
    spoken = (setting.condition, setting.persona, setting.system)
    return State(*spoken, removed, cost(setting), measured, setting.opposite)


def _costs(ground: Any) -> Callable[[Any], float]:
    """Measures the perplexity of the neutral texts under a setting, once for each mask."""
    from pipeline.conditions import applied
    from pipeline.data.catalogue import neutral_texts
    from pipeline.likelihood import perplexity

    limits, seen = ground.limits, dict[str | None, float]()
    texts = limits.cut([ground.prompter.encode("", text) for text in neutral_texts()[: ground.config.texts or None]])

    def measured(setting: Any) -> float:
        with applied(ground, setting):
            return perplexity(ground.model, texts, batch_tokens=limits.batch_tokens, pad=limits.pad)

    def cost(setting: Any) -> float:
        # A vector belongs to one setting; a mask may be on in several.
        if setting.steering:
            return measured(setting)
        if setting.mask not in seen:
            seen[setting.mask] = measured(setting)
        return seen[setting.mask]

    return cost


def _steering_entry(pair: Any, setting: Any) -> dict[str, Any]:
    steering = setting.steering
    return {
        "pair": f"{pair.plus}/{pair.minus}",
        "persona": setting.persona,
        "layers": list(steering.vectors),
        **dataclasses.asdict(steering.strength),
    }


def _from_the_other_side(state: Any, pair: Any) -> Any:
    """The same state as the opponent sees it."""
    opponent = pair.minus if state.persona == pair.plus else pair.plus
    return dataclasses.replace(state, condition="opponent mask", persona=opponent, system=None)


def _generate(ground: Any, pairs: Sequence[Any], results: Results) -> None:
    """Text under every setting that speaks: of the first pair, or with ``--generate`` of all."""
    from pipeline.conditions import UNMASKED, settings
    from pipeline.textual import SPEAKING, chosen_items, generation_entry, texts_of

    config = ground.config
    for pair in pairs if config.generate else pairs[:1]:
        items = chosen_items(pair, max(config.questions, config.generate))
        known = results.settings[pair.plus]
        own = [] if "mask" in config.wanted else settings("mask", ground, pair)
        speaking = [UNMASKED, *(s for s in known if s.condition in SPEAKING), *own]
        for setting in speaking if items else []:
            results.generation.append(generation_entry(pair, setting, texts_of(ground, setting, items)))


def _efficiency(ground: Any, pair: Any, results: Results) -> None:
    """What the first pair's settings cost to serve."""
    from pipeline.conditions import UNMASKED
    from pipeline.efficiency import efficiency_of
    from pipeline.textual import SPEAKING, chosen_items

    questions = [item.question for item in chosen_items(pair, EFFICIENCY_QUESTIONS)]
    known = [setting for setting in results.settings[pair.plus] if setting.condition in SPEAKING]
    for setting in (UNMASKED, *known):
        entry = efficiency_of(ground, setting, questions)
        results.efficiency.append({"pair": f"{pair.plus}/{pair.minus}", **dataclasses.asdict(entry)})


def _answers(generation: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first pair's answers, unmasked and under its masks, question by question."""
    plain = [e for e in generation if e["condition"] in ("unmasked", "own mask") and e["pair"] == generation[0]["pair"]]
    return [
        {key: entry["answers"][number][key] for key in ("question", "answer")} | {"persona": entry["persona"]}
        for number in range(min(count, *(entry["n"] for entry in plain)) if plain else 0)
        for entry in plain
    ]


def _write(config: EvaluateConfig, manifest: dict[str, Any], results: Results) -> None:
    from pipeline.evaluation import SCHEMA, SCHEMA_VERSION
    from pipeline.fingerprint import versions
    from pipeline.store import write_json

    content = {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "date": datetime.date.today().isoformat(),
        "run": str(config.run),
        "model": manifest["model"]["id"],
        "criterion": manifest["criterion"],
        "sparsity": manifest["sparsity"]["option"],
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()},
        "records": [_finite(dataclasses.asdict(r)) for r in results.records],
        "contrasts": [_finite(dataclasses.asdict(c)) for c in results.contrasts],
        "answers": results.answers,
        "steering": [_finite(entry) for entry in results.steering],
        "generation": results.generation,
        "efficiency": results.efficiency,
        "versions": versions(),
    }
    assert config.json is not None
    config.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.json, content)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a model whose perplexity overflows reports null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def main(argv: list[str] | None = None) -> int:
    config = parse(EvaluateConfig, DESCRIPTION, argv)
    quiet_libraries()
    return run(lambda: evaluate(config))


if __name__ == "__main__":
    sys.exit(main())
