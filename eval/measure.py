"""What the benchmarks share: random models of LLaVA-1.5-7B's proportions, one sample for them, time and memory."""

from __future__ import annotations

import argparse
import ctypes
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
    Qwen3VLConfig,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

from models import FusedAutoModel, StagePlan

IMAGE_TOKEN, VOCABULARY = 8000, 8192
BENCH_FAMILIES = ("llava", "qwen3_vl", "internvl")
_M_MMAP_THRESHOLD = -3  # glibc's mallopt
WIDE = 1024  # decoders from this width on have heads of 128


@dataclass(frozen=True)
class Shape:
    """The size of one benchmark: layers x width, visual and text tokens of the sample."""

    layers: int
    width: int
    visual: int
    text: int

    def __str__(self) -> str:
        return f"{self.layers} layers x {self.width}, {self.visual} visual + {self.text} text tokens"


def positive(text: str) -> int:
    """Returns a whole number above 0, for a command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return int(text)


def device() -> torch.device:
    """Returns the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def setting(rows: str = "batch 1, sdpa, ") -> str:
    """Returns where and how the figures of this process are measured, in words; `rows` say on what."""
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{torch.get_num_threads()} threads, {platform.machine()}"
    return f"{rows}{machine}, torch {torch.__version__}"


def text_config(shape: Shape) -> LlamaConfig:
    """Returns a decoder of LLaVA-1.5-7B's proportions; its heads are as wide as there from a width of 1024 on."""
    heads = max(1, shape.width // (128 if shape.width >= WIDE else 64))
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=int(shape.width * 2.6875),  # 11008 / 4096
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


def family_config(family: str, shape: Shape) -> Any:
    """Returns the config of Hugging Face's model around the shape's decoder, with a tiny vision tower.

    Args:
        family: one of BENCH_FAMILIES.
        shape: of the benchmark; `visual` is a square number.
    """
    decoder, side = text_config(shape).to_dict(), int(shape.visual**0.5)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    if family == "llava":
        vision = CLIPVisionConfig(**tower, image_size=side * 2, patch_size=2)
        fields = {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1}
        return LlavaConfig(text_config=decoder, vision_config=vision, **fields)
    if family == "internvl":
        vision = {**tower, "image_size": [side * 4, side * 4], "patch_size": [2, 2]}
        return InternVLConfig(text_config=decoder, vision_config=vision, image_token_id=IMAGE_TOKEN)
    half = text_config(shape).head_dim // 2
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [half - 2 * (half // 3), *[half // 3] * 2]}
    known = Qwen3VLTextConfig().to_dict().keys() - {"rope_parameters", "model_type"}
    decoder = {name: value for name, value in decoder.items() if name in known} | {"rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 1, "patch_size": 2}
    vision |= {"out_hidden_size": shape.width, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": IMAGE_TOKEN + 1, "vision_start_token_id": IMAGE_TOKEN + 2}
    return Qwen3VLConfig(text_config=decoder, vision_config=vision, **ids)


def build(
    shape: Shape, *, plan: StagePlan | None = None, hugging_face: bool = False, family: str = "llava"
) -> PreTrainedModel:
    """Returns a VLM whose random weights depend on shape and family alone."""
    config = family_config(family, shape)
    torch.manual_seed(0)
    if hugging_face:
        return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    stages = None if plan is None else plan.to_dict()
    return FusedAutoModel.from_config(config, stages=stages, attn_implementation="sdpa")


def make_batch(shape: Shape, *, text_only: bool = False, family: str = "llava") -> dict[str, Tensor]:
    """Returns one sample: a few tokens, the image, a question, and as labels an answer of half the text."""
    random = torch.Generator().manual_seed(1)
    words = torch.randint(0, IMAGE_TOKEN, (1, shape.text), generator=random)
    labels = words.where(torch.arange(shape.text) >= shape.text // 2, -100)
    if text_only:
        return {"input_ids": words, "labels": labels}
    image = torch.full((1, shape.visual), IMAGE_TOKEN)
    ids = torch.cat([words[:, :8], image, words[:, 8:]], dim=1)
    batch = {"input_ids": ids, "labels": torch.cat([labels[:, :8], torch.full_like(image, -100), labels[:, 8:]], dim=1)}
    side = int(shape.visual**0.5) * 2
    if family == "qwen3_vl":
        grid = torch.tensor([[1, side, side]])
        patches = torch.randn(side * side, 3 * 2 * 2 * 2, generator=random)
        return batch | {
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        }
    pixels = side * 2 if family == "internvl" else side
    return batch | {"pixel_values": torch.randn(1, 3, pixels, pixels, generator=random)}


def time_side_by_side(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Returns seconds of each call, `repeats` times each in turns, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(repeats + 1), desc="rounds", leave=False):
        for name, call in calls.items():
            spent = seconds_of(call)
            if number > 0:
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


def added_memory(prepare: Callable[..., Callable[[], object]], *given: object) -> int:
    """Returns the bytes that a call adds at its peak: on the GPU here, on the CPU in a fresh process.

    Args:
        prepare: a module's function that returns the call; what it holds by then does not count.
        given: the function's arguments.
    """
    if torch.cuda.is_available():
        return _added_on_gpu(prepare(*given))
    return _in_fresh_process(_added_on_cpu, prepare, *given)


def added_memory_each(prepare: Callable[..., Mapping[str, Callable[[], object]]], *given: object) -> dict[str, int]:
    """Returns the bytes that each of several calls adds at its peak; as `added_memory`, all in one process.

    Args:
        prepare: a module's function that returns the calls by name; what it holds by then does not count.
        given: the function's arguments.
    """
    if torch.cuda.is_available():
        return {name: _added_on_gpu(call) for name, call in prepare(*given).items()}
    return _in_fresh_process(_each_on_cpu, prepare, *given)


def _in_fresh_process(call: Callable[..., Any], *given: object) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *given).result()


def _added_on_gpu(call: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _each_on_cpu(prepare: Callable[..., Mapping[str, Callable[[], object]]], *given: object) -> dict[str, int]:
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # so that what one call frees is not the next one's for free
    added = {}
    for name, call in prepare(*given).items():
        call()  # what the first call ever sets up is no part of its peak
        added[name] = _peak_on_cpu(call)
    return added


def _added_on_cpu(prepare: Callable[..., Callable[[], object]], *given: object) -> int:
    return _peak_on_cpu(prepare(*given))


def _peak_on_cpu(call: Callable[[], object]) -> int:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts anew from here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
