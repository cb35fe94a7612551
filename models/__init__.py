"""The staged decoder and the VLMs around it.

Letters in comments and docstrings: B batch, S sequence, L live rows (the largest count in the batch), R rows of visual
tokens, Q instruction tokens, D width, H query heads, G key/value heads, d head width, K keys, C columns (keys of this
call), V visual columns. This package imports nothing of the other folders.
"""

from typing import Any

from . import families
from .auto import FusedAutoModel
from .decoder import DecoderOutput, run_decoder
from .families import FAMILIES, UnsupportedModelError
from .stage_plan import StagePlan

FusedLlavaConfig: Any = FAMILIES["llava"].config_class
FusedLlavaForConditionalGeneration: Any = FAMILIES["llava"].model_class

__all__ = [
    "FAMILIES",
    "DecoderOutput",
    "FusedAutoModel",
    "FusedLlavaConfig",
    "FusedLlavaForConditionalGeneration",
    "StagePlan",
    "UnsupportedModelError",
    "families",
    "run_decoder",
]
