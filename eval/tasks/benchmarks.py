"""What is read off each task: its main metric, what one question counts, and which questions share an image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One lmms-eval task.

    Attributes:
        name: lmms-eval's name.
        metric: the metric that stands for it in tables.
        image: the field of a question's row that names its image, so that questions about one image are resampled
            together; None where the rows have none.
        scale: what the mean of the questions' values is multiplied by to give the metric: 1 for a share, 100 for per
            cent; None for a sum of another kind.
    """

    name: str
    metric: str
    image: str | None = None
    scale: float | None = 1.0


_ALL = (
    Benchmark("easy_vqa", "accuracy", "image_id"),
    Benchmark("easy_vqa_phrase", "accuracy", "image_id"),
    Benchmark("scenes", "accuracy", "image_id"),
    Benchmark("scenes_compositional", "accuracy", "image_id"),
    Benchmark("gqa", "exact_match", "imageId"),
    Benchmark("textvqa_val", "exact_match", "image_id"),
    Benchmark("textvqa_val_ocr", "exact_match", "image_id"),
    Benchmark("pope", "pope_accuracy", "image_source"),
    Benchmark("mme", "mme_perception_score", "question_id", scale=None),
    Benchmark("mmbench_en_dev_static", "gpt_eval_score", scale=100.0),
    Benchmark("scienceqa_img", "exact_match"),
    Benchmark("vqav2_val", "exact_match", "image_id"),
    Benchmark("seedbench", "seed_image"),
    Benchmark("vizwiz_vqa_val", "exact_match"),
    Benchmark("mmvet", "gpt_eval_score", scale=100.0),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
JUDGED = ("mmvet",)  # scored by a model behind an interface, with lmms-eval's own settings
_JUDGE_KEYS = {"openai": "OPENAI_API_KEY", "azure": "AZURE_API_KEY"}


def missing_judge(task: str) -> str | None:
    """Returns what is missing to score a judged task, in words; None where nothing is.

    Without a judge lmms-eval logs an error for each question and scores it 0.
    """
    key = _JUDGE_KEYS.get(os.environ.get("API_TYPE", "openai"))
    if task not in JUDGED or key is None or os.environ.get(key):
        return None
    return f"got {task}, which a judge model scores, without {key}, expected {key} set, or the task left out"


def value_of(sample: Mapping[str, Any], metric: str) -> float | None:
    """Returns what one question counts for a metric, 0 to 1; None where the question does not count for it.

    Args:
        sample: lmms-eval's record of the question; the metric's entry is a number, or what its aggregation reads.
        metric: the metric's name.
    """
    entry = sample.get(metric)
    if isinstance(entry, bool | int | float):
        return float(entry)
    if not isinstance(entry, Mapping):
        return None
    if "score" in entry:  # pope, mme, mmvet
        return float(entry["score"])
    said = entry.get("pred", entry.get("prediction"))  # seedbench, mmbench: a letter, or a text that begins with it
    if said is None or "answer" not in entry:
        return None
    return float(str(said).strip()[:1].lower() == str(entry["answer"]).strip().lower())
