"""Steps by tokens: every sample once an epoch, passes of nearly equal size, and runs that resume exactly."""

import json
import random

import pytest
import torch

from data.token_batches import TokenBatches
from recipes.schema import load_recipe
from tests.test_train_checks import refused
from train.preview import preview
from train.samples import ShuffledSampler


def batches(samples=1000, tokens=4096, passes=4, longest=512, seed=0):
    lengths = [random.Random(seed + number).randint(1, longest) for number in range(samples)]
    return TokenBatches(ShuffledSampler(samples, seed=seed), lengths, tokens_per_step=tokens, passes=passes), lengths


@pytest.mark.parametrize(("samples", "tokens"), [(1000, 4096), (1000, 2048), (9, 4096), (3, 4096), (1, 2048)])
def test_every_sample_comes_once_an_epoch_and_every_pass_has_one(samples, tokens):
    order, _ = batches(samples, tokens)
    for epoch in (0, 1):
        order.set_epoch(epoch)
        passes = list(order)
        assert len(passes) == len(order) == 4 * order.steps
        assert all(passes)
        seen = [index for one in passes for index in one]
        assert set(seen) == set(range(samples))
        assert len(seen) == max(samples, 4)  # filled up where there are fewer than passes


def test_steps_and_passes_are_of_nearly_equal_token_count():
    order, lengths = batches()
    tokens = [sum(lengths[index] for index in one) for one in order]
    steps = [sum(tokens[start : start + 4]) for start in range(0, len(tokens), 4)]
    share = sum(lengths) / order.steps
    assert share <= 4096
    assert max(abs(step - share) for step in steps) <= 512
    spread = [max(tokens[start : start + 4]) - min(tokens[start : start + 4]) for start in range(0, len(tokens), 4)]
    assert max(spread) <= 512
    assert sum(spread) / len(spread) < 0.1 * 1024


def test_the_order_follows_from_seed_and_epoch_and_ranks_share_it():
    (first, _), (second, _) = batches(), batches()
    torch.manual_seed(3)
    order = list(first)
    torch.manual_seed(4)
    assert order == list(second)
    second.set_epoch(1)
    assert order != list(second)
    shares = [first.of_rank(rank, 2) for rank in (0, 1)]
    assert [len(share) for share in shares] == [len(order) // 2] * 2
    together = [one for both in zip(*shares, strict=True) for one in both]
    assert together == order


def packed_recipe(tiny_recipe, output, **train):
    recipe = tiny_recipe(output, tokens_per_step=256, **{"tracker": "none", "max_steps": None, **train})
    recipe["data"]["max_length"] = 128
    return recipe


def log(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    timed = ("mfu", "seconds", "eval_runtime")
    return [
        {key: value for key, value in line.items() if key not in timed and "per_second" not in key} for line in lines
    ]


def test_a_packed_run_sees_each_sample_once_an_epoch_and_resumes_exactly(train_here, tiny_recipe):
    section = {"files": tiny_recipe()["data"]["files"][:1], "every": 3}
    whole = train_here(packed_recipe(tiny_recipe, "packed", epochs=2) | {"eval": section})
    lines = [line for line in log(whole) if "loss" in line]
    assert lines[-1]["samples"] == 48
    assert len({line["samples"] for line in lines}) == len(lines) >= 6
    stopped = packed_recipe(tiny_recipe, "packed_stopped", epochs=2) | {"eval": section}
    assert not (train_here(stopped, stop_in=len(lines) // 2 + 1) / "final").exists()
    again = log(train_here(stopped))
    assert len(again) == len(log(whole))
    for found, expected in zip(again, log(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_what_a_token_budget_does_not_fit_is_refused():
    small = (
        "train.tokens_per_step: got 1023, expected at least 1024: 2 forward passes (global_batch / per_device_batch)"
    )
    assert refused("train.tokens_per_step=1023", "train.per_device_batch=16") == f"{small} of data.max_length 512"
    one = "train.tokens_per_step 4096, expected false"
    assert (
        refused("train.tokens_per_step=4096", "data.group_by_length=true")
        == f"data.group_by_length: got true with {one}"
    )
    told = refused("train.tokens_per_step=4096", "train.sparse_attention={weight: 0.1}")
    assert told.endswith(
        "train: got sparse_attention with tokens_per_step, expected null: it is a mean over global_batch"
    )
    assert refused("train.tokens_per_step=4096", "data.streaming=true", "eval=null").startswith(
        "data.streaming: got true"
    )


def test_check_says_how_many_steps_of_how_many_tokens(untrained):
    overrides = ["align=null", "train.tokens_per_step=131072", "data.group_by_length=false"]
    text = "\n".join(preview(load_recipe("recipes/llava_fused.yaml", overrides)))
    rows, length = 665_298, 576 + 256
    assert f"  steps: {-(-rows * length // 131072):,} of 131,072 tokens" in text
    tokens = int(text.partition("the run: ")[2].split(" tokens")[0].replace(",", ""))
    assert tokens == pytest.approx(rows * length, rel=0.01)
