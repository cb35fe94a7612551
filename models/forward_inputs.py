"""The inputs of a fused model's forward: by name, and checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache as remembered
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import TransformersKwargs

from .cache import CACHE, require_own_cache

_UNUSED = ("tokenizer", "assistant_tokenizer")  # generate() hands them to every forward
_CACHE_NAMES = dict.fromkeys(("cache", "past_key_values"), CACHE)
_USED = {"num_items_in_batch", "output_attentions", "output_hidden_states", "position_ids"}


def named_inputs(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inputs of a model's forward by name; those that are None are left out.

    Raises:
        TypeError: a keyword that neither the family's forward nor transformers knows.
        ValueError: an input that a staged model cannot take.
    """
    names, known = _arguments_of(type(model).forward, type(model.model).forward)
    kwargs = {_CACHE_NAMES.get(name, name): value for name, value in kwargs.items() if name not in _UNUSED}
    for name in kwargs:
        if name not in known:
            raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument '{name}'")
        if name in names[: len(args)]:
            raise TypeError(f"{type(model).__name__}.forward() got multiple values for argument '{name}'")
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in ("output_attentions", "output_hidden_states"):
        if inputs.get(name, getattr(model.config, name, False)):
            raise ValueError(f"{name}: got True, expected False, because layers hold different tokens")
    for name in TransformersKwargs.__annotations__.keys() - _USED:
        if inputs.get(name) is not None and name not in names:
            raise ValueError(
                f"{name}: got a value, expected None: attention is causal, packed=True packs a padded batch, and no "
                "router is supported"
            )
    if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
        raise ValueError("input_ids, inputs_embeds: got both or neither, expected exactly one of the two")
    require_own_cache(inputs.get(CACHE))
    inputs = {name: value for name, value in inputs.items() if value is not None}
    _refuse_packed_positions(inputs)
    return inputs


def check_masks(inputs: Mapping[str, Any], prompt_length: int | None) -> None:
    """Raises ValueError for a mask that is not of this call's tokens, or of all tokens so far.

    `prompt_length` is that of the running generate(); None: there is none.
    """
    tokens = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]
    (samples, size), seen = tokens.shape[:2], seen_tokens(inputs)
    for name in ("attention_mask", "query_mask", "visual", "relevance"):
        found = inputs.get(name)
        if found is None:
            continue
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        rows, width = found.shape if isinstance(found, Tensor) and found.ndim == 2 else (-1, 0)
        fits = width == size or (width == seen + size and name != "query_mask")
        if name in ("visual", "relevance"):  # of the prompt, of which this call may be a part
            fits = fits or width == prompt_length or 0 < width <= seen
        if rows != samples or not fits:
            raise ValueError(f"{name}: got {shape}, expected a tensor {samples, seen + size}")


def seen_tokens(inputs: Mapping[str, Any]) -> int:
    """Returns the length of the sequence that the cache holds."""
    return 0 if (cache := inputs.get(CACHE)) is None else cache.get_seq_length()


def this_part(full: Tensor, seen: int, size: int) -> Tensor:
    """Returns (B, size), this call's columns of a tensor (B, S) of the whole prompt, 0 beyond it."""
    if full.shape[1] == size:
        return full
    return torch.nn.functional.pad(full, (0, max(0, seen + size - full.shape[1])))[:, seen : seen + size]


def _refuse_packed_positions(inputs: Mapping[str, Any]) -> None:
    """Raises ValueError for position ids of several samples in one row, which only a mask would keep apart."""
    given = inputs.get("position_ids")
    if given is None or "attention_mask" in inputs or CACHE in inputs or (given.ndim == 3 and len(given) < 4):
        return  # of M-RoPE's four rows the first counts the text; three are of images too, where they may fall
    text = given[0] if given.ndim == 3 else given
    if bool((text.diff(dim=-1) < 0).any()):
        raise ValueError(
            "position_ids: got a row that begins anew without an attention_mask, expected one sample a row; "
            "packed=True packs a padded batch"
        )


@remembered
def _arguments_of(forward: Callable[..., Any], inner: Callable[..., Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Returns the names of forward's positional arguments, and all keywords that it or the inner model's knows."""
    parameters = signature(forward).parameters
    names = [name for name, one in parameters.items() if one.kind is Parameter.POSITIONAL_OR_KEYWORD][1:]
    known = {*parameters, "use_cache", *signature(inner).parameters, *TransformersKwargs.__annotations__}
    return tuple(names), frozenset(known - {"self", "kwargs"})
