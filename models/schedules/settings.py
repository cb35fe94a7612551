"""Checks of a schedule's settings: every message names field, value and what is accepted."""

from __future__ import annotations

from typing import Any


class ScheduleError(ValueError):
    """A schedule's setting is wrong, or does not fit the decoder."""


def require(good: bool, field: str, value: Any, accepted: str) -> None:
    """Raises ScheduleError unless `good`."""
    if not good:
        raise ScheduleError(f"{field}: found {value!r}, accepted: {accepted}")


def require_depth(field: str, layer: int, last: int, num_layers: int) -> None:
    """Raises ScheduleError where a layer number is beyond `last`, in a decoder of `num_layers` layers."""
    require(layer <= last, field, layer, f"at most {last}, because the decoder has {num_layers} layers")


def is_int(value: Any, low: int) -> bool:
    """Returns whether a value is a whole number, at least `low`."""
    return type(value) is int and value >= low


def is_number(value: Any, low: float, high: float = float("inf")) -> bool:
    """Returns whether a value is a number in low ... high."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
