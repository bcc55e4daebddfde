"""The folder that a run is built in, beside its destination; renamed when it is complete.

One process writes at a time (a lock that dies with its process), and what a killed or stopped run has measured stays
for ``--resume``. See docs/format.md.
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.cli import note
from pipeline.errors import SpoiledError, UserError
from pipeline.provenance import RUN
from pipeline.reading import parse_json
from pipeline.signals import unbroken
from pipeline.store import MANIFEST, STATISTICS

STATE = "state.json"
"""What an unfinished run was started with (``pipeline.state``)."""
FAILURE = "failure.json"
"""The first of several processes that failed, and why (``pipeline.ranks``)."""
MASKS = "masks"
ORPHANS = 5.0
"""Seconds to wait for a lock: processes whose parent was killed notice it within one."""


def staging_of(output: Path) -> Path:
    """Where the run that becomes ``output`` is built."""
    output = output.absolute()
    if not output.name:
        raise UserError(f"--output {output}: a run needs a folder of its own")
    return output.with_name(f".{output.name}.partial")


def has_progress(staging: Path) -> bool:
    """Is anything measured in it?"""
    return staging.is_dir() and any(p.name not in (STATE, FAILURE) and p.suffix != ".tmp" for p in staging.iterdir())


def is_finished(output: Path) -> bool:
    """Is nothing left to do for ``output``? A process that was killed after its last rename may have left its state."""
    finished = (output / MANIFEST).exists() and not staging_of(output).exists()
    if finished:
        (output / STATE).unlink(missing_ok=True)
    return finished


@contextmanager
def staged_folder(output: Path, overwrite: bool, *, resume: bool = False) -> Iterator[Path]:
    """A staging folder that becomes ``output`` if the block succeeds.

    If it fails, the folder vanishes, unless it has a ``STATE`` and anything measured in it, or something else than a
    UserError came between; after SpoiledError it always does. ``resume`` takes the folder of an earlier process.
    Raises UserError if ``output`` holds something that is not a run, a run without ``overwrite``, or if another
    process is writing.
    """
    output, staging = output.absolute(), staging_of(output)
    check_output(output, overwrite or resume)
    made = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _lock(output), _vanishing(staging, resume):
            check_output(output, overwrite or resume)
            _settle(output)
            if resume and not staging.exists():
                raise UserError(f"--resume {output}: there is no unfinished run")
            if not resume:
                _begin(staging, overwrite)
            yield staging
            _finish(staging, output)
    except OSError as error:
        kept = "what was measured is kept" if has_progress(staging) else "nothing was left behind"
        raise UserError(f"could not write {error.filename or output}: {error.strerror or error}; {kept}") from error
    finally:
        if not output.exists() and not staging.exists():
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()


@contextmanager
def _vanishing(staging: Path, resume: bool) -> Iterator[None]:
    """Remove the folder when the block fails, unless there is something in it to go on with."""
    try:
        yield
    except BaseException as error:
        early = isinstance(error, UserError | OSError) and not resume and not has_progress(staging)
        if not (staging / STATE).exists() or early or isinstance(error, SpoiledError):
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _begin(staging: Path, overwrite: bool) -> None:
    # Without a state (--stream) nobody can go on with it.
    if has_progress(staging) and (staging / STATE).exists() and not overwrite:
        output = staging.name.removeprefix(".").removesuffix(".partial")
        raise UserError(
            f"--output: an unfinished run of {output} is in {staging}; go on with --resume, or begin anew with "
            f"--overwrite"
        )
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()


def _finish(staging: Path, output: Path) -> None:
    """Leave only what belongs to a run and put it in its place; a manifest says that it is complete."""
    for file in staging.iterdir():
        if file.name not in (MANIFEST, STATISTICS, MASKS, RUN, STATE):
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink()
    with unbroken():
        _swap(staging, output)
        # Last: until then, the run can be resumed.
        (output / STATE).unlink(missing_ok=True)


def _swap(staging: Path, output: Path) -> None:
    """Put ``staging`` in the place of ``output``; an earlier run is put back if that fails."""
    if not (output / MANIFEST).exists():
        staging.rename(output)
    else:
        replaced = _replaced(output)
        output.rename(replaced)
        try:
            staging.rename(output)
        except OSError:
            replaced.rename(output)
            raise
    shutil.rmtree(_replaced(output), ignore_errors=True)


def _settle(output: Path) -> None:
    """Tidy up after a process that was killed between the renames of ``_swap``."""
    replaced = _replaced(output)
    if replaced.exists() and output.exists():
        shutil.rmtree(replaced)
    elif replaced.exists():
        replaced.rename(output)


def _replaced(output: Path) -> Path:
    return output.with_name(f".{output.name}.replaced")


def check_output(output: Path, overwrite: bool) -> None:
    """Raise UserError unless ``output`` may be written."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"--output {output}: a file of that name exists")
    if (output / MANIFEST).exists():
        if not overwrite:
            raise UserError(f"--output {output}: an earlier run is there; give another folder or --overwrite true")
        return
    if any(output.iterdir()):
        raise UserError(f"--output {output}: the folder holds something that is not a run of this tool")


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """Only one process (and those it forks) at a time; the system releases the lock of a process that dies."""
    import fcntl

    path, waited = output.with_name(f".{output.name}.lock"), 0.0
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it before may have removed the file between our two calls.
            if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:
                break
        except BlockingIOError:
            if waited > ORPHANS:
                os.close(file)
                raise UserError(f"--output {output}: another run is writing there ({_owner(path)})") from None
        except OSError as error:
            note(f"{path}: no lock on this file system ({error.strerror}); take care that no other run writes there")
            break
        os.close(file)
        time.sleep(0.1)
        waited += 0.1
    try:
        os.ftruncate(file, 0)
        owner = {"process": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.write(file, json.dumps(owner).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _owner(path: Path) -> str:
    try:
        owner = parse_json(path.read_bytes())
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"see {path}"
