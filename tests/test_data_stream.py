"""Rows read while training: every row once, shared by ranks and workers, resumed at its place."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from data.check import main
from data.config import DataConfig
from data.dataset import Collator, ConversationDataset
from data.rows import DataError
from data.stream import ConversationStream

ROOT = Path(__file__).resolve().parents[1]
ROWS = 12


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ROOT / "recipes/configs/quickstart")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files a and b of 12 rows, each row with an image of its own brightness, and part0 ... part3 of three rows."""
    folder = tmp_path_factory.mktemp("stream")
    for number in range(2 * ROWS):
        Image.new("RGB", (64, 64), (10 * number,) * 3).save(folder / f"{number}.png")
    for name, first in (("a", 0), ("b", ROWS)):
        (folder / f"{name}.jsonl").write_text("\n".join(row(number) for number in range(first, first + ROWS)))
    for part in range(4):
        (folder / f"part{part}.jsonl").write_text("\n".join(row(number) for number in range(3 * part, 3 * part + 3)))
    return folder


def row(number, image=None):
    turns = [{"from": "human", "value": "<image>\nwhat color ?"}, {"from": "gpt", "value": "red " * (1 + number % 3)}]
    return json.dumps({"image": image or f"{number}.png", "conversations": turns})


def config(folder, *files, **more):
    given = {"images": str(folder), "format": "chat_template", "image_aspect": "processor", "streaming": True}
    given = {**given, "workers": 0, **more}
    return DataConfig(files=[file if isinstance(file, dict) else str(folder / file) for file in files], **given)


def number_of(sample):
    """Returns which row a sample is, by the brightness of its image."""
    return round((sample["pixel_values"].mean().item() * 0.25 + 0.9) * 25.5)


def test_an_epoch_has_every_row_once_as_the_dataset_has_it(folder, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    given = config(folder, "a.jsonl", "b.jsonl")
    samples = list(islice(ConversationStream(given, processor), 2 * ROWS))
    assert sorted(map(number_of, samples)) == list(range(2 * ROWS))
    assert [number_of(sample) for sample in samples] != list(range(2 * ROWS))
    whole = ConversationDataset(given.model_copy(update={"streaming": False, "workers": 0}), processor)
    expected = {number_of(sample): sample for sample in (whole[index] for index in range(len(whole)))}
    for sample in samples:
        for key, value in expected[number_of(sample)].items():
            assert torch.equal(torch.as_tensor(sample[key]), torch.as_tensor(value)), key
    assert not list((tmp_path).glob("**/*stream*"))


@pytest.mark.parametrize(("files", "workers"), [(("a.jsonl",), 0), (("part*.jsonl",), 0), (("part*.jsonl",), 2)])
def test_ranks_and_workers_share_the_rows(folder, processor, files, workers):
    seen = Counter()
    for rank in range(2):
        stream = ConversationStream(config(folder, *files), processor, rank=rank, ranks=2)
        loader = DataLoader(stream, batch_size=1, num_workers=workers, collate_fn=Collator(0))
        seen.update(number_of(batch) for batch in islice(loader, ROWS // 2))
    assert seen == Counter(range(ROWS))


@pytest.mark.parametrize(("workers", "used"), [(0, 1), (0, 9), (2, 3)])
def test_a_resumed_stream_goes_on_at_its_place(folder, processor, workers, used):
    def batches(skip, count):
        stream = ConversationStream(config(folder, "a.jsonl", "b.jsonl"), processor, batch=2, seed=3)
        stream.skip = skip
        loader = DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=Collator(0))
        return [batch["pixel_values"] for batch in islice(loader, count)]

    whole, rest = batches(0, 14), batches(used, 14 - used)
    assert all(torch.equal(*pair) for pair in zip(whole[used:], rest, strict=True))


def test_the_order_follows_from_the_seed(folder, processor):
    def order(seed):
        stream = ConversationStream(config(folder, "a.jsonl"), processor, seed=seed)
        return [number_of(sample) for sample in islice(stream, ROWS)]

    assert order(1) == order(1) != order(2)


def test_weights_decide_how_often_a_source_is_drawn(folder, processor):
    files = [{"path": str(folder / "a.jsonl"), "weight": 3}, {"path": str(folder / "b.jsonl"), "weight": 1}]
    samples = islice(ConversationStream(config(folder, *files), processor), 512)
    assert 0.2 < Counter(sample["source"] for sample in samples)[1] / 512 < 0.3


def test_a_small_source_keeps_its_weight_where_a_part_has_few_of_its_rows(folder, processor, tmp_path):
    (tmp_path / "few.jsonl").write_text("\n".join(row(number) for number in range(ROWS, ROWS + 2)))
    files = [{"path": str(path), "weight": 1} for path in (folder / "a.jsonl", tmp_path / "few.jsonl")]
    drawn = Counter()
    for rank in range(2):  # one row of the small source each
        samples = islice(ConversationStream(config(folder, *files), processor, rank=rank, ranks=2), 512)
        drawn.update(sample["source"] for sample in samples)
    assert 0.45 < drawn[1] / 1024 < 0.55


def test_a_source_with_a_weight_and_no_good_row_in_a_part_ends_the_stream(folder, processor, tmp_path):
    (tmp_path / "half.jsonl").write_text(f"{row(0)}\n{row(1, 'none.png')}")
    files = [{"path": str(path), "weight": 1} for path in (folder / "a.jsonl", tmp_path / "half.jsonl")]
    stream = ConversationStream(config(folder, *files), processor, rank=1, ranks=2)
    with pytest.raises(DataError, match=r"half.jsonl: got no row without a fault in part 1 of 2: .*half.jsonl:1: "):
        list(islice(stream, 512))
    assert list(islice(ConversationStream(config(folder, *files), processor, rank=0, ranks=2), 4))


def test_a_limit_is_of_the_source_whatever_the_shards(folder, processor):
    file = {"path": str(folder / "a.jsonl"), "limit": 4}
    seen = set()
    for rank in range(2):
        stream = ConversationStream(config(folder, file), processor, rank=rank, ranks=2)
        seen |= {number_of(sample) for sample in islice(stream, 20)}
    assert seen == set(range(4))


def test_grouping_makes_passes_of_like_samples(folder, processor):
    stream = ConversationStream(config(folder, "a.jsonl"), processor, batch=4, seed=1)
    lengths = [len(sample["input_ids"]) for sample in islice(stream, 3 * 4)]
    whole = [sorted(lengths)[start : start + 4] for start in (0, 4, 8)]
    assert sorted(sorted(lengths[start : start + 4]) for start in (0, 4, 8)) == sorted(whole)


def test_faults_come_with_the_next_sample_and_an_unopened_image_is_one(folder, processor, tmp_path):
    lines = [row(0), "{broken", row(1, "none.png"), '{"id": 1}', row(2)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    stream = ConversationStream(config(folder, tmp_path / "data.jsonl"), processor)
    samples = list(islice(stream, 2))
    assert {number_of(sample) for sample in samples} == {0, 2}
    found = [fault for sample in samples for fault in sample.get("faults", [])]
    assert {fault.row for fault in found} == {1, 2, 3}
    assert all(fault.file == str(tmp_path / "data.jsonl") for fault in found)


def test_an_array_that_breaks_in_the_middle_ends_a_stream_whatever_faults_are_allowed(
    folder, processor, tmp_path, capsys
):
    (tmp_path / "data.json").write_text(f"[{row(0)}, {row(1)}, {{broken, {row(2)}]")
    given = config(folder, tmp_path / "data.json", max_bad_rows=9)
    with pytest.raises(DataError, match=r"data.json:2: broken JSON: .*; the rows after it cannot be read"):
        list(islice(ConversationStream(given, processor), 3))
    (tmp_path / "recipe.yaml").write_text(json.dumps({"data": given.model_dump(exclude_none=True)}))
    assert main([str(tmp_path / "recipe.yaml")]) == 2
    assert "data.json:2: broken JSON" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"<html>404</html>"])
def test_a_file_that_cannot_be_read_at_all_is_refused_before_training(folder, processor, tmp_path, content):
    (tmp_path / "data0.jsonl").write_text("\n".join(map(row, range(3))))
    (tmp_path / "data1.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"data1.jsonl: looks like"):
        ConversationStream(config(folder, tmp_path / "data*.jsonl"), processor)


@pytest.mark.parametrize(("name", "content"), [("b.jsonl", "\n"), ("b.json", "[]"), ("b.parquet", None)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_without_rows_is_refused_before_training_and_by_the_check(
    folder, processor, tmp_path, capsys, name, content, ranks
):
    (tmp_path / "a.jsonl").write_text(row(0))
    if content is None:
        parquet.write_table(pa.table({"messages": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}: got no rows, expected at least one conversation"):
        ConversationStream(config(folder, tmp_path), processor, ranks=ranks)
    given = {"files": [str(tmp_path)], "images": str(folder), "format": "plain", "streaming": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"data": given}))
    assert main([str(tmp_path / "recipe.yaml")]) == 2
    assert f"data: {tmp_path / name}: got no rows" in capsys.readouterr().err


def test_every_part_of_a_stream_has_a_row(folder, processor, tmp_path):
    (tmp_path / "few.jsonl").write_text(f"{row(0)}\n{row(1)}\n{row(2)}")
    few = str(tmp_path / "few.jsonl")
    ConversationStream(config(folder, few), processor, ranks=3)
    with pytest.raises(
        DataError, match=r"few.jsonl: got 3 rows for 4 parts, expected at least one for each rank and w"
    ):
        ConversationStream(config(folder, few), processor, ranks=4)
    with pytest.raises(DataError, match="got 3 rows for 4 parts"):
        ConversationStream(config(folder, few, workers=2), processor, ranks=2)
    with pytest.raises(DataError, match="got 2 rows for 3 parts"):
        ConversationStream(config(folder, {"path": few, "limit": 2}), processor, ranks=3)
    ConversationStream(config(folder, few, "a.jsonl"), processor, ranks=4)  # the other source has a row for each
    weighted = [{"path": str(path), "weight": 1} for path in (few, folder / "a.jsonl")]
    with pytest.raises(DataError, match=r"few.jsonl: got 3 rows for 4 parts"):
        ConversationStream(config(folder, *weighted), processor, ranks=4)


def test_a_part_whose_rows_are_all_faulty_ends_a_stream_with_the_first_fault(folder, processor, tmp_path):
    (tmp_path / "data.jsonl").write_text(f"{row(0)}\n{{broken\n{row(1)}\n{{broken")
    stream = ConversationStream(config(folder, tmp_path / "data.jsonl"), processor, rank=1, ranks=2)
    with pytest.raises(DataError, match=r"no row without a fault in part 1 of 2: .*data.jsonl:1: broken JSON"):
        next(iter(stream))


@pytest.mark.parametrize("lines", ['{"id": 1}\n' * 9, "{broken\n"])
def test_a_source_without_a_good_row_is_refused_before_training(folder, processor, tmp_path, lines):
    (tmp_path / "data.jsonl").write_text(lines)
    with pytest.raises(DataError, match=r"data.jsonl: the first \d rows are all faulty"):
        ConversationStream(config(folder, tmp_path / "data.jsonl"), processor)
    with pytest.raises(DataError, match="no such file"):
        ConversationStream(config(folder, "none.jsonl"), processor)


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_images_inside_are_streamed_without_a_copy(folder, processor, tmp_path, monkeypatch, form):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.loads(row(number)) for number in range(4)]
    columns = {
        "image": [{"bytes": (folder / one["image"]).read_bytes(), "path": None} for one in rows],
        "conversations": [one["conversations"] for one in rows],
    }
    made = datasets.Dataset.from_dict(columns)
    made = made.cast(datasets.Features({**made.features, "image": datasets.Image()}))
    place = tmp_path / "org/set"
    place.mkdir(parents=True)
    if form == "saved":
        made.save_to_disk(place)
    else:
        made.to_parquet(place / "train.parquet")
    seen = set()
    for rank in range(2):
        stream = ConversationStream(config(folder, {"path": str(place)}), processor, rank=rank, ranks=2)
        seen |= {number_of(sample) for sample in islice(stream, 4)}
    assert seen == set(range(4))
    assert not list(tmp_path.glob("cache/**/*.arrow"))
