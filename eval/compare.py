"""`python -m eval.compare CHECKPOINT ... --out DIR`: what each checkpoint is worth under each schedule, and its cost.

Every cell (checkpoint, schedule, task) is answered and scored by lmms-eval, greedily, and kept in DIR/cells: the same
command goes on where it was stopped, runs failed cells again, and leaves finished ones alone. Writes table.md,
table.json, table.csv, report.html and plots. Exit code 1: a cell failed; the tables say which.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils import logging

from data.chat import TokenizerError
from eval import rows as tables
from eval.arguments import UsageError, make_folder, names_of
from eval.benchmarks import BENCHMARKS, missing_judge
from eval.cells import Loaded, Record, Store, run_cell, run_speed
from eval.checkpoint import ASPECTS, FORMATS, Checkpoint, CheckpointError
from eval.lmms import Harness
from eval.measure import positive
from eval.report import write_report
from eval.settings import PRECISIONS, ComparisonError, check_settings, fingerprint, named, settings_of
from models.schedules import SCHEDULES, TRAINED

_NOT_RUN: Record = {"status": "failed", "error": "not run"}


class Comparison:
    """One comparison: which cells there are, which are still to be run, and where they are kept.

    Args:
        checkpoints: by the name of their rows.
        schedules: `trained`, or names in SCHEDULES.
        tasks: names of lmms-eval.
        settings: what all cells have in common.
        out: the comparison's folder.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        schedules: Sequence[str],
        tasks: Sequence[str],
        *,
        settings: Record,
        out: Path,
    ) -> None:
        self.checkpoints, self.tasks, self.settings, self.out = checkpoints, tasks, settings, out
        self.schedules = {name: _schedules(checkpoint, schedules) for name, checkpoint in checkpoints.items()}
        self.stores = {name: Store(out, name, fingerprint(found)) for name, found in checkpoints.items()}

    def run(self, harness: Harness) -> None:
        """Runs every cell that is not done, and measures the speed of each checkpoint whose speed is not known."""
        total = sum(len(schedules) * len(self.tasks) + 1 for schedules in self.schedules.values())
        with tqdm(total=total, unit="cell") as bar:
            for name in self.checkpoints:
                self._run_checkpoint(name, harness, bar)

    def _run_checkpoint(self, name: str, harness: Harness, bar: Any) -> None:
        store, schedules, limit = self.stores[name], self.schedules[name], self.settings["limit"]
        cells = [(schedule, task) for task in self.tasks for schedule in schedules]
        missing = [cell for cell in cells if not _is_done(store.read(*cell))]
        speed = store.read("speed")
        is_timed = _is_done(speed) and set(schedules) <= set(speed["by_schedule"])  # type: ignore[index]
        bar.update(len(cells) - len(missing) + is_timed)
        if not missing and is_timed:
            return
        bar.set_description(f"{name}: loading")
        try:
            loaded = self._load(name)
        except (CheckpointError, RuntimeError) as error:  # RuntimeError: no room for it
            for cell in missing:
                store.write(_failed(error), *cell)
            bar.update(len(missing) + (not is_timed))
            return
        for schedule, task in missing:
            bar.set_description(f"{name}, {schedule}, {task}")
            pictures = self.out / "cells" / name / f"{task}_pictures"
            run = partial(run_cell, loaded, schedule, task, harness=harness, limit=limit, pictures=pictures)
            store.write(_attempt(run), schedule, task)
            bar.update()
        if not is_timed:
            bar.set_description(f"{name}: speed and memory")
            store.write(_attempt(partial(self._measured, loaded, schedules, harness)), "speed")
            bar.update()

    def _measured(self, loaded: Loaded, schedules: Sequence[str], harness: Harness) -> Record:
        asked = harness.questions(self.tasks[0], self.settings["limit"], self.settings["batch"])
        return run_speed(loaded, schedules, list(asked.values()))

    def _load(self, name: str) -> Loaded:
        checkpoint = self.checkpoints[name]
        model, processor = checkpoint.load(PRECISIONS[self.settings["precision"]])
        return Loaded(checkpoint, model, checkpoint.prompter(processor), self.settings["batch"])

    def cell(self, name: str, schedule: str, task: str) -> Record:
        """Returns a cell's record; of one that was never reached, a failed one."""
        return self.stores[name].read(schedule, task) or _NOT_RUN

    def rows(self) -> tuple[list[tables.Row], dict[str, str]]:
        """Returns all rows, and for each task the dense row that the others are compared with, in words."""
        found: list[tables.Row] = []
        baselines = {}
        stages = {name: checkpoint.stages for name, checkpoint in self.checkpoints.items()}
        for task in self.tasks:
            rows = [self._row(name, schedule, task) for name in self.checkpoints for schedule in self.schedules[name]]
            base = tables.baseline_of(rows, stages)
            if base is not None:
                baselines[task] = " ".join(base)
                record = self.cell(*base, task)
                for row in rows:
                    row["is_reference"] = (row["run"], row["schedule"]) == base
                    if row["status"] == "done" and not row["is_reference"]:
                        row.update(tables.compared(self.cell(row["run"], row["schedule"], task), record))
            found += tables.floor_rows(task, self.settings["limit"]) + rows
        return found, baselines

    def _row(self, name: str, schedule: str, task: str) -> tables.Row:
        speed = (self.stores[name].read("speed") or {}).get("by_schedule", {}).get(schedule)
        return tables.cell_row(name, schedule, task, self.cell(name, schedule, task), speed)

    def failures(self) -> list[str]:
        """Returns what failed, and why, a line each."""
        found = []
        for name, store in self.stores.items():
            for task in self.tasks:
                records = {schedule: self.cell(name, schedule, task) for schedule in self.schedules[name]}
                found += [f"{name}, {of}, {task}: {got['error']}" for of, got in records.items() if not _is_done(got)]
            speed = store.read("speed") or _NOT_RUN
            if not _is_done(speed):
                found.append(f"{name}, speed and memory: {speed['error']}")
        return found

    def write(self) -> tuple[str, bool]:
        """Writes tables and report; returns the tables as text, and whether everything is done."""
        rows, baselines = self.rows()
        text = self._text(rows, baselines)
        training = {name: checkpoint.run for name, checkpoint in self.checkpoints.items()}
        record = {"settings": self.settings, "compared_with": baselines, "training": training, "rows": rows}
        (self.out / "table.md").write_text(text, encoding="utf-8")
        (self.out / "table.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (self.out / "table.csv").write_text(tables.csv_text(rows), encoding="utf-8")
        cells = {(row["run"], row["schedule"], row["task"]): self.cell(row["run"], row["schedule"], row["task"])
                 for row in rows if row["schedule"] != tables.FLOOR}  # fmt: skip
        write_report(self.out, rows, cells, self.failures(), baselines, self.settings, self.checkpoints)
        return text, not self.failures()

    def _text(self, rows: Sequence[tables.Row], baselines: Mapping[str, str]) -> str:
        parts = []
        for task in self.tasks:
            members = [row for row in rows if row["task"] == task]
            parts.append(f"## {task}\n\n" + tables.markdown(tables.score_table(members)))
            parts.append(tables.markdown(tables.cost_table(members)))
        training = tables.training_table({name: found.run for name, found in self.checkpoints.items()})
        if failures := self.failures():
            parts.append("## Failed\n\n" + "".join(f"- {failure}\n" for failure in failures))
        if training:
            parts.append("## Training\n\n" + tables.markdown(training))
        return "\n".join(parts)


def _schedules(checkpoint: Checkpoint, asked: Sequence[str]) -> list[str]:
    """Returns the schedules of a checkpoint's rows: the trained plan of a dense one is `dense`."""
    if checkpoint.stages is not None:
        return list(asked)
    return list(dict.fromkeys("dense" if name == TRAINED else name for name in asked))


def _is_done(record: Record | None) -> bool:
    return record is not None and record["status"] == "done"


def _failed(error: Exception) -> Record:
    return {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}


def _attempt(run: Callable[[], Record]) -> Record:
    try:
        return run()
    except Exception as error:  # noqa: BLE001  # whatever a task or the harness raises is this cell's result
        tqdm.write(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return _failed(error)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line, checked; leaves with exit code 2 and one line where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="run folder, checkpoint or hub name")
    parser.add_argument("--schedules", default=TRAINED, help=f"comma-separated: {', '.join((TRAINED, *SCHEDULES))}")
    parser.add_argument(
        "--tasks", default="easy_vqa", help=f"comma-separated: {', '.join(BENCHMARKS)}, or another of lmms-eval's"
    )
    parser.add_argument("--limit", type=positive, help="only the first N questions of a task")
    parser.add_argument("--batch", type=positive, help="questions of one forward pass (16 on a GPU, 256 on a CPU)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the weights (bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--chat-format", choices=FORMATS, help="ask so, whatever a checkpoint was trained with")
    parser.add_argument("--image-aspect", choices=ASPECTS, help="show images so, whatever it was trained with")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables, report and plots")
    args = parser.parse_args(given)
    try:
        args.tasks = names_of("--tasks", args.tasks)
        args.schedules = names_of("--schedules", args.schedules, (TRAINED, *SCHEDULES))
    except UsageError as error:
        parser.exit(2, f"{error}\n")
    for name in args.tasks:
        if missing := missing_judge(name):
            parser.exit(2, f"--tasks: {missing}\n")
    return args


def prepare(args: argparse.Namespace) -> tuple[Comparison, Harness]:
    """Returns the comparison and the harness, after everything that can be checked before a weight is loaded.

    Raises:
        CheckpointError: a checkpoint cannot be found or read.
        ComparisonError: its rows would not be comparable.
        TokenizerError: a tokenizer does not go with its format.
        UsageError: `--out` cannot be written.
    """
    found = [Checkpoint.find(given, args.chat_format, args.image_aspect) for given in args.checkpoints]
    for checkpoint in found:
        checkpoint.prompter(checkpoint.processor())
    checkpoints, settings = (
        named(found),
        settings_of(found, limit=args.limit, batch=args.batch, precision=args.precision),
    )
    make_folder("--out", args.out)
    harness = Harness(args.out, args.tasks)
    for task in args.tasks:
        if not harness.known(task):
            raise ComparisonError(f"--tasks: got '{task}', expected {', '.join(BENCHMARKS)}, or another of lmms-eval's")
    check_settings(settings, args.out)
    return Comparison(checkpoints, args.schedules, args.tasks, settings=settings, out=args.out), harness


def main(given: Sequence[str] | None = None) -> int:
    """Compares, prints the tables, writes everything under --out; returns the exit code."""
    args = arguments(given)
    try:
        comparison, harness = prepare(args)
    except (UsageError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    logging.disable_progress_bar()  # of loading weights: there is one for all cells
    try:
        comparison.run(harness)
    except KeyboardInterrupt:
        print(f"\nstopped; what is done is kept in {args.out}, the same command goes on", file=sys.stderr)
        return 130
    text, is_whole = comparison.write()
    print(f"\n{text}\nwritten: {args.out}/report.html, table.md, table.json, table.csv and plots")
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
