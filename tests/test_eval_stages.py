"""The stage analysis against slow references, and on models whose stages are known by construction."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from transformers import AutoConfig, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from data.chat import IGNORE_INDEX
from data.config import DataConfig
from data.dataset import ConversationDataset
from data.processor import VisionProcessor
from data.rows import RowError
from eval import stages
from eval.live import live_visual
from eval.prompts import PromptEncoder
from eval.significance import RESAMPLES
from eval.stage_analysis.probes import (
    Firing,
    LayerMeasurements,
    answered,
    firing_of,
    firings,
    knocked_out,
    most_attended,
    narrowed,
)
from eval.stage_analysis.report import draw_stages, record_of, report_of
from eval.stage_analysis.samples import (
    Batch,
    ProbeBatcher,
    Sample,
    SamplesError,
    file_samples,
    question_and_answer,
    spaced,
)
from eval.stage_analysis.search import Analysis, Prefix, Trials, needs_vision, propose, side_intervals
from models import FusedAutoModel, FusedLlavaConfig, FusedLlavaForConditionalGeneration, StagePlan
from models.schedules import Dense, Fused, Within, plan_schedule, published
from recipes.schema import load_recipe
from tests.conftest import IMAGE, LAYERS, QUICKSTART, merged_inputs
from tests.tiny_vlms import TINY

LAYOUTS = ("tttItttt", "ItIttttt", "tIttt")  # one image, two, short; each ends with an answer of two tokens
RANGES = {"first": range(1), "shallow": range(3), "deep": range(3, 6), "middle": range(2, 4), "odd": (1, 3, 5)}


@pytest.fixture(autouse=True)
def small_and_without_gradients():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models of this size spend their time on waking others
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def probed(model, rows):
    """Returns the rows of make_batch as the probes' batch: the last two tokens are the answer."""
    labels = torch.full_like(rows["input_ids"], IGNORE_INDEX)
    labels[:, -2:] = rows["input_ids"][:, -2:]
    return Batch.of(model, rows, labels)


def singles(rows):
    """Yields each row of a left-padded batch alone, unpadded."""
    first = 0
    for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True):
        own = ids[mask.bool()][None]
        images = int((own == IMAGE).sum()) // 4
        pixels = rows["pixel_values"][first : first + images]
        first += images
        yield {"input_ids": own, "attention_mask": torch.ones_like(own), "pixel_values": pixels}


def hugging_face(model):
    """Returns Hugging Face's own LLaVA with the same weights, under eager attention."""
    fields = model.config.to_dict()
    for name in ("model_type", "stages"):
        fields.pop(name)
    twin = LlavaForConditionalGeneration(LlavaConfig(**fields, attn_implementation="eager")).eval()
    twin.load_state_dict(model.state_dict())
    return twin


# -- knock-outs ---------------------------------------------------------------------------------------------------


def knocked_out_reference(model, rows, layers):
    """Returns the last hidden states (1, S, D) of an unpadded sample: every layer under an explicit 4-D mask."""
    decoder = model.model.language_model
    hidden, visual = merged_inputs(model, rows)
    size = hidden.shape[1]
    positions = torch.arange(size)[None]
    rotary = decoder.rotary_emb(hidden, positions)
    queries, keys = torch.arange(size)[:, None], torch.arange(size)[None]
    windows = getattr(decoder.config, "layer_types", None)
    for number, layer in enumerate(decoder.layers):
        allowed = keys <= queries
        window = getattr(decoder.config, "sliding_window", None)
        if window is not None and (windows is None or windows[number] == "sliding_attention"):
            allowed = allowed & (queries - keys < window)
        if number in layers:
            allowed = allowed & ~(visual[0][None, :] & ~visual[0][:, None])
        mask = torch.zeros(1, 1, size, size).masked_fill(~allowed, torch.finfo(torch.float32).min)
        hidden = layer(hidden, mask, positions, None, False, rotary)
    return decoder.norm(hidden)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", RANGES.values(), ids=RANGES)
def test_a_knockout_is_an_explicit_mask_in_its_layers(make_model, make_batch, family, layers, attention):
    model = make_model(family, attention=attention)
    rows = make_batch(*LAYOUTS, side="left")
    batch = probed(model, rows)
    found = batch.run(model, knocked_out(None, layers)).last_hidden_state
    for number, single in enumerate(singles(rows)):
        expected = knocked_out_reference(model, single, layers)
        text = (single["input_ids"] != IMAGE)[0]
        got = found[number, -len(text) :]
        torch.testing.assert_close(got[text], expected[0, text], atol=2e-4, rtol=1e-3)
    live = batch.run(model, knocked_out(None, layers)).live
    assert [len(layer[0]) for layer in live] == [7 if set(range(at, LAYERS)) <= set(layers) else 11 for at in range(6)]
    dense = batch.run(model, Dense()).last_hidden_state
    assert not torch.allclose(found[batch.ends], dense[batch.ends], atol=1e-2)


@pytest.mark.parametrize("plan", [{"enter": 1, "exit": 5}, {"enter": 1, "exit": 5, "update": "kv"}])
def test_inside_a_plan_masking_the_deep_part_is_removing_it_and_of_kv_any_part(make_model, make_batch, plan):
    model, plan = make_model(), StagePlan.from_dict(plan)
    batch = probed(model, make_batch(*LAYOUTS, side="left"))

    def ends(schedule):
        return batch.run(model, schedule).last_hidden_state[batch.predicts]

    for layer in range(2, 5):
        torch.testing.assert_close(ends(knocked_out(plan, range(layer, 6))), ends(Fused(narrowed(plan, 0, layer))))
    masked, removed = ends(knocked_out(plan, range(3))), ends(Fused(narrowed(plan, 3, 6)))
    assert torch.allclose(masked, removed, atol=1e-5) == (plan.update == "kv")
    torch.testing.assert_close(ends(knocked_out(plan, (0, 5))), ends(Fused(plan)))


@pytest.mark.parametrize("plan", [None, {"enter": 1, "exit": 5}, {"layers": [1, 2, 4], "update": "kv"}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_knockouts_that_share_a_prefix_are_those_that_run_whole(make_model, make_batch, family, plan, side):
    model, plan = make_model(family), None if plan is None else StagePlan.from_dict(plan)
    rows = make_batch("tttItttt", "tItttt", "ttIIttttt", side=side)
    labels = torch.full_like(rows["input_ids"], IGNORE_INDEX)
    for number, length in enumerate(rows["attention_mask"].sum(dim=1).tolist()):
        end = labels.shape[1] if side == "left" else length
        labels[number, end - 2 : end] = rows["input_ids"][number, end - 2 : end]
    batch = Batch.of(model, rows, labels)
    assert Prefix.can_share(model, batch, plan)
    prefix = Prefix(model, batch, plan)
    for layers in [(), *RANGES.values(), range(LAYERS)]:  # later ones must not see what earlier ones left
        expected = batch.predicting(model, knocked_out(plan, layers))
        torch.testing.assert_close(prefix.predicting(layers), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_every_family_shares_a_prefix_or_runs_whole(name):
    model = FusedAutoModel.from_config(TINY[name].config())
    model.load_state_dict(TINY[name].hugging_face().state_dict())
    rows = TINY[name].batch("tttItttt", "tIttt", side="left")
    labels = torch.full_like(rows["input_ids"], IGNORE_INDEX)
    labels[:, -2:] = rows["input_ids"][:, -2:]
    batch = Batch.of(model.eval(), rows, labels)
    if not Prefix.can_share(model, batch, None):
        assert name.startswith(("molmo2", "ovis2"))  # see MARK_IS_IMAGE
        return
    prefix = Prefix(model, batch, None)
    for layers in (range(2), range(2, 6)):
        expected = batch.predicting(model, knocked_out(None, layers))
        torch.testing.assert_close(prefix.predicting(layers), expected, atol=2e-4, rtol=1e-3)


def test_a_prefix_is_not_shared_where_text_in_it_would_differ(make_model, make_batch):
    model = make_model()
    one, two = (probed(model, make_batch(layout, side="left")) for layout in ("tItttt", "tItItttt"))
    assert Prefix.can_share(model, one, None)
    assert not Prefix.can_share(model, two, None)  # the text between two images sees the first
    assert not Prefix.can_share(model, one, StagePlan(1, 5, keep={2: 2}))  # its tokens are chosen by the text behind
    assert Prefix.can_share(model, one, StagePlan(1, 5))


def test_an_answer_is_right_when_greedy_decoding_would_write_it(make_model, make_batch):
    model, right = make_model(), []
    rows = make_batch(*LAYOUTS, side="left")
    whole = probed(model, rows)
    prompt = {"input_ids": rows["input_ids"][:, :-2], "attention_mask": rows["attention_mask"][:, :-2]}
    for schedule in (Dense(), Fused(StagePlan(2, 4))):
        model.schedule = schedule
        written = model.generate(
            **prompt, pixel_values=rows["pixel_values"], max_new_tokens=2, do_sample=False, eos_token_id=None,
            pad_token_id=59, bad_words_ids=[[IMAGE]],
        )[:, -2:]  # fmt: skip
        model.schedule = None
        answers = rows["input_ids"].clone()
        answers[:, -2:] = written
        answers[0, -1] = (written[0, -1] + 1) % 40
        batch = probed(model, {**rows, "input_ids": answers})
        right.append(answered(model, batch, batch.predicting(model, schedule)))
    assert right == [[False, True, True]] * 2
    assert whole.ends.sum(dim=1).tolist() == [1, 1, 1]
    assert whole.text_tokens == [7, 6, 4]


def test_a_plan_is_narrowed_by_its_kind():
    pyramid = StagePlan(1, 6, keep={2: 3, 4: 1})
    assert narrowed(None, 2, 4) == StagePlan(2, 4)
    assert narrowed(pyramid, 2, 5) == StagePlan(2, 5, keep={4: 1})
    assert narrowed(pyramid, 0, 4) == StagePlan(1, 4, keep={2: 3})
    listed = StagePlan(layers=[0, 2, 5], update="kv", keep={2: 2, 5: 1})
    assert narrowed(listed, 1, 6) == StagePlan(layers=[2, 5], update="kv", keep={5: 1})
    assert narrowed(listed, 3, 5) is None
    assert narrowed(StagePlan(2, 4), 4, 6) is None
    learned = StagePlan(1, 6, keep={1: 0.5, 4: 1}, select="learned")
    assert narrowed(learned, 0, 4) == StagePlan(1, 4, keep={1: 0.5}, select="learned")
    assert narrowed(learned, 3, 6) == StagePlan(3, 6, keep={3: 0.5, 4: 1}, select="learned")
    trained = StagePlan(1, 6, keep={4: 1}, gradient="straight_through")
    assert narrowed(trained, 0, 4) == StagePlan(1, 4)


# -- what layers show ---------------------------------------------------------------------------------------------


def insight_of(model, rows, plan=None):
    found = LayerMeasurements(model, plan)
    found.add(probed(model, rows))
    return found.found


def test_lens_attention_and_values_are_what_hugging_face_shows(make_model, make_batch):
    model = make_model()
    twin = hugging_face(model)
    decoder = twin.model.language_model
    rows = make_batch(*LAYOUTS, side="left")
    found = insight_of(model, rows)
    for number, single in enumerate(singles(rows)):
        shown = twin(**single, output_hidden_states=True, output_attentions=True)
        ids = single["input_ids"][0]
        visual, end = ids == IMAGE, len(ids) - 3
        asking = (~visual & (visual.cumsum(0) > 0)).nonzero().flatten()
        asking = asking[asking <= end]
        before = None
        for layer in range(LAYERS):
            after = shown.hidden_states[layer + 1][0, end]
            after = after if layer == LAYERS - 1 else decoder.norm(after)  # Hugging Face's last one is normed
            odds = twin.lm_head(after).softmax(-1)
            expected = {
                "lens_probability": odds[ids[-2]],
                "lens_rank": 1 + (odds > odds[ids[-2]]).sum(),
                "lens_entropy": torch.special.entr(odds).sum(),
            }
            paid = shown.attentions[layer][0].mean(0)[:, visual]
            last, text = paid[end], paid[asking].mean(0)
            normed = decoder.layers[layer].input_layernorm(shown.hidden_states[layer][0, visual])
            norms = decoder.layers[layer].self_attn.v_proj(normed).abs().sum(1)
            sinks = torch.zeros_like(text).bool()
            sinks[text.argmax()] = True  # a tenth of 4 or 8, rounded up
            expected |= {"share_last": last.sum(), "share_text": text.sum()}
            expected |= {"sink_value": norms[sinks].mean(), "other_value": norms[~sinks].mean()}
            if before is not None:
                for name, now, then in (("change_last", last, before[0]), ("change_text", text, before[1])):
                    expected[name] = 1 - now @ then / (now.norm() * then.norm())
            before = last, text
            for name, value in expected.items():
                got = found[name][number, layer]
                torch.testing.assert_close(got, value.float(), atol=1e-4, rtol=1e-3, msg=f"{name}, layer {layer}")


@pytest.mark.parametrize("plan", [None, {"enter": 2, "exit": 4}, {"layers": [1, 2, 4], "update": "kv"}])
def test_a_padded_batch_shows_what_each_sample_shows_alone(make_model, make_batch, plan):
    model = make_model("qwen3")
    plan = None if plan is None else StagePlan.from_dict(plan)
    rows = make_batch(*LAYOUTS, side="left")
    together = insight_of(model, rows, plan)
    for number, single in enumerate(singles(rows)):
        for name, values in insight_of(model, single, plan).items():
            torch.testing.assert_close(together[name][number], values[0], atol=1e-4, rtol=1e-3, equal_nan=True)
    if plan is not None:
        seen = [plan.sees(layer) for layer in range(LAYERS)]
        follows = [now and before for before, now in zip([False, *seen], seen, strict=False)]
        assert (~together["share_last"][0].isnan()).tolist() == seen
        assert (~together["change_last"][0].isnan()).tolist() == follows
        assert not together["lens_rank"].isnan().any()


def test_sinks_are_the_tenth_that_text_attends_to_most():
    attention = torch.arange(30.0).expand(2, -1)
    live = torch.ones(2, 30, dtype=torch.bool)
    live[1, 5:] = False
    assert [row.nonzero().flatten().tolist() for row in most_attended(attention, live)] == [[27, 28, 29], [4]]


@pytest.mark.parametrize("plan", [None, StagePlan(1, 5)])
def test_visipruner_fires_where_its_live_tokens_say(make_model, make_batch, plan, monkeypatch):
    model = make_model()
    rows = make_batch(*LAYOUTS, side="left")
    pruner = replace(published("visipruner", LAYERS), layer_threshold=0.9, token_threshold=0.6)  # which these meet
    monkeypatch.setattr("eval.stage_analysis.probes.published", lambda *_: pruner)
    found = firings(model, probed(model, rows), plan)
    for one, single in zip(found, singles(rows), strict=True):
        prompt = {"input_ids": single["input_ids"][:, :-2], "pixel_values": single["pixel_values"]}
        live = live_visual(model, prompt, pruner if plan is None else Within(plan, pruner))
        counts = live.sum(dim=(1, 2)).tolist()
        full = int((single["input_ids"] == IMAGE).sum())
        own = [full if plan is None or plan.sees(layer) else 0 for layer in range(LAYERS)]
        assert one == firing_of(counts, own)
    assert any(one.fusion is not None for one in found)


def test_a_plans_own_exit_is_not_visipruners():
    assert firing_of([4, 4, 2, 2, 0, 0], [4] * 6) == Firing(1, 2, 4)
    assert firing_of([0, 4, 4, 4, 0, 0], [0, 4, 4, 4, 0, 0]) == Firing(None, None, None)
    assert firing_of([0, 4, 4, 1, 0, 0], [0, 4, 4, 4, 0, 0]) == Firing(2, 1, None)
    assert firing_of([4, 4, 0, 0], [4] * 4) == Firing(1, 0, 2)


# -- the search ---------------------------------------------------------------------------------------------------


def searched(is_right, depth=6, samples=100, tolerance=2.0, plan=None, intervals=False):
    """Returns the proposal of a model that answers right where `is_right(sample, layers with vision)`.

    Or the intervals of its sides.
    """
    trials = Trials(plan, depth)
    trials.groups = [str(sample) for sample in range(samples)]

    def run(several):
        for trial in several:
            hidden = set(trial[1:]) if trial[0] == "masked" else set(range(depth)) - set(range(*trial[1:]))
            seen = set(trials.seeing) - hidden
            trials.right[trial] = [is_right(sample, seen) for sample in range(samples)]

    run(trials.sweep(1))
    if intervals:
        return side_intervals(trials, tolerance)
    return propose(trials, tolerance, run) if needs_vision(trials, tolerance) else None


def test_both_sides_together_may_need_a_wider_window():
    found = searched(lambda _, seen: 2 in seen and bool(seen & {1, 4}))
    assert (found.first, found.enter, found.exit, found.is_widened) == ((2, 3), 1, 3, True)


def test_where_either_side_can_do_without_the_middle_the_narrower_is_taken():
    found = searched(lambda _, seen: 0 in seen or {3, 5} <= seen)
    assert (found.crossed, found.enter, found.exit, found.is_widened) == (True, 0, 1, False)


def test_losses_within_the_tolerance_are_taken_with_their_error():
    one = searched(lambda sample, seen: {2, 3} <= seen and (sample != 0 or 1 in seen))
    assert (one.enter, one.exit) == (2, 4)  # 1 point and its error of 1
    two = searched(lambda sample, seen: {2, 3} <= seen and (sample > 1 or 1 in seen))
    assert (two.enter, two.exit) == (1, 4)  # 2 points and their error


def test_the_sides_of_a_window_have_intervals_over_images():
    def sharp(_, seen):
        return {2, 3} <= seen

    def fuzzy(sample, seen):  # two samples need layer 1 too, four need layer 4
        return {2, 3} <= seen and (sample % 50 != 7 or 1 in seen) and (sample % 50 not in (9, 11) or 4 in seen)

    found = searched(sharp, intervals=True)
    assert (found.enter, found.exit) == ((2, 2), (4, 4))
    found = searched(fuzzy, intervals=True)
    assert (found.enter, found.exit) == ((1, 2), (4, 5))
    assert searched(fuzzy, tolerance=20.0, intervals=True).exit == (4, 4)


def test_intervals_are_what_a_bootstrap_by_hand_gives():
    random = np.random.default_rng(5)
    trials = Trials(None, 4)
    trials.groups = [str(number // 3) for number in range(60)]
    for trial in trials.sweep(1):
        hidden = len(trial) - 1
        trials.right[trial] = [bool(random.random() > 0.02 * hidden) for _ in range(60)]
    trials.right[trials.whole] = [True] * 60
    draws = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), RESAMPLES)[:300]
    enters, leaves = [], []
    for draw in draws:
        places = [3 * image + part for image in range(20) for _ in range(draw[image]) for part in range(3)]
        groups = [f"{place}" for place in range(len(places) // 3) for _ in range(3)]
        resampled = Trials(None, 4)
        resampled.groups = groups
        resampled.right = {trial: [right[place] for place in places] for trial, right in trials.right.items()}
        holds = {trial: resampled.result(trial).costs_at_most(4.0) for trial in resampled.right}
        enters.append(max((layer for layer in range(1, 5) if holds[trials.masked_outside(layer, 4)]), default=0))
        leaves.append(min((layer for layer in range(4) if holds[trials.masked_outside(0, layer)]), default=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.stage_analysis.search.RESAMPLES", 300)
        found = side_intervals(trials, 4.0)
    expected = [
        tuple(np.quantile(side, [0.025, 0.975], method="inverted_cdf").astype(int).tolist())
        for side in (enters, leaves)
    ]
    assert [found.enter, found.exit] == expected
    assert found.enter[0] < found.enter[1]


def test_a_task_that_needs_no_image_has_no_window():
    assert searched(lambda sample, _: sample % 2 == 0) is None
    assert searched(lambda sample, seen: sample > 2 or bool(seen), tolerance=1.0) is None  # 3 points, error 1.7
    assert searched(lambda sample, seen: sample > 4 or bool(seen), tolerance=1.0) is not None


def test_samples_are_spaced_over_the_task():
    assert spaced(9, 3) == [0, 3, 6]
    assert spaced(2, 5) == [0, 1]


# -- whole runs ---------------------------------------------------------------------------------------------------

COLOURS, SHAPES = ("red", "green", "blue"), ("circle", "rectangle", "triangle")
QUESTIONS = ("what color is it?", "what shape is it?")
KINDS, DELIVERED, END = (6, 7), (8, 9), 16  # channels of the hidden state


def tiny_processor():
    processor = AutoProcessor.from_pretrained(QUICKSTART)
    processor.patch_size = 4
    processor.image_processor.size = {"shortest_edge": 8}
    processor.image_processor.crop_size = {"height": 8, "width": 8}
    return processor


def tiny_model(plan=None):
    fields = AutoConfig.from_pretrained(QUICKSTART).to_dict()
    fields.pop("model_type")
    fields["text_config"] |= {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 64}
    fields["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    fields["vision_config"] |= {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 32}
    torch.manual_seed(0)
    config = FusedLlavaConfig(**{**fields, "stages": plan, "image_seq_length": 4})
    return FusedLlavaForConditionalGeneration(config).eval()


def picture(colour, shape):
    """Nine images that differ: what they show does not matter, only that they can be told apart."""
    return Image.new("RGB", (8, 8), (40 + 80 * colour, 220 - 70 * shape, 60 + 40 * (colour * shape)))


def pictured_samples():
    """Returns 18 questions about 9 images; half of the answers are colours, half shapes."""
    found = []
    for colour in range(3):
        for shape in range(3):
            for question, answer in zip(QUESTIONS, (COLOURS[colour], SHAPES[shape]), strict=True):
                name = f"{colour}{shape}"
                turns = question_and_answer(question, answer)
                found.append(Sample(name + question, [picture(colour, shape)], turns, name))
    return found


def write_task(folder, repeats=4):
    """Writes the samples as a LLaVA-format file; returns its path."""
    rows = []
    for sample in pictured_samples() * repeats:
        sample.images[0].save(folder / f"{sample.group}.png")
        turns = [{"from": turn.role, "value": turn.text} for turn in sample.turns]
        rows.append({"id": sample.id, "image": f"{sample.group}.png", "conversations": turns})
    rows.append({"id": "words", "conversations": [{"from": who, "value": "hm"} for who in ("human", "gpt")]})
    (folder / "task.json").write_text(json.dumps(rows))
    return folder / "task.json"


def by_construction(reads, plan=None):
    """Returns a model whose text reads the image's colour, or shape, in the layers that `reads` names, and only there.

    Attention is uniform (queries are zero). Layer 0 brings what the question is about to the last token, as it is in
    the words; the projected features of the nine images are, exactly, colour and shape.
    """
    model, processor = tiny_model(plan), tiny_processor()
    prompt_encoder = PromptEncoder(processor, chat_format="chat_template", aspect="processor")
    words = processor.tokenizer.convert_tokens_to_ids
    decoder = model.model.language_model
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    for weight in (embeddings, head):
        weight.zero_()
    for layer in decoder.layers:
        attention = layer.self_attn
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, layer.mlp.down_proj):
            part.weight.zero_()
    batcher, samples = ProbeBatcher(model, prompt_encoder), pictured_samples()
    kinds = [
        set(batcher.encode(samples[kind], prompt_encoder.vision.encode(samples[kind].images))[0]) for kind in (0, 1)
    ]
    answers = {words(word) for word in (*COLOURS, *SHAPES)}
    for kind, other in ((0, 1), (1, 0)):
        for token in kinds[kind] - kinds[other] - answers:
            embeddings[token, KINDS[kind]] = 1
        decoder.layers[0].self_attn.v_proj.weight[kind, KINDS[kind]] = 1
        decoder.layers[0].self_attn.o_proj.weight[DELIVERED[kind], kind] = 1
        for number, word in enumerate((COLOURS, SHAPES)[kind]):
            channel = 3 * kind + number
            head[words(word), DELIVERED[kind]], head[words(word), 10 + channel] = 100, 1
            embeddings[words(word), END] = 1000
            for layer in reads[("colour", "shape")[kind]]:
                attention = decoder.layers[layer].self_attn
                attention.v_proj.weight[2 + channel, channel] = 1
                attention.o_proj.weight[10 + channel, 2 + channel] = 1
    head[processor.tokenizer.eos_token_id, END] = 1000
    project_exactly(model, prompt_encoder)
    return model


def pixels_of(prompt_encoder, image):
    return prompt_encoder.vision.encode([image]).inputs["pixel_values"]


def project_exactly(model, prompt_encoder):
    """Sets the projector so that each image's features are its colour (channels 0-2) and its shape (3-5)."""
    pixels = torch.cat([pixels_of(prompt_encoder, picture(number // 3, number % 3)) for number in range(9)])
    inner = {}
    handle = model.model.multi_modal_projector.act.register_forward_hook(lambda *call: inner.update(out=call[2]))
    model.model.get_image_features(pixel_values=pixels)
    handle.remove()
    wanted = torch.zeros(9, 4, 64)
    for number in range(9):
        wanted[number, :, number // 3] = wanted[number, :, 3 + number % 3] = 1
    solved = torch.linalg.pinv(inner["out"].reshape(36, 64).double()) @ wanted.reshape(36, 64).double()
    model.model.multi_modal_projector.linear_2.weight.copy_(solved.T)
    model.model.multi_modal_projector.linear_2.bias.zero_()


def save(model, folder):
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def run(folder, checkpoint, *more):
    """Returns the exit code and what stages.json says."""
    out = folder / "out"
    command = [str(checkpoint), "--task", str(folder / "task.json"), "--images", str(folder), "--out", str(out)]
    code = stages.main([*command, "--tolerance", "3", "--batch", "50", *map(str, more)])
    return code, json.loads((out / "stages.json").read_text()) if (out / "stages.json").is_file() else None


@pytest.fixture
def task(tmp_path):
    write_task(tmp_path)
    return tmp_path


@pytest.mark.parametrize("plan", [None, {"enter": 2, "exit": 4}, {"enter": 1, "exit": 6}])
def test_a_window_known_by_construction_is_found_and_written(task, plan, capsys):
    model = by_construction({"colour": [2], "shape": [3]}, plan)
    checkpoint = save(hugging_face(model) if plan is None else model, task / "model")
    target = task / "my_fused.yaml"
    code, record = run(task, checkpoint, "--write", target)
    assert code == 0
    assert record["score"]["score"] == 100.0
    assert record["without_vision"]["score"] < 50
    found = record["proposal"]
    assert (found["enter"], found["exit"], found["widened"], found["crossed"]) == (2, 4, False, False)
    assert found["masked"]["loss"] == found["removed"]["loss"] == 0.0
    assert found["cost"]["proposed"]["visual_token_layers"] == 2 * 4
    assert [result["loss"] > 0 for result in record["masked_before"]] == [False] * 3 + [True] * 4
    assert [result["loss"] > 0 for result in record["masked_from"]] == [True] * 4 + [False] * 3
    assert [result["loss"] > 0 for result in record["masked_window"]] == [False, False, True, True, False, False]
    recipe = load_recipe(target)
    assert (recipe.name, recipe.output, recipe.plan) == ("my_fused", "outputs/my_fused", StagePlan(2, 4))
    assert recipe.model.checkpoint == str(checkpoint)
    top = target.read_text()
    assert top.startswith("# The stages of this recipe were proposed by\n#   python -m eval.stages")
    assert "# Proposed: enter 2, exit 4 of 6 layers" in top
    assert "Proposed: enter 2, exit 4 of 6 layers" in capsys.readouterr().out
    assert (task / "out/stages.png").stat().st_size > 10_000
    assert "| 2 | 100.0 +- 0.0 % (+0.0) |" in (task / "out/stages.md").read_text()


def test_answers_count_as_the_model_writes_them(task):
    checkpoint = save(hugging_face(by_construction({"colour": [2], "shape": [3]})), task / "model")
    rows = json.loads((task / "task.json").read_text())
    for row in rows[:36]:
        row["conversations"][1]["value"] = row["conversations"][1]["value"].capitalize() + "."
    for row in rows[36:40]:
        row["conversations"][1]["value"] += " one"
    (task / "task.json").write_text(json.dumps(rows))
    code, record = run(task, checkpoint)
    assert code == 0
    assert record["score"]["score"] == pytest.approx(100 * 68 / 72)  # a longer answer is another one
    assert record["without_vision"]["score"] < 50
    assert (record["proposal"]["enter"], record["proposal"]["exit"]) == (2, 4)


def test_easy_vqa_can_ask_for_a_short_answer():
    plain, short = (stages.BUILT_IN[name](3) for name in ("easy_vqa", "easy_vqa_phrase"))
    request = "\nAnswer the question using a single word or phrase."
    assert [one.turns[0].text + request for one in plain] == [one.turns[0].text for one in short]
    assert [one.answer for one in plain] == [one.answer for one in short]


def test_each_kind_of_question_shows_the_layer_that_it_reads_at(tmp_path):
    model = by_construction({"colour": [2], "shape": [3]})
    prompt_encoder = PromptEncoder(tiny_processor(), chat_format="chat_template", aspect="processor")
    samples = [
        replace(sample, family="colour" if sample.answer in COLOURS else "shape") for sample in pictured_samples()
    ]
    analysis = Analysis(model, ProbeBatcher(model, prompt_encoder), samples, batch=7, plan=None, window=1)
    analysis.run()
    args = Namespace(command="command", task="task", tolerance=6.0)
    proposal = propose(analysis.trials, 6.0, analysis.measure)
    analysis.measure([analysis.trials.removed_outside(proposal.enter, proposal.exit)])
    record = record_of(analysis, proposal, args, r"a$\frac$model")  # which is no formula in the picture
    lost = {
        name: [[layer["loss"] > 0 for layer in found[key]] for key in ("masked_before", "masked_from")]
        for name, found in record["by_family"].items()
    }
    assert lost["colour"] == [[False] * 3 + [True] * 4, [True] * 3 + [False] * 4]
    assert lost["shape"] == [[False] * 4 + [True] * 3, [True] * 4 + [False] * 3]
    assert [found["samples"] for found in record["by_family"].values()] == [9, 9]
    for key in ("masked_before", "masked_from"):  # the families' mean is the whole's
        means = zip(*([layer["loss"] for layer in found[key]] for found in record["by_family"].values()), strict=True)
        assert [sum(pair) / 2 for pair in means] == pytest.approx([layer["loss"] for layer in record[key]])
    assert "| l | colour (9) | shape (9) |" in report_of(record)
    draw_stages(record, tmp_path / "stages.png")
    with Image.open(tmp_path / "stages.png") as drawn:
        assert drawn.height == 1925  # a fifth row of panels


def test_a_second_reading_place_makes_a_single_layer_enough(task):
    checkpoint = save(by_construction({"colour": [1, 4], "shape": [1, 4]}), task / "model")
    code, record = run(task, checkpoint)
    found = record["proposal"]
    assert (code, found["first"], found["crossed"]) == (0, [4, 2], True)
    assert found["exit"] - found["enter"] == 1
    assert found["masked"]["loss"] == 0.0


def test_a_model_that_needs_every_layer_or_no_image_gets_no_stages(task, capsys):
    whole = save(by_construction({"colour": [0], "shape": [5]}), task / "whole")
    code, record = run(task, whole)
    assert (code, record["proposal"]) == (0, None)
    assert "vision is needed from the first layer to the last" in capsys.readouterr().out
    blind = save(by_construction({"colour": [], "shape": []}), task / "blind")
    target = task / "new.yaml"
    code, record = run(task, blind, "--write", target)
    assert (code, record["proposal"]) == (2, None)
    said = capsys.readouterr()
    assert "does not need the image" in said.out
    assert said.err.splitlines()[-1].startswith(f"--write: {target} was not written: no stages are proposed")
    assert not target.exists()


def trained(plan):
    """Returns a model that has learned to name colours and shapes under a plan."""
    model, processor = tiny_model(plan), tiny_processor()
    batcher = ProbeBatcher(model, PromptEncoder(processor, chat_format="chat_template", aspect="processor"))
    samples = pictured_samples()
    images = [batcher.prompt_encoder.vision.encode(sample.images) for sample in samples]
    batch, encoded = batcher.batch(samples), [batcher.encode(*pair) for pair in zip(samples, images, strict=True)]
    labels = torch.full_like(batch.ids, IGNORE_INDEX)
    for row, (_, own) in zip(labels, encoded, strict=True):
        row[-len(own) :] = torch.tensor(own)
    pixels = torch.cat([pixels_of(batcher.prompt_encoder, sample.images[0]) for sample in samples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    with torch.enable_grad():
        for _ in range(150):
            loss = model.train()(
                input_ids=batch.ids, attention_mask=batch.mask, pixel_values=pixels, labels=labels
            ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.05
    return model.eval()


def test_a_trained_window_comes_back_or_the_narrowest_part_of_it_that_is_enough(task):
    checkpoint = save(trained({"enter": 2, "exit": 4}), task / "model")
    code, record = run(task, checkpoint)
    found = record["proposal"]
    assert (code, record["score"]["score"]) == (0, 100.0)
    assert 2 <= found["enter"] < found["exit"] <= 4
    losses = {2: record["masked_from"][3], 3: record["masked_before"][3]}  # vision in that one layer alone
    is_enough = {layer: result["loss"] + result["loss_error"] <= 3 for layer, result in losses.items()}
    if not any(is_enough.values()):
        assert (found["enter"], found["exit"]) == (2, 4)
    else:
        assert found["exit"] - found["enter"] == 1
        assert is_enough[found["enter"]]
    assert record["stages"]["enter"] == 2
    assert record["masked_before"][2]["loss"] == record["masked_from"][4]["loss"] == 0.0
    assert record["masked_before"][4]["loss"] > 3
    assert record["masked_from"][2]["loss"] > 3


@pytest.mark.parametrize("chat_format", ["vicuna_v1", "chat_template"])
def test_a_file_s_questions_are_asked_as_they_are_trained(tmp_path, chat_format):
    """System prompt, places of several images and escaped marks; a row whose answer is not trained is left out."""
    for number in range(2):
        picture(number, 0).save(tmp_path / f"{number}.png")
    turns = [
        ("human", r"what is <image> , not <image> or \<image> ?"), ("gpt", "red"), ("human", "and ?"), ("gpt", "blue")
    ]  # fmt: skip
    row = {
        "image": ["0.png", "1.png"],
        "system": "in one word",
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }
    untrained = json.loads(json.dumps(row))
    untrained["conversations"][1]["loss"] = 0
    (tmp_path / "rows.json").write_text(json.dumps([untrained, row]))
    (sample,) = file_samples(tmp_path / "rows.json", tmp_path, 9)
    encoder = PromptEncoder(tiny_processor(), chat_format=chat_format, aspect="processor")
    ids, labels = ProbeBatcher(None, encoder).encode(sample, encoder.vision.encode(sample.images))
    row["conversations"] = row["conversations"][:2]
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    section = {"format": chat_format, "image_aspect": "processor", "images": str(tmp_path), "workers": 0}
    trained = ConversationDataset(DataConfig(files=[str(tmp_path / "rows.json")], **section), tiny_processor())[0]
    assert ids == trained["input_ids"].tolist()
    assert labels == trained["labels"].tolist()


def test_images_inside_a_file_are_told_apart_by_what_they_show(tmp_path):
    def shown(colour):
        picture(colour, 0).save(tmp_path / "x.png")
        return {"bytes": (tmp_path / "x.png").read_bytes(), "path": None}

    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}]
    images = [[shown(0)], [shown(0)], [shown(1)], [shown(0), shown(1)]]
    talks = [[{**turns[0], "value": "<image>" * len(one) + "what?"}, turns[1]] for one in images]
    parquet.write_table(pa.table({"images": images, "conversations": talks}), tmp_path / "rows.parquet")
    groups = [sample.group for sample in file_samples(tmp_path / "rows.parquet", None, 9)]
    assert groups[0] == groups[1]
    assert len(set(groups)) == 3


def test_own_recipe_is_kept_but_for_name_output_and_stages(task):
    checkpoint = save(by_construction({"colour": [2], "shape": [3]}), task / "model")
    own = QUICKSTART.parents[1] / "quickstart.yaml"
    (checkpoint / "recipe.yaml").write_text(own.read_text())
    code, _ = run(task, checkpoint, "--write", task / "next.yaml")
    before, after = load_recipe(own), load_recipe(task / "next.yaml")
    assert code == 0
    assert after.plan == StagePlan(2, 4)
    assert (after.data, after.train, after.align) == (before.data, before.train, before.align)
    assert (after.name, after.model.config) == ("next", before.model.config)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ("--task", "gqa"),
            "--task: got 'gqa', expected easy_vqa, easy_vqa_phrase, scenes, or a LLaVA-format JSON or JSONL file",
        ),
        (("--task", "x" * 300), "expected easy_vqa, easy_vqa_phrase, scenes, or a LLaVA-format JSON or JSONL file"),
        (("--images", "nowhere"), "--images: "),
        (("--task", "untrained.json"), "got no row whose first question has an image and an answer that is trained on"),
        (("--task", "easy_vqa"), "with --task easy_vqa, expected it with a file as --task"),
        (("--task", "long.json"), "sample 3: prompt: got 2,012 tokens, expected at most 1,024"),
        (("--limit", "30"), "--limit: got 30 samples for a tolerance of 3 points, expected at least 34"),
        (("--window", "7"), "--window: got 7, expected at most 6"),
        (("--write", "taken.yaml"), "expected a file that does not exist yet"),
        (("--write", "no/such/folder.yaml"), "(No such file or directory), expected a file that can be written"),
        (("--write", "x.json"), "expected a .yaml file in a folder that exists"),
        (("--write", f"{'x' * 300}.yaml"), "(File name too long), expected a file that can be written"),
        (("--write", "/proc/x.yaml"), "expected a file that can be written"),
        (("--out", "taken.yaml"), "expected a folder that can be written"),
        (("--tolerance", "0"), "expected points of score, above 0 and at most 100"),
    ],
)
def test_what_a_user_got_wrong_is_told_in_one_line(task, more, said, capsys, monkeypatch):
    checkpoint = save(tiny_model(), task / "model")
    monkeypatch.chdir(task)
    (task / "taken.yaml").write_text("")
    rows = json.loads((task / "task.json").read_text())
    rows[3]["conversations"][0]["value"] += " what" * 1000
    (task / "long.json").write_text(json.dumps(rows))
    talk = [{"from": "human", "value": "<image>"}, *[{"from": who, "value": "x"} for who in ("gpt", "human", "gpt")]]
    talk[1]["weight"] = 0
    (task / "untrained.json").write_text(json.dumps([{"image": rows[0]["image"], "conversations": talk}]))
    try:
        code, _ = run(task, checkpoint, *more)
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (task / "out").exists()


def test_an_image_that_the_processor_rejects_is_named(monkeypatch):
    prompt_encoder = PromptEncoder(tiny_processor(), chat_format="chat_template", aspect="processor")

    def reject(self, images):
        raise RowError("image of 300 x 1: the processor rejects it")

    monkeypatch.setattr(VisionProcessor, "encode", reject)  # as Qwen's, whose image may be 200 times as long as high
    batcher = ProbeBatcher(None, prompt_encoder)
    for ask in (batcher.check_longest, batcher.batch):
        with pytest.raises(SamplesError, match=r"^sample .*: image of 300 x 1: the processor rejects it$"):
            ask(pictured_samples())


def test_no_checkpoint_is_told_in_one_line(task, capsys):
    code, _ = run(task, task / "nothing")
    assert code == 2
    assert "got no checkpoint" in capsys.readouterr().err


def test_broken_rows_are_named(task, capsys):
    (task / "task.json").write_text('[{"conversations": []}]')
    assert run(task, save(tiny_model(), task / "model"))[0] == 2
    assert "task.json:0: conversations: got no turns" in capsys.readouterr().err


def test_results_count_images_and_never_claim_certainty():
    trials = Trials(None, 2)
    trials.groups = ["a", "a", "b", "b"]
    trials.right = {trials.whole: [True, True, True, True], trials.nothing: [False, False, True, True]}
    result = trials.result(trials.nothing)
    assert (result.score, result.loss) == (50.0, 50.0)
    assert result.loss_error == pytest.approx(50.0)  # two images: 100 and 0
    assert trials.result(trials.whole).loss_error == 25.0


def test_every_range_of_layers_that_comes_to_the_same_is_run_once():
    trials = Trials(StagePlan(2, 4), 6)
    assert trials.masked_outside(2, 4) == trials.whole == trials.removed_outside(1, 5)
    assert trials.masked_outside(0, 2) == trials.nothing == trials.removed_outside(4, 6)
    assert len(trials.sweep(1)) == len({("masked",), ("masked", 2, 3), ("masked", 2), ("masked", 3), ("removed", 3, 4)})


@pytest.mark.parametrize("plan", [None, StagePlan(1, 6, keep={2: 2, 4: 1}), StagePlan(2, 4, "kv", keep={3: 1})])
def test_watching_changes_nothing(make_model, make_batch, plan):
    model = make_model()
    batch = probed(model, make_batch(*LAYOUTS, side="left"))
    own = model.lm_head(batch.run(model, plan_schedule(plan)).last_hidden_state[batch.ends]).softmax(-1)
    lens = insight_of(model, make_batch(*LAYOUTS, side="left"), plan)["lens_probability"][:, -1]
    torch.testing.assert_close(lens, own.gather(1, batch.first_answers[:, None])[:, 0])
