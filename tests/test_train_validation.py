"""Validation while training: held-out figures, the best checkpoint, early stopping, on several ranks, after a stop."""

import io
import json

import datasets
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
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
    with pytest.raises(DataError, match=r"got 1 groups of samples without a common image to hold 0\.5"):
        one.split(0.5, seed=0)


def talk(question, **more):
    return {**more, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "Red."}]}


def png(level):
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (level, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def read_rows(tiny_recipe, tmp_path, monkeypatch):
    """Reads the samples of files of rows."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    processor = AutoProcessor.from_pretrained(tiny_recipe()["model"]["config"])

    def read(*files):
        config = DataConfig(files=list(files), images=str(tmp_path), format="vicuna_v1", workers=0, max_length=512)
        return ConversationDataset(config, processor)

    return read


def held_out_rows(samples, share):
    """Returns, of several seeds, the rows that were held out."""
    parts = [samples.split(share, seed=seed)[1] for seed in range(6)]
    return {tuple(zip(part.source, part.rows["row"][:], strict=True)) for part in parts}


def test_embedded_images_are_told_apart_by_their_bytes(read_rows, tmp_path):
    rows = [talk("<image>\nWhat?", image={"bytes": png(level), "path": None}) for level in (10, 10, 60, 200)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    samples = read_rows(str(tmp_path / "rows.parquet"))
    assert held_out_rows(samples, 0.25) == {((0, 0), (0, 1)), ((0, 2),), ((0, 3),)}


def test_rows_of_several_images_stay_with_all_rows_that_share_one(read_rows, tmp_path):
    for level in range(4):
        (tmp_path / f"{level}.png").write_bytes(png(level))
    named = [["0.png"], ["0.png", "./1.png"], ["1.png"], ["2.png"], ["3.png"]]
    rows = [talk("<image>\n" * len(images) + "What?", image=images) for images in named]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = held_out_rows(read_rows(str(tmp_path / "rows.json")), 0.2)
    assert found == {((0, 0), (0, 1), (0, 2)), ((0, 3),), ((0, 4),)}


def test_a_file_that_two_sources_name_is_one_image(read_rows, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/a.png"):
        (tmp_path / name).write_bytes(png(10))
    (tmp_path / "one.json").write_text(json.dumps([talk("<image>\nWhat?", image=name) for name in ("a.png", "b.png")]))
    names = ("sub/a.png", "a.png")
    (tmp_path / "two.json").write_text(json.dumps([talk("<image>\nWhat?", image=name) for name in names]))
    found = held_out_rows(read_rows(str(tmp_path / "one.json"), str(tmp_path / "two.json")), 0.25)
    assert found == {((0, 0), (1, 1)), ((0, 1),), ((1, 0),)}


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


def test_an_evaluation_made_up_later_does_not_touch_the_checkpoint(train_here, tiny_recipe):
    section = {"share": 0.25, "every": 2, "final": "best"}
    recipe = tiny_recipe("late", save_total_limit=9) | {"eval": section}
    output = train_here(recipe, stop_in=2)
    held = {path: path.read_bytes() for path in (output / "checkpoint-2").rglob("*") if path.is_file()}
    (output / "log.jsonl").write_text(
        (output / "log.jsonl").read_text() + '{"step": 2, "eval_loss": 9.0, "seconds": 1.0}\n'
    )  # as of a start that was killed after it
    assert (train_here(recipe) / "final").is_dir()
    assert all(path.read_bytes() == content for path, content in held.items())
    evaluations = [line for line in log(output) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert evaluations[0]["eval_loss"] < 9
    best = min(evaluations, key=lambda line: line["eval_loss"])["step"]
    assert json.loads((output / "final/run.json").read_text())["eval_step"] == best


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
