"""The config of a LLaVA with a stage plan."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig

from .plan import StagePlan


class FusedLlavaConfig(LlavaConfig):
    """Everything LlavaConfig takes, and `stages`.

    Attributes:
        stages: None for dense LLaVA, or the fields of StagePlan; saved in config.json.

    Raises:
        ValueError: the plan is wrong, or names a layer that the decoder does not have.
    """

    model_type = "fused_llava"

    stages: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.stages is not None:
            plan = StagePlan.from_dict(self.stages)
            plan.check(self.text_config.num_hidden_layers)
            self.stages = plan.to_dict()
