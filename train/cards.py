"""GPUs by name: their memory, and the peak of their matrix products in bf16 (fp16 where they have no bf16), dense."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import torch

from recipes.errors import RecipeError

# Source: the data sheets of NVIDIA and AMD. The first name that stands in a device's as whole words counts, so
# `H100 PCIe` is before `H100`.
_CARDS: Final = {  # name: (GB, TFLOP/s)
    "B200": (180, 2250.0),
    "H200": (141, 989.0),
    "H100 PCIe": (80, 756.0),
    "H100": (80, 989.0),
    "MI300X": (192, 1307.0),
    "A100-SXM4-40GB": (40, 312.0),
    "A100": (80, 312.0),
    "L40S": (48, 362.0),
    "L40": (48, 181.0),
    "L4": (24, 121.0),
    "A40": (48, 150.0),
    "A10": (24, 125.0),
    "RTX 4090": (24, 165.0),
    "RTX 3090": (24, 71.0),
    "V100": (32, 125.0),
    "T4": (16, 65.0),
}
_OTHER: Final = r"(?! (?:Ti|D|Laptop)\b)"  # words after a name that make it another card's
_WANTED: Final = re.compile(r"(?:(\d+)x)?(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """GPUs of one kind; `peak` is FLOP/s of one, None where it is not known."""

    count: int
    gigabytes: float
    peak: float | None


def parse_card(text: str, *, count: int) -> Card:
    """Returns what `--gpu` names: `24` (GB), `A100`, or `8xH100`; `count` is the number where none is given.

    Raises:
        RecipeError: a card that is not in the table.
    """
    found = _WANTED.fullmatch(text.strip())
    number, name = found.groups() if found else (None, "")
    count = int(number) if number else count
    if count > 0 and re.fullmatch(r"\d+(\.\d+)?", name) and float(name) > 0:
        return Card(count, float(name), None)
    for known, (gigabytes, peak) in _CARDS.items():
        if count > 0 and known.casefold() == name.casefold():
            return Card(count, gigabytes, peak * 1e12)
    raise RecipeError(
        f"--gpu: got '{text}', expected GB such as 24, or one of {', '.join(_CARDS)}; 8x before it is eight"
    )


def peak_here() -> float | None:
    """Returns the FLOP/s of this process' GPU at its peak; None where there is none, or none that is known."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    names = (name for name in _CARDS if re.search(rf"\b{name}\b{_OTHER}", device))
    return next((_CARDS[name][1] * 1e12 for name in names), None)
