"""Writes final/, the result of a finished phase: a loadable checkpoint with recipe.yaml and run.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from models.families import family_of
from recipes.resolved import dump_recipe
from recipes.schema import Phase, Recipe, RecipeError
from train import distributed
from train.arguments import resolve_dtype, resolve_precision
from train.checkpoints import FINAL, RECIPE, RUN, find_fault
from train.errors import TrainingError, one_line
from train.parameters import merged, trainable_counts
from train.release.processor import save_processor
from train.samples import Samples
from train.trainer import FusedTrainer
from train.weights import check_loading_report, checkpoint_config, save_model
from train.window_search import apply_plan


def read_figures(phase: Phase) -> dict[str, Any] | None:
    """Returns run.json of the phase's final/, or None where there is none; it appears in one move, so it is whole.

    Raises:
        RecipeError: it cannot be read.
    """
    file = phase.folder / FINAL / RUN
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {**found, "steps": int(found["steps"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(f"output: {file} cannot be read, expected what a run writes ({one_line(error)})") from error


def save_final(trainer: FusedTrainer, recipe: Recipe, *, initial: Path, dataset: Samples) -> None:
    """Writes final/: weights, config with the stage plan, processor, recipe.yaml and run.json. Every rank calls it.

    Adapters are merged into `initial`, the checkpoint that the phase started from.

    Raises:
        TrainingError: what was written does not load as it should.
    """
    phase, dtype = trainer.phase, resolve_dtype(trainer.phase.train)
    figures = _figures(trainer, dataset)
    best = _best_checkpoint(trainer)
    weights = {} if best is not None else trainer.accelerator.get_state_dict(trainer.deepspeed)
    if distributed.rank() != 0:
        return
    if best is not None:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        weights = {name: one.to(dtype) for name, one in get_fp32_state_dict_from_zero_checkpoint(best).items()}
    unset_hf_deepspeed_config()  # from here on rank 0 is alone: nothing may be split over ranks
    model: Any = trainer.model
    if phase.train.lora is not None:
        learned = {name: weights[name] for name, weight in model.named_parameters() if weight.requires_grad}
        model = merged(learned, phase.train.lora, initial=initial, dtype=dtype)
        weights = model.state_dict()
        if trainer.search is not None:
            apply_plan(model, trainer.search.found)
    set_stop_tokens(model, dataset.encoder.stop_ids)
    final, partial = phase.folder / FINAL, phase.folder / f"{FINAL}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_model(model, partial, weights=weights)
    save_processor(trainer.processing_class, phase.data, partial)
    (partial / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    (partial / RUN).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    _check_loads(partial)
    old = final.rename(phase.folder / f"{FINAL}.old") if final.is_dir() else None  # of fewer steps
    partial.rename(final)
    if old is not None:
        shutil.rmtree(old)


def _best_checkpoint(trainer: FusedTrainer) -> Path | None:
    """Returns the best evaluation's checkpoint where final/ is to hold its weights and not the last."""
    step = trainer.state.best_global_step
    if not trainer.keeps_best or step is None or step == trainer.state.global_step:
        return None
    path = trainer.phase.folder / f"checkpoint-{step}"
    fault = find_fault(path) if distributed.rank() == 0 else None
    if fault is not None:
        raise TrainingError(f"{path}, the best evaluation's, cannot be used: {fault}")
    return path


def set_stop_tokens(model: Any, stop_ids: Sequence[int]) -> None:
    """Makes generation stop at the tokens that training labelled as the end of an answer, and at the config's."""
    config = model.config.text_config.eos_token_id
    known = config if isinstance(config, list) else [] if config is None else [config]
    if stop_ids:
        ids = list(dict.fromkeys([*stop_ids, *known]))
        model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]


def _check_loads(folder: Path) -> None:
    """Loads names and shapes of a checkpoint, no weights, and refuses any that do not fit its config."""
    config = checkpoint_config(folder)
    kind = family_of(config.model_type).model_class
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    _, report = kind.from_pretrained(folder, config=config, **options)
    try:
        check_loading_report(folder, report)
    except RecipeError as error:
        raise TrainingError(f"{folder} was not written whole: {error}") from error


def _figures(trainer: FusedTrainer, dataset: Samples) -> dict[str, Any]:
    metrics, seconds = trainer.metrics, trainer.clock.synced_seconds
    passed = max(seconds, 1e-9)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "phase": trainer.phase.name,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 3),
        "samples": metrics.samples,
        "samples_per_second": round(metrics.samples / passed, 2),
        "tokens": metrics.tokens,
        "visual_tokens": metrics.visual,
        "tokens_per_second": round(metrics.tokens / passed, 1),
        "loss": losses[-1] if losses else None,
        **_eval_figures(trainer),
        "ranks": distributed.world_size(),
        "precision": resolve_precision(trainer.phase.train),
        "trainable": trainable_counts(trainer.model),
        "skipped": [asdict(fault) for fault in [*dataset.skipped, *trainer.watch.all_faults()]],
        "sources": dict(zip(trainer.phase.data.names, dataset.source_rows, strict=False)),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _eval_figures(trainer: FusedTrainer) -> dict[str, Any]:
    """Returns the evaluation of the weights in final/, its step, and whether the run ended early."""
    evaluations = {line["step"]: line for line in trainer.state.log_history if "eval_loss" in line}
    if not evaluations:
        return {}
    step = trainer.state.best_global_step if trainer.keeps_best else max(evaluations)
    kept = ("eval_loss", "eval_accuracy")
    chosen = {name: value for name, value in evaluations[step].items() if name.startswith(kept)}
    return {"eval_step": step, **chosen, "ended_early": trainer.is_stalled}
