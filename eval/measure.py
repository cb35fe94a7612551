"""Time and memory: of calls side by side, and of prefill and decoding under several schedules on one model."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from models import FusedAutoModel
from models.schedules import Schedule

STEPS = 16  # decode steps that `speeds` times
REPEATS = 5
MEMORY_NOTE = (
    "Peak memory is what one call adds; on a CPU it is the resident set of one fresh process, good to a fifth or so."
)
_M_MMAP_THRESHOLD = -3  # glibc's mallopt
Calls = Mapping[str, Callable[[], object]]
Schedules = Mapping[str, Schedule | None]  # None: the trained plan


def device() -> torch.device:
    """Returns the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """Returns the precision that models run in where nothing else is asked for: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def default_batch() -> int:
    """Returns how many questions a forward pass has where nothing else is asked for."""
    return 16 if torch.cuda.is_available() else 256


def in_turns(names: Iterable[str], repeats: int) -> Iterator[tuple[str, bool]]:
    """Yields each name once a round, and whether the round counts: the first, which warms up, does not.

    What disturbs the machine then disturbs all names alike.
    """
    rounds = [(name, number > 0) for number in range(repeats + 1) for name in names]
    with tqdm(rounds, unit="run", leave=False) as bar:
        for name, counts in bar:
            bar.set_description(name)
            yield name, counts


def time_side_by_side(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Returns seconds of each call, `repeats` times each in turns, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, counts in in_turns(calls, repeats):
        spent = seconds_of(calls[name])
        if counts:
            seconds[name].append(spent)
    return seconds


def seconds_of(call: Callable[[], object]) -> float:
    """Returns how long a call takes, up to its last kernel; what ran before it does not count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def added_memory(calls: Calls, make: Callable[..., Calls], *given: object) -> dict[str, int]:
    """Returns the bytes that each call adds at its peak.

    On a CPU the calls are made again by `make(*given)`, a module's function, in a fresh process, where nothing else was
    ever allocated; what `make` allocates does not count.
    """
    if not torch.cuda.is_available():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_added_on_cpu, make, *given).result()
    added, devices = {}, range(torch.cuda.device_count())  # a model may be spread over several
    for name, call in calls.items():
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        before = sum(map(torch.cuda.memory_allocated, devices))
        call()
        added[name] = sum(map(torch.cuda.max_memory_allocated, devices)) - before
    return added


def _added_on_cpu(make: Callable[..., Calls], *given: object) -> dict[str, int]:
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # freed memory returns to the system, not to the next call
    added = {}
    for name, call in make(*given).items():
        call()  # warm-up: one-time allocations do not count
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts anew from here
        before = _status("VmRSS")
        call()
        added[name] = _status("VmHWM") - before
    return added


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


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
            step = {"input_ids": token, "attention_mask": mask, "position_ids": places, "past_key_values": cache}
            token = model(**step, use_cache=True).logits[:, -1:].argmax(-1)


def times(
    model: Any, inputs: Mapping[str, Tensor], schedules: Schedules, *, steps: int, repeats: int
) -> dict[str, list[tuple[float, float]]]:
    """Returns seconds of prefill and of `steps` decode steps under each schedule, `repeats` times each, in turns."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in schedules}
    for name, counts in in_turns(schedules, repeats):
        start = partial(prefill, model, inputs, schedules[name])
        spent = seconds_of(start), seconds_of(partial(decode, model, inputs, start(), steps))
        if counts:
            seconds[name].append(spent)
    return seconds


def run(model: Any, inputs: Mapping[str, Tensor], schedule: Schedule | None, steps: int) -> None:
    """Runs prefill and `steps` decode steps under a schedule."""
    decode(model, inputs, prefill(model, inputs, schedule), steps)


def runs(model: Any, inputs: Mapping[str, Tensor], schedules: Schedules, steps: int) -> Calls:
    """Returns `run` under each schedule."""
    return {name: partial(run, model, inputs, schedule, steps) for name, schedule in schedules.items()}


def _loaded_runs(weights: Path, precision: torch.dtype, attention: Any, *given: Any) -> Calls:
    model = FusedAutoModel.from_pretrained(weights, dtype=precision, attn_implementation=attention)
    return runs(model.eval(), *given)


def speeds(
    model: Any, weights: Path, inputs: Mapping[str, Tensor], schedules: Schedules
) -> dict[str, dict[str, float]]:
    """Returns what each schedule takes on one batch of prompts, which is on the model's device.

    That is `prefill_seconds` (of one prompt: the batch's median over its size), `decode_tokens_per_second`,
    `peak_bytes` that prefill and decoding add to what was there before, and `cache_bytes` of one prompt. On a CPU the
    memory is measured in a fresh process, which loads `weights` again.
    """
    count = len(inputs["input_ids"])
    measured = times(model, inputs, schedules, steps=STEPS, repeats=REPEATS)
    calls, given = runs(model, inputs, schedules, STEPS), (dict(inputs), dict(schedules), STEPS)
    peaks = added_memory(calls, _loaded_runs, weights, model.dtype, model.config._attn_implementation, *given)
    found = {}
    for name, schedule in schedules.items():
        first, following = (statistics.median(seconds) for seconds in zip(*measured[name], strict=True))
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
