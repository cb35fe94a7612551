"""The config of a LLaVA with a stage plan."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

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


# `transformers serve` looks up here what it can load, by name, right after it has read the config. Classes registered
# with the Auto classes are not in it, and a release is not in the library.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(FusedLlavaConfig.model_type, "FusedLlavaForConditionalGeneration")
