"""Every schedule by name. Adding one is a file in this folder and a line here."""

import dataclasses

from models.schedule import Dense, Fused, Schedule, Within
from models.schedules.fastv import FastV
from models.schedules.pyramiddrop import PyramidDrop
from models.schedules.random_control import Random
from models.schedules.settings import ScheduleError
from models.schedules.visipruner import VisiPruner
from models.schedules.vtw import VTW

SCHEDULES: dict[str, type[Schedule]] = {
    "dense": Dense,
    "visipruner": VisiPruner,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "vtw": VTW,
    "random": Random,
}

PUBLISHED_DEPTH = 32  # the defaults are what the papers take for LLaVA-1.5-7B


def published(name: str, num_layers: int) -> Schedule:
    """Returns the named schedule with its published settings, layer numbers scaled to a decoder's depth."""
    schedule = SCHEDULES[name]()
    scaled: dict[str, int | tuple[int, ...]] = {}
    for field in ("shallow_end", "layer", "layers"):
        value = getattr(schedule, field, None)
        if isinstance(value, int):
            scaled[field] = _scaled(value, num_layers)
        elif value is not None:
            scaled[field] = tuple(_scaled(layer, num_layers) for layer in value)
    return dataclasses.replace(schedule, **scaled) if scaled else schedule  # type: ignore[type-var]


def _scaled(layer: int, num_layers: int) -> int:
    return max(1, round(layer * num_layers / PUBLISHED_DEPTH))


__all__ = [
    "SCHEDULES",
    "VTW",
    "Dense",
    "FastV",
    "Fused",
    "PyramidDrop",
    "Random",
    "ScheduleError",
    "VisiPruner",
    "Within",
    "published",
]
