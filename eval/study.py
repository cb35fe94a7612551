"""`python -m eval.study STUDY.yaml`: trains every arm of a study with every seed, scores it, and writes the tables.

A study is a recipe, the changes to it that are compared (its arms), and seeds. Each run is trained by train/run.py in
OUT/runs/ARM-seedN and answers the study's tasks; its result is one small file in the study's `results` folder, or in
the folder of --results, which repeats a study whose results are kept. A run with a result is not trained again; tasks
and schedules that were added to the study since are only evaluated. The same command resumes, within a run too.
Writes table.md and pictures beside the results. Exit code 1: a run failed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers.utils import logging

from data.chat import TokenizerError
from eval.arguments import UsageError, command_line, free_port, make_folder, names_of, positive
from eval.checkpoint import FORMATS, Checkpoint
from eval.comparison.cells import run_cell
from eval.live import Loaded
from eval.lmms import Harness
from eval.measure import default_batch, dtype
from eval.studies.plots import PICTURES, draw_pictures
from eval.studies.results import Record, Results, fingerprint, lacking, record_of, start_of
from eval.studies.tables import tables
from models.auto import CONFIG_FAULTS, config_fields, config_of
from models.schedule_choice import require_runnable, resolve_config
from models.schedules import SCHEDULES, TRAINED, ScheduleError
from recipes.resolved import changes
from recipes.schema import ModelSection, Recipe, RecipeError, load_recipe
from recipes.study import Study, load_study

TABLE: Final = "table.md"
TASKS: Final = ("easy_vqa", "scenes", "scenes_compositional")
_ROOT: Final = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    recipe: Recipe


def check_names(study: Study) -> None:
    """Raises UsageError for tasks and schedules that do not exist, and schedules that an arm's model cannot run.

    Raises RecipeError where an arm's recipe is not valid.
    """
    for task in study.tasks:
        if task not in TASKS:
            raise UsageError(f"tasks: got '{task}', expected {', '.join(TASKS)}")
    for arm, settings in study.arms.items():
        recipe = load_recipe(study.recipe, (*study.set, *settings.set))
        if recipe.data.prompt_format not in FORMATS:
            raise UsageError(
                f"arms.{arm}: data.format: got {recipe.data.prompt_format}, which has no questions, expected "
                f"{' or '.join(FORMATS)}"
            )
        model = recipe.model
        known = list(dict.fromkeys((TRAINED, *model.plans, *SCHEDULES)))
        config = _config_of(arm, model)
        for name in settings.schedules:
            if name not in known:
                raise UsageError(f"arms.{arm}.schedules: got '{name}', expected {', '.join(known)}")
            try:
                if config is not None:
                    require_runnable(resolve_config(config, name), config)
            except ScheduleError as error:
                raise UsageError(f"arms.{arm}.schedules: '{name}': {error}") from None


def _config_of(arm: str, model: ModelSection) -> Any:
    """Returns the config of an arm's trained model; None where it is not on this machine yet.

    Raises:
        UsageError: it describes no model that can be trained.
    """
    try:
        fields = config_fields(model.config, model.checkpoint)
    except OSError:  # the training says so, or fetches it
        return None
    except CONFIG_FAULTS as error:
        raise UsageError(f"arms.{arm}: {model.checkpoint or model.config}: config.json: {error}") from None
    try:
        return config_of(fields, model.checkpoint or model.config, **model.plan_fields)
    except CONFIG_FAULTS as error:
        raise UsageError(f"arms.{arm}: model: {' '.join(str(error).split())}") from None


def runs_of(study: Study, out: Path, arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Returns the runs, seed by seed, so that a study that is stopped has compared all arms."""
    runs = []
    for seed in seeds:
        for arm in arms:
            folder = out / "runs" / f"{arm}-seed{seed}"
            last = (f"name={folder.name}", f"seed={seed}", f"output={folder}")
            overrides = (*study.set, *study.arms[arm].set, *last)
            runs.append(Run(arm, seed, folder, overrides, load_recipe(study.recipe, overrides)))
    return runs


def train(study: Study, run: Run) -> bool:
    """Trains a run, or goes on with it, in a process of its own; returns whether it is done.

    Its output is appended to a file beside its folder.

    Raises:
        UsageError: it ended with a fault, or a finished run of another recipe is in its folder.
        KeyboardInterrupt: see `finish`.
    """
    if (run.folder / "final").is_dir():
        _check_trained(run)
        return True
    command = [*_launcher(), str(_ROOT / "train/run.py"), study.recipe, *run.overrides]
    file = run.folder.with_suffix(".txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as log:
        code = finish(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    if code:
        last = file.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise UsageError(f"{run.arm}, seed {run.seed}: exit code {code}: {last} (all of it in {file})")
    return (run.folder / "final").is_dir()


def _check_trained(run: Run) -> None:
    """Raises UsageError where the finished run in a run's folder was trained by another recipe."""
    saved = run.folder / "final/recipe.yaml"
    try:
        for key, before, now in changes(run.recipe, saved):
            raise UsageError(
                f"{run.folder}: got a run with {key}: {before}, expected {now}; move it away, or name another folder "
                "by --out"
            )
    except RecipeError as error:
        raise UsageError(str(error)) from None


def _launcher() -> list[str]:
    """Returns what starts a training: on several GPUs DeepSpeed, at a free port, because studies may share them."""
    if torch.cuda.device_count() < 2:
        return [sys.executable]
    return [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port("127.0.0.1", 0))]


def finish(child: subprocess.Popen[bytes]) -> int:
    """Returns the exit code of a training once it is over.

    Raises:
        KeyboardInterrupt: on Ctrl-C, which reaches the training too, or SIGTERM, which is passed on; not before the
            training has saved and is over.
    """
    stopped = False

    def stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True
        child.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while child.returncode is None:
            try:
                child.wait()
            except KeyboardInterrupt:
                stopped = True
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:
        raise KeyboardInterrupt
    return child.returncode


def score(study: Study, run: Run, *, harness: Harness, batch: int | None, limit: int | None) -> Record:
    """Returns the record of a trained run: what its training took, and its answers to every task.

    Raises:
        CheckpointError: it cannot be loaded.
        TokenizerError: it cannot be asked.
    """
    checkpoint = Checkpoint.find(run.folder)
    trained_in = {phase.train.precision for phase in run.recipe.phases}  # a small fp32 model is another one in bf16
    model, processor = checkpoint.load(torch.float32 if trained_in == {"fp32"} else dtype())
    loaded = Loaded(checkpoint, model, checkpoint.prompt_encoder(processor), batch or default_batch())
    cells: dict[str, dict[str, Record]] = {}
    for task in study.tasks:
        pictures, cells[task] = run.folder / "pictures" / task, {}
        for name in study.arms[run.arm].schedules:
            record = run_cell(loaded, model.resolve(name), task, harness=harness, limit=limit, pictures=pictures)
            cells[task][name] = record or {}  # never empty: this process is the only one
    return record_of(run.arm, run.seed, run.recipe, checkpoint, cells, limit=limit)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line, checked; leaves with exit code 2 and one line where it is wrong."""
    parser = command_line("eval.study", __doc__)
    parser.add_argument("study", help="YAML file, e.g. recipes/studies/easy_vqa.yaml")
    parser.add_argument("--out", type=Path, help="folder for the runs (outputs/studies/NAME)")
    parser.add_argument("--results", help="folder for the results, to repeat a study whose own are kept (the study's)")
    parser.add_argument("--arms", help="comma-separated: only these")
    parser.add_argument("--seeds", help="comma-separated: only these")
    parser.add_argument("--batch", type=positive, help="questions of one forward pass (16 on a GPU, 256 on a CPU)")
    parser.add_argument("--limit", type=positive, help="only the first N questions of a task; nothing is kept of it")
    parser.add_argument("--report", action="store_true", help="only write the tables of the results that are there")
    parser.add_argument("--reference", metavar="ARM", help="only print the tables, differences to this arm")
    return parser.parse_args(argv)


def chosen(study: Study, args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """Returns the arms and the seeds that the command line names, or all; raises UsageError for an unknown one."""

    def named(option: str, given: str | None, known: Sequence[str]) -> Sequence[str]:
        names = known if given is None else names_of(option, given)
        for name in names:
            if name not in known:
                raise UsageError(f"{option}: got '{name}', expected {', '.join(known)}")
        return names

    if args.reference not in (None, *study.arms):
        raise UsageError(f"--reference: got '{args.reference}', expected {', '.join(study.arms)}")
    seeds = named("--seeds", args.seeds, [str(seed) for seed in study.seeds])
    return list(named("--arms", args.arms, list(study.arms))), [int(seed) for seed in seeds]


def run_all(study: Study, runs: Sequence[Run], results: Results, args: argparse.Namespace) -> int:
    """Trains and scores what has no result yet; returns the exit code."""
    harness = Harness(args.out, study.tasks)
    failed = 0
    for number, run in enumerate(runs, start=1):
        about = f"{number}/{len(runs)} {run.arm}, seed {run.seed}"
        found = results.read(run.arm, run.seed)
        missing = [] if found is None else lacking(found, study.tasks, study.arms[run.arm].schedules)
        if found is not None and not missing:
            print(f"{about}: its result is there", flush=True)
            continue
        try:
            _check_kept(run, results.file(run.arm, run.seed), missing)
            if not (run.folder / "final").is_dir():
                print(f"{about}: training ({run.folder.with_suffix('.txt')})", flush=True)
            if not train(study, run):
                print(f"{about}: stopped; the same command goes on")
                return 0
            print(f"{about}: answering {', '.join(study.tasks)}", flush=True)
            record = score(study, run, harness=harness, batch=args.batch, limit=args.limit or study.limit)
        except (UsageError, ScheduleError, TokenizerError) as error:
            print(error, file=sys.stderr, flush=True)
            failed = 1
            continue
        if args.limit is None:
            before = {} if found is None else found["scores"]  # what the study no longer asks for stays
            kept = {task: {**before.get(task, {}), **cells} for task, cells in record["scores"].items()}
            results.write({**record, "scores": {**before, **kept}})
        scores = [(task, *pair) for task, cells in record["scores"].items() for pair in cells.items()]
        parts = [f"{task} {name} {100 * found['score']:.2f} %" for task, name, found in scores]
        print(f"{about}: {', '.join(parts)}", flush=True)
    return failed


def _check_kept(run: Run, file: Path, missing: Sequence[str]) -> None:
    """Raises UsageError where answers are missing from a run's result and the trained run is gone."""
    if missing and not (run.folder / "final").is_dir():
        raise UsageError(
            f"{file}: got no answers to {', '.join(missing)}, and no {run.folder}/final to ask, expected one of them; "
            "move the file away to train the run again"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a study and writes its tables; returns the exit code."""
    args = arguments(argv)
    try:
        study = load_study(args.study)
        study = study.model_copy(update={"results": args.results or study.results})
        check_names(study)
        args.out = args.out or Path("outputs/studies") / study.name
        trains = not (args.report or args.reference)
        _check_folders(study, args.out, trains=trains)
        every = runs_of(study, args.out, list(study.arms), study.seeds)
        results = Results(Path(study.results))
        _check_results(study, results, every, starts=trains)
        arms, seeds = chosen(study, args)
    except (RecipeError, UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    logging.disable_progress_bar()
    runs = [run for run in every if run.arm in arms and run.seed in seeds and trains]
    try:
        code = run_all(study, runs, results, args) if runs else 0
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    records = _whole(study, every, results)
    if records:
        text = tables(study.name, args.reference or study.reference, list(study.arms), records)
        print(text)
        if args.reference is None:
            plans = {run.arm: run.recipe.plan for run in every if _has_one_plan(run.recipe)}
            (Path(study.results) / TABLE).write_text(text, encoding="utf-8")
            draw_pictures(study, plans, records)
            print(f"written: {study.results}/{TABLE} and pictures")
    elif not trains:
        print(f"{study.results}: got no result of the study's runs, expected some", file=sys.stderr)
        return 2
    return code


def _whole(study: Study, runs: Sequence[Run], results: Results) -> list[Record]:
    """Returns the records, of the study's tasks and schedules alone; names those that lack some and leaves them out."""
    records = []
    for run in runs:
        schedules, record = study.arms[run.arm].schedules, results.read(run.arm, run.seed)
        if record is None:
            continue
        if missing := lacking(record, study.tasks, schedules):
            file = results.file(run.arm, run.seed)
            print(f"{file}: left out of the tables: no answers yet to {', '.join(missing)}", file=sys.stderr)
            continue
        scores = {task: {name: record["scores"][task][name] for name in schedules} for task in study.tasks}
        records.append({**record, "scores": scores})
    return records


def _has_one_plan(recipe: Recipe) -> bool:
    return len(recipe.model.plans) == 1 and recipe.train.sparse_attention is None


def _check_folders(study: Study, out: Path, *, trains: bool) -> None:
    """Makes the folders that a study writes; without training, that of its results has to be there."""
    if trains:
        make_folder("--out", out, ["harness.log"])
        make_folder("--out", out / "runs")
    elif not Path(study.results).is_dir():
        raise UsageError(f"results: got {study.results}, expected the folder of a study's results")
    make_folder("results", Path(study.results), (TABLE, *PICTURES))


def _check_results(study: Study, results: Results, runs: Sequence[Run], *, starts: bool) -> None:
    """Raises UsageError where a result is of another recipe than its arm's, or of other questions.

    With `starts`, also where its training started from other weights than those that its recipe names now.
    """
    for run in runs:
        record = results.read(run.arm, run.seed)
        if record is None:
            continue
        start = start_of(run.recipe.model) if starts else None  # None: the training says what is missing
        for what, found, expected in (
            ("recipe", record["recipe"], fingerprint(run.recipe)),
            ("limit", record["limit"], study.limit),
            ("start model", record.get("start"), start or record.get("start")),
        ):
            if found != expected:
                raise UsageError(
                    f"{results.file(run.arm, run.seed)}: got a result of another {what}, expected one of the study's; "
                    "move it away, or name another folder by --results"
                )


if __name__ == "__main__":
    sys.exit(main())
