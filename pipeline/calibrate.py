"""``python -m pipeline.calibrate``: measure personas on a model and write one mask each."""

import dataclasses
import datetime
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.cli import note, parse, quiet_libraries, run
from pipeline.config import CONTRASTIVE, FIRST_ORDER, CalibrateConfig
from pipeline.errors import UserError

DESCRIPTION = (
    "Measure the activation statistics of personas on a language model, score every weight, keep the best, and write "
    "one binary mask per persona. No training: one forward pass over a few hundred question/answer pairs per persona."
)


def calibrate(config: CalibrateConfig) -> Path:
    """Run the whole calibration and return the output folder. Raises UserError.

    Under a launcher that starts this program once per device, only rank 0 writes and builds masks.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from pipeline.data.catalogue import load_catalogue, neutral_set
    from pipeline.provenance import RUN, circumstances
    from pipeline.store import check_output, staged_folder, write_json

    began = datetime.datetime.now(datetime.UTC)
    catalogue = load_catalogue(config.personas, compose=config.compose, strict=config.strict)
    if config.criterion in CONTRASTIVE and (alone := [p for p in catalogue.personas if p not in catalogue.opponents]):
        raise UserError(f"{config.criterion} needs opposing personas; {', '.join(alone)} has none (use wanda, sparse)")
    if config.criterion == "neutral":
        catalogue.sets.append(neutral_set())
    if getattr(rank_zero_only, "rank", 0):
        _measure(config, catalogue, config.output, writes=False)
        return config.output
    check_output(config.output, config.overwrite)
    for problem in catalogue.problems:
        note(f"left out: {problem}")
    started = time.monotonic()
    with staged_folder(config.output, config.overwrite) as staging:
        if config.stream:
            _stream(config, catalogue, staging)
            seconds = {"streaming": time.monotonic() - started}
        else:
            _measure(config, catalogue, staging, writes=True)
            measured = time.monotonic() - started
            note(f"measured in {measured:.1f} s")
            _build(config, catalogue, staging)
            seconds = {"measuring": measured, "masks": time.monotonic() - started - measured}
        write_json(staging / RUN, circumstances(began, seconds, dataclasses.asdict(config)))
    note(f"masks of {len(catalogue.personas)} personas in {config.output} ({time.monotonic() - started:.1f} s in all)")
    return config.output


def _measure(config: CalibrateConfig, catalogue: Any, folder: Path, *, writes: bool) -> None:
    """The forward pass for the statistics and, where the criterion needs it, the backward pass for the gradients."""
    import lightning

    from pipeline.calibration import StatisticsModule, run_pass
    from pipeline.data.prompts import Prompter
    from pipeline.loading import load_model, load_tokenizer
    from pipeline.reuse import check_reuse
    from pipeline.store import STATISTICS, load_statistics, save_statistics

    lightning.seed_everything(config.seed, verbose=False)
    tokenizer = load_tokenizer(config.model)
    prompter = Prompter(tokenizer)
    if config.statistics and writes:
        stats = load_statistics(Path(config.statistics) / STATISTICS)
        check_reuse(config, catalogue, load_model(config.model))
        save_statistics(stats, folder / STATISTICS)
    elif not config.statistics:
        data = _samples(config, catalogue, tokenizer, prompter)
        statistics = StatisticsModule(config, tuple(catalogue.measured), folder / STATISTICS)
        run_pass(config, statistics, data)
        statistics.raise_failure()
    if config.criterion in FIRST_ORDER:
        _differentiate(config, catalogue, prompter, tokenizer.pad_token_id, folder)


def _differentiate(config: CalibrateConfig, catalogue: Any, prompter: Any, pad: int, folder: Path) -> None:
    """Every pair's gradient and that of neutral text, after a first pass that finds how much each answer counts."""
    from pipeline.budget import NEUTRAL_TEXTS
    from pipeline.calibration import run_pass
    from pipeline.data.catalogue import neutral_set
    from pipeline.data.forms import NEUTRAL
    from pipeline.gradients import GradientModule, ObjectiveData
    from pipeline.objectives import objective_of
    from pipeline.sketching import SketchModule, single_answers, weighted

    limits = {"count": config.samples, "max_length": config.max_length, "seed": config.seed}
    objectives = {s.plus: objective_of(s, prompter, **limits) for s in catalogue.sets}
    limits["count"] = min(config.samples or NEUTRAL_TEXTS, NEUTRAL_TEXTS)
    objectives[NEUTRAL] = objective_of(neutral_set(), prompter, **limits)
    batch_tokens = max(1, config.batch_tokens // 4)
    if config.criterion == "first-order":
        answers = single_answers(objectives)
        note(f"weighing {sum(map(len, answers.values()))} answers and neutral texts by their gradients")
        sizes = {name: len(units) for name, units in answers.items()}
        run_pass(config, SketchModule(config, folder, pad, sizes), ObjectiveData(answers, batch_tokens), gradients=True)
        objectives = weighted(objectives, folder)
    note(f"gradients of {len(catalogue.sets)} margins and of neutral text")
    run_pass(config, GradientModule(config, folder, pad), ObjectiveData(objectives, batch_tokens), gradients=True)


def _samples(config: CalibrateConfig, catalogue: Any, tokenizer: Any, prompter: Any) -> Any:
    """The calibration samples of every persona, in batches."""
    from pipeline.data.module import CalibrationData, make_samples
    from pipeline.loading import position_limit

    limits = {"count": config.samples, "max_length": config.max_length, "seed": config.seed}
    samples, problems = make_samples(catalogue.sets, prompter, **limits)
    for problem in problems:
        if config.strict:
            raise UserError(problem)
        note(f"left out: {problem}")
    longest, limit = max(len(sample.encoded) for sample in samples), position_limit(config.model)
    if limit is not None and longest > limit:
        raise UserError(f"samples have up to {longest} tokens, the model reads {limit}: use --max-length {limit}")
    pad = tokenizer.pad_token_id
    data = CalibrationData(samples, tokens=config.tokens, batch_tokens=config.batch_tokens, pad=pad)
    note(f"{len(samples)} samples of {len(catalogue.measured)} personas in {len(data.batches)} batches")
    return data


def _stream(config: CalibrateConfig, catalogue: Any, staging: Path) -> None:
    """Measure and mask block by block, for a model that memory does not hold."""
    import lightning

    from pipeline.data.prompts import Prompter
    from pipeline.loading import load_tokenizer
    from pipeline.store import STATISTICS, save_statistics
    from pipeline.streaming import Stream

    lightning.seed_everything(config.seed, verbose=False)
    tokenizer = load_tokenizer(config.model)
    data = _samples(config, catalogue, tokenizer, Prompter(tokenizer))
    done = Stream(config, catalogue, data, staging).run()
    save_statistics(done.stats, staging / STATISTICS)
    order, removed = done.order(), done.parts.removed()
    fingerprints = {name: done.fingerprints[name] for name in order}
    manifest = _manifest(config, catalogue, done.stats, done.model, fingerprints, removed)
    if done.overlaps:
        manifest["disjoint_overlap"] = done.shares()
    done.parts.finish(manifest, order)


def _build(config: CalibrateConfig, catalogue: Any, staging: Path) -> None:
    from pipeline.budget import fit
    from pipeline.building import build_masks
    from pipeline.fingerprint import model_fingerprints
    from pipeline.gradients import Gradients
    from pipeline.loading import load_model
    from pipeline.sites import find_layers
    from pipeline.sketching import WEIGHTS
    from pipeline.store import STATISTICS, load_statistics, save_masks

    stats = load_statistics(staging / STATISTICS)
    model = load_model(config.model)
    gradients = Gradients(staging, catalogue) if config.criterion in FIRST_ORDER else None
    fitted: dict[str, Any] = {}
    overlaps: dict[str, float] = {}
    if config.budget:
        masks, fitted = fit(model, stats, catalogue, config, gradients)
    else:
        masks, overlaps = build_masks(model, stats, catalogue, config, gradients)
    layers = find_layers(model)
    fingerprints = model_fingerprints({name: layers[name] for name in masks.shapes})
    removed = {persona: 1 - masks.density(persona) for persona in masks.personas}
    manifest = _manifest(config, catalogue, stats, model, fingerprints, removed)
    manifest["sparsity"] |= fitted
    if overlaps:
        manifest["disjoint_overlap"] = overlaps
    save_masks(masks, staging, manifest)
    for file in (*staging.glob("gradient-*.safetensors"), *staging.glob(WEIGHTS)):
        # As large as the weights, and of no use once the masks exist.
        file.unlink()


def _manifest(
    config: CalibrateConfig,
    catalogue: Any,
    stats: Any,
    model: Any,
    fingerprints: dict[str, str],
    removed: dict[str, float],
) -> dict[str, Any]:
    """Everything that the manifest says, but for the files; ``removed``: persona -> share of the weights."""
    from pipeline.building import composed
    from pipeline.data.module import draw
    from pipeline.fingerprint import data_hash, question_hash
    from pipeline.pooling import pooled_experts
    from pipeline.provenance import PLACE, commit, versions
    from pipeline.sites import find_layers

    pooled = pooled_experts(composed(stats, catalogue), catalogue, config)
    if pooled:
        one, names = next(iter(pooled.items()))
        note(
            f"mixture-of-experts: {len(names)} matrices of {one} saw fewer than {config.expert_tokens} tokens and were "
            f"scored by all experts of their layer (manifest.json lists them for every persona)"
        )
    drawn = {s.plus: draw(s.split("calibration"), config.samples, config.seed) for s in catalogue.sets}
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACE}
    counts = {p: [int(c) if c == int(c) else c for c in stats.counts[i].tolist()] for i, p in enumerate(stats.personas)}
    return {
        "model": {"id": config.model, "type": model.config.model_type, "fingerprint": fingerprints},
        "tokenizer": config.model,
        "criterion": config.criterion,
        "sparsity": {"option": config.sparsity, "removed": removed},
        "uncovered": [name for name in find_layers(model) if name not in fingerprints],
        **({"pooled_experts": pooled} if pooled else {}),
        "personas": {
            "pairs": [list(s.poles) for s in catalogue.sets],
            "opponents": {p: o for p, o in catalogue.opponents.items() if p in removed},
            "compositions": {c.name: [list(part) for part in c.parts] for c in catalogue.compositions},
            "sources": {s.plus: s.source for s in catalogue.sets},
            "data_sha256": {plus: data_hash(items) for plus, items in drawn.items()},
            "questions": {plus: sorted({question_hash(i) for i in items}) for plus, items in drawn.items()},
        },
        "counts": {"columns": ["samples", "counted tokens", "sink tokens"], "personas": counts},
        "options": options,
        "versions": versions(),
        "commit": commit(),
    }


def main(argv: list[str] | None = None) -> int:
    config = parse(CalibrateConfig, DESCRIPTION, argv)
    quiet_libraries()
    return run(lambda: calibrate(config))


if __name__ == "__main__":
    sys.exit(main())
