"""One phase of a recipe, from its checks to its final/: read it top to bottom to see what a training does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from data.dataset import Collator
from data.stream import ConversationStream
from recipes.resolved import dump_recipe
from recipes.schema import Phase, Recipe, RecipeError
from train import ranks
from train.adapters import add_adapters
from train.arguments import check_deepspeed, share_out, training_arguments
from train.callbacks import LogCallback, RunCallback, start_tracking, stop_tracking
from train.checkpoints import (
    RECIPE,
    Progress,
    check_same_run,
    read_progress,
    set_aside,
    whole_checkpoints,
)
from train.clock import Clock
from train.groups import freeze, trainable_counts
from train.initial import INITIAL, build_initial, load_checkpoint, read_processor
from train.outcome import FINAL, is_finished, save_final
from train.precision import resolve_dtype
from train.samples import Samples, read_samples, sample_notes, sample_order
from train.tally import Tally
from train.trainer import FusedTrainer
from train.watch import DataWatch


def run_phase(recipe: Recipe, index: int) -> bool:
    """Trains one phase on this rank, or finds it done.

    Args:
        recipe: the recipe.
        index: which of its phases.

    Returns:
        False when SIGTERM ended it before its time: the same command goes on.

    Raises:
        RecipeError: the recipe cannot be run here; no weight was loaded yet.
        TrainingError: the training cannot go on.
    """
    phase = recipe.phases[index]
    _check(recipe)
    if is_finished(phase):
        ranks.say(f"{phase.name}: {phase.folder / FINAL} is there already; not run again")
        return True
    ranks.join()
    processor = read_processor(recipe.model)
    if ranks.rank() == 0:  # first, because it fills the caches that the other ranks read
        dataset = read_samples(phase, processor, seed=recipe.seed)
        for note in sample_notes(phase, dataset):
            ranks.say(note)
        _prepare_folder(recipe, phase)
    ranks.wait()
    if ranks.rank() != 0:
        dataset = read_samples(phase, processor, seed=recipe.seed)
    initial = Path(recipe.output) / INITIAL if index == 0 else recipe.phases[index - 1].folder / FINAL
    return _train(recipe, phase, initial=initial, dataset=dataset)


def _prepare_folder(recipe: Recipe, phase: Phase) -> None:
    """Writes the recipe and the initial checkpoint; sets aside checkpoints whose writing was cut off."""
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    for moved in set_aside(phase.folder):
        ranks.say(f"{moved.name}: its writing was cut off; set aside, not resumed")
    if phase.folder == recipe.phases[0].folder:
        if not whole_checkpoints(phase.folder):  # what an earlier try left may be of another recipe
            shutil.rmtree(folder / INITIAL, ignore_errors=True)
        build_initial(recipe, folder / INITIAL)


def _check(recipe: Recipe) -> None:
    """Refuses, before any weight is loaded, what would fail later."""
    for phase in recipe.phases:
        share_out(phase.train, ranks.count())
        check_deepspeed(phase.train)
    check_same_run(recipe, Path(recipe.output))


def _train(recipe: Recipe, phase: Phase, *, initial: Path, dataset: Samples) -> bool:
    """Trains from `initial`, or from the newest whole checkpoint; returns whether it reached its end."""
    checkpoints = whole_checkpoints(phase.folder)
    resumed = checkpoints[-1] if checkpoints else None
    progress = read_progress(resumed) if resumed else Progress(ranks=ranks.count())
    if progress.ranks != ranks.count():
        raise RecipeError(
            f"output: {resumed} was written by {progress.ranks} ranks, found {ranks.count()}, accepted: as many"
        )
    arguments = training_arguments(recipe, phase)
    if isinstance(dataset, ConversationStream):
        dataset.skip = progress.step * arguments.gradient_accumulation_steps
    model: Any = load_checkpoint(initial, dtype=resolve_dtype(phase.train))
    if phase.train.lora is not None:
        model = add_adapters(model, phase.train.lora)
    freeze(model, phase.train.learning_rate, adapters=phase.train.lora is not None)
    _announce(phase, model, resumed)
    processor = dataset.processor
    trainer = FusedTrainer(
        phase=phase,
        order=sample_order(phase, dataset, seed=recipe.seed),
        clock=Clock(before=progress.seconds),
        tally=Tally(samples=progress.samples, tokens=progress.tokens),
        watch=DataWatch(phase.data, len(dataset.skipped)),
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(processor.tokenizer.pad_token_id),
        processing_class=processor,
    )
    trainer.remove_callback(PrinterCallback)  # LogCallback's line is the one
    trainer.add_callback(RunCallback(trainer))
    trainer.add_callback(
        LogCallback(
            phase.folder / "log.jsonl",
            limit_seconds=phase.train.max_seconds,
            resumed_step=progress.step,
        )
    )
    start_tracking(arguments.run_name, phase.folder)
    trainer.watch_signal()
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    stop_tracking()
    if trainer.is_stopping:
        where = phase.folder / f"checkpoint-{trainer.state.global_step}"
        ranks.say(f"stopped by SIGTERM; saved {where}; the same command goes on from there")
        return False
    save_final(trainer, recipe, initial=initial, dataset=dataset)
    ranks.say(f"{phase.name}: done, {phase.folder / FINAL}")
    return True


def _announce(phase: Phase, model: Any, resumed: Path | None) -> None:
    counts = [f"{group} {count:,}" for group, count in trainable_counts(model).items() if count]
    ranks.say(f"{phase.name}: trainable parameters: {', '.join(counts)}")
    if resumed is not None:
        ranks.say(f"{phase.name}: goes on from {resumed}")
