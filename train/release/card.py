"""Writes the model card of a release (README.md with the hub's metadata) and the licences of its parts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from data import easy_vqa, scenes
from data.sources import HUB, HubSet
from models import StagePlan
from models.schedules import SCHEDULES, TRAINED
from recipes.schema import Recipe
from train.errors import InputError, one_line
from train.release.checkpoint import OLDEST, Run, render

TABLE: Final = "table.json", "table.md"  # what eval.compare writes
TASK: Final = "image-text-to-text"
_SCORES: Final = ("task", "metric", "score", "standard_error", "num_questions")
_COSTS: Final = {  # key of a row of eval.compare: its heading
    "schedule": "schedule",
    "task": "task",
    "metric": "metric",
    "score": "score",
    "visual_token_layers": "visual token-layers",
    "flops": "FLOPs",
    "prefill_seconds": "prefill, s",
    "faster_than_dense": "faster",
}
_KINDS: Final = {
    name: " ".join((kind.__doc__ or "").split()).partition(". ")[0].rstrip(".") for name, kind in SCHEDULES.items()
}
_TRAINING: Final = ("steps", "seconds", "samples", "samples_per_second", "tokens", "loss", "ranks", "precision")
_LLAMA2: Final = "Llama 2 Community License"
_MODELS: Final = (  # pattern of a hub id, what is known
    (r"lmsys/vicuna-.*v1\.5.*", f"{_LLAMA2}: Vicuna v1.5 is a fine-tuned Llama 2"),
    (r"meta-llama/llama-2-.*", _LLAMA2),
    (r"(llava-hf/llava-1\.5|liuhaotian/llava-v1\.5)-.*", f"{_LLAMA2}: LLaVA-1.5 is a fine-tuned Vicuna v1.5"),
    (r"openai/clip-.*", "CLIP's repository, github.com/openai/CLIP, is under the MIT licence; read its model card too"),
)
_DATA: Final = {  # file name: dataset of the hub, what is known
    "llava_v1_5_mix665k.json": (
        "liuhaotian/LLaVA-Instruct-150K",
        "written in part by GPT-4: OpenAI's terms of use, beside the licence on the dataset's card; images under the "
        "terms of COCO, GQA, OCR-VQA, TextVQA and Visual Genome",
    ),
    "blip_laion_cc_sbu_558k.json": (
        "liuhaotian/LLaVA-Pretrain",
        "captions by BLIP on images of LAION, CC-3M and SBU: the terms of each, beside the dataset's card",
    ),
}
_EASY_VQA: Final = "the easy-vqa package, github.com/vzhou842/easy-VQA: MIT licence"
_SCENES: Final = "made by this project's generator: the terms of its code"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Comparison:
    """What eval.compare found.

    Attributes:
        table: table.md.
        rows: the rows of this run under the schedule that it starts under.
        schedules: its rows under every schedule.
    """

    table: str
    rows: list[dict[str, Any]]
    schedules: list[dict[str, Any]]


def read_comparison(folder: Path, run: Run, schedule: Mapping[str, Any] | None = None) -> Comparison:
    """Returns what a folder of eval.compare says of a run that is released under a schedule; None is the trained plan.

    Raises:
        InputError: it holds none, or none of this run.
    """
    try:
        record, table = (folder / name for name in TABLE)
        found = json.loads(record.read_text(encoding="utf-8"))
        text = table.read_text(encoding="utf-8")
        rows = found["rows"] if isinstance(found, dict) else found
        runs = sorted({str(row["run"]) for row in rows})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--comparison: {folder}: {one_line(error)}, expected a folder that eval.compare wrote"
        ) from None
    wanted: tuple[str, ...]
    if schedule is not None:
        wanted = (schedule["name"],) if len(schedule) == 1 else ()  # other settings than were measured
    else:
        wanted = (TRAINED,) if run.has_plan else (TRAINED, "dense")  # two names of one schedule
    ours = [row for row in rows if row["run"] == run.name]
    if not ours:
        raise InputError(f"--comparison: {folder}: got runs {', '.join(runs)}, expected one with {run.name}")
    kept: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in ours:
        if row.get("schedule") in wanted and isinstance(row.get("score"), int | float):
            kept.setdefault((row.get("task"), row.get("metric")), row)
    return Comparison(text, list(kept.values()), [row for row in ours if isinstance(row.get("score"), int | float)])


def write_card(
    folder: Path, run: Run, config: Any, comparison: Comparison | None, *, repo: str | None, plain: bool
) -> None:
    """Writes README.md of a release; without a `repo`, its id on the hub, its examples have a placeholder.

    `plain`: it is a plain Hugging Face checkpoint.
    """
    values = _values(run, config, comparison, place=repo or "path/to/this/folder", plain=plain)
    text = render("card.md.jinja", **values, packages=_packages(folder))
    metadata = _metadata(run, comparison, plain=plain)
    ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _packages(folder: Path) -> list[str]:
    """Returns what the release needs beside transformers and torch, by its processor."""
    fields = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    kind = fields.get("processor_class")
    packages = ["torchvision"] if "video_processor" in fields or kind == "PixtralProcessor" else []
    return [*packages, "num2words"] if kind == "SmolVLMProcessor" else packages


def plan_text(plan: StagePlan | None, depth: int) -> str:
    """Returns what a stage plan does in a decoder of `depth` layers, in a few sentences."""
    if plan is None:
        return f"Dense: visual tokens run through all {depth} decoder layers, as in LLaVA."
    layers = [layer for layer in range(depth) if plan.sees(layer)]
    if plan.layers is None:
        last = "never leave" if plan.exit == depth else f"are gone from layer {plan.exit} on"
        words = f"Visual tokens enter at decoder layer {plan.enter} and {last}"
    else:
        words = f"Visual tokens are live at decoder layers {', '.join(map(str, layers))}"
    words += f" (layers count from 0): {len(layers)} of {depth} layers see the image, the others run on text alone."
    if plan.update == "kv":
        words += " There a visual token only gives keys and values to the text, and never changes."
    for layer, amount in plan.keep.items():
        some = f"{amount:.4g} of the" if isinstance(amount, float) else str(amount)
        words += f" From layer {layer} on {some} visual tokens stay."
    if plan.keep:
        words += f" They are chosen by {'a learned scorer' if plan.select == 'learned' else plan.select}."
    return words


def _metadata(run: Run, comparison: Comparison | None, *, plain: bool) -> ModelCardData:
    models = [source.hub for source in model_sources(run.recipe) if source.hub]
    datasets = list(dict.fromkeys(source.hub for source in data_sources(run.recipe) if source.hub))
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=str(row.get("task")),
            dataset_name=str(row.get("task")),
            dataset_args={"num_questions": row.get("num_questions")},  # a part of the task, or all of it
            metric_type=str(row.get("metric")),
            metric_value=row["score"],
        )
        for row in (comparison.rows if comparison else [])
    ]
    return ModelCardData(
        model_name=run.recipe.name if results else None,
        library_name="transformers",
        pipeline_tag=TASK,
        license="other",
        license_name="see-licenses-md",
        license_link="LICENSES.md",
        base_model=models or None,
        datasets=datasets or None,
        eval_results=results or None,
        tags=["llava", "fused-llava", *([] if plain else ["custom_code"]), "vision-language"],
    )


def _values(run: Run, config: Any, comparison: Comparison | None, *, place: str, plain: bool) -> dict[str, Any]:
    """Returns what card.md.jinja is filled with."""
    depth = config.text_config.num_hidden_layers
    return {
        "name": run.recipe.name,
        "run": run,
        "place": place,
        "plain": plain,
        "staged": config.stages is not None,
        "plan": _fields_text(config.stages, depth),
        "plans": [(name, _fields_text(fields, depth)) for name, fields in (config.plans or {}).items()],
        "schedule": TRAINED if config.schedule is None else config.schedule["name"],
        "kinds": _KINDS,
        "costs": _COSTS,
        "scores": _SCORES,
        "training": _TRAINING,
        "comparison": comparison,
        # its headings go below the card's
        "table": comparison and re.sub("^#+", "###", comparison.table.strip(), flags=re.MULTILINE),
        "oldest": OLDEST,
        "trust": "" if plain else ", trust_remote_code=True",
        "models": model_sources(run.recipe),
        "data": data_sources(run.recipe),
        "skipped": sum(len(figures.get("skipped") or []) for figures in run.figures),
        "captions": run.data.prompt_format == "plain",
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
    }


def _fields_text(fields: Mapping[str, Any] | None, depth: int) -> str:
    return plan_text(None if fields is None else StagePlan.from_dict(fields), depth)


@dataclass(frozen=True)
class Source:
    """One part of a model.

    Attributes:
        part: what it is, for people.
        name: hub id, or the last part of a local path: a card names no folder of the machine that trained.
        hub: hub id, or None.
        licence: what is known of its licence.
    """

    part: str
    name: str
    hub: str | None
    licence: str


def model_sources(recipe: Recipe) -> list[Source]:
    """Returns the pretrained models that a run started from; none where all weights started at random."""
    parts = {"checkpoint": "whole model", "language_model": "language model", "vision_tower": "vision tower"}
    given = {words: getattr(recipe.model, key) for key, words in parts.items()}
    return [_model_source(words, place) for words, place in given.items() if place is not None]


def data_sources(recipe: Recipe) -> list[Source]:
    """Returns the data of all phases of a run, each once, the earliest phase first."""
    files = dict.fromkeys(source.path for phase in recipe.phases for source in phase.data.sources)
    return [_data_source(file) for file in files]


def licences(recipe: Recipe, *, code: bool) -> str:
    """Returns LICENSES.md: a note on the licence of each part; `code`: the release holds this project's code."""
    unknown = "no licence is named in this folder: ask the project's owner"
    licence = "see LICENSE" if licence_file() else unknown
    parts = {"models": model_sources(recipe), "data": data_sources(recipe)}
    return render("licenses.md.jinja", **parts, code=code, licence=licence)


def licence_file() -> Path | None:
    """Returns the project's licence, where it has one."""
    file = Path(__file__).resolve().parents[2] / "LICENSE"
    return file if file.is_file() else None


def _model_source(part: str, place: str) -> Source:
    if Path(place).exists() or not _HUB_ID.fullmatch(place):
        name = Path(place).name
        return Source(part, f"a local folder, {name}", None, f"check the licence of {name}")
    known = [words for pattern, words in _MODELS if re.fullmatch(pattern, place, re.IGNORECASE)]
    return Source(part, place, place, known[0] if known else f"check the licence of {place}")


def _data_source(file: str) -> Source:
    if scenes.is_built_in(file):
        return Source("data", f"drawn scenes and questions about them: `{file}`", None, _SCENES)
    if easy_vqa.is_built_in(file):
        return Source("data", f"easy-VQA, questions about coloured shapes: `{file}`", None, _EASY_VQA)
    if file.startswith(HUB):
        name = HubSet.of(file).name
        return Source("data", name, name, f"check the licence of {name}, and of its images")
    name = Path(file).name
    hub, words = _DATA.get(name, (None, f"check the licence of {name}, and of its images"))
    return Source("data", f"{name} ({hub})" if hub else name, hub, words)
