"""SIGINT and SIGTERM: leave between two batches with everything on disk, or a few seconds later at the latest."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

GRACE, RANK_GRACE = 10.0, 4.0
"""Seconds that a process may take to leave, and that one which it forked may take. Python's handlers wait for a C++
call to return, and one that waits for another process (a collective) may never do so."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(BaseException):
    """The user, or who manages the machine, wants the program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class _Process:
    """What this process has been told. ``owner`` is the process that may raise Stop: the one that the user started."""

    owner = 0
    depth = 0
    pending = 0


@contextmanager
def handled(farewell: str) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise Stop. ``farewell`` is what a process says that has to leave at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that the shell ignores (nohup, a background job) stays ignored.
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    _Process.owner, _Process.depth, _Process.pending = os.getpid(), 0, 0
    for number in before:
        signal.signal(number, _handle)
    release = _with_deadline(farewell, GRACE)
    try:
        yield
    finally:
        release()
        # Who catches Stop and goes on is not to be stopped again by the same signal.
        _Process.pending = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def in_fork() -> None:
    """Begin anew in a forked process: threads do not survive a fork, and the parent's pipe is the parent's."""
    _Process.depth, _Process.pending = 0, 0
    if _Process.owner:
        _with_deadline("", RANK_GRACE)


@contextmanager
def unbroken() -> Iterator[None]:
    """A signal that comes inside has its effect at the end."""
    _Process.depth += 1
    try:
        yield
    finally:
        _Process.depth -= 1
    if told() and not _Process.depth:
        _leave(_Process.pending)


def told() -> bool:
    """Has a signal come inside ``unbroken``?"""
    return bool(_Process.pending)


def _handle(number: int, frame: Any) -> None:
    if _Process.depth:
        _Process.pending = number
    else:
        _leave(number)


def _leave(number: int) -> None:
    if os.getpid() != _Process.owner:
        # A forked rank: what it measured is on disk, and the process that forked it does the talking.
        os._exit(128 + number)
    raise Stop(number)


def _with_deadline(farewell: str, grace: float) -> Callable[[], None]:
    """End the process ``grace`` seconds after a signal unless what is returned is called before."""
    left = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def wait() -> None:
        # Python writes a signal's number here at once, whatever the main thread is waiting for.
        while number := os.read(reader, 1):
            if number[0] in SIGNALS and not left.wait(grace):
                if farewell:
                    print(farewell, file=sys.stderr, flush=True)
                os._exit(128 + number[0])
        os.close(reader)

    def release() -> None:
        left.set()
        signal.set_wakeup_fd(earlier)
        os.close(writer)

    threading.Thread(target=wait, daemon=True, name="deadline").start()
    return release
