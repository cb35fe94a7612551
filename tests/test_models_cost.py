"""The cost model against torch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from models import StagePlan, run_decoder
from models.cost import live_cost, plan_cost, training_flops
from models.schedules import Dense, Fused, ShortV
from models.token_scorer import TokenScorer

LLAVA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


@pytest.mark.parametrize(
    "plan",
    [
        None,
        StagePlan(2, 4),
        StagePlan(2, 4, "kv"),
        StagePlan(layers=[0, 3, 5], update="kv"),
        ShortV((0, 2, 3)),
    ],
)
def test_flops_are_what_torch_counts(make_model, family, plan):
    decoder = make_model(family, attention="eager").model.language_model
    embeds, visual = torch.randn(1, 20, 32), torch.zeros(1, 20, dtype=torch.bool)
    visual[:, 3:13] = True
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        schedule = Fused(plan) if isinstance(plan, StagePlan) else plan or Dense()
        output = run_decoder(decoder, embeds, visual, schedule=schedule)
    counts = [len(live[0]) - 10 for live in output.live]
    kv = [schedule.update_at(layer) == "kv" for layer in range(6)]
    cost = live_cost(decoder.config, counts, text=10, kv=kv)
    rotary = sum(flops for name, flops in counter.get_flop_counts()["Global"].items()) - cost.flops
    assert rotary == 0
    if plan is None or isinstance(plan, StagePlan):
        assert plan_cost(decoder.config, plan, visual=10, text=10) == cost
    assert cost.token_layers == sum(len(live[0]) for live in output.live)


def test_a_scorer_s_flops_are_what_torch_counts():
    embeds, words = torch.randn(1, 20, 32), torch.arange(20)[None] < 9
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        TokenScorer(32)(embeds, words)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4)
    learned, diverse = (
        plan_cost(config, StagePlan(2, 4, keep={2: 0.5}, select=select), visual=11, text=9)
        for select in ("learned", "diversity")
    )
    assert learned.flops - diverse.flops == counter.get_total_flops()
    assert learned.token_layers == diverse.token_layers


def test_cache_bytes_are_what_the_cache_holds(make_model):
    decoder, plan = make_model("llama").model.language_model, StagePlan(2, 4)
    visual = torch.zeros(1, 20, dtype=torch.bool)
    visual[:, 3:13] = True
    with torch.no_grad():
        output = run_decoder(decoder, torch.randn(1, 20, 32), visual, schedule=Fused(plan), use_cache=True)
    held = sum(t.nbytes for layer in output.past_key_values.layers for t in (layer.keys, layer.values))
    assert plan_cost(decoder.config, plan, visual=10, text=10, bytes_per_value=4).cache_bytes == held


def test_a_window_of_half_the_layers_halves_vision():
    dense = plan_cost(LLAVA_7B, None, visual=576, text=64)
    fused = plan_cost(LLAVA_7B, StagePlan(8, 24), visual=576, text=64)
    assert fused.visual_token_layers * 2 == dense.visual_token_layers
    assert fused.vision_attention < dense.vision_attention


def test_training_takes_the_mean_of_its_plans_and_the_teachers_passes():
    flops = {"fast": 1.0, "dense": 4.0}
    assert training_flops(flops, {"dense": 1}, {}, passes=3) == 12
    assert training_flops(flops, {"fast": 3, "dense": 1}, {}, passes=2) == (3 * 2 + 8) / 4
    assert training_flops(flops, {"fast": 3, "dense": 1}, {"fast": "dense"}, passes=2) == (3 * (2 + 4) + 8) / 4
