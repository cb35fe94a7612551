"""The model card of a release: README.md with the hub's metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from models import FusedLlavaConfig, StagePlan
from train.release_run import InputError, Run
from train.release_sources import data_sources, model_sources

TABLE: Final = "table.json", "table.md"  # what eval.compare writes
TASK: Final = "image-text-to-text"
_TRAINING: Final = ("steps", "seconds", "samples", "samples_per_second", "tokens", "loss", "ranks", "precision")


@dataclass(frozen=True)
class Comparison:
    """What eval.compare found.

    Attributes:
        table: table.md.
        rows: the rows of this run under the schedule that it was trained with.
    """

    table: str
    rows: list[dict[str, Any]]


def read_comparison(folder: Path, run: Run) -> Comparison:
    """Returns the comparison in a folder of eval.compare.

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
            f"--comparison: {folder}: {' '.join(str(error).split())}, accepted: a folder that eval.compare wrote"
        ) from None
    trained = ("trained",) if run.recipe.plan else ("trained", "dense")  # two names of one schedule
    own = [row for row in rows if row["run"] == run.name]
    if not own:
        raise InputError(f"--comparison: {folder}: found runs {', '.join(runs)}, accepted: one with {run.name}")
    kept: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in own:
        if row.get("schedule") in trained and isinstance(row.get("score"), int | float):
            kept.setdefault((row.get("task"), row.get("metric")), row)
    return Comparison(text, list(kept.values()))


def write_card(
    folder: Path, run: Run, config: FusedLlavaConfig, comparison: Comparison | None, repo: str | None
) -> None:
    """Writes README.md.

    Args:
        folder: of the release.
        run: what is released.
        config: its config.
        comparison: what it is worth next to others; None where it was not compared.
        repo: hub id that it will have; None leaves a placeholder in the examples.
    """
    lines = _body(run, config, comparison, repo or "path/to/this/folder")
    metadata = _metadata(run, comparison)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")
    card.save(folder / "README.md")


def plan_words(plan: StagePlan | None, depth: int) -> str:
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
        words += " There a visual token only lends keys and values to the text, and never changes."
    for layer, amount in plan.keep.items():
        some = f"{amount:.4g} of the" if isinstance(amount, float) else str(amount)
        words += f" From layer {layer} on {some} visual tokens stay."
    return words


def _metadata(run: Run, comparison: Comparison | None) -> ModelCardData:
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
        tags=["llava", "fused-llava", "custom_code", "vision-language"],
    )


def _body(run: Run, config: FusedLlavaConfig, comparison: Comparison | None, place: str) -> Iterator[str]:
    depth = config.text_config.num_hidden_layers
    yield f"# {run.recipe.name}"
    yield ""
    yield (
        "A LLaVA trained with Fused LLaVA: the image is shown only to the decoder layers that a stage plan names. "
        "Weights and their names are LLaVA's; the code in this folder runs the layers."
    )
    yield ""
    yield plan_words(None if config.stages is None else StagePlan.from_dict(config.stages), depth)
    yield from ("", "## Use", "", *_use(place))
    yield from ("", "## Training", "", *_training(run))
    yield from ("", "## Evaluation", "", *_evaluation(run, comparison))
    yield from ("", "## Limits", "", *_limits(run, config))
    yield from ("", "## Files", "", *_files(run))


def _use(place: str) -> Iterator[str]:
    yield f"""\
Needs `transformers` >= {transformers.__version__} and `torch`; `trust_remote_code=True` runs the `*.py` files of this
folder. Image first, then the question: the chat template writes it as training did.

```python
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{place}", trust_remote_code=True)
content = [{{"type": "image", "url": "picture.png"}}, {{"type": "text", "text": "What is in this picture?"}}]
messages = [{{"role": "user", "content": content}}]
print(pipe(text=messages, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```

or, with `messages` as above:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{place}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{place}", trust_remote_code=True)
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

As a server with OpenAI's chat interface (`pip install "transformers[serving]"`):

```bash
transformers serve {place} --trust-remote-code --port 8000
```

In a message to `/v1/chat/completions` an image is
`{{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}}`."""


def _training(run: Run) -> Iterator[str]:
    for source in model_sources(run.recipe):
        yield f"- {source.part}: {source.name}"
    if not model_sources(run.recipe):
        yield "- weights: random at the start"
    for source in data_sources(run.recipe):
        yield f"- {source.part}: {source.name}"
    yield f"- conversations as `{run.data.format}`, images by `{run.data.image_aspect}` (keys of the recipe)"
    for phase in run.recipe.phases:
        if phase.train.lora is not None:
            lora = phase.train.lora
            yield f"- phase {phase.name}: LoRA, r {lora.r}, alpha {lora.alpha:g}; merged into these weights"
    yield ""
    yield f"| phase | {' | '.join(name.replace('_', ' ') for name in _TRAINING)} |"
    yield f"| --- |{' --- |' * len(_TRAINING)}"
    for figures in run.figures:
        yield f"| {figures.get('phase', '-')} | {' | '.join(_shown(figures.get(name)) for name in _TRAINING)} |"
    skipped = sum(len(figures.get("skipped") or []) for figures in run.figures)
    yield ""
    yield (
        "Tokens count visual ones too; the loss is the last log line's, the mean over labelled tokens. "
        f"Rows left out for faults: {skipped}. Everything else about the run is in `recipe.yaml`."
    )


def _evaluation(run: Run, comparison: Comparison | None) -> Iterator[str]:
    if comparison is None:
        yield "This model was not compared with others."
        return
    yield f"By `python -m eval.compare`; this model is the run `{run.name}`."
    if comparison.rows:
        yield from ("", "| task | metric | score | standard error | questions |", "| --- | --- | --- | --- | --- |")
    for row in comparison.rows:
        cells = (row.get(name) for name in ("task", "metric", "score", "standard_error", "num_questions"))
        yield f"| {' | '.join(_shown(cell) for cell in cells)} |"
    table = re.sub("^#+", "###", comparison.table.strip(), flags=re.MULTILINE)  # its headings go below this one
    yield from ("", "The whole comparison:", "", table)


def _limits(run: Run, config: FusedLlavaConfig) -> Iterator[str]:
    yield "- It knows what the data named above, and its pretrained parts, taught it; its answers are not filtered."
    if run.data.format == "plain":
        yield "- It was trained on captions alone, and answers no questions."
    if config.stages is not None:
        yield "- It was trained under its stage plan; under another, dense included, it is not what was trained."
        yield (
            "- `logits` at visual positions mean nothing; a label directly after a visual token is refused, so there "
            "must be text (a newline) between image and answer."
        )
    yield "- Attention maps and hidden states of all layers (`output_attentions`) are refused."
    yield "- The pruning schedules (VisiPruner, FastV, ...) are in the project's repository, not in this folder."
    torch_version, version = torch.__version__.partition("+")[0], transformers.__version__
    yield (
        f"- This folder was loaded and compared with the trained model under torch {torch_version} and transformers "
        f"{version}; other versions were not tried."
    )


def _files(run: Run) -> Iterator[str]:
    yield "- `config.json`: the model's shape and, as `stages`, its stage plan"
    yield "- `recipe.yaml`: the training, enough to repeat it"
    yield "- `LICENSES.md`: what is known of the licence of each part"
    yield "- `SHA256SUMS`: `sha256sum -c SHA256SUMS` checks the files"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
