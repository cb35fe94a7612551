"""The built-in set `scenes`: several objects and signs on 96 x 96 images, and six families of questions about them.

`python -m data.scenes` prints the size of the sets and the floors without an image, by family. The first use of a set
generates it in .cache/scenes or $SCENES_CACHE; the images are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock
from tqdm import tqdm

from data import easy_vqa
from data.rows import DataError
from data.scene_images import Scene, draw, montage
from data.scene_questions import FAMILIES, SceneQuestion, caption, generate

VERSION: Final = "2"  # change it with any row or pixel
ROWS: Final = {"train": 13_500, "test": 1_500, "compositional": 1_500}  # images, each with four questions
NAMES: Final = tuple(ROWS)
CAPTIONS: Final = "captions"  # the training images, with what each cell holds in place of questions
FILES: Final = (*NAMES, CAPTIONS)
_SET: Final = "scenes"
_DESCRIBE: Final = "describe the picture."
_RECORDS: Final = "records.jsonl"  # beside the images: the questions and the caption of each


@dataclass(frozen=True)
class Question(easy_vqa.Question):
    """One test question. `kind` is its family; `chance` is the accuracy of a random guess."""

    chance: float


def is_built_in(file: str) -> bool:
    """Returns whether a recipe's file name refers to this set."""
    return file in (_SET, *(f"{_SET}:{name}" for name in FILES))


def name_of(file: str) -> str:
    """Returns what follows `scenes:` in a recipe's file name; `scenes` alone is `train`."""
    return file.removeprefix(_SET).removeprefix(":") or "train"


def generate_rows(name: str, limit: int | None = None) -> Iterator[tuple[str, Scene, list[SceneQuestion]]]:
    """Yields file name, scene and questions of the first `limit` images of a set (None: all); nothing is cached."""
    for row in range(ROWS[name])[:limit]:
        yield f"{row:05}.png", *generate(f"{_SET}:{VERSION}:{name}", row, compositional=name == "compositional")


def image_folder(name: str) -> Path:
    """Returns the folder of a set's PNG files. The first call draws them; other processes wait for it.

    Raises:
        DataError: the folder cannot be written.
    """
    root = Path(os.environ.get("SCENES_CACHE") or Path(__file__).parents[1] / ".cache" / _SET)
    name = "train" if name == CAPTIONS else name
    folder = root / VERSION / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    _write(name, folder)
        except OSError as error:
            raise DataError(
                f"{_SET}:{name}: {folder} cannot be written ({error.strerror}), expected a folder with room for its "
                "images; SCENES_CACHE names another"
            ) from None
    return folder


def conversations(name: str) -> Iterator[dict[str, Any]]:
    """Yields LLaVA rows, one an image: 13,500 with questions for `train` or a caption for `captions`, else 1,500."""
    for record in _records(name):
        turns: list[dict[str, str]] = []
        pairs = [{"text": _DESCRIBE, "answer": record["caption"]}] if name == CAPTIONS else record["questions"]
        for place, pair in enumerate(pairs):
            mark = "<image>\n" if place == 0 else ""
            turns += [{"from": "human", "value": mark + pair["text"]}, {"from": "gpt", "value": pair["answer"]}]
        number = Path(record["image"]).stem
        yield {"id": f"{_SET}_{name}_{number}", "image": record["image"], "conversations": turns}


def questions(split: str) -> list[Question]:
    """Returns a set's questions in the order of the images, one a prompt: 6,000 of `test`."""
    folder = image_folder(split)
    return [
        Question(folder / record["image"], one["text"], one["answer"], one["family"], one["chance"])
        for record in _records(split)
        for one in record["questions"]
    ]


def words_only(known: Iterable[tuple[str, str, str]], questions: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the best guesses without an image: the most frequent training answer to the same text.

    For a text that training does not have, the most frequent answer of its family.

    Args:
        known: family, text and answer of each training question.
        questions: family and text of each question to answer.
    """
    counts: dict[str, Counter[str]] = {}
    for family, text, answer in known:
        counts.setdefault(text, Counter())[answer] += 1
        counts.setdefault(f"family {family}", Counter())[answer] += 1
    best = {text: count.most_common(1)[0][0] for text, count in counts.items()}
    return [best.get(text) or best.get(f"family {family}", "") for family, text in questions]


def _records(name: str) -> Iterator[dict[str, Any]]:
    file = image_folder(name) / _RECORDS
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _write(name: str, folder: Path) -> None:
    """Generates a set; renames the folder into place at the end, so that it is complete whenever it exists."""
    partial = folder.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with (partial / _RECORDS).open("w", encoding="utf-8") as records:
        rows = tqdm(generate_rows(name), desc=f"drawing {_SET}:{name}", total=ROWS[name], leave=False, disable=None)
        for image, scene, its_questions in rows:
            draw(scene).save(partial / image, compress_level=1)
            record = {"image": image, "caption": caption(scene), "questions": list(map(asdict, its_questions))}
            records.write(json.dumps(record) + "\n")
    partial.rename(folder)


def export(name: str, out: Path) -> Path:
    """Writes a set as OUT/NAME.json, LLaVA rows, and OUT/NAME/*.png; returns the JSON file.

    Captions get no folder: their images are those of the set `train`.
    """
    images, file = image_folder(name), out / f"{name}.json"
    if name != CAPTIONS:
        shutil.copytree(images, out / name, ignore=shutil.ignore_patterns(_RECORDS), dirs_exist_ok=True)
    rows = [{**row, "image": f"{images.name}/{row['image']}"} for row in conversations(name)]
    file.write_text(json.dumps(rows, indent=0), encoding="utf-8")
    return file


def floor_lines() -> list[str]:
    """Returns a table of the test sets by family: questions, texts, accuracy of a fair guess and of words only."""
    known = [(one.kind, one.text, one.answer) for one in questions("train")]
    lines = ["| set | family | questions | texts | fair guess | words only |", "| --- | --- | --- | --- | --- | --- |"]
    for name in NAMES[1:]:
        test = questions(name)
        guesses = words_only(known, [(one.kind, one.text) for one in test])
        for family in FAMILIES:
            members = [(one, guess) for one, guess in zip(test, guesses, strict=True) if one.kind == family]
            right = sum(guess == one.answer for one, guess in members)
            chance = sum(one.chance for one, _ in members)
            texts = len({one.text for one, _ in members})
            shares = f"{100 * chance / len(members):.1f} % | {100 * right / len(members):.1f} %"
            lines.append(f"| {name} | {family} | {len(members):,} | {texts:,} | {shares} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table of floors, or writes the sets or a picture of them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.scenes", description="The built-in set scenes.")
    parser.add_argument("--out", type=Path, help="write every set there, as LLaVA JSON and PNG files")
    parser.add_argument("--montage", type=Path, help="write a picture of twelve images: six of test, six compositional")
    args = parser.parse_args(argv)
    try:
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                print(export(name, args.out))
        if args.montage is not None:
            shown = [draw(scene) for name in NAMES[1:] for _, scene, _ in generate_rows(name, 6)]
            montage(shown, columns=6).save(args.montage)
            print(args.montage)
        if args.out is None and args.montage is None:
            print("\n".join(floor_lines()))
    except (DataError, OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
