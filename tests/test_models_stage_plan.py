import pytest

from models import StagePlan


def test_dict_round_trip_also_through_json_keys():
    plan = StagePlan(8, 24, keep={14: 10, 10: 215})
    assert plan.to_dict()["keep"] == {"10": 215, "14": 10}
    assert StagePlan.from_dict(plan.to_dict()) == plan


def test_hidrops_64_token_plan_means_64_tokens():
    plan = StagePlan(8, 24, keep={10: 215, 14: 10, 16: 5, 18: 1})
    counts = plan.visual_counts(576, 32)
    assert counts[7:11] == [0, 576, 576, 215]
    assert counts[23:25] == [1, 0]
    assert sum(counts) / 32 == 64.0  # arXiv 2602.23699 calls it Tok64


def test_vicas_published_list_is_a_plan():
    plan = StagePlan(layers=[0, 1, 7, 8, 9, 10, 11, 14], update="kv")
    assert [layer for layer, count in enumerate(plan.visual_counts(576, 32)) if count] == [0, 1, 7, 8, 9, 10, 11, 14]


def test_shares_count_the_samples_own_tokens():
    assert StagePlan(0, 4, keep={1: 0.5, 2: 0.25}).visual_counts(9, 5) == [9, 4, 2, 2, 0]


@pytest.mark.parametrize("select", ["diversity", "learned"])
def test_a_tenth_of_the_tokens_may_enter(select):
    plan = StagePlan(2, 4, keep={2: 0.1}, select=select)
    assert plan.visual_counts(576, 5) == [0, 0, 57, 57, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "stages.enter: got None"),
        ({"enter": -1, "exit": 2}, "stages.enter: got -1"),
        ({"enter": True, "exit": 2}, "stages.enter: got True"),
        ({"enter": 3, "exit": 3}, r"stages.exit: got 3, expected a layer after enter \(3\)"),
        ({"enter": 0, "exit": 2, "update": "half"}, "stages.update: got 'half', expected full or kv"),
        ({"layers": [1, 2]}, "stages.layers: got a list with update 'full'"),
        ({"layers": [2, 1], "update": "kv"}, "ascending"),
        ({"layers": [], "update": "kv"}, "at least one"),
        ({"layers": [1], "enter": 0, "update": "kv"}, "one or the other"),
        ({"enter": 1, "exit": 4, "keep": {1: 3}}, "stages.keep: got layer 1"),
        (
            {"enter": 1, "exit": 4, "keep": {1: 3}, "select": "chance"},
            "stages.select: got 'chance', expected attention or diversity or learned",
        ),
        (
            {"enter": 1, "exit": 4, "keep": {2: 3}, "gradient": True},
            "stages.gradient: got True, expected straight_through",
        ),
        ({"enter": 1, "exit": 4, "gradient": "straight_through"}, "stages.keep: got none with gradient: straight_thr"),
        ({"enter": 1, "exit": 4, "select": "learned"}, "stages.keep: got none with select: learned"),
        ({"enter": 1, "exit": 4, "select": "diversity"}, "stages.keep: got none with select: diversity"),
        (
            {"enter": 1, "exit": 4, "keep": {1: 3}, "select": "diversity", "gradient": "straight_through"},
            "stages.gradient: got 'straight_through' with select: diversity",
        ),
        ({"enter": 1, "exit": 4, "keep": {0: 3}, "select": "diversity"}, "stages.keep: got layer 0"),
        ({"enter": 1, "exit": 4, "keep": {4: 3}}, "stages.keep: got layer 4"),
        ({"enter": 1, "exit": 4, "keep": {2: 0}}, "stages.keep: got 2: 0"),
        ({"enter": 1, "exit": 4, "keep": {2: 9, "2": 3}}, "stages.keep: got layer 2 twice"),
        ({"enter": 1, "exit": 4, "keep": {"²": 3}}, "stages.keep: got '²': 3, expected"),
        ({"layers": 5, "update": "kv"}, "stages.layers: got 5, expected layer numbers"),
        ({"layers": {3: 1}, "update": "kv"}, "stages.layers: got {3: 1}, expected layer numbers"),
        ({"enter": 1, "exit": 4, "keep": {2: 1.5}}, "stages.keep: got 2: 1.5"),
        ({"enter": 1, "exit": 4, "keep": {2: 3, 3: 4}}, "growing"),
        ({"enter": 1, "exit": 4, "keep": [2]}, "stages.keep: got"),
        ({"enter": 1, "exit": 4, "stop": 4}, "stages.stop: unknown key, expected one of enter, exit"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        StagePlan.from_dict(fields)


@pytest.mark.parametrize("plan", [StagePlan(1, 7), StagePlan(layers=[1, 6], update="kv")])
def test_a_plan_beyond_the_decoder(plan):
    with pytest.raises(ValueError, match="beyond the decoder's 6 layers"):
        plan.check(6)
