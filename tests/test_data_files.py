"""Files become rows: arrays and JSONL, whole and broken."""

import json
import tracemalloc

import datasets
import pytest

from data import files
from data.files import read_rows
from data.records import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def read(tmp_path):
    """Returns a function from a file's content to its rows as (number, text)."""

    def reading(content, name="data.json"):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        rows = read_rows([str(file)])
        assert set(rows["file"]) == {str(file)}
        return list(zip(rows["row"], rows["text"], strict=True))

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
    assert [(number, json.loads(row)) for number, row in read(text)] == list(enumerate(map(json.loads, ROWS)))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_rows_that_are_cut_by_a_read_are_whole(read, monkeypatch, chunk):
    monkeypatch.setattr(files, "_CHUNK", chunk)
    rows = [*ROWS, "12345", "true", '"a \\" b"']
    assert [json.loads(row) for _, row in read("[" + " , ".join(rows) + "]")] == list(map(json.loads, rows))


def test_files_follow_each_other_and_count_for_themselves(tmp_path):
    (tmp_path / "a.json").write_text("[" + ",".join(ROWS[:2]) + "]")
    (tmp_path / "b.jsonl").write_text(ROWS[2])
    rows = read_rows([str(tmp_path / "a.json"), str(tmp_path / "b.jsonl"), "easy_vqa:test"])
    assert len(rows) == 2 + 1 + 1000
    assert rows["row"][:4] == [0, 1, 0, 0]
    assert rows[1002]["file"] == "easy_vqa:test"


def test_a_changed_file_is_read_again(read):
    assert len(read(ROWS[0])) == 1
    assert len(read("\n".join(ROWS))) == 3


def test_an_array_is_not_held_in_memory(tmp_path):
    long = json.dumps({"conversations": [{"from": "human", "value": "word " * 2000}]})
    (tmp_path / "data.json").write_text("[" + ",".join([long] * 3000) + "]")  # 30 MB
    tracemalloc.start()
    rows = read_rows([str(tmp_path / "data.json")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 3000
    assert peak < 24e6


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" + ROWS[0] + ", {broken]", "Expecting property name"),
        ("[" + ROWS[0], "the array is not closed"),
        ("[" + ROWS[0] + ", ", "the array is not closed"),
        ("[" + ROWS[0] + ', {"conversations": [{"from": "hum', "Unterminated string"),
        ("[" + ROWS[0] + ",]", "Expecting value"),
        ("[" + ROWS[0] + " " + ROWS[1] + "]", "found '{', accepted: ','"),
        ("[" + ROWS[0] + "]\n[" + ROWS[1] + "]", r"found '\[' after the array's end"),
        ("[" + ROWS[0] + "," + "[" * 100_000, "recursion"),
    ],
)
def test_a_broken_array_is_an_error_at_its_place(read, text, reason):
    with pytest.raises(DataError, match=rf"data\.json:1: broken JSON: .*{reason}.*; the rows after it cannot be read"):
        read(text)


def test_a_fault_near_the_start_does_not_read_all_that_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 10_000)
    file = tmp_path / "data.json"
    file.write_text("[{broken}, " + ", ".join([ROWS[0]] * 20_000) + "]")
    with file.open(encoding="utf-8") as stream:
        stream.read(1)
        with pytest.raises(DataError, match=r"data\.json:0"):
            list(files._array(stream, str(file)))
        assert len(stream.read()) > file.stat().st_size / 2


@pytest.mark.parametrize("form", ["[{}, {}, {}]", "{}\n{}\n{}"])
def test_bytes_that_are_not_utf8_are_their_rows_fault(read, form):
    content = form.format(ROWS[0], "BROKEN", ROWS[1]).encode().replace(b"BROKEN", b'{"value": "caf\xe9"}')
    rows = read(content)
    assert [number for number, _ in rows] == [0, 1, 2]
    assert rows[1][1] == "not UTF-8 at character 14"
    assert json.loads(rows[2][1])["id"] == "2"


def test_a_broken_line_is_its_rows_fault(read):
    assert [text for _, text in read(f"{ROWS[0]}\n{{broken\n{ROWS[1]}")] == [ROWS[0], "{broken", ROWS[1]]


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ ] "])
def test_a_file_without_rows_is_an_error(read, text):
    with pytest.raises(DataError, match=r"data\.json: found no rows, accepted: at least one conversation"):
        read(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nothing.json",
            "No such file or directory, accepted: a LLaVA JSON or JSONL file, or easy_vqa:train or",
        ),
        (
            "easy_vqa:val",
            "No such file or directory, accepted: a LLaVA JSON or JSONL file, or easy_vqa:train or",
        ),
        (".", "Is a directory, accepted: a file that can be read"),
    ],
)
def test_what_is_no_file_is_an_error(name, message):
    with pytest.raises(DataError, match=message):
        read_rows([name])
