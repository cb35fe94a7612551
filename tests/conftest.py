"""Shared fixtures: tiny random models of every decoder family, batches, recipes and runs; no downloads."""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as launch.sh does, before torch is loaded

import pytest
import torch
from PIL import Image
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
from recipes.schema import Recipe
from tests.starts import LAUNCHED

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
    """Returns the embeddings of a batch with image features merged in, and the mask of visual tokens."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    visual = batch["input_ids"] == IMAGE
    if batch["pixel_values"] is not None:
        features = torch.cat(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
        embeds = embeds.masked_scatter(visual[..., None], features)
    return embeds, visual


def write_run(folder, stages):
    """Writes the run folder of a finished quickstart, with random weights; returns it."""
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
        lines.append({"step": 3, "seconds": 1.5, "eval_loss": 1.25})
        (phase / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(autouse=True)
def reset_launch_env():
    """Removes the environment variables that training in this process sets, before the next test."""
    yield
    for name in LAUNCHED:
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory):
    """A run folder of the quickstart's shape, image live in layers 2 to 4 of 8; nothing may write to it."""
    return write_run(tmp_path_factory.mktemp("runs") / "fused", {"enter": 2, "exit": 5})


@pytest.fixture(scope="module")
def tiny_recipe(tmp_path_factory):
    """Returns a function that makes a recipe: a 4-layer LLaVA of width 32, two files of 12 rows, half with an image."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(QUICKSTART, folder / "config")
    config = json.loads((QUICKSTART / "config.json").read_text())
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config["text_config"] |= {**narrow, "num_hidden_layers": 4, "num_key_value_heads": 2}
    config["vision_config"] |= {**narrow, "num_hidden_layers": 2, "projection_dim": 32}
    (folder / "config/config.json").write_text(json.dumps(config))
    for name in ("a", "b"):
        rows = []
        for number in range(12):
            answer = ["red", "yes", "blue", "no"][number % 4]
            turns = [{"from": "human", "value": "what color is the shape?"}, {"from": "gpt", "value": answer}]
            rows.append({"conversations": turns * (1 + number % 3)})
            if number % 2:
                Image.new("RGB", (64, 64), (20 * number, 200, 90)).save(folder / f"{name}{number}.png")
                first = {"from": "human", "value": "<image>\nwhat color is the shape?"}
                rows[-1] = {"image": f"{name}{number}.png", "conversations": [first, *rows[-1]["conversations"][1:]]}
        (folder / f"{name}.json").write_text(json.dumps(rows))

    def make(output="run", **train):
        data = {"files": [str(folder / "a.json"), str(folder / "b.json")], "images": str(folder), "workers": 0}
        data |= {"format": "chat_template", "image_aspect": "processor", "group_by_length": False}
        rates = {"projector": 2e-3, "vision_tower": 1e-3, "language_model": 1e-3}
        defaults = {"deepspeed": "recipes/deepspeed/zero2.json", "learning_rate": rates, "precision": "fp32"}
        defaults |= {"global_batch": 4, "per_device_batch": 2, "max_steps": 4, "gradient_checkpointing": False}
        model = {"config": str(folder / "config"), "stages": {"enter": 1, "exit": 3}}
        return {"name": "t", "output": str(folder / output), "model": model, "data": data, "train": defaults | train}

    return make


@pytest.fixture
def untrained(tmp_path_factory, monkeypatch):
    """Works where this checkout's recipes are, and none of the runs that its user has trained."""
    folder = tmp_path_factory.mktemp("untrained")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(folder)


@pytest.fixture
def train_here(monkeypatch):
    """Returns a function that trains a recipe (a dict) in this process, on one rank; returns its run folder.

    `stop_in` is the step in which a SIGTERM is simulated.
    """
    from deepspeed.utils import groups

    from train import distributed
    from train.loop import run_phase
    from train.stop import StopRequest

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in LAUNCHED:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    class StopLater(StopRequest):
        def __init__(self, step):
            super().__init__()
            self.step, self.checks = step, 0

        def is_requested(self):  # once before the first step, then once a step
            self.checks += 1
            if self.step is not None and self.checks > self.step:
                self.reason = "SIGTERM"
            return super().is_requested()

    def train(recipe, *, stop_in=None):
        distributed.setup_env()
        groups._WORLD_GROUP = None  # else DeepSpeed reuses the group of an earlier test
        run_phase(Recipe.model_validate(recipe), 0, StopLater(stop_in))
        return Path(recipe["output"])

    return train


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
