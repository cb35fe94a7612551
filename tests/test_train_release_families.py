"""Every family after its training: adapters merged, released, loaded elsewhere, served.

A family's run has adapters on every part that can have them. All releases are proved in one fresh process.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers.utils import is_torchvision_available

from data.dataset import Collator
from eval.checkpoint import Checkpoint
from eval.demo import respond
from models import FusedAutoModel
from recipes.resolved import dump_recipe
from recipes.schema import load_recipe
from tests.serving import ask, serving
from tests.tiny_processors import PROCESSORS, require
from tests.tiny_runs import write_checkpoint, write_recipe, write_rows
from train.checks import check_run
from train.final import set_stop_tokens
from train.parameters import PARTS, add_adapters, freeze, merged, part_of
from train.release import release
from train.release.processor import save_processor
from train.release.proof import prove
from train.samples import read_samples
from train.weights import build_initial, load_checkpoint, read_processor, save_model

RATES = dict.fromkeys(PARTS, 1e-2)
WITHOUT_LINEAR = {"gemma3": "projector"}  # its projector is one matrix, no Linear layer


class Runs:
    """Trains a family's adapters for three steps, and writes the run that this leaves behind; once for each family."""

    def __init__(self, make_folder):
        self.make_folder, self.made = make_folder, {}

    def __call__(self, family):
        require(family)
        if family not in self.made:
            self.made[family] = self.train(family, self.make_folder(family))
        return self.made[family]

    def train(self, family, folder):
        write_checkpoint(folder / "checkpoint", family)
        write_rows(folder)
        parts = [part for part in PARTS if part != WITHOUT_LINEAR.get(family)]
        lora = {"r": 2, "alpha": 8, "dropout": 0.0, "parts": parts}
        recipe = load_recipe(write_recipe(folder, train__lora=lora, train__learning_rate=RATES))
        check_run(recipe, 1)
        [phase] = recipe.phases
        build_initial(recipe, folder / "init")
        model = add_adapters(load_checkpoint(folder / "init", dtype=torch.float32), phase.train.lora)
        freeze(model, phase.train)
        learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        before = {name: weight.detach().clone() for name, weight in learning.items()}
        optimizer = torch.optim.AdamW(learning.values(), lr=1e-2, weight_decay=0.0)
        processor = read_processor(recipe.model)
        dataset = read_samples(phase, processor)
        batch = Collator(processor.tokenizer.pad_token_id)([dataset[number] for number in range(3)])
        del batch["sources"]
        losses = []
        for _ in range(3):
            loss = model.train()(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        changed = {name for name, weight in learning.items() if (weight != before[name]).any()}
        learned = {name: weight.detach() for name, weight in learning.items()}
        whole = merged(learned, phase.train.lora, initial=folder / "init", dtype=torch.float32)
        final = folder / family / "final"  # a run folder's name is its name in tables
        set_stop_tokens(whole, dataset.encoder.stop_ids)
        save_model(whole, final)
        save_processor(processor, phase.data, final)
        (final / "recipe.yaml").write_text(dump_recipe(recipe))
        (final / "run.json").write_text(json.dumps({"phase": "tune", "steps": 3}))
        with torch.no_grad():
            adapted = model.eval()(**batch).loss
        return {
            "run": final.parent, "batch": batch, "losses": losses, "changed": changed, "learning": set(learned),
            "adapted": adapted, "model": model, "parts": parts,
        }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp)


@pytest.mark.parametrize("family", sorted(PROCESSORS))
def test_adapters_learn_and_the_merged_weights_are_theirs(runs, family):
    done = runs(family)
    assert done["losses"][2] < done["losses"][0]
    assert {part_of(done["model"], name) for name in done["changed"]} == set(PARTS)
    adapted = {part_of(done["model"], name) for name in done["changed"] if "lora_" in name}
    assert adapted == set(done["parts"])
    assert all("lora_" in name or part_of(done["model"], name) not in adapted for name in done["learning"])
    loaded, report = FusedAutoModel.from_pretrained(done["run"] / "final", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not any("lora" in name for name in loaded.state_dict())
    with torch.no_grad():
        found = loaded.eval()(**done["batch"]).loss
        start = FusedAutoModel.from_pretrained(done["run"].parent / "init").eval()(**done["batch"]).loss
    torch.testing.assert_close(found, done["adapted"], rtol=1e-4, atol=1e-4)
    assert abs(start - found) > 1e-2


def here():
    """Returns the families whose processors are here."""
    return [family for family in sorted(PROCESSORS) if _is_here(family)]


def _is_here(family):
    try:
        require(family)
    except pytest.skip.Exception:
        return False
    return True


@pytest.fixture(scope="module")
def released(runs, tmp_path_factory):
    """The releases of all families by name, each fused and dense, and what each has to give."""
    folder, claims, given = tmp_path_factory.mktemp("released"), [], {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(release, "prove", claims.append)
        for family in here():
            run = runs(family)["run"]
            for name, source in ((family, run), (f"{family}-dense", dense(run))):
                given[name] = folder / name
                assert release.main([str(source), "--out", str(given[name])]) == 0
    return given, [replace(claim, folder=out) for claim, out in zip(claims, given.values(), strict=True)]


def dense(run):
    """Returns a copy of a run without a stage plan."""
    copy = run.with_name(f"{run.name}-dense")
    shutil.copytree(run, copy)
    config = copy / "final/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"stages": None}))
    return copy


@pytest.mark.slow
def test_every_release_loads_where_this_repository_is_not(released):
    given, claims = released
    prove(*claims)
    for name, folder in given.items():
        fields = json.loads((folder / "config.json").read_text())
        is_plain = name.endswith("-dense") and name != "mobilevlm-dense"  # which transformers does not have
        assert fields["model_type"] == ("" if is_plain else "fused_") + name.removesuffix("-dense")
        assert list(folder.glob("*.py")) == [] if is_plain else (folder / "modeling_fused.py").is_file()
        assert not (is_plain and {"stages", "plans", "schedule", "auto_map"} & fields.keys())


@pytest.mark.slow
def test_releases_answer_over_transformers_serve(runs, released, tmp_path):
    """One server, asked for each release in turn; a processor with a part for videos loads where torchvision is."""
    given = {name: folder for name, folder in released[0].items() if name in PROCESSORS and _is_servable(folder)}
    image = Image.new("RGB", (20, 10), "red")
    with serving(tmp_path) as address:
        said = {name: ask(address, folder, image, "what is it?", tokens=4) for name, folder in given.items()}
    for name, text in said.items():
        checkpoint = Checkpoint.find(given[name])
        model, processor = checkpoint.load()
        response = respond(model, checkpoint.prompt_encoder(processor), image, "what is it?", "trained", 4)
        assert text.strip() == response.answer.strip(), name
    assert {"llava", "idefics3", "gemma3", "mobilevlm"} <= said.keys()


def _is_servable(folder):
    has_videos = "video_processor" in json.loads((folder / "processor_config.json").read_text())
    return is_torchvision_available() or not has_videos
