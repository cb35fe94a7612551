"""The recipe of the proposed stages: the checkpoint's with other stages, or LLaVA's that starts from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.checkpoint import Checkpoint
from eval.stage_analysis.report import evidence_lines
from recipes.resolved import dump_recipe
from recipes.schema import Recipe, RecipeError, load_recipe

_RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FOREIGN = _RECIPES / "llava_fused.yaml"
READY = _RECIPES / "qwen3_vl_4b_fused.yaml"  # tunes a ready VLM; nothing else of it is Qwen's but `data.processor`


def check_target(target: Path | None) -> None:
    """Raises RecipeError where the recipe's file exists or its folder does not."""
    if target is None:
        return
    if target.exists() or target.is_symlink():
        raise RecipeError(f"--write: got {target}, expected a file that does not exist yet")
    if target.suffix not in (".yaml", ".yml") or not target.parent.is_dir():
        raise RecipeError(f"--write: got {target}, expected a .yaml file in a folder that exists")


def starting_recipe(checkpoint: Checkpoint, given: str) -> Recipe:
    """Returns the recipe that a checkpoint was trained with; of one without, one that starts from the checkpoint.

    That is LLaVA's for a LLaVA, and one that tunes a ready VLM for any other family.

    Args:
        checkpoint: the checkpoint.
        given: what it was called by: a folder or a hub name.

    Raises:
        RecipeError: that recipe cannot be used any more.
    """
    recipe = checkpoint.weights / "recipe.yaml"
    if recipe.is_file():
        return load_recipe(recipe)
    is_llava = checkpoint.family == "llava"
    foreign = load_recipe(FOREIGN if is_llava else READY).model_dump()
    if not is_llava:
        how = {"format": checkpoint.chat_format, "image_aspect": checkpoint.aspect}
        foreign["data"] |= {**how, "processor": {}, "expected_visual_tokens": None}
    model = {"config": None, "checkpoint": given, "language_model": None, "vision_tower": None, "stages": None}
    return Recipe.model_validate({**foreign, "model": model})


def write_recipe(target: Path, start: Recipe, record: dict[str, Any]) -> None:
    """Writes a recipe with the proposed stages, the evidence in a comment on top.

    Args:
        target: file to write; it must not exist.
        start: what else the recipe says.
        record: of the analysis.

    Raises:
        RecipeError: nothing was proposed, or the file exists.
    """
    if record["proposal"] is None:
        raise RecipeError(f"--write: {target} was not written: no stages are proposed: {record['verdict']}")
    fields = start.model_dump()
    fields |= {"name": target.stem, "output": f"outputs/{target.stem}"}
    fields["model"]["stages"] = record["proposal"]["stages"]
    recipe = Recipe.model_validate(fields)
    lines = ["The stages of this recipe were proposed by", f"  {record['command']}", *evidence_lines(record)]
    text = "".join(f"# {line}\n" for line in lines) + "\n" + dump_recipe(recipe)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RecipeError(f"--write: {target}: {error.strerror}, expected a file that can be made") from error
    load_recipe(target)
