"""The built-in set scenes as lmms-eval tasks: `scenes` asks its test set, `scenes_compositional` the held-out pairs.

The definitions are eval/tasks/scenes.yaml and scenes_compositional.yaml. Every question is asked alone; beside the
accuracy there is one for each family of questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from data.scenes import VERSION, Question, questions, words_only
from eval.tasks.built_in import BuiltInTask, is_right

SPLITS: Final = {"scenes": "test", "scenes_compositional": "compositional"}  # task: its set


class ScenesTask(BuiltInTask):
    """The 6,000 questions of one set; the task's `test_split` names it."""

    def questions(self) -> list[Question]:
        """Returns the questions, and makes the set where it is not there yet."""
        return questions(self.config.test_split)


def version() -> str:
    """Returns the version of the data, for the task's record."""
    return VERSION


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Returns 1 for an answer that equals the truth, but for case and a full stop, as `accuracy` and as its family."""
    right = is_right(doc, results)
    return {"accuracy": right, doc["kind"]: right}


def floors(task: str, limit: int | None) -> dict[str, list[str]]:
    """Returns the answers of `words only` to a task's first `limit` questions (None: all)."""
    known = [(question.kind, question.text, question.answer) for question in questions("train")]
    asked = [(question.kind, question.text) for question in questions(SPLITS[task])[:limit]]
    return {"words only": words_only(known, asked)}
