"""``python -m pipeline.calibrate``: measure personas on a model and write one mask each."""

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.cli import note, parse, quiet_libraries, run
from pipeline.config import CONTRASTIVE, FIRST_ORDER, CalibrateConfig
from pipeline.errors import UserError
from pipeline.signals import Stop, handled

DESCRIPTION = (
    "Measure the activation statistics of personas on a language model, score every weight, keep the best, and write "
    "one binary mask per persona. No training: one forward pass over a few hundred question/answer pairs per persona."
)


def calibrate(config: CalibrateConfig) -> Path:
    """Run the whole calibration and return the output folder. Raises UserError, and RankError for a dead process.

    Under a launcher that starts this program once per device, all measure and build masks, and rank 0 puts them
    together.
    """
    from lightning.pytorch.utilities import rank_zero_only

    from pipeline.data.catalogue import load_catalogue, neutral_set
    from pipeline.staging import has_progress, is_finished, staged_folder, staging_of

    if config.resume:
        config.output = config.resume
        if is_finished(config.output):
            note(f"{config.output} is complete")
            return config.output
    catalogue = load_catalogue(config.personas, compose=config.compose, strict=config.strict)
    if config.criterion in CONTRASTIVE and (alone := [p for p in catalogue.personas if p not in catalogue.opponents]):
        raise UserError(f"{config.criterion} needs opposing personas; {', '.join(alone)} has none (use wanda, sparse)")
    if config.criterion == "neutral":
        catalogue.sets.append(neutral_set())
    staging = staging_of(config.output)
    if getattr(rank_zero_only, "rank", 0):
        _measure(config, catalogue, staging, writes=False)
        _build(config, catalogue, staging, writes=False)
        return config.output
    for problem in catalogue.problems:
        note(f"left out: {problem}")
    started = time.monotonic()
    try:
        with staged_folder(config.output, config.overwrite, resume=config.resume is not None):
            if not _is_built(staging):
                _prepare(config, catalogue, staging)
                _measure(config, catalogue, staging, writes=True)
                note(f"measured in {time.monotonic() - started:.1f} s")
                _build(config, catalogue, staging, writes=True)
    except BaseException as error:
        if has_progress(staging) or (not isinstance(error, UserError) and staging.exists()):
            note(f"{farewell(config)}{f' ({error})' if isinstance(error, Stop) else ''}")
        raise
    note(f"masks of {len(catalogue.personas)} personas in {config.output} ({time.monotonic() - started:.1f} s in all)")
    return config.output


def farewell(config: CalibrateConfig) -> str:
    """How to go on with a run that is not finished."""
    return f"not finished; to go on: python -m pipeline.calibrate --resume {shlex.quote(str(config.output))}"


def _is_built(staging: Path) -> bool:
    """Did an earlier process write everything, and was killed before it put the folder in its place?"""
    from pipeline.store import MANIFEST

    return (staging / MANIFEST).exists()


def _prepare(config: CalibrateConfig, catalogue: Any, staging: Path) -> None:
    """Begin, or check that the run can go on; what was built with other options goes."""
    import shutil

    from pipeline import state
    from pipeline.shares import SHARDS
    from pipeline.staging import FAILURE

    if not config.resume:
        state.begin(staging, config, catalogue)
        return
    (staging / FAILURE).unlink(missing_ok=True)
    if not state.go_on(staging, config, catalogue) and (staging / SHARDS).exists():
        note("other options for the choice of weights: the masks are built anew, what was measured stays")
        shutil.rmtree(staging / SHARDS)


def _measure(config: CalibrateConfig, catalogue: Any, folder: Path, *, writes: bool) -> None:
    """The forward pass for the statistics and, where the criterion needs it, the backward pass for the gradients."""
    import lightning

    from pipeline.budget import NEUTRAL_TEXTS
    from pipeline.calibration import StatisticsModule, run_pass
    from pipeline.checkpoint import discard
    from pipeline.data.catalogue import neutral_set
    from pipeline.data.forms import NEUTRAL
    from pipeline.data.module import CalibrationData, make_samples
    from pipeline.data.prompts import Prompter
    from pipeline.gradients import GradientModule, ObjectiveData
    from pipeline.loading import load_model, load_tokenizer, position_limit
    from pipeline.objectives import objective_of
    from pipeline.reuse import check_reuse
    from pipeline.state import check_files
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
    if config.criterion in FIRST_ORDER:
        objectives = {s.plus: objective_of(s, prompter, **limits) for s in catalogue.sets}
        limits["count"] = min(config.samples or NEUTRAL_TEXTS, NEUTRAL_TEXTS)
        objectives[NEUTRAL] = objective_of(neutral_set(), prompter, **limits)
        note(f"gradients of {len(catalogue.sets)} margins and of neutral text")
        module = GradientModule(config, folder, tokenizer.pad_token_id, objectives)
        run_pass(config, module, ObjectiveData(objectives, max(1, config.batch_tokens // 4)), inference=False)
    if writes:
        check_files(folder)
        discard(folder)


def _build(config: CalibrateConfig, catalogue: Any, staging: Path, *, writes: bool) -> None:
    """Build the masks, each rank its share; the one that ``writes`` puts them together and writes the manifest."""
    from pipeline.building import overlaps_of, shapes_of
    from pipeline.calibration import run_pass
    from pipeline.loading import load_model
    from pipeline.shares import BuildModule, gather
    from pipeline.state import check_files
    from pipeline.store import STATISTICS, load_statistics, save_masks

    # Lightning's half precision would change the type of what is computed on the way.
    run_pass(dataclasses.replace(config, precision="32-true"), BuildModule(config, catalogue, staging), inference=False)
    if not writes:
        return
    check_files(staging)
    stats, model = load_statistics(staging / STATISTICS), load_model(config.model)
    masks, fitted = gather(staging, catalogue.personas, shapes_of(model, stats, config), config)
    manifest = _manifest(config, catalogue, stats, masks, model, staging)
    manifest["sparsity"] |= fitted
    if config.disjoint:
        manifest["disjoint_overlap"] = overlaps_of(masks, catalogue)
    save_masks(masks, staging, manifest)


def _manifest(
    config: CalibrateConfig, catalogue: Any, stats: Any, masks: Any, model: Any, staging: Path
) -> dict[str, Any]:
    from pipeline.data.module import draw
    from pipeline.fingerprint import data_hash, model_fingerprints, question_hash, versions
    from pipeline.sites import find_linears
    from pipeline.state import options_at_start

    linears = {name: m for name, m in find_linears(model).items() if name in masks.shapes}
    drawn = {s.plus: draw(s.split("calibration"), config.samples, config.seed) for s in catalogue.sets}
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
        "options": options_at_start(staging),
        "versions": versions(),
    }


def _resumed(config: CalibrateConfig, argv: list[str] | None) -> CalibrateConfig:
    """The options of the run that ``config`` resumes, under those of the command line."""
    from pipeline.state import saved_options

    if not config.resume:
        return config
    saved = saved_options(config.resume)
    config = parse(CalibrateConfig, DESCRIPTION, argv, saved)
    assert config.resume is not None
    if config.output not in (Path(saved["output"]), config.resume):
        raise UserError(f"--resume {config.resume} goes on in that folder; leave --output {config.output} out")
    return config


def main(argv: list[str] | None = None) -> int:
    config = parse(CalibrateConfig, DESCRIPTION, argv)
    quiet_libraries()
    if config.resume:
        config.output = config.resume
    with handled(farewell(config)):
        return run(lambda: calibrate(_resumed(config, argv)))


if __name__ == "__main__":
    sys.exit(main())
