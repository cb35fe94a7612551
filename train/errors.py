"""The three ways a training ends before its end: it cannot go on, it was asked to stop, another rank failed."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A training that cannot go on; the message is one line: what happened, and from where to go on."""


class Stopped(BaseException):
    """A stop request that came before the first step or after the last: nothing is left to save.

    A BaseException, as KeyboardInterrupt is, so that no library takes it for a fault of its own.
    """


class PeerError(RuntimeError):
    """Another rank ended the run.

    Attributes:
        code: the exit code of that rank.
        is_told: that rank said why.
    """

    def __init__(self, message: str, *, code: int, is_told: bool) -> None:
        super().__init__(message)
        self.code, self.is_told = code, is_told


def one_line(error: BaseException | str) -> str:
    """Returns a message in one line; of an error from a DataLoader worker, only the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(" ".join(lines).split())
