"""easy-VQA and scenes as lmms-eval tasks, and their scores without an image.

The definitions are the YAML files beside this one, which name the functions here. Every question is asked alone;
nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import datasets
from lmms_eval.api.task import ConfigurableTask
from PIL import Image, ImageFile

from data import easy_vqa, scenes
from data.easy_vqa import Question
from data.scene_questions import FAMILIES
from eval.prompts import is_same_answer

ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval's import lets broken images through, in the whole process
_KINDS: Final = ("yes/no", "shape", "colour")
SETS: Final = {  # task: set, split, kinds of questions
    "easy_vqa": (easy_vqa, "test", _KINDS),
    "easy_vqa_phrase": (easy_vqa, "test", _KINDS),
    "scenes": (scenes, "test", FAMILIES),
    "scenes_compositional": (scenes, "compositional", FAMILIES),
}


def questions_of(task: str, limit: int | None = None) -> Sequence[Question]:
    """Returns the first `limit` questions (None: all) of a task of SETS, in the order in which they are asked."""
    built_in, split, _ = SETS[task]
    return built_in.questions(split)[:limit]


def floors(task: str, limit: int | None) -> dict[str, list[str]]:
    """Returns the answers of `always yes` and `words only` to a task's first `limit` questions (None: all).

    Neither looks at an image: `words only` gives the most frequent training answer to the same words.
    """
    questions = questions_of(task, limit)
    if SETS[task][0] is scenes:
        known = [(question.kind, question.text, question.answer) for question in scenes.questions("train")]
        return {"words only": scenes.words_only(known, [(question.kind, question.text) for question in questions])}
    answers = easy_vqa.words_only_answers()
    words_only = [answers.get(question.text, "") for question in questions]
    return {"always yes": ["yes"] * len(questions), "words only": words_only}


class BuiltInTask(ConfigurableTask):
    """The questions of a task of SETS as lmms-eval's rows."""

    def __init__(self, config: Mapping[str, Any], **options: Any) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"}, **options)

    def download(self, dataset_kwargs: Mapping[str, Any] | None = None) -> None:
        """Makes the dataset of the questions."""
        rows = [
            {
                "question_id": number,
                "image_id": int(question.image.stem),
                "image_file": str(question.image),
                "question": question.text,
                "answer": question.answer,
                "kind": question.kind,
            }
            for number, question in enumerate(questions_of(self.config.task))
        ]
        self.dataset = datasets.DatasetDict({self.config.test_split: datasets.Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Returns the question's image."""
    with Image.open(doc["image_file"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Returns the question between what the task writes before and after it."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{doc['question']}{around.get('post_prompt', '')}"


def metric_of(kind: str) -> str:
    """Returns the metric that counts one kind of question alone."""
    return kind.replace("/", "_")


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns 1 for an answer that equals the truth, but for case and a full stop, as `accuracy` and as its kind."""
    right = float(is_same_answer(results[0], doc["answer"]))
    return {"accuracy": right, metric_of(doc["kind"]): right}
