"""Releases of tiny runs: what is in them, that a stranger can use them, and that a wrong one never looks done."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from data.chat import ChatFormat
from data.config import DataConfig
from data.images import open_image, prepare_image
from data.processor import VisionProcessor
from data.rows import Turn
from models import FusedLlavaConfig, FusedLlavaForConditionalGeneration, StagePlan
from models.families import is_plain
from models.schedules import SCHEDULES
from recipes.resolved import dump_recipe
from recipes.schema import load_recipe
from tests.serving import ask, serving, stranger
from train.checkpoints import Progress, mark_complete
from train.errors import InputError, ReleaseError
from train.release import proof as release_proof
from train.release import release
from train.release.card import licences, plan_text, read_comparison, write_card
from train.release.checkpoint import find_run, load
from train.release.processor import released_processor, save_processor
from train.release.proof import SUMS, picture

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes/configs/quickstart"
REPO = "someone/tiny-fused"
SIZE = 32  # pixels of an image's side, 16 visual tokens
TABLE = "# gqa\n\n| run | score |\n| --- | --- |\n| llava | 61.00 % |\n"
QUESTION = "What is this?"
STRANGER = """
import importlib.util, json, sys
from transformers import pipeline
assert importlib.util.find_spec("models") is None
said = []
for place, image, trust in json.loads(sys.argv[1]):
    pipe = pipeline("image-text-to-text", model=place, trust_remote_code=trust)
    content = [{"type": "image", "url": image}, {"type": "text", "text": sys.argv[2]}]
    answers = pipe(text=[{"role": "user", "content": content}], max_new_tokens=6, return_full_text=False)
    said.append(answers[0]["generated_text"])
print(json.dumps(said))
"""


def llama_like():
    """Returns a tokenizer like Vicuna's: it writes a beginning, and a space before the first word."""
    letters = [chr(code) for code in range(33, 127)] + ["\u2581"]
    table = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    core = Tokenizer(models.BPE({token: n for n, token in enumerate(table)}, [], byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.add_special_tokens({"pad_token": "<pad>"})
    return fast


def write_llava(folder):
    """Writes a run as LLaVA-1.5's recipe leaves it behind: vicuna_v1, images padded, two phases; all tiny."""
    fields = json.loads((QUICKSTART / "config.json").read_text())
    tokenizer = llama_like()
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    narrow |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    fields["text_config"] |= narrow | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    fields["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    fields["vision_config"] |= {"projection_dim": 32, "image_size": SIZE}
    fields |= {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "image_seq_length": 16}
    fields.pop("model_type", None)
    torch.manual_seed(1)
    stages = {"enter": 1, "exit": 3}
    model = FusedLlavaForConditionalGeneration(FusedLlavaConfig(**fields, stages=stages)).eval()
    model.config.use_cache = False  # as Trainer leaves it
    model.save_pretrained(folder / "final")
    images = AutoImageProcessor.from_pretrained(
        ROOT / "recipes/configs/llava-1.5-7b",
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
    )
    shape = {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    LlavaProcessor(images, tokenizer, **shape).save_pretrained(folder / "final")
    plan = ["model.stages.enter=1", "model.stages.exit=3"]
    recipe = load_recipe(ROOT / "recipes/llava_fused.yaml", [f"output={folder}", *plan])
    for place in (folder, folder / "final"):
        (place / "recipe.yaml").write_text(dump_recipe(recipe))
    figures = {
        "steps": 15,
        "seconds": 12.5,
        "samples": 50,
        "tokens": 4321,
        "loss": 0.25,
        "ranks": 8,
        "precision": "fp32",
    }
    (folder / "align/final").mkdir(parents=True)
    (folder / "align/final/run.json").write_text(json.dumps({"phase": "align", **figures}))
    (folder / "final/run.json").write_text(json.dumps({"phase": "tune", **figures, "skipped": ["row 3"]}))
    rows = [
        {"run": "llava", "schedule": "vtw", "task": "gqa", "metric": "exact_match", "score": 0.4},
        {"run": "llava", "schedule": "dense", "task": "gqa", "metric": "exact_match", "score": 0.5},
        {"run": "llava", "schedule": "trained", "task": "gqa", "metric": "exact_match", "score": 0.61},
        {"run": "llava", "schedule": "trained", "task": "pope", "metric": "f1", "score": None},
        {"run": "other", "schedule": "trained", "task": "gqa", "metric": "exact_match", "score": 0.9},
    ]
    (folder / "table").mkdir()
    (folder / "table/table.json").write_text(json.dumps({"settings": {"limit": None}, "rows": rows}))
    (folder / "table/table.md").write_text(TABLE)
    return folder


class Hub(BaseHTTPRequestHandler):
    """A stand-in of the hub's HTTP interface: repositories are {path: bytes}; large files go the LFS way."""

    repos: ClassVar[dict[str, dict[str, bytes]]] = {}
    stored: ClassVar[dict[str, bytes]] = {}
    refused = False

    def log_message(self, *_):
        pass

    def answer(self, status, content, **headers):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        place = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        if place:
            self.file(self.repos[place[1]].get(place[2]))
            return
        name = re.match(r"/api/models/([^/?]+/[^/?]+)", self.path)[1]
        if self.refused:
            self.answer(401, {"error": "Invalid credentials"})
        elif name not in self.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif re.search(r"/tree/(main|1{40})(\?|$)", self.path):
            files = self.repos[name].items()
            self.answer(200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files])
        elif "/tree/" in self.path:
            self.answer(404, {}, X_Error_Code="EntryNotFound")
        else:
            files = [{"rfilename": path} for path in self.repos[name]]
            self.answer(200, {"id": name, "sha": "1" * 40, "siblings": files})

    def file(self, content):
        self.send_response(200 if content is not None else 404)
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{sha256(content or b"").hexdigest()}"')
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    def do_PUT(self):
        self.stored[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, {})

    def do_POST(self):
        assert self.headers["Authorization"] == "Bearer hf_test"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            status = 409 if name in self.repos else 200
            self.repos.setdefault(name, {".gitattributes": b""})
            self.answer(status, {"url": f"{here}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            kinds = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": kinds[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith("/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{here}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        else:
            self.commit(body)

    def commit(self, body):
        files = self.repos[re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path)[1]]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
                assert sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"http://{self.headers['Host']}{self.path.removeprefix('/api/models')}".replace("/main", "/" + "1" * 40)
        self.answer(200, {"commitUrl": url, "commitOid": "1" * 40})


@pytest.fixture(scope="module")
def hub():
    """Yields the endpoint of the stand-in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def online(hub, monkeypatch):
    """Lets this process speak with the stand-in, with a token."""
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(Hub, "refused", False)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("runs") / "llava")


@pytest.fixture(scope="module")
def released(llava, hub, tmp_path_factory):
    """The release of the LLaVA-like run, pushed, by the command as a user runs it."""
    out = tmp_path_factory.mktemp("releases") / "llava"
    more = ["--max-shard-size", "100KB", "--comparison", llava / "table", "--push", REPO]
    done = subprocess.run(
        [sys.executable, "-m", "train.release", llava, "--out", out, *more],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"uploaded to {hub}/{REPO}" in done.stdout
    return out


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A dense run of the quickstart's shape, with the tokenizer's own chat template."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    fields = json.loads((QUICKSTART / "config.json").read_text())
    fields.pop("model_type", None)
    torch.manual_seed(0)
    FusedLlavaForConditionalGeneration(FusedLlavaConfig(**fields)).save_pretrained(folder / "final")
    AutoProcessor.from_pretrained(QUICKSTART).save_pretrained(folder / "final")
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", ["model.stages=null", f"model.config={QUICKSTART}"])
    for place in (folder, folder / "final"):
        (place / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "final/run.json").write_text(json.dumps({"phase": "tune", "steps": 1}))
    return folder


@pytest.fixture(scope="module")
def dense(quickstart, tmp_path_factory):
    """The release of the dense run."""
    out = tmp_path_factory.mktemp("releases") / "dense"
    assert release.main([str(quickstart), "--out", str(out)]) == 0
    return out


def test_a_release_holds_all_that_it_needs(released, llava):
    names = {path.name for path in released.iterdir()}
    assert {"README.md", "LICENSES.md", "recipe.yaml", "table.md", "table.json", "generation_config.json"} <= names
    assert {"chat_template.jinja", "processor_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    config = json.loads((released / "config.json").read_text())
    assert (config["stages"]["enter"], config["stages"]["exit"], config["use_cache"]) == (1, 3, True)
    assert set(config["auto_map"]) >= {"AutoConfig", "AutoModelForImageTextToText"}
    assert (released / "recipe.yaml").read_bytes() == (llava / "final/recipe.yaml").read_bytes()
    assert [path.name for path in released.parent.iterdir()] == [released.name]


def test_its_code_is_this_repositorys(released):
    code = sorted(path.name for path in released.glob("*.py"))
    assert {"families.py", "fused.py", "decoder.py", "stage_plan.py", "schedules.py"} <= set(code)
    assert {f"{kind.__module__.rpartition('.')[2]}.py" for kind in SCHEDULES.values()} <= set(code)
    for name in set(code) - {"modeling_fused.py"}:  # which says what transformers it needs, and names the classes
        assert (released / name).read_bytes() == (ROOT / "models" / name).read_bytes()


def test_its_checksums_hold(released):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=released, check=True)
    listed = {line.split("  ")[1] for line in (released / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in released.iterdir()} - {"SHA256SUMS"}


def test_its_card_says_what_it_is(released):
    card = ModelCard.load(released / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model == ["lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336"]
    assert card.data.datasets == ["liuhaotian/LLaVA-Pretrain", "liuhaotian/LLaVA-Instruct-150K"]
    found = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert found == [("gqa", "exact_match", 0.61)]
    assert "enter at decoder layer 1 and are gone from layer 3 on (layers count from 0): 2 of 4" in card.text
    assert f"\n##{TABLE}" in card.text
    assert REPO in card.text
    assert "| tune | 15 |" in card.text
    assert "Rows left out for faults: 1." in card.text
    assert str(released.parents[1]) not in card.content


def test_a_dense_model_is_what_both_names_say(quickstart, tmp_path):
    rows = [
        {"run": "quickstart", "schedule": schedule, "task": "easy_vqa", "metric": "accuracy", "score": score}
        for schedule, score in (("vtw", 0.3), ("dense", 0.7), ("trained", 0.7))
    ]
    (tmp_path / "table.md").write_text("")
    for content in (rows, {"rows": rows}):
        (tmp_path / "table.json").write_text(json.dumps(content))
        assert read_comparison(tmp_path, find_run(quickstart)).rows == [rows[1]]


def test_a_window_that_training_found_is_no_dense_model(quickstart, tmp_path):
    shutil.copytree(quickstart, tmp_path / "quickstart")
    config = tmp_path / "quickstart/final/config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "stages": StagePlan(0, 3).to_dict()}))
    rows = [
        {"run": "quickstart", "schedule": schedule, "task": "easy_vqa", "metric": "accuracy", "score": score}
        for schedule, score in (("dense", 0.31), ("trained", 0.92))
    ]
    (tmp_path / "table.md").write_text("")
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    assert read_comparison(tmp_path, find_run(tmp_path / "quickstart")).rows == [rows[1]]


def test_an_old_release_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rename = Path.rename

    def cut(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        release._replace(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old/file").read_text() == "old"
    monkeypatch.undo()
    release._replace(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old/file").read_text() == "new"


def test_licences_name_what_is_known_and_ask_about_the_rest(released):
    text = (released / "LICENSES.md").read_text()
    assert "| language model | lmsys/vicuna-7b-v1.5 | Llama 2 Community License" in text
    assert "openai/clip-vit-large-patch14-336" in text
    options = ["model.language_model=/weights/mine", "model.vision_tower=null"]
    options += ["data.files=[/rows/own.json, '/rows/a|b.json']"]
    other = licences(load_recipe(ROOT / "recipes/llava_fused.yaml", [*options, "align=null"]), code=False)
    assert "check the licence of mine |" in other
    assert "check the licence of own.json" in other
    assert r"| a\|b.json | check the licence of a\|b.json" in other
    assert "/weights" not in other
    assert "*.py" not in other
    assert "MIT" in licences(load_recipe(ROOT / "recipes/quickstart.yaml"), code=True)


def test_plans_in_words():
    assert plan_text(None, 8).startswith("Dense: visual tokens run through all 8")
    words = plan_text(StagePlan(enter=2, exit=8, update="kv", keep={4: 10, 6: 0.25}), 8)
    assert "never leave (layers count from 0): 6 of 8" in words
    assert "only gives keys and values" in words
    assert "From layer 4 on 10 visual tokens stay. From layer 6 on 0.25 of the visual tokens stay." in words
    assert words.endswith("They are chosen by attention.")
    learned = StagePlan(enter=2, exit=8, keep={2: 0.1}, select="learned")
    assert plan_text(learned, 8).endswith("0.1 of the visual tokens stay. They are chosen by a learned scorer.")
    assert "layers 0, 3 (" in plan_text(StagePlan(layers=[0, 3], update="kv"), 4)


def parts(text, images):
    return [*[{"type": "image", "image": image} for image in images], {"type": "text", "text": text}]


def test_a_card_lists_all_plans_and_how_to_choose_one(llava, tmp_path):
    shutil.copy(llava / "final/processor_config.json", tmp_path)
    plans = {"fused": {"enter": 1, "exit": 3}, "dense": None}
    cards = []
    for some in (plans, None):
        config = FusedLlavaConfig.from_pretrained(llava / "final", plans=some)
        write_card(tmp_path, find_run(llava), config, None, repo=None, plain=False)
        cards.append(ModelCard.load(tmp_path / "README.md").text)
    several, single = cards
    assert "trained for 2 stage plans" in several
    assert "- `fused`: Visual tokens enter at decoder layer 1 and are gone from layer 3 on" in several
    assert "- `dense`: Dense: visual tokens run through all 4 decoder layers" in several
    assert 'model.schedule = "dense"' in several
    assert "dense included" not in several
    assert "stage plans" not in single
    assert "under another, dense included, it is not what was trained" in single


@pytest.mark.parametrize("chat_format", ["vicuna_v1", "plain", "chat_template"])
def test_it_asks_as_training_asked(llava, quickstart, chat_format):
    """Ids of the released processor against ids of ChatFormat, which made the training's labels."""
    final = (quickstart if chat_format == "chat_template" else llava) / "final"
    sources = [{"path": "x.json", "format": chat_format}, {"path": "y.json", "format": "plain"}]
    data = DataConfig(files=sources, format="plain", image_aspect="pad")
    processor, tokenizer = released_processor(final, data), AutoProcessor.from_pretrained(final).tokenizer
    trained, image = ChatFormat(chat_format, tokenizer), Image.new("RGB", (64, 64))
    conversations = [
        ([("one?", 1)], [Turn("user", "<image>\none?")]),
        ([("one?", 0)], [Turn("user", "one?")]),
        ([(" two? ", 2)], [Turn("user", "<image>\n<image>\ntwo?")]),
        ([("one?", 1), ("yes", 0), ("why  \n so?", 0)], "<image>\none?|yes|why  \n so?"),
        ([("the <image> mark", 1)], [Turn("user", "<image>\nthe  mark")]),
    ]
    for given, turns in conversations:
        if isinstance(turns, str):
            turns = [Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(turns.split("|"))]
        roles = ("user", "assistant", "user")
        messages = [
            {"role": role, "content": parts(text, [image] * count)}
            for role, (text, count) in zip(roles, given, strict=False)
        ]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        found = processor.apply_chat_template(messages, **options)["input_ids"][0]
        repeats = {trained.image_token_id: VisionProcessor(processor).count(8, 8)}
        assert found == [token for token in trained.prompt(turns) for _ in range(repeats.get(token, 1))]
        assert ChatFormat(chat_format, processor.tokenizer).prompt(turns) == trained.prompt(turns)
        texts = [{"role": turn.role, "content": turn.text} for turn in turns]  # in place of parts
        assert processor.apply_chat_template(texts) == processor.apply_chat_template(messages)


@pytest.mark.parametrize("chat_format", ["vicuna_v1", "chat_template"])
def test_the_processor_of_a_finished_run_takes_parts_too(llava, quickstart, tmp_path, chat_format):
    final = (quickstart if chat_format == "chat_template" else llava) / "final"
    data = DataConfig(files=["x.json"], format=chat_format)
    processor = AutoProcessor.from_pretrained(final)
    trained = ChatFormat(chat_format, processor.tokenizer)
    turns = [Turn("user", "<image>\none?"), Turn("assistant", "yes")]
    expected = trained.encode(turns)
    for _ in range(2):  # as a run that starts from a finished one
        save_processor(processor, data, tmp_path)
        processor = AutoProcessor.from_pretrained(tmp_path)
        messages = [{"role": "user", "content": parts("one?", [Image.new("RGB", (64, 64))])}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        found = processor.apply_chat_template(messages, **options)["input_ids"][0]
        repeats = {trained.image_token_id: VisionProcessor(processor).count(8, 8)}
        assert found == [token for token in trained.prompt(turns[:1]) for _ in range(repeats.get(token, 1))]
        assert ChatFormat(chat_format, processor.tokenizer).encode(turns) == expected
    assert (tmp_path / "chat_template.jinja").read_text().count("set plain = namespace") == 1


def test_a_system_message_takes_the_place_of_vicunas_own(released):
    processor = AutoProcessor.from_pretrained(released)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert processor.apply_chat_template(messages) == "Be brief. USER: Why? ASSISTANT:"
    with pytest.raises(Exception, match="part of type video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("size", [(90, 41), (30, 77), (64, 64)])
def test_it_pads_images_as_training_padded(released, llava, size):
    values = torch.randint(0, 256, (*size[::-1], 3), dtype=torch.uint8)
    image = Image.fromarray(values.numpy())
    own = AutoProcessor.from_pretrained(llava / "final").image_processor
    found = AutoProcessor.from_pretrained(released).image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, own(prepare_image(image, "pad", own.image_mean), return_tensors="pt")["pixel_values"])
    if size[0] != size[1]:
        assert not torch.equal(found, own(image, return_tensors="pt")["pixel_values"])


def invisible(mode, size=(40, 30)):
    """Returns an image whose left half is red and, where it can be, invisible; the rest is blue."""
    image = Image.new("RGBA", size, (0, 0, 255, 255))
    image.paste((255, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def saved_turned(file):
    exif = Image.Exif()
    exif[0x0112] = 6
    invisible("RGB").save(file, exif=exif)


WHAT_SERVERS_LOAD = {  # how the file is made, and whether a server sees what training saw
    "opaque.png": (lambda file: invisible("RGB").save(file), True),
    "turned.png": (saved_turned, True),
    "transparent.png": (lambda file: invisible("RGBA").save(file), False),
    "grey16.png": (lambda file: Image.fromarray(np.full((30, 40), 9000, np.uint16)).save(file), False),
}


def trained_pixels(run, image):
    """Returns the pixel values that training made of an image of the LLaVA-like run."""
    own = AutoProcessor.from_pretrained(run / "final").image_processor
    return own(prepare_image(image, "pad", own.image_mean), return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("name", WHAT_SERVERS_LOAD)
def test_what_servers_make_of_images_is_what_the_docs_say(released, llava, tmp_path, name):
    """docs/release.md: by path, address or base64 transformers turns photos, drops transparency and clips 16 bits."""
    write, is_alike = WHAT_SERVERS_LOAD[name]
    write(tmp_path / name)
    trained = trained_pixels(llava, open_image(tmp_path, name))
    processor = AutoProcessor.from_pretrained(released)
    url = "data:image/png;base64," + base64.b64encode((tmp_path / name).read_bytes()).decode()
    prepared = open_image(tmp_path, name)
    for image in (str(tmp_path / name), url, prepared):
        messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        found = processor.apply_chat_template(messages, **options)["pixel_values"]
        assert torch.allclose(found, trained, atol=1e-5) == (is_alike or image is prepared)


def test_a_release_puts_opened_images_on_white_and_does_not_turn_them(released, llava, tmp_path):
    processor = AutoProcessor.from_pretrained(released).image_processor
    found = processor(invisible("RGBA"), return_tensors="pt")["pixel_values"]
    assert torch.allclose(found, trained_pixels(llava, invisible("RGBA")), atol=1e-5)
    saved_turned(tmp_path / "turned.png")
    with Image.open(tmp_path / "turned.png") as opened:
        found = processor(opened, return_tensors="pt")["pixel_values"]
        assert not torch.allclose(found, trained_pixels(llava, opened), atol=1e-5)
        upright = processor(ImageOps.exif_transpose(opened), return_tensors="pt")["pixel_values"]
        assert torch.allclose(upright, trained_pixels(llava, opened), atol=1e-5)


def answer(run, image, question, schedule=None):
    """Returns what a run's model answers when asked as it was trained to be asked."""
    ids = answer_ids(run, image, question, schedule)
    return AutoProcessor.from_pretrained(run / "final").tokenizer.decode(ids, skip_special_tokens=True)


def answer_ids(run, image, question, schedule=None):
    """Returns the tokens of `answer`."""
    found = find_run(run)
    model = FusedLlavaForConditionalGeneration.from_pretrained(found.final).eval()
    processor = AutoProcessor.from_pretrained(found.final)
    chat = ChatFormat(found.data.format, processor.tokenizer)
    ids = chat.prompt([Turn("user", f"<image>\n{question}")])
    visual = VisionProcessor(processor).count(8, 8)
    ids = [token for token in ids for _ in range(visual if token == chat.image_token_id else 1)]
    images = processor.image_processor
    prepared = prepare_image(image, found.data.image_aspect, images.image_mean)
    pixels = images(prepared, return_tensors="pt")["pixel_values"]
    made = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=pixels,
        max_new_tokens=6,
        do_sample=False,
        schedule=schedule,
    )
    return made[0, len(ids) :].tolist()


def test_strangers_use_it_in_a_pipeline(quickstart, dense, llava, released, hub, tmp_path):
    """A dense quickstart from its folder, and the fused LLaVA by its name on the hub."""
    card = ModelCard.load(dense / "README.md")
    assert "not compared" in card.text
    assert card.data.eval_results is None
    assert "MIT" in (dense / "LICENSES.md").read_text()
    square = picture(AutoProcessor.from_pretrained(quickstart / "final").image_processor)
    wide = picture(AutoProcessor.from_pretrained(llava / "final").image_processor)
    places = []
    for place, image, trust in ((str(dense), square, False), (REPO, wide, True)):
        image.save(tmp_path / f"{image.width}.png")
        places.append((place, str(tmp_path / f"{image.width}.png"), trust))
    own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, json.dumps(places), QUESTION],
        cwd=tmp_path,
        env=stranger(**own),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == [answer(quickstart, square, QUESTION), answer(llava, wide, QUESTION)]
    assert all(said)


def loaded_elsewhere(tmp_path, code, *arguments):
    """Returns what `code` prints as JSON in a process that knows the libraries alone; `sys.argv[1:]` are arguments."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import json, sys\n{code}", *map(str, arguments)],
        cwd=tmp_path,
        env=stranger(HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_dense_release_is_a_plain_checkpoint(quickstart, dense):
    out = dense
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    assert not {"auto_map", "stages", "schedule"} & config.keys()
    assert not list(out.glob("*.py"))
    theirs, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    ours = FusedLlavaForConditionalGeneration.from_pretrained(quickstart / "final").eval()
    names = load_file(out / "model.safetensors").keys()  # those of llava-hf, which other engines read
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= names
    assert {"vision_tower.vision_model.pre_layrnorm.weight", "multi_modal_projector.linear_1.weight"} <= names
    weights = theirs.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in ours.state_dict().items())
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    ids = torch.randint(5, 300, (1, 9))
    assert torch.equal(theirs.eval()(input_ids=ids).logits, ours(input_ids=ids).logits)
    card = (out / "README.md").read_text()
    assert "plain Hugging Face checkpoint" in card
    assert "trust_remote_code" not in card
    assert "*.py" not in (out / "LICENSES.md").read_text()


@pytest.mark.parametrize(
    ("stages", "schedule", "plain"),
    [
        ({"enter": 0, "exit": 4}, None, True),  # a plan that leaves nothing out
        ({"enter": 0, "exit": 4}, {"name": "dense"}, False),
        ({"enter": 0, "exit": 3}, None, False),
        ({"enter": 0, "exit": 4, "update": "kv"}, None, False),
        ({"enter": 0, "exit": 4, "keep": {2: 0.5}}, None, False),
    ],
)
def test_what_is_released_as_a_plain_checkpoint(llava, tmp_path, stages, schedule, plain):
    shutil.copytree(llava, tmp_path / "run")
    file = tmp_path / "run/final/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stages": stages}))
    assert is_plain(load(find_run(tmp_path / "run"), schedule).config) == plain


SCHEDULED = """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
place, names = sys.argv[1], sys.argv[3:]
image = Image.open(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(place, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
said = {}
for name in names:
    made = model.generate(**inputs, schedule=name, max_new_tokens=6, do_sample=False)
    said[name] = made[0, inputs["input_ids"].shape[1]:].tolist()
pipe = pipeline("image-text-to-text", model=place, trust_remote_code=True)
answers = pipe(text=messages, max_new_tokens=6, return_full_text=False)
other = AutoModelForImageTextToText.from_pretrained(place, trust_remote_code=True, schedule={"name": "vtw", "layer": 2})
kinds = [repr(model.schedule), repr(other.schedule)]
print(json.dumps([said, answers[0]["generated_text"], kinds]))
"""


def test_pruners_travel_with_a_release(quickstart, tmp_path):
    """A dense run that starts under VisiPruner: in Python by every name, and in a pipeline by its config."""
    out, setting = tmp_path / "pruned", {"name": "visipruner", "layer_threshold": 1.0}
    rows = [
        {"run": "quickstart", "schedule": name, "task": "easy_vqa", "metric": "accuracy", "score": score,
         "visual_token_layers": layers}
        for name, score, layers in (("dense", 0.75, 512.0), ("visipruner", 0.5, 200.0))
    ]  # fmt: skip
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "table.md").write_text("")
    given = ["--out", str(out), "--schedule", json.dumps(setting), "--comparison", str(tmp_path)]
    assert release.main([str(quickstart), *given]) == 0
    assert json.loads((out / "config.json").read_text())["schedule"] == setting
    card = ModelCard.load(out / "README.md")
    assert "starts under **visipruner**" in card.text
    assert "| visipruner | easy_vqa | accuracy | 0.5 | 200 |" in card.text
    assert "| fastv | - | - |" in card.text
    assert card.data.eval_results is None  # these settings were not measured
    image = picture(AutoProcessor.from_pretrained(quickstart / "final").image_processor)
    image.save(tmp_path / "picture.png")
    names = [name for name, kind in SCHEDULES.items() if not kind.reads_relevance]
    said, piped, kinds = loaded_elsewhere(tmp_path, SCHEDULED, out, tmp_path / "picture.png", *names)
    expected = {name: answer_ids(quickstart, image, QUESTION, schedule=name) for name in names}
    assert said == expected
    assert len({tuple(ids) for ids in said.values()}) > 1
    assert piped == answer(quickstart, image, QUESTION, schedule=setting)
    assert "layer_threshold=1.0" in kinds[0]
    assert kinds[1] == "VTW(layer=2)"


TWO = """
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM
marks = []
for place in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(place, trust_remote_code=True)
    marks.append([sys.modules[type(model).__module__].MARK, type(model).generate.__module__, model.schedule.MARK])
model.save_pretrained("again")
again = AutoModelForMultimodalLM.from_pretrained("again", trust_remote_code=True)
print(json.dumps([marks, sys.modules[type(again).__module__].MARK]))
"""


def test_two_releases_in_one_process_run_their_own_code(released, tmp_path):
    places = []
    for word in ("first", "second"):
        place = tmp_path / word / "model"  # the same name, as the hub's `main` of two repositories
        shutil.copytree(released, place)
        with (place / "modeling_fused.py").open("a") as file:
            file.write(f"MARK = {word!r}\n")
        with (place / "schedule_base.py").open("a") as file:
            file.write(f"Fused.MARK = {word!r}\n")
        places.append(place)
    found, again = loaded_elsewhere(tmp_path, TWO, *places, places[0])
    assert [word for word, _, _ in found] == [word for _, _, word in found] == ["first", "second", "first"]
    assert len({module for _, module, _ in found}) == 2
    assert again == "first"  # what a stranger saves again loads again, with all of its code
    assert {path.name for path in released.glob("*.py")} == {path.name for path in (tmp_path / "again").glob("*.py")}


OLD = """
import transformers
transformers.__version__ = "4.57.6"
from transformers import AutoModelForImageTextToText
try:
    AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(json.dumps(str(error)))
"""


def test_a_transformers_that_is_too_old_is_named_with_the_one_that_is_needed(released, tmp_path):
    found = loaded_elsewhere(tmp_path, OLD, released)
    assert found.startswith("this model needs transformers >= 5.22, got 4.57.6: pip install")
    assert '"transformers[serving]>=5.22' in (ROOT / "pyproject.toml").read_text()


def test_a_fused_llava_answers_over_transformers_serve(released, llava, tmp_path):
    values = torch.randint(0, 256, (30, 50, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    image = Image.fromarray(values.numpy())
    with serving(tmp_path, released) as address:
        said = ask(address, released, image, QUESTION, tokens=6)
    assert said == answer(llava, image, QUESTION)


def test_the_repository_holds_what_the_folder_holds(released):
    files = {path.name: path.read_bytes() for path in released.iterdir()}
    assert {name: content for name, content in Hub.repos[REPO].items() if name != ".gitattributes"} == files


def test_a_push_replaces_files_only_when_forced(released, online):
    Hub.repos["someone/used"] = {".gitattributes": b"", "old.bin": b"old"}
    with pytest.raises(InputError, match=r"someone/used holds 1 files already, old\.bin among them.*--force"):
        release.check_target("someone/used", force=False)
    release.check_target("someone/used", force=True)
    release.push(released, "someone/used", force=True)
    assert set(Hub.repos["someone/used"]) == {path.name for path in released.iterdir()} | {".gitattributes"}
    Hub.repos["someone/empty"] = {".gitattributes": b""}
    release.check_target("someone/empty", force=False)


def test_what_keeps_a_push_from_working_is_said_first(online, monkeypatch):
    for name in ("no-org", "a/b/c", "some one/x"):
        with pytest.raises(InputError, match="expected ORG/NAME"):
            release.check_target(name, force=False)
    monkeypatch.setattr(Hub, "refused", True)
    with pytest.raises(InputError, match="expected a token that may write there"):
        release.check_target(REPO, force=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ReleaseError, match=r"hub at http://127\.0\.0\.1:9 cannot be reached"):
        release.check_target(REPO, force=False)
    with pytest.raises(ReleaseError, match="is whole, `hf upload someone/tiny-fused"):
        release.push(ROOT / "data", REPO, force=False)
    monkeypatch.setattr(release, "get_token", lambda: None)
    with pytest.raises(InputError, match="no token of the hub"):
        release.check_target(REPO, force=False)


def test_a_release_that_differs_never_looks_done(llava, tmp_path, monkeypatch, capsys):
    """One weight changes between writing and proof, and the checksums with it: the fresh process must notice."""

    def spoil(folder):
        shard = sorted(folder.glob("*.safetensors"))[-1]
        weights = load_file(shard)
        name = next(name for name in weights if "down_proj" in name)
        save_file({**weights, name: -weights[name]}, shard, metadata={"format": "pt"})
        release_proof.write_sums(folder)

    monkeypatch.setattr(release, "write_sums", spoil)
    (tmp_path / "out").mkdir()
    assert release.main([str(llava), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("the release in a fresh process:")
    assert [*tmp_path.iterdir()] == [tmp_path / "out"]
    assert not [*(tmp_path / "out").iterdir()]


def test_the_proof_looks_at_everything(released, monkeypatch, tmp_path):
    image = Image.new("RGB", (8, 8))
    expected = {
        "input_ids": torch.tensor([[1, 2]]),
        "tokens": torch.tensor([[3]]),
        "pixel_values": torch.ones(1, 3, 8, 8),
        "logits": torch.ones(1, 2, 9),
    }

    def prove(folder=released, **found):
        monkeypatch.setattr(release_proof, "ask_fresh_process", lambda *_: [expected | found])
        release_proof.prove(release_proof.Released(folder, expected, image, plain=False))

    prove()
    prove(logits=expected["logits"] + 1e-6)
    for part, tensor in expected.items():
        with pytest.raises(ReleaseError, match=part):
            prove(**{part: tensor + 1})
        with pytest.raises(ReleaseError, match=part):
            prove(**{part: tensor[..., :1].repeat(1, *[5] * (tensor.dim() - 1))})
    with pytest.raises(ReleaseError, match="logits"):
        prove(logits=expected["logits"] * torch.nan)
    for spoil in (lambda f: (f / "stage_plan.py").write_text("# other"), lambda f: (f / "more.txt").write_text("x")):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(released, tmp_path / "copy")
        spoil(tmp_path / "copy")
        with pytest.raises(ReleaseError, match="is not what SHA256SUMS says"):
            prove(tmp_path / "copy")


def test_code_that_does_not_load_alone_is_refused(released, tmp_path):
    shutil.copytree(released, tmp_path / "copy")
    with (tmp_path / "copy/stage_plan.py").open("a") as file:
        file.write("import models.stage_plan\n")
    with pytest.raises(ReleaseError, match=r"does not work in a fresh process: .*models"):
        release_proof.prove(release_proof.Released(tmp_path / "copy", {}, Image.new("RGB", (8, 8)), plain=False))


def test_only_a_release_is_replaced(released, llava, quickstart, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(release, "write_release", lambda partial, *_: (partial / "SHA256SUMS").write_text(""))
    shutil.copytree(released, tmp_path / "old")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name, options in (("old", []), ("mine", []), ("mine", ["--force"]), ("file", ["--force"])):
        assert release.main([str(llava), "--out", str(tmp_path / name), *options]) == 2
        assert capsys.readouterr().err.startswith(f"--out: {tmp_path / name} is ")
    assert (tmp_path / "mine/photo.png").read_text() == (tmp_path / "file").read_text() == "dear"
    assert release.main([str(llava), "--out", str(tmp_path / "old"), "--force"]) == 0
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["SHA256SUMS"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "old"]
    assert release.main([str(llava), "--out", str(tmp_path / "file/under")]) == 2


def test_what_the_user_got_wrong_is_one_line_and_exit_2(llava, quickstart, tmp_path, capsys):
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped/recipe.yaml").write_text("name: x")
    shutil.copytree(tmp_path / "stopped", tmp_path / "saved")
    shutil.copytree(tmp_path / "stopped", tmp_path / "two words")
    (tmp_path / "release").mkdir()
    for name in (SUMS, "recipe.yaml"):
        (tmp_path / "release" / name).write_text("")
    for step in (5, 10):
        (tmp_path / f"saved/checkpoint-{step}").mkdir()
        mark_complete(tmp_path / f"saved/checkpoint-{step}", Progress(step=step, ranks=8))
    shutil.copytree(llava, tmp_path / "cut")
    (tmp_path / "cut/final/model.safetensors").unlink()
    cases = [
        ([tmp_path], "expected a run folder, which holds final/run.json"),
        ([tmp_path / "stopped"], "without final/.*deepspeed train/run.py .*recipe.yaml` finishes it"),
        ([tmp_path / "two words"], "deepspeed train/run.py '.*/two words/recipe.yaml'` finishes it"),
        ([llava / "final"], f"got a final/ folder, expected the run folder, {llava}$"),
        ([tmp_path / "release"], "got a release, expected the run folder that it was made from"),
        ([tmp_path / "saved/checkpoint-5"], f"got a folder of a run, expected the run folder, {tmp_path}/saved$"),
        ([tmp_path / "saved/nothing"], "got no run, expected a run folder"),
        ([tmp_path / ("x" * 300)], "RUN_DIR: got .*x [(]File name too long[)], expected the path of a folder"),
        ([llava, "--out", tmp_path / ("x" * 300)], "--out: got .*x [(]File name too long[)], expected the path of"),
        ([tmp_path / "saved"], "checkpoint-10, .*train.max_steps=10 at that checkpoint, on 8 ranks as before"),
        ([tmp_path / "cut"], "final: cannot be loaded"),
        ([llava, "--max-shard-size", "big"], "got 'big', expected a size"),
        ([llava, "--max-shard-size", "0GB"], "got '0GB', expected a size"),
        ([llava, "--schedule", "nope"], "--schedule: schedule: got 'nope', expected one of trained, dense"),
        ([llava, "--schedule", '{"name": "vtw", "layer": 99}'], "--schedule: VTW.layer: got 99"),
        ([llava, "--schedule", '{"name": "vtw", "nope": 1}'], "--schedule: schedule vtw: got setting 'nope'"),
        ([llava, "--schedule", "cdpruner"], "--schedule: schedule CDPruner: got a checkpoint without the text tower"),
        ([llava, "--schedule", '{"layer": 1}'], "--schedule: schedule: got None"),
        ([llava, "--schedule", "{"], "--schedule: got '{'"),
        ([llava, "--comparison", tmp_path], "expected a folder that eval.compare wrote"),
        ([quickstart, "--comparison", llava / "table"], "got runs llava, other, expected one with quickstart"),
    ]
    for arguments, told in cases:
        assert release.main(["--out", str(tmp_path / "out"), *map(str, arguments)]) == 2, arguments
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert re.search(told, lines[0])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.slow
def test_a_lora_run_is_released_whole(tmp_path, capsys):
    """A real run of two steps: final/ holds merged weights, and the release what final/ holds."""
    output = tmp_path / "lora"
    options = ["align=null", f"output={output}", "train.lora={r: 2, alpha: 64, parts: [language_model, projector]}"]
    options += ["model.stages={enter: 1, exit: 3, keep: {1: 0.5}, select: learned}"]  # whose scorer has no adapters
    options += ["train.max_steps=2", "train.max_seconds=null", "train.precision=fp32"]
    turns = [{"from": "human", "value": "what color?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns}] * 4))
    options += [f"data.files=[{tmp_path / 'rows.json'}]"]
    options += ["train.global_batch=2", "train.per_device_batch=2"]
    done = subprocess.run(
        [sys.executable, "train/run.py", "recipes/quickstart.yaml", *options],
        cwd=ROOT,
        env={**os.environ, "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    asked = [{"role": "user", "content": [{"type": "text", "text": "what color?"}]}]
    assert "what color?" in AutoProcessor.from_pretrained(output / "final").apply_chat_template(asked)
    assert release.main([str(output), "--out", str(tmp_path / "out")]) == 0
    start, weights = load_file(output / "init/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert start.keys() == weights.keys()
    assert any("q_proj" in name and not torch.equal(weights[name], start[name]) for name in weights)
    assert sum("token_scorer" in name for name in weights) == 4
    assert "LoRA, r 2, alpha 64; merged" in (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["train"]["lora"]["r"] == 2
