"""The penalty on attention that spreads over many visual tokens: what it changes, and what it does not."""

import json

import pytest

from recipes.errors import RecipeError
from recipes.schema import load_recipe
from train.preview import preview

RUN = {"max_steps": 6, "log_steps": 3, "scheduler": "constant"}


def log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def column(output, name):
    return [line[name] for line in log(output)]


@pytest.fixture
def measured(tiny_recipe, train_here):
    """Returns the run that only measures."""
    return train_here(tiny_recipe("measured", **RUN, sparse_attention={"weight": 0.0}))


def test_weight_0_only_measures(tiny_recipe, train_here, measured):
    plain = train_here(tiny_recipe("plain", **RUN))
    assert column(plain, "loss") == column(measured, "loss")
    assert column(plain, "grad_norm") == column(measured, "grad_norm")
    assert "attention_spread" not in log(plain)[0]
    assert 0.5 < column(measured, "attention_spread")[0] < 1


def test_the_penalty_lowers_the_spread_and_does_not_depend_on_accumulation(tiny_recipe, train_here, measured):
    penalised = [
        train_here(tiny_recipe(f"penalised{size}", **RUN, sparse_attention={"weight": 5.0}, per_device_batch=size))
        for size in (2, 4)
    ]
    for name in ("loss", "grad_norm", "attention_spread"):
        one, other = (column(output, name) for output in penalised)
        assert one == pytest.approx(other, rel=1e-4)
    assert column(penalised[0], "attention_spread")[-1] < column(measured, "attention_spread")[-1]


def test_a_check_counts_the_measure_and_a_wrong_weight_is_one_line(tmp_path):
    texts = []
    for more in ("null", "{weight: 0.1}"):
        options = ["align=null", f"train.sparse_attention={more}", f"output={tmp_path}"]
        recipe = load_recipe("recipes/quickstart.yaml", options)
        texts.append("\n".join(preview(recipe)))
    shares = [int(text.partition("FLOPs (")[2].partition("%")[0]) for text in texts]
    assert shares[0] + 1 <= shares[1] <= shares[0] + 4
    with pytest.raises(RecipeError, match=r"train\.sparse_attention\.weight: got -1\.0"):
        load_recipe("recipes/quickstart.yaml", ["train.sparse_attention={weight: -1.0}"])
