"""Stop requests: SIGTERM, Ctrl-C or the exit of the launcher end a run after the current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from train.errors import Stopped

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop.

    Outside `deferred` a signal raises Stopped at once. Inside it is only noted, for the training loop to read after
    each step. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._process = os.getpid()
        self._is_deferred = False
        self._interrupts = 0
        self._launchers = _deepspeed_launchers()

    def watch(self) -> None:
        """Handles SIGTERM and SIGINT from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # blocked by the phase before

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Notes signals instead of raising Stopped: for training and for writing its result."""
        if self.is_requested():
            raise Stopped
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def is_requested(self) -> bool:
        """Returns whether a signal came, or the `deepspeed` command that started this rank is gone."""
        if self.reason is None and self._launchers and _deepspeed_launchers() != self._launchers:
            self.reason = "the end of the launcher"
        return self.reason is not None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: its parent decides
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
            if number == signal.SIGTERM:
                os.kill(os.getpid(), number)
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os.write(sys.stderr.fileno(), b"stopped at once; the same command goes on from the last checkpoint\n")
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.reason = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        if not self._is_deferred:
            raise Stopped


def ignore_signals(_: Any = None) -> None:
    """Lets a DataLoader worker ignore stop requests: the rank needs it until the current step is done."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _deepspeed_launchers() -> tuple[int, ...]:
    """Returns the processes of the `deepspeed` command above this rank, nearest first; none under other launchers."""
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return ()
        status = Path(f"/proc/{parent}/stat").read_text()
    except OSError:
        return ()
    return parent, int(status.rpartition(")")[2].split()[1])
