"""What a training learns of its data as it goes: bad rows, the loss of each source, where generation stops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoProcessor
from transformers.loss.loss_utils import ForCausalLMLoss

from data.config import DataConfig
from data.dataset import Collator, ConversationDataset
from data.rows import Fault
from models import FusedLlavaConfig, FusedLlavaForConditionalGeneration
from train.final import set_stop_tokens
from train.metrics import DataWatch

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes/configs/quickstart"
FAULTS = [Fault("a.json", number, "image 'x.png' is missing") for number in range(3)]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


def watch(allowed=0, skipped=0, files=("a.json", "b.json")):
    return DataWatch(DataConfig(files=list(files), format="plain", max_bad_rows=allowed), skipped)


def batch(labels, sources=None, **more):
    given = {"labels": torch.tensor(labels), **more}
    return given if sources is None else {**given, "sources": torch.tensor(sources)}


def test_what_is_not_the_models_is_taken_out_and_each_fault_is_said_once(capsys):
    seen = watch()
    for _ in range(2):
        inputs = batch([[1, 2]], [0], faults=FAULTS[:2])
        seen.take(inputs)
        assert inputs.keys() == {"labels"}
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"rank 0: {fault}; passed over" for fault in FAULTS[:2]]
    assert seen.all_faults() == FAULTS[:2]


@pytest.mark.parametrize(("allowed", "skipped", "counts", "is_too_many"), [
    (0, 0, [0, 0], False),
    (0, 0, [0, 1], True),
    (3, 0, [1, 2], False),
    (3, 1, [1, 2], True),
    (3, 3, [0, 0], False),
])  # fmt: skip
def test_rows_passed_over_on_all_ranks_count_against_max_bad_rows(allowed, skipped, counts, is_too_many):
    reason = watch(allowed, skipped).excess(counts)
    assert bool(reason) == is_too_many
    if is_too_many:
        expected = f"expected up to {allowed - skipped} (data.max_bad_rows)"
        assert reason == f"data: got {sum(counts)} unreadable rows, named above; {expected}"


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
def test_the_loss_stays_transformers_and_adds_up_for_each_source(items):
    seen, model = watch(), torch.nn.Module()
    seen.watch_loss(model)
    logits = torch.randn(5, 11, requires_grad=True)
    targets = torch.tensor([1, 2, 3, 4, 5])
    seen.take(batch([[-100, 1, 2, -100], [-100, 3, -100, 4], [-100, -100, -100, 5]], [1, 0, 1]))
    arguments = {"labels": targets, "shift_labels": targets, "vocab_size": 11, "num_items_in_batch": items}
    loss = model.loss_function(logits=logits, **arguments)
    assert torch.allclose(loss, ForCausalLMLoss(logits=logits, **arguments))
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    report = seen.report()
    assert report["loss_a"] == pytest.approx(losses[2:4].mean().item())
    assert report["loss_b"] == pytest.approx(losses[[0, 1, 4]].mean().item())
    assert seen.report() == {}


def test_a_single_source_keeps_the_models_loss():
    seen, model = watch(files=("a.json",)), torch.nn.Module()
    seen.watch_loss(model)
    assert not hasattr(model, "loss_function")
    assert seen.report() == {}


def test_a_trained_model_stops_where_its_template_ends_an_answer(tmp_path):
    """A base model's tokenizer with chat data: the template ends turns by a token that is not its eos."""
    processor = AutoProcessor.from_pretrained(QUICKSTART)
    tokens = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(tokens))
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_end|>"]})
    processor.chat_template = (
        "{% for m in messages %}{{ 'is ' if m['role'] == 'user' else '' }}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    (tmp_path / "rows.json").write_text(json.dumps([
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for question, answer in (("it red ?", "no"), ("it blue ?", "yes"))
    ]))  # fmt: skip
    given = DataConfig(files=[str(tmp_path / "rows.json")], format="chat_template", workers=0)
    data = ConversationDataset(given, processor)
    fields = AutoConfig.from_pretrained(QUICKSTART).to_dict()
    fields.pop("model_type")
    fields["text_config"] |= {"vocab_size": len(processor.tokenizer), "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = FusedLlavaForConditionalGeneration(FusedLlavaConfig(**fields))
    inputs = Collator(0)([data[0], data[1]])
    inputs.pop("sources")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompt = inputs["input_ids"][:1, : int((inputs["labels"][0] != -100).nonzero()[0])]
    asked = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    before = model.eval().generate(**asked)[0, prompt.shape[1] :].tolist()
    assert end in before
    assert len(before) == 12  # it has said its end mark, and goes on
    set_stop_tokens(model, data.encoder.stop_ids)
    assert model.generation_config.eos_token_id == [end, processor.tokenizer.eos_token_id]
    model.save_pretrained(tmp_path / "final")
    loaded = FusedLlavaForConditionalGeneration.from_pretrained(tmp_path / "final").eval()
    assert loaded.generate(**asked)[0, prompt.shape[1] :].tolist() == before[: before.index(end) + 1]


@pytest.fixture
def recipe(tmp_path):
    """A tiny recipe of two files with 16 rows each."""
    config = json.loads((QUICKSTART / "config.json").read_text())
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config["text_config"] |= {**narrow, "num_hidden_layers": 2, "num_key_value_heads": 2}
    config["vision_config"] |= {**narrow, "projection_dim": 32}
    (tmp_path / "config").mkdir()
    for file in QUICKSTART.iterdir():
        (tmp_path / "config" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config/config.json").write_text(json.dumps(config))
    rows = []
    for number in range(16):
        Image.new("RGB", (64, 64), (10 * number, 100, 0)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat color ?"}, {"from": "gpt", "value": "red"}]
        rows.append({"image": f"{number}.png", "conversations": turns})
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    data = {"images": str(tmp_path), "format": "chat_template", "image_aspect": "processor", "workers": 1}
    data |= {"files": [str(tmp_path / "a.json"), str(tmp_path / "b.json")], "group_by_length": False}
    rates = {"projector": 1e-3, "vision_tower": None, "language_model": 1e-3}
    train = {"deepspeed": "recipes/deepspeed/zero2.json", "learning_rate": rates, "precision": "fp32"}
    train |= {"global_batch": 4, "per_device_batch": 2, "gradient_checkpointing": False}
    model = {"config": str(tmp_path / "config"), "stages": {"enter": 1, "exit": 2}}
    return {"name": "t", "output": str(tmp_path / "run"), "model": model, "data": data, "train": train}


def run(recipe, folder, *options):
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "train/run.py", str(folder / "recipe.yaml"), *options]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["HF_DATASETS_CACHE"] = str(folder / "cache")
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def break_after_the_check(recipe, folder, monkeypatch):
    """Fills the caches as a run does, then breaks an image."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    processor = AutoProcessor.from_pretrained(recipe["model"]["config"])
    ConversationDataset(DataConfig.model_validate(recipe["data"]), processor)
    file = folder / "3.png"
    file.write_bytes(file.read_bytes()[:-40])


def test_a_row_that_breaks_while_training_stops_the_run_unless_the_recipe_allows_it(recipe, tmp_path, monkeypatch):
    break_after_the_check(recipe, tmp_path, monkeypatch)
    stopped = run(recipe, tmp_path)
    assert stopped.returncode == 1
    assert "Traceback" not in stopped.stderr
    (named,) = [line for line in stopped.stderr.splitlines() if line.startswith("rank 0: ")]
    assert named.endswith("passed over")
    assert ".json:3: image '3.png' is truncated or broken" in named
    last = stopped.stderr.splitlines()[-1]
    assert "unreadable rows, such as" in last
    assert "expected up to 0 (data.max_bad_rows); last good checkpoint: " in last
    checkpoint = Path(last.rpartition(": ")[2])
    assert (checkpoint / "config.json").is_file()

    allowed = run(recipe, tmp_path, "data.max_bad_rows=2")
    assert allowed.returncode == 0, allowed.stderr
    assert checkpoint.name in allowed.stdout  # it goes on from there
    figures = json.loads((tmp_path / "run/final/run.json").read_text())
    skipped = [(Path(fault["file"]).name, fault["row"]) for fault in figures["skipped"]]
    assert sorted(skipped) == [("a.json", 3), ("b.json", 3)]
    assert figures["sources"] == {"a": 16, "b": 16}
    lines = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert {"loss_a", "loss_b"} <= {key for line in lines for key in line}
