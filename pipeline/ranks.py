"""Processes that live and die together: the first failure ends all of them, and is the one that is shown."""

import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from pipeline import signals
from pipeline.errors import RankError, SpoiledError, UserError
from pipeline.signals import Stop
from pipeline.staging import FAILURE

WATCH = 0.5
"""Seconds between two looks at whether the parent still lives and no other rank has failed."""
PATIENCE = 5.0
"""Seconds that ranks get to leave by themselves when the user stops the run."""
_children: list[Any] = []
"""Processes that Lightning started for this one; a later Trainer of this process does not know them."""


class Ranks(lightning.Trainer):
    """A Trainer for one ``predict`` whose ranks tell each other of a failure through a file in ``folder``.

    Signals are ``pipeline.signals``' business: Lightning would delay SIGTERM to the end of the pass and announce it
    to ranks that do not listen.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.made_in = folder, os.getpid()
        # What forked ranks tell goes through a pipe: when the disk is full, a file could not be written.
        self._pipe: tuple[int, int] | None = None
        self._signal_connector = _NoHandlers()  # type: ignore[assignment]

    @property
    def decides_alone(self) -> bool:
        """No other rank has begun yet, so that what to do may be decided without asking them."""
        return self.world_size == 1 or getattr(self.strategy.launcher, "_start_method", None) is not None

    def run(self, module: Any, data: Any) -> None:
        """Run ``predict``. Raises the first failure of any rank: a UserError, RankError, or this rank's own."""
        if self.world_size == 1:
            self.predict(module, datamodule=data, return_predictions=False)
            return
        if getattr(self.strategy.launcher, "_start_method", "") == "fork":
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
        try:
            self.predict(module, datamodule=data, return_predictions=False)
        except Stop:
            self._end_children(signal.SIGTERM)
            if failure := self._told():
                raise failure from None
            raise
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise self._of_child(error) from None
        except Exception as error:
            failure = self._killed() or self._told() or error
            self._end_children(signal.SIGKILL)
            raise failure from None
        finally:
            for end in self._pipe or ():
                os.close(end)
            self._pipe = None

    def _predict_impl(self, *arguments: Any, **options: Any) -> Any:
        # What the launcher calls in every rank, however it starts them.
        if self.world_size == 1:
            return super()._predict_impl(*arguments, **options)
        with self._as_rank():
            return super()._predict_impl(*arguments, **options)

    @contextmanager
    def _as_rank(self) -> Iterator[None]:
        forked = os.getpid() != self.made_in
        if forked:
            signals.in_fork()
        elif started := getattr(self.strategy.launcher, "procs", ()):
            _children[:] = started
        over = threading.Event()
        parent = self.made_in if forked else os.getppid()
        threading.Thread(target=self._watch, args=(over, parent, forked), daemon=True, name="watch").start()
        try:
            yield
        except Exception as error:
            self._tell(error)
            if forked:
                sys.stderr.flush()
                os._exit(2 if isinstance(error, UserError) else 1)
            raise
        finally:
            over.set()

    def _watch(self, over: threading.Event, parent: int, forked: bool) -> None:
        """End a rank that waits for others in vain: its parent is gone, or another rank says that it has failed."""
        while not over.wait(WATCH):
            orphan = os.getppid() != parent and (forked or self.global_rank > 0)
            # Before the ranks have met, the file may be an earlier run's, which rank 0 is about to remove.
            failed = dist.is_initialized() and (self.folder / FAILURE).exists()
            if not orphan and not failed:
                continue
            if orphan or forked:
                os._exit(1)
            # Through the main thread, which tidies up; if that waits in C++, ``signals`` ends the process.
            if not over.wait(WATCH):
                os.kill(os.getpid(), signal.SIGTERM)
            return

    def _tell(self, error: Exception) -> None:
        """Leave word for the other ranks. The first one counts: what follows is mostly its consequence."""
        text = "".join(traceback.format_exception(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            error = UserError(f"could not write {error.filename}: {error.strerror}; what was measured before is kept")
        kind = next((k.__name__ for k in (SpoiledError, UserError) if isinstance(error, k)), "")
        word = {"rank": self.global_rank, "kind": kind, "message": str(error), "text": text[-16000:]}
        if self._pipe:
            with suppress(BlockingIOError):
                os.write(self._pipe[1], json.dumps(word).encode() + b"\n")
            return
        own = self.folder / f".{FAILURE}.{self.global_rank}.tmp"
        try:
            own.write_text(json.dumps(word), encoding="utf-8")
            os.link(own, self.folder / FAILURE)
        except FileExistsError:
            pass
        except OSError:
            # A full disk: the terminal is what is left.
            print(str(error) if kind else text, file=sys.stderr, flush=True)
        finally:
            own.unlink(missing_ok=True)

    def _told(self) -> Exception | None:
        """The first failure that any rank told of."""
        try:
            if self._pipe:
                told, *_ = os.read(self._pipe[0], 1 << 20).splitlines()
            else:
                told = (self.folder / FAILURE).read_bytes()
            word = json.loads(told)
        except (OSError, ValueError):
            return None
        if word["kind"]:
            return (SpoiledError if word["kind"] == "SpoiledError" else UserError)(word["message"])
        return RankError(f"process {word['rank']} of {self.world_size} failed:\n{word['text']}")

    def _of_child(self, error: Any) -> BaseException:
        """The failure behind the end of a forked rank."""
        code = getattr(error, "exit_code", 1)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return Stop(code - 128)
        if code < 0:
            return _by_signal(error.error_index, self.world_size, -code)
        return self._told() or RankError(str(error))

    def _killed(self) -> RankError | None:
        """A rank that this process started and that some signal ended; it could not tell."""
        # The others notice a closed connection before the system has done with the process.
        until = time.monotonic() + 2 * WATCH
        while _children and time.monotonic() < until:
            for number, process in enumerate(_children, 1):
                if (process.poll() or 0) < 0:
                    return _by_signal(number, self.world_size, -process.returncode)
            if any(process.poll() is not None for process in _children):
                break
            time.sleep(0.05)
        return None

    def _end_children(self, number: int) -> None:
        """End the ranks that this process started, by ``number`` and, if that does not help, by SIGKILL."""
        processes = [p for p in (*_children, *getattr(self.strategy.launcher, "procs", ())) if _lives(p)]
        for process in processes:
            _send(process.pid, number)
        until = time.monotonic() + PATIENCE
        for process in processes:
            while _lives(process) and time.monotonic() < until:
                time.sleep(0.05)
            if _lives(process):
                _send(process.pid, signal.SIGKILL)


class _NoHandlers:
    """In the place of Lightning's handlers of SIGTERM and SIGUSR1."""

    received_sigterm = False

    def register_signal_handlers(self) -> None:
        pass

    def teardown(self) -> None:
        pass


def _by_signal(rank: int, world: int, number: int) -> RankError:
    name = signal.Signals(number).name
    why = " (the system does that when memory is short)" if name == "SIGKILL" else ""
    return RankError(f"process {rank} of {world} was ended by {name}{why}")


def _lives(process: Any) -> bool:
    # Popen or multiprocessing.Process.
    return process.poll() is None if hasattr(process, "poll") else process.is_alive()


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
