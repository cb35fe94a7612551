"""Several stage plans in one training: which one each optimizer step runs under, and what it learns from another."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from models.batch_facts import IGNORE_INDEX, next_labels
from models.schedules import Schedule, plan_schedule
from recipes.schema import Distill, NamedPlan


class PlanDraw:
    """Draws a plan for each optimizer step, with the recipe's weights.

    The draw depends on seed and step alone, so it is the same on all ranks, in all forward passes of a step and in a
    resumed run.

    Args:
        plans: by name.
        seed: the recipe's.
    """

    def __init__(self, plans: Mapping[str, NamedPlan], seed: int) -> None:
        self.seed, self.plans = seed, dict(plans)
        self._weights = [plan.weight for plan in plans.values()]

    def of_step(self, step: int) -> NamedPlan:
        """Returns the plan of a step, counted from 0."""
        return random.Random(f"{self.seed} {step}").choices(list(self.plans.values()), self._weights)[0]

    def schedule(self, name: str) -> Schedule:
        """Returns a plan as a schedule."""
        return plan_schedule(self.plans[name].stages)


def predicting(labels: Tensor) -> Tensor:
    """Returns (B, S) bool, the positions whose next token is labelled."""
    return next_labels(labels) != IGNORE_INDEX


def divergence(student: Tensor, teacher: Tensor, distill: Distill) -> Tensor:
    """Returns the weighted sum over rows of KL(teacher || student), of logits (R, vocabulary)."""
    learns, says = student.float().log_softmax(dim=-1), teacher.float().log_softmax(dim=-1)
    return distill.weight * torch.nn.functional.kl_div(learns, says, reduction="sum", log_target=True)
