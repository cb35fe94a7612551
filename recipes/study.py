"""The study schema (a recipe, the arms to compare, seeds) and its loader: YAML file -> Study, or RecipeError."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from recipes.errors import first_fault
from recipes.schema import read_yaml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _each_once(values: list[Any]) -> list[Any]:
    for number, value in enumerate(values):
        if value in values[:number]:
            raise ValueError(f"got {value} twice, expected each once")
    return values


def _changes(overrides: list[str]) -> list[str]:
    for override in overrides:
        if override.partition("=")[0].strip() in _OF_THE_STUDY:
            raise ValueError(f"got '{override}', which the study sets for each run, expected other keys")
    return overrides


def _file_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"got {name!r}, expected letters, digits, '_', '-' and '.': files are named by it")
    return name


_OF_THE_STUDY = ("name", "seed", "output")
_Overrides = Annotated[list[str], AfterValidator(_changes)]
_FileName = Annotated[str, AfterValidator(_file_name)]
_Names = Annotated[list[str], Field(min_length=1), AfterValidator(_each_once)]


class Arm(_Section):
    """One training variant.

    Attributes:
        set: overrides of the recipe, in addition to the study's.
        schedules: schedules to evaluate the trained model under; `trained` is its stage plan.
        label: what pictures call it; None: its name.
    """

    set: _Overrides = []
    label: str | None = None
    schedules: _Names = ["trained"]


class Study(_Section):
    """A comparison of training variants over seeds.

    Attributes:
        name: heading of its tables, and name of the folder of its runs.
        recipe: the recipe common to all arms.
        set: overrides for all arms.
        seeds: seeds of random weights and data order; every arm is trained with each.
        tasks: built-in sets to evaluate every run on; the plot shows the first.
        limit: number of questions of each task, from the first on; None: all.
        reference: the arm that the others are compared with.
        arms: arms by name, in the order of the tables.
        picture: the arms in the pictures over cost; None: all. The picture over layers has every window.
        results: folder of the results.
    """

    name: _FileName
    recipe: str
    set: _Overrides = []
    seeds: Annotated[list[int], Field(min_length=1), AfterValidator(_each_once)]
    tasks: _Names
    limit: int | None = Field(default=None, ge=1)
    reference: str
    arms: dict[_FileName, Arm] = Field(min_length=1)
    picture: _Names | None = None
    results: str

    @model_validator(mode="after")
    def _check(self) -> Study:
        if self.reference not in self.arms:
            raise ValueError(f"reference: got '{self.reference}', expected an arm: {', '.join(self.arms)}")
        for name in self.picture or ():
            if name not in self.arms:
                raise ValueError(f"picture: got '{name}', expected an arm: {', '.join(self.arms)}")
        return self


def load_study(path: str | Path) -> Study:
    """Reads and checks a study.

    Raises:
        RecipeError: one line that names the file, the key, what was got and what is expected.
    """
    try:
        return Study.model_validate(read_yaml(path))
    except ValidationError as error:
        raise first_fault(error, Study, path) from None
