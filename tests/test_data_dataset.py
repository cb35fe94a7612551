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
from transformers import AutoProcessor, SiglipImageProcessor

from data.chat import TokenizerError
from data.config import DataConfig
from data.dataset import Collator, ConversationDataset, LengthModalitySampler
from data.rows import DataError
from data.table import check_rows
from tests.tiny_processors import PROCESSORS

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
        (0, "no label is left: got no token for the answers, expected at least one")
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
    other.chat_template = "red " + other.chat_template
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


@pytest.mark.parametrize("image", [None, "a.png"])
def test_a_first_answer_that_is_too_long_ends_at_the_limit_where_the_recipe_says_so(folder, processor, image):
    row = talk(("<image>\n" if image else "") + "which ?", "red " * 200, "and ?", "blue", image=image)
    whole = ConversationDataset(config(folder, [row]), processor)[0]
    with pytest.raises(
        DataError, match=r"first answer ends after \d+ tokens, expected up to 120 \(data.long_answers: cut"
    ):
        ConversationDataset(config(folder, [row], max_length=120), processor)
    cut = ConversationDataset(config(folder, [row], max_length=120, long_answers="cut"), processor)
    assert (cut.lengths, cut.num_cut, cut.has_image) == ([120], 1, [image is not None])
    for key in ("input_ids", "labels"):
        assert torch.equal(cut[0][key], whole[key][:120])
    assert processor.tokenizer.eos_token_id not in cut[0]["labels"]
    with pytest.raises(DataError, match="no label is left"):  # not even the question fits
        ConversationDataset(config(folder, [row], max_length=4, long_answers="cut"), processor)


def sources(folder, weights, sizes):
    files = []
    for number, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        (folder / f"{number}.json").write_text(json.dumps([talk("is it red ?", "no")] * size))
        files.append({"path": str(folder / f"{number}.json")} | ({} if weight is None else {"weight": weight}))
    return DataConfig(files=files, format="chat_template", image_aspect="processor", workers=0)


@pytest.mark.parametrize(
    ("weights", "sizes", "expected"),
    [
        ((None, None), (10, 30), (10, 30)),
        ((1, 1), (10, 30), (20, 20)),
        ((0.3, 0.1), (10, 30), (30, 10)),
        ((1, 2, 1), (4, 4, 4), (3, 6, 3)),
        ((1, 99), (50, 50), (1, 99)),
    ],
)
def test_weights_are_shares_of_an_epoch(folder, processor, weights, sizes, expected):
    data = ConversationDataset(sources(folder, weights, sizes), processor)
    assert data.source_rows == list(sizes)
    first, second = (data.epoch(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    counts = [sum(data.source[index] == number for index in first) for number in range(len(sizes))]
    assert counts == list(expected)
    for number, size in enumerate(sizes):
        drawn = [index for index in first if data.source[index] == number]
        repeats = [drawn.count(index) for index in set(drawn)]
        assert max(repeats) - min(repeats) <= 1  # all rows of a source before any comes again
        assert len(set(drawn)) == min(size, expected[number])
    if weights[0] is None:
        assert first == second == list(range(40))
    elif sizes == (50, 50):
        assert set(first) != set(second)  # other rows in another epoch


def test_a_source_with_a_weight_never_goes_missing(folder, processor):
    """Not by faults, nor by a share below a sample, nor because its last rows were held out."""
    given = sources(folder, (1, 1), (10, 3)).model_copy(update={"max_bad_rows": 3})
    broken = [talk("<image>\nwhich ?", "red", image="none.png")] * 3
    (folder / "1.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"1.json: got weight 1 and no row without a fault"):
        ConversationDataset(given.model_copy(update={"images": str(folder)}), processor)
    with pytest.raises(DataError, match=r"0.json: got weight 1 of 101, less than one of the 12 samples of an epoch"):
        ConversationDataset(sources(folder, (1, 100), (10, 2)), processor)
    data = ConversationDataset(sources(folder, (1, 1), (50, 2)), processor)
    for seed in range(20):
        rest, held_out = data.split(0.3, seed=seed)
        assert rest.source_rows[1] > 0
        assert len(held_out) == 16
        assert len(rest) == 36


def test_the_sampler_draws_by_weights(folder, processor):
    data = ConversationDataset(sources(folder, (1, 1), (10, 30)), processor)
    sampler = LengthModalitySampler(data.lengths, data.has_image, batch_size=4, seed=0, data=data)
    assert sum(data.source[index] == 0 for index in sampler) == 20


def test_each_source_has_its_format_and_says_which_it_is(folder, processor):
    (folder / "data.json").write_text(json.dumps([talk("<image>\nwhich ?", "red", image="a.png")]))
    files = [str(folder / "data.json"), {"path": str(folder / "data.json"), "format": "plain"}]
    given = DataConfig(files=files, images=str(folder), format="chat_template", image_aspect="processor", workers=0)
    data = ConversationDataset(given, processor)
    texts = [processor.tokenizer.decode(data[index]["input_ids"]) for index in range(2)]
    assert "which" in texts[0]
    assert "which" not in texts[1]
    assert Collator(0)([data[0], data[1]])["sources"].tolist() == [0, 1]
    assert given.names == ["data", "data_1"]
    files = ["a/image.json", "text.jsonl", "image", "image_1.json"]
    assert given.model_copy(update={"files": files}).names == ["image_1", "text_1", "image_2", "image_1_1"]
    assert data.encoder.stop_ids == [processor.tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("section", "sources", "expected"),
    [
        ("vicuna_v1", [None, "plain"], "vicuna_v1"),
        ("chat_template", ["vicuna_v1", "vicuna_v1"], "vicuna_v1"),
        ("plain", ["chat_template", "plain"], "chat_template"),
        ("vicuna_v1", ["chat_template", None], "vicuna_v1"),
        ("plain", [None, None], "plain"),
        ("chat_template", ["plain"], "plain"),
    ],
)
def test_a_checkpoint_is_asked_in_a_format_that_a_source_has(section, sources, expected):
    given = [{"path": "x.json"} | ({} if one is None else {"format": one}) for one in sources]
    assert DataConfig(files=given, format=section).prompt_format == expected


def test_two_formats_of_questions_need_one_to_be_asked_in():
    given = [{"path": "x.json", "format": one} for one in ("chat_template", "vicuna_v1")]
    with pytest.raises(ValueError, match="format: got plain, but the sources have chat_template and vicuna_v1, expec"):
        DataConfig(files=given, format="plain")


def test_an_image_of_another_size_is_a_fault_until_the_rows_are_checked_again(folder):
    """A replaced image changes how many tokens its sample has: its length, and where it is cut."""
    llava_next = PROCESSORS["llava_next"]()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    given = config(folder, [GOOD[0], GOOD[1]], max_bad_rows=1)
    before = ConversationDataset(given, llava_next)
    Image.new("RGB", (8, 64)).save(folder / "a.png")
    sample = before[0]
    assert "an image has changed since it was checked" in str(sample["faults"][0])
    check_rows(given, recheck=True)
    after = ConversationDataset(given, llava_next)
    assert after.lengths[0] == len(after[0]["input_ids"]) != before.lengths[0]


def test_a_system_prompt_and_untrained_answers_reach_the_sample(folder, processor):
    turns = talk("is it red ?", "no", "and ?", "yes")["conversations"]
    turns[1]["weight"] = 0
    data = ConversationDataset(
        config(folder, [{"system": "circle", "conversations": turns}], format="vicuna_v1"), processor
    )
    labels = data[0]["labels"]
    assert processor.tokenizer.convert_ids_to_tokens(labels[labels != -100])[-1] == "</s>"
    assert "yes" in processor.tokenizer.decode(labels[labels != -100])
    assert "no" not in processor.tokenizer.decode(labels[labels != -100])
    assert processor.tokenizer.decode(data[0]["input_ids"]).startswith("circle")


def test_images_inside_reach_the_sample(folder, processor):
    columns = {
        "image": [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("a.png", "b.png")],
        "conversations": [talk("<image>\nwhich ?", "red")["conversations"]] * 2,
    }
    datasets.Dataset.from_dict(columns).to_parquet(folder / "data.parquet")
    rows = [talk("<image>\nwhich ?", "red", image=name) for name in ("a.png", "b.png")]
    paths = ConversationDataset(config(folder, rows), processor)
    given = paths.config.model_copy(update={"files": [str(folder / "data.parquet")]})
    inside = ConversationDataset(given, processor)
    for workers in (0, 1):
        loader = DataLoader(inside, batch_size=2, num_workers=workers, collate_fn=Collator(0))
        assert torch.equal(next(iter(loader))["pixel_values"], Collator(0)([paths[0], paths[1]])["pixel_values"])


def changed(processor, **fields):
    processor = copy.deepcopy(processor)
    for name, value in fields.items():
        setattr(processor, name, value)
    return processor


def test_a_processor_without_a_crop_is_asked_for_its_size(folder, processor):
    siglip = SiglipImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    other = changed(
        processor, image_processor=siglip, num_additional_image_tokens=0, vision_feature_select_strategy="full"
    )
    data = ConversationDataset(config(folder, GOOD[:1]), other)
    assert (data[0]["input_ids"] == other.tokenizer.convert_tokens_to_ids("<image>")).sum() == 64
    assert data[0]["pixel_values"].shape == (1, 3, 64, 64)


def test_a_processor_without_patch_size_is_one_line(folder, processor):
    with pytest.raises(TokenizerError, match=r"processor_config.json: got no patch_size, expected the vision tower's"):
        ConversationDataset(config(folder, GOOD[:1]), changed(processor, patch_size=None))


def test_a_tokenizer_without_a_pad_token_pads_all_the_same():
    samples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6], [7])]
    batch = Collator(None)(samples)
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[5, 6], [7, -100]]


def test_a_cache_folder_that_cannot_be_made_is_one_line(folder, processor, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "file/cache")
    with pytest.raises(DataError, match=r"^cache: .*file/cache: Not a directory; expected .* HF_DATASETS_CACHE$"):
        ConversationDataset(config(folder, GOOD[:1]), processor)
