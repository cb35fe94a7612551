"""`python -m eval.stages CHECKPOINT --out DIR`: in which decoder layers does a VLM need its image?

Asks questions with known answers while vision is masked in ranges of layers, looks at what each layer shows (logit
lens, attention on vision, value vectors of its sinks, VisiPruner's tests), and proposes the layer at which vision has
to enter and the one at which it may leave. Writes stages.md, stages.json and stages.png; --write makes the recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from transformers.utils import logging

from data.chat import TokenizerError
from eval.arguments import UsageError, exists, make_folder, positive
from eval.checkpoint import ASPECTS, FORMATS, Checkpoint
from eval.stage_analysis.report import (
    check_target,
    draw_stages,
    evidence_lines,
    record_of,
    report_of,
    starting_recipe,
    write_recipe,
)
from eval.stage_analysis.samples import (
    ProbeBatcher,
    Sample,
    SamplesError,
    easy_vqa_samples,
    file_samples,
    scenes_samples,
)
from eval.stage_analysis.search import Analysis, needs_vision, propose
from models.schedules import plan_schedule
from recipes.schema import RecipeError

LIMIT = 300
BUILT_IN: Final[Mapping[str, Callable[[int], list[Sample]]]] = {
    "easy_vqa": easy_vqa_samples,
    "easy_vqa_phrase": partial(easy_vqa_samples, asks_short=True),
    "scenes": scenes_samples,
}
_TASKS: Final = f"{', '.join(BUILT_IN)}, or a LLaVA-format JSON or JSONL file"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line, checked; leaves with exit code 2 and one line where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="run folder, folder with config.json, or hub name")
    parser.add_argument("--task", default="easy_vqa", help=_TASKS)
    parser.add_argument("--images", type=Path, help="folder of the file's images")
    parser.add_argument("--limit", type=positive, default=LIMIT, help=f"samples (default {LIMIT})")
    parser.add_argument("--batch", type=positive, help="samples of one forward pass (8 on a GPU, 50 on a CPU)")
    parser.add_argument("--window", type=positive, help="layers of the sliding window (an eighth of the depth)")
    parser.add_argument("--tolerance", type=_points, default=1.0, help="points of score that may be lost (default 1)")
    parser.add_argument("--chat-format", choices=FORMATS, help="prompt format (default: as trained)")
    parser.add_argument("--image-aspect", choices=ASPECTS, help="image padding (default: as trained)")
    parser.add_argument("--out", type=Path, required=True, help="folder for stages.md, stages.json and stages.png")
    parser.add_argument("--write", type=Path, metavar="RECIPE", help="write the recipe of the proposed stages")
    args = parser.parse_args(argv)
    args.command = "python -m eval.stages " + shlex.join(sys.argv[1:] if argv is None else argv)
    return args


def samples_of(args: argparse.Namespace) -> list[Sample]:
    """Returns the task's samples.

    Raises:
        SamplesError: there is no such task, it cannot be read, or it is too small to tell the tolerance.
    """
    if args.images is not None and args.task in BUILT_IN:
        raise SamplesError(f"--images: got {args.images} with --task {args.task}, expected it with a file as --task")
    if args.task in BUILT_IN:
        samples = BUILT_IN[args.task](args.limit)
    elif exists(args.task) and Path(args.task).is_file():
        samples = file_samples(Path(args.task), args.images, args.limit)
    else:
        raise SamplesError(f"--task: got '{args.task}', expected {_TASKS}")
    least = math.ceil(100 / args.tolerance)
    if len(samples) < least:
        raise SamplesError(
            f"--limit: got {len(samples)} samples for a tolerance of {args.tolerance:g} points, expected at least "
            f"{least}, because one sample must not weigh more than that, or a larger --tolerance"
        )
    if len({sample.group for sample in samples}) < 2:
        raise SamplesError(f"--task: {args.task}: got one image, expected samples about several")
    return samples


def prepare(args: argparse.Namespace) -> tuple[Checkpoint, Analysis]:
    """Returns the checkpoint and its analysis, after everything that can be checked before a weight is loaded.

    Raises:
        CheckpointError: the checkpoint cannot be found or read.
        RecipeError: `--write` cannot be written.
        SamplesError: the task or the window is wrong.
        TokenizerError: the tokenizer does not go with the format.
        UsageError: `--out` cannot be written.
    """
    check_target(args.write)
    checkpoint = Checkpoint.find(args.checkpoint, args.chat_format, args.image_aspect)
    if args.write is not None:
        starting_recipe(checkpoint, args.checkpoint)
    prompt_encoder = checkpoint.prompt_encoder(checkpoint.processor())
    samples = samples_of(args)
    ProbeBatcher(None, prompt_encoder).check_longest(samples)
    depth = checkpoint.num_layers
    window = args.window or max(1, round(depth / 8))
    if window > depth:
        raise SamplesError(f"--window: got {window}, expected at most {depth}, because the decoder has {depth} layers")
    make_folder("--out", args.out, ("stages.json", "stages.md", "stages.png"))
    model, _ = checkpoint.load(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    batcher, size = ProbeBatcher(model, prompt_encoder), args.batch or (8 if torch.cuda.is_available() else 50)
    samples = batcher.as_written(samples, size, plan_schedule(model.plan))
    return checkpoint, Analysis(model, batcher, samples, size, model.plan, window)


def main(argv: Sequence[str] | None = None) -> int:
    """Analyses, prints what was found, writes everything under --out and the recipe; returns the exit code."""
    args = arguments(argv)
    logging.disable_progress_bar()  # of loading weights
    try:
        checkpoint, analysis = prepare(args)
        analysis.run()
        trials, proposal = analysis.trials, None
        if needs_vision(trials, args.tolerance):
            proposal = propose(trials, args.tolerance, analysis.measure)
            analysis.measure([trials.removed_outside(proposal.enter, proposal.exit)])
        record = record_of(analysis, proposal, args, checkpoint.name)
        (args.out / "stages.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (args.out / "stages.md").write_text(report_of(record), encoding="utf-8")
        draw_stages(record, args.out / "stages.png")
        print("\n".join(evidence_lines(record)))
        print(f"written: {args.out}/stages.md, stages.json and stages.png")
        if args.write is not None:
            write_recipe(args.write, starting_recipe(checkpoint, args.checkpoint), record)
            print(f"written: {args.write}")
    except (UsageError, RecipeError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _points(text: str) -> float:
    try:
        points = float(text)
    except ValueError:
        points = 0.0
    if not 0 < points <= 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected points of score, above 0 and at most 100")
    return points


if __name__ == "__main__":
    sys.exit(main())
