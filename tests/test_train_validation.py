"""Validation while training: held-out figures, the best checkpoint, early stopping, on several ranks, after a stop."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from data.config import DataConfig
from data.dataset import Collator, ConversationDataset
from data.rows import DataError, Fault
from models import FusedLlavaConfig, FusedLlavaForConditionalGeneration
from recipes.schema import EvalSection, Recipe, RecipeError
from train.validation import Validation, rank_batches

SEEN = (
    "seconds",
    "tokens_per_second",
    "model_flops_per_second",
    "mfu",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
)


@pytest.fixture(scope="module")
def samples(tiny_recipe):
    config = DataConfig.model_validate(tiny_recipe()["data"])
    return ConversationDataset(config, AutoProcessor.from_pretrained(tiny_recipe()["model"]["config"]))


@pytest.fixture(scope="module")
def model(tiny_recipe):
    """A model that has learned two of the four answers."""
    fields, _ = FusedLlavaConfig.get_config_dict(tiny_recipe()["model"]["config"])
    fields.pop("model_type")
    torch.manual_seed(0)
    return FusedLlavaForConditionalGeneration(FusedLlavaConfig(**fields, stages={"enter": 1, "exit": 3}))


def test_held_out_samples_share_no_image_with_the_others(samples):
    rest, held_out = samples.split(0.25, seed=3)
    assert (len(rest), len(held_out)) == (18, 6)
    rows = [set(zip(part.source, part.rows["row"][:], strict=True)) for part in (rest, held_out)]
    assert not rows[0] & rows[1]
    images = [{names[0] for names in part.rows["images"][:] if names} for part in (rest, held_out)]
    assert images[1]
    assert not images[0] & images[1]
    assert samples.split(0.25, seed=3)[1].rows["row"][:] == held_out.rows["row"][:]
    assert samples.split(0.25, seed=4)[1].rows["row"][:] != held_out.rows["row"][:]
    one, _ = held_out.split(0.9, seed=0)
    with pytest.raises(DataError, match=r"got 1 images or texts to hold 0\.5 of the samples out"):
        one.split(0.5, seed=0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("images", "texts"), [(7, 5), (0, 4), (1, 0)])
def test_ranks_share_held_out_samples_and_run_the_same_modules(ranks, images, texts):
    has_image = [True] * images + [False] * texts
    batches = list(rank_batches(range(100, 100 + len(has_image)), has_image, batch=2, ranks=ranks))
    flat = [sample for batch in batches for sample in batch]
    assert sorted(sample for sample in flat if sample >= 0) == list(range(len(has_image)))
    assert max(map(len, batches)) <= 2
    for start in range(0, len(batches), ranks):  # what the ranks run at the same time
        together = batches[start : start + ranks]
        assert len(together) == ranks
        assert len({has_image[sample if sample >= 0 else -1 - sample] for batch in together for sample in batch}) == 1


def evaluated(model, samples, monkeypatch, *, ranks):
    validation = Validation(EvalSection(share=0.5), samples)
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        for inputs in validation.loader(Collator(0), batch=4):
            validation.add(model.eval(), inputs)
    return validation.report()


def test_held_out_figures_are_those_of_each_sample_alone_on_any_number_of_ranks(model, samples, monkeypatch):
    """The loss is the forward's own, an exact answer is what generate() gives."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batch = Collator(0)([samples[number] for number in (0, 3, 4, 7)])
    batch.pop("sources")
    for _ in range(25):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    model.eval()
    losses, labels, exact, answers = {}, {}, 0, 0
    for number in range(len(samples)):
        one = Collator(0)([samples[number]])
        cells = ("", "_image" if "pixel_values" in one else "_text", f"_{'ab'[int(one.pop('sources'))]}")
        count = int((one["labels"] != -100).sum())
        for cell in cells:
            losses[cell] = losses.get(cell, 0) + model(**one).loss.item() * count
            labels[cell] = labels.get(cell, 0) + count
        places = (one["labels"][0] != -100).nonzero().flatten()
        runs = torch.tensor_split(places, (places.diff() > 1).nonzero().flatten() + 1)
        for run in runs:
            prompt = {key: one[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in one}
            prompt |= {key: prompt[key][:, : run[0]] for key in ("input_ids", "attention_mask")}
            written = model.generate(**prompt, max_new_tokens=len(run), do_sample=False)
            exact += written[0, run[0] :].tolist() == one["labels"][0, run].tolist()
            answers += 1
    found = evaluated(model, samples, monkeypatch, ranks=1)
    assert 0 < exact < answers
    assert found["eval_accuracy"] == pytest.approx(exact / answers)
    assert {name: found[f"eval_loss{name}"] for name in losses} == pytest.approx(
        {name: losses[name] / labels[name] for name in losses}, rel=1e-4
    )
    assert evaluated(model, samples, monkeypatch, ranks=2) == pytest.approx(found, rel=1e-5)


def test_held_out_loss_under_a_plan_that_prunes_is_the_forwards_own(tiny_recipe, samples, monkeypatch):
    fields, _ = FusedLlavaConfig.get_config_dict(tiny_recipe()["model"]["config"])
    fields.pop("model_type")
    torch.manual_seed(1)
    stages = {"enter": 1, "exit": 4, "keep": {2: 5, 3: 2}}
    model = FusedLlavaForConditionalGeneration(FusedLlavaConfig(**fields, stages=stages)).eval()
    for weight in model.parameters():
        weight.data.mul_(8)  # so that attention has favourites
    loss = labels = 0
    for number in range(len(samples)):
        one = Collator(0)([samples[number]])
        one.pop("sources")
        count = int((one["labels"] != -100).sum())
        loss, labels = loss + model(**one).loss.item() * count, labels + count
    assert evaluated(model, samples, monkeypatch, ranks=1)["eval_loss"] == pytest.approx(loss / labels, rel=1e-4)


def test_a_held_out_sample_that_can_no_longer_be_read_is_named(samples, monkeypatch):
    """Another sample in its place would make evaluations of one run incomparable."""

    class Broken:
        config, lengths, has_image = samples.config, [3], [False]

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {**samples[0], "faults": [Fault("a.json", 4, "image 'x.png' is missing")]}

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    loader = Validation(EvalSection(share=0.1), Broken()).loader(Collator(0), batch=1)
    with pytest.raises(DataError, match=r"eval: a.json:4: image 'x.png' is missing; it could be read when the run"):
        next(iter(loader))


def test_accuracy_of_long_answers_alone_is_refused(samples):
    _, long = samples.split(0.2, seed=0)
    long.rows = {"labels": [[-100, *range(11), -100, -100, *range(20)]]}
    with pytest.raises(RecipeError, match="no held-out answer has up to 10 tokens; expected loss"):
        Validation(EvalSection(share=0.1, metric="accuracy"), long)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"every": 5}, "got neither files nor share"),
        ({"share": 1.0}, "less than 1"),
        ({"share": 0.1, "metric": "bleu"}, "'loss' or 'accuracy'"),
    ],
)
def test_a_section_that_holds_nothing_out_is_refused(tiny_recipe, section, message):
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(tiny_recipe() | {"eval": section})


def log(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in SEEN} for line in lines]


def test_a_stopped_run_goes_on_with_the_evaluations_of_one_that_was_not(train_here, tiny_recipe):
    """It was stopped at a step with an evaluation, which the next start makes up."""
    section = {"share": 0.25, "every": 2}
    whole = train_here(tiny_recipe("whole", tracker="none", profile={"steps": [2, 3]}) | {"eval": section})
    (trace,) = (whole / "profile").iterdir()
    assert trace.name == "steps-2-3.json"
    assert "aten::embedding" in trace.read_text()
    stopped = tiny_recipe("stopped") | {"eval": section}
    assert not (train_here(stopped, stop_in=2) / "final").exists()
    assert [line["step"] for line in log(train_here(stopped))] == [1, 2, 2, 3, 4, 4]
    for found, expected in zip(log(train_here(stopped)), log(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    assert [("eval_loss" in line, "loss" in line) for line in log(whole)[-2:]] == [(False, True), (True, False)]
    first = json.loads((whole / "log.jsonl").read_text().splitlines()[0])
    assert first["mfu"] is None  # of a CPU
    assert first["model_flops_per_second"] > 0
    figures = json.loads((whole / "final/run.json").read_text())
    assert figures["eval_loss"] == pytest.approx(log(whole)[-1]["eval_loss"])
    assert sum(figures["sources"].values()) == 18


def test_a_run_that_gets_worse_ends_and_keeps_its_best(train_here, tiny_recipe, capsys):
    recipe = tiny_recipe("worse", max_steps=9, scheduler="constant", warmup_ratio=0.0, save_steps=1, save_total_limit=1)
    recipe["train"]["learning_rate"] = {"projector": None, "vision_tower": None, "language_model": 0.2}
    recipe["data"]["files"], held_out = recipe["data"]["files"][:1], recipe["data"]["files"][1:]
    output = train_here(recipe | {"eval": {"files": held_out, "every": 1, "patience": 2, "final": "best"}})
    evaluations = {line["step"]: line["eval_loss"] for line in log(output) if "eval_loss" in line}
    best, last = min(evaluations, key=evaluations.get), max(evaluations)
    assert last == best + 2 < 9
    assert "eval.patience is over" in capsys.readouterr().out
    assert {path.name for path in output.glob("checkpoint-*")} == {f"checkpoint-{best}", f"checkpoint-{last}"}
    figures = json.loads((output / "final/run.json").read_text())
    assert (figures["steps"], figures["eval_step"], figures["ended_early"]) == (last, best, True)
    final = load_file(output / "final/model.safetensors")
    kept, dropped = (load_file(output / f"checkpoint-{step}/model.safetensors") for step in (best, last))
    assert any(not torch.equal(weight, dropped[name]) for name, weight in final.items())
    assert all(torch.equal(weight, kept[name]) for name, weight in final.items())
    assert train_here(recipe | {"eval": {"files": held_out, "every": 1, "patience": 2, "final": "best"}})
    assert "not run again" in capsys.readouterr().out
