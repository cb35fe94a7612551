"""The check of all rows: every fault with its place, in parallel, and never a stale one."""

import json

import datasets
import pytest
from PIL import Image

from data.config import DataConfig
from data.rows import DataError
from data.table import check_rows, faults_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (8, 8)).save(images / "a.png")
    Image.effect_noise((32, 32), 80).save(images / "cut.png")
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:500])
    return tmp_path


def line(image="a.png", question="<image>\nwhat?", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return json.dumps({"image": image, "conversations": turns, **more})


def config(folder, lines, workers=0):
    file = folder / "data.jsonl"
    file.write_text("\n".join(lines))
    return DataConfig(files=[str(file)], images=str(folder / "images"), format="vicuna_v1", workers=workers)


FAULTY = {
    1: ("{", "broken JSON"),
    3: ('{"id": 1}', "missing key 'conversations'"),
    4: (line(question="what?"), "got 0 <image>"),
    5: (line("b.png"), "image 'b.png' is missing"),
    6: (line("cut.png"), "image 'cut.png' is truncated"),
    8: (line("../a.png"), "outside the image folder"),
}


@pytest.mark.parametrize("workers", [0, 2, 40])
def test_every_fault_is_found_at_its_place(folder, workers):
    lines = [FAULTY[number][0] if number in FAULTY else line() for number in range(10)]
    checked = check_rows(config(folder, lines, workers))
    faults = faults_of(checked)
    assert len(checked) == 10
    assert [fault.row for fault in faults] == list(FAULTY)
    for fault in faults:
        assert FAULTY[fault.row][1] in fault.reason
        assert str(fault).startswith(f"{folder / 'data.jsonl'}:{fault.row}: ")


def test_what_is_found_in_good_rows(folder):
    texts = [line(), line(["a.png", "a.png"], "<image><image>"), line(None, "hi")]
    checked = check_rows(config(folder, texts))
    assert checked["images"][:] == [["a.png"], ["a.png", "a.png"], []]
    assert checked["texts"][:] == [["<image>\nwhat?", "yes"], ["<image><image>", "yes"], ["hi", "yes"]]
    assert not faults_of(checked)


def test_a_fault_that_was_mended_is_gone(folder):
    given = config(folder, [line(), line("b.png")])
    assert len(faults_of(check_rows(given))) == 1
    Image.new("RGB", (8, 8)).save(folder / "images/b.png")
    assert faults_of(check_rows(given)) == []
    (folder / "images/b.png").unlink()
    assert len(faults_of(check_rows(given, recheck=True))) == 1


def test_a_second_check_reads_the_cache(folder, monkeypatch):
    given = config(folder, [line()] * 3)
    check_rows(given)
    monkeypatch.setattr("data.table.parse", lambda row: pytest.fail("parsed again"))
    monkeypatch.setattr("data.table.inspect_image", lambda *_: pytest.fail("checked again"))
    assert len(check_rows(given)) == 3


def test_other_code_and_another_folder_check_again(folder, monkeypatch):
    given = config(folder, [line()])
    (folder / "empty").mkdir()
    assert not faults_of(check_rows(given))
    assert len(faults_of(check_rows(given.model_copy(update={"images": str(folder / "empty")})))) == 1
    (folder / "images/a.png").unlink()
    assert not faults_of(check_rows(given))
    monkeypatch.setattr("data.table.code_stamp", lambda *_: "other")
    assert len(faults_of(check_rows(given))) == 1


def test_a_missing_folder_is_one_error(folder):
    given = config(folder, [line()]).model_copy(update={"images": str(folder / "nowhere")})
    with pytest.raises(DataError, match=r"^images: got '.*nowhere', expected a folder"):
        check_rows(given)


def test_the_built_in_set_brings_its_folder(folder):
    given = DataConfig(files=["easy_vqa:test"], format="plain", workers=0)
    checked = check_rows(given)
    assert len(checked) == 1000
    assert not faults_of(checked)
