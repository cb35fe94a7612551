"""A Trainer with learning rates per part, a fixed data order, stage plans, a training clock and synchronised ranks."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from data.token_batches import TokenBatches
from models.batch_facts import IGNORE_INDEX, next_labels
from models.schedules import AttentionSpread, Gated, Schedule, plan_schedule
from recipes.schema import Distill, NamedPlan, Phase
from train.arguments import is_timed
from train.checkpoints import whole_checkpoints
from train.errors import TrainingError
from train.extensions import build_cpu_adam
from train.metrics import Clock, DataWatch, TrainMetrics
from train.parameters import base_of, muon_groups, parameter_groups
from train.samples import WholeBatches
from train.stop import StopRequest, ignore_signals
from train.window_search import WindowSearch


class FusedTrainer(Trainer):
    """Trains one phase of a recipe.

    Attributes:
        order: the order of the samples; None for a stream, which has one.
        clock: training time, agreed between the ranks once a step.
        plans: which stage plan each step runs under; None: the model's.
        search: the search for the stage plan; None without one.
        validation: the held-out samples (Validation); None without.
        fingerprints: what checkpoints say about the run.
        last_step: sums of the last step over all ranks, by name.
        is_stopping: some rank was asked to stop; the same on every rank.
        too_many_faults: why the run ends after this step: rows that could not be read; else nothing.
        keeps_best: the checkpoint of the best evaluation is kept, and `final/` is made from it.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(  # noqa: PLR0913  # the parts of a run
        self,
        *,
        phase: Phase,
        order: WholeBatches | TokenBatches | None,
        clock: Clock,
        metrics: TrainMetrics,
        watch: DataWatch,
        search: WindowSearch | None,
        validation: Any,
        stop: StopRequest,
        fingerprints: Mapping[str, str],
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_dataset=None if validation is None else validation.samples, **kwargs)
        self.phase, self.order, self.clock, self.metrics, self.watch = phase, order, clock, metrics, watch
        self.search, self.validation, self.stop, self.fingerprints = search, validation, stop, fingerprints
        self.plans = PlanDraw(phase.plans, self.args.seed) if len(phase.plans) > 1 else None
        self.last_step: dict[str, float] = {}
        watch.watch_loss(self.model)
        self.is_stopping, self.too_many_faults = False, ""
        self.keeps_best = phase.eval is not None and phase.eval.final == "best"
        self._shared: tuple[Tensor, Any] | None = None  # values on their way between the ranks
        self._group_settings: list[dict[str, Any]] = []

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns this rank's share of the forward passes, in the recipe's order."""
        batches: dict[str, Any] = {"batch_size": self.args.per_device_train_batch_size, "sampler": self.order}
        if isinstance(self.order, TokenBatches):
            batches = {"batch_sampler": self.order.of_rank(self.args.process_index, self.args.world_size)}
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            **batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available(),
        )
        # of a stream, and of passes by tokens, this is the rank's share
        return self.accelerator.prepare(loader) if isinstance(self.order, WholeBatches) else loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Returns this rank's share of the held-out samples."""
        return self.validation.loader(self.data_collator, batch=self.args.per_device_train_batch_size)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[None, None, None]:
        """Adds a held-out batch to the sums of the evaluation."""
        inputs, gates = self._prepare_inputs(inputs), self._gates()
        self.validation.add(model, inputs if gates is None else {**inputs, "schedule": gates})
        return None, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Returns the held-out loss and accuracy of all ranks; training time stands still meanwhile."""
        with self.clock.paused(), self.watch.paused():
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics.update(self.validation.report())
        return output

    def evaluate_late(self) -> None:
        """Makes the evaluation that a stop request left out; the next checkpoint holds its result."""
        self.control.should_evaluate = True
        none = torch.zeros((), device=self.args.device)
        self._maybe_log_save_evaluate(none, None, self.model, None, 0.0, None, 0.0)
        self.control.should_evaluate = self.control.should_save = False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns the recipe's optimizer over its groups; DeepSpeed's AdamW where the states are kept on the CPU."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        decayed, decay = self.get_decay_parameter_names(model), self.args.weight_decay
        groups = parameter_groups(model, self.phase.train.learning_rate, decayed=decayed, weight_decay=decay)
        chosen, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        adam = {"betas": options.get("betas"), "eps": options.get("eps")}
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.hf_ds_config.is_offload():
            build_cpu_adam()
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            chosen, options = DeepSpeedCPUAdam, adam
        elif self.phase.train.optimizer == "muon":
            from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

            chosen, options, groups = MuonWithAuxAdam, {}, muon_groups(model, groups, **adam)
        self.optimizer = chosen(groups, **options)
        self._group_settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        return self.optimizer

    def restore_groups(self) -> None:
        """Gives each group of parameters its rates and step count back after a converted checkpoint was loaded.

        DeepSpeed's loading of a universal checkpoint under ZeRO-3 gives the first group's settings to all groups, and
        one step count, as one tensor, which every group would then raise.
        """
        for state in self.deepspeed.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        rates = self.lr_scheduler.get_last_lr()
        for group, settings, rate in zip(self.optimizer.param_groups, self._group_settings, rates, strict=True):
            group.update(settings, initial_lr=settings["lr"], lr=rate)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Returns transformers' scheduler over steps, or one that follows the clock."""
        train = self.phase.train
        if not is_timed(train) or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        limit = train.max_seconds or math.inf
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda _: rate_factor(train.scheduler, self.clock.synced_seconds / limit, warmup=train.warmup_ratio),
        )
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of one forward pass; the last one of a step starts the synchronisation of the ranks."""
        self.watch.take(inputs)
        schedule, distill = self._schedule()
        measure = None
        if self.phase.train.sparse_attention is not None:
            schedule = measure = AttentionSpread(schedule or base_of(self.model).schedule)
        if schedule is not None:
            inputs = {**inputs, "schedule": schedule}
        loss, distilled = self._losses(model, inputs, num_items_in_batch, distill)
        part = loss.detach() / self.accelerator.num_processes  # Trainer scaled it for the mean over ranks
        spread = None if measure is None else measure.mean()
        self.metrics.add(inputs, part, items=1 if num_items_in_batch is None else num_items_in_batch, spread=spread)
        if self.accelerator.sync_gradients:
            self._start_sync()
        if self.phase.train.sparse_attention is not None and spread is not None:
            # this pass' part of the penalty, the mean over the global batch
            weight = self.phase.train.sparse_attention.weight / self.phase.train.global_batch
            loss = loss + self.accelerator.num_processes * weight * spread[0].sum()
        return loss if distilled is None else loss + distilled

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss of one forward and backward pass; the last one of a step completes the synchronisation.

        Raises:
            TrainingError: the loss of any rank is not a number, or infinite.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        if self._shared is not None:
            self._end_sync(*self._shared)
            self._shared = None
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds seconds, samples, tokens and every group's learning rate to what Trainer logs."""
        if "loss" in logs or "eval_loss" in logs:
            logs["seconds"] = round(self.clock.synced_seconds, 3)
        if "loss" in logs:
            logs.update(self.metrics.report(self.clock.synced_seconds))
            logs.update(self.watch.report())
            if self.search is not None and self.state.global_step <= self.search.learn.steps:
                logs.update(self.search.report(self.state.global_step))
            rates = self.phase.train.learning_rate.model_dump()
            factor = logs["learning_rate"] / self.optimizer.param_groups[0]["initial_lr"]
            logs.update({f"learning_rate_{name}": rate * factor for name, rate in rates.items() if rate})
        super().log(logs, start_time)

    @property
    def is_stalled(self) -> bool:
        """Whether the run ends because its evaluations no longer get better; those of a search do not count."""
        first = 0 if self.search is None else self.search.learn.steps
        history = [line for line in self.state.log_history if line["step"] >= first]
        return self.validation is not None and self.validation.is_stalled(history)

    def failure(self, what: str, *, step: int | None = None) -> TrainingError:
        """Returns the error of a run that cannot go on, with the checkpoint to go back to."""
        good = whole_checkpoints(self.phase.folder)
        last = f"last good checkpoint: {good[-1]}" if good else "no checkpoint was written before"
        return TrainingError(f"step {self.state.global_step if step is None else step}: {what}; {last}")

    def save_now(self) -> None:
        """Writes a checkpoint of the last whole step, unless there is one; every rank calls it."""
        if self.state.global_step > 0:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint of the last step, unless a whole one is there: a kill while it is rewritten loses it."""
        step, folder = self.state.global_step, self.phase.folder / f"checkpoint-{self.state.global_step}"
        if folder not in whole_checkpoints(self.phase.folder):
            super()._save_checkpoint(model, trial)
        elif self.state.best_global_step == step:  # by an evaluation after the checkpoint
            self.state.best_model_checkpoint = str(folder)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if self._gates() is not None:  # not of the model that is trained
            return False
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.keeps_best:
            self.control.should_save = True
        return is_best

    def _schedule(self) -> tuple[Schedule | None, Distill | None]:
        """Returns what the current step runs under, None: the model's; and what it learns from another plan."""
        if self.plans is None:
            return self._gates(), None
        plan = self.plans.of_step(self.state.global_step)
        return self.plans.schedule(plan.name), plan.distill

    def _gates(self) -> Gated | None:
        """Returns the gates of the current step while the search for the stage plan goes on."""
        if self.search is None or self.search.plan is not None:
            return None
        return self.search.schedule(self.state.global_step, self.args.device)

    def _losses(
        self, model: nn.Module, inputs: dict[str, Any], items: Tensor | int | None, distill: Distill | None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the loss on the labels, and what is added where the step's plan learns from another one."""
        if distill is None or self.plans is None:
            return super().compute_loss(model, inputs, num_items_in_batch=items), None
        inputs = {**inputs, "logits_to_keep": predicting(inputs["labels"])}
        # first, so that what DeepSpeed knows of the last forward is the one with a backward
        with torch.no_grad(), self.watch.paused():
            teacher = model(**{**inputs, "schedule": self.plans.schedule(distill.teacher)}).logits
        loss, output = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
        scale = self.accelerator.num_processes / (len(teacher) if items is None else items)
        return loss, scale * divergence(output.logits, teacher, distill)

    def _start_sync(self) -> None:
        """Shares between the ranks, in one message: stop requests, seconds on rank 0, bad rows, sums of the step.

        Nothing waits for it here: it is on its way while backward and optimizer run.
        """
        seconds = self.clock.seconds() if self.args.process_index == 0 else 0.0
        given = torch.tensor([float(self.stop.is_requested()), seconds, len(self.watch.faults)], dtype=torch.float64)
        device = self.args.device
        values = torch.cat([given.to(device, non_blocking=True), self.metrics.take_step().to(device)])
        self._shared = values, dist.all_reduce(values, async_op=True) if dist.is_initialized() else None

    def _end_sync(self, values: Tensor, work: Any) -> None:
        if work is not None:
            work.wait()
        stopping, self.clock.synced_seconds, bad_rows, *sums = values.tolist()
        self.is_stopping = self.is_stopping or stopping > 0
        self.last_step = self.metrics.end_step(sums)
        self.too_many_faults = self.watch.excess([bad_rows])
        if not math.isfinite(self.last_step["loss"]):
            raise self.failure("the loss is nan or infinite", step=self.state.global_step + 1)


class PlanDraw:
    """Draws a plan for each optimizer step, with the recipe's weights.

    The draw depends on seed and step alone, so it is the same on all ranks, in all forward passes of a step and in a
    resumed run.
    """

    def __init__(self, plans: Mapping[str, NamedPlan], seed: int) -> None:
        self.seed, self.plans = seed, dict(plans)
        self._weights = [plan.weight for plan in plans.values()]

    def of_step(self, step: int) -> NamedPlan:
        """Returns the plan of a step, counted from 0."""
        return random.Random(f"{self.seed} {step}").choices(list(self.plans.values()), self._weights)[0]

    def schedule(self, name: str) -> Schedule:
        """Returns a plan as a schedule."""
        return plan_schedule(self.plans[name].stages)


def predicting(labels: Tensor) -> Tensor:
    """Returns (B, S) bool, the positions whose next token is labelled."""
    return next_labels(labels) != IGNORE_INDEX


def divergence(student: Tensor, teacher: Tensor, distill: Distill) -> Tensor:
    """Returns the weighted sum over rows of KL(teacher || student), of logits (R, vocabulary)."""
    student, teacher = student.float().log_softmax(dim=-1), teacher.float().log_softmax(dim=-1)
    return distill.weight * torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)


def rate_factor(kind: str, share: float, *, warmup: float) -> float:
    """Returns the learning rate as a share of its peak, after a `share` of the run, of which the first is `warmup`.

    Source: transformers.get_scheduler's cosine, linear and constant schedules, over time in place of steps.
    """
    share = min(share, 1.0)
    if share < warmup:
        return share / warmup
    left = (1.0 - share) / (1.0 - warmup)
    return {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[kind]
