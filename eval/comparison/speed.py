"""Prefill and decoding under several schedules, timed side by side on one model, with the memory that they take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval import measure
from models import FusedAutoModel
from models.schedules import Schedule

STEPS = 16  # decode steps that `speeds` times
REPEATS = 5


def prefill(model: Any, inputs: Mapping[str, Tensor], schedule: Schedule | None) -> Any:
    """Runs the prompt under a schedule; returns the cache, and leaves the model as it was."""
    model.schedule = schedule
    with torch.inference_mode():
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    model.schedule = None
    return cache


def decode(model: Any, inputs: Mapping[str, Tensor], cache: Any, steps: int) -> None:
    """Runs `steps` steps of one token after a prefill of `inputs`."""
    ids = inputs["input_ids"]
    token, mask = ids[:, -1:], inputs.get("attention_mask", torch.ones_like(ids))
    with torch.inference_mode():
        for _ in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            places = mask.sum(dim=1, keepdim=True) - 1  # families with M-RoPE cannot count them from a mask
            output = model(
                input_ids=token, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
            )
            token = output.logits[:, -1:].argmax(-1)


def times(
    model: Any, inputs: Mapping[str, Tensor], schedules: Mapping[str, Schedule | None], *, steps: int, repeats: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Returns seconds of prefill and of `steps` decode steps under each schedule, `repeats` times each.

    All in turns, after one warm-up round, so that what disturbs the machine disturbs them alike.
    """
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in schedules}
    rounds = [(number, name) for number in range(repeats + 1) for name in schedules]
    with tqdm(rounds, unit="run", leave=False) as bar:
        for number, name in bar:
            bar.set_description(f"speed, round {number} of {repeats}, {name}")
            schedule = schedules[name]
            start = partial(prefill, model, inputs, schedule)
            first = measure.seconds_of(start)
            following = measure.seconds_of(partial(decode, model, inputs, start(), steps))
            if number > 0:
                seconds[name][0].append(first)
                seconds[name][1].append(following)
    return seconds


def speeds(
    model: Any, weights: Path, inputs: Mapping[str, Tensor], schedules: Mapping[str, Schedule | None]
) -> dict[str, dict[str, float]]:
    """Returns what each schedule takes on one batch of prompts.

    Args:
        model: the model, ready.
        weights: its folder: on a CPU the memory is measured in a fresh process, which loads it again.
        inputs: the prompts, on the model's device.
        schedules: by name; None is the trained plan.

    Returns:
        For each name `prefill_seconds` (of one prompt: the batch's median over its size), `decode_tokens_per_second`,
        `peak_bytes` that prefill and decoding add to what was there before, and `cache_bytes` of one prompt.
    """
    count = len(inputs["input_ids"])
    measured = times(model, inputs, schedules, steps=STEPS, repeats=REPEATS)
    peaks = _peaks(model, weights, inputs, schedules)
    found = {}
    for name, schedule in schedules.items():
        first, following = (statistics.median(seconds) for seconds in measured[name])
        found[name] = {
            "prefill_seconds": first / count,
            "decode_tokens_per_second": count * STEPS / following,
            "peak_bytes": peaks[name],
            "cache_bytes": cache_bytes(prefill(model, inputs, schedule)) / count,
        }
    return found


def cache_bytes(cache: Any) -> int:
    """Returns the bytes of keys and values that a cache holds, padding too."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)


def _peaks(
    model: Any, weights: Path, inputs: Mapping[str, Tensor], schedules: Mapping[str, Schedule | None]
) -> dict[str, int]:
    if torch.cuda.is_available():  # in this process, on this very model
        return measure.added_memory_each(_runs, model, inputs, schedules)
    return measure.added_memory_each(_loaded_runs, weights, model.dtype, dict(inputs), dict(schedules))


def _runs(
    model: Any, inputs: Mapping[str, Tensor], schedules: Mapping[str, Schedule | None]
) -> dict[str, Callable[[], None]]:
    def run(schedule: Schedule | None) -> None:
        decode(model, inputs, prefill(model, inputs, schedule), STEPS)

    return {name: partial(run, schedule) for name, schedule in schedules.items()}


def _loaded_runs(
    weights: Path, dtype: torch.dtype, inputs: Mapping[str, Tensor], schedules: Mapping[str, Schedule | None]
) -> dict[str, Callable[[], None]]:
    model = FusedAutoModel.from_pretrained(weights, dtype=dtype).eval()
    return _runs(model, inputs, schedules)
