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
    records, contrasts = _run_all(model, prompter, pairs, limits, config)
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


def _run_all(
    model: Any, prompter: Any, pairs: Sequence[Any], limits: Any, config: EvaluateConfig
) -> tuple[list[Any], list[Any]]:
    from rich.console import Console
    from rich.progress import Progress

    from pipeline.controls import add_random
    from pipeline.data.catalogue import neutral_texts, persona_prompt
    from pipeline.evaluation import State, contrasts_of, measure_state, place, records_of
    from pipeline.likelihood import perplexity

    texts = [prompter.encode("", text) for text in neutral_texts()[: config.texts or None]]
    costs: dict[str | None, float] = {}

    def cost(persona: str | None) -> float:
        if persona not in costs:
            costs[persona] = perplexity(model, limits.cut(texts), batch_tokens=limits.batch_tokens, pad=limits.pad)
        return costs[persona]

    def state(condition: str, pole: str, pair: Any, mask: str | None, system: str | None = None) -> Any:
        with model.using(mask, config.gamma if mask else 0.0):
            measured = measure_state(model.model, prompter, pair, options=config.options, system=system, limits=limits)
            removed = 1 - model.masks.density(mask) if mask else 0.0
            return State(condition, pole, system, removed, cost(mask), measured)

    wanted = [c.strip() for c in config.conditions.split(",")]
    records, contrasts = [], []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("evaluating", total=(1 + 2 * len(wanted)) * len(pairs))
        for pair in pairs:
            base = state("unmasked", "", pair, None)
            progress.advance(task)
            controls = add_random(model, config.run, pair, config.draws, config.seed) if "random" in wanted else []
            states = []
            for pole, other in ((pair.plus, pair.minus), (pair.minus, pair.plus)):
                if "prompt" in wanted:
                    states.append(state("prompt", pole, pair, None, persona_prompt(pole, pair.source)))
                if "mask" in wanted:
                    own = state("own mask", pole, pair, pole)
                    states += [own, State("opponent mask", other, None, own.removed, own.perplexity, own.measured)]
                for number, names in enumerate(controls, 1):
                    condition = "random mask" if number == 1 else f"random mask {number}"
                    states.append(state(condition, pole, pair, names[pole]))
                progress.advance(task, len(wanted))
            options = {"resamples": config.bootstrap, "seed": config.seed}
            records += records_of(pair, base, states, criterion=model.masks.manifest["criterion"], **options)
            contrasts += contrasts_of(pair, base, states, **options)
    return sorted(records, key=lambda r: (r.pair, r.form, place(r.condition))), contrasts


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
