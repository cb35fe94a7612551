"""The built-in set: easy-VQA (MIT), shapes of one colour on 64 x 64 images, shipped inside its package on PyPI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import easy_vqa as package

VERSION = "1.0"
NAMES = ("train", "test", "open", "short")
SHAPES = ("circle", "rectangle", "triangle")
_PREFIX = "easy_vqa:"
_SHORT = 3  # questions of a conversation in `short`


@dataclass(frozen=True)
class Question:
    """One test question. `kind` is the type of its answer: `yes/no`, `shape` or `colour`."""

    image: Path
    text: str
    answer: str
    kind: str


def is_built_in(file: str) -> bool:
    """Returns whether a recipe's file name refers to this set."""
    return file.startswith(_PREFIX) and file.removeprefix(_PREFIX) in NAMES


def name_of(file: str) -> str:
    """Returns what follows `easy_vqa:` in a recipe's file name."""
    return file.removeprefix(_PREFIX)


def image_folder(name: str) -> Path:
    """Returns the folder of the PNG files behind a name; they are named by image number."""
    return Path(package.__file__).parent / "data" / ("test" if name == "test" else "train") / "images"


def conversations(name: str) -> Iterator[dict[str, Any]]:
    """Yields LLaVA rows, one per image with all its questions: 4,000 for `train`, 1,000 for `test`.

    Two more names are variants of `train`. `open` leaves out the questions whose answer is yes or no: 3,816 images.
    `short` has three questions a row, because the text of a long row's earlier questions gives away later answers.
    """
    by_image: dict[int, list[tuple[str, str]]] = {}
    for text, answer, number in _questions("test" if name == "test" else "train"):
        if name != "open" or _kind(answer) != "yes/no":
            by_image.setdefault(number, []).append((text, answer))
    for number, pairs in by_image.items():
        size = _SHORT if name == "short" else len(pairs)
        for start in range(0, len(pairs), size):
            turns = []
            for place, (text, answer) in enumerate(pairs[start : start + size]):
                mark = "<image>\n" if place == 0 else ""
                turns += [{"from": "human", "value": mark + text}, {"from": "gpt", "value": answer}]
            yield {"id": f"easy_vqa_{name}_{number}_{start}", "image": f"{number}.png", "conversations": turns}


def questions(split: str) -> list[Question]:
    """Returns a split's questions in the package's order, one a prompt: 9,673 of test."""
    folder = image_folder(split)
    return [
        Question(folder / f"{number}.png", text, answer, _kind(answer)) for text, answer, number in _questions(split)
    ]


def words_only_answers() -> dict[str, str]:
    """Returns the most frequent training answer to each question text, the best guess without an image."""
    counts: dict[str, Counter[str]] = {}
    for text, answer, _ in _questions("train"):
        counts.setdefault(text, Counter())[answer] += 1
    return {text: count.most_common(1)[0][0] for text, count in counts.items()}


def _questions(split: str) -> Iterator[tuple[str, str, int]]:
    read = package.get_train_questions if split == "train" else package.get_test_questions
    return zip(*read(), strict=True)


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"
