"""A finished run as its folder tells it: the checkpoint, the recipe, the figures of its phases."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import DataConfig
from recipes.schema import Recipe, load_recipe
from train.checkpoints import FINAL, RECIPE, RUN, read_progress, whole_checkpoints
from train.release.errors import InputError


@dataclass(frozen=True)
class Run:
    """A run with its final/, which is a full checkpoint whatever trained it: shards gathered, adapters merged.

    Attributes:
        folder: the run folder.
        recipe: the resolved recipe; its `model.config` is `final`, because the folder it named may be gone.
        data: data section of the phase that wrote `final`: how to ask the model, and how it sees images.
        figures: run.json of each phase, in their order.
    """

    folder: Path
    recipe: Recipe
    data: DataConfig
    figures: list[dict[str, Any]]

    @property
    def final(self) -> Path:
        """The checkpoint."""
        return self.folder / FINAL

    @property
    def name(self) -> str:
        """The run folder's name, as in tables."""
        return self.folder.resolve().name


def find_run(folder: Path) -> Run:
    """Returns the finished run of a folder.

    Raises:
        InputError: there is none; of an unfinished one it says how to finish it.
        RecipeError: its recipe cannot be read.
    """
    final = folder / FINAL
    if not (final / RUN).is_file():
        raise InputError(f"{folder}: {_unfinished(folder)}")
    # the shape is read from the checkpoint: the folder that the recipe names is of the machine that trained
    recipe = load_recipe(final / RECIPE, [f"model.config={json.dumps(str(final.resolve()))}"])
    figures = [_figures(path) for path in (folder / "align" / FINAL / RUN, final / RUN) if path.is_file()]
    is_align = figures[-1].get("phase") == "align" and recipe.align is not None
    data = recipe.align.data if is_align and recipe.align is not None else recipe.data
    return Run(folder, recipe, data, figures)


def _figures(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: got no JSON ({error}), expected what a run writes") from None


def _unfinished(folder: Path) -> str:
    """Returns what is wrong with a folder without a finished run, and what to do about it."""
    if not (folder / RECIPE).is_file():
        return f"got no run, expected a run folder, which holds {FINAL}/{RUN}"
    finish = f"`deepspeed train/run.py {folder / RECIPE}` finishes it"
    found = whole_checkpoints(folder)
    if not found:
        return f"got a run without {FINAL}/, expected a finished one; {finish}"
    step, ranks = found[-1].name.rpartition("-")[2], read_progress(found[-1]).ranks
    return (
        f"got an unfinished run with {found[-1].name}, expected a finished one; {finish}, with "
        f"train.max_steps={step} at that checkpoint, on {ranks} rank{'s' if ranks > 1 else ''} as before"
    )
