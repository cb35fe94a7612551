"""What happens beside the training steps: the console line, log.jsonl, Weights & Biases, checkpoints, stopping."""

from __future__ import annotations

import json
import math
import netrc
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from torch import distributed
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train import ranks
from train.checkpoints import Progress, keep_newest, mark
from train.trainer import FusedTrainer

_PLAIN_SECONDS: Final = 10  # between two lines where the output is no terminal


class RunCallback(TrainerCallback):
    """Keeps a run safe: order of the epoch, agreed stop, finite gradients, checkpoints marked when whole."""

    def __init__(self, trainer: FusedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock: the model is loaded."""
        self._trainer.clock.start()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Sets the epoch of the order, which a resumed loader of several ranks does not pass on."""
        order = self._trainer.order
        if order is not None:
            order.set_epoch(state.global_step // order.steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stops after SIGTERM with a checkpoint, and at the time limit without one."""
        trainer = self._trainer
        norm = trainer.deepspeed.get_global_grad_norm()
        if norm is not None and not math.isfinite(float(norm)):
            raise trainer.failure("the gradient is nan or infinite", step=state.global_step)
        if trainer.is_stopping:
            control.should_save = control.should_training_stop = True
        limit = trainer.phase.train.max_seconds
        if limit is not None and trainer.clock.agreed >= limit:
            control.should_training_stop = True
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Marks the checkpoint as whole once every rank has written its part, then deletes older ones."""
        trainer = self._trainer
        sums = trainer.tally.totals()
        distributed.barrier()
        if state.is_world_process_zero:
            folder = trainer.phase.folder / f"checkpoint-{state.global_step}"
            progress = Progress(
                step=state.global_step,
                seconds=trainer.clock.agreed,
                samples=sums[0],
                tokens=sums[1],
                ranks=ranks.count(),
            )
            mark(folder, progress)
            keep_newest(trainer.phase.folder, trainer.phase.train.save_total_limit)
        distributed.barrier()


class LogCallback(TrainerCallback):
    """Writes log.jsonl, one object a log line, and the console's line: loss, tokens/s, time left."""

    def __init__(self, file: Path, *, limit_seconds: float | None, resumed_step: int) -> None:
        self._file, self._limit = file, limit_seconds
        self._bar: tqdm[Any] | None = None
        self._first_step, self._first_seconds = resumed_step, 0.0
        self._printed = -math.inf
        self._restart(resumed_step)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the bar: in seconds where the clock ends the run, else in steps."""
        if state.is_world_process_zero and sys.stderr.isatty():
            total = self._limit or state.max_steps
            form = "{percentage:3.0f}%|{bar}| {postfix}"
            self._bar = tqdm(total=total, bar_format=form, dynamic_ncols=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Writes one log line."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
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

    def _line(self, state: TrainerState, logs: dict[str, float]) -> str:
        steps = "" if self._limit else f"/{state.max_steps}"
        left = time.strftime("%H:%M:%S", time.gmtime(self._seconds_left(state, logs["seconds"])))
        speed = f"{logs['tokens_per_second']:,.0f} tokens/s"
        return f"step {state.global_step}{steps}  loss {logs['loss']:.4f}  {speed}  {left} left"

    def _seconds_left(self, state: TrainerState, seconds: float) -> float:
        if self._limit:
            return max(0.0, self._limit - seconds)
        done = state.global_step - self._first_step
        return (state.max_steps - state.global_step) * (seconds - self._first_seconds) / max(done, 1)

    def _restart(self, step: int) -> None:
        """Drops the lines after the step that the run goes on from: they will be written again."""
        if ranks.rank() != 0:
            return
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        if kept:
            self._first_seconds = json.loads(kept[-1])["seconds"]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def start_tracking(name: str, folder: Path) -> None:
    """Opens the Weights & Biases run that transformers' callback writes to: offline unless the user is logged in.

    It never asks, and a service that cannot be reached makes the run go offline.
    """
    os.environ["WANDB_DIR"] = str(folder)  # no ./wandb folder, which would pass for the package
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_PROJECT", "fused-llava")
    if "WANDB_MODE" not in os.environ and not _is_logged_in():
        os.environ["WANDB_MODE"] = "offline"
    if ranks.rank() != 0:
        return
    import wandb  # slow to import, and only rank 0 needs it

    try:
        wandb.init(project=os.environ["WANDB_PROJECT"], name=name)
    except (wandb.Error, OSError) as error:
        print(f"Weights & Biases cannot be reached ({error}): this run is logged offline", flush=True)
        os.environ["WANDB_MODE"] = "offline"
        wandb.init(project=os.environ["WANDB_PROJECT"], name=name, mode="offline")


def stop_tracking() -> None:
    """Closes the Weights & Biases run."""
    if ranks.rank() == 0:
        import wandb

        wandb.finish()


def _is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
