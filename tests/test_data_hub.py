"""Sets of the Hugging Face hub by name, against a stand-in of its HTTP interface on this machine."""

import io
import json
import os
import re
import subprocess
import sys
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from data.config import DataConfig
from data.rows import DataError
from data.sources import HubSet
from data.table import check_rows
from recipes.schema import load_recipe
from train.release.card import licences

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "1" * 40


def table(names):
    """Returns Parquet of one row for each name, an image inside."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    turns = [[{"from": "human", "value": f"<image>\n{name}"}, {"from": "gpt", "value": "a"}] for name in names]
    columns = {"image": [{"bytes": stream.getvalue(), "path": None}] * len(turns), "conversations": turns}
    parquet.write_table(pa.table(columns), stream := io.BytesIO())
    return stream.getvalue()


ROW = json.dumps({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}).encode()
CONFIGS = "---\nconfigs:\n" + "".join(
    f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
    f"  - split: test\n    path: {name}/test-*\n"
    for name in ("part", "other")
)
REPOS = {
    "org/set": {
        "README.md": f"{CONFIGS}---\n".encode(),
        **{
            f"{name}/{split}-0000{number}-of-00002.parquet": table([f"{name} {split} {number}"])
            for name in ("part", "other")
            for split in ("train", "test")
            for number in (0, 1)
        },
    },
    "org/plain": {"data/train-00000-of-00001.parquet": table("xy"), "data/test-00000-of-00001.parquet": table("z")},
    "org/lines": {"rows.jsonl": ROW + b"\n" + ROW},
    "org/script": {"script.py": b""},
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for the repositories in REPOS, which are {path: bytes}."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        place = re.match(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(resolve|revision|tree)/([^/]+))?/?(.*)", path)
        if not place:
            self.answer(404, {"error": "no such address"})
            return
        files = self.files(place[1], place[3] or "main")
        if files is None:
            return
        if place[2] == "resolve":
            self.send_file(files.get(place[4]))
        elif place[2] == "tree":
            found = self.listed(files, unquote(place[4]), is_recursive="recursive=true" in query.lower())
            if found:
                self.answer(200, found)
            else:
                self.answer(404, {"error": "no such folder"}, "EntryNotFound")
        else:
            self.answer(200, {"id": place[1], "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        name, revision = re.match(r"/api/datasets/([^/]+/[^/]+)/paths-info/(.+)", self.path).groups()
        files = self.files(name, revision)
        if files is not None:
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            every = self.listed(files, "", is_recursive=True)
            self.answer(200, [entry for entry in every if entry["path"] in asked])

    def listed(self, files, under, *, is_recursive):
        """Returns the files and folders below a folder, as the hub's tree has them."""
        found = {}
        for path, content in files.items():
            if not Path(path).is_relative_to(under or "."):
                continue
            for part in [Path(path), *Path(path).parents][:-1]:
                depth = len(part.parts) - len(Path(under).parts)
                if depth == 1 or (is_recursive and depth > 1):
                    kind = {"type": "file", "size": len(content)} if str(part) == path else {"type": "directory"}
                    found[str(part)] = {**kind, "path": str(part), "oid": sha1(content).hexdigest()}
        return list(found.values())

    def files(self, name, revision):
        if name == "org/gated":
            self.answer(403, {"error": "gated"}, "GatedRepo")
        elif name not in REPOS:
            self.answer(404, {"error": "no such repository"}, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT):
            self.answer(404, {"error": "no such revision"}, "RevisionNotFound")
        else:
            return REPOS[name]
        return None

    def answer(self, status, content, code=""):
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json", "X-Error-Code": code})

    def send_file(self, content):
        if content is None:
            self.answer(404, {"error": "no such file"}, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        part = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part:
            start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        self.send(206 if part else 200, content, headers)

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


READ = """
import contextlib, io, json, sys
import datasets
from data.check import main
from data.config import DataConfig
from data.rows import DataError
from data.stream import checked_rows
from data.table import check_rows, images_of

datasets.config.STREAMING_READ_RETRY_INTERVAL = 0

def rows(path, streaming):
    config = DataConfig(files=[path], format="vicuna_v1", workers=0, streaming=streaming)
    for row in checked_rows(config) if streaming else check_rows(config):
        images = 1 if streaming else len(images_of(row))
        yield row["fault"] or [row["texts"][0], images]

found = {}
for path in json.loads(sys.argv[1]):
    for streaming in (False, True):
        try:
            found[f"{path} {streaming}"] = list(rows(path, streaming))
        except DataError as error:
            found[f"{path} {streaming}"] = str(error)
with contextlib.redirect_stdout(io.StringIO()) as out:
    code = main([sys.argv[2], "--json"])
print(json.dumps([found, code, json.loads(out.getvalue())]))
"""
ROWS = {
    "hf://org/set/part": ["part train 0", "part train 1"],
    "hf://org/set/part:test": ["part test 0", "part test 1"],
    "hf://datasets/org/set/other:train": ["other train 0", "other train 1"],
    "hf://org/set@v1/part": ["part train 0", "part train 1"],
    "hf://org/plain": ["x", "y"],
    "hf://org/plain:test": ["z"],
    "hf://org/set/part/train-00001-of-00002.parquet": ["part train 1"],
    "hf://org/plain/data/train-*.parquet": ["x", "y"],
}
REFUSED = {
    "hf://org/set": r"Config name is missing.*\['part', 'other'\]",
    "hf://org/set/none": r"BuilderConfig 'none' not found. Available: \['part', 'other'\]",
    "hf://org/set/part:val": r".*\['train', 'test'\]",
    "hf://org/set@v9/part": ".*Revision Not Found",
    "hf://org/none": "Dataset 'org/none' doesn't exist.* or cannot be accessed.*hf auth login",
    "hf://org/gated": "Dataset 'org/gated' is a gated dataset.*hf auth login",
    "hf://org/script": "Dataset scripts are no longer supported",
}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """What a process that knows the stand-in as the hub reads, by path and streaming; and what the check says."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "rows.jsonl").write_bytes(ROW)
    data = {"files": ["hf://org/lines", str(folder / "rows.jsonl")], "format": "vicuna_v1", "workers": 0}
    (folder / "recipe.yaml").write_text(json.dumps({"data": data}))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps([*ROWS, *REFUSED]), str(folder / "recipe.yaml")],
        cwd=ROOT,
        env={**os.environ, **own, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", ROWS)
def test_a_name_means_the_rows_of_the_hub(read, path, streaming):
    assert read[0][f"{path} {streaming}"] == [[f"<image>\n{question}", 1] for question in ROWS[path]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("path", REFUSED)
def test_what_the_hub_does_not_give_is_one_line(read, path, streaming):
    found = read[0][f"{path} {streaming}"]
    assert re.match(f"{re.escape(path)}: cannot be read: {REFUSED[path]}", found)
    assert "\n" not in found
    assert len(found) < 400


def test_the_command_reads_hub_and_disk_together(read):
    _, code, report = read
    assert code == 0
    assert [source["rows"] for source in report["data"]["sources"]] == [2, 1]


@pytest.mark.parametrize(
    "path", ["hf://name", "hf://org//x", "hf://org/", "hf://", "hf://org/name@/x", "hf://datasets/name"]
)
def test_a_name_without_organisation_or_set_is_refused(path):
    with pytest.raises(DataError, match=r"expected hf://org/name, hf://org/name/subset or"):
        HubSet.of(path)


def test_parts_of_a_name():
    found = HubSet.of("hf://org/name@refs/convert/parquet/sub/set:train[:10]")
    assert (found.name, found.revision, found.subset, found.split) == (
        "org/name",
        "refs/convert/parquet",
        "sub/set",
        "train[:10]",
    )


def test_a_local_folder_is_never_taken_for_the_hubs_set(tmp_path, monkeypatch):
    (tmp_path / "org/lines").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"hf://org/lines: the folder org/lines in .* has the name of the hub's set"):
        check_rows(DataConfig(files=["hf://org/lines"], format="plain", workers=0))


def test_a_release_names_the_hubs_set():
    options = ["data.files=[hf://org/set@v1/part:train]", "align=null"]
    text = licences(load_recipe(ROOT / "recipes/llava_fused.yaml", options), code=False)
    assert "| data | org/set | check the licence of org/set, and of its images |" in text
