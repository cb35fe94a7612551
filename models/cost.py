"""What a schedule costs: visual token-layers, decoder FLOPs, vision's share of attention and KV-cache bytes.

FLOPs are counted as multiplications and additions (2 per multiply-add), as torch.utils.flop_counter does: the
layer's projections, its MLP, the two attention products over the full rectangle of queries and keys, as a masked kernel
computes them, and a plan's learned scorer. Norms, rotary, softmax, embeddings, the head and the vision tower are left
out; so are the rows of attention by which a plan chooses tokens, about one token more in a layer for each cut.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .stage_plan import SCORER_WIDTH, StagePlan


@dataclass(frozen=True)
class Cost:
    """The decoder's cost of one forward pass over one sample."""

    visual_token_layers: int  # visual tokens that layers ran on, summed over layers
    token_layers: int  # all tokens likewise
    flops: int  # 2 per multiply-add
    vision_attention: float  # share in 0..1 of the query-key pairs that have a visual token on either side
    cache_bytes: int  # keys and values of all layers


def plan_cost(text_config: Any, plan: StagePlan | None, *, visual: int, text: int, bytes_per_value: int = 2) -> Cost:
    """Returns the cost of a sample of `visual` and `text` tokens under a plan (None: dense), in closed form.

    `text_config` is the decoder's Hugging Face config; `bytes_per_value` is of the KV cache, 2 for bfloat16.
    """
    depth = text_config.num_hidden_layers
    counts = [visual] * depth if plan is None else plan.visual_counts(visual, depth)
    kv = [plan is not None and plan.update == "kv"] * depth
    cost = live_cost(text_config, counts, text=text, kv=kv, value=bytes_per_value)
    if plan is None or plan.select != "learned":
        return cost
    return replace(cost, flops=cost.flops + _scorer_flops(text_config.hidden_size, visual + text))


def _scorer_flops(width: int, tokens: int) -> int:
    """Returns the FLOPs of a TokenScorer: for LLaVA-1.5-7B and 832 tokens 4.5e8, 0.01 % of llava_fast's decoder."""
    return 2 * tokens * (width * (SCORER_WIDTH + 2) + SCORER_WIDTH) + 2 * width * SCORER_WIDTH


def search_cost(text_config: Any, update: str, *, visual: int, text: int) -> Cost:
    """Returns the cost of a sample under gates (see Gated): each layer with all visual tokens, and with text alone."""
    depth = text_config.num_hidden_layers
    seeing = live_cost(text_config, [visual] * depth, text=text, kv=[update == "kv"] * depth)
    text_only = live_cost(text_config, [0] * depth, text=text, kv=[False] * depth)
    return replace(
        seeing,
        token_layers=seeing.token_layers + text_only.token_layers,
        flops=seeing.flops + text_only.flops,
        cache_bytes=0,
    )


def spread_flops(text_config: Any, plan: StagePlan | None, *, visual: int, text: int) -> int:
    """Returns what measuring AttentionSpread adds to a forward pass: the keys of layers with vision, once more."""
    depth, width = text_config.num_hidden_layers, text_config.hidden_size
    counts = [visual] * depth if plan is None else plan.visual_counts(visual, depth)
    head = getattr(text_config, "head_dim", None) or width // text_config.num_attention_heads
    return 2 * sum(count + text for count in counts if count) * width * text_config.num_key_value_heads * head


def training_flops(
    flops: Mapping[str, float], weights: Mapping[str, float], teachers: Mapping[str, str], *, passes: float
) -> float:
    """Returns the FLOPs of training on a sample under one of several plans, the mean over steps.

    Args:
        flops: of a forward pass under each plan.
        weights: how often each plan is drawn, in any unit.
        teachers: of each plan that is distilled, the plan that teaches it, whose forward pass each step takes too.
        passes: of forward and backward together, in forward passes.
    """
    total = 0.0
    for name, weight in weights.items():
        teacher = flops[teachers[name]] if name in teachers else 0
        total += weight * (passes * flops[name] + teacher)
    return total / sum(weights.values())


def live_cost(text_config: Any, counts: Sequence[int], *, text: int, kv: Sequence[bool], value: int = 2) -> Cost:
    """Returns the cost of a sample whose layer l ran on `counts[l]` visual and on `text` text tokens.

    `text_config` is the decoder's Hugging Face config. `kv[l]`: visual tokens only gave keys and values to layer l.
    `value`: bytes of one cached number.
    """
    width, heads = text_config.hidden_size, text_config.num_attention_heads
    head = getattr(text_config, "head_dim", None) or width // heads
    queries, keys = heads * head, text_config.num_key_value_heads * head
    tokens = sum(counts) + text * len(counts)
    # tokens with a query and an MLP
    running = [text if only_keys else count + text for count, only_keys in zip(counts, kv, strict=True)]
    pairs = sum(asking * (count + text) for asking, count in zip(running, counts, strict=True))
    projections = sum(running) * 2 * width * queries + tokens * 2 * width * keys
    mlp = sum(running) * 3 * width * text_config.intermediate_size
    flops = 2 * (projections + mlp + 2 * pairs * queries)
    of_vision = 1 - len(counts) * text * text / pairs if pairs else 0.0
    return Cost(sum(counts), tokens, flops, of_vision, 2 * keys * value * tokens)
