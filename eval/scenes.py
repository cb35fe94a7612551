"""The built-in set scenes as lmms-eval tasks: `scenes` asks its test set, `scenes_compositional` the held-out pairs.

The definitions are eval/tasks/scenes.yaml and scenes_compositional.yaml. Every question is asked alone; beside the
accuracy there is one for each family of questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import datasets
from lmms_eval.api.task import ConfigurableTask
from PIL import ImageFile

from data.scenes import VERSION, questions, words_only

ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval's import lets broken images through, in the whole process
SPLITS: Final = {"scenes": "test", "scenes_compositional": "compositional"}  # task: its set


class ScenesTask(ConfigurableTask):
    """The 6,000 questions of one set; the task's `test_split` names it.

    Args:
        config: the task's YAML.
        options: whatever else lmms-eval hands to a task.
    """

    def __init__(self, config: Mapping[str, Any], **options: Any) -> None:
        given = dict(config)
        given.pop("class", None)
        super().__init__(config=given, **options)

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Reads the questions, and makes the set where it is not there yet."""
        asked = questions(self.config.test_split)
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


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns 1 for an answer that equals the truth, but for case and a full stop, as `accuracy` and as its family."""
    right = float(results[0].strip().lower().rstrip(".") == doc["answer"])
    return {"accuracy": right, doc["kind"]: right}


def floors(task: str, limit: int | None) -> dict[str, list[str]]:
    """Returns the answers of `words only` to a task's first `limit` questions (None: all)."""
    known = [(question.kind, question.text, question.answer) for question in questions("train")]
    asked = [(question.kind, question.text) for question in questions(SPLITS[task])[:limit]]
    return {"words only": words_only(known, asked)}
