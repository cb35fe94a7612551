"""Files become rows: arrays and JSONL, whole and broken."""

import json
import os
import tracemalloc
from pathlib import Path

import datasets
import pytest

from data import sources
from data.config import DataConfig
from data.rows import DataError, RowError
from data.sources import find_files, missing_paths, raw_rows
from data.table import check_folders, check_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def read(tmp_path):
    """Returns a function from a file's content to its raw rows."""

    def reading(content, name="data.json"):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert find_files(str(file)) == [str(file)]
        return list(raw_rows(str(file)))

    return reading


# LLaVA's files mix these: a text, a list, nothing; keys that other rows lack or hold in another type.
ROWS = [
    json.dumps({"id": 1, "image": "a.jpg", "conversations": []}),
    json.dumps({"id": "2", "image": ["a.jpg", "b.jpg"], "model": {"name": ""}, "conversations": []}),
    json.dumps({"conversations": [{"from": "human", "value": 'brackets ]}, "quotes" \u4f60 \U0001f600\n'}]}),
]


@pytest.mark.parametrize(
    "text",
    [
        "[" + ", ".join(ROWS) + "]",
        "[\n" + ",\n".join(ROWS) + "\n]\n",
        "\r\n [" + "\t,\r\n ".join(ROWS) + "\r\n ]\r\n",
        "[" + ",".join(json.dumps(json.loads(row), indent=4) for row in ROWS) + "]",
        "\n".join(ROWS),
        "\n\r\n" + "\n\n".join(ROWS) + "\n\n",
        "\ufeff[" + ",".join(ROWS) + "]",
        "\ufeff" + "\r\n".join(ROWS),
    ],
)
def test_arrays_and_lines_give_the_same_rows(read, text):
    assert read(text) == list(map(json.loads, ROWS))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_rows_that_are_cut_by_a_read_are_whole(read, monkeypatch, chunk):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    rows = [*ROWS, "12345", "true", '"a \\" b"']
    assert read("[" + " , ".join(rows) + "]") == list(map(json.loads, rows))


def test_files_follow_each_other_and_count_for_themselves(tmp_path):
    (tmp_path / "a.json").write_text("[" + ",".join(ROWS[:2]) + "]")
    (tmp_path / "b.jsonl").write_text(ROWS[2])
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.jsonl"), "easy_vqa:test"]
    rows = check_rows(DataConfig(files=files, format="vicuna_v1", workers=0))
    assert len(rows) == 2 + 1 + 1000
    assert rows["row"][:4] == [0, 1, 0, 0]
    assert rows["source"][:4] == [0, 0, 1, 2]
    assert rows[1002]["file"] == "easy_vqa:test"


def test_an_array_is_not_held_in_memory(tmp_path):
    long = json.dumps({"conversations": [{"from": "human", "value": "word " * 2000}]})
    (tmp_path / "data.json").write_text("[" + ",".join([long] * 3000) + "]")  # 30 MB
    tracemalloc.start()
    assert sum(1 for _ in raw_rows(str(tmp_path / "data.json"))) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" + ROWS[0] + ", {broken]", "Expecting property name"),
        ("[" + ROWS[0], "the array is not closed"),
        ("[" + ROWS[0] + ", ", "the array is not closed"),
        ("[" + ROWS[0] + ', {"conversations": [{"from": "hum', "Unterminated string"),
        ("[" + ROWS[0] + ",]", "Expecting value"),
        ("[" + ROWS[0] + " " + ROWS[1] + "]", "got '{', expected ','"),
        ("[" + ROWS[0] + "]\n[" + ROWS[1] + "]", r"got '\[' after the array's end"),
        ("[" + ROWS[0] + "," + "[" * 100_000, "recursion"),
    ],
)
def test_a_broken_array_is_an_error_at_its_place(read, text, reason):
    with pytest.raises(DataError, match=rf"data\.json:1: broken JSON: .*{reason}.*; the rows after it cannot be read"):
        read(text)


def test_a_fault_near_the_start_does_not_read_all_that_follows(tmp_path):
    file = tmp_path / "data.json"
    file.write_text("[{broken}, " + ", ".join([ROWS[0]] * 200_000) + "]")  # 15 MB
    tracemalloc.start()
    with pytest.raises(DataError, match=r"data\.json:0"):
        list(raw_rows(str(file)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < file.stat().st_size / 2


@pytest.mark.parametrize("form", ["[{}, {}, {}]", "{}\n{}\n{}"])
def test_bytes_that_are_not_utf8_are_their_rows_fault(tmp_path, form):
    turns = '{"conversations": [{"from": "human", "value": "BROKEN"}, {"from": "gpt", "value": "x"}]}'
    good = turns.replace("BROKEN", "fine")
    content = form.format(good, turns, good).encode().replace(b"BROKEN", b"caf\xe9")
    (tmp_path / "data.json").write_bytes(content)
    rows = check_rows(DataConfig(files=[str(tmp_path / "data.json")], format="vicuna_v1", workers=0))
    assert rows["fault"][:] == ["", "conversations[0]: not UTF-8 at character 3, expected Unicode text", ""]


def test_a_broken_line_is_its_rows_fault(read):
    first, broken, last = read(f"{ROWS[0]}\n{{broken\n{ROWS[1]}")
    assert isinstance(broken, RowError)
    assert "broken JSON" in str(broken)
    assert [first, last] == list(map(json.loads, ROWS[:2]))


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ ] "])
def test_a_file_without_rows_is_an_error(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=r"data\.json: got no rows, expected at least one conversation"):
        check_rows(DataConfig(files=[str(tmp_path / "data.json")], format="vicuna_v1"))


@pytest.mark.parametrize("name", ["nothing.json", "easy_vqa:val", "*.nothing", "~/nothing.json", "$NOTHING/x.json"])
def test_what_is_no_file_is_an_error(name):
    with pytest.raises(DataError) as caught:
        find_files(name)
    start = "" if name.startswith("~") else f" in {Path.cwd()}, where relative paths start"
    start += " (the variable NOTHING is not set)" if name.startswith("$") else ""
    assert str(caught.value).startswith(f"{name}: no such file{start}; expected JSON or JSONL")


@pytest.fixture
def fold(tmp_path):
    """A folder `fold` with a file a.jsonl, and beside it `other` with b.jsonl and `deep/c.jsonl`."""
    for name in ("fold/a.jsonl", "other/b.jsonl", "other/deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(ROWS[0])
    return tmp_path / "fold"


@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/**/*"])
def test_folders_behind_links_are_read_too_and_a_link_upwards_ends(fold, pattern):
    (fold / "linked").symlink_to(fold.parent / "other")
    (fold / "up").symlink_to(fold)
    (fold.parent / "other/back").symlink_to(fold)
    (fold / "file.jsonl").symlink_to(fold / "a.jsonl")
    (fold / ".#a.jsonl").symlink_to("/nowhere")  # an editor's lock
    names = ["a.jsonl", "file.jsonl", "linked/b.jsonl", "linked/deep/c.jsonl"]
    assert find_files(f"{fold}{pattern}") == [str(fold / name) for name in names]
    assert find_files(f"{fold}/*.jsonl") == [str(fold / name) for name in names[:2]]
    assert find_files(f"{fold}/*/d**p/*.jsonl") == [str(fold / "linked/deep/c.jsonl")]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        *[(name, pattern) for name in ("b.jsonl", "linked", "linked/b.jsonl") for pattern in ("", "/**/*.jsonl")],
        ("b.jsonl", "/*.jsonl"),
        ("linked", "/*/*.jsonl"),
        ("linked/b.jsonl", "/*/b.jsonl"),
    ],
)
def test_a_link_to_nothing_is_refused(fold, name, pattern):
    (fold / name).parent.mkdir(exist_ok=True)
    (fold / name).symlink_to("/nowhere/b.jsonl")
    with pytest.raises(DataError) as caught:
        find_files(f"{fold}{pattern}")
    assert f"{fold / name}: got a link to /nowhere/b.jsonl, which does not exist; expected a" in str(caught.value)
    assert missing_paths(DataConfig(files=[f"{fold}{pattern}"], format="plain")) == []


def test_what_is_no_file_among_others_is_refused(fold):
    os.mkfifo(fold / "b.jsonl")
    for pattern in ("", "/*.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl: got no regular file"):
            find_files(f"{fold}{pattern}")


@pytest.mark.parametrize("pattern", ["", "/**/*.jsonl", "/*/*.jsonl"])
def test_a_folder_that_cannot_be_read_is_refused(fold, pattern, monkeypatch):
    (fold / "closed").mkdir()
    listing = os.scandir, os.listdir

    def refuse(number, place):
        if str(place).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(place))
        return listing[number](place)

    monkeypatch.setattr(os, "scandir", lambda place: refuse(0, place))  # root reads every folder
    monkeypatch.setattr(os, "listdir", lambda place: refuse(1, place))
    with pytest.raises(DataError, match=r"fold/closed: Permission denied; expected JSON"):
        find_files(f"{fold}{pattern}")


@pytest.mark.parametrize("pattern", ["", "/*.jsonl", "/\udcff.jsonl"])
def test_a_name_that_is_not_utf8_is_refused(fold, pattern):
    (fold / "\udcff.jsonl").write_text(ROWS[0])
    with pytest.raises(DataError, match=r"\\udcff.jsonl: the name is not UTF-8, expected UTF-8"):
        find_files(f"{fold}{pattern}")


@pytest.mark.parametrize(
    "path", ["x" * 300, "x" * 300 + "/*.json", "a\0b.json", "a\0b/*.json", "a**b.json", "~nobody/x"]
)
def test_a_path_that_cannot_exist_is_one_line_and_not_here(path):
    with pytest.raises(DataError) as caught:
        find_files(path)
    assert "; expected " in str(caught.value)
    config = DataConfig(files=[path], images=path, format="plain")
    assert missing_paths(config) == [path, path]
    with pytest.raises(DataError, match=r"^images: got '.*, expected a folder"):
        check_folders(config)


@pytest.mark.parametrize("name", ["https://huggingface.co/datasets/org/name", "s3://bucket/rows.jsonl"])
def test_an_address_is_refused(name):
    with pytest.raises(DataError, match=f"^{name}: is an address, expected it downloaded, or hf://org/name"):
        find_files(name)


def test_a_device_is_neither_file_nor_folder():
    with pytest.raises(DataError, match=r"^/dev/null: is neither a file nor a folder"):
        find_files("/dev/null")
