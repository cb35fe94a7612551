"""The published numbers of the baselines that choose before the decoder or merge tokens, and what they refuse."""

import functools

import pytest
import torch

from models import FusedAutoModel, StagePlan, run_decoder
from models.image_tokens import ImageTokens
from models.schedules import CDPruner, DivPrune, Fused, ScheduleError, ShortV, SparseVLM, VisionZip, Within
from tests.slow_reference import SlowDecoder
from tests.tiny_vlms import IMAGE, PAD, TINY

N = 576  # visual tokens of LLaVA-1.5


@functools.cache
def ours(name):
    """Returns the fused model with the weights of Hugging Face's."""
    model = FusedAutoModel.from_config(TINY[name].config())
    model.load_state_dict(TINY[name].hugging_face().state_dict(), strict=True)
    return model.eval()


def visual_counts(model, schedule, **more):
    """Returns the live visual tokens of each layer for a prompt with 576 of them."""
    visual = torch.zeros(1, N + 12, dtype=torch.bool)
    visual[0, 5 : 5 + N] = True
    embeds = torch.randn(1, N + 12, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = run_decoder(model.model.language_model, embeds, visual, schedule=schedule, **more)
    return [len(live[0]) - 12 for live in output.live]


@pytest.mark.parametrize(
    ("tokens", "counts"),
    [((300, 200, 110), (309, 204, 113)), ((303, 110, 36), (312, 117, 39)), ((66, 30, 17), (82, 32, 18))],
)
def test_sparsevlm_keeps_and_merges_as_many_as_published(make_model, tokens, counts):
    found = visual_counts(make_model(), SparseVLM((1, 3, 4), tokens))
    assert found == [N, counts[0], counts[0], counts[1], counts[2], counts[2]]


def test_divprune_and_cdpruner_keep_as_many_as_published(make_model):
    assert visual_counts(make_model(), DivPrune()) == [56] * 6
    assert visual_counts(make_model(), DivPrune(0.222)) == [128] * 6
    relevance = torch.rand(1, N + 12, generator=torch.Generator().manual_seed(1))
    assert visual_counts(make_model(), CDPruner(), relevance=relevance) == [64] * 6


@pytest.mark.parametrize(("settings", "step"), [((54, 10), 52), ((108, 20), 23), ((162, 30), 13)])
def test_visionzip_keeps_the_published_numbers_and_strides(settings, step):
    random = torch.Generator().manual_seed(0)
    attention = torch.rand(2, N, generator=random)
    hidden, keys = (torch.randn(2, N + 1, 8, generator=random) for _ in range(2))
    kept, states = VisionZip(*settings).zipped(ImageTokens(hidden, attention, keys, lambda tokens: tokens, False))
    assert kept.sum(dim=1).tolist() == [sum(settings)] * 2
    for image in range(2):
        best = set(attention[image].topk(settings[0] - 1).indices.tolist())
        rest = [patch for patch in range(N) if patch not in best]
        targets = rest[::step][: settings[1]]
        assert set(kept[image].nonzero().flatten().tolist()) == best | set(targets) | {rest[1]}
        for patch in best:
            assert torch.equal(states[image, patch], hidden[image, patch + 1])
        assert torch.equal(states[image, rest[1]], hidden[image, 0])  # the class token
        assert not torch.equal(states[image, targets[0]], hidden[image, targets[0] + 1])
    whole, _ = VisionZip(*settings).zipped(ImageTokens(hidden, attention, keys, lambda tokens: tokens, True))
    assert whole[:, 0].all()  # it has a place
    assert whole.sum(dim=1).tolist() == [sum(settings)] * 2


def test_visionzip_refuses_other_towers_in_one_line():
    for name in ("qwen2_5_vl", "mobilevlm", "llava_next"):
        with pytest.raises(
            ScheduleError, match=rf"VisionZip: got a {name} with .* tower, expected a LLaVA with a CLIP"
        ):
            ours(name).schedule = "visionzip"
    with pytest.raises(ScheduleError, match="VisionZip: got a qwen2_vl"):
        ours("qwen2_vl").resolve(Within(StagePlan(1, 3), VisionZip()))


def test_visionzip_follows_beams_and_encoded_images():
    model, schedule = ours("llava"), VisionZip(288, 144)
    batch = TINY["llava"].batch("tItIt", "ttItttt", side="left")
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": PAD, "bad_words_ids": [[IMAGE]]}
    options |= {"schedule": schedule, "num_beams": 2, "do_sample": False}
    beams = model.generate(**batch, **options)
    one = {"input_ids": batch["input_ids"][1:], "attention_mask": batch["attention_mask"][1:]}
    alone = model.generate(**one, pixel_values=batch["pixel_values"][2:], **options)
    assert torch.equal(beams[1], alone[0])
    features = model.model.get_image_features(batch["pixel_values"], return_dict=True)
    rest = {key: value for key, value in batch.items() if key != "pixel_values"}
    with pytest.raises(ScheduleError, match="mm_encoder_outputs: got no hidden_states"):
        model(**rest, mm_encoder_outputs={"image": features}, schedule=schedule)


def test_cdpruner_says_that_the_text_tower_is_missing():
    batch = TINY["llava"].batch("tItt")
    with pytest.raises(ScheduleError, match="CDPruner: got a checkpoint without a text tower") as raised:
        ours("llava")(**batch, schedule="cdpruner")
    assert len(str(raised.value).splitlines()) == 1
    assert ours("llava")(**TINY["llava"].batch("ttt"), schedule="cdpruner").logits.isfinite().all()  # no image


def test_cdpruner_takes_what_is_least_like_the_question_first():
    batch = TINY["llava"].batch("tItt")
    visual = batch["input_ids"] == IMAGE
    relevance = torch.tensor([[0.0, 0.3, -0.1, -0.7, 0.2, 0.0, 0.0]])
    least = int(relevance.masked_fill(~visual, 9.0).argmin())
    with torch.no_grad():
        output = ours("llava")(**batch, schedule=CDPruner(144), relevance=relevance)  # one of four tokens
    assert [place for place in output.live[0][0].tolist() if visual[0, place]] == [least]


def test_shortv_leaves_visual_states_alone_and_text_reads_them(make_model, make_batch):
    model, batch = make_model(), make_batch("ttItttt")
    frozen = ShortV(tuple(range(6)))
    with torch.no_grad():
        assert not torch.equal(model(**batch, schedule=frozen).logits, model(**batch, schedule="dense").logits)
        kv = Fused(StagePlan(layers=list(range(6)), update="kv"))  # features that no layer ever changed
        torch.testing.assert_close(
            model(**batch, schedule=frozen).logits[:, -1], model(**batch, schedule=kv).logits[:, -1]
        )


@pytest.mark.parametrize("schedule", [DivPrune(0.5), SparseVLM((2, 4), (320, 144)), VisionZip(288, 144), ShortV((3,))])
@pytest.mark.parametrize(
    ("plan", "seeing"),
    [
        (StagePlan(2, 5), [2, 3, 4]),
        (StagePlan(1, 5, keep={3: 2}), [1, 2, 3, 4]),
        (StagePlan(layers=[0, 2, 3, 5], update="kv"), [0, 2, 3, 5]),
    ],
)
def test_a_baseline_prunes_inside_a_trained_plan(schedule, plan, seeing):
    layouts = ("ttIttt", "tItIttt")
    batch = TINY["llava"].batch(*layouts, side="left")
    with torch.no_grad():
        output = ours("llava")(**batch, schedule=Within(plan, schedule))
        one = {"input_ids": batch["input_ids"][1:], "attention_mask": batch["attention_mask"][1:]}
        alone = ours("llava")(**one, pixel_values=batch["pixel_values"][1:], schedule=Within(plan, schedule))
    visual = [int((batch["input_ids"][sample] == IMAGE).sum()) for sample in range(2)]
    text = [int(batch["attention_mask"][sample].sum()) - visual[sample] for sample in range(2)]
    for layer, live in enumerate(output.live):
        counts = [len(live[sample]) - text[sample] for sample in range(2)]
        assert all(0 < count <= visual[sample] for sample, count in enumerate(counts)) == (layer in seeing)
    torch.testing.assert_close(output.logits[1, -1], alone.logits[0, -1], rtol=1e-4, atol=2e-4)
    with torch.no_grad():
        planned = ours("llava")(**batch, schedule=Fused(plan)).logits[:, -1]
    changes = not (isinstance(schedule, ShortV) and plan.update == "kv")  # a state that no layer changes, skipped
    assert torch.allclose(output.logits[:, -1], planned, atol=1e-3) != changes


@pytest.mark.parametrize(
    "schedule",
    [
        DivPrune(0.5, renumber=True),
        CDPruner(288, renumber=True),
        VisionZip(288, 144, renumber=True),
        SparseVLM((2, 4), (320, 144), renumber=True),
    ],
)
def test_positions_may_be_renumbered_as_in_the_released_code(schedule):
    batch = TINY["llava"].batch("ttItItt")
    batch["relevance"] = torch.linspace(0, 1, batch["input_ids"].shape[1])[None]
    expected, places = SlowDecoder(TINY["llava"].hugging_face("eager"), batch).run(schedule)
    with torch.no_grad():
        output = ours("llava")(**batch, schedule=schedule)
    assert [live[0].tolist() for live in output.live] == places
    text = batch["input_ids"][0] != IMAGE
    torch.testing.assert_close(output.logits[0][text], expected[text], rtol=1e-4, atol=2e-4)
    with pytest.raises(ValueError, match="which renumbers positions, expected renumber=False"):
        ours("qwen2_vl")(**TINY["qwen2_vl"].batch("ttItt"), schedule=DivPrune(0.5, renumber=True))


def test_tokens_that_a_plan_sets_aside_are_merged_as_they_are():
    """Under the `kv` update a visual token stays its projected feature; one recycled token is its own mean."""
    seen = []

    class Watched(SparseVLM):
        def visual_states(self, view):
            states = super().visual_states(view)
            if states is not None:
                seen.append((view, states))
            return states

    schedule = Within(StagePlan(layers=[0, 2, 3, 5], update="kv"), Watched((2, 4), (320, 144)))
    with torch.no_grad():
        ours("llava")(**TINY["llava"].batch("ttItttt"), schedule=schedule)
    assert [view.layer for view, _ in seen] == [2, 5]
    for view, states in seen:
        assert torch.equal(states[view.visual_mask], view.embeddings[view.visual_mask])


def test_a_schedule_that_merges_everything_into_little_changes_what_follows():
    batch = TINY["llava"].batch("ttItttt")
    with torch.no_grad():
        dense = ours("llava")(**batch).logits[0, -1]
        for schedule in (VisionZip(288, 144), SparseVLM((2, 4), (320, 144))):
            assert (ours("llava")(**batch, schedule=schedule).logits[0, -1] - dense).abs().max() > 1e-2
