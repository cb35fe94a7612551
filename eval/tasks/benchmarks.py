"""The benchmarks: the main metric of each task, the score of one question, and which questions share an image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One task of lmms-eval, by its name there.

    Questions whose field `image` names the same image are resampled together. The mean of the questions' values times
    `scale` is the metric: 1 for a share, 100 for per cent; None for a sum of another kind.
    """

    name: str
    metric: str  # which stands for the task in tables
    image: str | None = None  # None: a question's row names no image
    scale: float | None = 1.0
    folder: str = ""  # where lmms-eval defines it; "": its YAML stands beside this file


_ALL = (
    Benchmark("easy_vqa", "accuracy", "image_id"),
    Benchmark("easy_vqa_phrase", "accuracy", "image_id"),
    Benchmark("scenes", "accuracy", "image_id"),
    Benchmark("scenes_compositional", "accuracy", "image_id"),
    Benchmark("gqa", "exact_match", "imageId", folder="gqa"),
    Benchmark("textvqa_val", "exact_match", "image_id", folder="textvqa"),
    Benchmark("textvqa_val_ocr", "exact_match", "image_id"),
    Benchmark("pope", "pope_accuracy", "image_source", folder="pope"),
    Benchmark("mme", "mme_perception_score", "question_id", scale=None, folder="mme"),
    Benchmark("mmbench_en_dev_static", "gpt_eval_score", scale=100.0, folder="mmbench"),
    Benchmark("scienceqa_img", "exact_match", folder="scienceqa"),
    Benchmark("vqav2_val", "exact_match", "image_id", folder="vqav2"),
    Benchmark("seedbench", "seed_image", folder="seedbench"),
    Benchmark("vizwiz_vqa_val", "exact_match", folder="vizwiz_vqa"),
    Benchmark("mmvet", "gpt_eval_score", scale=100.0, folder="mmvet"),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}
JUDGED = ("mmvet",)  # scored by a model behind an interface, with lmms-eval's settings
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

    `sample` is lmms-eval's record of the question: the metric's entry is a number, or what its aggregation reads.
    """
    entry = sample.get(metric)
    if isinstance(entry, bool | int | float):
        return float(entry)
    if not isinstance(entry, Mapping):
        return None
    if "score" in entry:  # pope, mme, mmvet
        return float(entry["score"])
    prediction = entry.get(
        "pred", entry.get("prediction")
    )  # seedbench, mmbench: a letter, or a text that begins with it
    if prediction is None or "answer" not in entry:
        return None
    return float(str(prediction).strip()[:1].lower() == str(entry["answer"]).strip().lower())
