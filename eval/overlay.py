"""Live visual tokens drawn over the image that the model saw: one small picture for each change."""

from __future__ import annotations

from itertools import groupby

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 112  # pixels of one picture
GAP, LABEL = 6, 16  # pixels between two pictures, and of the line under each
_FADED = 0.8  # share of _SHADE over a patch whose token is not live
_INK, _PAPER, _SHADE = (40, 40, 40), (255, 255, 255), (70, 72, 86)


def draw_overlay(picture: Image.Image, live: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Returns a strip of pictures, from the first layer to the last; layers with the same live tokens share one.

    Args:
        picture: the image as the model saw it.
        live: (layers, tokens) bool, the live visual tokens of this image in each layer, row by row.
        grid: rows and columns of its patches.
    """
    runs = live_runs(live)
    strip = Image.new("RGB", (len(runs) * (SIDE + GAP) - GAP, SIDE + LABEL), _PAPER)
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=11)
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    faded = Image.blend(small, Image.new("RGB", small.size, _SHADE), _FADED)
    for number, (first, last, tokens) in enumerate(runs):
        left = number * (SIDE + GAP)
        mask = Image.fromarray(tokens.reshape(grid).to(torch.uint8).mul(255).numpy())
        strip.paste(Image.composite(small, faded, mask.resize(small.size, Image.Resampling.NEAREST)), (left, 0))
        draw.rectangle((left, 0, left + SIDE - 1, SIDE - 1), outline=(200, 200, 200))
        draw.text((left, SIDE + 2), label(first, last, int(tokens.sum())), fill=_INK, font=font)
    return strip


def live_runs(live: Tensor) -> list[tuple[int, int, Tensor]]:
    """Returns (first layer, last layer, live tokens) of each run of layers with the same live tokens."""
    runs = []
    for _, members in groupby(range(len(live)), key=lambda layer: live[layer].tolist()):
        layers = list(members)
        runs.append((layers[0], layers[-1], live[layers[0]].cpu()))
    return runs


def label(first: int, last: int, count: int) -> str:
    """Returns what stands under a picture: its layers, and how many tokens are live there."""
    layers = f"layer {first}" if first == last else f"layers {first}-{last}"
    return f"{layers}: {count}"
