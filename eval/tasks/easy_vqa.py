"""easy-VQA as an lmms-eval task: read from its installed package, nothing is downloaded.

The definition is eval/tasks/easy_vqa.yaml, which names the functions here. Every test question is asked alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from data.easy_vqa import VERSION, Question, answers_by_words, questions
from eval.tasks.built_in import BuiltInTask, is_right

KINDS = {"yes/no": "yes_no", "shape": "shape", "colour": "colour"}  # kind of question: metric


class EasyVQATask(BuiltInTask):
    """easy-VQA's 9,673 test questions."""

    def questions(self) -> list[Question]:
        """Returns the test questions, from the package."""
        return questions("test")


def version() -> str:
    """Returns the version of the data, for the task's record."""
    return VERSION


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Returns the question's image."""
    with Image.open(doc["image_file"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Returns the question between what the task writes before and after it."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{doc['question']}{around.get('post_prompt', '')}"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns 1 for an answer that equals the truth, but for case and a full stop, as `accuracy` and as its kind."""
    right = is_right(doc, results)
    return {"accuracy": right, KINDS[doc["kind"]]: right}


def mean(values: Sequence[float]) -> float:
    """Returns the mean."""
    return sum(values) / len(values)


def floors(limit: int | None) -> dict[str, list[str]]:
    """Returns the answers of two that look at no image, to the first `limit` questions (None: all).

    `always yes`, and `words only`: the most frequent training answer to the same words.
    """
    asked: Sequence[Question] = questions("test")[:limit]
    known = answers_by_words()
    return {
        "always yes": ["yes"] * len(asked),
        "words only": [known.get(question.text, "") for question in asked],
    }
