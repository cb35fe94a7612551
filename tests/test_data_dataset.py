"""Samples: what a row becomes, what is cut, what is skipped, what fails."""

import copy
import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from data.config import DataConfig
from data.dataset import Collator, ConversationDataset
from data.rows import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT / "recipes/configs/quickstart")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (64, 64), (200, 10, 100 * number)).save(tmp_path / name)
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
LATER = talk("<image> which ?", "red", "and <image> ?", "blue yes", "no ?", "no", image=["a.png", "b.png"])


def test_samples(folder, processor):
    data = ConversationDataset(config(folder, GOOD), processor)
    assert len(data) == 3
    assert data.has_image == [True, False, True]
    assert data.num_cut == 0
    assert data.lengths == [len(data[index]["input_ids"]) for index in range(3)]
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert [int((data[index]["input_ids"] == image).sum()) for index in range(3)] == [64, 0, 128]
    assert data[2]["pixel_values"].shape == (2, 3, 64, 64)
    assert not torch.equal(*data[2]["pixel_values"])
    assert "pixel_values" not in data[1]
    for index in range(3):
        sample = data[index]
        assert {
            name: tensor.dtype for name, tensor in sample.items() if name.endswith("s") and name != "pixel_values"
        } == {
            "input_ids": torch.int64,
            "labels": torch.int64,
        }
        assert (sample["labels"][sample["input_ids"] == image] == -100).all()
        supervised = sample["labels"] != -100
        assert torch.equal(sample["labels"][supervised], sample["input_ids"][supervised])
    labels = [data[index]["labels"] for index in range(3)]
    words = [processor.tokenizer.convert_ids_to_tokens(each[each != -100]) for each in labels]
    assert words == [["yes", "</s>"], ["no", "</s>"], ["red", "</s>", "blue", "</s>"]]


def test_workers_give_the_same_samples(folder, processor):
    alone = ConversationDataset(config(folder, GOOD * 5), processor)
    shared = ConversationDataset(config(folder, GOOD * 5, workers=2), processor)
    loader = DataLoader(shared, batch_size=5, num_workers=2, collate_fn=Collator(0))
    whole = [batch["input_ids"] for batch in loader]
    for number, ids in enumerate(whole):
        expected = Collator(0)([alone[index] for index in range(5 * number, 5 * number + 5)])
        assert torch.equal(ids, expected["input_ids"])


@pytest.mark.parametrize("answers", [1, 2, 3])
def test_long_samples_end_after_an_answer_and_images_go_with_their_turns(folder, processor, answers):
    whole = ConversationDataset(config(folder, [LATER]), processor)[0]
    labels = whole["labels"].tolist()
    ends = [place + 1 for place in range(len(labels)) if labels[place] != -100 and [*labels, -100][place + 1] == -100]
    size = ends[answers - 1]
    for limit in {size, (ends[answers] if answers < 3 else 999) - 1}:
        cut = ConversationDataset(config(folder, [LATER], max_length=limit), processor)
        assert cut.lengths == [size]
        assert torch.equal(cut[0]["input_ids"], whole["input_ids"][:size])
        assert torch.equal(cut[0]["labels"], whole["labels"][:size])
        assert len(cut[0]["pixel_values"]) == min(answers, 2)
        assert cut.num_cut == (size < len(labels))


def test_a_sample_whose_only_image_is_cut_off_is_text(folder, processor):
    row = talk("is it red ?", "no", "<image> and ?", "yes", image="a.png")
    data = ConversationDataset(config(folder, [row], max_length=20), processor)
    assert data.has_image == [False]
    assert "pixel_values" not in data[0]


BAD = [
    (talk("<image>\nx", "y", image="c.png"), "'c.png' is missing"),
    (talk("<image>\nx", "y", image="../a.png"), "outside the image folder"),
    (talk("x", "y", image="a.png"), "got 0 <image>"),
    (talk("<image>\nx", "y " * 600, image="a.png"), r"no label is left: the first answer ends after 1\d{3} tokens"),
    ({"id": 1}, "missing key 'conversations'"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_bad_rows_fail(folder, processor, bad, reason):
    given = config(folder, [GOOD[0], bad, GOOD[1]], max_length=512)
    with pytest.raises(DataError, match=rf"got 1 rows with faults, expected up to 0.*data.json:1: .*{reason}"):
        ConversationDataset(given, processor)


def test_bad_rows_are_skipped_up_to_a_number_and_listed(folder, processor):
    rows = [GOOD[0], *[bad for bad, _ in BAD], GOOD[1]]
    data = ConversationDataset(config(folder, rows, max_length=512, max_bad_rows=5), processor)
    assert len(data) == 2
    assert sorted(fault.row for fault in data.skipped) == [1, 2, 3, 4, 5]
    assert data.has_image == [True, False]
    with pytest.raises(DataError, match="got 5 rows with faults, expected up to 4"):
        ConversationDataset(config(folder, rows, max_length=512, max_bad_rows=4), processor)


def test_an_error_lists_the_first_faults(folder, processor):
    missing = talk("<image>", "x", image="c.png")
    kinds = [*({"x" * (place + 1): 1} for place in range(3)), missing, [], talk("x"), 7, "text", missing]
    with pytest.raises(DataError, match=r"got 9 rows.*data.json: 3 rows: missing key .*; and 1 more kinds; ") as caught:
        ConversationDataset(config(folder, kinds), processor)
    assert "\n" not in str(caught.value)


def test_a_sample_without_a_label_is_a_fault(folder, processor):
    tokens = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    tokens["normalizer"] = {"type": "Replace", "pattern": {"String": "\n"}, "content": ""}
    processor = copy.deepcopy(processor)  # of a tokenizer that makes no token of a newline, which ends a plain caption
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(tokens))
    rows = [talk("<image>", "", image="a.png"), GOOD[0]]
    data = ConversationDataset(config(folder, rows, format="plain", max_bad_rows=1), processor)
    assert [(fault.row, fault.reason) for fault in data.skipped] == [
        (0, "no label is left: the tokenizer makes no token of the answers")
    ]


def test_nothing_left_is_an_error(folder, processor):
    with pytest.raises(DataError, match="got no rows without a fault"):
        ConversationDataset(config(folder, [{"id": 1}], max_bad_rows=1), processor)


def test_a_row_that_was_mended_is_used(folder, processor):
    given = config(folder, [GOOD[1], talk("<image>", "blue", image="c.png"), GOOD[0]], max_bad_rows=1)
    assert len(ConversationDataset(given, processor)) == 2
    Image.new("RGB", (64, 64)).save(folder / "c.png")
    data = ConversationDataset(given, processor)
    assert not data.skipped
    assert data.has_image == [False, True, True]
    assert "blue" in processor.tokenizer.decode(data[1]["input_ids"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_whose_image_breaks_later_is_passed_over_and_named(folder, processor, workers):
    data = ConversationDataset(config(folder, [GOOD[0], GOOD[1]]), processor)
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (batch,) = DataLoader(data, batch_size=2, num_workers=workers, collate_fn=Collator(0))
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    (fault,) = batch["faults"]
    assert str(fault).startswith(f"{folder / 'data.json'}:0: image 'a.png' is ")
    assert "faults" not in Collator(0)([data[1]])


def test_no_row_that_can_be_opened_is_an_error(folder, processor):
    data = ConversationDataset(config(folder, GOOD[:1]), processor)
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match=r"data\.json:0: image 'a\.png' is missing .*no other row can be opened"):
        data[0]


def test_another_tokenizer_is_not_served_from_the_cache(folder):
    one, other = (AutoProcessor.from_pretrained(ROOT / "recipes/configs/quickstart") for _ in range(2))
    given = config(folder, GOOD[:1])
    before = ConversationDataset(given, one)[0]["input_ids"]
    other.tokenizer.chat_template = "red " + other.tokenizer.chat_template
    added = len(one.tokenizer("red ")["input_ids"])
    assert len(ConversationDataset(given, other)[0]["input_ids"]) == len(before) + added


def test_all_of_easy_vqa_is_clean(folder, processor):
    given = DataConfig(files=["easy_vqa:train"], format="chat_template", image_aspect="processor", workers=2)
    data = ConversationDataset(given, processor)
    assert len(data) == 4000
    assert not data.skipped
    assert data.num_cut == 0
    assert all(data.has_image)
    unknown = processor.tokenizer.unk_token_id
    assert not any(unknown in row for row in data.rows["ids"][:])
