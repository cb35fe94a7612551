"""What a release consists of beside its processor: weights, config and code, or a plain Hugging Face checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import SafetensorError
from transformers.dynamic_module_utils import custom_object_save

from models import FusedAutoModel, StagePlan
from models.families import family_of
from models.fused import require_nothing_more, resolve_config
from models.schedules import TRAINED, ScheduleError
from train.release.errors import InputError
from train.release.run import Run
from train.weights import refuse_faults, save_model

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


def render(template: str, **values: Any) -> str:
    """Returns a file of this package with its values filled in."""
    return _TEMPLATES.get_template(template).render(values)


def parse_schedule(text: str | None, run: Run) -> dict[str, Any] | None:
    """Returns the schedule for config.json that `--schedule` names, or None: the trained plan.

    Args:
        text: a name of SCHEDULES, or a JSON object {"name": ..., setting: ...}.
        run: whose decoder it has to fit.

    Raises:
        InputError: it is none, or does not fit.
    """
    if text is None or text.strip() == TRAINED:
        return None
    try:
        choice = json.loads(text) if text.lstrip().startswith("{") else {"name": text.strip()}
        fields = json.loads((run.final / "config.json").read_text(encoding="utf-8"))
        config = family_of(fields.get("model_type")).config_class.from_pretrained(run.final)
        require_nothing_more(resolve_config(config, choice), config)
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
            f"{run.final}: cannot be loaded: {' '.join(str(error).split())}; expected the checkpoint that a run writes"
        ) from error
    refuse_faults(run.final, report)
    if (
        model.plan is not None
        and not model.config.plans
        and _is_dense(model.plan, model.config.text_config.num_hidden_layers)
    ):
        model.config.stages = model.plan = None  # it computes the same
    model.config.schedule = None if schedule is None else dict(schedule)
    model.schedule = model.config.schedule
    model.config.use_cache = True  # training switched it off
    return model.eval()


def _is_dense(plan: StagePlan, num_layers: int) -> bool:
    """Returns whether a plan lets every layer run on every visual token."""
    return plan.update == "full" and not plan.keep and all(plan.sees(layer) for layer in range(num_layers))


def is_plain(model: Any) -> bool:
    """Returns whether Hugging Face's class of the family computes the same: dense, and transformers has the class."""
    has_class = _base(model).__module__.startswith("transformers.")
    return has_class and not any((model.config.stages, model.config.plans, model.config.schedule))


def write_model(model: Any, folder: Path, *, max_shard_size: str) -> None:
    """Writes weights and config; and the code that runs them, unless transformers has it."""
    family = family_of(model.config.model_type)
    if is_plain(model):
        if family.model_type == "llava":  # under the names of llava-hf's checkpoints, which other engines know too
            save_model(model, folder, max_shard_size=max_shard_size)
        else:
            _plain(model).save_pretrained(folder, max_shard_size=max_shard_size)
        return
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


def _base(model: Any) -> Any:
    """Returns the class that a fused class was made of."""
    return type(model).__bases__[-1]


def _plain(model: Any) -> Any:
    """Returns Hugging Face's model of the family with the very weights of a dense fused one."""
    fields = model.config.to_dict()
    for name in ("model_type", "stages", "plans", "schedule", "architectures", "auto_map"):
        fields.pop(name, None)
    config = type(model.config).__bases__[-1](**fields)
    with torch.device("meta"):
        plain = _base(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
