"""What a comparison measures beside scores: cache and memory, which follow from the live tokens. Nothing is timed."""

import pytest
from PIL import Image

from eval import measure
from eval.checkpoint import Checkpoint
from eval.live import costs_of, live_visual, text_tokens
from eval.prompts import VqaPrompt
from models.schedules import VTW, Dense, DivPrune, FastV, ShortV, SparseVLM, VisionZip


@pytest.fixture(scope="module")
def loaded(quickstart_run):
    checkpoint = Checkpoint.find(quickstart_run)
    model, processor = checkpoint.load()
    return checkpoint, model, checkpoint.prompt_encoder(processor)


@pytest.fixture(scope="module")
def asked():
    image = Image.new("RGB", (64, 64), "red")
    return [VqaPrompt("what is the red shape?", [image]), VqaPrompt("is it?", [image])]


SCHEDULES = (Dense(), VTW(3), FastV(2), DivPrune(), VisionZip(), SparseVLM((3, 4, 5)), ShortV((2, 4)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_the_cache_is_as_large_as_the_cost_model_says(loaded, asked, schedule):
    _, model, prompt_encoder = loaded
    inputs = prompt_encoder.batch(asked[:1])
    model.schedule = schedule
    schedule = model.schedule
    counts = live_visual(model, inputs, schedule)[:, 0].sum(dim=1).tolist()
    cost = costs_of(model, counts, text=text_tokens(model, inputs)[0], schedule=schedule, value=4)
    assert measure.cache_bytes(measure.prefill(model, inputs, schedule)) == cost.cache_bytes


def test_prefill_and_decode_steps_are_generates(loaded, asked):
    _, model, prompt_encoder = loaded
    inputs = prompt_encoder.batch(asked)
    cache = measure.prefill(model, inputs, None)
    before = cache.get_seq_length()
    measure.decode(model, inputs, cache, 3)
    assert cache.get_seq_length() == before + 3


def test_speeds_name_every_schedule_and_measure_memory(loaded, asked, monkeypatch):
    monkeypatch.setattr(measure, "REPEATS", 1)
    monkeypatch.setattr(measure, "STEPS", 2)
    checkpoint, model, prompt_encoder = loaded
    inputs = prompt_encoder.batch(asked * 20)
    found = measure.speeds(model, checkpoint.weights, inputs, {"dense": Dense(), "trained": None})
    assert list(found) == ["dense", "trained"]
    for figures in found.values():
        assert figures["prefill_seconds"] > 0
        assert figures["decode_tokens_per_second"] > 0
        assert figures["peak_bytes"] > inputs["pixel_values"].nbytes  # what the tower makes of them is larger
    assert found["trained"]["cache_bytes"] < found["dense"]["cache_bytes"]
    assert type(model.schedule).__name__ == "Fused"  # left as it was
