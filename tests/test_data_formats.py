"""Today's formats: each is read as its publisher wrote it, images inside included. docs/data.md lists them."""

import base64
import gzip
import io
import json
import os
import re
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from pydantic import ValidationError

from data.check import main
from data.config import DataConfig
from data.images import open_image
from data.rows import DataError, RowError, Turn, parse
from data.sources import find_files, raw_rows
from data.table import check_rows, faults_of, folder_of, images_of, read_records, record_of

ROOT = Path(__file__).resolve().parents[1]
COLOURS = [(200, 10, 0), (0, 200, 10)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, colour in zip(("a.png", "b.png"), COLOURS, strict=True):
        picture(colour).save(tmp_path / name)
    return tmp_path


def picture(colour):
    return Image.new("RGB", (8, 8), colour)


def png(colour):
    stream = io.BytesIO()
    picture(colour).save(stream, "PNG")
    return stream.getvalue()


def check(folder, *files, **more):
    given = {"images": str(folder), "format": "vicuna_v1", "workers": 0, **more}
    return check_rows(DataConfig(files=[str(file) for file in files], **given))


def talk(*texts, **more):
    return {**more, "conversations": [{"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(texts)]}


def messages(*texts, **more):
    return {**more, "messages": [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]}


def seen(folder, rows):
    """Returns the turns, the system prompt and the colours of the images of each row of a table without a fault."""
    assert [str(fault) for fault in faults_of(rows)] == []
    found = []
    for row in rows:
        images = [open_image(folder, image) for image in images_of(row)]
        texts = [turn.text for turn in record_of(row).turns]
        found.append((texts, row["system"], [image.getpixel((0, 0)) for image in images]))
    return found


ONE = (["<image>\nWhat is it?", "Red."], None, COLOURS[:1])
TWO = (["<image>\n<image>\nWhich?", "The first."], None, COLOURS)
TEXT = (["Hi", "Hello"], None, [])

# Name in the table of docs/data.md -> rows as published, and what they mean.
PATHS = {
    "LLaVA": ([talk("<image>\nWhat is it?", "Red.", image="a.png"), talk("Hi", "Hello")], [ONE, TEXT]),
    "LLaVA, several images": ([talk("<image>\n<image>\nWhich?", "The first.", image=["a.png", "b.png"])], [TWO]),
    "ShareGPT": (
        [
            {
                "images": ["a.png"],
                "system": "Be brief.",
                "conversations": [
                    {"from": "user", "value": "<image>\nWhat is it?"},
                    {"from": "chatgpt", "value": "Red."},
                ],
            }
        ],
        [(ONE[0], "Be brief.", ONE[2])],
    ),
    "OpenAI messages": (
        [messages("<image>\nWhat is it?", "Red.", images=["a.png"]), messages("Hi", "Hello")],
        [ONE, TEXT],
    ),
    "messages of parts": (
        [
            messages(
                [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}],
                [{"type": "text", "text": "The first."}],
                images=["a.png", "b.png"],
            ),
            messages([{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}], "Red."),
            messages(
                [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What is it?"}], "Red."
            ),
        ],
        [TWO, ONE, ONE],
    ),
    "Cauldron, FineVision": (
        [{"images": ["a.png"], "texts": [{"user": "What is it?", "assistant": "Red.", "source": "x"}]}],
        [ONE],
    ),
}


@pytest.mark.parametrize("packed", ["json", "jsonl", "jsonl.gz", "jsonl.zst", "json.gz"])
@pytest.mark.parametrize("name", PATHS)
def test_rows_in_json(folder, name, packed):
    rows, expected = PATHS[name]
    lines = json.dumps(rows) if packed.startswith("json.") or packed == "json" else "\n".join(map(json.dumps, rows))
    data = lines.encode()
    if packed.endswith("gz"):
        data = gzip.compress(data)
    if packed.endswith("zst"):
        with pa.CompressedOutputStream(folder / "x.zst", "zstd") as stream:
            stream.write(data)
        data = (folder / "x.zst").read_bytes()
    (folder / f"data.{packed}").write_bytes(data)
    assert seen(folder, check(folder, folder / f"data.{packed}")) == expected


def test_the_docs_list_every_format():
    table = (ROOT / "docs/data.md").read_text().partition("| format |")[2].partition("\n\n")[0]
    listed = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert listed == [name for name in PATHS if name != "LLaVA, several images"]


def inside(colour, path=None):
    return {"bytes": png(colour), "path": path}


EMBEDDED = {
    "LLaVA-OneVision-Data": (
        {
            "id": ["1", "2"],
            "image": [inside(COLOURS[0], "x.png"), None],
            "conversations": [
                talk("<image>\nWhat is it?", "Red.")["conversations"],
                talk("Hi", "Hello")["conversations"],
            ],
            "data_source": ["s", "s"],
        },
        [ONE, TEXT],
    ),
    "FineVision and the Cauldron": (
        {
            "images": [[inside(COLOURS[0])], []],
            "texts": [
                [{"user": "What is it?", "assistant": "Red.", "source": "x"}],
                [{"user": "Hi", "assistant": "Hello", "source": "x"}],
            ],
            "relevance_min": [5, 4],
        },
        [ONE, TEXT],
    ),
    "messages": (
        {
            "images": [[inside(COLOURS[0]), inside(COLOURS[1])]],
            "messages": [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "text": None, "index": 0},
                            {"type": "image", "text": None, "index": 1},
                            {"type": "text", "text": "Which?", "index": None},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "The first.", "index": None}]},
                ]
            ],
        },
        [TWO],
    ),
}
FEATURES = {
    "LLaVA-OneVision-Data": {"image": datasets.Image()},
    "FineVision and the Cauldron": {"images": datasets.List(datasets.Image())},
    "messages": {"images": datasets.List(datasets.Image())},
}


def as_dataset(name):
    columns, _ = EMBEDDED[name]
    made = datasets.Dataset.from_dict(columns)
    return made.cast(datasets.Features({**made.features, **FEATURES[name]}))


@pytest.mark.parametrize("form", ["plain parquet", "datasets parquet", "saved", "saved split", "arrow", "folder"])
@pytest.mark.parametrize("name", EMBEDDED)
def test_rows_with_their_images_inside(folder, name, form):
    columns, expected = EMBEDDED[name]
    place = folder / "set"
    if form == "plain parquet":
        parquet.write_table(pa.table(columns), folder / "data.parquet")
        place = folder / "data.parquet"
    elif form == "datasets parquet":
        as_dataset(name).to_parquet(folder / "data.parquet")
        place = folder / "data.parquet"
    elif form == "saved":
        as_dataset(name).save_to_disk(place)
    elif form == "saved split":
        datasets.DatasetDict({"train": as_dataset(name), "test": as_dataset(name)}).save_to_disk(place)
        place = f"{place}:train"
    elif form == "arrow":
        as_dataset(name).save_to_disk(place)
        (place,) = place.glob("*.arrow")
    else:
        (folder / "org/part").mkdir(parents=True)
        as_dataset(name).to_parquet(folder / "org/part/train-00000-of-00001.parquet")
        place = folder / "org"
    assert seen(folder, check(folder, place)) == expected


def test_pillow_images_in_memory_are_read_from_a_saved_folder(folder):
    rows = {"image": [picture(COLOURS[0])], "conversations": [talk("<image>\nWhat is it?", "Red.")["conversations"]]}
    datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            }
        ),
    ).save_to_disk(folder / "set")
    assert seen(folder, check(folder, folder / "set")) == [ONE]


def test_an_embedded_image_that_is_broken_is_a_fault_of_its_row(folder):
    columns = {
        "image": [{"bytes": b"none", "path": "x.png"}, inside(COLOURS[0])],
        "conversations": [talk("<image>\nWhat is it?", "Red.")["conversations"]] * 2,
    }
    parquet.write_table(pa.table(columns), folder / "data.parquet")
    (fault,) = faults_of(check(folder, folder / "data.parquet"))
    assert str(fault).startswith(f"{folder / 'data.parquet'}:0: image 'x.png' is not an image that Pillow reads")


def test_a_struct_without_bytes_is_a_path(folder):
    columns = {
        "image": [{"bytes": None, "path": "a.png"}],
        "conversations": [talk("<image>\nWhat is it?", "Red.")["conversations"]],
    }
    parquet.write_table(pa.table(columns), folder / "data.parquet")
    assert seen(folder, check(folder, folder / "data.parquet")) == [ONE]


def test_globs_and_folders_are_files_in_order(folder):
    (folder / "rows").mkdir()
    for number in (2, 0, 1):
        (folder / f"rows/part{number}.json").write_text(json.dumps([talk(str(number), "x")]))
    (folder / "rows/notes.txt").write_text("no rows")
    for given in (folder / "rows", folder / "rows/part*.json", folder / "r*/part?.json"):
        assert [row["texts"][0] for row in check(folder, given)] == ["0", "1", "2"]


def test_variables_and_the_home_folder_expand(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("ROWS", str(folder))
    (folder / "data.json").write_text(json.dumps([talk("<image>\nWhat is it?", "Red.", image="a.png")]))
    for given in ("~/data.json", "$ROWS/data.json", "${ROWS}/*.json"):
        assert len(check(folder, given)) == 1
    config = DataConfig(files=["~/data.json"], images="$ROWS", format="plain", workers=0)
    assert not faults_of(check_rows(config))
    assert folder_of(config.sources[0], "x") == folder


def test_a_limit_takes_the_first_rows_and_a_source_has_its_own_images_and_format(folder):
    (folder / "other").mkdir()
    picture(COLOURS[1]).save(folder / "other/a.png")
    (folder / "data.json").write_text(json.dumps([talk("<image>\nWhat is it?", "Red.", image="a.png")] * 5))
    files = [
        {"path": str(folder / "data.json"), "limit": 2},
        {"path": str(folder / "data.json"), "limit": 3, "images": str(folder / "other"), "format": "plain"},
    ]
    config = DataConfig(files=files, images=str(folder), format="vicuna_v1", workers=0)
    rows = check_rows(config)
    assert rows["source"][:] == [0, 0, 1, 1, 1]
    assert rows["row"][:] == [0, 1, 0, 1, 2]
    assert rows["notes"][:] == [[]] * 2 + [["question_left_out"]] * 3
    assert [folder_of(config.sources[number], "x") for number in (0, 1)] == [folder, folder / "other"]


UNREADABLE = {
    "zip": (b"PK\x03\x04" + b"x" * 30, "a zip archive"),
    "real.zip": (None, "a zip archive"),
    "utf16.json": ("[{}]".encode("utf-16"), "UTF-16 text"),
    "page.json": (b"\n<!DOCTYPE html><html>404</html>", "a web page or XML"),
    "pointer.json": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "data.csv": (b"id,text\n1,hello\n", "a .csv file"),
    "tar": (b"x" * 257 + b"ustar" + b"x" * 20, "a tar archive"),
    "tar.gz": (gzip.compress(b"x" * 257 + b"ustar" + b"x" * 20, mtime=0), "a tar archive"),
    "xz": (b"\xfd7zXZ\0 and more", "xz"),
    "pickle": (b"\x80\x04\x95 and more", "a Python pickle"),
    "picture.json": (png(COLOURS[0]), "an image"),
    "paper.json": (b"%PDF-1.7", "a PDF"),
    "zeros.json": (b"[{\0\0\0}]", "binary data"),
    "numpy.json": (b"\x93NUMPY\x01", "a NumPy array"),
    "utf16 without a mark.json": ("[{}]".encode("utf-16-le"), "UTF-16 text or binary data"),
    "utf32.json": ("[{}]".encode("utf-32"), "UTF-32 text"),
    "twice.json.gz": (gzip.compress(gzip.compress(b"[]", mtime=0)), "gzip"),
    "lz4": (b"\x04\x22\x4d\x18 and more", "lz4"),
    "avro": (b"Obj\x01 and more", "Avro"),
    "orc": (b"ORC\0", "ORC"),
    "clip.json": (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
    "photo.json": (b"\0\0\0\x18ftypheic\0\0\0\0", "an image (HEIC)"),
    "sqlite": (b"SQLite format 3\0", "an SQLite database"),
    "pretty.json": (b'{\n  "data": [\n  ]\n}', "one JSON object over several lines"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_says_what_it_looks_like(folder, name):
    data, kind = UNREADABLE[name]
    if data is None:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data.json", "[]")
    else:
        (folder / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        check(folder, folder / name)
    assert str(caught.value).startswith(f"{folder / name}: looks like {kind}")
    assert "; expected " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("cut.json.gz", gzip.compress(json.dumps([talk("a", "b")] * 900).encode(), mtime=0)[:-30], "end-of-stream"),
        ("bad.jsonl.gz", gzip.compress(b"x" * 100, mtime=0)[:-8] + b"12345678", "CRC"),
        ("cut.zst", b"\x28\xb5\x2f\xfd\x04", "expected a whole file"),
        ("cut.parquet", b"PAR1 and no more", "cannot be read"),
        ("half.jsonl.zst", None, "Truncated compressed stream"),
        ("more.jsonl.gz", gzip.compress(b"{}", mtime=0) + b"junk", "Not a gzipped file"),
        ("cut.arrow", b"\xff\xff\xff\xff\x10\0\0\0", "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # bytes hold the time, and every worker has to agree
)
def test_broken_archives_and_tables_are_one_line(folder, name, data, reason):
    if data is None:
        with pa.CompressedOutputStream(folder / "whole.zst", "zstd") as stream:
            stream.write("\n".join(json.dumps(talk(str(number), "x" * 40)) for number in range(3000)).encode())
        data = (folder / "whole.zst").read_bytes()
        data = data[: len(data) * 2 // 3]
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}.*{reason}") as caught:
        check(folder, folder / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_archives_one_after_the_other_in_a_file_are_all_read(folder, packed):
    parts = []
    for number in range(2):
        text = json.dumps(talk(str(number), "a")).encode() + b"\n"
        with pa.CompressedOutputStream(folder / "part", {"gz": "gzip", "zst": "zstd"}[packed]) as stream:
            stream.write(text)
        parts.append((folder / "part").read_bytes())
    (folder / f"data.jsonl.{packed}").write_bytes(b"".join(parts))
    assert [row["texts"][0] for row in check(folder, folder / f"data.jsonl.{packed}")] == ["0", "1"]


def test_a_table_without_rows_is_an_error(folder):
    parquet.write_table(pa.table({"messages": pa.array([], pa.string())}), folder / "none.parquet")
    with pytest.raises(DataError, match=r"none.parquet: got no rows, expected at least one conversation"):
        check(folder, folder / "none.parquet")


ODD = {  # columns of three rows that Python cannot hold
    "text": pa.array([b"fine", b"caf\xe9", b"fine"]).view(pa.string()),
    "time": pa.array([1, 2**55, 2], pa.timestamp("ms")),
    "date": pa.array([1, 2**30, 2], pa.int32()).cast(pa.date32()),
    "duration": pa.array([1, 2**62, 2], pa.duration("s")),
    "zone": pa.array([1, 2, 3], pa.timestamp("us", tz="Mars/Base")),
    "struct": pa.array([{"x": 1}, {"x": 2**55}, {"x": 3}], pa.struct([("x", pa.timestamp("ms"))])),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_a_value_of_a_table_that_python_cannot_hold_is_its_rows_fault(folder, capsys, name, streaming):
    columns = {"conversations": [talk(str(number), "a")["conversations"] for number in range(3)], "odd": ODD[name]}
    parquet.write_table(pa.table(columns), folder / "data.parquet")
    data = {"files": [str(folder / "data.parquet")], "format": "vicuna_v1", "workers": 0, "streaming": streaming}
    (folder / "recipe.yaml").write_text(json.dumps({"data": data}))
    assert main([str(folder / "recipe.yaml"), "--json"]) == 2
    faults = json.loads(capsys.readouterr().out)["data"]["faults"]
    assert [fault["row"] for fault in faults] == ([0, 1, 2] if name == "zone" else [1])
    assert all(fault["reason"].startswith("has a value that cannot be read: ") for fault in faults)


TWICE = pa.StructArray.from_arrays([pa.array(["a.png"]), pa.array(["b.png"])], names=["image", "image"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "table",
    [
        pa.table([pa.array(["a.png"]), pa.array(["b.png"])], names=["image", "image"]),
        pa.table({"part": TWICE}),
        pa.table({"messages": pa.ListArray.from_arrays([0, 1], pa.ListArray.from_arrays([0, 1], TWICE))}),
    ],
    ids=["columns", "struct", "list"],
)
def test_a_column_twice_is_refused(folder, stream, table):
    parquet.write_table(table, folder / "data.parquet")
    with pytest.raises(DataError, match=r"data.parquet: got column 'image' twice, expected it once"):
        list(raw_rows(str(folder / "data.parquet"), stream=stream))


@pytest.mark.parametrize(
    ("names", "other"),
    [
        (("train-0.json", "validation-0.json"), "validation-0.json"),
        (("train/0.json", "test/0.json"), "test/0.json"),
        (("llava_train.jsonl", "llava_Test.jsonl"), "llava_Test.jsonl"),
        (("data/a.json", "data/a.dev.json.gz"), "data/a.dev.json.gz"),
        (("0.json", "eval/deep/1.json"), "eval/deep/1.json"),
    ],
)
def test_a_folder_or_glob_of_several_splits_is_refused(folder, names, other):
    for name in names:
        (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "set" / name).write_text(json.dumps([talk("a", "b")]))
    for path in (folder / "set", folder / "set/**/*.json*"):
        message = rf"^{re.escape(str(path))}: got several splits \(such as {other}\), expected one, by a glob such as"
        with pytest.raises(DataError, match=message):
            find_files(str(path))
    assert len(check(folder, folder / "set" / names[0])) == 1


def test_a_saved_set_of_several_splits_is_refused(folder):
    datasets.DatasetDict({"train": as_dataset("messages"), "test": as_dataset("messages")}).save_to_disk(folder / "two")
    with pytest.raises(DataError, match=r"got splits train, test, expected one of them: .*two:train"):
        check(folder, folder / "two")


@pytest.mark.parametrize("name", [".cache/x.json", ".x.json", "._rows.json", "__MACOSX/rows.json"])
def test_hidden_files_of_a_folder_are_no_rows(folder, name):
    for file in (f"set/{name}", "set/rows.json"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps([talk("a", "b")]))
    assert find_files(str(folder / "set")) == [str(folder / "set/rows.json")]
    assert find_files(str(folder / "set/**/*.json")) == [str(folder / "set/rows.json")]


def test_a_file_that_changes_under_the_same_size_and_time_is_read_again(folder):
    file = folder / "data.json"
    file.write_text(json.dumps([talk("a", "AAAA")]))
    before = file.stat()
    assert check(folder, file)["texts"][0] == ["a", "AAAA"]
    file.write_text(json.dumps([talk("a", "BBBB")]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert check(folder, file)["texts"][0] == ["a", "BBBB"]


# --- one row: what it means, or the fault that names it


MEANT = {
    "roles in capitals": (
        {"messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]},
        ["q", "a"],
    ),
    "human and model": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "model", "value": "a"}]},
        ["q", "a"],
    ),
    "role in conversations": (
        {"conversations": [{"role": "user", "content": "q"}, {"role": "gpt", "content": "a"}]},
        ["q", "a"],
    ),
    "a key conversation": (
        {"conversation": [{"from": "human", "value": "q"}, {"from": "bot", "value": "a"}]},
        ["q", "a"],
    ),
    "pairs as messages": ({"messages": [{"user": "q", "assistant": "a"}]}, ["q", "a"]),
    "text parts": (
        messages([{"type": "text", "text": "q"}, {"type": "text", "text": " r"}], ["it is", " a dog."]),
        ["q r", "it is a dog."],
    ),
    "text parts around images": (
        messages(["one", {"type": "image", "image": "x"}, {"type": "image", "image": "y"}, "two", " ?"], "a"),
        ["one\n<image>\n<image>\ntwo ?", "a"],
    ),
    "parts that are text": (messages(["q"], ["a"]), ["q", "a"]),
    "input parts": (
        messages([{"type": "input_text", "text": "q"}], [{"type": "output_text", "text": "a"}]),
        ["q", "a"],
    ),
    "both keys alike": (
        {"messages": [{"from": "human", "role": "human", "value": "q"}, {"role": "gpt", "value": "a"}]},
        ["q", "a"],
    ),
    "no image: null": (talk("q", "a", image=None), ["q", "a"]),
    "no image: empty text": (talk("q", "a", image=""), ["q", "a"]),
    "no image: list of empty text": (talk("q", "a", image=[""]), ["q", "a"]),
    "no image: list of null": (talk("q", "a", images=[None]), ["q", "a"]),
    "no image: NaN": (talk("q", "a", image=float("nan")), ["q", "a"]),
    "no image: empty struct": (talk("q", "a", image={"bytes": None, "path": None}), ["q", "a"]),
    "image and images alike": (talk("<image>q", "a", image="x.png", images=["x.png"]), ["<image>\nq", "a"]),
    "an empty image and images": (talk("<image>q", "a", image="", images=["x.png"]), ["<image>\nq", "a"]),
    "a file address": (talk("<image>q", "a", image="file:///d/x.png"), ["<image>\nq", "a"]),
    "a mark as text, no image": (talk("what is <image>?", "a"), [r"what is \<image>?", "a"]),
    "an escaped mark beside an image": (
        talk(r"<image> what is \<image>?", "a", image="x"),
        ["<image>\nwhat is \\<image>?", "a"],
    ),
    "a mark as text beside image parts": (
        messages([{"type": "image", "image": "x"}, {"type": "text", "text": "<image>?"}], "a"),
        ["<image>\n\\<image>?", "a"],
    ),
    "unused keys of other tools": (talk("q", "a", video=None, tools=[], audio="", weight=1, loss=True), ["q", "a"]),
    "trained by its switch": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]},
        ["q", "a"],
    ),
    "a developer's prompt": (
        {"messages": [{"role": "developer", "content": "s"}, *messages("q", "a")["messages"]]},
        ["q", "a"],
    ),
    "an empty system prompt": (talk("q", "a", system=""), ["q", "a"]),
    "parts without a type": (messages([{"image": "x.png"}, {"text": "q"}], "a"), ["<image>\nq", "a"]),
    "parts of one Arrow struct": (
        messages([{"type": "image", "text": "", "image": "x"}, {"type": "text", "text": "q", "image": None}], "a"),
        ["<image>\nq", "a"],
    ),
    "an index that pandas wrote": (
        messages([{"type": "image", "index": 1.0}, {"type": "image", "index": 0.0}, "q"], "a", images=["x", "y"]),
        ["<image>\n<image>\nq", "a"],
    ),
    "images in the parts and listed": (
        messages([{"type": "image", "image": "x"}, "q"], "a", images=["x"]),
        ["<image>\nq", "a"],
    ),
    "one part, one image, two keys": (
        messages([{"type": "image_url", "image_url": {"url": "x", "detail": "low"}, "url": "x"}, "q"], "a"),
        ["<image>\nq", "a"],
    ),
    "a prompt of spaces": ({"system": " ", **messages("q", "a")}, ["q", "a"]),
    "roles of LangChain": (
        {"messages": [{"role": "human", "content": "q"}, {"role": "ai", "content": "a"}]},
        ["q", "a"],
    ),
    "a class label": (talk("q", "a", label=3), ["q", "a"]),
    "an empty key of another spelling": (talk("q", "a", Videos=[], imagePath=None), ["q", "a"]),
    "tags of a web page": (talk("what is <img>x</img>?", "a"), ["what is <img>x</img>?", "a"]),
    "a leading answer": (
        {"conversations": [{"from": "gpt", "value": "x"}, *talk("q", "a")["conversations"]]},
        ["q", "a"],
    ),
}


@pytest.mark.parametrize("name", MEANT)
def test_rows_mean_what_their_writer_meant(name):
    row, texts = MEANT[name]
    assert [turn.text for turn in parse(row).turns] == texts


def turn(text="a", role="assistant", **more):
    return {"messages": [{"role": "user", "content": "q"}, {"role": role, "content": text, **more}]}


def part(**more):
    return {"type": "text", "text": "x", **more}


def deep():
    """Returns a list in a list, 9,000 deep."""
    value = []
    for _ in range(9000):
        value = [value]
    return value


NAMED = {
    "video": (talk("<video>\nq", "a", video="a.mp4"), "got key 'video', which is not supported"),
    "videos": (talk("q", "a", videos=["a.mp4"]), "got key 'videos'"),
    "audio": (talk("q", "a", audio={"bytes": b"x", "path": None}), "got key 'audio'"),
    "tools": (talk("q", "a", tools=[{"name": "f"}]), "got key 'tools'"),
    "tools as text": (talk("q", "a", tools="[{}]"), "got key 'tools'"),
    "image_path": (talk("<image>q", "a", image_path="x.png"), "got key 'image_path', .* expected image or images"),
    "picture": (talk("<image>q", "a", picture="x.png"), "got key 'picture'"),
    "an image under any key": (
        talk("<image>q", "a", frame="sub/x.JPG"),
        "got key 'frame', which names or holds a file",
    ),
    "a struct under any key": (
        talk("q", "a", jpg={"bytes": b"x", "path": None}),
        "got key 'jpg', which names or holds a file",
    ),
    "a list of files under any key": (talk("q", "a", frames=["1.jpg", "2.jpg"]), "got key 'frames', which names"),
    "a file behind an empty element": (talk("q", "a", f=[None, "a.png"]), "got key 'f', which names"),
    "a file in a struct": (talk("q", "a", media={"type": "image", "path": " a.HEIC "}), "got key 'media', which names"),
    "bytes in a struct": (talk("q", "a", f={"bytes": b"\x89PNG", "width": 3}), "got key 'f', which names"),
    "a file of a list of structs": (talk("q", "a", files=[{"name": "a.jfif"}]), "got key 'files', which names"),
    "a query of an address": (talk("q", "a", f="https://x.org/y.jpg?w=1#z"), "got key 'f', which names"),
    "a clip under any key": (talk("q", "a", clip="v/a.MP4"), "got key 'clip', which names or holds a file"),
    "a sound under any key": (talk("q", "a", speech="a.wav"), "got key 'speech', which names or holds a file"),
    "base64 under any key": (talk("q", "a", image_base64_str="iVBORw0KGgoAAAA"), "got key 'image_base64_str', which"),
    "bytes under any key": (talk("q", "a", jpg=b"\xff\xd8\xff\xe0"), "got key 'jpg', which names or holds a file"),
    "an address under any key": (talk("q", "a", pic={"url": "x"}), "got key 'pic', which names or holds a file"),
    "video in capitals": (talk("q", "a", Videos=["a.mp4"]), "got key 'Videos', expected 'videos'"),
    "image in capitals": (talk("<image>q", "a", Image="x.png"), "got key 'Image', expected 'image'"),
    "a prompt in camel case": (talk("q", "a", systemPrompt="s"), "got key 'systemPrompt', expected 'system_prompt'"),
    "a path with a dash": (talk("q", "a", **{"image-path": "x"}), "got key 'image-path', expected 'image_path'"),
    "a switch in capitals": (turn(Loss=0), r"messages\[1\]: got key 'Loss', expected 'loss'"),
    "earlier turns": (talk("q", "a", history=[["q", "a"]]), "got key 'history', which is not supported"),
    "a verdict": (messages("q", "a", label=False), "got key 'label' with true or false, a preference"),
    "a verdict of LLaMA-Factory": (messages("q", "a", kto_tag=True), "got key 'kto_tag' with true or false"),
    "axolotl's switch": (turn(training=False), "no label is left"),
    "swift's switch": (turn(loss_scale=0.0), "no label is left"),
    "xtuner's switch": (turn(output_with_loss=False), "no label is left"),
    "a switch of a pair": ({"texts": [{"user": "q", "assistant": "a", "weight": 0}]}, "no label is left"),
    "a video of a pair": ({"texts": [{"user": "q", "assistant": "a", "video": "x"}]}, r"texts\[0\]: got key 'video'"),
    "a refusal": (turn("", refusal="no"), r"messages\[1\]: got key 'refusal'"),
    "Qwen's image": (talk("<img>a/x.png</img>q", "a"), "got '<img>a/x.png</img>' in a question"),
    "a video's address": (talk("<video> http://x/y.mp4 </video>", "a"), "got '<video> http://x/y.mp4 </video>' in"),
    "two images in a part": (
        messages([{"type": "image", "image": "x", "url": "y"}, "q"], "a"),
        "got two different images in one part",
    ),
    "a text part with an image": (messages([{"type": "text", "text": "q", "image": "x"}], "a"), "one part with a text"),
    "an image part with a text": (
        messages([{"type": "image", "image": "x", "text": "lost"}, "q"], "a"),
        r"messages\[0\]\[0\]: got one part with a text and an image, expected two",
    ),
    "a text part that is an image": (messages([{"type": "text", "image": "x"}], "a"), "text: got an image"),
    "an index of words": (
        messages([{"type": "image", "index": "first"}, "q"], "a", images=["x"]),
        "index: got 'first', expected the number of an image",
    ),
    "an index for one of two": (
        messages([{"type": "image", "index": 0}, {"type": "image"}, "q"], "a", images=["x", "y"]),
        "got 2 image parts for 2 images",
    ),
    "an image that is empty among others": (talk("<image>q", "a", image=["x", ""]), r"image\[1\]: got '', expected"),
    "an image named nan": (talk("q", "a", image="nan"), r"for 1 images \('nan'\)"),
    "row weight": (talk("q", "a", weight=0), "got key 'weight' with 0, expected 1 or none"),
    "row weight of a half": (talk("q", "a", weight=0.5), "got key 'weight' with 0.5"),
    "row loss": (talk("q", "a", loss=False), "got key 'loss' with False"),
    "mask": (talk("q", "a", mask=[0, 1]), "got key 'mask'"),
    "preference": (messages("q", "a", rejected="b"), "got key 'rejected'"),
    "two images": (
        talk("<image>q", "a", image="x", images=["y"]),
        "got keys 'image' and 'images' with different values",
    ),
    "two conversations": ({**talk("q", "a"), **messages("q", "b")}, "got keys 'conversations' and 'messages'"),
    "two prompts": (talk("q", "a", system="s", system_prompt="t"), "got two different system prompts"),
    "a number as prompt": (talk("q", "a", system=5), "system: got a number, expected text"),
    "alpaca": ({"instruction": "q", "output": "a"}, "got keys 'instruction', 'output'"),
    "chosen": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "got key 'chosen'|got key 'rejected'"),
    "tool turn": (turn(role="tool"), "got role 'tool', expected user or assistant: no tools"),
    "observation": (turn(role="observation"), "got role 'observation'"),
    "function_call": (turn(role="function_call"), "got role 'function_call'"),
    "tool_calls": (turn(tool_calls=[{"id": 1}]), r"messages\[1\]: got key 'tool_calls'"),
    "reasoning": (turn(reasoning_content="hm"), r"messages\[1\]: got key 'reasoning_content'"),
    "images of a turn": (turn(images=["x.png"]), r"messages\[1\]: got key 'images'"),
    "weight of a half": (turn(weight=0.5), r"messages\[1\].weight: got 0.5, expected 0 or 1"),
    "nothing to train": (turn(weight=0), "no label is left: got training switched off for every answer"),
    "a question to train": (
        {"messages": [{"role": "user", "content": "q", "loss": True}, turn()["messages"][1]]},
        "loss: got True for a user turn",
    ),
    "video part": (messages([{"type": "video", "video": "x"}], "a"), "got a part of type 'video'"),
    "audio part": (messages([{"type": "input_audio"}], "a"), "got a part of type 'input_audio'"),
    "a list as type": (messages([{"type": ["image"], "image": "x"}, "q"], "a"), "got a list as type of a part"),
    "an object as type": (messages([{"type": {"a": 1}}, "q"], "a"), "got an object as type of a part"),
    "a number as type": (messages([{"type": 1.5, "text": "q"}], "a"), "got a number as type of a part"),
    "an index without end": (
        messages([{"type": "image", "index": float("inf")}, "q"], "a", images=["x"]),
        "index: got inf, expected the number of an image",
    ),
    "an index of a half": (
        messages([{"type": "image", "index": 0.5}, "q"], "a", images=["x"]),
        "index: got 0.5, expected the number of an image",
    ),
    "two addresses of an image": (
        messages([{"type": "image", "image": {"url": "x", "path": "y"}}, "q"], "a"),
        r"messages\[0\]\[0\].image: got keys 'url' and 'path' with different values",
    ),
    "a video of a text part": (messages([part(video="x.mp4")], "a"), r"messages\[0\]\[0\]: got key 'video', which is"),
    "a video of an image part": (
        messages([{"type": "image", "image": "x", "video": "y.mp4"}, "q"], "a"),
        "got key 'video', which is not supported",
    ),
    "a sound of a text part": (messages([part(audio="x.wav")], "a"), "got key 'audio', which is"),
    "an image of another key of a part": (messages([part(image_path="x.png")], "a"), "got key 'image_path', which is"),
    "an img of a part": (messages([part(img="x.png")], "a"), "got key 'img', which is"),
    "images of a part": (messages([part(images=["x.png"])], "a"), "got key 'images', which is"),
    "a file of a part": (messages([part(file="x.png")], "a"), r"\[0\]: got key 'file', which names or holds a file"),
    "a file of a turn": (turn(frame="x.png"), r"messages\[1\]: got key 'frame', which names or holds a file"),
    "a system prompt of a turn": (
        turn(system="Be brief."),
        r"messages\[1\]: got key 'system', .* expected it in the row",
    ),
    "a system prompt of a pair": (
        {"texts": [{"user": "q", "assistant": "a", "system_prompt": "x"}]},
        r"texts\[0\]: got key 'system_prompt', .* expected it in the row",
    ),
    "spans that are trained": (
        turn(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}]),
        "got key 'train_detail', which is not supported",
    ),
    "a masked answer": (turn(masked=True), "got key 'masked', which is not supported"),
    "a turn without loss": (turn(no_loss=1), "got key 'no_loss', which is not supported"),
    "a misspelt key of a part": (messages([part(imageURL="x")], "a"), "got key 'imageURL', expected 'image_url'"),
    "loss of a part": (messages("q", [part(loss=0)]), r"messages\[1\]\[0\]: got key 'loss' with 0, expected 1 or none"),
    "train of a part": (messages("q", [part(train=False)]), "got key 'train' with False, expected 1 or none"),
    "weight of a part": (messages("q", [part(weight=0.5)]), "got key 'weight' with 0.5, expected 1 or none: a part"),
    "thinking of a part": (messages("q", [part(thinking="hm")]), "got key 'thinking', which is not supported"),
    "a row without a bottom": (talk("q", "a", weight=deep()), "nested too deeply"),
    "image in an answer": (messages("q", [{"type": "image", "image": "x"}]), "got an image in an answer"),
    "a part too many": (
        messages([{"type": "image"}, {"type": "text", "text": "q"}], "a"),
        "got 1 image parts for 0 images",
    ),
    "an image too many": (messages([{"type": "image"}, "q"], "a", images=["x", "y"]), "got 1 image parts for 2 images"),
    "a wrong index": (
        messages([{"type": "image", "index": 3}, "q"], "a", images=["x"]),
        "got 1 image parts for 1 images",
    ),
    "null as content": (turn(None), r"messages\[1\]: got null as content"),
    "a prompt in the middle": (
        {"messages": [*messages("q", "a")["messages"], {"role": "system", "content": "s"}]},
        "system turn after the first",
    ),
    "two values": (
        {"messages": [{"role": "user", "content": "q", "value": "r"}, turn()["messages"][1]]},
        "'value' and 'content' with different values",
    ),
    "two roles": (
        {"messages": [{"role": "user", "from": "gpt", "content": "q"}, turn()["messages"][1]]},
        "'from' and 'role' with different values",
    ),
    "an address": (talk("<image>q", "a", image={"path": None, "bytes": "text"}), None),
}


@pytest.mark.parametrize("name", NAMED)
def test_rows_that_cannot_be_used_are_named(name):
    row, message = NAMED[name]
    if message is None:
        assert parse(row).images == ("text",)
        return
    with pytest.raises(RowError, match=message) as caught:
        parse(row)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"image": "a.png", "image": "b.png", "conversations": []}', "image"),
        ('{"conversations": [{"from": "human", "from": "gpt", "value": "x"}]}', "from"),
        ('{"\\u0000duplicate key": 5, TURNS}', "5"),  # the mark that the reader sets, from a file
        ('{"image": {"path": "a.png", "path": "b.png"}, TURNS}', "path"),
        ('{"images": [{"path": "a.png", "path": "b.png"}], TURNS}', "path"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "text": "r"}]}]}', "text"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "a", "image": "b"}]}]}', "image"),
        ('{"messages": [{"role": "user", "content": [{"image_url": {"url": "a", "url": "b"}}]}]}', "url"),
        ('{"messages": [{"role": "user", "content": [{"image": {"path": "a", "path": "b"}}]}]}', "path"),
        ('{"messages": [{"role": "user", "content": [{"source": {"data": "a", "data": "b"}}]}]}', "data"),
    ],
)
def test_a_key_twice_with_different_values_is_a_fault(folder, line, key):
    (folder / "data.jsonl").write_text(line.replace("TURNS", json.dumps(talk("<image>q", "a"))[1:-1]))
    ((_, _, error),) = read_records(str(folder / "data.jsonl"))
    assert f"got key '{key}' twice with different values" in str(error)


def test_a_key_twice_with_the_same_value_or_where_nobody_looks_is_fine(folder):
    turns = json.dumps(talk("q", "a"))[1:-1]
    (folder / "data.jsonl").write_text(f'{{"id": 1, "id": 1, "meta": {{"x": 1, "x": 2}}, {turns}}}')
    ((_, _, record),) = read_records(str(folder / "data.jsonl"))
    assert record.ignored == ("id", "meta")


def test_keys_of_turns_that_mean_nothing_are_counted_too():
    row = messages("q", "a", id=1)
    row["messages"][0]["name"] = row["messages"][1]["name"] = "Bob"
    assert parse(row).ignored == ("id", "messages[].name")
    assert parse({"texts": [{"user": "q", "assistant": "a", "source": "x"}]}).ignored == ("texts[].source",)
    row = messages([part(cache_control={}, lang="en"), {"type": "image", "image": "x", "detail": "low"}], "a")
    assert parse(row).ignored == ("messages[][].lang", "messages[][].detail")
    assert parse(messages([part(video=None, weight=1, loss=True, index=None)], "a")).ignored == ()


@pytest.mark.parametrize(
    ("question", "note"),
    [("  ", "empty_question"), ("<video> what happens?", "media_as_text"), ("hear <audio>", "media_as_text")],
)
def test_questions_worth_counting(question, note):
    assert parse(talk(question, "a")).notes == (note,)


def test_an_answer_that_is_switched_off_is_not_trained():
    row = messages("q", "a", "r", "b")
    row["messages"][1]["weight"] = 0
    record = parse(row)
    assert record.turns == (
        Turn("user", "q"),
        Turn("assistant", "a", is_trained=False),
        Turn("user", "r"),
        Turn("assistant", "b"),
    )
    assert record.notes == ("untrained",)


def test_payloads_are_never_printed_whole(folder):
    rows = [
        talk("<image>q", "a", image="http://x.y/" + "z" * 5000),
        talk("<image>q", "a", image="data:image/png;base64," + "QUJD" * 5000),
        talk("<image>q", "a", image="x" * 5000),
        {"x" * 5000: 1},
        {"messages": [{"role": "y" * 5000, "content": ""}]},
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    faults = faults_of(check(folder, folder / "data.json"))
    assert len(faults) == 5
    assert max(len(fault.reason) for fault in faults) < 300
    assert "got the URL" in faults[0].reason


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "base64": "DATA"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "DATA"}},
        {"type": "image", "image": "data:image/png;base64,DATA"},
        {"type": "image", "image": "data:image/png;base64, \n DATA \n"},
    ],
)
def test_an_image_in_base64_is_read(folder, part):
    data = base64.b64encode(png(COLOURS[0])).decode()
    part = json.loads(json.dumps(part).replace("DATA", data))
    (folder / "data.json").write_text(json.dumps([messages([part, {"type": "text", "text": "What is it?"}], "Red.")]))
    assert seen(folder, check(folder, folder / "data.json")) == [ONE]


def test_an_image_in_a_data_address_is_read(folder):
    address = "data:image/png;base64," + base64.b64encode(png(COLOURS[0])).decode()
    part = {"type": "image_url", "image_url": {"url": address}}
    (folder / "data.json").write_text(json.dumps([messages([part, {"type": "text", "text": "What is it?"}], "Red.")]))
    assert seen(folder, check(folder, folder / "data.json")) == [ONE]
    assert np.asarray(open_image(None, address)).shape == (8, 8, 3)


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({HALF: 1}, r"got keys '\ud83d'"),
        ({"messages": [{"role": HALF, "content": "x"}]}, r"got role '\ud83d'"),
        ({"messages": [{"role": "user", "content": [{"type": HALF}]}]}, r"type '\ud83d'"),
        (talk("q", "a", system=HALF), "half a character"),
        (talk("q", "a", weight=[1] * 5000), "got key 'weight' with"),
        ({"conversations": 7 * [[]]}, r"conversations: got no turns"),
        (talk("q", "a", image=[["a.png"]]), "got a list, expected a path or an image"),
        (talk("q", "a", image=True), "got true or false, expected a path or an image"),
        ({**talk("q", "a"), "messages": 5}, "got keys 'conversations' and 'messages'"),
    ],
)
def test_odd_rows_are_one_printable_line(folder, row, message):
    (folder / "data.json").write_text(json.dumps([row, talk("q", "a")]))
    (fault,) = faults_of(check(folder, folder / "data.json"))
    assert message in fault.reason
    assert len(str(fault).encode()) < 400
    assert fault.row == 0


def test_ignored_keys_may_hold_anything(folder):
    nested = "[" * 400 + "]" * 400
    text = json.dumps(talk("q", "a"))[:-1]
    (folder / "data.jsonl").write_text(f'{text}, "deep": {nested}, "\\ud83d": "\\ud83d", "big": {"9" * 400}}}')
    rows = check(folder, folder / "data.jsonl")
    assert rows["fault"][:] == [""]
    assert rows["ignored"][:] == [["deep", "\\ud83d", "big"]]


@pytest.mark.parametrize("path", ["", "a\0b.json", "x" * 5000])
def test_odd_paths_are_one_line(folder, path):
    with pytest.raises((DataError, ValidationError)) as caught:
        check(folder, path)
    if isinstance(caught.value, DataError):
        assert "\n" not in str(caught.value)
    else:
        assert path == ""


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_check_of_a_stream_says_the_same_and_copies_nothing(folder, capsys, name):
    as_dataset(name).to_parquet(folder / "data.parquet")
    (folder / "more.json").write_text(json.dumps([talk("", ""), talk("<image>q", "a", image="none.png"), 7]))
    data = {"files": [str(folder / "data.parquet"), str(folder / "more.json")], "images": str(folder), "workers": 0}
    (folder / "recipe.yaml").write_text(json.dumps({"data": {**data, "format": "vicuna_v1"}}))
    found = []
    for streaming in ("true", "false"):
        assert main([str(folder / "recipe.yaml"), "--json", f"data.streaming={streaming}"]) == 2
        found.append(json.loads(capsys.readouterr().out))
        assert bool(list(folder.glob("cache/**/*.arrow"))) == (streaming == "false")
    assert found[0] == found[1]
    assert len(found[0]["data"]["faults"]) == 2
