"""Signals, dead processes and kills: real ones, on real processes."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from pipeline import calibrate
from pipeline.staging import STATE, staging_of
from tests.pipeline.kills import contents

SMALL = ("--accelerator", "cpu", "--criterion", "wanda", "--batch-tokens", "200", "--checkpoint-every", "0")
AFTER = 15.0
"""Seconds within which a run is over once a process of it has died; gloo would wait for 30 minutes."""


def program(tmp_path, body, words):
    """The command line of a calibration that runs ``body`` at every batch; ``rank`` and ``folder`` are at hand.

    A file, because Lightning's ddp starts the same command again for the other ranks.
    """
    text = f"""
import os, signal, sys, time
from pathlib import Path
from pipeline import calibrate, calibration
# Tests that run in the background have Ctrl-C ignored, and hand that down.
signal.signal(signal.SIGINT, signal.default_int_handler)
add = calibration.StatisticsModule._add
def changed(self, batch, *more):
    rank = self.trainer.global_rank
    folder = self.folder
    {body}
    return add(self, batch, *more)
calibration.StatisticsModule._add = changed
sys.exit(calibrate.main(sys.argv[1:]))
"""
    (tmp_path / "program.py").write_text(text)
    return [sys.executable, str(tmp_path / "program.py"), *words]


def until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code", "devices"), [(signal.SIGINT, 130, "1"), (signal.SIGTERM, 143, "2")])
def test_a_signal_leaves_a_resumable_state_and_says_how_to_go_on(words, tmp_path, capsys, number, code, devices):
    output = tmp_path / "out"
    given = words(output, *SMALL, "--devices", devices)
    # Every rank waits in its third batch: the signal comes while a batch is at work.
    body = "self.seen = getattr(self, 'seen', 0) + 1; (folder / f'.{rank}-{self.seen}.tmp').touch(); time.sleep(0.3)"
    process = subprocess.Popen(program(tmp_path, body, given), stderr=subprocess.PIPE, text=True)
    until((staging_of(output) / f".{int(devices) - 1}-2.tmp").exists, process)
    started = time.monotonic()
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert time.monotonic() - started < AFTER
    assert process.returncode == code, error
    name = signal.Signals(number).name
    last = error.replace("\r", "\n").splitlines()[-1]
    assert last == f"not finished; to go on: python -m pipeline.calibrate --resume {output} ({name})"
    assert "Traceback" not in error
    assert (staging_of(output) / f"rank-0-of-{devices}.safetensors").exists()
    if devices == "2":
        return
    given_again = shlex.split(last.removesuffix(f" ({name})").partition("pipeline.calibrate ")[2])
    assert calibrate.main(given_again) == 0
    assert re.search(r"going on after [1-9]", capsys.readouterr().err)
    found = contents(output)
    shutil.rmtree(output)
    assert calibrate.main(given) == 0
    assert contents(output) == found


@pytest.mark.parametrize("strategy", ["auto", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_rank_that_fails_shows_its_own_traceback_last(words, tmp_path, strategy):
    body = """
    if rank == 1:
        (folder / '.failed.tmp').touch()
        raise ZeroDivisionError('my own failure')
    time.sleep(1)"""
    given = words(tmp_path / "out", *SMALL, "--devices", "2", "--strategy", strategy)
    process = subprocess.Popen(program(tmp_path, body, given), stderr=subprocess.PIPE, text=True)
    until((staging_of(tmp_path / "out") / ".failed.tmp").exists, process)
    started = time.monotonic()
    error = process.communicate(timeout=120)[1]
    assert time.monotonic() - started < AFTER
    assert process.returncode == 1
    lines = error.rstrip().splitlines()
    assert lines[-1] == "ZeroDivisionError: my own failure"
    assert "process 1 of 2 failed:" in lines
    assert "Connection" not in "\n".join(lines[lines.index("process 1 of 2 failed:") :])
    assert (staging_of(tmp_path / "out") / STATE).exists()


def test_a_rank_that_is_killed_ends_the_run_and_can_go_on(words, tmp_path):
    output = tmp_path / "out"
    body = """
    if rank == 1:
        (folder / '.failed.tmp').touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)"""
    given = words(output, *SMALL, "--devices", "2")
    process = subprocess.Popen(program(tmp_path, body, given), stderr=subprocess.PIPE, text=True)
    until((staging_of(output) / ".failed.tmp").exists, process)
    started = time.monotonic()
    error = process.communicate(timeout=120)[1]
    assert time.monotonic() - started < AFTER
    assert process.returncode == 1
    assert "process 1 of 2 was ended by SIGKILL" in error.rstrip().splitlines()[-1]
    assert "to go on: python -m pipeline.calibrate --resume" in error
    assert (staging_of(output) / STATE).exists()


def test_a_process_that_is_stuck_in_c_leaves_all_the_same():
    """A mutex that is locked twice stands for a collective without its peers: no Python handler ever runs."""
    text = """
import ctypes, pipeline.signals as signals
signals.GRACE = 0.5
with signals.handled("so long"):
    mutex = ctypes.create_string_buffer(256)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    print("stuck", flush=True)
    lock(mutex)
"""
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(5) == b"stuck"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == b"so long\n"
    assert process.returncode == 143


def test_signals_wait_for_the_end_of_what_must_not_be_broken():
    from pipeline import signals

    done = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(signals.Stop) as caught, signals.handled(""):
        with signals.unbroken():
            signal.raise_signal(signal.SIGTERM)
            assert signals.told()
            done.append(1)
        done.append(2)
    assert done == [1]
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    # Who catches it and goes on is not stopped once more.
    with signals.unbroken():
        done.append(3)
    assert done == [1, 3]


def kills(devices, trials, seed, folder):
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.kills", str(devices), str(trials), str(seed), str(folder)],
        capture_output=True,
        text=True,
        timeout=60 + 60 * trials,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{trials} of {trials} the same" in done.stdout


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_at_a_random_moment(tmp_path, devices):
    kills(devices, 1, 5, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_at_twenty_random_moments(tmp_path, devices):
    kills(devices, 20, 1, tmp_path)
