"""Trainer callbacks: checkpoints, stop requests, health checks, the console line, log.jsonl, trackers."""

from __future__ import annotations

import json
import math
import netrc
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from models.schedules import TRAINED
from recipes.schema import Profile
from train import distributed
from train.checkpoints import Progress, keep_newest, mark_complete, whole_checkpoints
from train.estimate import SEARCH, Estimate
from train.trainer import FusedTrainer
from train.window_search import PICTURE, PLAN, WindowSearch, apply_plan, draw_gates

_PLAIN_SECONDS: Final = 10  # between two lines where the output is no terminal
_ZERO_GRADIENT_STEPS: Final = 10  # with a gradient of exactly 0, although the batch had something to learn from
_HIGH_LOSS_STEPS: Final = 200  # with a loss above that of guessing every token alike
_IMAGELESS_STEPS: Final = 200  # without an image, while only the vision tower or the projector learns
_ANSWER_SECONDS: Final = 5.0  # that a tracker's server may take


class NothingToTrain(Exception):  # noqa: N818  # no error: it ends trainer.train() before the first step
    """The run is at its last step already."""


class Health:
    """Detects a model that no longer learns, which would otherwise train to the end unnoticed.

    Args:
        vocabulary: size of the vocabulary.
        warmup_steps: steps at the start in which the loss may be high.
        total_steps: of the run; None if its end is not known.
        needs_images: only the vision tower or the projector learn, so a step without images has no gradient.
    """

    def __init__(self, *, vocabulary: int, warmup_steps: int, total_steps: int | None, needs_images: bool) -> None:
        self._guess = math.log(vocabulary)
        self._warmup, self._needs_images = warmup_steps, needs_images
        self._imageless_limit = min(_IMAGELESS_STEPS, total_steps or _IMAGELESS_STEPS)
        self._zero_gradient_steps = self._high_loss_steps = self._imageless_steps = 0  # steps in a row

    def fault(self, *, step: int, norm: float | None, loss: float, had_images: bool) -> str | None:
        """Returns what is wrong after a step, or None; `norm` is the gradient's, None where it is not known."""
        if norm is not None and not math.isfinite(norm):
            return "the gradient is nan or infinite"
        lacks_images = self._needs_images and not had_images
        if not lacks_images:
            self._zero_gradient_steps = self._zero_gradient_steps + 1 if norm == 0.0 else 0
        self._imageless_steps = self._imageless_steps + 1 if lacks_images else 0
        self._high_loss_steps = self._high_loss_steps + 1 if step > self._warmup and loss > self._guess else 0
        if self._zero_gradient_steps >= _ZERO_GRADIENT_STEPS:
            return f"the gradient was exactly 0 in {_ZERO_GRADIENT_STEPS} consecutive steps; lower the learning rates"
        if self._imageless_steps >= self._imageless_limit:
            return (
                f"got no image in {self._imageless_limit} consecutive steps, expected some: "
                "train.learning_rate.language_model is null, and the other parts learn from images only"
            )
        if self._high_loss_steps >= _HIGH_LOSS_STEPS:
            return (
                f"the loss was above {self._guess:.2f}, the loss of random guessing, in {_HIGH_LOSS_STEPS} consecutive "
                "steps; lower the learning rates"
            )
        return None


class RunCallback(TrainerCallback):
    """Keeps a run safe: order of the epoch, agreed stop, health of the model, checkpoints marked when whole."""

    def __init__(self, trainer: FusedTrainer, health: Health, *, is_trained: bool, is_resharded: bool) -> None:
        self._trainer, self._health = trainer, health
        self._is_trained, self._is_resharded = is_trained, is_resharded

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock: the model is loaded.

        Raises:
            NothingToTrain: the checkpoint that was loaded is of the last step; Trainer would make one step more.
        """
        state.logging_steps, state.save_steps = int(args.logging_steps), int(args.save_steps)  # not the checkpoint's
        if self._is_resharded:
            self._trainer.restore_groups()
        if self._trainer.validation is not None:
            state.eval_steps = int(args.eval_steps or 0)
            is_due = self._is_trained or self._trainer.validation.is_due(state.global_step)
            done = {line["step"] for line in state.log_history if "eval_loss" in line}
            if is_due and state.global_step not in done:
                self._trainer.evaluate_late()
        if self._is_trained or self._trainer.is_stalled:
            raise NothingToTrain
        self._trainer.clock.start()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Sets the epoch of the order, which a resumed loader of several ranks does not pass on."""
        order = self._trainer.order
        if order is not None:
            order.set_epoch(state.global_step // order.steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the run on request, at the time limit, or where data or model are at fault; it is saved where it can."""
        trainer = self._trainer
        if trainer.too_many_faults:
            trainer.save_now()
            raise trainer.failure(trainer.too_many_faults)
        norm = trainer.deepspeed.get_global_grad_norm()
        is_skipped = args.fp16 and trainer.deepspeed.optimizer.overflow  # the loss was scaled too high: it gets lower
        fault = self._health.fault(
            step=state.global_step,
            norm=None if norm is None or is_skipped else float(norm),
            loss=trainer.last_step["loss"],
            had_images=trainer.last_step["image_labels"] > 0,
        )
        if fault is not None:
            raise trainer.failure(fault)
        limit = trainer.phase.train.max_seconds
        is_over = state.global_step >= state.max_steps or (limit is not None and trainer.clock.synced_seconds >= limit)
        if is_over:
            control.should_log = True
            control.should_evaluate = trainer.validation is not None
        if is_over or trainer.is_stopping:
            control.should_save = control.should_training_stop = True
        if trainer.is_stopping:  # a stop does not wait for it: the same command makes up for it
            control.should_evaluate = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends a run whose evaluations no longer get better, with a checkpoint."""
        if self._trainer.is_stalled and not control.should_training_stop:
            distributed.print_rank0(f"step {state.global_step}: eval.patience is over without a better evaluation")
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Marks the checkpoint as whole once every rank has written its part, then deletes older ones."""
        trainer = self._trainer
        faults = trainer.watch.all_faults()
        distributed.barrier()
        if distributed.rank() == 0:
            progress = Progress(
                step=state.global_step,
                seconds=trainer.clock.synced_seconds,
                samples=trainer.metrics.samples,
                tokens=trainer.metrics.tokens,
                visual=trainer.metrics.visual,
                ranks=distributed.world_size(),
                window=trainer.metrics.window(),
                fingerprints=trainer.fingerprints,
                faults=faults,
                search={} if trainer.search is None else trainer.search.state(),
            )
            folder = trainer.phase.folder / f"checkpoint-{state.global_step}"
            if folder not in whole_checkpoints(trainer.phase.folder):
                mark_complete(folder, progress)
            best = state.best_global_step if trainer.keeps_best else None
            keep_newest(trainer.phase.folder, trainer.phase.train.save_total_limit, best=best)
        distributed.barrier()


class LogCallback(TrainerCallback):
    """Writes log.jsonl, one object a log line, and the console's line: loss, tokens/s, time left."""

    def __init__(self, file: Path, *, limit_seconds: float | None, progress: Progress) -> None:
        self._file, self._limit = file, limit_seconds
        self._bar: tqdm[Any] | None = None
        self._first_step, self._first_seconds = progress.step, progress.seconds
        self._printed = -math.inf
        if distributed.rank() == 0:
            # the lines after the step that the run goes on from will be written again
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._keep(lambda line: 0 <= _step_of_line(line) <= progress.step)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the bar: in seconds where the clock ends the run, else in steps."""
        if state.is_world_process_zero and sys.stderr.isatty():
            form = "{percentage:3.0f}%|{bar}| {postfix}"
            self._bar = tqdm(total=self._limit or state.max_steps, bar_format=form, dynamic_ncols=True)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Writes one log line."""
        if not state.is_world_process_zero or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        # the step that the run goes on from is the only one whose evaluation may be written already, and is made again
        if "eval_loss" in logs and state.global_step == self._first_step:
            self._keep(lambda line: not ("eval_loss" in line and _step_of_line(line) == state.global_step))
        with self._file.open("a", encoding="utf-8") as file:
            unknown = {"mfu": None} if "loss" in logs else {}
            file.write(json.dumps({"step": state.global_step, **unknown, **logs}) + "\n")
        if "eval_loss" in logs:
            exact = f"  exact answers {logs['eval_accuracy']:.1%}" if "eval_accuracy" in logs else ""
            _print_above_bar(f"step {state.global_step}  validation loss {logs['eval_loss']:.4f}{exact}")
            return
        line = self._line(state, logs)
        if self._bar is not None:
            done = logs["seconds"] if self._limit else state.global_step
            self._bar.n = min(done, self._bar.total)
            self._bar.set_postfix_str(line)
        elif time.monotonic() - self._printed > _PLAIN_SECONDS or control.should_training_stop:
            self._printed = time.monotonic()
            print(line, flush=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, state: TrainerState, logs: Mapping[str, float]) -> str:
        if self._limit:
            steps, left = "", max(0.0, self._limit - logs["seconds"])
        else:
            done, passed = state.global_step - self._first_step, logs["seconds"] - self._first_seconds
            steps, left = f"/{state.max_steps}", (state.max_steps - state.global_step) * passed / max(done, 1)
        speed = f"{logs['tokens_per_second']:,.0f} tokens/s"
        return f"step {state.global_step}{steps}  loss {logs['loss']:.4f}  {speed}  {format_duration(left)} left"

    def _keep(self, is_kept: Callable[[str], bool]) -> None:
        """Drops the other lines of the file."""
        lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines() if self._file.is_file() else []
        self._file.write_text("".join(f"{line}\n" for line in lines if is_kept(line)), encoding="utf-8")


class SearchCallback(TrainerCallback):
    """Updates the window search after each step, and applies the stage plan that it finds to the model.

    Must follow LogCallback, because it plots the lines that LogCallback writes. `estimate` switches to the costs of the
    current stage; None on ranks that do not log.
    """

    def __init__(self, trainer: FusedTrainer, search: WindowSearch, estimate: Estimate | None) -> None:
        self._trainer, self._search, self._estimate = trainer, search, estimate
        if search.plan is not None:  # a run that goes on
            apply_plan(trainer.model, search.plan)
        self._count()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the search after its last step: from here on the model and its checkpoints have the plan."""
        if self._search.plan is None:
            plan = self._search.end_step(state.global_step)
            if plan is not None:
                apply_plan(self._trainer.model, plan)
                control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        """Writes the plan and the picture of the gates after the last log line of the search."""
        if not state.is_world_process_zero or "window_weight" not in (logs or {}):
            return
        self._count()
        folder = self._trainer.phase.folder
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        draw_gates([json.loads(line) for line in lines], folder / PICTURE)
        (folder / PLAN).write_text(json.dumps(self._search.found.to_dict()) + "\n", encoding="utf-8")
        _print_above_bar(f"step {state.global_step}: {self._search.summary()}; {folder / PLAN}")

    def _count(self) -> None:
        if self._estimate is not None:
            self._estimate.count_only(SEARCH if self._search.plan is None else TRAINED)


class ProfileCallback(TrainerCallback):
    """Writes a torch.profiler trace of some steps, for Perfetto or chrome://tracing."""

    def __init__(self, profile: Profile, folder: Path) -> None:
        self._first, self._last = profile.steps
        self._folder = folder
        self._profiler: torch.profiler.profile | None = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts with the first of the steps."""
        if self._profiler is None and state.global_step + 1 == self._first:
            self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes the trace after the last of the steps, or after the run's."""
        if self._profiler is None or not (state.global_step >= self._last or control.should_training_stop):
            return
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._folder / f"steps-{self._first}-{state.global_step}.json"))
        self._profiler, self._first = None, 0  # once


def format_duration(seconds: float) -> str:
    """Returns hours, minutes and seconds as 102:03:04."""
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _print_above_bar(line: str) -> None:
    """Prints a line above the bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def _step_of_line(line: str) -> int:
    """Returns the step of a log line; -1 for one that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def start_tracking(tracker: str, name: str, folder: Path) -> None:
    """Opens the Weights & Biases run of transformers' callback, on rank 0; does nothing for other trackers.

    The run is offline unless the user is logged in and the server responds within five seconds. Never prompts.
    """
    if tracker != "wandb":
        return
    os.environ["WANDB_DIR"] = str(folder)  # no ./wandb folder, which would pass for the package
    os.environ.setdefault("WANDB_SILENT", "true")
    project = os.environ.setdefault("WANDB_PROJECT", "fused-llava")
    if "WANDB_MODE" not in os.environ and not _is_logged_in():
        os.environ["WANDB_MODE"] = "offline"
    if distributed.rank() != 0:
        return
    if os.environ.get("WANDB_MODE", "online") in ("online", "shared", "run") and not _is_reachable():
        print("Weights & Biases cannot be reached: this run is logged offline", flush=True)
        os.environ["WANDB_MODE"] = "offline"
    import wandb  # slow to import, and only rank 0 needs it

    try:
        wandb.init(project=project, name=name, settings=wandb.Settings(init_timeout=5))
    except (wandb.Error, OSError, ValueError) as error:
        print(f"Weights & Biases failed to start ({error}): this run is logged offline", flush=True)
        os.environ["WANDB_MODE"] = "offline"
        wandb.init(project=project, name=name, mode="offline")


def stop_tracking(tracker: str) -> None:
    """Closes the Weights & Biases run."""
    if tracker == "wandb" and distributed.rank() == 0:
        import wandb

        wandb.finish()


def _is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _is_reachable() -> bool:
    """Returns whether the server responds with any status, through the proxy if one is set."""
    reached = threading.Event()
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=_ANSWER_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError):
            return
        reached.set()

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit
    asking.start()
    asking.join(_ANSWER_SECONDS)
    return reached.is_set()
