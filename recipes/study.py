"""What a study may say: a recipe, the changes to it that are compared, seeds. YAML file -> Study, or RecipeError."""

from __future__ import annotations

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


_Names = Annotated[list[str], Field(min_length=1), AfterValidator(_each_once)]


class Arm(_Section):
    """One way to train.

    Attributes:
        set: overrides of the recipe, beside the study's.
        schedules: the trained model answers under each of these; `trained` is its stage plan.
    """

    set: list[str] = []
    schedules: _Names = ["trained"]


class Study(_Section):
    """What a study's file says.

    Attributes:
        name: heading of its tables.
        recipe: the recipe that all arms start from.
        set: overrides for all arms.
        seeds: of the random weights and of the order of the data; every arm is trained with each.
        tasks: built-in sets that every run answers; the first is the one that is drawn.
        limit: only this many questions of each task, the first; None: all.
        reference: the arm that the others are compared with.
        arms: by name, in the order of the tables.
        results: folder of the results.
    """

    name: str
    recipe: str
    set: list[str] = []
    seeds: Annotated[list[int], Field(min_length=1), AfterValidator(_each_once)]
    tasks: _Names
    limit: int | None = Field(default=None, ge=1)
    reference: str
    arms: dict[str, Arm] = Field(min_length=1)
    results: str

    @model_validator(mode="after")
    def _check(self) -> Study:
        if self.reference not in self.arms:
            raise ValueError(f"reference: got '{self.reference}', expected an arm: {', '.join(self.arms)}")
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
