"""`python -m eval.compare CHECKPOINT ... --out DIR`: what each checkpoint is worth, and what it cost.

Answers are generated greedily, question by question as a user would ask, and count when they equal the truth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.chat import TokenizerError
from data.easy_vqa import questions
from eval.checkpoint import Checkpoint, CheckpointError
from eval.easy_vqa import KINDS, accuracy, always_yes, answer, batches, words_only
from eval.live import run_costs
from eval.measure import positive
from eval.plots import draw_learning_curves
from models.schedules import SCHEDULES, published

TRAINED = "trained"  # the checkpoint's own plan
TASKS = ("easy_vqa",)
COSTED = 100  # questions over which the cost of a schedule is averaged, because a pruner's depends on the question
Row = dict[str, Any]


def compare(checkpoints: Sequence[Checkpoint], schedules: Sequence[str], limit: int | None) -> list[Row]:
    """Returns one row for each checkpoint and schedule, after the two that need no image.

    Args:
        checkpoints: what to evaluate.
        schedules: `trained`, or names in `SCHEDULES`, with published settings scaled to the checkpoint's depth.
        limit: only the first so many questions; None is all of them.
    """
    rows: list[Row] = [
        {"run": "always yes", "schedule": "-", **always_yes(limit)},
        {"run": "words only", "schedule": "-", **words_only(limit)},
    ]
    for checkpoint in checkpoints:
        model, processor = checkpoint.load()
        for name in schedules:
            depth = model.config.text_config.num_hidden_layers
            model.schedule = None if name == TRAINED else published(name, depth)
            answers = answer(model, processor, limit=limit, title=f"{checkpoint.name} ({name})")
            rows.append({"run": checkpoint.name, "schedule": name, **accuracy(answers)})
            rows[-1].update(run_record(checkpoint), **costs(model, processor, limit))
    return rows


def run_record(checkpoint: Checkpoint) -> Row:
    """Returns what training took: seconds, steps, samples a second."""
    return {key: checkpoint.run.get(key) for key in ("seconds", "steps", "samples_per_second")}


def costs(model: Any, processor: Any, limit: int | None) -> Row:
    """Returns visual token-layers and decoder FLOPs of the prompt of one question, a mean over questions."""
    asked = questions("test")[: min(COSTED, limit or COSTED)]
    (inputs,) = batches(asked, processor, size=len(asked))
    each = run_costs(model, inputs, model.schedule)
    return {
        "visual_token_layers": round(sum(cost.visual_token_layers for cost in each) / len(each)),
        "decoder_flops": round(sum(cost.flops for cost in each) / len(each)),
    }


COLUMNS = {
    "run": "run",
    "schedule": "schedule",
    "all": "accuracy",
    **{kind: kind for kind in KINDS},
    "seconds": "training seconds",
    "steps": "steps",
    "samples_per_second": "samples/s",
    "visual_token_layers": "visual token-layers",
    "decoder_flops": "decoder MFLOPs",
}


def markdown(rows: Sequence[Row]) -> str:
    """Returns the rows as a markdown table."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(key, row.get(key)) for key in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(key: str, value: Any) -> str:
    """Returns one value as the table shows it."""
    if value is None:
        return "-"
    if key == "all" or key in KINDS:
        return f"{100 * value:.2f} %"
    if key == "decoder_flops":
        return f"{value / 1e6:.1f}"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line, checked; leaves with exit code 2 and one line where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="run folder or checkpoint")
    parser.add_argument("--schedules", default="trained", help=f"comma-separated: {', '.join((TRAINED, *SCHEDULES))}")
    parser.add_argument("--tasks", default="easy_vqa", help=f"comma-separated: {', '.join(TASKS)}")
    parser.add_argument("--limit", type=positive, default=None, help="only the first N questions")
    parser.add_argument("--out", type=Path, required=True, help="folder for table.md, table.json and pictures")
    args = parser.parse_args(given)
    args.schedules = names(parser, "--schedules", args.schedules, (TRAINED, *SCHEDULES))
    args.tasks = names(parser, "--tasks", args.tasks, TASKS)
    return args


def names(parser: argparse.ArgumentParser, flag: str, given: str, known: Any) -> list[str]:
    """Returns the comma-separated names; leaves with exit code 2 at an unknown one."""
    found = given.split(",")
    for name in found:
        if name not in known:
            parser.exit(2, f"{flag}: found '{name}', accepted: {', '.join(known)}\n")
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Compares, prints the table, writes everything under --out; returns the exit code."""
    args = arguments(given)
    try:
        checkpoints = [Checkpoint.find(folder) for folder in args.checkpoints]
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    if args.out.exists() and not args.out.is_dir():
        print(f"--out: found the file {args.out}, accepted: a folder", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        rows = compare(checkpoints, args.schedules, args.limit)
    except (CheckpointError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    table = markdown(rows)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    (args.out / "table.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    draw_learning_curves(checkpoints, args.out / "learning_curves.png")
    print(f"\n{table}\nwritten: {args.out}/table.md, table.json, learning_curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
