"""`python -m data.check`: what it prints, and how it ends."""

import contextlib
import json
import os
import shutil
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
        "data: note: answers longer than data.max_length were not checked: the recipe names no model\n"
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
    raw = json.loads(Path(path).read_text()) | {"eval": {"files": [str(folder / "data.json")]}}
    Path(path).write_text(json.dumps(raw))
    assert main([path, f"data.files=[{folder / 'align.json'}]"]) == 2
    assert "eval: " in capsys.readouterr().out.splitlines()[-1]


def test_it_never_trusts_an_earlier_check(folder, capsys):
    path = recipe(folder, data=GOOD)
    assert main([path]) == 0
    (folder / "a.png").unlink()
    assert main([path]) == 2
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert main([path]) == 0
    assert capsys.readouterr().out.count("2 rows: image 'a.png' is missing") == 1


PLAIN = "data: {files: [x.json], format: plain}"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("data: {files: []}", [], "data.files: got [], expected at least 1 item"),
        (
            "data: {files: [x.json], format: plain, color: 1}",
            [],
            "data.color: unknown key, expected files, images",
        ),
        ("name: x", [], "data: got none, expected a recipe with a data section"),
        ("data: [", [], "recipe.yaml: not YAML"),
        ("data: {files: [nothing.json], format: plain}", [], "nothing.json: no such file"),
        (
            "data: {files: [x.json], format: plain}",
            ["data.workers=many"],
            "data.workers: got 'many', expected a",
        ),
        ("data: {files: [x.json], format: plain}", ["data.workers=["], "got '[', expected a value in YAML"),
        ("data: {files: [x.json], format: plain}", ["data.workers"], "expected data.key=value, because only these"),
        ("data: {files: [x.json], format: plain}", ["train.max_steps=2"], "expected data.key=value, because only"),
        ("data: {files: [x.json], format: plain}", ["align.data.workers=2"], "expected data.key=value, because only"),
        (
            "data: {files: [x.json], format: plain}\nalign: {eval: {files: [y.json]}}",
            [],
            "recipe.yaml: align.data: got none beside align.eval, expected a mapping of keys",
        ),
        (
            "data: {files: [x.json], format: plain}\nalign: {data: [1], eval: {files: [y.json]}}",
            [],
            "recipe.yaml: align.data: got none beside align.eval, expected a mapping of keys",
        ),
        (PLAIN, ["data.max_length=010"], "recipe.yaml: data.max_length: got 010, which YAML reads as 8, expected a"),
        (PLAIN, ["data.limit=1:30"], "recipe.yaml: data.limit: got 1:30, which YAML reads as 90"),
        (PLAIN, ["data.images="], "recipe.yaml: data.images: got nothing, expected a value in YAML (null for none)"),
        (PLAIN, ["data.max_length=2024-13-45"], "data.max_length: got '2024-13-45', expected a value in YAML"),
        (PLAIN, ["data.limit=!!int x"], "data.limit: got '!!int x', expected a value in YAML"),
        (PLAIN, ["data.images=!!timestamp x"], "data.images: got '!!timestamp x', expected a value in YAML"),
        (PLAIN, ["data.images=" + "[" * 5000], "[..., expected a value in YAML"),
        (
            PLAIN,
            ["data.format.x=1"],
            "recipe.yaml: data.format.x: data.format is a value, expected a section with keys",
        ),
        (PLAIN, ["data..x=1"], "recipe.yaml: got 'data..x=1', expected dotted.key=value"),
        ("data: {format: plain, format: vicuna_v1}", [], "recipe.yaml: format: got it twice (line 1), expected once"),
        ("data: {max_length: 010}", [], "recipe.yaml: line 1: got 010, which YAML reads as 8"),
        ("data: !!timestamp x", [], "recipe.yaml: not YAML"),
        ("data: " + "[" * 5000, [], "recipe.yaml: not YAML that can be read: nested too deeply"),
        ("- data", [], "recipe.yaml: got list, expected a mapping of keys"),
        ("data: null\neval: {files: [y.json]}", [], "data: got none, expected a recipe with a data section"),
        ("data: {files: [x.json], format: plain}\nalign: {}", [], "align.data: got None, expected a valid dictionary"),
    ],
)
def test_what_is_wrong_with_the_recipe_is_one_line(folder, capsys, text, overrides, message):
    (folder / "recipe.yaml").write_text(text)
    assert main([str(folder / "recipe.yaml"), *overrides]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert message in err[0]


def test_an_override_reaches_deep_keys_and_one_section_alone(folder, capsys):
    text = Path(recipe(folder, data=GOOD)).read_text()
    data = json.dumps(json.loads(text)["data"])
    path = folder / "shared.yaml"
    path.write_text(f"data: &data {data}\nalign: {{data: *data}}\n")
    assert main([str(path), f"data.files=[{folder / 'none.json'}]"]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith(f"data: {folder / 'none.json'}: no such file")
    assert "align.data: " in out
    assert main([with_model(folder, GOOD), "data.processor.unknown=1"]) == 2
    assert "data: data.processor: got unknown, expected settings of" in capsys.readouterr().err


def test_a_missing_recipe_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'no.yaml'}: No such file or directory, expected a recipe in YAML\n"


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


def test_a_reader_that_has_seen_enough_is_no_error(folder):
    path = recipe(folder, data=[{"id": 1}])
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out, contextlib.redirect_stdout(out):
        assert main([path, "--all"]) == 2


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none"])
def test_a_cache_folder_that_cannot_be_made_is_one_line(folder, monkeypatch, capsys, place):
    (folder / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / place)
    assert main([recipe(folder, data=GOOD)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data: cache: {folder / place}: ")
    assert line.endswith("; expected a folder that can be written, named by HF_DATASETS_CACHE")


def with_model(folder, rows, **data):
    """Writes a recipe with the quickstart's tokenizer; returns its path."""
    path = Path(recipe(folder, data=rows))
    given = json.loads(path.read_text())
    given["model"] = {"config": str(ROOT / "recipes/configs/quickstart")}
    given["data"] |= data
    path.write_text(json.dumps(given))
    return str(path)


ESSAY = talk("Write.", "word " * 1000)


@pytest.mark.parametrize("style", ["vicuna_v1", "chat_template"])
def test_a_first_answer_that_is_too_long_is_found(folder, capsys, style):
    path = with_model(folder, [*GOOD, ESSAY], format=style)
    assert main([path]) == 2
    first, summary = capsys.readouterr().out.splitlines()
    assert "data.json:3: no label is left: the first answer ends after" in first
    assert "expected up to 2048 (data.long_answers: cut ends it there)" in first
    assert summary.endswith("4 rows, 2 with an image (3 images), 1 text only, 8 turns, 1 faults")
    assert main([path, "data.long_answers=cut"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["  rows that have a first answer that is cut at max_length (data.long_answers: cut): 1"]
    assert main([path, "data.max_length=40000"]) == 0


def test_five_images_that_fill_the_sample_are_found(folder, capsys):
    row = talk("<image>" * 5, "yes", image=["a.png"] * 5)
    assert main([with_model(folder, [row], max_length=256)]) == 2
    assert "the first answer ends after" in capsys.readouterr().out
    assert main([with_model(folder, [row], max_length=1000)]) == 0


def test_a_row_that_the_template_rewrites_is_found(folder, capsys):
    shutil.copytree(ROOT / "recipes/configs/quickstart", folder / "config")
    template = folder / "config/chat_template.jinja"
    thinking = template.read_text().replace("message['content']", "message['content'].split('</think>')[-1]")
    assert thinking != template.read_text()
    template.write_text(thinking)
    rows = [talk("q", "<think>x</think>y"), talk("q", "y")]
    path = with_model(folder, rows, format="chat_template")
    assert main([path, f"model.config={folder / 'config'}"]) == 2
    assert "data.json:0: the chat template rewrites the message" in capsys.readouterr().out


def test_a_tokenizer_that_training_would_refuse_is_an_error(folder, capsys):
    shutil.copytree(ROOT / "recipes/configs/quickstart", folder / "config")
    (folder / "config/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert main([with_model(folder, GOOD, format="chat_template"), f"model.config={folder / 'config'}"]) == 2
    assert "data: tokenizer.chat_template: the chat template rewrites or drops a message" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["chat_template", "processor"])
def test_settings_that_training_would_refuse_are_an_error(folder, capsys, change):
    (folder / "blank.jinja").write_text("")
    changes = {"chat_template": str(folder / "blank.jinja"), "processor": {"unknown": 1}}
    assert main([with_model(folder, GOOD, **{change: changes[change]})]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"data: data.{change}: ")


def test_like_faults_share_a_line_and_all_has_one_for_each(folder, capsys):
    rows = [talk("<image>x", "y", image=f"{number}.png") for number in range(20)] + [{"id": 1}]
    path = recipe(folder, data=rows)
    assert main([path]) == 2
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{folder / 'data.json'}: 20 rows: image '0.png' is missing in {folder} (row 0)"
    assert out[1].startswith(f"{folder / 'data.json'}:20: missing key")
    assert out[2] == "data: 21 faults in 2 lines; --all lists each, --json is for programs"
    assert main([path, "--all"]) == 2
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in out[:21]] == list(map(str, range(21)))


def test_json_for_programs(folder, capsys):
    rows = [*GOOD, talk("q", "", id=7), talk("<image>x", "y", image="c.png")]
    assert main([with_model(folder, rows), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["data"]
    assert found["faults"] == [
        {"file": str(folder / "data.json"), "row": 4, "reason": f"image 'c.png' is missing in {folder}"}
    ]
    (source,) = found["sources"]
    assert source["notes"]["empty_answer"] == 1
    assert source["ignored"] == {"id": 1}
    assert [source[key] for key in ("rows", "with_image", "images", "text_only", "turns", "faults")] == [
        5,
        2,
        3,
        2,
        10,
        1,
    ]


def test_ignored_keys_are_counted_by_name(folder, capsys):
    rows = [talk("q", "a", id=1, source="x"), talk("q", "a", id=2, width=None)]
    assert main([recipe(folder, data=rows)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  ignored keys: id (2), source (1)"


def test_decode_finds_damage_in_the_middle(folder, capsys):
    data = bytearray((folder / "a.png").read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255
    (folder / "b.png").write_bytes(data)
    path = recipe(folder, data=[talk("<image>q", "a", image="b.png")])
    assert main([path]) == 0
    assert main([path, "--decode"]) == 2
    assert main([path, "data.decode=true"]) == 2
    assert "image 'b.png' is truncated or broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([{"path": "a.json", "weight": 1}, "b.json"], "data: files: got a weight for some sources"),
        ([{"path": "a.json", "wieght": 1}], "data.files.0: wieght: unknown key, expected path, weight, limit, images"),
        ([{"path": "a.json", "limit": 0}], "data.files.0: limit: got 0, expected greater than 0"),
        ([{"weight": 1}], "data.files.0: path: missing key"),
        ([{"path": "a.json", "weight": -1}], "data.files.0: weight: got -1, expected greater than 0"),
        ([{"path": "a.json", "weight": 10**10}], "weight: got 10000000000, expected less than or equal to 1000000000"),
        ([{"path": "a.json", "images": ""}], "data.files.0: images: got '', expected at least 1 character"),
        ([{"path": "a.json", "format": "x"}], "data.files.0: format: got 'x', expected 'vicuna_v1'"),
        ([{"path": "a.json", "limit": "5"}], "data.files.0: limit: got '5', expected a valid integer"),
        ([None], "data.files.0: got None, expected a path or a mapping of path, weight, limit, images, format"),
        ([["a.json"]], "data.files.0: got ['a.json'], expected a path or a mapping"),
        ([""], "data.files.0: got '', expected a path or a mapping"),
        ({"path": "a.json"}, "data.files: got {'path': 'a.json'}, expected a valid list"),
    ],
)
def test_what_is_wrong_with_a_source_is_named(folder, capsys, files, message):
    path = Path(recipe(folder, data=GOOD))
    given = json.loads(path.read_text())
    given["data"]["files"] = files
    path.write_text(json.dumps(given))
    assert main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
