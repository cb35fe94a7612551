"""easy-VQA as an lmms-eval task: read from its installed package, nothing is downloaded.

The definition is eval/tasks/easy_vqa.yaml, which names the functions here. Every test question is asked alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableTask
from PIL import Image, ImageFile

from data.easy_vqa import VERSION, Question, answers_by_words, questions

ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval's import lets broken images through, in the whole process
KINDS = {"yes/no": "yes_no", "shape": "shape", "colour": "colour"}  # kind of question: metric


class EasyVQATask(ConfigurableTask):
    """easy-VQA's 9,673 test questions.

    Args:
        config: the task's YAML.
        options: whatever else lmms-eval hands to a task.
    """

    def __init__(self, config: Mapping[str, Any], **options: Any) -> None:
        given = dict(config)
        given.pop("class", None)
        super().__init__(config=given, **options)

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Reads the questions from the package."""
        asked = questions("test")
        rows = datasets.Dataset.from_dict(
            {
                "question_id": list(range(len(asked))),
                "image_id": [int(question.image.stem) for question in asked],
                "image_file": [str(question.image) for question in asked],
                "question": [question.text for question in asked],
                "answer": [question.answer for question in asked],
                "kind": [question.kind for question in asked],
            }
        )
        self.dataset = datasets.DatasetDict({self.config.test_split: rows})
        self.dataset_no_image = self.dataset


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
    right = float(results[0].strip().lower().rstrip(".") == doc["answer"])
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
