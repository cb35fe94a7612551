"""Reads a finished run and writes its checkpoint for release: with code, or as a plain Hugging Face checkpoint."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import SafetensorError
from transformers.dynamic_module_utils import custom_object_save

from data.config import DataConfig
from models import FusedAutoModel
from models.families import family_of, is_plain
from models.schedule_choice import require_runnable, resolve_config
from models.schedules import TRAINED, ScheduleError
from recipes.resolved import saved_data
from recipes.schema import Recipe, load_recipe
from train.checkpoints import FINAL, RECIPE, RUN, read_progress, step_of, whole_checkpoints
from train.errors import InputError, one_line
from train.release.proof import SUMS
from train.weights import check_loading_report, save_model

OLDEST: Final = "5.22"  # transformers that a release runs on
ENTRY: Final = "modeling_fused.py"  # the file that config.json's auto_map names
_TEMPLATES: Final = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # Python and markdown
)


def _shown(value: Any) -> str:
    """Returns a value as a table of markdown shows it."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return (
        "-" if value is None else f"{value:,}" if isinstance(value, int) else one_line(str(value)).replace("|", r"\|")
    )


_TEMPLATES.filters["shown"] = _shown


def render(template: str, **values: Any) -> str:
    """Returns a file of this package with its values filled in."""
    return _TEMPLATES.get_template(template).render(values)


@dataclass(frozen=True)
class Run:
    """A run with its final/, which is a full checkpoint whatever trained it: shards gathered, adapters merged.

    Attributes:
        folder: the run folder.
        recipe: the resolved recipe; its `model.config` is `final`, because the folder it named may be gone.
        data: data section of the phase that wrote `final`: how to ask the model, and how it sees images.
        figures: run.json of each phase, in their order.
    """

    folder: Path
    recipe: Recipe
    data: DataConfig
    figures: list[dict[str, Any]]

    @property
    def final(self) -> Path:
        """The checkpoint."""
        return self.folder / FINAL

    @property
    def has_plan(self) -> bool:
        """Whether the checkpoint runs under a stage plan, from the recipe or found in training."""
        return json.loads((self.final / "config.json").read_text(encoding="utf-8")).get("stages") is not None

    @property
    def name(self) -> str:
        """The run folder's name, as in tables."""
        return self.folder.resolve().name


def find_run(folder: Path) -> Run:
    """Returns the finished run of a folder.

    Raises:
        InputError: there is none; of an unfinished one it says how to finish it.
        RecipeError: its recipe cannot be read.
    """
    final = folder / FINAL
    if not (final / RUN).is_file():
        raise InputError(f"{folder}: {_unfinished(folder)}")
    # the shape is read from the checkpoint: the folder that the recipe names is of the machine that trained
    recipe = load_recipe(final / RECIPE, [f"model.config={json.dumps(str(final.resolve()))}"])
    figures = [_figures(path) for path in (folder / "align" / FINAL / RUN, final / RUN) if path.is_file()]
    return Run(folder, recipe, saved_data(final / RECIPE), figures)


def _figures(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: got no JSON ({error}), expected what a run writes") from None


def _unfinished(folder: Path) -> str:
    """Returns what is wrong with a folder without a finished run, and what to do about it."""
    given = folder.resolve()
    if (folder / SUMS).is_file():
        return f"got a release, expected the run folder that it was made from, which holds {FINAL}/{RUN}"
    if (folder / RUN).is_file():
        return f"got a {FINAL}/ folder, expected the run folder, {given.parent}"
    if not (folder / RECIPE).is_file():
        if folder.is_dir() and (given.parent / RECIPE).is_file():
            return f"got a folder of a run, expected the run folder, {given.parent}"
        return f"got no run, expected a run folder, which holds {FINAL}/{RUN}"
    finish = f"`deepspeed train/run.py {shlex.quote(str(folder / RECIPE))}` finishes it"
    found = whole_checkpoints(folder)
    if not found:
        return f"got a run without {FINAL}/, expected a finished one; {finish}"
    step, ranks = step_of(found[-1]), read_progress(found[-1]).ranks
    return (
        f"got an unfinished run with {found[-1].name}, expected a finished one; {finish}, with "
        f"train.max_steps={step} at that checkpoint, on {ranks} rank{'s' if ranks > 1 else ''} as before"
    )


def parse_schedule(text: str | None, run: Run) -> dict[str, Any] | None:
    """Returns the schedule for config.json that `--schedule` names, by name or as JSON, or None: the trained plan.

    Raises:
        InputError: it is none, or does not fit.
    """
    if text is None or text.strip() == TRAINED:
        return None
    try:
        choice = json.loads(text) if text.lstrip().startswith("{") else {"name": text.strip()}
        fields = json.loads((run.final / "config.json").read_text(encoding="utf-8"))
        config = family_of(fields.get("model_type")).config_class.from_pretrained(run.final)
        require_runnable(resolve_config(config, choice), config)
    except ScheduleError as error:
        raise InputError(f"--schedule: {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f'--schedule: got {text!r} ({error}), expected a name or {{"name": ...}}') from None
    return choice


def load(run: Run, schedule: Mapping[str, Any] | None) -> Any:
    """Returns the run's model with every weight of its config, in the type that it was saved in, under a schedule."""
    try:
        model, report = FusedAutoModel.from_pretrained(
            run.final, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{run.final}: cannot be loaded: {one_line(error)}; expected the checkpoint that a run writes"
        ) from error
    check_loading_report(run.final, report)
    plan, layers = model.plan, range(model.config.text_config.num_hidden_layers)
    is_full = plan is not None and plan.update == "full" and not plan.keep and all(map(plan.sees, layers))
    if is_full and not model.config.plans:
        model.config.stages = None  # dense computes the same
    model.config.schedule = None if schedule is None else dict(schedule)
    model.schedule = model.config.schedule
    model.config.use_cache = True  # training switched it off
    return model.eval()


def write_model(model: Any, folder: Path, *, max_shard_size: str) -> None:
    """Writes weights and config; and the code that runs them, unless transformers has it."""
    if is_plain(model.config):
        save_model(model, folder, max_shard_size=max_shard_size)
        return
    family = family_of(model.config.model_type)
    names = {"config": family.config_class.__name__, "model": family.model_class.__name__}
    module = ENTRY.removesuffix(".py")
    model.config.auto_map = {
        "AutoConfig": f"{module}.{names['config']}",
        "AutoModelForImageTextToText": f"{module}.{names['model']}",
        "AutoModelForMultimodalLM": f"{module}.{names['model']}",  # `transformers serve` asks for this one
    }
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    custom_object_save(model, folder)  # families.py and all that it imports, by relative imports, of models/
    modules = sorted(file.stem for file in folder.glob("*.py"))
    entry = render("modeling.py.jinja", **names, family=family.model_type, oldest=OLDEST, modules=modules)
    (folder / ENTRY).write_text(entry, encoding="utf-8")
