"""The comparison from checkpoint folders to table and picture; answers are really generated, by a random model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from data.easy_vqa import questions
from eval.checkpoint import Checkpoint, CheckpointError
from eval.compare import cell, main
from eval.easy_vqa import Answers, accuracy, always_yes, answer, pad_left, words_only
from eval.plots import smooth
from models import FusedLlavaConfig, FusedLlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes/configs/quickstart"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "fused"
    fields = AutoConfig.from_pretrained(QUICKSTART).to_dict()
    fields.pop("model_type")
    torch.manual_seed(0)
    model = FusedLlavaForConditionalGeneration(FusedLlavaConfig(**fields, stages={"enter": 2, "exit": 5}))
    model.save_pretrained(folder / "final")
    AutoProcessor.from_pretrained(QUICKSTART).save_pretrained(folder / "final")
    for phase in (folder / "align", folder):
        (phase / "final").mkdir(parents=True, exist_ok=True)
        (phase / "final/run.json").write_text(json.dumps({"seconds": 12.5, "steps": 15, "samples": 50}))
        lines = [{"step": step, "seconds": step / 2, "loss": 3 / step} for step in (1, 2, 3)]
        (phase / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_compare_writes_table_and_picture(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(run_folder), "--schedules", "trained,dense", "--limit", "24", "--out", str(out)]) == 0
    rows = json.loads((out / "table.json").read_text())
    assert [(row["run"], row["schedule"]) for row in rows] == [
        ("always yes", "-"),
        ("words only", "-"),
        ("fused", "trained"),
        ("fused", "dense"),
    ]
    assert rows[2]["steps"] == 30
    assert rows[2]["visual_token_layers"] == 3 * 64
    assert rows[3]["visual_token_layers"] == 8 * 64
    assert rows[2]["decoder_flops"] < rows[3]["decoder_flops"]
    table = (out / "table.md").read_text()
    assert "| fused | trained |" in table
    assert table in capsys.readouterr().out
    assert (out / "learning_curves.png").stat().st_size > 5000


def test_pruners_are_rows_with_the_cost_of_what_they_kept(run_folder, tmp_path):
    names = "fastv,vtw,random,visipruner"
    assert main([str(run_folder), "--schedules", names, "--limit", "8", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["schedule"] for row in rows] == ["-", "-", *names.split(",")]
    layers = {row["schedule"]: row.get("visual_token_layers") for row in rows}
    assert layers["vtw"] == 2 * 64  # the plan's layers 2 and 3: VTW lets go at 4
    assert layers["fastv"] == 64 + 2 * 32  # it needs a layer that saw vision before it can choose
    assert layers["random"] == 3 * 32


def test_phases_of_a_run_count_together(run_folder):
    checkpoint = Checkpoint.find(run_folder)
    assert checkpoint.run == {"seconds": 25.0, "steps": 30, "samples": 100, "samples_per_second": 4.0}
    assert [line["seconds"] for line in checkpoint.log] == [0.5, 1.0, 1.5, 13.0, 13.5, 14.0]
    assert Checkpoint.find(run_folder / "final").run == {}


def test_batched_answers_equal_answers_one_by_one(run_folder):
    model, processor = Checkpoint.find(run_folder).load()
    together = answer(model, processor, limit=7, title="together", batch=7)
    alone = answer(model, processor, limit=7, title="alone", batch=1)
    assert together.said == alone.said
    assert len(together.said) == 7


def test_accuracy_counts_each_kind():
    asked = questions("test")
    truth = [question.answer for question in asked]
    assert set(accuracy(Answers(asked, truth)).values()) == {1.0}
    half = [word if question.kind == "shape" else "?" for word, question in zip(truth, asked, strict=True)]
    shares = accuracy(Answers(asked, half))
    assert (shares["shape"], shares["colour"], shares["yes/no"]) == (1.0, 0.0, 0.0)
    assert round(100 * always_yes(None)["all"], 2) == 37.33
    assert {kind: round(100 * share, 2) for kind, share in words_only(None).items()}["all"] == 67.0


def test_a_folder_without_weights_is_named(tmp_path, capsys):
    assert main([str(QUICKSTART), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("limit", ["0", "-5", "many"])
def test_a_limit_below_one_leaves_with_2(run_folder, tmp_path, capsys, limit):
    with pytest.raises(SystemExit) as left:
        main([str(run_folder), "--limit", limit, "--out", str(tmp_path)])
    assert left.value.code == 2
    assert "accepted: a whole number above 0" in capsys.readouterr().err


def test_padding_is_on_the_left():
    batch = pad_left([[5], [6, 7]], pad=0)
    assert batch["input_ids"].tolist() == [[0, 5], [6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1], [1, 1]]


def test_smoothing_starts_at_the_first_value():
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([4.0, 0.0])[0] == 4.0


def test_cells():
    assert cell("all", 0.5) == "50.00 %"
    assert cell("steps", None) == "-"
    assert cell("decoder_flops", 2_500_000) == "2.5"


def test_a_folder_without_checkpoint_is_named(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        Checkpoint.find(tmp_path)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "accepted: a run folder with final/" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "known"), [("--schedules", "trained, dense, visipruner"), ("--tasks", "easy_vqa")])
def test_unknown_names_leave_with_2(run_folder, tmp_path, capsys, flag, known):
    with pytest.raises(SystemExit) as left:
        main([str(run_folder), flag, "gqq", "--out", str(tmp_path)])
    assert left.value.code == 2
    assert f"{flag}: found 'gqq', accepted: {known}" in capsys.readouterr().err
