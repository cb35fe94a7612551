"""Translates a recipe into batch sizes, steps, precision, TrainingArguments and a checked DeepSpeed configuration."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import ValidationError
from transformers import TrainingArguments

from recipes.errors import suggestion
from recipes.schema import Phase, Recipe, RecipeError, TrainSection
from train import distributed
from train.checkpoints import digest_of
from train.errors import one_line

_ENDLESS: Final = 10**9  # steps; a run that the clock ends
# Keys, at any depth, that would train something else than the recipe says, or that no run here can use.
_REFUSED: Final = {
    "optimizer": "the recipe's learning rates, one for each part of the model, decide",
    "scheduler": "train.scheduler decides",
    "amp": "train.precision decides",
    "torch_autocast": "train.precision decides",
    "bf16.bf16_master_weights_and_grads": "master weights are float32",
    "tensor_parallel": "models are split by ZeRO alone",
    "pipeline": "models are split by ZeRO alone",
    "sequence_parallel_size": "sequences are not split",
    "curriculum_learning": "the recipe's seed decides the order of the data",
    "data_efficiency": "the recipe's seed decides the order of the data",
    "compression_training": "the model is trained as it is",
    "progressive_layer_drop": "the stage plan decides which layers run",
    "elasticity": "train.global_batch decides; python -m train.elastic restarts a run",
    "prescale_gradients": "gradients are the mean over the global batch",
    "gradient_predivide_factor": "gradients are the mean over the global batch",
    "hybrid_engine": "no run generates while it trains",
    "checkpoint.load_universal": "a run that goes on decides",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer names the device",
    "zero_optimization.zenflow": "the optimizer takes every gradient in its step",
    "zero_optimization.load_from_fp32_weights": "a run that goes on needs the float32 weights",
    "checkpoint.writer": "a checkpoint is whole once its files are written",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "train.tracker decides"),
}
_KNOWN: Final = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "comms_logger",
    "compile",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
)
_GATHER: Final = "stage3_gather_16bit_weights_on_model_save"
_MICRO_BATCH: Final = "train_micro_batch_size_per_gpu"
_DERIVED: Final = (_MICRO_BATCH, "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")


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


def is_timed(train: TrainSection) -> bool:
    """Returns whether the learning rate follows the clock, not the steps."""
    return train.max_seconds is not None and train.max_steps is None


def total_steps(train: TrainSection, steps_an_epoch: int) -> int | None:
    """Returns the optimizer steps of a phase, or None where the clock alone ends it."""
    if is_timed(train):
        return None
    return train.max_steps or math.ceil(train.epochs * steps_an_epoch)


def resolve_precision(train: TrainSection) -> str:
    """Returns bf16, fp16 or fp32; `auto` is bf16 where the hardware multiplies it, as emulation is slow."""
    if train.precision != "auto":
        return train.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    abilities = torch.cpu.get_capabilities()
    return "bf16" if abilities.get("amx_bf16") or abilities.get("avx512_bf16") else "fp32"


def resolve_dtype(train: TrainSection) -> torch.dtype:
    """Returns the torch type of `resolve_precision`."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[resolve_precision(train)]


def training_arguments(recipe: Recipe, phase: Phase, *, is_resharded: bool) -> TrainingArguments:
    """Returns the arguments of one phase; from here on, weights are loaded as its DeepSpeed configuration says.

    `is_resharded`: the checkpoint to resume was written by another number of ranks and converted.
    """
    train, rates, section = phase.train, phase.train.learning_rate, phase.eval
    deepspeed = read_deepspeed(train)
    if is_resharded:
        deepspeed["checkpoint"] = deepspeed.get("checkpoint", {}) | {"load_universal": True}
    micro_batch, accumulation = split_batch(train, distributed.world_size())
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
        learning_rate=max(rate for rate in (rates.projector, rates.vision_tower, rates.language_model) if rate),
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
        eval_strategy="no" if section is None else "steps",
        eval_steps=None if section is None else section.every,
        metric_for_best_model=None if section is None else section.metric,
        greater_is_better=None if section is None else section.metric == "accuracy",
        logging_steps=train.log_steps,
        logging_nan_inf_filter=False,  # the trainer stops instead
        report_to=[train.tracker],
        disable_tqdm=True,  # train/callbacks.py prints a line instead
        remove_unused_columns=False,
        ignore_data_skip=phase.data.streaming,  # a stream skips by itself, without opening images
        dataloader_num_workers=phase.data.workers,
        dataloader_persistent_workers=False,
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # batches are pinned there
        restore_callback_states_from_checkpoint=False,
    )


def read_deepspeed(train: TrainSection) -> dict[str, Any]:
    """Returns the DeepSpeed configuration that a phase names; what follows from the recipe and is left out is "auto".

    Raises:
        RecipeError: the file is no JSON object.
    """
    try:
        text = Path(train.deepspeed).read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_each_key_once)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"train.deepspeed: got '{train.deepspeed}', expected a JSON file ({one_line(error)})"
        ) from error
    if not isinstance(config, dict):
        found = type(config).__name__
        raise RecipeError(f"train.deepspeed: {train.deepspeed}: got {found}, expected an object with zero_optimization")
    return dict.fromkeys(_DERIVED, "auto") | config  # Trainer fills in only what is there


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is there twice")
        found[key] = value
    return found


def deepspeed_fingerprint(config: Mapping[str, Any]) -> str:
    """Returns a digest of a configuration's content, whatever the layout of its file."""
    return digest_of(config)


def check_deepspeed(train: TrainSection, num_ranks: int) -> None:
    """Raises RecipeError when DeepSpeed would refuse the configuration, or train something else than the recipe says.

    And when the global batch cannot be split evenly over the ranks.
    """
    micro_batch, accumulation = split_batch(train, num_ranks)
    values = micro_batch, accumulation, train.global_batch, train.max_grad_norm or 0.0
    derived = dict(zip(_DERIVED, values, strict=True))
    fault = next(_deepspeed_faults(train, read_deepspeed(train), derived), None)
    if fault is not None:
        raise RecipeError(f"train.deepspeed: {train.deepspeed}: {fault}")


def _deepspeed_faults(train: TrainSection, config: Mapping[str, Any], derived: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with a configuration, as `key: got this, expected that`."""
    for key, reason in _REFUSED.items():
        section, _, name = key.rpartition(".")
        found = config.get(section) if section else config
        if isinstance(found, dict) and name in found:
            yield f"{key}: got a value, expected none: {reason}"
    yield from (f"{key}: unknown key; {suggestion(key, _KNOWN)}" for key in config if key not in _KNOWN)
    if not isinstance(config.get("checkpoint", {}), dict):
        yield f"checkpoint: got {type(config['checkpoint']).__name__}, expected an object"
    yield from _zero_faults(train, config.get("zero_optimization"))
    yield from _precision_faults(train, config)
    for key, value in derived.items():
        found = config[key]
        if found not in ("auto", value) or isinstance(found, bool):
            yield f'{key}: got {found!r}, expected "auto" or {value}, the recipe\'s'
    yield from _schema_faults(config, derived)


def _zero_faults(train: TrainSection, zero: Any) -> Iterator[str]:
    if not isinstance(zero, dict):
        yield f"zero_optimization: got {type(zero).__name__}, expected an object with stage"
        return
    stage, gather = zero.get("stage"), zero.get(_GATHER)
    if type(stage) is not int or stage not in (1, 2, 3):
        yield f"zero_optimization.stage: got {stage!r}, expected 1, 2 or 3"
    if stage == 3 and gather is not True:
        expected = "true: without it no weights can be written at the end"
        yield f"zero_optimization.{_GATHER}: got {gather!r}, expected {expected}"
    if stage == 3 and train.optimizer == "muon" and zero.get("reduce_scatter", True) is not False:
        yield "zero_optimization.reduce_scatter: got true, expected false: Muon needs whole gradients"
    for part in ("offload_optimizer", "offload_param"):
        section: Any = zero.get(part)
        device = section.get("device") if isinstance(section, dict) else None
        if device not in ("cpu", "nvme"):
            continue
        if not train.optimizer.startswith("adamw_torch"):  # either makes DeepSpeed's AdamW for the CPU the optimizer
            yield f"zero_optimization.{part}: got one with train.optimizer {train.optimizer}, expected none"
        if part == "offload_param" and stage != 3:
            yield f"zero_optimization.{part}: got one under stage {stage}, expected stage 3 or none"
        if device == "nvme" and not section.get("nvme_path"):
            yield f"zero_optimization.{part}.nvme_path: got nothing, expected a folder on the NVMe"


def _precision_faults(train: TrainSection, config: Mapping[str, Any]) -> Iterator[str]:
    from deepspeed.accelerator import get_accelerator

    precision = resolve_precision(train)
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise RecipeError("train.precision: got fp16, expected fp32 or auto: this device does not compute in it")
    for key in ("bf16", "fp16"):
        if precision == key and key not in config:
            yield f'{key}.enabled: got nothing, expected "auto"'
        section = config.get(key, {"enabled": False})
        enabled = section.get("enabled", False) if isinstance(section, dict) else section
        if not isinstance(section, dict) or not (enabled == "auto" or enabled is (precision == key)):
            expected = f'"auto" or {json.dumps(precision == key)}, because train.precision is {precision} here'
            yield f"{key}.enabled: got {enabled!r}, expected {expected}"


def _schema_faults(config: Mapping[str, Any], derived: Mapping[str, Any]) -> Iterator[str]:
    """Builds DeepSpeed's configuration objects for one rank, with every "auto" filled in as Trainer does."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    filled = copy.deepcopy(dict(config)) | dict(derived)
    filled["train_batch_size"] = derived[_MICRO_BATCH] * derived["gradient_accumulation_steps"]
    _fill_auto(filled)
    try:
        DeepSpeedConfig(filled)
    except (
        DeepSpeedConfigError,
        AssertionError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        yield f"got what DeepSpeed refuses: {_first_reason(error)}"


def _fill_auto(section: dict[str, Any]) -> None:
    for key, value in section.items():
        if isinstance(value, dict):
            _fill_auto(value)
        elif value == "auto":
            section[key] = False if key == "enabled" else 1_000_000


def _first_reason(error: Exception) -> str:
    """Returns in one line what DeepSpeed says; of pydantic's reports the key and the reason."""
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc']))}: got {fault['input']!r}: {fault['msg']}"
    return one_line(error)
