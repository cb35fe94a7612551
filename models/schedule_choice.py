"""What the `stages`, `plans` and `schedule` of a config mean for its model, and which schedules it can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .attention import SUPPORTED_DECODERS, UnsupportedDecoderError
from .image_tokens import missing_tower
from .schedule_base import Schedule, ScheduleError
from .schedules import SCHEDULES, TRAINED, Choice, resolve_schedule
from .stage_plan import StagePlan
from .token_scorer import needs_scorer


def settle_stages(config: Any) -> Schedule:
    """Returns the schedule of a config, once its plans are checked; fills in the fields of its `stages`.

    Raises:
        UnsupportedDecoderError: the text model is none of SUPPORTED_DECODERS.
        ValueError: the plan or the schedule is wrong, or names a layer that the decoder lacks.
    """
    kind = config.text_config.model_type
    if kind not in SUPPORTED_DECODERS.values():
        expected = ", ".join(sorted(SUPPORTED_DECODERS.values()))
        raise UnsupportedDecoderError(f"text_config.model_type: got {kind}, expected one of {expected}")
    depth = config.text_config.num_hidden_layers
    if config.stages is not None:
        config.stages = _checked(config.stages, depth).to_dict()
    require_saveable(config.schedule)
    if config.plans is not None:
        _check_plans(config)
        config.plans = {
            name: None if fields is None else _checked(fields, depth).to_dict() for name, fields in config.plans.items()
        }
    return resolve_config(config, config.schedule)


def require_saveable(schedule: Any) -> None:
    """Raises ScheduleError for a schedule to start with that config.json cannot hold."""
    if schedule is not None and not isinstance(schedule, str | Mapping):
        raise ScheduleError(
            f'schedule: got {schedule!r}, expected a name or {{"name": ..., setting: ...}}, because config.json holds '
            "it; assign an object to the model's `schedule`"
        )


def resolve_config(config: Any, choice: Choice) -> Schedule:
    """Returns the schedule that a choice means for a model of a fused config; errors as resolve_schedule."""
    plans = {name: plan_of(fields) for name, fields in (config.plans or {}).items()}
    schedule = resolve_schedule(choice, plan_of(config.stages), config.text_config.num_hidden_layers, plans)
    if schedule.reads_scores and not needs_scorer(config):
        raise ScheduleError("schedule Fused: got select: learned, expected another: this model has no scorer")
    return require_tower(schedule, config)


def plan_of(fields: Mapping[str, Any] | None) -> StagePlan | None:
    """Returns the plan of a config's `stages`; None: dense."""
    return None if fields is None else StagePlan.from_dict(fields)


def _checked(fields: Mapping[str, Any], depth: int) -> StagePlan:
    plan = StagePlan.from_dict(fields)
    plan.check(depth)
    return plan


def _check_plans(config: Any) -> None:
    """Raises ValueError where `plans` are no plans by name, or a name already names something else."""
    if not isinstance(config.plans, Mapping):
        raise ValueError(f"plans: got {config.plans!r}, expected {{name: fields of a plan, or null for dense}}")  # noqa: TRY004
    for name, fields in config.plans.items():
        if name == TRAINED or (name in SCHEDULES and not (name == "dense" and fields is None)):
            raise ValueError(f"plans: got the name '{name}', expected one that is no schedule's; dense is null")


def require_tower(schedule: Schedule, config: Any) -> Schedule:
    """Returns the schedule; raises ScheduleError where it reads a vision tower that the model does not have."""
    if schedule.reads_tower and (missing := missing_tower(config)):
        name = type(getattr(schedule, "inner", schedule)).__name__
        raise ScheduleError(f"schedule {name}: got {missing}, expected a LLaVA with a CLIP tower, which it reads")
    return schedule


def require_runnable(schedule: Schedule, config: Any) -> Schedule:
    """Returns the schedule; raises ScheduleError where a model of this config cannot run it on its inputs alone."""
    if schedule.reads_relevance:
        name = type(getattr(schedule, "inner", schedule)).__name__
        raise ScheduleError(
            f"schedule {name}: got a checkpoint without the text tower that it needs, expected another schedule; "
            "eval.compare --text-tower runs this one"
        )
    return require_tower(schedule, config)


def usable_schedules(config: Any) -> list[str]:
    """Returns the names of SCHEDULES that a model of this config runs without further inputs."""
    has_tower = missing_tower(config) is None
    return [
        name for name, kind in SCHEDULES.items() if not kind.reads_relevance and (has_tower or not kind.reads_tower)
    ]
