"""Scenes of the built-in set `scenes` and their rendering: 96 x 96 pixels, a grid of three by three cells.

Shapes are defined by integer pixel distances and characters by the bitmaps below, so that a scene has the same pixels
under any version of Pillow, without a font.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

from PIL import Image

Colour = tuple[int, int, int]

GRID: Final = 3  # cells in a row and in a column
CELL: Final = 32  # pixels of a cell's side
SIDE: Final = GRID * CELL
RADII: Final = {"small": 7, "large": 12}
COLOURS: Final[dict[str, Colour]] = {
    "red": (215, 45, 45),
    "yellow": (230, 195, 40),
    "green": (45, 155, 65),
    "blue": (50, 95, 210),
    "purple": (150, 60, 180),
    "gray": (125, 125, 125),
}
SHAPES: Final = ("circle", "square", "triangle", "diamond", "cross", "ring")
INK: Final = (30, 30, 30)  # of words and numbers
_PIXEL: Final = 2  # pixels of the picture for one of a bitmap
_GAP: Final = 1  # columns of a bitmap between two characters, and rows between a word and its number
_BITMAPS: Final = {
    "A": ".##. #..# #..# #### #..# #..# #..#",
    "B": "###. #..# #..# ###. #..# #..# ###.",
    "C": ".##. #..# #... #... #... #..# .##.",
    "D": "###. #..# #..# #..# #..# #..# ###.",
    "G": ".### #... #... #.## #..# #..# .###",
    "L": "#... #... #... #... #... #... ####",
    "P": "###. #..# #..# ###. #... #... #...",
    "R": "###. #..# #..# ###. ##.. #.#. #..#",
    "T": "### .#. .#. .#. .#. .#. .#.",
    "0": ".##. #..# #..# #..# #..# #..# .##.",
    "1": ".#. ##. .#. .#. .#. .#. ###",
    "2": ".##. #..# ...# ..#. .#.. #... ####",
    "3": "###. ...# ...# .##. ...# ...# ###.",
    "4": "..#. .##. #.#. #.#. #### ..#. ..#.",
    "5": "#### #... #... ###. ...# ...# ###.",
    "6": ".##. #... #... ###. #..# #..# .##.",
    "7": "#### ...# ...# ..#. ..#. .#.. .#..",
    "8": ".##. #..# #..# .##. #..# #..# .##.",
    "9": ".##. #..# #..# .### ...# ...# .##.",
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its attributes, its cell, and the pixel at its centre. `paint` is a shade of its colour."""

    shape: str
    colour: str
    size: str
    column: int
    row: int
    x: int
    y: int
    paint: Colour


@dataclass(frozen=True, slots=True)
class Sign:
    """A word with a number under it, in a cell; x and y are the pixel at their centre."""

    word: str
    number: str
    column: int
    row: int
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects and signs, at most one in each cell, on a light background."""

    background: Colour
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]


def draw(scene: Scene) -> Image.Image:
    """Returns the scene's picture, RGB, SIDE x SIDE."""
    image = Image.new("RGB", (SIDE, SIDE), scene.background)
    for thing in scene.things:
        radius = RADII[thing.size]
        image.paste(thing.paint, (thing.x - radius, thing.y - radius), _shape_mask(thing.shape, radius))
    for sign in scene.signs:
        mask = _sign_mask(sign.word.upper(), sign.number)
        image.paste(INK, (sign.x - mask.width // 2, sign.y - mask.height // 2), mask)
    return image


def montage(pictures: list[Image.Image], columns: int, zoom: int = 2) -> Image.Image:
    """Returns pictures of scenes side by side, enlarged, with a border between them."""
    step = SIDE * zoom + zoom * 2
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * step, rows * step), (60, 60, 60))
    for place, picture in enumerate(pictures):
        enlarged = picture.resize((SIDE * zoom, SIDE * zoom), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (place % columns * step + zoom, place // columns * step + zoom))
    return sheet


@cache
def _shape_mask(shape: str, radius: int) -> Image.Image:
    span = range(-radius, radius + 1)
    return _mask([[_covers(shape, x, y, radius) for x in span] for y in span])


def _covers(shape: str, x: int, y: int, radius: int) -> bool:
    """Returns whether a shape covers the pixel at (x, y) from its centre; y points down."""
    distance = x * x + y * y
    return {
        "circle": distance < radius * radius,
        "square": 8 * max(abs(x), abs(y)) <= 7 * radius,
        "triangle": 2 * abs(x) <= y + radius and 8 * y <= 7 * radius,
        "diamond": abs(x) + abs(y) <= radius,
        "cross": 3 * min(abs(x), abs(y)) <= radius,
        "ring": radius * radius <= 4 * distance < 4 * radius * radius,
    }[shape]


@cache
def _sign_mask(word: str, number: str) -> Image.Image:
    lines = [_line(word), _line(number)]
    width = max(len(line[0]) for line in lines)
    rows: list[list[bool]] = []
    for line in lines:
        left = (width - len(line[0])) // 2
        rows += [[False] * left + row + [False] * (width - left - len(row)) for row in line]
        rows += [[False] * width] * _GAP
    small = _mask(rows[:-_GAP])
    return small.resize((small.width * _PIXEL, small.height * _PIXEL), Image.Resampling.NEAREST)


def _line(text: str) -> list[list[bool]]:
    """Returns the rows of a line of text, True where there is ink."""
    characters = [_BITMAPS[character].split() for character in text]
    return [[dot == "#" for dot in ("." * _GAP).join(parts)] for parts in zip(*characters, strict=True)]


def _mask(rows: list[list[bool]]) -> Image.Image:
    size = (len(rows[0]), len(rows))
    return Image.frombytes("L", size, bytes(255 * inside for row in rows for inside in row))
