"""Changed values against whole matrices of weights that are changed after the softmax."""

import pytest
import torch

from models import StagePlan, run_decoder
from models.live_tokens import LiveTokens
from models.schedule_base import Dense, Fused, Schedule
from models.value_remap import BoundValueRemap, ValueRemap

GROUPS, WIDTH = 2, 3


def mapped(visual, how):
    """Returns (B, S) int64: whose value a visual key brings."""
    own = torch.arange(visual.shape[1]).expand(visual.shape)
    first = visual.long().argmax(dim=1, keepdim=True).expand(visual.shape)
    return {"own": own, "none": torch.full_like(own, -1), "first": first, "odd": own.where(own % 2 == 1, -1)}[how]


def by_weights(weights, values, queries, visual, rule):
    """Returns one sample's output (G, L, d): weights (G, L, K) moved or lost after the softmax, key by key."""
    weights = weights.clone()
    for row, asks in enumerate(queries):
        brings = rule.visual if visual[asks] else rule.text
        if brings is None:
            continue
        before = weights[:, row].clone()
        for key in visual.nonzero().flatten().tolist():
            weights[:, row, key] -= before[:, key]
            if brings[key] >= 0:
                weights[:, row, brings[key]] += before[:, key]
    return weights @ values


@pytest.mark.parametrize("earlier", [0, 2])
@pytest.mark.parametrize("for_visual", ["own", "none", None, "same"])
@pytest.mark.parametrize("for_text", ["none", "first", "odd", None])
def test_changed_values_equal_changed_weights(for_text, for_visual, earlier):
    random = torch.Generator().manual_seed(0)
    visual = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
    live = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
    text = None if for_text is None else mapped(visual & live, for_text)
    rule = ValueRemap(text, text if for_visual == "same" else for_visual and mapped(visual, for_visual))
    rows = LiveTokens.of_mask(live, earlier)
    slots = rows.slots.masked_fill(~rows.valid, -1)
    copies = LiveTokens.of_mask(visual & live, earlier)
    rewritten = BoundValueRemap(rule, slots, visual & live, earlier, copies)
    size = earlier + slots.shape[1]
    keys, values, queries = (torch.randn(3, GROUPS, n, WIDTH, generator=random) for n in (size, size, size - earlier))
    used_keys, used_values = rewritten(keys, values)
    places = torch.cat([torch.arange(earlier).expand(3, -1), slots], dim=1)
    seen = places
    if rewritten.copies is not None:
        seen = torch.cat([places, copies.slots.masked_fill(~copies.valid, -1)], dim=1)
    allowed = (seen >= 0)[:, None] & (seen[:, None] <= rows.slots[..., None])
    if rewritten.copies is not None:
        allowed &= ~rewritten.hidden_from(rows, size)
    scores = (queries @ used_keys.transpose(2, 3)).masked_fill(~allowed[:, None], -torch.inf)
    output = scores.softmax(dim=-1) @ used_values
    for sample in range(3):
        count = int(rows.valid[sample].sum())
        whole = torch.zeros(2, GROUPS, count, earlier + 6)  # weights and values by place, dead ones included
        held = places[sample][: earlier + count]
        scores = queries[sample][:, :count] @ keys[sample][:, : earlier + count].transpose(1, 2)
        later = held[None] > rows.slots[sample][:count, None]
        whole[0][:, :, held] = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
        by_place = torch.zeros(GROUPS, earlier + 6, WIDTH).index_copy(1, held, values[sample][:, : earlier + count])
        shifted = ValueRemap(*(moved(brings, sample, earlier) for brings in (rule.text, rule.visual)))
        seen_as = torch.cat([torch.zeros(earlier, dtype=torch.bool), (visual & live)[sample]])
        expected = by_weights(whole[0], by_place, rows.slots[sample][:count].tolist(), seen_as, shifted)
        torch.testing.assert_close(output[sample][:, :count], expected)


def moved(brings, sample, earlier):
    if brings is None:
        return None
    own = brings[sample]
    return torch.cat([torch.full((earlier,), -1), own.where(own < 0, own + earlier)])


class Same(Schedule):
    """A plan whose rule, worked out in full, changes nothing."""

    def __init__(self, inner):
        self.inner, self.update = inner, inner.update

    def new_state(self):
        return self.inner.new_state()

    def live(self, view):
        return self.inner.live(view)

    def value_remap(self, view):
        return ValueRemap(mapped(view.visual_mask, "own"), mapped(view.visual_mask, "own"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("plan", [None, StagePlan(1, 4), StagePlan(layers=[0, 2, 5], update="kv")])
def test_a_rule_that_changes_nothing_changes_nothing(make_model, family, plan, attention):
    decoder = make_model(family, attention=attention).model.language_model
    visual = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1, 0]]).bool()
    mask = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
    embeds = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    schedule = Dense() if plan is None else Fused(plan)
    states = []
    for chosen in (schedule, Same(schedule)):
        with torch.no_grad():
            output = run_decoder(decoder, embeds, visual, attention_mask=mask, schedule=chosen, use_cache=True)
        states.append(output.last_hidden_state[(mask == 1) & ~visual])
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)


def test_keys_that_only_lend_bring_what_text_is_to_get():
    slots = torch.tensor([[1, 2, 0, 3], [2, -1, 0, 1]])  # visual columns first, as a `kv` layer puts them
    visual = torch.tensor([[False, True, True, False], [False, False, True, False]])
    keys, values = torch.randn(2, 2, GROUPS, 4, WIDTH).unbind()
    for how, columns in (("none", [-1, -1]), ("first", [0, 0]), ("own", [0, 1])):
        rewritten = BoundValueRemap(ValueRemap(mapped(visual, how), None), slots, visual, 0, copies=None)
        used_keys, used_values = rewritten(keys, values)
        assert rewritten.copies is None
        assert torch.equal(used_keys, keys)
        assert torch.equal(used_values[:, :, 2:], values[:, :, 2:])
        for column, source in enumerate(columns):
            expected = values[0, :, source] if source >= 0 else torch.zeros(GROUPS, WIDTH)
            assert torch.equal(used_values[0, :, column], expected)
