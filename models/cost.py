"""What a schedule costs: visual token-layers, decoder FLOPs, vision's share of attention and KV-cache bytes.

Two sources, one accounting: a static schedule's counts in closed form, or the `live` sets of a real run.
FLOPs are counted as multiplications and additions (2 per multiply-add), as torch.utils.flop_counter does: the
layer's projections, its MLP, and the two attention products over the full rectangle of queries and keys, as a
masked kernel computes them. Norms, rotary, softmax, embeddings, the head and the vision tower are left out.

Source: ours. VisiPruner's appendix M counts multiply-adds (half), of visual tokens alone; `visual_macs` does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .stage_plan import StagePlan


@dataclass(frozen=True)
class Cost:
    """The decoder's cost of one forward pass over one sample.

    Attributes:
        visual_token_layers: visual tokens that layers ran on, summed over layers.
        token_layers: all tokens that layers ran on, summed over layers.
        flops: decoder FLOPs, 2 per multiply-add.
        vision_attention: share in 0..1 of the query-key pairs that have a visual token on either side.
        cache_bytes: keys and values of all layers.
    """

    visual_token_layers: int
    token_layers: int
    flops: int
    vision_attention: float
    cache_bytes: int


def plan_cost(text_config: Any, plan: StagePlan | None, *, visual: int, text: int, bytes_per_value: int = 2) -> Cost:
    """Returns the cost of a sample of `visual` and `text` tokens under a plan (None: dense), in closed form.

    Args:
        text_config: the decoder's Hugging Face config.
        plan: the stage plan, or None.
        visual: visual tokens of the sample.
        text: text tokens of the sample.
        bytes_per_value: of the KV cache; 2 for bfloat16.
    """
    depth = text_config.num_hidden_layers
    counts = [visual] * depth if plan is None else plan.visual_counts(visual, depth)
    return live_cost(text_config, counts, text=text, kv=plan is not None and plan.update == "kv", value=bytes_per_value)


def live_cost(text_config: Any, counts: Sequence[int], *, text: int, kv: bool = False, value: int = 2) -> Cost:
    """Returns the cost of a sample whose layer l ran on `counts[l]` visual and on `text` text tokens.

    Args:
        text_config: the decoder's Hugging Face config.
        counts: live visual tokens of each layer.
        text: text tokens of the sample.
        kv: visual tokens only lent keys and values.
        value: bytes of one cached number.
    """
    flops = sum(layer_flops(text_config, count, text, kv) for count in counts)
    pairs = sum((text if kv else count + text) * (count + text) for count in counts)
    text_pairs = len(counts) * text * text
    head = head_width(text_config) * text_config.num_key_value_heads
    tokens = sum(counts) + text * len(counts)
    return Cost(sum(counts), tokens, flops, 1 - text_pairs / pairs if pairs else 0.0, 2 * head * value * tokens)


def layer_flops(text_config: Any, visual: int, text: int, kv: bool) -> int:
    """Returns the FLOPs of one layer on `visual` and `text` live tokens."""
    width, heads = text_config.hidden_size, text_config.num_attention_heads
    head = head_width(text_config)
    queries, keys = heads * head, text_config.num_key_value_heads * head
    running = text if kv else visual + text
    projections = running * 2 * width * queries + (visual + text) * 2 * width * keys
    mlp = running * 3 * width * text_config.intermediate_size
    attention = 2 * running * (visual + text) * queries
    return 2 * (projections + mlp + attention)


def visual_macs(text_config: Any, counts: Sequence[int]) -> int:
    """Returns multiply-adds as the VisiPruner paper counts them: 4 n d^2 + 2 n^2 d + 3 n d m, visual tokens alone.

    Args:
        text_config: the decoder's Hugging Face config.
        counts: live visual tokens of each layer.

    Source: arXiv 2510.17205, appendix M.
    """
    width, mlp = text_config.hidden_size, text_config.intermediate_size
    return sum(4 * n * width**2 + 2 * n * n * width + 3 * n * width * mlp for n in counts)


def head_width(text_config: Any) -> int:
    """Returns the width of one attention head."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
