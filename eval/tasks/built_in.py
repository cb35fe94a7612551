"""A built-in set as an lmms-eval task: what easy_vqa.py and scenes.py share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableTask
from PIL import ImageFile

from data.easy_vqa import Question

ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval's import lets broken images through, in the whole process


class BuiltInTask(ConfigurableTask):
    """Questions of a built-in set as lmms-eval's rows; a task says which in `questions`.

    Args:
        config: the task's YAML.
        options: whatever else lmms-eval hands to a task.
    """

    def __init__(self, config: Mapping[str, Any], **options: Any) -> None:
        given = dict(config)
        given.pop("class", None)
        super().__init__(config=given, **options)

    def questions(self) -> Sequence[Question]:
        """Returns the questions of the task's `test_split`."""
        raise NotImplementedError

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Makes the dataset of the questions; nothing is downloaded."""
        questions = self.questions()
        rows = datasets.Dataset.from_dict(
            {
                "question_id": list(range(len(questions))),
                "image_id": [int(question.image.stem) for question in questions],
                "image_file": [str(question.image) for question in questions],
                "question": [question.text for question in questions],
                "answer": [question.answer for question in questions],
                "kind": [question.kind for question in questions],
            }
        )
        self.dataset = datasets.DatasetDict({self.config.test_split: rows})
        self.dataset_no_image = self.dataset


def is_right(doc: Mapping[str, Any], results: Sequence[str]) -> float:
    """Returns 1 for an answer that equals the truth, but for case and a full stop, else 0."""
    return float(results[0].strip().lower().rstrip(".") == doc["answer"])
