"""One phase of a recipe, from its checks to its final/: read it top to bottom to see what a training does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, set_seed

from data.dataset import Collator
from data.rows import DataError
from data.stream import ConversationStream
from models.attention import SDPA_PACKED
from recipes.resolved import dump_recipe
from recipes.schema import Phase, Recipe, RecipeError
from train import callbacks, checkpoints, distributed
from train.arguments import (
    deepspeed_fingerprint,
    is_timed,
    read_deepspeed,
    resolve_dtype,
    total_steps,
    training_arguments,
)
from train.checkpoints import FINAL, INITIAL, RECIPE, Progress
from train.checks import check_profile, check_run
from train.errors import TrainingError, one_line
from train.estimate import Estimate, peak_here
from train.final import read_figures, save_final
from train.metrics import Clock, DataWatch, TrainMetrics
from train.parameters import add_adapters, freeze, trainable_counts
from train.samples import (
    Samples,
    collate,
    data_fingerprint,
    hold_out,
    processor_fingerprint,
    read_samples,
    sample_notes,
    sample_order,
)
from train.stop import StopRequest
from train.trainer import FusedTrainer
from train.weights import build_initial, config_fingerprint, load_checkpoint, read_config, read_processor
from train.window_search import WindowSearch, check_search


def run_phase(recipe: Recipe, index: int, stop: StopRequest) -> bool:
    """Trains one phase of a recipe on this rank, or finds it done.

    Returns:
        False when a stop request ended it before its time: the same command goes on.

    Raises:
        RecipeError: the recipe cannot be run here; no weight was loaded yet.
        TrainingError: the training cannot go on.
        PeerError: another rank ended the run.
        Stopped: a stop request came before the first step.
    """
    phase = recipe.phases[index]
    check_run(recipe, distributed.world_size())
    if _is_finished(recipe, index):
        distributed.print_rank0(f"{phase.name}: {phase.folder / FINAL} is there already; not run again")
        return True
    distributed.init()
    processor = read_processor(recipe.model)
    if distributed.rank() == 0:  # first, because it fills the caches that the other ranks read
        lock = checkpoints.RunLock(_make_folder(Path(recipe.output)))
        lock.take()
        dataset = read_samples(phase, processor, seed=recipe.seed)
        for note in sample_notes(phase, dataset):
            print(note, flush=True)
        try:
            _prepare_folder(recipe, phase)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"output: {recipe.output}: cannot write: {one_line(error)}") from error
    distributed.barrier()
    if distributed.rank() != 0:
        dataset = read_samples(phase, processor, seed=recipe.seed)
    initial = Path(recipe.output) / INITIAL if index == 0 else recipe.phases[index - 1].folder / FINAL
    is_done = _train(recipe, phase, initial=initial, dataset=dataset, stop=stop)
    if distributed.rank() == 0:
        lock.release()
    return is_done


def _is_finished(recipe: Recipe, index: int) -> bool:
    """Returns whether the phase's final/ is there, and of all the steps that the recipe wants by now."""
    phase = recipe.phases[index]
    figures, wanted = read_figures(phase), phase.train.max_steps
    if figures is None:
        return False
    steps = figures["steps"]
    if wanted is None or wanted <= steps or is_timed(phase.train) or figures.get("ended_early"):
        return True
    key = "align.train.max_steps" if phase.name == "align" else "train.max_steps"
    if not checkpoints.whole_checkpoints(phase.folder):
        raise RecipeError(
            f"{key}: got {wanted}, but {phase.folder / FINAL} is of step {steps} and no checkpoint is left to train "
            f"on from; expected {steps}, or another output with {phase.folder / FINAL} as model.checkpoint"
        )
    for later in recipe.phases[index + 1 :]:
        if checkpoints.whole_checkpoints(later.folder) or read_figures(later) is not None:
            raise RecipeError(
                f"{key}: got {wanted}, but {later.name} started from {phase.folder / FINAL}, of step {steps}; expected "
                f"{steps}, or another output"
            )
    return False


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"output: {folder}: {error.strerror}, expected a folder that can be written") from error
    return folder


def _prepare_folder(recipe: Recipe, phase: Phase) -> None:
    """Writes the recipe and the initial checkpoint; sets aside checkpoints that cannot be resumed."""
    folder = Path(recipe.output)
    phase.folder.mkdir(parents=True, exist_ok=True)
    for name in (FINAL, f"{FINAL}.partial"):
        if (phase.folder / name).is_file():
            raise RecipeError(f"output: {phase.folder / name} is a file, expected a folder, or nothing there yet")
    for note in checkpoints.set_aside(phase.folder):
        print(note, flush=True)
    (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    if phase.folder == recipe.phases[0].folder:
        if not checkpoints.whole_checkpoints(phase.folder):  # what an earlier try left may be of another recipe
            shutil.rmtree(folder / INITIAL, ignore_errors=True)
        build_initial(recipe, folder / INITIAL)


def _train(recipe: Recipe, phase: Phase, *, initial: Path, dataset: Samples, stop: StopRequest) -> bool:
    """Trains from `initial`, or from the newest whole checkpoint; returns whether it reached its end."""
    dataset, validation = hold_out(phase, dataset, seed=recipe.seed)
    resumed = next(reversed(checkpoints.whole_checkpoints(phase.folder)), None)
    progress = checkpoints.read_progress(resumed) if resumed else Progress(ranks=distributed.world_size())
    order = sample_order(phase, dataset, seed=recipe.seed, ranks=distributed.world_size())
    total = total_steps(phase.train, 0 if order is None else order.steps)  # a recipe says how long a stream is
    _check_samples(phase, dataset, total)
    fingerprints = {
        "data": data_fingerprint(phase, dataset, validation),
        "processor": processor_fingerprint(dataset.processor),
        "config": config_fingerprint(recipe.model),
        "deepspeed": deepspeed_fingerprint(read_deepspeed(phase.train)),
        "schedule": _schedule_text(phase, total),
    }
    if resumed is not None:
        _check_resumed(phase, resumed, progress, fingerprints, total)
    # before DeepSpeed's configuration takes hold of every new model
    search, estimate, metrics = _measures(recipe, phase, progress, total)
    is_resharded = progress.ranks != distributed.world_size()
    source = _reshard(resumed, progress) if resumed is not None and is_resharded else resumed
    arguments = training_arguments(recipe, phase, is_resharded=is_resharded)
    if isinstance(dataset, ConversationStream):
        dataset.skip = progress.step * arguments.gradient_accumulation_steps
    model = _load_model(phase, initial, seed=recipe.seed)
    if resumed is not None:
        distributed.print_rank0(f"{phase.name}: goes on from {resumed}")
    trainer = FusedTrainer(
        phase=phase,
        order=order,
        clock=Clock(before=progress.seconds),
        metrics=metrics,
        watch=DataWatch(phase.data, len(dataset.skipped), progress.faults),
        search=search,
        validation=validation,
        stop=stop,
        fingerprints=fingerprints,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=partial(
            collate,
            collator=Collator(dataset.processor.tokenizer.pad_token_id),
            image_token=model.config.image_token_id,
            packed=phase.train.tokens_per_step is not None,
        ),
        processing_class=dataset.processor,
    )
    limit = phase.train.max_seconds
    is_trained = (total is not None and progress.step >= total) or (limit is not None and progress.seconds >= limit)
    run = callbacks.RunCallback(trainer, _health(phase, model, total), is_trained=is_trained, is_resharded=is_resharded)
    _add_callbacks(trainer, run, progress, estimate)
    with stop.deferred(), _one_line_errors(trainer):
        if not is_trained:
            callbacks.start_tracking(phase.train.tracker, arguments.run_name, phase.folder)
        try:
            trainer.train(resume_from_checkpoint=str(source) if source else None)
        except callbacks.NothingToTrain:
            trainer.clock.synced_seconds = progress.seconds
        if not is_trained:
            callbacks.stop_tracking(phase.train.tracker)
        if trainer.is_stopping:
            where = phase.folder / f"checkpoint-{trainer.state.global_step}"
            reason = stop.reason or "a signal to another rank"
            distributed.print_rank0(f"stopped by {reason}; saved {where}; the same command goes on from there")
            return False
        save_final(trainer, recipe, initial=initial, dataset=dataset)
        distributed.barrier()
    distributed.print_rank0(f"{phase.name}: done, {phase.folder / FINAL}")
    return True


def _check_samples(phase: Phase, dataset: Samples, total: int | None) -> None:
    """Refuses samples that teach nothing: none has an image, and only the projector or the tower learns.

    And, now that the number of steps is known, a trace of steps after them.
    """
    check_profile(phase.train, total)
    learns_text = phase.train.learning_rate.language_model is not None
    if not learns_text and not isinstance(dataset, ConversationStream) and not any(dataset.has_image):
        raise RecipeError(
            f"{phase.name}: data: got no row with an image, expected some: train.learning_rate.language_model is null"
        )


def _check_resumed(
    phase: Phase, resumed: Path, progress: Progress, fingerprints: Mapping[str, str], total: int | None
) -> None:
    """Refuses a checkpoint of something else; says what a change of max_steps does to the learning rate."""
    checkpoints.check_same_content(resumed, progress.fingerprints, fingerprints)
    if total is not None and progress.step > total:
        raise RecipeError(
            f"train.max_steps: got {total}, but {resumed} is there; expected at least {progress.step}, or another "
            "output"
        )
    before, now = progress.fingerprints.get("schedule"), fingerprints["schedule"]
    if before != now:
        distributed.print_rank0(
            f"{phase.name}: learning rate: {before} up to step {progress.step}, {now} from here on; "
            "the run is not the one that it would have been with this setting from the start"
        )


def _schedule_text(phase: Phase, total: int | None) -> str:
    """Returns how the learning rate changes over the run."""
    train = phase.train
    length = f"{train.max_seconds:g} s" if total is None else f"{total} steps"
    if train.scheduler == "constant" and train.warmup_ratio == 0:
        return "constant"
    return f"{train.scheduler} over {length}, warm-up {train.warmup_ratio:g}"


def _measures(
    recipe: Recipe, phase: Phase, progress: Progress, total: int | None
) -> tuple[WindowSearch | None, Estimate | None, TrainMetrics]:
    """Returns the window search, the cost estimate (on rank 0, which logs) and the metrics so far, of a resumed run."""
    config, peak, search = read_config(recipe.model), peak_here(), None
    if phase.learn is not None:
        depth = config.text_config.num_hidden_layers
        check_search(phase.learn, num_layers=depth, steps=total)
        search = WindowSearch(phase.learn, depth, progress.search)
    estimate = Estimate(config, phase.train, phase.plans, phase.learn, total) if distributed.rank() == 0 else None
    metrics = TrainMetrics(
        samples=progress.samples,
        tokens=progress.tokens,
        visual=progress.visual,
        window=progress.window,
        image_token=config.image_token_id,
        flops=None if estimate is None else estimate.window_flops,
        peak=None if peak is None else peak * distributed.world_size(),
    )
    return search, estimate, metrics


def _reshard(resumed: Path, progress: Progress) -> Path:
    """Returns a checkpoint for this number of ranks."""
    distributed.print_rank0(f"{resumed} is of {progress.ranks} ranks: converting it for {distributed.world_size()}")
    if distributed.rank() == 0:
        checkpoints.reshard(resumed)
    distributed.barrier()
    return checkpoints.resharded(resumed)


def _load_model(phase: Phase, initial: Path, *, seed: int) -> Any:
    """Returns the model with its parameters frozen or trainable as in the recipe, and prints their counts."""
    bits = phase.train.lora.bits if phase.train.lora is not None else None
    model = load_checkpoint(initial, dtype=resolve_dtype(phase.train), bits=bits)
    if phase.train.tokens_per_step is not None and model.config.text_config._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": SDPA_PACKED})
    if phase.train.lora is not None:
        set_seed(seed)  # adapters are random, whatever this process did before
        model = add_adapters(model, phase.train.lora)
    freeze(model, phase.train)
    counts = [f"{part} {count:,}" for part, count in trainable_counts(model).items() if count]
    distributed.print_rank0(f"{phase.name}: trainable parameters: {', '.join(counts)}")
    return model


def _health(phase: Phase, model: Any, total: int | None) -> callbacks.Health:
    return callbacks.Health(
        vocabulary=model.config.text_config.vocab_size,
        warmup_steps=round(phase.train.warmup_ratio * (total or 0)),
        total_steps=total,
        needs_images=phase.train.learning_rate.language_model is None,
    )


def _add_callbacks(
    trainer: FusedTrainer, run: callbacks.RunCallback, progress: Progress, estimate: Estimate | None
) -> None:
    phase = trainer.phase
    log = callbacks.LogCallback(phase.folder / "log.jsonl", limit_seconds=phase.train.max_seconds, progress=progress)
    trainer.remove_callback(PrinterCallback)  # LogCallback's line is the one
    trainer.add_callback(run)
    trainer.add_callback(log)
    if trainer.search is not None:
        trainer.add_callback(callbacks.SearchCallback(trainer, trainer.search, estimate))
    if phase.train.profile is not None and distributed.rank() == 0:
        trainer.add_callback(callbacks.ProfileCallback(phase.train.profile, phase.folder / "profile"))


@contextmanager
def _one_line_errors(trainer: FusedTrainer) -> Iterator[None]:
    """Makes one-line errors of what can happen to a good training: broken images, a full disk, too little memory."""
    try:
        yield
    except DataError as error:  # of a worker too, whose message torch puts behind a traceback
        reason = str(error).strip().splitlines()[-1].partition("DataError: ")[2] or one_line(error)
        good = checkpoints.whole_checkpoints(trainer.phase.folder)
        last = f"; last good checkpoint: {good[-1]}" if good else ""
        raise RecipeError(f"{trainer.phase.name}: {reason}{last}") from error
    except torch.OutOfMemoryError as error:
        raise trainer.failure("out of GPU memory; lower train.per_device_batch") from error
    except (OSError, SafetensorError) as error:
        raise _write_failure(trainer, error) from error
    except RuntimeError as error:
        if isinstance(error, TrainingError):
            raise
        distributed.exit_if_lost(error)
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise _write_failure(trainer, cause) from error
        if "DataLoader worker" in str(error):
            raise trainer.failure(one_line(error)) from error
        raise


def _write_failure(trainer: FusedTrainer, error: BaseException) -> TrainingError:
    """Returns the error of a checkpoint that cannot be written, and makes room again: it is of no use."""
    folder = trainer.phase.folder
    if distributed.rank() == 0:
        checkpoints.set_aside(folder)
        if checkpoints.whole_checkpoints(folder):
            checkpoints.keep_newest(folder, trainer.phase.train.save_total_limit)
        shutil.rmtree(folder / f"{FINAL}.partial", ignore_errors=True)
    free = shutil.disk_usage(folder).free
    return trainer.failure(f"cannot write: {one_line(error)} ({free / 2**20:,.0f} MiB are free)")
