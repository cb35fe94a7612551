"""Tiny random models of every supported decoder family; nothing is downloaded."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as launch.sh does, before torch is loaded

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from models import FusedLlavaConfig, FusedLlavaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes/configs/quickstart"
LAYERS, WIDTH, VOCABULARY, IMAGE, PAD = 6, 32, 60, 50, 59
VISUAL = 4  # visual tokens of one 8 x 8 image in patches of 4

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large, so that a wrong mask or position shows
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, head_dim=8, sliding_window=7),
    "qwen2": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=3),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "smollm3": lambda: SmolLM3Config(**SHAPE, no_rope_layer_interval=3),
}


def merged_inputs(model, batch):
    """Returns the embeddings of a batch with its image features in their places, and where these are."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    visual = batch["input_ids"] == IMAGE
    if batch["pixel_values"] is not None:
        features = torch.cat(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
        embeds = embeds.masked_scatter(visual[..., None], features)
    return embeds, visual


def write_run(folder, stages):
    """Writes what a run of the quickstart leaves behind, with random weights; returns its folder."""
    fields = AutoConfig.from_pretrained(QUICKSTART).to_dict()
    fields.pop("model_type")
    torch.manual_seed(0)
    model = FusedLlavaForConditionalGeneration(FusedLlavaConfig(**fields, stages=stages))
    model.save_pretrained(folder / "final")
    AutoProcessor.from_pretrained(QUICKSTART).save_pretrained(folder / "final")
    for phase in (folder / "align", folder):
        (phase / "final").mkdir(parents=True, exist_ok=True)
        (phase / "final/run.json").write_text(json.dumps({"seconds": 12.5, "steps": 15, "samples": 50}))
        lines = [{"step": step, "seconds": step / 2, "loss": 3 / step} for step in (1, 2, 3)]
        (phase / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory):
    """A run folder of the quickstart's shape, image live in layers 2 to 4 of 8; nothing may write to it."""
    return write_run(tmp_path_factory.mktemp("runs") / "fused", {"enter": 2, "exit": 5})


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="session")
def make_config():
    def make(family="llama", stages=None, attention="sdpa"):
        text = FAMILIES[family]()
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        return FusedLlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=IMAGE,
            image_seq_length=VISUAL,
            vision_feature_layer=-1,
            stages=stages,
            attn_implementation=attention,
        )

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    def make(family="llama", stages=None, attention="sdpa", seed=0):
        torch.manual_seed(seed)
        return FusedLlavaForConditionalGeneration(make_config(family, stages, attention)).eval()

    return make


@pytest.fixture(scope="session")
def make_batch():
    """Returns a function from text layouts to a padded batch: 'ttIttt' is two text tokens, an image, three more."""

    def make(*layouts, side="right", seed=0):
        random = torch.Generator().manual_seed(seed)
        rows, images = [], 0
        for layout in layouts:
            row = []
            for mark in layout:
                token = int(torch.randint(3, IMAGE, (1,), generator=random))
                row += [IMAGE] * VISUAL if mark == "I" else [token]
                images += mark == "I"
            rows.append(row)
        size = max(map(len, rows))
        ids = torch.full((len(rows), size), PAD)
        mask = torch.zeros(len(rows), size, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(size - len(row), size)
            ids[number, place] = torch.tensor(row)
            mask[number, place] = 1
        pixels = torch.randn(images, 3, 8, 8, generator=random) if images else None
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}

    return make
