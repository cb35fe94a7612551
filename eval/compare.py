"""`python -m eval.compare CHECKPOINT ... --out DIR`: scores each checkpoint under each schedule, and measures its cost.

Every cell (checkpoint, schedule, task) is answered and scored by lmms-eval, greedily, and kept in DIR/cells: the same
command goes on where it was stopped, runs failed cells again, and leaves finished ones alone. Writes table.md,
table.json, table.csv, report.html and plots. Exit code 1: a cell failed; the tables say which.
`torchrun --nproc_per_node N -m eval.compare ...` gives each of N GPUs its part of every task's questions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.utils import is_flash_attn_2_available, logging

from data.chat import TokenizerError
from eval.arguments import UsageError, command_line, make_folder, names_of, positive, schedules_of
from eval.checkpoint import ASPECTS, FORMATS, Checkpoint, CheckpointError, plans_of
from eval.comparison import ranks, tables
from eval.comparison.cells import (
    FILE,
    PRECISIONS,
    ComparisonError,
    Record,
    Store,
    check_settings,
    code,
    fingerprint,
    named,
    run_cell,
    run_speed,
    settings_of,
)
from eval.comparison.report import plots_of, write_report
from eval.comparison.tables import Row, rows_of
from eval.live import Loaded
from eval.lmms import Harness
from eval.tasks.benchmarks import BENCHMARKS, missing_judge
from eval.text_tower import TextTower
from models.schedules import SCHEDULES, TRAINED, Choice, Schedule, ScheduleError
from recipes.errors import RecipeError

ATTENTION = ("sdpa", "eager", "flash_attention_2")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
WRITTEN = ("table.md", "table.json", "table.csv", "report.html", "learning_curves.png", "harness.log", FILE)
_NOT_RUN: Record = {"status": "failed", "error": "not run"}


class RankError(RuntimeError):
    """A cell failed in one of several processes, which cannot go on without it."""


class Comparison:
    """One comparison: which cells there are, which are still to be run, and where they are kept.

    `checkpoints` has each by the name of its rows, `schedules` what each label of a row means, `settings` what all
    cells have in common. `device_map` is Hugging Face's; without one each checkpoint is on one device.

    Raises:
        CheckpointError: a config.json does not fit.
        ScheduleError: a schedule does not go with a checkpoint.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        schedules: Mapping[str, Choice],
        tasks: Sequence[str],
        *,
        settings: Record,
        out: Path,
        device_map: str | None = None,
    ) -> None:
        self.checkpoints, self.tasks, self.settings, self.out = checkpoints, tasks, settings, out
        self.device_map = device_map
        self.schedules = {name: _schedules(checkpoint, schedules) for name, checkpoint in checkpoints.items()}
        self.stores = {
            name: Store(out, name, fingerprint(found), code(), {key: repr(one) for key, one in chosen.items()})
            for (name, found), chosen in zip(checkpoints.items(), self.schedules.values(), strict=True)
        }
        self.text_tower: TextTower | None = None

    def run(self, harness: Harness) -> None:
        """Runs every cell that is not done, and measures the speed of each checkpoint whose speed is not known."""
        total = sum(len(schedules) * len(self.tasks) + 1 for schedules in self.schedules.values())
        with tqdm(total=total, unit="cell", disable=ranks.rank() > 0) as bar:
            for name in self.checkpoints:
                self._run_checkpoint(name, harness, bar)

    def _run_checkpoint(self, name: str, harness: Harness, bar: Any) -> None:
        cells = self._cells(name)
        missing = [cell for cell in cells if not _is_done(self.stores[name].read(*cell))]
        missing, is_timed = ranks.broadcast_from_rank0((missing, _is_done(self.speed(name))))
        bar.update(len(cells) - len(missing) + is_timed)
        if not missing and is_timed:
            return
        bar.set_description(f"{name}: loading")
        try:
            loaded = self._load(name)
        except (CheckpointError, RuntimeError) as error:  # RuntimeError: no room for it
            for cell in missing:
                self._keep(_failed(error), name, *cell)
            bar.update(len(missing) + (not is_timed))
            return
        for label, task in missing:
            bar.set_description(f"{name}, {label}, {task}")
            options: Any = {"harness": harness, "limit": self.settings["limit"], "pictures": self.pictures(name, task)}
            record = _attempt(partial(run_cell, loaded, self.schedules[name][label], task, **options))
            self._keep(record, name, label, task)
            bar.update()
        if not is_timed:
            bar.set_description(f"{name}: speed and memory")
            if ranks.rank() == 0:
                self.stores[name].write(_attempt(partial(self._measured, loaded, name, harness)), "speed")
            bar.update()

    def _keep(self, record: Record | None, name: str, label: str, task: str) -> None:
        """Keeps a cell's record; raises RankError where it failed in one of several processes."""
        is_failed = record is not None and not _is_done(record)
        if record is not None and (ranks.rank() == 0 or is_failed):
            self.stores[name].write(record, label, task)
            if is_failed and ranks.world_size() > 1:
                raise RankError(f"{name}, {label}, {task}: {record['error']}")

    def _load(self, name: str) -> Loaded:
        checkpoint, settings = self.checkpoints[name], self.settings
        model, processor = checkpoint.load(PRECISIONS[settings["precision"]], settings["attention"], self.device_map)
        prompt_encoder = checkpoint.prompt_encoder(processor)
        prompt_encoder.text_tower = self.text_tower and self.text_tower.to(model.device)
        return Loaded(checkpoint, model, prompt_encoder, settings["batch"])

    def _measured(self, loaded: Loaded, name: str, harness: Harness) -> Record:
        prompts = harness.questions(self.tasks[0], self.settings["limit"], self.settings["batch"])
        return run_speed(loaded, self.schedules[name], list(prompts.values()))

    def outdated(self) -> int:
        """Returns how many cells are kept that other weights, settings of a schedule or code decided."""
        return sum(store.is_outdated(*cell) for name, store in self.stores.items() for cell in self._cells(name))

    def _cells(self, name: str) -> list[tuple[str, str]]:
        return [(label, task) for task in self.tasks for label in self.schedules[name]]

    def cell(self, name: str, schedule: str, task: str) -> Record:
        """Returns a cell's record; of one that was never reached, a failed one."""
        return self.stores[name].read(schedule, task) or _NOT_RUN

    def speed(self, name: str) -> Record:
        """Returns the record of what was timed on a checkpoint; a failed one where nothing was."""
        return self.stores[name].read("speed") or _NOT_RUN

    def pictures(self, name: str, task: str) -> Path:
        """Returns the folder of the images of a checkpoint's sample pages."""
        return self.out / "cells" / name / f"{task}_pictures"

    def make_folders(self) -> None:
        """Makes the folders of all cells; raises UsageError where one of their files could not be written."""
        for name, schedules in self.schedules.items():
            make_folder("--out", self.out / "cells" / name, ["speed.json"])
            for task in self.tasks:
                make_folder("--out", self.pictures(name, task))
            for label in schedules:
                make_folder("--out", self.out / "cells" / name / label, [f"{task}.json" for task in self.tasks])

    def failures(self) -> list[str]:
        """Returns what failed, and why, a line each."""
        records = []
        for name in self.checkpoints:
            records += [(f"{name}, {', '.join(cell)}", self.cell(name, *cell)) for cell in self._cells(name)]
            records.append((f"{name}, speed and memory", self.speed(name)))
        return [f"{cell}: {record['error']}" for cell, record in records if not _is_done(record)]

    def write(self) -> tuple[str, bool]:
        """Writes tables and report; returns the tables as text, and whether everything is done."""
        (rows, baselines), failures = rows_of(self), self.failures()
        text = self._text(rows, baselines, failures)
        training = {name: checkpoint.run for name, checkpoint in self.checkpoints.items()}
        record = {"settings": self.settings, "compared_with": baselines, "training": training, "rows": rows}
        (self.out / "table.md").write_text(text, encoding="utf-8")
        (self.out / "table.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (self.out / "table.csv").write_text(tables.csv_text(rows), encoding="utf-8")
        write_report(self, rows, baselines, failures)
        return text, not failures

    def _text(self, rows: Sequence[Row], baselines: Mapping[str, str], failures: Sequence[str]) -> str:
        parts = []
        for task in self.tasks:
            members = [row for row in rows if row["task"] == task and "pooled_in" not in row]
            parts.append(f"## {task}\n\n" + tables.markdown(tables.score_table(members)))
            parts.append(tables.note(members, baselines.get(task)) + "\n")
            parts.append(tables.markdown(tables.cost_table(members)))
        if failures:
            parts.append("## Failed\n\n" + "".join(f"- {failure}\n" for failure in failures))
        if training := tables.training_table({name: found.run for name, found in self.checkpoints.items()}):
            parts.append("## Training\n\n" + tables.markdown(training))
        return "\n".join(parts)


def _schedules(checkpoint: Checkpoint, choices: Mapping[str, Choice]) -> dict[str, Schedule]:
    """Returns the schedules of a checkpoint's rows by label: the trained plan of a dense one is `dense`.

    A plan's name is a row of the checkpoints that have it.
    """
    if checkpoint.stages is None:
        choices = {"dense" if label == TRAINED else label: choice for label, choice in choices.items()}
    known = (TRAINED, *SCHEDULES, *(checkpoint.config.plans or {}))
    choices = {label: choice for label, choice in choices.items() if not isinstance(choice, str) or choice in known}
    return {label: checkpoint.schedule(choice) for label, choice in choices.items()}


def _is_done(record: Record | None) -> bool:
    return record is not None and record["status"] == "done"


def _failed(error: Exception) -> Record:
    return {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}


def _attempt(run: Callable[[], Record | None]) -> Any:
    try:
        return run()
    except Exception as error:  # noqa: BLE001  # whatever a task or the harness raises is this cell's result
        tqdm.write(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return _failed(error)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line, checked; leaves with exit code 2 and one line where it is wrong."""
    parser = command_line("eval.compare", __doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="run folder, checkpoint or hub name")
    parser.add_argument(
        "--schedules",
        default=TRAINED,
        help=f"comma-separated: {', '.join((TRAINED, *SCHEDULES))}; with settings as in 'fastv(layer=2,drop=0.75)'",
    )
    parser.add_argument(
        "--tasks", default="easy_vqa", help=f"comma-separated: {', '.join(BENCHMARKS)}, or another of lmms-eval's"
    )
    parser.add_argument("--limit", type=positive, help="only the first N questions of a task")
    parser.add_argument("--batch", type=positive, help="questions of one forward pass (16 on a GPU, 256 on a CPU)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the weights (bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--attn-implementation", choices=ATTENTION, default="sdpa", help="of Hugging Face (sdpa)")
    parser.add_argument(
        "--device-map", type=_device_map, help="of Hugging Face (auto: a checkpoint over all GPUs); none: on one device"
    )
    parser.add_argument("--text-tower", metavar="CLIP", help="the vision tower's CLIP checkpoint, for cdpruner")
    parser.add_argument(
        "--chat-format", choices=FORMATS, help="prompt format for all checkpoints (default: as trained)"
    )
    parser.add_argument(
        "--image-aspect", choices=ASPECTS, help="image padding for all checkpoints (default: as trained)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, report and plots")
    args = parser.parse_args(argv)
    try:
        args.tasks = names_of("--tasks", args.tasks)
        plans = [name for given in args.checkpoints for name in plans_of(given)]
        args.schedules = schedules_of("--schedules", args.schedules, plans)
    except UsageError as error:
        parser.exit(2, f"{error}\n")
    if args.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available(kernels_fallback_ok=True):
        message = "--attn-implementation: got flash_attention_2 without a GPU and the package flash-attn"
        parser.exit(2, f"{message}, expected both, or sdpa\n")
    if args.device_map is not None and ranks.world_size() > 1:
        message = "--device-map: got it under torchrun, expected one process: each rank holds a whole checkpoint"
        parser.exit(2, f"{message}\n")
    for name in args.tasks:
        if missing := missing_judge(name):
            parser.exit(2, f"--tasks: {missing}\n")
    return args


def _device_map(text: str) -> str:
    """Returns Hugging Face's name of a way to spread weights, or a device of this machine, for a command line."""
    try:
        is_known = text in DEVICE_MAPS or torch.empty(0, device=text).device.type != "meta"
    except (RuntimeError, AssertionError, NotImplementedError):  # no such device; torch without CUDA asserts
        is_known = False
    if not is_known:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected {', '.join(DEVICE_MAPS)}, or a device of this machine"
        )
    return text


def prepare(args: argparse.Namespace) -> tuple[Comparison, Harness]:
    """Returns the comparison and the harness, after everything that can be checked before a weight is loaded.

    Raises:
        UsageError: a checkpoint cannot be read, its rows would not be comparable, or `--out` cannot be written.
        TokenizerError: a tokenizer does not go with its format.
    """
    found = [Checkpoint.find(given, args.chat_format, args.image_aspect) for given in args.checkpoints]
    for checkpoint in found:
        checkpoint.prompt_encoder(checkpoint.processor())
    settings = settings_of(found, args)
    comparison = Comparison(
        named(found), args.schedules, args.tasks, settings=settings, out=args.out, device_map=args.device_map
    )
    labelled = [pair for chosen in comparison.schedules.values() for pair in chosen.items()]
    reading = [label for label, schedule in labelled if schedule.reads_relevance]
    if reading and args.text_tower is None:
        raise ComparisonError(
            f"--schedules: got {min(reading)}, which reads the question with a text tower, without --text-tower; "
            "expected both: no checkpoint contains that tower"
        )
    if args.text_tower is not None:
        comparison.text_tower = TextTower(args.text_tower)
    make_folder("--out", args.out, (*WRITTEN, *(name for task in args.tasks for name in plots_of(task))))
    harness = Harness(args.out, args.tasks)
    for task in args.tasks:
        if not harness.known(task):
            raise ComparisonError(f"--tasks: got '{task}', expected {', '.join(BENCHMARKS)}, or another of lmms-eval's")
    if ranks.rank() == 0:
        check_settings(settings, args.out)
        comparison.make_folders()
    return comparison, harness


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints the tables, writes everything under --out; returns the exit code."""
    args = arguments(argv)
    try:
        comparison, harness = prepare(args)
    except (UsageError, TokenizerError, ScheduleError, RecipeError) as error:
        if ranks.rank() == 0:
            print(error, file=sys.stderr)
        return 2
    logging.disable_progress_bar()  # of loading weights: there is one for all cells
    if (outdated := comparison.outdated()) and ranks.rank() == 0:
        message = f"{args.out}: {outdated} of the kept cells will run again: weights, settings or code have changed"
        print(message, file=sys.stderr)
    ranks.start()
    try:
        comparison.run(harness)
    except RankError as error:
        print(f"{error}\nstopped; what is done is kept in {args.out}, the same command goes on", file=sys.stderr)
        os._exit(1)  # the other processes wait for this one: torchrun ends them
    except KeyboardInterrupt:
        print(f"\nstopped; what is done is kept in {args.out}, the same command goes on", file=sys.stderr)
        return 130
    is_whole = True
    if ranks.rank() == 0:
        text, is_whole = comparison.write()
        print(f"\n{text}\nwritten: {args.out}/report.html, table.md, table.json, table.csv and plots")
    ranks.stop()
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
