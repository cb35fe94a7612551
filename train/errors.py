"""The exceptions that end a training run or a release with a one-line message."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A training that cannot go on; the message is one line: what happened, and from where to go on."""


class InputError(ValueError):
    """What the user of a release asked for cannot be done; one line: where, what was got, what is expected."""


class ReleaseError(RuntimeError):
    """A release that went wrong; the message is one line, and nothing is left that looks like a release."""


class Stopped(BaseException):
    """A stop request that came before the first step or after the last: nothing is left to save.

    A BaseException, as KeyboardInterrupt is, so that no library takes it for one of its faults.
    """


class PeerError(RuntimeError):
    """Another rank ended the run.

    Attributes:
        code: the exit code of that rank.
        is_reported: that rank has printed the reason.
    """

    def __init__(self, message: str, *, code: int, is_reported: bool) -> None:
        super().__init__(message)
        self.code, self.is_reported = code, is_reported


def one_line(error: BaseException | str) -> str:
    """Returns a message in one line; of an error from a DataLoader worker, only the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(" ".join(lines).split())
