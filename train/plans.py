"""Several stage plans in one training: which one each optimizer step runs under."""

from __future__ import annotations

import random
from collections.abc import Mapping

from models.schedules import Dense, Fused, Schedule
from recipes.schema import NamedPlan


class PlanDraw:
    """Draws a plan for each optimizer step, with the recipe's weights.

    The draw depends on seed and step alone, so it is the same on all ranks, in all forward passes of a step and in a
    resumed run.

    Args:
        plans: by name.
        seed: the recipe's.
    """

    def __init__(self, plans: Mapping[str, NamedPlan], seed: int) -> None:
        self.seed, self.names = seed, list(plans)
        self._weights = [plan.weight for plan in plans.values()]
        self._schedules: dict[str, Schedule] = {
            name: Dense() if plan.stages is None else Fused(plan.stages) for name, plan in plans.items()
        }

    def name_of(self, step: int) -> str:
        """Returns the name of the plan of a step, counted from 0."""
        return random.Random(f"{self.seed} {step}").choices(self.names, self._weights)[0]

    def schedule_of(self, step: int) -> Schedule:
        """Returns the plan of a step, counted from 0, as a schedule."""
        return self._schedules[self.name_of(step)]
