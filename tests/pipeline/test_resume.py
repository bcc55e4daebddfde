"""Runs that were stopped go on where they were, or say why they cannot."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from pipeline import (
    atomic,
    calibrate,
    calibration,
    drafts,
    gradients,
    revising,
    shares,
    staging,
    store,
    weighing,
)
from pipeline.errors import UserError
from pipeline.gradient_files import AGAIN, gradient_file
from pipeline.staging import staged_folder, staging_of
from pipeline.store import STATISTICS, load_masks, load_statistics
from tests.pipeline.kills import contents
from tests.pipeline.tiny import repeating

SMALL = (
    "--accelerator",
    "cpu",
    "--batch-tokens",
    "200",
    "--sparsity",
    "0.1",
    "--samples",
    "6",
    "--checkpoint-every",
    "0",
)


class CrashError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The files of an uninterrupted run with the default criterion, and the folder it was written to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert calibrate.main(words(output, *SMALL)) == 0
    return output, contents(output)


def crashing(function, after=0):
    """``function``, which is called ``after`` times and then raises."""
    calls = []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise CrashError
        return function(*arguments, **options)

    return call


MOMENTS = {
    "loading": (calibration, "load_model", 0),
    "first batch": (calibration.StatisticsModule, "_add", 0),
    "fourth batch": (calibration.StatisticsModule, "_add", 3),
    "reduction": (calibration, "save_statistics", 0),
    "an objective": (gradients.GradientModule, "_differentiate", 5),
    "second objective": (gradients.GradientModule, "_finish", 1),
    "second draft": (drafts.Drafts, "_drafts", 1),
    "second pole weighed": (weighing, "write_json", 1),
    "weighted answers": (gradients.GradientModule, "_finish", 2),
    "budget search": (shares, "fit", 1),
    "putting together": (shares, "gather", 0),
    "second mask file": (store, "_sha256", 1),
    "manifest": (store, "write_json", 0),
    "last rename": (staging, "_swap", 0),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_crash_at_every_stage(whole, words, monkeypatch, moment):
    crash_and_resume(whole, words, monkeypatch, SMALL, *MOMENTS[moment])


def crash_and_resume(run, words, monkeypatch, options, place, name, after):
    """Crash in the ``after``-th call of ``place.name`` and go on: the files are those of ``run``, with ``options``."""
    output, expected = run
    shutil.rmtree(output)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, crashing(getattr(place, name), after))
        with pytest.raises(CrashError):
            calibrate.main(words(output, *options))
    assert staging_of(output).exists()
    assert not output.exists()
    assert calibrate.main(["--resume", str(output)]) == 0
    assert contents(output) == expected
    assert [p.name for p in output.parent.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def revised(words, tmp_path_factory):
    """As ``whole``, of a model that repeats itself under its masks."""
    output = tmp_path_factory.mktemp("revised") / "out"
    with pytest.MonkeyPatch.context() as patch:
        repeating(patch)
        assert calibrate.main(words(output, *MORE)) == 0
    return output, contents(output)


MORE = (*SMALL, "--samples", "12")
SECOND = {
    "second review": (revising, "write_json", 1),
    "second pole weighed again": (weighing, "write_json", 3),
    "first gradient again": (gradients.GradientModule, "_finish", 4),
    "second gradient again": (gradients.GradientModule, "_finish", 5),
    "second mask again": (shares, "fit", 3),
    "second look at the second pole": (revising, "write_json", 3),
    "putting together": (shares, "gather", 0),
}


@pytest.mark.parametrize("moment", SECOND)
def test_a_crash_in_the_second_round(revised, words, monkeypatch, moment):
    repeating(monkeypatch)
    crash_and_resume(revised, words, monkeypatch, MORE, *SECOND[moment])


def test_nothing_is_done_twice(whole, words, monkeypatch, capsys):
    """After a crash in the third layer: no batch, no gradient and no finished layer is computed again."""
    output, _ = whole
    shutil.rmtree(output)
    built = []
    build = shares.each_mask

    def watched(*arguments, **options):
        built.append(options["layers"])
        if len(built) == 3:
            raise CrashError
        return build(*arguments, **options)

    monkeypatch.setattr(shares, "each_mask", watched)
    with pytest.raises(CrashError):
        calibrate.main(words(output, *SMALL, "--max-perplexity-increase", "0"))
    finished = len(list((staging_of(output) / shares.SHARDS).iterdir()))
    assert finished == 2
    for kind, name in ((calibration.StatisticsModule, "_add"), (gradients.GradientModule, "_differentiate")):
        monkeypatch.setattr(kind, name, crashing(None))
    assert calibrate.main(["--resume", str(output)]) == 0
    layers = load_masks(output).shapes
    assert [len(one) for one in built] == [1] * (len(layers) + 1)
    assert set().union(*built) == set(layers)


def test_the_finished_objective_is_kept(whole, words, monkeypatch):
    output, expected = whole
    shutil.rmtree(output)
    with monkeypatch.context() as patch:
        finish = gradients.GradientModule._finish
        patch.setattr(gradients.GradientModule, "_finish", crashing(finish, 1))
        with pytest.raises(CrashError):
            calibrate.main(words(output, *SMALL))
    (kept,) = staging_of(output).glob("gradient-*")
    before = kept.stat().st_mtime_ns
    seen = []
    monkeypatch.setattr(shares.BuildModule, "load", lambda self: seen.append(kept.stat().st_mtime_ns) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate.main(["--resume", str(output)])
    assert seen == [before]
    monkeypatch.undo()
    assert calibrate.main(["--resume", str(output)]) == 0
    assert contents(output) == expected


@pytest.fixture
def stopped(words, tmp_path, monkeypatch):
    """The output of a run on copies of model and data that stopped after two batches."""

    def make(*options, model, pairs):
        shutil.copytree(model, tmp_path / "model")
        shutil.copy(pairs, tmp_path / "pairs.csv")
        given = words(
            tmp_path / "out", *SMALL, *options, model=tmp_path / "model", personas=f"up/down={tmp_path / 'pairs.csv'}"
        )
        with monkeypatch.context() as patch:
            patch.setattr(calibration.StatisticsModule, "_add", crashing(calibration.StatisticsModule._add, 2))
            with pytest.raises(CrashError):
                calibrate.main(given)
        return tmp_path / "out"

    return make


def test_what_differs_is_spelled_out(stopped, ground, tmp_path, capsys):
    output = stopped("--criterion", "wanda", model=ground.llama, pairs=ground.pairs)
    before = contents(staging_of(output))
    options = ("--samples", "3", "--max-length", "99", "--devices", "2", "--model", str(ground.llama))
    assert calibrate.main(["--resume", str(output), *options]) == 2
    error = capsys.readouterr().err
    for part in ("--samples (6, now 3)", "--max-length (512, now 99)", "--devices (1, now 2)", "--model ("):
        assert part in error
    assert "--batch-tokens" not in error
    assert "the items of up" in error
    assert calibrate.main(["--resume", str(output), "--output", str(tmp_path / "other")]) == 2
    assert "leave --output" in capsys.readouterr().err
    assert contents(staging_of(output)) == before
    assert calibrate.main(["--resume", str(output), "--batch-tokens", "200"]) == 0


@pytest.mark.parametrize("change", ["data", "weights", "tokenizer", "gone"])
def test_other_files_are_refused_and_the_old_ones_go_on(stopped, ground, tmp_path, capsys, change):
    output = stopped("--criterion", "wanda", model=ground.llama, pairs=ground.pairs)
    names = {"data": "pairs.csv", "weights": "model/model.safetensors", "tokenizer": "model/tokenizer.json"}
    path = tmp_path / names.get(change, "model/generation_config.json")
    content = path.read_bytes()
    if change == "gone":
        path.unlink()
    elif change == "weights":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.write_bytes(content.replace(b"fox", b"dog") if change == "data" else content + b" ")
    assert calibrate.main(["--resume", str(output)]) == 2
    error = capsys.readouterr().err
    words = {"gone": "is gone", "tokenizer": f"had {len(content)} bytes, now {len(content) + 1}"}
    assert f"{path} {words.get(change, 'has another content')}" in error
    assert ("the items of up" in error) == (change == "data")
    path.write_bytes(content)
    assert calibrate.main(["--resume", str(output)]) == 0


def test_a_file_that_changes_during_the_run(ground, words, tmp_path, monkeypatch, capsys):
    shutil.copytree(ground.llama, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = path.read_bytes()
    add = calibration.StatisticsModule._add

    def meddling(self, batch, *more):
        path.write_bytes(content[:-1] + b"\0")
        return add(self, batch, *more)

    given = words(tmp_path / "out", *SMALL, "--criterion", "wanda", model=tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(calibration.StatisticsModule, "_add", meddling)
        assert calibrate.main(given) == 2
    assert f"changed during the run: {path} has another content" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repeats", [False, True], ids=["", "revised"])
def test_another_way_to_choose_weights_keeps_the_measurement(words, monkeypatch, tmp_path, capsys, repeats):
    """With one difference that matters to the masks only, the rest is not measured again and the result is exact."""
    output, given = tmp_path / "out", MORE if repeats else SMALL
    if repeats:
        repeating(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(shares, "gather", crashing(None))
        with pytest.raises(CrashError):
            calibrate.main(words(output, *given))
    assert (staging_of(output) / AGAIN / gradient_file("up")).exists() == repeats
    add = calibration.StatisticsModule._add
    monkeypatch.setattr(calibration.StatisticsModule, "_add", crashing(None))
    options = ("--sparsity", "0.2", "--pool", "0.5")
    assert calibrate.main(["--resume", str(output), *options]) == 0
    assert "built anew" in capsys.readouterr().err
    found = contents(output)
    monkeypatch.setattr(calibration.StatisticsModule, "_add", add)
    shutil.rmtree(output)
    assert calibrate.main(words(output, *given, *options)) == 0
    assert contents(output) == found


def test_an_unfinished_run_is_not_lost_by_accident(stopped, ground, tmp_path, capsys):
    output = stopped("--criterion", "wanda", model=ground.llama, pairs=ground.pairs)
    given = ["--model", str(ground.llama), "--personas", f"up/down={ground.pairs}", "--output", str(output)]
    assert calibrate.main([*given, "--criterion", "sparse"]) == 2
    assert "--resume, or begin anew with --overwrite" in capsys.readouterr().err
    assert (staging_of(output) / "rank-0-of-1.safetensors").exists()
    assert calibrate.main([*given, "--criterion", "sparse", "--overwrite"]) == 0
    assert load_masks(output).manifest["criterion"] == "sparse"
    assert not staging_of(output).exists()


def test_nothing_to_resume(whole, tmp_path, capsys):
    assert calibrate.main(["--resume", str(tmp_path / "out")]) == 2
    assert "no unfinished run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    output, _ = whole
    before = contents(output)
    assert calibrate.main(["--resume", str(output)]) == 0
    assert "is complete" in capsys.readouterr().err
    assert contents(output) == before


def test_two_runs_into_one_folder(tmp_path):
    program = """
import sys, time
from pathlib import Path
from pipeline.staging import staged_folder
with staged_folder(Path(sys.argv[1]), False):
    print("in", flush=True)
    time.sleep(60)
"""
    output = tmp_path / "out"
    other = subprocess.Popen([sys.executable, "-c", program, str(output)], stdout=subprocess.PIPE)
    assert other.stdout.read(2) == b"in"
    try:
        message = rf"another run is writing there \(process {other.pid} on "
        with pytest.raises(UserError, match=message), staged_folder(output, True):
            raise AssertionError("two at a time")
    finally:
        other.kill()
        other.wait()
    # What the dead process left is no obstacle.
    assert (tmp_path / ".out.lock").exists()
    with staged_folder(output, False) as folder:
        (folder / "file").write_text("x")
        (folder / "manifest.json").write_text("{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_between_the_renames(tmp_path, monkeypatch, renames):
    """An earlier run is in place or its successor is, whenever the process dies."""
    output = tmp_path / "out"
    with staged_folder(output, False) as folder:
        (folder / "manifest.json").write_text("old")
    with monkeypatch.context() as patch, pytest.raises(CrashError), staged_folder(output, True) as folder:
        (folder / "manifest.json").write_text("new")
        (folder / staging.STATE).write_text("{}")
        patch.setattr(type(tmp_path), "rename", crashing(type(tmp_path).rename, renames))
    assert output.exists() == (renames == 0)
    with staged_folder(output, True, resume=True):
        assert (output / "manifest.json").read_text() == "old"
    assert (output / "manifest.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_keeps_what_was_measured(whole, words, monkeypatch, capsys):
    output, expected = whole
    if output.exists():
        shutil.rmtree(output)
    write = atomic.os.fsync
    calls = []

    def full(number):
        calls.append(number)
        if len(calls) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(number)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full)
        assert calibrate.main(words(output, *SMALL)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].endswith(f"to go on: python -m pipeline.calibrate --resume {output}")
    assert "could not write" in lines[-1]
    assert "No space left on device; what was measured is kept" in lines[-1]
    assert calibrate.main(["--resume", str(output)]) == 0
    assert contents(output) == expected


def test_a_folder_that_cannot_be_written(words, capsys):
    assert calibrate.main(words("/proc/no/such/place")) == 2
    assert "could not write /proc/no" in capsys.readouterr().err.splitlines()[-1]


def test_two_processes_build_what_one_builds(words, finished, tmp_path):
    """From the same statistics; each process writes the shards of its layers."""
    common = (
        "--criterion",
        "contrastive-sparse",
        "--sparsity",
        "0.3",
        "--statistics",
        finished,
        "--accelerator",
        "cpu",
    )
    assert calibrate.main(words(tmp_path / "one", *common)) == 0
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.calibrate", *words(tmp_path / "two", *common, "--devices", "2")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.pop("manifest.json") != two.pop("manifest.json")
    assert one == two
    assert len(one) == 3


def test_a_state_that_is_no_state(stopped, ground, capsys):
    output = stopped("--criterion", "wanda", model=ground.llama, pairs=ground.pairs)
    (staging_of(output) / staging.STATE).write_text(json.dumps({"options": []}))
    assert calibrate.main(["--resume", str(output)]) == 2
    assert "state.json: cannot be read" in capsys.readouterr().err


def test_another_number_of_processes(stopped, ground, capsys):
    """Where --devices does not tell (torchrun, auto), the checkpoints do."""
    output = stopped("--criterion", "wanda", model=ground.llama, pairs=ground.pairs)
    (staging_of(output) / "rank-0-of-1.safetensors").rename(staging_of(output) / "rank-0-of-3.safetensors")
    assert calibrate.main(["--resume", str(output)]) == 2
    assert "started on 3 devices, now 1" in capsys.readouterr().err


def test_checkpoints_hold_the_sums_and_the_position(stopped, ground):
    output = stopped("--criterion", "wanda", model=ground.llama, pairs=ground.pairs)
    saved = load_statistics(staging_of(output) / "rank-0-of-1.safetensors")
    assert calibrate.main(["--resume", str(output)]) == 0
    final = load_statistics(output / STATISTICS)
    assert 0 < saved.counts[:, 0].sum() < final.counts[:, 0].sum()
    for site, sums in saved.sums.items():
        assert (sums[:, 2] <= final.sums[site][:, 2]).all()
        assert not torch.equal(sums, final.sums[site])
