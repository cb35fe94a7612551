"""The comparison from checkpoint folders to tables and report; answers are really generated, by random models."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available

from eval import bench, compare, measure, stages
from eval.arguments import UsageError, schedules_of
from eval.checkpoint import Checkpoint, CheckpointError
from eval.compare import arguments, main, prepare
from eval.comparison.cells import ComparisonError, Store, code, meaning, named
from eval.comparison.plots import Point, draw_learning_curves, draw_live, draw_scores, pareto_front, smooth
from eval.comparison.tables import (
    FLOOR,
    cell_row,
    common_name,
    drop_uninformative,
    groups_of,
    markdown,
    score_error,
    score_table,
    score_text,
    settings_text,
    shown_schedule,
)
from eval.comparison.tables import compared as compared_seeds
from eval.prompts import VqaPrompt
from models import StagePlan
from models.schedules import VTW, Dense, FastV, Fused, PyramidDrop, ShortV, Within
from recipes.resolved import dump_recipe
from recipes.schema import load_recipe
from tests.browser import open_page
from tests.conftest import QUICKSTART, ROOT, write_run


@pytest.fixture(scope="module", autouse=True)
def little_is_measured():
    """A fresh process for each checkpoint takes ten seconds; tests/test_eval_speed.py measures once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "REPEATS", 1)
        patch.setattr(measure, "STEPS", 2)
        patch.setattr(measure, "added_memory", lambda calls, *_: dict.fromkeys(calls, 2**20))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quickstart_run):
    dense = write_run(tmp_path_factory.mktemp("runs") / "dense", None)
    return [str(dense), str(quickstart_run)]


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """A finished comparison's folder."""
    out = tmp_path_factory.mktemp("compared")
    assert main([*runs, "--schedules", "trained,dense,fastv,vtw", "--limit", "40", "--out", str(out)]) == 0
    return out


def rows_of(out):
    return json.loads((out / "table.json").read_text())["rows"]


def test_there_is_a_row_for_each_checkpoint_and_schedule(compared):
    assert [(row["run"], row["schedule"]) for row in rows_of(compared)] == [
        ("always yes", FLOOR),
        ("words only", FLOOR),
        ("dense", "dense"),  # trained is dense there
        ("dense", "fastv"),
        ("dense", "vtw"),
        ("fused", "trained"),
        ("fused", "dense"),
        ("fused", "fastv"),
        ("fused", "vtw"),
    ]


def test_rows_carry_score_error_and_cost(compared):
    rows = {(row["run"], row["schedule"]): row for row in rows_of(compared)}
    for row in rows.values():
        assert row["num_questions"] == 40
        assert 0 <= row["score"] <= 1
        assert row["metrics"]["accuracy"] == row["score"]
    layers = {key: row.get("visual_token_layers") for key, row in rows.items()}
    assert layers["dense", "dense"] == layers["fused", "dense"] == 8 * 64
    assert layers["fused", "trained"] == 3 * 64
    assert layers["dense", "vtw"] == 4 * 64
    assert layers["fused", "vtw"] == 2 * 64  # the plan's layers 2 and 3: VTW lets go at 4
    assert layers["fused", "fastv"] == 64 + 2 * 32  # it needs a layer that saw vision before it can choose
    trained, dense = rows["fused", "trained"], rows["dense", "dense"]
    assert trained["flops"] < dense["flops"] == trained["dense_flops"]
    assert trained["cache_bytes"] < dense["cache_bytes"]
    assert trained["vision_attention"] < dense["vision_attention"]
    assert rows["fused", "fastv"]["within_plan"]
    assert not trained["within_plan"]
    for key in ("prefill_seconds", "decode_tokens_per_second", "peak_bytes"):
        assert trained[key] > 0
    assert dense["faster_than_dense"] == 1


def test_differences_are_paired_with_the_dense_checkpoint(compared):
    record = json.loads((compared / "table.json").read_text())
    assert record["compared_with"] == {"easy_vqa": "dense dense"}
    rows = {(row["run"], row["schedule"]): row for row in record["rows"]}
    assert "difference" not in rows["dense", "dense"]
    assert [row["run"] for row in record["rows"] if row.get("is_reference")] == ["dense"]
    found = rows["fused", "trained"]
    expected = found["score"] - rows["dense", "dense"]["score"]
    assert found["difference"]["mean"] == pytest.approx(expected)
    assert found["difference"]["gained"] - found["difference"]["lost"] == round(40 * expected)


def test_tables_say_the_same_in_every_form(compared, capsys):
    text = (compared / "table.md").read_text()
    assert "| fused | fastv within the plan |" in text
    assert "| fused | 25.0 | 30 | 4.0 |" in text
    with (compared / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, rows_of(compared), strict=True):
        assert float(line["score"]) == row["score"]
        assert line["metrics.yes_no"] == str(row["metrics"]["yes_no"])


def test_a_finished_comparison_runs_nothing_again(compared, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_cell", None)
    monkeypatch.setattr(Checkpoint, "load", None)
    before = (compared / "table.md").read_text()
    shutil.copytree(compared, tmp_path / "kept")
    gone, damaged, *_ = sorted((tmp_path / "kept/cells/dense/easy_vqa_pictures").iterdir())
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:100])
    given = ["--schedules", "trained,dense,fastv,vtw", "--limit", "40", "--out", str(tmp_path / "kept")]
    assert main([*runs, *given]) == 0
    assert (tmp_path / "kept/table.md").read_text() == before
    assert before in capsys.readouterr().out
    pages, whole = ((out / "report.html").read_text().count("data:image/png") for out in (tmp_path / "kept", compared))
    assert pages == whole - 2 * (1 + 3)  # the picture, and the strip of each row of dense


def test_other_settings_in_one_folder_are_refused(compared, runs, capsys):
    assert main([*runs, "--limit", "41", "--out", str(compared)]) == 2
    assert "holds cells made with limit 40, got 41, expected the same" in capsys.readouterr().err.splitlines()[-1]


def test_a_cell_is_kept_for_what_decides_it_alone(tmp_path):
    """Weights, the schedule with its settings, code: with another of them the record is not this cell's."""
    made_by = {"weights": "w", "code": "c", "schedules": {"fastv": "FastV(layer=2)", "vtw": "VTW(layer=4)"}}
    store = Store(tmp_path, "run", **made_by)
    for parts in (("fastv", "pope"), ("speed",)):
        assert not store.is_outdated(*parts)
        store.write({"status": "done"}, *parts)
        assert store.read(*parts)["status"] == "done"
    fewer = Store(tmp_path, "run", **made_by | {"schedules": {"fastv": "FastV(layer=2)"}})
    assert fewer.read("speed") is not None
    for other in ({"weights": "x"}, {"code": "x"}, {"schedules": {"fastv": "FastV(layer=3)", "vtw": "VTW(layer=4)"}}):
        store = Store(tmp_path, "run", **made_by | other)
        assert store.read("fastv", "pope") is None
        assert store.read("speed") is None
        assert store.is_outdated("fastv", "pope")


@pytest.mark.parametrize(
    "content", ["", '{"status": "do', "[]", "[1]", "{}", '{"decided_by": 1}', "\udcff", "[" * 99_999]
)
def test_a_cell_that_cannot_be_read_is_run_again(tmp_path, content):
    store = Store(tmp_path, "run", "w", "c", {"vtw": "VTW(layer=4)"})
    for parts in (("vtw", "pope"), ("speed",)):
        store.write({"status": "done"}, *parts)
        file = tmp_path.joinpath("cells/run", *parts).with_suffix(".json")
        file.write_text(content, errors="surrogateescape")
        assert store.read(*parts) is None
        assert store.is_outdated(*parts)


def test_what_is_in_the_way_of_a_comparison_is_told_before_a_weight_is_loaded(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Checkpoint, "load", None)
    for number, (name, content) in enumerate(
        [
            *((name, None) for name in ("table.md", "report.html", "easy_vqa_score_time.png", "settings.json")),
            *(("settings.json", content) for content in ("", "[1]", "{")),
            *(("cells/dense/speed.json", None), ("cells/dense/vtw/easy_vqa.json", None)),
            *((name, "") for name in ("cells", "cells/dense", "cells/dense/vtw", "cells/dense/easy_vqa_pictures")),
        ]
    ):
        file = tmp_path / str(number) / name
        file.parent.mkdir(parents=True)
        if content is None:
            file.mkdir()
        else:
            file.write_text(content)
        assert main([runs[0], "--schedules", "vtw", "--out", str(tmp_path / str(number))]) == 2, name
        (line,) = [line for line in capsys.readouterr().err.splitlines() if str(tmp_path) in line]
        assert line.startswith("--out: ")
        assert str(file) in line
        assert "expected " in line


def test_comments_docstrings_and_layout_do_not_make_other_code():
    first = meaning(
        '"""One."""\nclass A:\n    """Two."""\n    def f(self, x):\n        # three\n        return (x + 1)\n'
    )
    assert meaning("class A:\n    def f(self, x): return x + 1") == first
    assert meaning("class A:\n    def f(self, x): return x + 2") != first


def test_all_code_that_answers_pass_through_decides_a_cell(tmp_path):
    for folder in ("models", "data", "eval"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = code(tmp_path)
    deciding = ("models/fused", "data/processor", "data/dataset", "data/images", "data/chat", "data/scenes")
    for name in (*deciding, "eval/prompts", "eval/live", "eval/tasks/built_in", "eval/tasks/benchmarks"):
        with (tmp_path / f"{name}.py").open("a") as file:
            file.write("\nONE_MORE = 1\n")
        before, last = code(tmp_path), before
        assert before != last, name
    (tmp_path / "eval/comparison/report.py").write_text("")  # only shows them
    assert code(tmp_path) == before


def test_cells_of_other_code_are_run_again_and_it_is_said(runs, tmp_path, monkeypatch, capsys):
    given = [runs[0], "--limit", "2", "--out", str(tmp_path)]
    assert main(given) == 0
    before = (tmp_path / "cells/dense/dense/easy_vqa.json").read_text()
    monkeypatch.setattr(compare, "code", lambda: "0123456789ab")
    assert main(given) == 0
    assert "1 of the kept cells will run again" in capsys.readouterr().err
    assert (tmp_path / "cells/dense/dense/easy_vqa.json").read_text() != before


def test_a_failed_cell_is_told_and_run_again(runs, tmp_path, monkeypatch, capsys):
    given = [runs[1], "--schedules", "trained,vtw", "--limit", "4", "--out", str(tmp_path)]
    real, ran = compare.run_cell, []

    def failing(loaded, schedule, task, **options):
        ran.append(type(getattr(schedule, "inner", schedule)).__name__)
        if ran == ["Fused", "VTW"]:
            raise RuntimeError("CUDA out of memory")
        return real(loaded, schedule, task, **options)

    monkeypatch.setattr(compare, "run_cell", failing)
    assert main(given) == 1
    text = (tmp_path / "table.md").read_text()
    assert "| fused | vtw | failed |" in text
    assert "| layer 4 |" in text
    assert "- fused, vtw, easy_vqa: RuntimeError: CUDA out of memory" in text
    assert "CUDA out of memory" in (tmp_path / "report.html").read_text()
    assert main(given) == 0
    assert ran == ["Fused", "VTW", "VTW"]
    assert "failed" not in (tmp_path / "table.md").read_text()


def test_changed_weights_are_evaluated_again(tmp_path):
    folder = write_run(tmp_path / "run", None)
    found = Checkpoint.find(folder)
    before = compare.fingerprint(found)
    write_run(folder, {"enter": 1, "exit": 2})
    assert compare.fingerprint(found) != before


def test_a_checkpoint_that_does_not_load_fails_its_cells_alone(runs, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    (broken / "final/model.safetensors").write_bytes(b"not safetensors")
    out = tmp_path / "out"
    assert main([str(broken), runs[1], "--limit", "4", "--out", str(out)]) == 1
    rows = {row["run"]: row["status"] for row in rows_of(out)}
    assert (rows["broken"], rows["fused"]) == ("failed", "done")


def test_an_align_phase_is_asked_in_its_own_format(tmp_path, runs):
    """LLaVA's has captions alone, which are no questions."""
    recipe = load_recipe(ROOT / "recipes/llava_fused.yaml")
    for phase, place in (("align", "run/align/final"), ("tune", "run/final")):
        shutil.copytree(Path(runs[0]) / "final", tmp_path / place)
        (tmp_path / place / "recipe.yaml").write_text(dump_recipe(recipe))
        (tmp_path / place / "run.json").write_text(
            json.dumps({"phase": phase, "seconds": 1.0, "steps": 1, "samples": 2})
        )
    found = Checkpoint.find(tmp_path / "run")
    assert (found.chat_format, found.aspect) == ("vicuna_v1", "pad")
    with pytest.raises(CheckpointError, match=r"data\.format plain, which has no questions"):
        Checkpoint.find(tmp_path / "run/align")


def test_rows_that_are_asked_differently_are_refused(runs, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    data = 'files: ["easy_vqa:short"]\n  format: vicuna_v1\n  image_aspect: processor\n'
    (other / "final/recipe.yaml").write_text(f"data:\n  {data}")
    assert Checkpoint.find(other).chat_format == "vicuna_v1"
    assert main([runs[0], str(other), "--limit", "4", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--chat-format: got chat_template (dense) and vicuna_v1 (other)" in error
    assert not (tmp_path / "out").exists()
    given = [runs[0], str(other), "--chat-format", "chat_template", "--limit", "4", "--out", str(tmp_path / "out")]
    assert main(given) == 0


def test_a_standard_task_stands_beside_easy_vqa(runs, tmp_path, monkeypatch):
    import datasets

    from tests.benchmark_rows import mme, pope

    monkeypatch.setenv("HF_TOKEN", "none")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    runs = [str(path) for path in runs]
    monkeypatch.chdir(tmp_path)
    pope(tmp_path)
    mme(tmp_path)
    assert main([*runs, "--tasks", "pope,mme", "--schedules", "trained", "--out", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["run"], row["task"]) for row in rows] == [
        (run, task) for task in ("pope", "mme") for run in ("dense", "fused")
    ]
    assert rows[0]["metric"] == "pope_accuracy"
    assert "pope_f1_score" in rows[0]["metrics"]
    assert rows[2]["standard_error"] is None  # MME's score is no mean
    assert "## mme" in (tmp_path / "out/table.md").read_text()


def test_the_report_opens_offline_in_a_browser(compared):
    with open_page((compared / "report.html").as_uri()) as opened:
        page = opened.page
        assert page.title() == "Comparison: easy_vqa"
        scores = page.locator("table.scores")
        assert scores.locator("tbody tr").count() == 9
        assert page.locator("table.published").locator("tbody tr").count() >= 5
        sizes = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
        assert len(sizes) >= 4 + 6 * 7
        assert all(width > 0 for width in sizes)
        sources = page.evaluate("[...document.images].map(image => image.src.slice(0, 5))")
        assert set(sources) == {"data:"}
        heading = scores.locator("th", has_text="accuracy")
        heading.click()
        column = scores.locator("tbody tr td:nth-child(3)").all_inner_texts()
        values = [float(text.split()[0]) for text in column]
        assert values == sorted(values, reverse=True)
        heading.click()
        values = [float(text.split()[0]) for text in scores.locator("tbody tr td:nth-child(3)").all_inner_texts()]
        assert values == sorted(values)
        assert page.locator("details.sample").count() == 6
        page.locator("details.sample summary").nth(1).click()
        assert page.locator("details.sample").nth(1).locator("img").count() == 1 + 7
        page.set_viewport_size({"width": 420, "height": 900})
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 420
        assert opened.errors == []
        assert {url.split(":")[0] for url in opened.urls} <= {"file", "data"}


def test_the_report_escapes_what_a_model_says(compared):
    html = (compared / "report.html").read_text()
    assert "<script>" in html
    assert html.count("<script") == 1


def test_phases_of_a_run_count_together(quickstart_run):
    checkpoint = Checkpoint.find(quickstart_run)
    assert checkpoint.run == {"seconds": 25.0, "steps": 30, "samples": 100, "samples_per_second": 4.0}
    assert [line["seconds"] for line in checkpoint.log] == [0.5, 1.0, 1.5, 1.5, 13.0, 13.5, 14.0, 14.0]
    assert Checkpoint.find(quickstart_run / "final").name == "fused"


def test_two_runs_of_one_name_are_told_apart(tmp_path, runs):
    for seed in ("seed0", "seed1"):
        shutil.copytree(runs[0], tmp_path / seed / "dense")
    found = [Checkpoint.find(tmp_path / seed / "dense") for seed in ("seed0", "seed1")]
    assert list(named(found)) == ["seed0_dense", "seed1_dense"]
    with pytest.raises(ComparisonError, match="got dense twice"):
        named([found[0], found[0]])


def test_a_score_that_is_no_mean_has_no_error():
    samples = [{"value": value, "image": number} for number, value in enumerate([1.0, 0.0, 1.0, 1.0])]
    assert score_error(0.75, 1.0, samples) == pytest.approx(0.25)
    assert score_error(75.0, 100.0, samples) == pytest.approx(25.0)
    assert score_error(0.8, 1.0, samples) is None
    assert score_error(75.0, None, samples) is None


def seed_runs(folder, runs):
    """Writes two seeds of a dense and of a fused run, trained alike; returns their folders."""
    folders = []
    for kind, source in zip(("dense", "fused"), runs, strict=True):
        for seed in (0, 1):
            target = folder / f"{kind}_seed{seed}"
            shutil.copytree(source, target)
            stages = "null" if kind == "dense" else "{enter: 2, exit: 5}"
            data = '{files: ["easy_vqa:short"], format: chat_template, image_aspect: processor}'
            (target / "final/recipe.yaml").write_text(
                f"name: {target.name}\nseed: {seed}\noutput: {target}\nmodel: {{stages: {stages}}}\ndata: {data}\n"
            )
            if seed:
                weights = load_file(target / "final/model.safetensors")
                first = next(name for name in weights if name.endswith("layers.0.self_attn.v_proj.weight"))
                weights[first] = -weights[first]
                save_file(weights, target / "final/model.safetensors", metadata={"format": "pt"})
            folders.append(str(target))
    return folders


def test_runs_that_differ_in_seed_alone_are_pooled(runs, tmp_path):
    given = [*seed_runs(tmp_path / "seeds", runs), "--limit", "16"]  # about two images
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/table.json").read_text())
    rows = {(row["run"], row["schedule"]): row for row in record["rows"]}
    for label, schedule in (("dense, 2 seeds", "dense"), ("fused, 2 seeds", "trained")):
        together, kind = rows[label, schedule], label.split(",")[0]
        alone = [rows[f"{kind}_seed{seed}", schedule] for seed in (0, 1)]
        assert {row["pooled_in"] for row in alone} == {label}
        assert not any("difference" in row for row in alone)
        scores = [row["score"] for row in alone]
        assert together["score"] == pytest.approx(sum(scores) / 2)
        assert together["standard_error"] == pytest.approx(abs(scores[0] - scores[1]) / 2)
        assert together["settings"] == alone[0]["settings"]
    assert record["compared_with"] == {"easy_vqa": "dense, 2 seeds dense"}
    text = (tmp_path / "out/table.md").read_text()
    assert "| enter 2, exit 5 |" in next(line for line in text.splitlines() if "| fused, 2 seeds | trained |" in line)
    assert "fused_seed0 | trained" not in text
    assert "Student's t over seeds and images" in text
    assert "1 comparison of this table by Holm's rule" in text
    assert "fused, 2 seeds, trained" in (tmp_path / "out/report.html").read_text()


def test_a_run_with_another_recipe_is_no_seed(runs, tmp_path):
    folders = seed_runs(tmp_path, runs)
    found = {Path(folder).name: Checkpoint.find(folder) for folder in folders}
    assert groups_of(found) == {
        "dense": {0: "dense_seed0", 1: "dense_seed1"},
        "fused": {0: "fused_seed0", 1: "fused_seed1"},
    }
    recipe = tmp_path / "dense_seed1/final/recipe.yaml"
    recipe.write_text(recipe.read_text() + "train: {max_steps: 7}\n")
    assert list(groups_of(found)) == ["fused"]
    assert common_name(["seed0_dense", "seed1_dense"]) == "dense"
    assert common_name(["a", "b"]) == "a"


def test_differences_over_seeds_pair_what_belongs_together():
    def cell(*values):
        return {"samples": [{"id": number, "image": number, "value": value} for number, value in enumerate(values)]}

    base = {0: cell(1.0, 0.0, 0.0, 1.0), 1: cell(0.0, 0.0, 1.0, 0.0)}
    better = {0: cell(1.0, 1.0, 0.0, 1.0), 1: cell(0.0, 1.0, 1.0, 0.0)}
    found = compared_seeds(better, base)  # each seed gains one question: no spread over seeds, but one over images
    assert (found.mean, found.gained, found.lost) == (0.25, 2, 0)
    assert found.low < 0 < found.high
    assert found.p == pytest.approx(0.391, abs=1e-3)  # t = 1 with 3 degrees of freedom
    alike = [{0: cell(*values), 1: cell(*values)} for values in ((0.0, 0.0), (1.0, 1.0))]
    assert compared_seeds(alike[1], alike[0]).p == 0.5  # two images, by the sign test
    one = [{seed: {"samples": cell(value)["samples"]} for seed in (0, 1)} for value in (0.0, 1.0)]
    assert compared_seeds(one[1], one[0]) is None
    others = compared_seeds({7: better[0], 8: better[1]}, base)  # other seeds: nothing pairs them
    assert others.mean == 0.25
    assert others.gained is None
    assert others.low < 0 < others.high
    single = compared_seeds({0: better[0]}, base)
    assert single.mean == pytest.approx(0.75 - 0.375)
    assert compared_seeds({0: {"samples": []}}, base) is None


def test_every_row_says_the_settings_of_its_schedule():
    assert settings_text(FastV(1, 0.5)) == "layer 1, drop 0.5"
    assert settings_text(PyramidDrop()) == "layers 8/16/24, ratios 0.5/0.25/0.125"
    assert settings_text(PyramidDrop(renumber=True)).endswith("renumber")
    assert settings_text(ShortV()) == "layers 0/2/3/12/17-31"
    assert settings_text(Within(StagePlan(2, 5), VTW(4))) == "layer 4"
    assert settings_text(Fused(StagePlan(2, 5, keep={3: 2}))) == "enter 2, exit 5, keep 2 from 3"
    assert settings_text(Fused(StagePlan(0, 3))) == "enter 0, exit 3"
    diverse = Fused(StagePlan(0, 3, "kv", keep={0: 0.25}, select="diversity"))
    assert settings_text(diverse) == "enter 0, exit 3, update kv, keep 0.25 from 0, select diversity"
    assert settings_text(Dense()) == ""


@pytest.mark.parametrize(
    ("label", "schedule", "shown"),
    [
        ("trained", Fused(StagePlan(0, 3)), "trained"),
        ("fast", Fused(StagePlan(0, 2)), "fast"),  # one of the checkpoint's plans
        ("dense", Dense(), "dense"),
        ("vtw", Within(StagePlan(0, 3), VTW(2)), "vtw within the plan"),
        ("vtw", VTW(2), "vtw"),
    ],
)
def test_only_a_pruner_is_within_the_plan(label, schedule, shown):
    costs = dict.fromkeys(("visual_token_layers", "token_layers", "flops", "vision_attention"), 1)
    cell = {"status": "done", "stages": {"enter": 0, "exit": 3}, "costs": {**costs, "dense": costs}, "samples": []}
    cell |= {"benchmark": {"metric": "accuracy", "scale": 1.0}, "metrics": {"accuracy": 0.5}}
    assert shown_schedule(cell_row("run", label, "scenes", cell, schedule, None)) == shown


def test_a_column_that_tells_rows_apart_in_nothing_is_left_out():
    lines = [
        ["run", "same", "near", "other", "none", "word"],
        ["a", "1", "100.0", "1", "-", "x"],
        ["b", "1", "101.0", "2", "-", "y"],
    ]
    assert drop_uninformative(lines, keep=("run",)) == [["run", "other", "word"], ["a", "1", "x"], ["b", "2", "y"]]
    assert drop_uninformative([["run", "one"], ["a", "1"]], keep=()) == [["run", "one"], ["a", "1"]]


def test_schedules_may_be_named_with_settings():
    found = schedules_of("--schedules", "dense, fastv(layer=2, drop=0.75),pyramiddrop(layers=(2,4),ratios=(.5,.2))")
    assert found == {
        "dense": "dense",
        "fastv(layer=2,drop=0.75)": {"name": "fastv", "layer": 2, "drop": 0.75},
        "pyramiddrop(layers=(2,4),ratios=(0.5,0.2))": {"name": "pyramiddrop", "layers": (2, 4), "ratios": (0.5, 0.2)},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        *("fastv(2)", "fastv(layer=)", "fastv(layer=x)", "fastv(layer=2", "fastw(layer=2)", "fastv(**{'layer': 2})"),
        *("fastv(name='vtw')", "fastv(layer=2,layer=3)"),  # would run another one than the label says
        *(
            "fastv]+[vtw",
            "fastv],[vtw",
            "fastv for fastv in vtw",
            "fastv(layer={[]:1})",
            "fastv\0",
            "fastv,*vtw",
            "fastv\nvtw",
        ),
        *("fastv(layer=" + "(" * 999, "fastv(layer=" + "-" * 99_999 + "1)", f"fastv(layer={'9' * 5000})"),
    ],
)
def test_schedules_that_are_none_are_one_line(wrong):
    with pytest.raises(UsageError, match=r"^--schedules: got '(fast|\*vtw).*', expected .*") as raised:
        schedules_of("--schedules", wrong)
    assert len(str(raised.value).splitlines()) == 1


def test_a_schedule_that_does_not_go_with_a_checkpoint_is_refused_before_anything_is_made(runs, tmp_path, capsys):
    for given, said in (
        ("fastv(layer=99)", "FastV.layer: got 99, expected at most 7"),
        ("cdpruner", "--schedules: got cdpruner, which reads the question with a text tower"),
    ):
        assert main([runs[0], "--schedules", given, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_plans_of_a_checkpoint_are_rows_of_it(runs, tmp_path, capsys):
    config = json.loads((Path(runs[1]) / "final/config.json").read_text())
    plans = {"fused": config["stages"], "fast": {**config["stages"], "keep": {"3": 0.25}}, "dense": None}
    shutil.copytree(runs[1], tmp_path / "elastic")
    (tmp_path / "elastic/final/config.json").write_text(json.dumps({**config, "plans": plans}))
    given = [runs[0], str(tmp_path / "elastic"), "--limit", "4", "--out", str(tmp_path / "out"), "--schedules"]
    comparison, _ = prepare(arguments([*given, "trained,fast,vtw"]))
    assert {name: list(chosen) for name, chosen in comparison.schedules.items()} == {
        "dense": ["dense", "vtw"],
        "elastic": ["trained", "fast", "vtw"],
    }
    assert comparison.schedules["elastic"]["fast"] == Fused(StagePlan(2, 5, keep={3: 0.25}))
    with pytest.raises(SystemExit):
        arguments([*given, "slow"])
    assert "--schedules: got 'slow', expected trained, fused, fast, dense, visipruner" in capsys.readouterr().err


RANKS = """
import sys
from eval import measure
measure.added_memory = lambda calls, *_: dict.fromkeys(calls, 2**20)
measure.REPEATS, measure.STEPS = 1, 2
from eval.compare import arguments, main, prepare
sys.exit(main(sys.argv[1:]))
"""


def test_two_ranks_answer_each_their_part(runs, compared, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = [runs[0], "--schedules", "vtw", "--limit", "5", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, str(tmp_path / "ranks.py"), *given], env=environment, cwd=ROOT, check=True)
    cells = [json.loads((out / "cells/dense/vtw/easy_vqa.json").read_text()) for out in (tmp_path / "out", compared)]
    answers = [[(one["id"], one["answer"], one["value"]) for one in cell["samples"]] for cell in cells]
    assert answers[0] == answers[1][:5]
    assert cells[0]["metrics"]["accuracy"] == pytest.approx(sum(value for *_, value in answers[0]) / 5)
    assert "| dense | vtw |" in (tmp_path / "out/table.md").read_text()


def test_a_failed_row_and_a_score_in_points_are_shown():
    row = cell_row("run", "dense", "mme", {"status": "failed", "error": "x"}, Dense(), None)
    assert score_table([row])[1][:3] == ["run", "dense", "failed"]
    assert score_text({"scale": None}, 1510.72) == "1510.7"
    assert score_text({"scale": 1.0}, 0.5, 0.0123) == "50.00 ± 1.23 %"


def test_the_front_is_what_nothing_beats():
    points = [Point("r", name, cost, score, None) for name, cost, score in
              [("a", 1, 50), ("b", 2, 40), ("c", 2, 60), ("d", 3, 60), ("e", 4, 61)]]  # fmt: skip
    assert [point.schedule for point in pareto_front(points)] == ["a", "c", "e"]


def test_names_are_drawn_and_written_as_they_are(runs, tmp_path):
    name = "a$\\frac$b|c\nd"  # no formula, no column, no line
    draw_learning_curves({name: Checkpoint.find(runs[0])}, tmp_path / "curves.png")
    draw_scores([Point(name, name, 1, 2, None)], tmp_path / "scores.png", cost=name, score=name, floors={name: 1})
    draw_live({name: {"mean": [1], "low": [1], "high": [1]}}, tmp_path / "live.png")
    assert len(list(tmp_path.iterdir())) == 3
    assert markdown([["run", "x"], [name, "1"]]) == "| run | x |\n| --- | --- |\n| a$\\frac$b\\|c d | 1 |\n"


def test_smoothing_starts_at_the_first_value():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([4.0, 0.0])[0] == 4.0


def test_what_cannot_be_compared_is_named(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="got no checkpoint"):
        Checkpoint.find(tmp_path)
    # nothing there; a config without weights; what can be no folder
    for folder in (tmp_path, QUICKSTART, "x" * 300, tmp_path / "nul\0"):
        assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
        assert "expected a run folder with final/" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": "bert", "vocab_size": 9}', "got model_type bert, expected one of llava"),
        ('{"model_type": "llava", "mm_vision_tower": "openai/clip", "hidden_size": 4096}', "the original LLaVA format"),
        ('{"model_type": ["llava"]}', r"got model_type \['llava'\], expected one of llava"),
        ('{"vocab_size": 9}', "got model_type None, expected one of llava"),
        ('{"model_type": "llava"}', "config.json: got no text_config"),
        ('{"model_type": "llava", "text_config": "x"}', "config.json: got no text_config"),
        ("[1]", "config.json: got a list, expected an object"),
        ("{", "config.json: cannot be read"),
        ("", "config.json: cannot be read"),
        ("[" * 100_000, "config.json: cannot be read"),
    ],
)
def test_another_kind_of_checkpoint_is_refused_before_anything_is_built(tmp_path, monkeypatch, text, said):
    monkeypatch.setattr(torch.nn.Module, "__init__", None)  # nothing is built
    (tmp_path / "config.json").write_text(text)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.find(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "64"}, "StrictDataclassFieldValidationError: .*expected int, got str"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"num_hidden_layers": 9}, r"got no values for 9 weights, such as model\.language_model\.layers\.8\."),
        ({"num_hidden_layers": 7}, r"got 9 weights of layers that its config does not have, such as .*layers\.7\."),
        ({"hidden_size": 128}, "cannot be loaded"),
        ({"model_type": "nope"}, "cannot be loaded: Unrecognized model type"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(runs, tmp_path, change, said):
    shutil.copytree(f"{runs[0]}/final", tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=said) as raised:
        Checkpoint.find(tmp_path).load()
    assert len(str(raised.value).splitlines()) == 1


def test_a_processor_that_cannot_count_visual_tokens_is_refused(runs, tmp_path):
    shutil.copytree(f"{runs[0]}/final", tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "processor_config.json").read_text())
    del fields["patch_size"]
    (tmp_path / "processor_config.json").write_text(json.dumps(fields))
    found = Checkpoint.find(tmp_path)
    with pytest.raises(CheckpointError, match=r"processor_config\.json: got no patch_size"):
        found.prompt_encoder(found.processor())


def test_an_image_token_that_is_not_the_processors_is_refused(runs, tmp_path):
    shutil.copytree(f"{runs[0]}/final", tmp_path, dirs_exist_ok=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "image_token_index": 9999}))
    found = Checkpoint.find(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: image_token_index: got 9999, expected one of \[1\]"):
        found.prompt_encoder(found.processor())


def test_a_prompt_beyond_the_decoders_positions_is_refused(runs):
    found = Checkpoint.find(runs[0])
    prompt_encoder = found.prompt_encoder(found.processor())
    short = VqaPrompt("what?")
    size = prompt_encoder.batch([short])["input_ids"].shape[1]
    prompt_encoder.batch([short], new_tokens=1024 - size)
    with pytest.raises(UsageError, match=f"^prompt: got {size} tokens and up to 1,024 of its answer, expected at most"):
        prompt_encoder.batch([short], new_tokens=1024)
    with pytest.raises(UsageError, match=r"^prompt: got [1-5],\d+ tokens, expected at most 1,024, the decoder's"):
        prompt_encoder.batch([short, VqaPrompt("what " * 1000)])


def test_a_record_that_is_cut_off_is_named(runs, tmp_path):
    for name in ("log.jsonl", "final/run.json"):
        shutil.copytree(runs[0], tmp_path, dirs_exist_ok=True)
        (tmp_path / name).write_text('{"step": 1, "sec')
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be read .*expected what a run writes"):
            Checkpoint.find(tmp_path)


def test_a_folder_that_cannot_be_made_leaves_with_2_before_a_weight_is_loaded(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(Checkpoint, "load", None)
    monkeypatch.setattr("sys.argv", ["bench"])
    for out in ("file", "file/below", "x" * 300, "nul\0"):
        place = str(tmp_path / out)
        assert main([runs[0], "--out", place]) == 2
        assert stages.main([runs[0], "--out", place]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(" (")[0] for line in lines[-2:]] == [f"--out: got {place}"] * 2
    for out in ("file/below.md", "x" * 300, "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(SystemExit) as left:
            bench.main(["train", "--out", str(tmp_path / out)])
        assert left.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"--out: got {tmp_path / out.removesuffix('/below.md')} (")
    assert (tmp_path / "file").read_text() == "mine"


def test_spaces_between_names_mean_nothing(runs, compared, monkeypatch):
    monkeypatch.setattr(compare, "run_cell", None)  # all cells are there
    given = ["--schedules", " trained, dense ,fastv,vtw", "--tasks", " easy_vqa ", "--limit", "40"]
    assert main([*runs, *given, "--out", str(compared)]) == 0


def test_only_the_config_of_another_kind_is_fetched_from_the_hub(tmp_path, monkeypatch):
    fetched = []

    def fetch(name, allow_patterns):
        fetched.extend(allow_patterns)
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        return str(tmp_path)

    monkeypatch.setattr("eval.checkpoint.snapshot_download", fetch)
    with pytest.raises(CheckpointError, match="got model_type bert"):
        Checkpoint.find("someone/bert")
    assert fetched == ["config.json"]


def test_a_hub_name_that_cannot_be_fetched_is_named(tmp_path, capsys):
    assert main(["nobody/nothing", "--out", str(tmp_path / "out")]) == 2
    assert "nobody/nothing: no such folder, nor on the hub" in capsys.readouterr().err.splitlines()[-1]


def test_an_aligned_checkpoint_asks_no_questions(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "aligned")
    (tmp_path / "aligned/final/recipe.yaml").write_text("data: {files: [a.json], format: plain}\n")
    with pytest.raises(CheckpointError, match=r"data\.format plain, which has no questions"):
        Checkpoint.find(tmp_path / "aligned")
    sources = "[{path: a.json, format: vicuna_v1}, {path: b.json, format: plain}]"
    (tmp_path / "aligned/final/recipe.yaml").write_text(f"data: {{files: {sources}, format: plain}}\n")
    assert Checkpoint.find(tmp_path / "aligned").chat_format == "vicuna_v1"


@pytest.mark.parametrize(
    ("flag", "given", "said"),
    [
        ("--schedules", "gqq", "--schedules: got 'gqq', expected trained, dense, visipruner"),
        ("--tasks", "gqq", "--tasks: got 'gqq', expected easy_vqa, "),
        ("--tasks", "mmvet", "--tasks: got mmvet, which a judge model scores, without OPENAI_API_KEY"),
        ("--schedules", "trained,", "--schedules: got '', expected trained, dense, visipruner"),
        ("--tasks", "easy_vqa,,pope", "--tasks: got '', expected names between commas"),
        ("--limit", "0", "expected a whole number above 0"),
        ("--limit", "many", "expected a whole number above 0"),
        ("--limit", "9" * 20, "expected a whole number above 0 and below 2**31"),
        ("--limit", "9" * 5000, "expected a whole number above 0 and below 2**31"),
        ("--batch", "-1", "expected a whole number above 0"),
        ("--device-map", "bogus", "got 'bogus', expected auto, balanced, balanced_low_0, sequential, or a device"),
        ("--device-map", "cuda:99", "or a device of this machine"),
        ("--device-map", "meta", "or a device of this machine"),
        pytest.param(
            *("--attn-implementation", "flash_attention_2", "got flash_attention_2 without a GPU"),
            marks=pytest.mark.skipif(is_flash_attn_2_available(), reason="is installed"),
        ),
    ],
)
def test_wrong_input_leaves_with_2_and_one_line(runs, tmp_path, capsys, monkeypatch, flag, given, said):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    try:
        code = main([runs[0], flag, given, "--out", str(tmp_path)])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
