"""CLIP's text tower beside a checkpoint, for CDPruner; a tiny random CLIP, nothing is downloaded."""

import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPModel

from eval import measure
from eval.arguments import UsageError
from eval.checkpoint import Checkpoint
from eval.compare import main
from eval.prompts import VqaPrompt
from eval.text_tower import TextTower, placed
from tests.conftest import QUICKSTART

LENGTH = 12  # tokens that the text tower reads at once


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("clip"), AutoTokenizer.from_pretrained(QUICKSTART)
    vision = AutoConfig.from_pretrained(QUICKSTART).vision_config.to_dict()
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompt_encoder(quickstart_run, clip):
    checkpoint = Checkpoint.find(quickstart_run)
    found = checkpoint.prompt_encoder(checkpoint.processor())
    found.text_tower = TextTower(str(clip))
    return found


def test_relevance_is_the_cosine_of_patch_and_question(clip, prompt_encoder):
    model, pixels = CLIPModel.from_pretrained(clip).eval(), torch.randn(2, 3, 64, 64)
    ids = torch.tensor(AutoTokenizer.from_pretrained(clip)("is it red?")["input_ids"])[None]
    assert ids.shape[1] <= LENGTH
    with torch.no_grad():
        found = prompt_encoder.text_tower.relevance(
            "is it red?\nAnswer the question using a single word or phrase.", pixels
        )
        text = model.text_projection(model.text_model(ids).pooler_output)[0]
        states = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        for image, patch in ((0, 0), (1, 63)):
            seen = model.visual_projection(model.vision_model.post_layernorm(states[image, 1 + patch]))
            torch.testing.assert_close(found[image, patch], torch.cosine_similarity(seen, text, dim=0))
    assert found.shape == (2, 64)


def test_a_long_question_is_read_in_parts(prompt_encoder):
    pixels = torch.randn(1, 3, 64, 64)
    long = prompt_encoder.text_tower.relevance(
        "what is the colour of the shape that is shown in this image here?", pixels
    )
    short = prompt_encoder.text_tower.relevance("what is the colour?", pixels)
    assert long.isfinite().all()
    assert not torch.allclose(long, short)


def test_each_visual_token_gets_its_images_value(prompt_encoder, quickstart_run):
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    batch = prompt_encoder.batch(
        [VqaPrompt("is it?", [red, blue]), VqaPrompt("what is the shape?", [blue]), VqaPrompt("hello", [])]
    )
    visual = batch["input_ids"] == Checkpoint.find(quickstart_run).config.image_token_id
    assert batch["relevance"].shape == batch["input_ids"].shape
    assert (batch["relevance"][~visual] == 0).all()
    alone = prompt_encoder.batch([VqaPrompt("is it?", [blue])])["relevance"]
    expected = alone[alone != 0]
    torch.testing.assert_close(batch["relevance"][0][visual[0]][64:], expected)
    with pytest.raises(UsageError, match="--text-tower: got 3 patches for 2 visual tokens"):
        placed([torch.zeros(1, 3)], torch.tensor([[7, 7, 1]]), 7)


def test_cdpruner_is_a_row_of_the_comparison(quickstart_run, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "added_memory", lambda calls, *_: dict.fromkeys(calls, 2**20))
    given = [str(quickstart_run), "--schedules", "cdpruner", "--limit", "2", "--out", str(tmp_path / "out")]
    assert main([*given, "--text-tower", str(clip)]) == 0
    row = next(row for row in json.loads((tmp_path / "out/table.json").read_text())["rows"] if row["run"] == "fused")
    assert (row["status"], row["settings"], row["visual_token_layers"]) == ("done", "tokens 64", 3 * 7)  # 7 of 64


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nothing", "expected the vision tower's CLIP checkpoint"),
        ("a LLaVA", "(model_type fused_llava), expected"),
        ({"projection_dim": 9}, "ignore_mismatched_sizes"),
        ({"text_config": {"num_hidden_layers": 2}}, "(no values for 16 weights, such as text_model.encoder.layers.1."),
        ({"text_config": {"num_hidden_layers": 0}}, "16 weights of layers that its config does not have"),
        ("cut", "expected the vision tower's CLIP checkpoint"),
    ],
)
def test_what_is_no_clip_with_all_weights_is_refused(quickstart_run, clip, tmp_path, change, said):
    folder = quickstart_run / "final" if change == "a LLaVA" else tmp_path / "clip"
    if change not in ("nothing", "a LLaVA"):
        shutil.copytree(clip, folder)
    if change == "cut":
        os.truncate(folder / "model.safetensors", 5000)
    if isinstance(change, dict):
        fields = json.loads((folder / "config.json").read_text())
        for key, value in change.items():
            fields[key] = {**fields[key], **value} if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=rf"^--text-tower: got {folder} .*{re.escape(said)}") as raised:
        TextTower(str(folder))
    assert len(str(raised.value).splitlines()) == 1
