"""transformers.TrainingArguments from a recipe."""

from __future__ import annotations

import math
import os

import torch
from transformers import TrainingArguments

from recipes.schema import Phase, Recipe, RecipeError, TrainSection
from train import distributed
from train.deepspeed_config import check_deepspeed, read_deepspeed
from train.precision import resolve_precision

_ENDLESS = 10**9  # steps; a run that the clock ends


def split_batch(train: TrainSection, num_ranks: int) -> tuple[int, int]:
    """Returns the samples of one forward pass on one rank, and its forward passes in one optimizer step.

    Raises:
        RecipeError: the global batch cannot be split evenly.
    """
    micro_batch = min(train.per_device_batch, max(1, train.global_batch // num_ranks))
    if train.global_batch % (micro_batch * num_ranks):
        raise RecipeError(
            f"train.global_batch: got {train.global_batch} on {num_ranks} ranks of {micro_batch} samples, "
            f"expected a multiple of {micro_batch * num_ranks}"
        )
    return micro_batch, train.global_batch // (micro_batch * num_ranks)


def passes_per_step(train: TrainSection, num_ranks: int) -> int:
    """Returns the forward passes of one optimizer step, over all ranks; errors as split_batch."""
    return num_ranks * split_batch(train, num_ranks)[1]


def check_batches(train: TrainSection, num_ranks: int) -> None:
    """Raises RecipeError when the global batch does not come out even, or DeepSpeed cannot run the phase."""
    per_device_batch, accumulation = split_batch(train, num_ranks)
    check_deepspeed(train, per_device_batch=per_device_batch, accumulation=accumulation, num_ranks=num_ranks)


def is_timed(train: TrainSection) -> bool:
    """Returns whether the learning rate follows the clock, not the steps."""
    return train.max_seconds is not None and train.max_steps is None


def total_steps(train: TrainSection, steps_an_epoch: int) -> int | None:
    """Returns the optimizer steps of a phase, or None where the clock alone ends it."""
    if is_timed(train):
        return None
    return train.max_steps or math.ceil(train.epochs * steps_an_epoch)


def training_arguments(recipe: Recipe, phase: Phase, *, is_resharded: bool = False) -> TrainingArguments:
    """Returns the arguments of one phase; from here on, weights are loaded as its DeepSpeed configuration says.

    Args:
        recipe: the recipe.
        phase: one of its phases.
        is_resharded: the checkpoint to resume was written by another number of ranks and converted.
    """
    deepspeed = read_deepspeed(phase.train)
    if is_resharded:
        deepspeed["checkpoint"] = deepspeed.get("checkpoint", {}) | {"load_universal": True}
    train = phase.train
    rates = train.learning_rate
    micro_batch, accumulation = split_batch(train, distributed.count())
    peak = max(rate for rate in (rates.projector, rates.vision_tower, rates.language_model) if rate)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(phase.folder / "tensorboard")  # read when Trainer is built
    return TrainingArguments(
        output_dir=str(phase.folder),
        run_name=f"{recipe.name}-{phase.name}" if recipe.align else recipe.name,
        seed=recipe.seed,
        deepspeed=deepspeed,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=train.epochs,
        max_steps=_ENDLESS if is_timed(train) else train.max_steps or -1,
        learning_rate=peak,
        lr_scheduler_type=f"{train.scheduler}_with_warmup" if train.scheduler == "constant" else train.scheduler,
        warmup_steps=train.warmup_ratio,  # below 1 it is a share
        weight_decay=train.weight_decay,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm or 0.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=resolve_precision(train) == "bf16",
        fp16=resolve_precision(train) == "fp16",
        optim="adamw_torch" if train.optimizer == "muon" else train.optimizer,
        neftune_noise_alpha=train.neftune,
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps",
        save_steps=train.save_steps or _ENDLESS,
        save_total_limit=None,  # ours: only once the newer checkpoint is marked as whole
        eval_strategy="no" if phase.eval is None else "steps",
        eval_steps=None if phase.eval is None else phase.eval.every,
        metric_for_best_model=None if phase.eval is None else phase.eval.metric,
        greater_is_better=None if phase.eval is None else phase.eval.metric == "accuracy",
        logging_steps=train.log_steps,
        logging_nan_inf_filter=False,  # the trainer stops instead
        report_to=[train.tracker],
        disable_tqdm=True,  # train/callbacks.py has its own line
        remove_unused_columns=False,
        ignore_data_skip=phase.data.streaming,  # a stream skips by itself, without opening images
        dataloader_num_workers=phase.data.workers,
        dataloader_persistent_workers=False,
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # batches are pinned there
        restore_callback_states_from_checkpoint=False,
    )
