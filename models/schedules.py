"""Every schedule by name. Adding one is a file in this folder and an entry in SCHEDULES."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .attention_spread import AttentionSpread
from .cdpruner import CDPruner
from .divprune import DivPrune
from .fastv import FastV
from .gated import Gated, window_gates
from .pyramiddrop import PyramidDrop
from .random_tokens import Random
from .schedule_base import Dense, Fused, Schedule, ScheduleError, ScorePruner, View, Within, Wrapper
from .shortv import ShortV
from .sparsevlm import SparseVLM
from .stage_plan import StagePlan
from .visionzip import VisionZip
from .visipruner import VisiPruner
from .vtw import VTW

SCHEDULES: dict[str, type[Schedule]] = {
    "dense": Dense,
    "visipruner": VisiPruner,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "vtw": VTW,
    "divprune": DivPrune,
    "visionzip": VisionZip,
    "sparsevlm": SparseVLM,
    "cdpruner": CDPruner,
    "shortv": ShortV,
    "random": Random,
}
TRAINED = "trained"  # the name of a checkpoint's stage plan; dense where it has none

# None or "trained": the checkpoint's plan, dense without one; the name of one of its plans; a name of SCHEDULES, with
# its published settings; {"name": ..., setting: ...}; or a Schedule
Choice = Schedule | str | Mapping[str, Any] | None


def published(name: str, num_layers: int, /, **settings: Any) -> Schedule:
    """Returns the named schedule with its published settings, layer numbers scaled to a decoder's depth.

    `settings` are fields in place of the published ones, taken as they are.

    Raises:
        ScheduleError: an unknown name or setting, or a value that the schedule refuses.
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ScheduleError(f"schedule: got {name!r}, expected one of {', '.join([TRAINED, *SCHEDULES])}")
    kind: Any = SCHEDULES[name]
    fields = dataclasses.fields(kind)
    known = [field.name for field in fields]
    for key in settings:
        if key not in known:
            raise ScheduleError(f"schedule {name}: got setting {key!r}, expected {', '.join(known) or 'none'}")
    bounds = [field for field in fields if "published_depth" in field.metadata]
    scaled = {one.name: _scaled(one, num_layers) for one in bounds}
    return kind(**{**scaled, **settings})


def resolve_schedule(
    choice: Choice, plan: StagePlan | None, num_layers: int, plans: Mapping[str, StagePlan | None] | None = None
) -> Schedule:
    """Returns the schedule that a choice means for a checkpoint. A pruner prunes inside the window of its plan.

    Args:
        choice: see Choice.
        plan: the checkpoint's.
        num_layers: its decoder's depth.
        plans: all plans that it was trained for, by name, where there are several.

    Raises:
        ScheduleError: an unknown name or setting, a class in place of an object, a setting beyond the decoder.
        ValueError: a plan beyond the decoder.
    """
    if isinstance(choice, type):
        raise ScheduleError(f"schedule: got the class {choice.__name__}, expected an object: {choice.__name__}(...)")
    name = choice.get("name") if isinstance(choice, Mapping) and len(choice) == 1 else choice
    if plans and isinstance(name, str) and name in plans:
        choice = plan_schedule(plans[name])
    if name == TRAINED:
        choice = TRAINED
    if isinstance(choice, Mapping):
        settings = {str(key): value for key, value in choice.items()}
        choice = published(settings.pop("name", None), num_layers, **settings)
    if isinstance(choice, str) and choice != TRAINED:
        if choice not in SCHEDULES:
            known = ", ".join([TRAINED, *(plans or {}), *SCHEDULES])
            raise ScheduleError(f"schedule: got {choice!r}, expected one of {known}")
        choice = published(choice, num_layers)
    if choice is None or choice == TRAINED:
        choice = plan_schedule(plan)
    if not isinstance(choice, Schedule):
        raise ScheduleError(f"schedule: got {choice!r}, expected a Schedule, a name, or None")
    if plan is not None and not choice.trainable and not isinstance(choice, Within):
        choice = Within(plan, choice)
    choice.check(num_layers)
    return choice


def plan_schedule(plan: StagePlan | None) -> Schedule:
    """Returns a stage plan as a schedule; None is dense."""
    return Dense() if plan is None else Fused(plan)


def _scaled(one: dataclasses.Field[Any], num_layers: int) -> Any:
    """Returns a published layer number, bounds in ascending order, or a set of layers, at another depth."""
    value: Any = one.default
    ratio = num_layers / one.metadata["published_depth"]
    if one.metadata.get("is_set"):  # a layer is in the set where the published decoder's at the same place is
        return tuple(layer for layer in range(num_layers) if int((layer + 0.5) / ratio) in value)
    if isinstance(value, int):
        return max(1, round(value * ratio))
    scaled: list[int] = []
    for layer in value:
        scaled.append(max(scaled[-1] + 1 if scaled else 1, round(layer * ratio)))
    return tuple(scaled)


__all__ = [
    "SCHEDULES",
    "TRAINED",
    "VTW",
    "AttentionSpread",
    "CDPruner",
    "Dense",
    "DivPrune",
    "FastV",
    "Fused",
    "Gated",
    "PyramidDrop",
    "Random",
    "Schedule",
    "ScheduleError",
    "ScorePruner",
    "ShortV",
    "SparseVLM",
    "View",
    "VisiPruner",
    "VisionZip",
    "Within",
    "Wrapper",
    "plan_schedule",
    "published",
    "resolve_schedule",
    "window_gates",
]
