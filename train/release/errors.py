"""What can go wrong with a release."""

from __future__ import annotations


class InputError(ValueError):
    """What the user asked for cannot be done; the message is one line: where, what was got, what is expected."""


class ReleaseError(RuntimeError):
    """A release that went wrong; the message is one line, and nothing is left that looks like a release."""
