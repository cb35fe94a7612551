"""Samples, batches and their order; the check command."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from data.check import main
from data.collate import Collator
from data.config import DataConfig
from data.dataset import ConversationDataset
from data.records import DataError
from data.sampler import LengthModalitySampler

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT / "recipes/configs/quickstart")


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64), (200, 10, 10)).save(tmp_path / name)
    return tmp_path


def talk(*texts, image=None):
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {**({} if image is None else {"image": image}), "conversations": turns}


def config(folder, rows, **more):
    file = folder / "data.json"
    file.write_text(json.dumps(rows))
    fields = {"format": "chat_template", "image_aspect": "processor", "workers": 0, "images": str(folder)}
    return DataConfig(files=[str(file)], **{**fields, **more})


GOOD = [
    talk("<image>\nis there a circle ?", "yes", image="a.png"),
    talk("is it red ?", "no"),
    talk("<image> <image> which ?", "red", "and ?", "blue", image=["a.png", "b.png"]),
]


def test_samples(folder, processor):
    data = ConversationDataset(config(folder, GOOD), processor)
    assert len(data) == 3
    assert data.has_image == [True, False, True]
    assert data.lengths == [len(data[index]["input_ids"]) for index in range(3)]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert [int((data[index]["input_ids"] == image).sum()) for index in range(3)] == [64, 0, 128]
    assert data[2]["pixel_values"].shape == (2, 3, 64, 64)
    assert "pixel_values" not in data[1]
    for index in range(3):
        sample = data[index]
        assert (sample["labels"][sample["input_ids"] == image] == -100).all()
        assert (sample["labels"] != -100).any()


def test_long_samples_are_cut_at_a_turn(folder, processor):
    whole = ConversationDataset(config(folder, GOOD[2:]), processor)
    cut = ConversationDataset(config(folder, GOOD[2:], max_length=whole.lengths[0] - 1), processor)
    assert cut.lengths[0] < whole.lengths[0]
    size = cut.lengths[0]
    assert torch.equal(cut[0]["input_ids"], whole[0]["input_ids"][:size])
    assert cut[0]["labels"][-2:].tolist().count(-100) < 2


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (talk("<image>\nx", "y", image="c.png"), "'c.png' is missing"),
        (talk("<image>\nx", "y", image="../a.png"), "outside the image folder"),
        (talk("x", "y", image="a.png"), "found 0 <image>"),
        (talk("<image>\nx", "y " * 600, image="a.png"), "no label is left"),
        ({"id": 1}, "missing key 'conversations'"),
    ],
)
def test_bad_rows_fail_or_are_listed(folder, processor, bad, reason):
    rows = [GOOD[0], bad, GOOD[1]]
    with pytest.raises(DataError, match=rf"found 1 rows with faults, accepted: up to 0.*data.json:1: .*{reason}"):
        ConversationDataset(config(folder, rows, max_length=512), processor)
    data = ConversationDataset(config(folder, rows, max_length=512, max_bad_rows=1), processor)
    assert len(data) == 2
    assert [(fault.row, reason in fault.reason) for fault in data.skipped] == [(1, True)]


def test_nothing_left_is_an_error(folder, processor):
    with pytest.raises(DataError, match="found no rows"):
        ConversationDataset(config(folder, [talk("x", "y", image="a.png")], max_bad_rows=1), processor)


def test_an_image_that_breaks_later_is_named(folder, processor):
    data = ConversationDataset(config(folder, GOOD[:1]), processor)
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"data\.json:0: image 'a\.png'"):
        data[0]


def test_all_of_easy_vqa_is_clean(processor):
    data = ConversationDataset(
        DataConfig(files=["easy_vqa:train"], format="chat_template", image_aspect="processor", workers=2), processor
    )
    assert len(data) == 4000
    assert not data.skipped
    unknown = processor.tokenizer.unk_token_id
    assert not any(unknown in row for row in data.rows["ids"])


def test_collation(folder, processor):
    data = ConversationDataset(config(folder, GOOD), processor)
    batch = Collator(processor.tokenizer.pad_token_id)([data[index] for index in range(3)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, max(data.lengths))
    assert batch["attention_mask"].sum(dim=1).tolist() == data.lengths
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["pixel_values"].shape[0] == 3
    assert "pixel_values" not in Collator(0)([data[1]])


# -- the order of an epoch ----------------------------------------------------------------------------------------


def sampler(images=100, texts=37, batch=8, seed=0):
    lengths = [100 + (index * 37) % 91 for index in range(images + texts)]
    return LengthModalitySampler(lengths, [True] * images + [False] * texts, batch_size=batch, seed=seed)


@pytest.mark.parametrize(("images", "texts"), [(100, 37), (0, 5), (64, 0), (3, 4)])
def test_every_index_comes_once_an_epoch(images, texts):
    order = list(sampler(images, texts))
    assert sorted(order) == list(range(images + texts))


def test_batches_hold_one_modality_and_like_lengths():
    chosen = sampler(4000, 1600)
    order = list(chosen)
    batches = [order[start : start + 8] for start in range(0, len(order) - 16, 8)]
    assert all(len({chosen.has_image[index] for index in batch}) == 1 for batch in batches)
    spread = [
        max(map(chosen.lengths.__getitem__, batch)) - min(map(chosen.lengths.__getitem__, batch)) for batch in batches
    ]
    assert sum(spread) / len(spread) < 5  # of 91


def test_the_order_follows_seed_and_epoch_alone():
    first, again, other = sampler(), sampler(), sampler(seed=1)
    assert list(first) == list(first) == list(again)
    assert list(first) != list(other)
    again.set_epoch(1)
    assert list(first) != list(again)


# -- python -m data.check -----------------------------------------------------------------------------------------


def recipe(folder, rows):
    data = json.loads(config(folder, rows).model_dump_json())
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"name": "x", "data": data}))  # JSON is YAML
    return str(file)


def test_check_of_clean_data(folder, capsys):
    assert main([recipe(folder, GOOD)]) == 0
    assert "data: 3 rows, 2 with an image (3 images), 1 text only, 8 turns, 0 faults" in capsys.readouterr().out


def test_check_lists_every_fault(folder, capsys):
    bad = [GOOD[0], {"id": 1}, talk("<image>\nx", "y", image="c.png"), talk("a", "q", "b")]
    assert main([recipe(folder, bad)]) == 2
    out = capsys.readouterr().out
    assert "data.json:1: missing key 'conversations'" in out
    assert "data.json:2: image 'c.png' is missing" in out
    assert "2 faults" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {files: []}", "data.files: List should have at least 1 item"),
        ("data: {files: [x.json], format: plain, color: 1}", "data.color: Extra inputs are not permitted"),
        ("name: x", "data: not found"),
        ("data: {files: [nothing.json], format: plain}", "nothing.json: No such file"),
    ],
)
def test_check_refuses_a_wrong_recipe_in_one_line(tmp_path, capsys, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    assert main([str(tmp_path / "recipe.yaml")]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert message in err[0]
