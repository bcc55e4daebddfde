"""Kill a calibration at random moments, resume it, and compare every file with an uninterrupted run's.

``python -m tests.pipeline.kills DEVICES TRIALS SEED FOLDER`` writes one line a trial and exits with 1 if any differs.
One process imports everything once and forks each run: the moments then fall into the run and not into imports.
"""

import importlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from pipeline import calibrate, repetitions
from pipeline.provenance import RUN
from pipeline.staging import STATE, staging_of
from tests.pipeline.tiny import make_model, write_pairs

PARTS = ("calibration", "gradients", "shares", "revising", "state", "checkpoint", "data.module", "objectives", "reuse")
GONE = 10.0
"""Seconds after which nothing of a killed run may be left."""


def main(devices, trials, seed, folder):
    for name in PARTS:
        importlib.import_module(f"pipeline.{name}")
    importlib.import_module("transformers.models.llama.modeling_llama")
    # The tiny model repeats itself without a mask too; so it is as if it did not, and masks are chosen twice.
    repetitions.Writer._share = lambda *_: 0.1
    chance, output = random.Random(seed), folder / "run"
    model = folder / "model"
    if not model.exists():
        # In a process of its own: this one must not start threads before it forks.
        wait(fork(lambda: make_model(model) and 0, folder))
    options = ["--personas", f"up/down={write_pairs(folder / 'pairs.csv', 16)}", "--batch-tokens", "150"]
    options += ["--sparsity", "0.1", "--accelerator", "cpu", "--devices", str(devices), "--checkpoint-every", "0"]
    command = ["--model", str(model), *options, "--output", str(output)]
    started = time.monotonic()
    code = wait(fork(lambda: calibrate.main(command), folder))
    span = time.monotonic() - started
    assert code == 0, (folder / "log").read_text()
    expected = contents(output)
    print(f"{devices} processes: an uninterrupted run takes {span:.1f} s, {len(expected)} files", flush=True)
    same = 0
    number = 0
    while number < trials:
        shutil.rmtree(output)
        moment, found = chance.uniform(0, span), []
        pid = fork(lambda: calibrate.main(command), folder)
        time.sleep(moment)
        aim = kill(pid, devices, chance)
        code = wait(pid)
        gone(pid)
        if code == 0:
            # It was done before; that is no kill.
            continue
        number += 1
        staging = staging_of(output)
        if staging.exists():
            found = sorted(str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file() and p.name != STATE)
        where = f"{len(found)} files, the last {found[-1]}" if found else "nothing measured"
        where = "the run complete" if output.exists() else where
        if (staging / STATE).exists() or output.exists():
            code = wait(fork(lambda: calibrate.main(["--resume", str(output)]), folder))
        else:
            # Killed before the run had begun: there is nothing to resume.
            shutil.rmtree(staging, ignore_errors=True)
            code = wait(fork(lambda: calibrate.main(command), folder))
        good = code == 0 and contents(output) == expected and not staging.exists()
        same += good
        print(f"{number}: {aim} after {moment:.2f} s with {where}: {'same' if good else 'DIFFERENT'}", flush=True)
        if not good:
            print((folder / "log").read_text()[-3000:], flush=True)
            if not output.exists():
                break
    print(f"{same} of {trials} the same", flush=True)
    return 0 if same == trials else 1


def fork(work, folder):
    """The pid of a process in a session of its own that exits with what ``work`` returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = work()
    finally:
        os._exit(code)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid, devices, chance):
    """SIGKILL to the program, to one of the ranks that it forked, or to all of them; says which."""
    # Not what libraries start for a moment to ask the system something.
    own = Path("/proc/self/cmdline").read_bytes()
    ranks = [p for p in Path("/proc").iterdir() if p.name.isdigit() and parent(p) == pid]
    ranks = [int(p.name) for p in ranks if command_line(p) == own]
    aim = chance.choice(["program", "rank", "everything"]) if devices > 1 else "program"
    if aim == "everything":
        os.killpg(pid, signal.SIGKILL)
    elif aim == "rank" and ranks:
        os.kill(chance.choice(ranks), signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGKILL)
    return aim if ranks or aim != "rank" else "program"


def parent(process):
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def command_line(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def gone(group):
    """Wait until no process of the group is left."""
    until = time.monotonic() + GONE
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"processes of a killed run are still there after {GONE} s")


def contents(folder):
    """The bytes of every file of a run but the one that tells of its circumstances."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != RUN)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
