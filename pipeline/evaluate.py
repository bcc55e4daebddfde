"""``python -m pipeline.evaluate RUN``: what the masks do on held-out items, with controls and cost."""

import dataclasses
import datetime
import math
import sys
from collections.abc import Sequence
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


def evaluate(config: EvaluateConfig) -> list[Any]:
    """Run the evaluation; prints the tables, writes the plot and, if asked, the JSON. Returns the records."""
    import torch

    from pipeline.conditions import Ground
    from pipeline.data.prompts import Prompter
    from pipeline.evaluation import held_out
    from pipeline.loading import pick_device
    from pipeline.model import PersonaModel
    from pipeline.protocol import Limits
    from pipeline.report import plot, print_table
    from pipeline.store import load_manifest

    manifest = load_manifest(config.run)
    pairs = _chosen(held_out(manifest, config.data, config.strict, note), config)
    dtype = getattr(torch, config.precision)
    model = PersonaModel.from_pretrained(config.run, config.model, dtype=dtype, device=pick_device(config.device))
    prompter = Prompter(model.tokenizer)
    limits = Limits(config.max_length, config.batch_tokens, model.tokenizer.pad_token_id)
    records, contrasts = _run_all(Ground(model, prompter, limits, config), pairs)
    answers = _answers(model, prompter, pairs[0], config) if config.questions else []
    criterion = manifest["criterion"]
    print_table(records, contrasts, criterion)
    _print_answers(answers)
    assert config.plot is not None
    try:
        plot(records, config.plot, f"{manifest['model']['id']}, {criterion}, sparsity {manifest['sparsity']['option']}")
        note(f"plot: {config.plot}")
        if config.json:
            _write(config, manifest, records, contrasts, answers)
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


def _run_all(ground: Any, pairs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The records and contrasts of every pair, under every condition asked for."""
    from rich.console import Console
    from rich.progress import Progress

    from pipeline.conditions import UNMASKED, settings
    from pipeline.data.catalogue import neutral_texts
    from pipeline.evaluation import contrasts_of, place, records_of

    config, wanted = ground.config, ground.config.wanted
    texts = ground.limits.cut([ground.prompter.encode("", text) for text in neutral_texts()[: config.texts or None]])
    costs: dict[str | None, float] = {}
    records, contrasts = [], []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("evaluating", total=(1 + len(wanted)) * len(pairs))
        for pair in pairs:
            base = _measure(ground, pair, UNMASKED, texts, costs)
            progress.advance(task)
            states = []
            for name in wanted:
                for setting in settings(name, ground, pair):
                    states.append(_measure(ground, pair, setting, texts, costs))
                    if name == "mask":
                        states.append(_from_the_other_side(states[-1], pair))
                progress.advance(task)
            options = {"resamples": config.bootstrap, "seed": config.seed}
            criterion = ground.model.masks.manifest["criterion"]
            records += records_of(pair, base, states, criterion=criterion, **options)
            contrasts += contrasts_of(pair, base, states, **options)
    return sorted(records, key=lambda r: (r.pair, r.form, place(r.condition))), contrasts


def _measure(ground: Any, pair: Any, setting: Any, texts: Sequence[Any], costs: dict[str | None, float]) -> Any:
    """The state of the model under one setting; what neutral text costs there is kept in ``costs`` by mask."""
    from pipeline.conditions import applied
    from pipeline.evaluation import State, measure_state
    from pipeline.likelihood import perplexity

    model, limits, mask = ground.model, ground.limits, setting.mask
    words = {"system": setting.system, "earlier": setting.earlier}
    with applied(ground, setting):
        options = ground.config.options
        measured = measure_state(model.model, ground.prompter, pair, options=options, limits=limits, **words)
        if mask not in costs:
            costs[mask] = perplexity(model, texts, batch_tokens=limits.batch_tokens, pad=limits.pad)
    removed = 1 - model.masks.density(mask) if mask else 0.0
    return State(setting.condition, setting.persona, setting.system, removed, costs[mask], measured)


def _from_the_other_side(state: Any, pair: Any) -> Any:
    """The same state as the opponent sees it."""
    opponent = pair.minus if state.persona == pair.plus else pair.plus
    return dataclasses.replace(state, condition="opponent mask", persona=opponent, system=None)


def _answers(model: Any, prompter: Any, pair: Any, config: EvaluateConfig) -> list[dict[str, Any]]:
    """Greedy answers to held-out questions, unmasked and under both poles' masks."""
    from pipeline.generation import answer

    questions = list(dict.fromkeys(item.question for item in pair.items))[: config.questions]
    answers = []
    for question in questions:
        for persona in (None, pair.plus, pair.minus):
            with model.using(persona, config.gamma if persona else 0.0):
                text = answer(model, prompter, question, max_new_tokens=48)
            answers.append({"question": question, "persona": persona, "answer": text})
    return answers


def _print_answers(answers: list[dict[str, Any]]) -> None:
    question = None
    for entry in answers:
        if entry["question"] != question:
            question = entry["question"]
            print(f"\nQ: {question}")
        print(f"  {entry['persona'] or 'unmasked'}: {entry['answer']}")
    print()


def _write(
    config: EvaluateConfig,
    manifest: dict[str, Any],
    records: Sequence[Any],
    contrasts: Sequence[Any],
    answers: list[Any],
) -> None:
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
        "records": [_finite(dataclasses.asdict(r)) for r in records],
        "contrasts": [_finite(dataclasses.asdict(c)) for c in contrasts],
        "answers": answers,
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
