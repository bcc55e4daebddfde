"""``python -m pipeline.calibrate``: measure personas on a model and write one mask each."""

import dataclasses
import datetime
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.cli import note, parse, quiet_libraries, run
from pipeline.config import CONTRASTIVE, FIRST_ORDER, READERS, WHITENED, CalibrateConfig
from pipeline.errors import UserError
from pipeline.signals import Stop, handled
from pipeline.terminal import printable

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
    from pipeline.provenance import RUN, circumstances
    from pipeline.staging import has_progress, is_finished, staged_folder, staging_of
    from pipeline.store import write_json

    began = datetime.datetime.now(datetime.UTC)
    if config.resume:
        config.output = config.resume
        if is_finished(config.output):
            note(f"{config.output} is complete")
            return config.output
    catalogue = load_catalogue(config.personas, compose=config.compose, strict=config.strict)
    if config.criterion in CONTRASTIVE and (alone := [p for p in catalogue.personas if p not in catalogue.opponents]):
        raise UserError(f"{config.criterion} needs opposing personas; {', '.join(alone)} has none (use wanda, sparse)")
    if config.holds_apart and len(pairs := [s for s in catalogue.sets if s.minus]) < 2:
        raise UserError(f"--apart keeps pairs apart from each other; --personas {config.personas} has {len(pairs)}")
    if config.criterion == "neutral":
        catalogue.sets.append(neutral_set())
    staging = staging_of(config.output)
    if getattr(rank_zero_only, "rank", 0):
        _measure(config, catalogue, staging, writes=False)
        _build(config, catalogue, staging, writes=False)
        return config.output
    for name in config.unread:
        option, readers = name.replace("_", "-"), ", ".join(READERS[name])
        note(f"--{option} has no effect: {config.criterion} does not read it ({readers} would)")
    if config.holds_margins and not config.budget:
        note("--apart without a budget: only the directions are kept apart, what is removed may still move the others")
    for problem in catalogue.problems:
        note(f"left out: {problem}")
    started = time.monotonic()
    seconds: dict[str, float] = {}
    try:
        with staged_folder(config.output, config.overwrite, resume=config.resume is not None):
            if config.stream:
                _stream(config, catalogue, staging)
                seconds["streaming"] = time.monotonic() - started
            else:
                _run(config, catalogue, staging, seconds)
            write_json(staging / RUN, circumstances(began, seconds, dataclasses.asdict(config)))
    except BaseException as error:
        unfinished = has_progress(staging) or (not isinstance(error, UserError) and staging.exists())
        if unfinished or (config.stream and isinstance(error, Stop)):
            note(f"{farewell(config)}{f' ({error})' if isinstance(error, Stop) else ''}")
        raise
    note(f"masks of {len(catalogue.personas)} personas in {config.output} ({time.monotonic() - started:.1f} s in all)")
    return config.output


def farewell(config: CalibrateConfig) -> str:
    """How to go on with a run that is not finished."""
    if config.stream:
        return "not finished; --stream keeps nothing to go on with"
    return f"not finished; to go on: python -m pipeline.calibrate --resume {shlex.quote(str(config.output))}"


def _run(config: CalibrateConfig, catalogue: Any, staging: Path, seconds: dict[str, float]) -> None:
    """Do what is left of the run in ``staging``; ``seconds`` gets the time of each stage."""
    started = time.monotonic()
    _prepare(config, catalogue, staging)
    if _is_built(staging):
        return
    _measure(config, catalogue, staging, writes=True)
    seconds["measuring"] = time.monotonic() - started
    note(f"measured in {seconds['measuring']:.1f} s")
    _build(config, catalogue, staging, writes=True)
    seconds["masks"] = time.monotonic() - started - seconds["measuring"]


def _is_built(staging: Path) -> bool:
    """Did an earlier process write everything, and was killed before it put the folder in its place?"""
    from pipeline.store import MANIFEST

    return (staging / MANIFEST).exists()


def _prepare(config: CalibrateConfig, catalogue: Any, staging: Path) -> None:
    """Begin, or check that the run can go on; what was built with other options goes."""
    from pipeline import state
    from pipeline.staging import FAILURE

    if config.resume:
        (staging / FAILURE).unlink(missing_ok=True)
        if differing := state.check(staging, config, catalogue):
            # Before the new options are written: a kill in between must not leave masks of the old ones.
            _forget(config, differing, staging)
    state.begin(staging, config, catalogue)


def _forget(config: CalibrateConfig, differing: dict[str, Any], staging: Path) -> None:
    """Remove what was made with other options; ``differing`` are those as they were."""
    import shutil

    from pipeline.experts import find_experts
    from pipeline.gradient_files import AGAIN, ANSWERS, WEIGHTED, gradient_file
    from pipeline.shares import SHARDS
    from pipeline.staging import MASKS
    from pipeline.store import MANIFEST
    from pipeline.weights import weights_of

    before = differing.get("criterion", config.criterion)
    another = config.sharded and (before in FIRST_ORDER) != (config.criterion in FIRST_ORDER)
    if another and find_experts(weights_of(config).model):
        raise UserError(
            f"--resume {config.output}: {before} and {config.criterion} do not measure the same layers of a mixture of "
            f"experts; begin anew with --overwrite"
        )
    if (before == WHITENED) != (config.criterion == WHITENED):
        # It has answers sketched and weighed, and leaves other layers alone.
        for file in staging.glob(gradient_file("*")):
            file.unlink()
        for name in (WEIGHTED, *ANSWERS):
            shutil.rmtree(staging / name, ignore_errors=True)
    (staging / MANIFEST).unlink(missing_ok=True)
    # What was seen under a mask, too.
    built = [folder for folder in (staging / SHARDS, staging / MASKS, staging / AGAIN) if folder.exists()]
    if built:
        note("other options for the choice of weights: the masks are built anew, what was measured stays")
    for folder in built:
        shutil.rmtree(folder)


def _measure(config: CalibrateConfig, catalogue: Any, folder: Path, *, writes: bool) -> None:
    """The forward pass for the statistics and, where the criterion needs it, the backward pass for the gradients."""
    import lightning

    from pipeline.calibration import StatisticsModule, run_pass
    from pipeline.checkpoint import discard
    from pipeline.data.prompts import Prompter
    from pipeline.directions import differentiate
    from pipeline.loading import load_tokenizer
    from pipeline.reuse import check_reuse
    from pipeline.state import check_files
    from pipeline.store import STATISTICS, load_statistics, save_statistics

    lightning.seed_everything(config.seed, verbose=False)
    tokenizer = load_tokenizer(config.model)
    prompter = Prompter(tokenizer)
    if config.statistics and writes:
        stats = load_statistics(Path(config.statistics) / STATISTICS)
        check_reuse(config, catalogue)
        save_statistics(stats, folder / STATISTICS)
    elif not config.statistics:
        data = _samples(config, catalogue, tokenizer, prompter)
        statistics = StatisticsModule(config, tuple(catalogue.measured), folder / STATISTICS)
        run_pass(config, statistics, data)
    if config.criterion in FIRST_ORDER:
        differentiate(config, catalogue, prompter, folder)
    if writes:
        check_files(folder)
        discard(folder)


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

    from pipeline.building import overlaps
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
    if config.disjoint:
        kept = {persona: of.values() for persona, of in done.parts.kept.items()}
        manifest["disjoint_overlap"] = overlaps(done.parts.shared, kept, done.parts.shapes, catalogue)
    done.parts.finish(manifest, order)


def _build(config: CalibrateConfig, catalogue: Any, staging: Path, *, writes: bool) -> None:
    """Build the masks, each rank its share, and again those that ``revise`` says; the one that ``writes`` puts together
    what stays and writes the manifest."""
    from pipeline.building import overlaps, shapes_of
    from pipeline.calibration import run_pass
    from pipeline.revising import compare, recorded_reviews, revise
    from pipeline.shares import BuildModule, gather
    from pipeline.state import check_files
    from pipeline.store import STATISTICS, load_statistics, save_manifest
    from pipeline.weighing import recorded
    from pipeline.weights import fingerprints, weights_of

    # Lightning's half precision would change the type of what is computed on the way.
    exact = dataclasses.replace(config, precision="32-true")
    run_pass(exact, BuildModule(config, catalogue, staging), inference=False)
    if config.revises and revise(config, catalogue, staging):
        run_pass(exact, BuildModule(config, catalogue, staging), inference=False)
        compare(config, catalogue, staging)
    if not writes:
        return
    check_files(staging)
    stats, weights = load_statistics(staging / STATISTICS), weights_of(config)
    shapes = shapes_of(weights.model, stats, config, weights.base)
    done = gather(staging, shapes, stats, catalogue, config)
    removed = {persona: 1 - entry["density"] for persona, entry in done.files.items()}
    manifest = _manifest(config, catalogue, stats, weights.model, fingerprints(weights, shapes), removed)
    manifest["sparsity"] |= done.fitted
    if config.revises:
        manifest["loops"] = recorded(staging, catalogue, ("against", "repetition"))
        manifest["revised"] = recorded_reviews(staging, catalogue)
    if config.holds_margins:
        manifest["apart"] = recorded(staging, catalogue, ("apart", "held"))
    if config.disjoint:
        kept = {persona: entry["kept"].values() for persona, entry in done.files.items()}
        manifest["disjoint_overlap"] = overlaps(done.shared, kept, shapes, catalogue)
    save_manifest(staging, manifest, shapes, done.files)


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


def _resumed(config: CalibrateConfig, argv: list[str] | None) -> CalibrateConfig:
    """The options of the run that ``config`` resumes, under those of the command line."""
    from pipeline.state import saved_options

    if not config.resume:
        return config
    saved = saved_options(config.resume)
    config = parse(CalibrateConfig, DESCRIPTION, argv, saved)
    assert config.resume is not None
    if config.output not in (Path(saved.get("output", config.output)), config.resume):
        raise UserError(f"--resume {config.resume} goes on in that folder; leave --output {config.output} out")
    return config


def main(argv: list[str] | None = None) -> int:
    config = parse(CalibrateConfig, DESCRIPTION, argv)
    quiet_libraries()
    if config.resume:
        config.output = config.resume
    with handled(printable(farewell(config))):
        return run(lambda: calibrate(_resumed(config, argv)))


if __name__ == "__main__":
    sys.exit(main())
