"""The recipe schema and its loader: YAML file and `a.b=c` overrides -> Recipe, or a one-line RecipeError."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from data.config import DataConfig, Files, shorten
from data.strict_yaml import YamlError, override, read_file
from models.stage_plan import StagePlan
from recipes.errors import LEARNED, ONE, SEVERAL, RecipeError, first_fault

__all__ = ["Phase", "Recipe", "RecipeError", "load_recipe", "read_yaml"]

GROUPS = ("projector", "vision_tower", "language_model")
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes
_MOST_STEPS, _MOST_SAMPLES = 10**9, 10**6  # more than any run needs, and small enough not to overflow


Optimizer = Literal[  # Trainer's elementwise optimizers: ZeRO flattens and splits weights
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "sgd",
    "muon",  # DeepSpeed's
]


def _checked_path(path: str) -> str:
    longest = max((len(os.fsencode(name)) for name in path.split("/")), default=0)
    if "\0" in path or longest > _LONGEST_NAME or len(os.fsencode(path)) > _LONGEST_PATH:
        raise ValueError(f"got {shorten(repr(path))}, expected a path that a file system can hold")
    return path


FilePath = Annotated[str, AfterValidator(_checked_path)]  # or a hub name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Distill(_Section):
    """Self-distillation: under one plan the model also learns from itself under another, without gradient.

    Attributes:
        teacher: name of the other plan.
        weight: factor of the Kullback-Leibler divergence on labelled positions, added to the loss.
    """

    teacher: str
    weight: float = Field(default=1.0, gt=0)


class NamedPlan(_Section):
    """One of several stage plans that a checkpoint is trained for.

    Attributes:
        name: selects the plan after training: `model.schedule = name`.
        weight: relative probability that an optimizer step runs under this plan.
        plan: fields of StagePlan; null is dense.
        distill: self-distillation from another plan; null: none.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    weight: float = Field(default=1.0, gt=0)
    plan: dict[str, Any] | None
    distill: Distill | None = None

    @property
    def stages(self) -> StagePlan | None:
        """The plan; None for dense."""
        return None if self.plan is None else StagePlan.from_dict(self.plan)


class Learn(_Section):
    """Search for the fusion window, in the first steps of the last phase.

    Attributes:
        budget: maximum visual token-layers, relative to the dense model; the window is the widest within it.
        steps: optimizer steps of the search; the run then continues with the window.
        update: as in StagePlan.
    """

    budget: float = Field(gt=0, lt=1)
    steps: int = Field(gt=0, le=_MOST_STEPS)
    update: Literal["full", "kv"] = "full"

    def width(self, num_layers: int) -> int:
        """Returns the number of layers of the window; 0 where the budget is below one layer."""
        return min(int(self.budget * num_layers + 1e-9), num_layers - 1)


class LearnedStages(_Section):
    """A stage plan that is found during training."""

    learn: Learn


def _kind_of_stages(stages: Any) -> str:
    if isinstance(stages, list):
        return SEVERAL
    return LEARNED if isinstance(stages, LearnedStages) or (isinstance(stages, dict) and "learn" in stages) else ONE


_OnePlan = Annotated[dict[str, Any], Tag(ONE)]
_SeveralPlans = Annotated[list[NamedPlan], Tag(SEVERAL)]
_LearnedPlan = Annotated[LearnedStages, Tag(LEARNED)]


class ModelSection(_Section):
    """The model that a run starts from, and its stage plan.

    Attributes:
        config: folder with config.json (LlavaConfig), the image processor and, unless `language_model` has one,
            the tokenizer. With a `checkpoint`, whose config takes precedence, it provides the shape for --check if the
            checkpoint is missing, and the processor if the checkpoint has none.
        checkpoint: checkpoint of any supported family to start from, a folder or a hub id.
        language_model: pretrained decoder, a folder or a hub id; null is random weights.
        vision_tower: pretrained vision tower, a folder or a hub id; null is random weights.
        stages: fields of StagePlan; null is dense. Or a list of named plans: each step draws one, and the first is the
            checkpoint's default. Or `{learn: ...}`: the last phase searches for the window, and the model is dense
            before.
    """

    config: FilePath | None = Field(default=None, min_length=1)
    checkpoint: FilePath | None = Field(default=None, min_length=1)
    language_model: FilePath | None = Field(default=None, min_length=1)
    vision_tower: FilePath | None = Field(default=None, min_length=1)
    stages: Annotated[_OnePlan | _SeveralPlans | _LearnedPlan, Discriminator(_kind_of_stages)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        if self.config is None and self.checkpoint is None:
            raise ValueError("got neither config nor checkpoint, expected at least one of them")
        if self.checkpoint and (self.language_model or self.vision_tower):
            raise ValueError(
                "got checkpoint with language_model or vision_tower, expected one or the other, "
                "because a checkpoint holds both"
            )
        if isinstance(self.stages, list):
            names = [one.name for one in self.stages]
            if len(set(names)) < max(2, len(names)):
                raise ValueError(f"stages: got plans named {names}, expected at least two, with different names")
            for one in self.stages:
                others = [name for name in names if name != one.name]
                if one.distill is not None and one.distill.teacher not in others:
                    found = one.distill.teacher
                    raise ValueError(f"stages: distill.teacher: got '{found}', expected one of {', '.join(others)}")
        for one in self.plans.values():
            if one.plan is not None:
                StagePlan.from_dict(one.plan)
        return self

    @property
    def plan_fields(self) -> dict[str, Any]:
        """Fields of the model's config: `stages`, those of the first plan, and `plans`, None if there is only one."""
        if isinstance(self.stages, list):
            return {"stages": self.stages[0].plan, "plans": {one.name: one.plan for one in self.stages}}
        return {"stages": self.plans["trained"].plan, "plans": None}

    @property
    def learn(self) -> Learn | None:
        """The search for the fusion window; None if the plan is fixed."""
        return self.stages.learn if isinstance(self.stages, LearnedStages) else None

    @property
    def plans(self) -> dict[str, NamedPlan]:
        """The plans by name; a single one is named `trained`, and is dense until a search has found it."""
        if isinstance(self.stages, list):
            return {one.name: one for one in self.stages}
        plan = None if isinstance(self.stages, LearnedStages) else self.stages
        return {"trained": NamedPlan(name="trained", plan=plan)}


class LearningRates(_Section):
    """Peak learning rate of each part of the model; null keeps the part frozen."""

    projector: float | None = Field(gt=0)
    vision_tower: float | None = Field(gt=0)
    language_model: float | None = Field(gt=0)

    @model_validator(mode="after")
    def _check(self) -> LearningRates:
        if not any(getattr(self, group) for group in GROUPS):
            raise ValueError("got null everywhere, expected a number for at least one part")
        return self


class Lora(_Section):
    """Low-rank adapters on Linear layers, trained in place of the full weights of these parts.

    Attributes:
        parts: which parts of the model have adapters.
        modules: names of their Linear layers, such as q_proj; null is all except the head.
        layers: layers of the language model: all, those with visual tokens under the plan (window), or numbers.
        dora, rslora: peft's variants of the same names.
        bits: QLoRA: quantises the frozen weights of the language model to 4 or 8 bits; null does not.
    """

    r: int = Field(default=128, gt=0)
    alpha: float = Field(default=256, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    parts: list[Literal["projector", "vision_tower", "language_model"]] = Field(["language_model"], min_length=1)
    modules: list[str] | None = Field(default=None, min_length=1)
    layers: Literal["all", "window"] | list[int] = "all"
    dora: bool = False
    rslora: bool = False
    bits: Literal[4, 8] | None = None

    @model_validator(mode="after")
    def _check(self) -> Lora:
        if isinstance(self.layers, list) and not self.layers:
            raise ValueError("layers: got an empty list, expected numbers of layers, window or all")
        if self.bits is not None and "language_model" not in self.parts:
            raise ValueError(f"bits: got {self.bits} without adapters on the language model, expected null")
        if self.layers != "all" and "language_model" not in self.parts:
            raise ValueError(f"layers: got {self.layers} without adapters on the language model, expected all")
        return self


class Profile(_Section):
    """A torch.profiler trace of the steps [first, last], of rank 0, in the run folder's `profile/`."""

    steps: list[int] = Field(min_length=2, max_length=2)

    @model_validator(mode="after")
    def _check(self) -> Profile:
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(f"steps: got {self.steps}, expected [first, last] with 1 <= first <= last")
        return self


class SparseAttention(_Section):
    """A penalty on instruction tokens that spread their attention over many visual tokens.

    Attributes:
        weight: factor of the spread, added to the loss; 0 only logs it. The spread is 1 for equal attention on all
            visual tokens and 0 for one alone. The penalty is the mean over layers and samples, of which those without
            an image count 0; the log has the mean over those with one.
    """

    weight: float = Field(ge=0)


class TrainSection(_Section):
    """How one phase trains.

    Attributes:
        global_batch: samples of one optimizer step, over all ranks and accumulation steps.
        per_device_batch: maximum samples of a forward pass on one rank; gradient accumulation follows from the two.
        tokens_per_step: approximate tokens of one optimizer step, over all ranks; the number of samples then varies,
            in `global_batch` / `per_device_batch` packed forward passes of nearly equal size, without padding. null: a
            step has `global_batch` samples.
        epochs: passes over the data; `max_steps` and `max_seconds` replace it where they are set.
        max_steps: optimizer steps.
        max_seconds: seconds of training; the learning rate then follows the clock, unless `max_steps` is set too.
        warmup_ratio: share of the run in which the learning rate rises from 0.
        layers: decoder layers [first, end) to train, without embeddings, head and final norm; null is everything.
        tower_layers: number of last layers of the vision tower to train, of those that are read; null is everything.
        optimizer: one of Optimizer.
        max_grad_norm: gradients are clipped to this norm; null does not clip.
        neftune: NEFTune's alpha, the noise on embedded text; null for none.
        sparse_attention: penalty that concentrates the instruction's attention on few visual tokens; null for none.
        precision: bf16, fp32, fp16 with loss scaling, or auto: bf16 if the hardware multiplies it natively, else fp32.
        tracker: where the log also goes: Weights & Biases, TensorBoard or nowhere. An align phase without it uses the
            recipe's.
        profile: steps to trace; null for none.
        save_steps: steps between two checkpoints; null saves only at the end.
    """

    deepspeed: FilePath = Field(min_length=1)
    learning_rate: LearningRates
    lora: Lora | None = None
    layers: list[int] | None = Field(default=None, min_length=2, max_length=2)
    tower_layers: int | None = Field(default=None, gt=0)
    optimizer: Optimizer = "adamw_torch_fused"
    neftune: float | None = Field(default=None, gt=0)
    sparse_attention: SparseAttention | None = None
    global_batch: int = Field(gt=0, le=_MOST_SAMPLES)
    per_device_batch: int = Field(gt=0, le=_MOST_SAMPLES)
    tokens_per_step: int | None = Field(default=None, gt=0, le=_MOST_STEPS)
    epochs: float = Field(default=1.0, gt=0, le=1_000_000)
    max_steps: int | None = Field(default=None, gt=0, le=_MOST_STEPS)
    max_seconds: float | None = Field(default=None, gt=0, le=_MOST_STEPS)
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["bf16", "fp16", "fp32", "auto"] = "bf16"
    gradient_checkpointing: bool = True
    save_steps: int | None = Field(default=None, gt=0, le=_MOST_STEPS)
    save_total_limit: int = Field(default=2, gt=0)
    log_steps: int = Field(default=1, gt=0, le=_MOST_STEPS)
    tracker: Literal["wandb", "tensorboard", "none"] = "wandb"
    profile: Profile | None = None

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        if self.global_batch % self.per_device_batch:
            raise ValueError(
                f"got global_batch {self.global_batch} with per_device_batch {self.per_device_batch}, "
                "expected a multiple of it"
            )
        for part in self.lora.parts if self.lora is not None else ():
            if getattr(self.learning_rate, part) is None:
                raise ValueError(f"got lora with learning_rate.{part} null, expected a number > 0, the adapters' rate")
        self._check_layers()
        if self.sparse_attention is not None and self.tokens_per_step is not None:
            raise ValueError("got sparse_attention with tokens_per_step, expected null: it is a mean over global_batch")
        if self.optimizer == "muon" and self.max_grad_norm is not None:
            raise ValueError(
                f"got max_grad_norm {self.max_grad_norm:g} with muon, expected null: DeepSpeed clips after Muon made "
                "each matrix's update, whose size the rate alone decides"
            )
        return self

    def _check_layers(self) -> None:
        adapted = self.lora.parts if self.lora is not None else []
        for key, part in (("layers", "language_model"), ("tower_layers", "vision_tower")):
            if getattr(self, key) is not None and (getattr(self.learning_rate, part) is None or part in adapted):
                reason = "adapters there: lora.layers" if part in adapted else f"learning_rate.{part} null"
                raise ValueError(f"got {key} with {reason}, expected {key} null")
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"layers: got {self.layers}, expected [first, end) with 0 <= first < end")


class EvalSection(_Section):
    """Validation while training.

    Attributes:
        files: held-out conversations, as `data.files`; null takes `share` of the training rows, which are then not
            trained on.
        share: share of the rows of `files`, or of the training rows.
        every: steps between two evaluations; one more follows the last step.
        metric: selects the best evaluation.
        patience: ends the run after this many evaluations without a better one; null never does.
        final: weights in `final/`: those of the last step, or of the best evaluation, whose checkpoint is kept.
    """

    files: Files | None = Field(default=None, min_length=1)
    share: float | None = Field(default=None, gt=0, lt=1)
    every: int = Field(default=200, gt=0, le=_MOST_STEPS)
    metric: Literal["loss", "accuracy"] = "loss"
    patience: int | None = Field(default=None, gt=0, le=_MOST_STEPS)
    final: Literal["last", "best"] = "last"

    @model_validator(mode="after")
    def _check(self) -> EvalSection:
        if self.files is None and self.share is None:
            raise ValueError("got neither files nor share, expected at least one of them")
        return self


class Align(_Section):
    """The alignment phase, under the same stage plan; LLaVA trains only the projector in it."""

    data: DataConfig
    train: TrainSection
    eval: EvalSection | None = None


class Phase(_Section):
    """One training run of a recipe: `align` and then `tune`, or a single `train`.

    `learn` is the search for the fusion window, set only in the last phase.
    """

    name: Literal["align", "tune", "train"]
    folder: Path
    plans: dict[str, NamedPlan]
    learn: Learn | None = None
    data: DataConfig
    train: TrainSection
    eval: EvalSection | None = None


class Recipe(_Section):
    """Everything about a run.

    Attributes:
        name: name of the run, also in Weights & Biases.
        seed: seed of random weights, data order and dropout.
        output: run folder.
        eval: validation of the last phase; null for none.
        align: alignment phase, run first by the same command; null for none.
    """

    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: FilePath = Field(min_length=1)
    model: ModelSection
    data: DataConfig
    train: TrainSection
    eval: EvalSection | None = None
    align: Align | None = None

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        for section in (self, self.align):
            if section and section.data.streaming and not (section.train.max_steps or section.train.max_seconds):
                raise ValueError("got data.streaming, expected train.max_steps or train.max_seconds beside it")
            if section and section.data.streaming and section.eval and section.eval.files is None:
                raise ValueError("got eval.share of a stream, expected eval.files: a stream is not read beforehand")
        if self.model.learn is not None:
            self._check_learn(self.model.learn)
        return self

    def _check_learn(self, learn: Learn) -> None:
        train = self.train
        for key, found, expected in (
            ("max_seconds", train.max_seconds, "null: a run that the clock ends may end before the window is found"),
            ("precision", "fp16" if train.precision == "fp16" else None, "bf16 or fp32: its scaled loss scales gates"),
        ):
            if found is not None:
                raise ValueError(f"train.{key}: got {found} with model.stages.learn, expected {expected}")
        for section in (self.train, self.align.train if self.align else None):
            if section and section.lora and section.lora.layers == "window":
                raise ValueError("got lora.layers window with model.stages.learn, expected all or numbers of layers")

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        if self._has_one_tracker:  # so that an override of train.tracker still reaches align when the dump is loaded
            fields["align"]["train"].pop("tracker", None)
        return fields

    @property
    def _has_one_tracker(self) -> bool:
        return self.align is not None and "tracker" not in self.align.train.model_fields_set

    @property
    def phases(self) -> list[Phase]:
        """The phases of this recipe in order; the last one writes into `output` itself."""
        folder = Path(self.output)
        last: Literal["train", "tune"] = "train" if self.align is None else "tune"
        plans = self.model.plans
        mine: dict[str, Any] = {"learn": self.model.learn, "data": self.data, "train": self.train, "eval": self.eval}
        phases = [Phase(name=last, folder=folder, plans=plans, **mine)]
        if self.align is not None:
            align, train = self.align, self.align.train
            if self._has_one_tracker:
                train = train.model_copy(update={"tracker": self.train.tracker})
            more: dict[str, Any] = {"data": align.data, "train": train, "eval": align.eval}
            first = Phase(name="align", folder=folder / "align", plans=plans, **more)
            phases.insert(0, first)
        return phases

    @property
    def plan(self) -> StagePlan | None:
        """The stage plan, the first of several; None for dense."""
        return next(iter(self.model.plans.values())).stages


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: YAML file.
        overrides: `dotted.key=value`, the value in YAML (`train.max_steps=20`, `model.stages=null`).

    Raises:
        RecipeError: one line: `file: key: got X, expected Y`.
    """
    raw = read_yaml(path)
    try:
        for given in overrides:
            override(raw, given, path)
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise first_fault(error, Recipe, path) from None
    except YamlError as error:
        raise RecipeError(str(error)) from None
    _check_depth(recipe, path)
    return recipe


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Returns the keys of a YAML file; raises RecipeError for one that cannot be read."""
    try:
        return read_file(path)
    except YamlError as error:
        raise RecipeError(str(error)) from None


def _check_depth(recipe: Recipe, path: str | Path) -> None:
    """Raises RecipeError for a plan with layers beyond the depth of the decoder in a local config.json."""
    folder = Path(recipe.model.config or recipe.model.checkpoint or "")
    file = folder / "config.json"
    if not file.is_file():
        if recipe.model.config is not None:
            raise RecipeError(f"{path}: model.config: got '{folder}', expected a folder with config.json")
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: model.config: {file} is not JSON: {error}") from None
    text = config.get("text_config", {}) if isinstance(config, Mapping) else {}
    depth = text.get("num_hidden_layers") if isinstance(text, Mapping) else None
    if not isinstance(depth, int):
        return
    for named in recipe.model.plans.values():
        try:
            if named.stages is not None:
                named.stages.check(depth)
        except ValueError as error:
            raise RecipeError(f"{path}: model.{error}") from None
