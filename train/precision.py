"""The number type that a run computes in."""

from __future__ import annotations

from typing import Final

import torch

from recipes.schema import TrainSection

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(train: TrainSection) -> str:
    """Returns bf16, fp16 or fp32; `auto` is bf16 where the hardware multiplies it, as emulation is slow."""
    if train.precision != "auto":
        return train.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    abilities = torch.cpu.get_capabilities()
    return "bf16" if abilities.get("amx_bf16") or abilities.get("avx512_bf16") else "fp32"


def resolve_dtype(train: TrainSection) -> torch.dtype:
    """Returns the torch type of `resolve_precision`."""
    return DTYPES[resolve_precision(train)]
