"""The staged decoder and the LLaVA around it.

Letters in comments and docstrings: B batch, S sequence, L live rows, D width, H query heads, G key/value heads,
d head width, K keys, R rows of visual tokens. This package imports nothing of the other folders.
"""

from .configuration_fused_llava import FusedLlavaConfig
from .decoder import DecoderOutput, run_decoder
from .modeling_fused_llava import FusedLlavaForConditionalGeneration
from .plan import StagePlan

__all__ = [
    "DecoderOutput",
    "FusedLlavaConfig",
    "FusedLlavaForConditionalGeneration",
    "StagePlan",
    "run_decoder",
]
