"""The two tasks of the built-in set scenes under the real lmms-eval, and their floors."""

from types import SimpleNamespace

import pytest
import torch

from data import scenes
from data.scene_questions import FAMILIES
from eval.comparison.tables import floor_rows
from eval.lmms import FusedLlava, Harness
from eval.stage_analysis.samples import scenes_samples
from eval.tasks.benchmarks import BENCHMARKS, value_of


class Told(FusedLlava):
    """Answers from a table, or yes."""

    def __init__(self, answers):
        super().__init__(SimpleNamespace(device=torch.device("cpu")), None, batch=7)
        self.answers = answers

    def answer(self, asked, settings, ends):
        assert all([image.size == (96, 96) for image in one.images] == [True] for one in asked)
        return [self.answers.get((one.text, one.images[0].tobytes()), "Yes.") for one in asked]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Makes sets of 15 images each in a folder of this test."""
    monkeypatch.setenv("SCENES_CACHE", str(tmp_path / "cache"))
    for name in scenes.NAMES:
        monkeypatch.setitem(scenes.ROWS, name, 15)


@pytest.mark.parametrize(("task", "split"), [("scenes", "test"), ("scenes_compositional", "compositional")])
def test_a_task_asks_its_own_set_and_scores_each_family(small, tmp_path, task, split):
    harness = Harness(tmp_path, [task])
    asked = scenes.questions(split)
    outcome = harness.run(Told({}), task, None)
    assert len(outcome.samples) == 60
    assert [sample["doc"]["question"] for sample in outcome.samples] == [one.text for one in asked]
    assert set(outcome.metrics) == {"accuracy", *FAMILIES}
    yes = [float(one.answer == "yes") for one in asked]
    assert outcome.metrics["accuracy"] == pytest.approx(sum(yes) / 60)
    assert [value_of(sample, BENCHMARKS[task].metric) for sample in outcome.samples] == yes
    assert outcome.metrics["existence"] == pytest.approx(sum(yes) / 10)
    assert outcome.metrics["read"] == 0
    assert len({sample["doc"]["image_id"] for sample in outcome.samples}) == 15


def test_a_family_counts_its_questions_alone(small, tmp_path):
    reading = {
        (one.text, scenes.draw(scene).tobytes()): one.answer
        for _, scene, asked in scenes.generate_rows("test")
        for one in asked
        if one.family == "read"
    }
    outcome = Harness(tmp_path, ["scenes"]).run(Told(reading), "scenes", None)
    assert outcome.metrics["read"] == 1
    assert outcome.metrics["count"] == outcome.metrics["relation"] == 0


def test_the_floor_s_row_stands_beside_a_model_s(small):
    for task, split in (("scenes", "test"), ("scenes_compositional", "compositional")):
        (row,) = floor_rows(task, None)
        known = [(one.kind, one.text, one.answer) for one in scenes.questions("train")]
        asked = scenes.questions(split)
        said = scenes.words_only(known, [(one.kind, one.text) for one in asked])
        assert row["run"] == "words only"
        assert row["score"] == sum(one.answer == answer for one, answer in zip(asked, said, strict=True)) / 60
        assert set(row["metrics"]) == {"accuracy", *FAMILIES}
        assert floor_rows(task, 8)[0]["num_questions"] == 8


def test_the_stage_analysis_can_ask_the_set(small):
    samples = scenes_samples(6)
    asked = scenes.questions("test")
    assert [sample.answer for sample in samples] == [asked[number].answer for number in range(0, 60, 10)]
    assert all(sample.images[0].size == (96, 96) for sample in samples)
