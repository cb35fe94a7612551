"""`python -m data.check`: what it prints, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from data.check import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def talk(*texts, roles=("human", "gpt"), **more):
    return {**more, "conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]}


GOOD = [
    talk("<image>\nis there a circle ?", "yes", image="a.png"),
    talk("is it red ?", "no"),
    talk("<image> <image>", "red", "and ?", "blue", image=["a.png", "a.png"]),
]


def recipe(folder, **sections):
    """Writes a recipe whose sections read the given rows; returns its path."""
    texts = {}
    for name, rows in sections.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
        data = {"files": [str(folder / f"{name}.json")], "images": str(folder), "format": "vicuna_v1", "workers": 0}
        texts |= {"align": {"data": data}} if name == "align" else {"data": data}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"name": "x", "train": {"unknown": 1}, **texts}))  # JSON is YAML
    return str(file)


def test_clean_data(folder, capsys):
    assert main([recipe(folder, data=GOOD)]) == 0
    out = capsys.readouterr().out
    assert out == (
        "data: note: answers that are too long were not looked for: the recipe names no model\n"
        f"data: {folder / 'data.json'}: 3 rows, 2 with an image (3 images), 1 text only, 8 turns, 0 faults\n"
    )


def test_every_fault_is_listed_and_every_file_counted(folder, capsys):
    bad = [GOOD[0], {"id": 1}, talk("<image>\nx", "y", image="c.png")]
    (folder / "more.json").write_text(json.dumps([talk("a", "q", "b", roles=("gpt", "human"))]))
    files = f"data.files=[{folder / 'data.json'}, {folder / 'more.json'}]"
    assert main([recipe(folder, data=bad), files]) == 2
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{folder / 'data.json'}:1: missing key 'conversations' (or 'messages'): got keys 'id'"
    assert out[1] == f"{folder / 'data.json'}:2: image 'c.png' is missing in {folder}"
    assert out[3].endswith("data.json: 3 rows, 1 with an image (1 images), 0 text only, 2 turns, 2 faults")
    assert out[4].endswith("more.json: 1 rows, 0 with an image (0 images), 1 text only, 2 turns, 0 faults")
    assert out[5] == "  rows that begin with an answer, which is left out, as LLaVA does: 1"
    assert len(out) == 6


def test_both_sections_are_checked_whatever_is_wrong_with_one(folder, capsys):
    path = recipe(folder, align=GOOD[:1], data=[{"id": 1}])
    assert main([path, "align.data.files=[nothing.json]"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("align.data: nothing.json: no such file")
    assert "data.json:0: missing key" in out
    assert main([path, f"data.files=[{folder / 'align.json'}]"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in out] == ["align.data", "align.data", "data", "data"]


def test_it_never_trusts_an_earlier_check(folder, capsys):
    path = recipe(folder, data=GOOD)
    assert main([path]) == 0
    (folder / "a.png").unlink()
    assert main([path]) == 2
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert main([path]) == 0
    assert capsys.readouterr().out.count("2 rows: image 'a.png' is missing") == 1


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("data: {files: []}", [], "data.files: List should have at least 1 item"),
        ("data: {files: [x.json], format: plain, color: 1}", [], "data.color: Extra inputs are not permitted"),
        ("name: x", [], "data: got none, expected a recipe with a data section"),
        ("data: [", [], "recipe.yaml: not YAML"),
        ("data: {files: [nothing.json], format: plain}", [], "nothing.json: no such file"),
        ("data: {files: [x.json], format: plain}", ["data.workers=many"], "data.workers: Input should be a valid int"),
        ("data: {files: [x.json], format: plain}", ["data.workers=["], "got '[', expected a value in YAML"),
        ("data: {files: [x.json], format: plain}", ["data.workers"], "expected data.key=value, because only these"),
        ("data: {files: [x.json], format: plain}", ["train.max_steps=2"], "expected data.key=value, because only"),
        ("data: {files: [x.json], format: plain}", ["align.data.workers=2"], "expected data.key=value, because only"),
        ("data: {files: [x.json], format: plain}\nalign: {}", [], "align.data: Input should be a valid dictionary"),
    ],
)
def test_what_is_wrong_with_the_recipe_is_one_line(folder, capsys, text, overrides, message):
    (folder / "recipe.yaml").write_text(text)
    assert main([str(folder / "recipe.yaml"), *overrides]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert message in err[0]


def test_a_missing_recipe_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'no.yaml'}: No such file or directory; expected a recipe in YAML\n"


def test_the_command_itself(folder, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    path = recipe(folder, data=[*GOOD, {"id": 1}])
    command = [sys.executable, "-m", "data.check", path, "data.workers=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "data.json:3: missing key 'conversations'" in done.stdout
    assert "checking images" in done.stderr  # the progress bar
    assert "Traceback" not in done.stderr
