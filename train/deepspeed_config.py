"""The DeepSpeed configuration of a phase: read, and checked by DeepSpeed's schema before anything starts."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from recipes.errors import RecipeError
from recipes.schema import TrainSection
from train.errors import one_line
from train.precision import resolve_precision

# Sections that would train something else than the recipe says, or that the recipe's checkpoints do not know.
_REFUSED: Final = {
    "optimizer": "the recipe's learning rates, one for each part of the model, decide",
    "scheduler": "train.scheduler decides",
    "amp": "train.precision decides",
    "tensor_parallel": "models are split by ZeRO alone",
    "pipeline": "models are split by ZeRO alone",
    "sequence_parallel_size": "sequences are not split",
    "curriculum_learning": "the recipe's seed decides the order of the data",
    "data_efficiency": "the recipe's seed decides the order of the data",
    "compression_training": "the model is trained as it is",
    "progressive_layer_drop": "the stage plan decides which layers run",
}
_GATHER: Final = "stage3_gather_16bit_weights_on_model_save"


def read_deepspeed(train: TrainSection) -> dict[str, Any]:
    """Returns the DeepSpeed configuration that a phase names.

    Raises:
        RecipeError: the file is no JSON object.
    """
    try:
        config = json.loads(Path(train.deepspeed).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"train.deepspeed: got '{train.deepspeed}', expected a JSON file ({one_line(error)})"
        ) from error
    if not isinstance(config, dict):
        _refuse(train, "", f"got {type(config).__name__}, expected an object with zero_optimization")
    return config


def deepspeed_fingerprint(config: Mapping[str, Any]) -> str:
    """Returns a digest of a configuration's content, whatever the layout of its file."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def check_deepspeed(train: TrainSection, *, per_device_batch: int, accumulation: int, num_ranks: int) -> None:
    """Raises RecipeError when DeepSpeed would refuse the configuration, or train something else than the recipe says.

    Args:
        train: the phase.
        per_device_batch: samples of one forward pass on one rank.
        accumulation: forward passes of one step on one rank.
        num_ranks: ranks of the run.
    """
    config = read_deepspeed(train)
    for key, reason in _REFUSED.items():
        if key in config:
            _refuse(train, key, f"got a value, expected none: {reason}")
    _check_zero(train, config)
    _check_precision(train, config)
    derived = {
        "train_micro_batch_size_per_gpu": per_device_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": per_device_batch * accumulation * num_ranks,
        "gradient_clipping": train.max_grad_norm or 0.0,
    }
    for key, value in derived.items():
        if key not in config and key == "train_micro_batch_size_per_gpu":
            _refuse(train, key, 'got nothing, expected "auto"')
        if config.get(key, "auto") not in ("auto", value) or isinstance(config.get(key), bool):
            _refuse(train, key, f'got {config[key]!r}, expected "auto" or {value}, the recipe\'s')
    _ask_deepspeed(train, config, derived)


def _check_zero(train: TrainSection, config: Mapping[str, Any]) -> None:
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        _refuse(train, "zero_optimization", f"got {type(zero).__name__}, expected an object with stage")
    stage = zero.get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        _refuse(train, "zero_optimization.stage", f"got {stage!r}, expected 1, 2 or 3")
    if stage == 3 and zero.get(_GATHER) is not True:
        _refuse(
            train,
            f"zero_optimization.{_GATHER}",
            f"got {zero.get(_GATHER)!r}, expected true: without it no weights can be written at the end",
        )
    if stage == 3 and train.optimizer == "muon" and zero.get("reduce_scatter", True) is not False:
        _refuse(train, "zero_optimization.reduce_scatter", "got true, expected false: Muon needs whole gradients")
    for part in ("offload_optimizer", "offload_param"):
        section = zero.get(part)
        if section and part == "offload_optimizer" and not train.optimizer.startswith("adamw_torch"):
            _refuse(
                train, f"zero_optimization.{part}", f"got one with train.optimizer {train.optimizer}, expected none"
            )
        if isinstance(section, dict) and section.get("device") == "nvme" and not section.get("nvme_path"):
            _refuse(train, f"zero_optimization.{part}.nvme_path", "got nothing, expected a folder on the NVMe")


def _check_precision(train: TrainSection, config: Mapping[str, Any]) -> None:
    from deepspeed.accelerator import get_accelerator

    precision = resolve_precision(train)
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise RecipeError("train.precision: got fp16, expected fp32 or auto: this device does not compute in it")
    for key, here in (("bf16", precision == "bf16"), ("fp16", precision == "fp16")):
        if here and key not in config:
            _refuse(train, f"{key}.enabled", 'got nothing, expected "auto"')
        section = config.get(key, {"enabled": False})
        enabled = section.get("enabled", False) if isinstance(section, dict) else section
        if not isinstance(section, dict) or not (enabled == "auto" or enabled is here):
            said = f'"auto" or {json.dumps(here)}, because train.precision is {precision} here'
            _refuse(train, f"{key}.enabled", f"got {enabled!r}, expected {said}")


def _ask_deepspeed(train: TrainSection, config: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    """Builds DeepSpeed's configuration objects for one rank, with every "auto" filled in as Trainer does."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    filled = copy.deepcopy(dict(config)) | dict(derived)
    filled["train_batch_size"] = derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"]
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
        _refuse(train, "", f"got what DeepSpeed refuses: {_first_reason(error)}")


def _fill_auto(section: dict[str, Any]) -> None:
    for key, value in section.items():
        if isinstance(value, dict):
            _fill_auto(value)
        elif value == "auto":
            section[key] = False if key == "enabled" else 1_000_000


def _first_reason(error: Exception) -> str:
    """Returns in one line what DeepSpeed says; of pydantic's reports the key and the reason."""
    faults = getattr(error, "errors", None)
    if callable(faults):
        fault = faults()[0]
        return f"{'.'.join(map(str, fault['loc']))}: got {fault['input']!r}: {fault['msg']}"
    return one_line(error)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refuse(train: TrainSection, key: str, words: str) -> NoReturn:
    where = f"{train.deepspeed}: {key}" if key else train.deepspeed
    raise RecipeError(f"train.deepspeed: {where}: {words}")
