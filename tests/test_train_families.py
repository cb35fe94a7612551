"""Every family trains from LLaVA rows with two images, one and none, through its processor."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.dataset import Collator
from data.processor import save_processor
from eval.checkpoint import Checkpoint
from eval.compare import main as compare
from eval.demo import respond
from eval.live import Loaded, live_visual, prompt_costs
from eval.prompts import VqaPrompt
from eval.stage_analysis.report import starting_recipe
from eval.stages import main as find_stages
from models import FusedAutoModel
from recipes.schema import RecipeError, load_recipe
from tests.starts import run
from tests.tiny_processors import PROCESSORS, require
from tests.tiny_runs import ROWS, STAGES, write_checkpoint, write_recipe, write_rows
from train.checks import check_run
from train.parameters import freeze, parameter_groups, part_of
from train.release.release import main as release
from train.samples import read_samples
from train.weights import build_initial, load_checkpoint, read_processor, save_model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Returns a function from a family to a folder with its checkpoint, rows and recipe."""
    folders = {}

    def prepare(family):
        require(family)
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            write_checkpoint(folders[family] / "checkpoint", family)
            write_rows(folders[family])
            write_recipe(folders[family])
        return folders[family]

    return prepare


@pytest.mark.parametrize("family", sorted(PROCESSORS))
def test_a_family_learns_from_rows_with_two_images_one_and_none(prepared, family):
    folder = prepared(family)
    recipe = load_recipe(folder / "recipe.yaml")
    check_run(recipe, 1)
    processor = read_processor(recipe.model)
    build_initial(recipe, folder / "init")
    model = load_checkpoint(folder / "init", dtype=torch.float32)
    [phase] = recipe.phases
    freeze(model, phase.train)
    dataset = read_samples(phase, processor)
    assert [len(dataset[number]["input_ids"]) for number in range(3)] == dataset.lengths
    assert all(sample["labels"].max() >= 0 for sample in map(dataset.__getitem__, range(3)))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, phase.train.learning_rate, decayed=[], weight_decay=0.0), betas=(0.9, 0.95)
    )
    collate, losses = Collator(processor.tokenizer.pad_token_id), []
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for _ in range(3):
        batch = collate([dataset[number] for number in range(3)])
        del batch["sources"]
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(np.isfinite(losses))
    assert losses[2] < losses[0]
    changed = {part_of(model, name) for name, weight in model.named_parameters() if (weight != before[name]).any()}
    assert changed == {"projector", "language_model"}
    with torch.no_grad():
        alone = collate([dataset[2]])
        del alone["sources"]
        assert torch.isfinite(model(**alone).loss)  # a batch without an image
    save_model(model, folder / "saved")
    loaded, report = FusedAutoModel.from_pretrained(folder / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).loss, model.eval()(**batch).loss)
    save_processor(processor, folder / "saved")
    answers_are_compared(Checkpoint.find(folder / "saved"), Image.open(folder / "a.png"))


def answers_are_compared(checkpoint, image):
    """Asks as eval.compare, eval.live and eval.demo do, under the trained plan and under pruners within it."""
    start = starting_recipe(checkpoint, "some/model")
    is_llava = checkpoint.family == "llava"
    assert (start.align is not None, start.data.image_aspect) == (is_llava, "pad" if is_llava else "processor")
    model, processor = checkpoint.load()
    loaded = Loaded(checkpoint, model, checkpoint.prompt_encoder(processor), batch=2)
    asked = [VqaPrompt("what is it?", [image]), VqaPrompt("and two and two?")]
    inputs = loaded.prompt_encoder.batch(asked)
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    assert visual[0] > 0 == visual[1]
    for name in ("trained", "dense", "visipruner", "fastv"):
        schedule = model.resolve(name)
        with torch.inference_mode():
            alone = loaded.prompt_encoder.batch(asked[:1])
            both = model.generate(**inputs, schedule=schedule, max_new_tokens=2, do_sample=False)
            one = model.generate(**alone, schedule=schedule, max_new_tokens=2, do_sample=False)
        assert both[0, inputs["input_ids"].shape[1]] == one[0, alone["input_ids"].shape[1]]
        live = live_visual(model, inputs, schedule).sum(dim=2)
        assert live[:, 1].sum() == 0
        assert live[0, 0] == (visual[0] if name == "dense" else 0)
        assert live[STAGES["enter"], 0] == visual[0]
        costs = prompt_costs(loaded, schedule, asked)
        assert costs["prompts"] == 2
        assert (costs["visual_token_layers"] < costs["dense"]["visual_token_layers"]) is (name != "dense")
    shown = respond(model, loaded.prompt_encoder, image, "what is it?", "trained", 2)
    assert shown.dense_token_layers > shown.token_layers > 0


def test_a_checkpoint_whose_flags_of_tied_embeddings_disagree_is_one_line_that_names_the_key(tmp_path):
    write_checkpoint(tmp_path, "idefics3")
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["tie_word_embeddings"], fields["text_config"]["tie_word_embeddings"] = False, True
    (tmp_path / "config.json").write_text(json.dumps(fields))
    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("lm_head.weight"))]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="tie_word_embeddings: got false, but text_config's is true"):
        load_checkpoint(tmp_path, dtype=torch.float32)


def train(recipe, **more):
    done = run(recipe, "train.tracker=none", **more)
    assert done.returncode == 0, done.stdout + done.stderr


def losses_of_one_process(folder, recipe):
    """Returns the losses of plain AdamW steps over all rows at once."""
    [phase] = recipe.phases
    build_initial(recipe, folder / "init")
    model = load_checkpoint(folder / "init", dtype=torch.float32).train()
    freeze(model, phase.train)
    processor = read_processor(recipe.model)
    dataset, collate = read_samples(phase, processor), Collator(processor.tokenizer.pad_token_id)
    batch = collate([dataset[number] for number in range(len(dataset))])
    del batch["sources"]
    groups = parameter_groups(model, phase.train.learning_rate, decayed=[], weight_decay=0.0)
    optimizer, losses = torch.optim.AdamW(groups), []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([one for group in groups for one in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "choice"),
    [
        ("qwen3_vl", {}),
        ("internvl", {"keep": {2: 0.5, 3: 0.25}, "gradient": "straight_through"}),
        ("llava_onevision", {"keep": {1: 0.5, 3: 0.25}, "select": "learned"}),
    ],
)
def test_zero3_on_two_ranks_of_which_one_has_only_text_gives_the_losses_of_one(tmp_path, family, choice):
    write_checkpoint(tmp_path / "checkpoint", family)
    write_rows(tmp_path, [ROWS[0], ROWS[2]])
    recipe = write_recipe(
        tmp_path,
        train__deepspeed="recipes/deepspeed/zero3.json",
        train__global_batch=2,
        train__per_device_batch=1,
        train__scheduler="constant",
        train__warmup_ratio=0.0,
        train__learning_rate={"projector": 1e-3, "vision_tower": 1e-3, "language_model": 1e-3},
        model__stages=STAGES | choice,
    )
    expected = losses_of_one_process(tmp_path, load_recipe(recipe))
    train(recipe, ranks=2)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-4)
    assert expected[2] < expected[0]


@pytest.fixture(scope="module", params=["qwen3_vl", "internvl"])
def finished(request, tmp_path_factory):
    """A finished run of three steps."""
    folder = tmp_path_factory.mktemp(f"finished-{request.param}")
    write_checkpoint(folder / "checkpoint", request.param)
    write_rows(folder)
    train(write_recipe(folder))
    return folder / "run"


@pytest.mark.slow
def test_a_run_is_compared_and_its_stages_searched(finished, tmp_path):
    out = tmp_path / "compared"
    words = ["--schedules", "dense,visipruner", "--tasks", "easy_vqa", "--limit", "4"]
    assert compare([*words, "--out", str(out), str(finished)]) == 0
    cells = {path.parent.name: json.loads(path.read_text()) for path in out.glob("cells/*/*/easy_vqa.json")}
    assert {"dense", "visipruner"} <= cells.keys()
    assert all(cell["status"] == "done" and len(cell["samples"]) == 4 for cell in cells.values())
    assert cells["dense"]["costs"]["visual_token_layers"] > 0
    assert "easy_vqa" in (out / "table.md").read_text()
    searched = ["--limit", "4", "--tolerance", "50", "--batch", "2", "--out", str(tmp_path / "stages"), str(finished)]
    assert find_stages(searched) == 0
    record = json.loads((tmp_path / "stages/stages.json").read_text())
    assert record["checkpoint"] == finished.name


@pytest.mark.slow
def test_a_run_is_released_and_loads_where_this_repository_is_not(finished, tmp_path, capsys):
    assert release([str(finished), "--out", str(tmp_path / "released")]) == 0, capsys.readouterr().err
    assert "a fresh process without this repository gave the run's logits and answer" in capsys.readouterr().out
    fields = json.loads((tmp_path / "released/config.json").read_text())
    assert fields["stages"]["enter"] == STAGES["enter"]
    assert (tmp_path / "released/modeling_fused.py").is_file()
    assert "video_processor" in json.loads((tmp_path / "released/processor_config.json").read_text())
    assert "`torch`, `torchvision`" in (tmp_path / "released/README.md").read_text()
