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

    from pipeline.budget import NEUTRAL_TEXTS
    from pipeline.calibration import StatisticsModule, run_pass
    from pipeline.data.catalogue import neutral_set
    from pipeline.data.forms import NEUTRAL
    from pipeline.data.module import CalibrationData, make_samples
    from pipeline.data.prompts import Prompter
    from pipeline.gradients import GradientModule, ObjectiveData
    from pipeline.loading import load_model, load_tokenizer, position_limit
    from pipeline.objectives import objective_of
    from pipeline.reuse import check_reuse
    from pipeline.store import STATISTICS, load_statistics, save_statistics

    lightning.seed_everything(config.seed, verbose=False)
    tokenizer = load_tokenizer(config.model)
    prompter = Prompter(tokenizer)
    limits = {"count": config.samples, "max_length": config.max_length, "seed": config.seed}
    if config.statistics and writes:
        stats = load_statistics(Path(config.statistics) / STATISTICS)
        check_reuse(config, catalogue, load_model(config.model))
        save_statistics(stats, folder / STATISTICS)
    elif not config.statistics:
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
        statistics = StatisticsModule(config, tuple(catalogue.measured), folder / STATISTICS)
        run_pass(config, statistics, data)
        statistics.raise_failure()
    if config.criterion in FIRST_ORDER:
        objectives = {s.plus: objective_of(s, prompter, **limits) for s in catalogue.sets}
        limits["count"] = min(config.samples or NEUTRAL_TEXTS, NEUTRAL_TEXTS)
        objectives[NEUTRAL] = objective_of(neutral_set(), prompter, **limits)
        note(f"gradients of {len(catalogue.sets)} margins and of neutral text")
        module = GradientModule(config, folder, tokenizer.pad_token_id)
        run_pass(config, module, ObjectiveData(objectives, max(1, config.batch_tokens // 4)), gradients=True)


def _build(config: CalibrateConfig, catalogue: Any, staging: Path) -> None:
    from pipeline.budget import fit
    from pipeline.building import build_masks
    from pipeline.gradients import Gradients
    from pipeline.loading import load_model
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
    manifest = _manifest(config, catalogue, stats, masks, model)
    manifest["sparsity"] |= fitted
    if overlaps:
        manifest["disjoint_overlap"] = overlaps
    save_masks(masks, staging, manifest)
    for file in staging.glob("gradient-*.safetensors"):
        # As large as the weights, and of no use once the masks exist.
        file.unlink()


def _manifest(config: CalibrateConfig, catalogue: Any, stats: Any, masks: Any, model: Any) -> dict[str, Any]:
    from pipeline.data.module import draw
    from pipeline.fingerprint import data_hash, model_fingerprints, question_hash
    from pipeline.provenance import PLACE, commit, versions
    from pipeline.sites import find_linears

    linears = {name: m for name, m in find_linears(model).items() if name in masks.shapes}
    drawn = {s.plus: draw(s.split("calibration"), config.samples, config.seed) for s in catalogue.sets}
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACE}
    counts = {p: [int(c) if c == int(c) else c for c in stats.counts[i].tolist()] for i, p in enumerate(stats.personas)}
    return {
        "model": {"id": config.model, "type": model.config.model_type, "fingerprint": model_fingerprints(linears)},
        "tokenizer": config.model,
        "criterion": config.criterion,
        "sparsity": {"option": config.sparsity, "removed": {p: 1 - masks.density(p) for p in masks.personas}},
        "uncovered": [name for name in find_linears(model) if name not in masks.shapes],
        "personas": {
            "pairs": [list(s.poles) for s in catalogue.sets],
            "opponents": {p: o for p, o in catalogue.opponents.items() if p in masks.bits},
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
