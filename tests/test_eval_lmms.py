"""The lmms-eval adapter and our tasks under the real lmms-eval; the standard tasks on a few made-up rows, offline."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image, ImageFile
from transformers import AutoConfig, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from data.easy_vqa import questions
from eval.arguments import UsageError
from eval.checkpoint import Checkpoint, CheckpointError
from eval.comparison.cells import benchmark_of
from eval.lmms import FusedLlava, Harness, SettingsError, cut, generation_settings
from eval.prompts import VqaPrompt
from eval.tasks.benchmarks import BENCHMARKS, missing_judge, value_of
from models import StagePlan
from models.schedules import VTW, Fused
from tests.benchmark_rows import ROWS
from tests.conftest import QUICKSTART, ROOT


class Same(FusedLlava):
    """Says the same to everything, and notes what it was asked."""

    def __init__(self, model, prompt_encoder, word):
        super().__init__(model, prompt_encoder, batch=3)
        self.word, self.seen = word, []

    def answer(self, asked, settings, ends):
        self.seen += [(question, dict(settings), ends) for question in asked]
        return [self.word] * len(asked)


@pytest.fixture(scope="module")
def loaded(quickstart_run):
    checkpoint = Checkpoint.find(quickstart_run)
    model, processor = checkpoint.load()
    return model, checkpoint.prompt_encoder(processor)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Works in an empty folder, from which the benchmarks' rows are read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "none")  # most tasks ask for the one of whoever is logged in
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("harness"), BENCHMARKS)


@pytest.mark.parametrize(
    ("values", "score", "scale"), [((1, 0, 1, 1), 0.75, 1.0), ((1, 0, 0, 0), 25.0, 100.0), ((1, 0, 1, 1), 0.8, None)]
)
def test_another_tasks_scale_follows_from_its_questions(values, score, scale):
    samples = [{"hits": value} for value in values]
    found = benchmark_of("other", SimpleNamespace(metrics={"hits": score}, samples=samples))
    assert (found.metric, found.scale) == ("hits", scale)


@pytest.mark.parametrize("task", sorted(ROWS))
def test_the_standard_tasks_run_unchanged_on_local_rows(task, offline, harness, loaded):
    write, word, ending = ROWS[task]
    write(offline)
    model = Same(*loaded, word)
    outcome = harness.run(model, task, None)
    benchmark = BENCHMARKS[task]
    values = [value_of(sample, benchmark.metric) for sample in outcome.samples]
    assert len(outcome.samples) == 4
    assert set(values) == ({0.0, 1.0} if task in ("pope", "mme") else {1.0})
    score = outcome.metrics[benchmark.metric]
    assert score == (50.0 if task == "mme" else benchmark.scale * sum(values) / 4)
    question, settings, ends = model.seen[0]
    assert question.text.endswith(ending)
    assert [image.size for image in question.images] == [(40, 48)]
    assert settings["do_sample"] is False
    assert settings["max_new_tokens"] == {"pope": 128, "mmbench_en_dev_static": 1024}.get(
        task, 128 if ends == ("ASSISTANT:",) else 16
    )
    if benchmark.image:
        assert benchmark.image in outcome.samples[0]["doc"]
    asked = harness.questions(task, None, 2)
    assert list(asked) == [0, 2]
    assert asked[0].text == question.text
    assert not (offline / "submissions").exists()


def test_a_judged_task_wants_its_judge(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("API_TYPE", raising=False)
    assert "OPENAI_API_KEY" in missing_judge("mmvet")
    assert missing_judge("gqa") is None
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    assert missing_judge("mmvet") is None


def test_another_task_of_lmms_evals_is_found(tmp_path):
    harness = Harness(tmp_path, ["mmstar"])
    assert harness.known("mmstar")
    assert harness.known("easy_vqa")
    assert not harness.known("mmstarr")
    assert not harness.known("pope_full")  # a group of tasks


def test_easy_vqa_asks_every_question_alone(harness, loaded):
    model = Same(*loaded, "Yes.")
    outcome = harness.run(model, "easy_vqa", None)
    assert len(outcome.samples) == len(model.seen) == 9673
    assert round(100 * outcome.metrics["accuracy"], 2) == 37.33
    assert round(100 * outcome.metrics["yes_no"], 2) == 50.60
    assert outcome.metrics["shape"] == outcome.metrics["colour"] == 0.0
    harness.run(phrase := Same(*loaded, "yes"), "easy_vqa_phrase", 1)
    assert phrase.seen[0][0].text == model.seen[0][0].text + "\nAnswer the question using a single word or phrase."


def test_answers_do_not_depend_on_the_batch(harness, loaded):
    said = []
    for batch in (1, 5):
        outcome = harness.run(FusedLlava(*loaded, batch), "easy_vqa", 12)
        said.append([sample["filtered_resps"][0] for sample in outcome.samples])
    assert said[0] == said[1]
    assert len(set(said[0])) > 1


def test_a_llava_of_hugging_faces_answers_as_it_does_there(harness, tmp_path):
    fields = AutoConfig.from_pretrained(QUICKSTART).to_dict()
    torch.manual_seed(1)
    theirs = LlavaForConditionalGeneration(LlavaConfig(**fields)).eval()
    theirs.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(QUICKSTART).save_pretrained(tmp_path)
    checkpoint = Checkpoint.find(tmp_path)
    assert (checkpoint.stages, checkpoint.chat_format, checkpoint.aspect) == (None, "chat_template", "processor")
    model, processor = checkpoint.load()
    outcome = harness.run(FusedLlava(model, checkpoint.prompt_encoder(processor), 4), "easy_vqa", 4)
    for sample, question in zip(outcome.samples, questions("test"), strict=False):
        said = [{"role": "user", "content": f"<image>\n{question.text}"}]
        text = processor.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        inputs = processor(images=Image.open(question.image).convert("RGB"), text=text, return_tensors="pt")
        new = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert processor.batch_decode(new, skip_special_tokens=True)[0].strip() == sample["filtered_resps"][0]


def test_lmms_eval_does_not_let_broken_images_through():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_the_model_answers_again_after_a_task(harness, loaded):
    model = FusedLlava(*loaded, 4)
    first, second = (harness.run(model, "easy_vqa", 4).samples[0]["filtered_resps"] for _ in range(2))
    assert first == second


def test_an_evaluation_leaves_the_random_state_alone(harness, loaded):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    harness.run(Same(*loaded, "no"), "easy_vqa", 2)
    assert torch.equal(torch.rand(1), expected)


def test_questions_with_several_images_and_with_none(loaded):
    _, prompt_encoder = loaded
    red = Image.new("RGB", (64, 64), "red")
    inputs = prompt_encoder.batch([VqaPrompt("what is it?", [red, red]), VqaPrompt("a <image> here?")])
    image = prompt_encoder.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image).sum(dim=1).tolist() == [2 * prompt_encoder.vision.count(*red.size), 0]
    assert len(inputs["pixel_values"]) == 2
    assert "pixel_values" not in prompt_encoder.batch([VqaPrompt("what is it?")])


def test_an_answer_ends_where_the_task_says():
    assert cut("red\n\nblue", ("\n\n",)) == "red"
    assert cut(" red ASSISTANT: blue", ("ASSISTANT:", "r")) == ""
    assert cut("red", ("",)) == "red"


def test_generation_settings_are_what_generate_takes():
    settings, ends = generation_settings({"until": ["A", "B"], "temperature": 0, "do_sample": False, "num_beams": 1})
    assert dict(settings) == {"do_sample": False, "max_new_tokens": 128, "num_beams": 1}
    assert ends == ("A", "B")
    assert dict(generation_settings({"do_sample": True, "temperature": 0.2})[0])["temperature"] == 0.2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"top_k": 1, "repetition_penalty": 1.0}, {"repetition_penalty": 1.0}),  # greedy does not use top_k
        ({"seed": 1}, {}),
        ({"max_gen_toks": 7}, {"max_new_tokens": 7}),
        ({"max_gen_toks": 7, "max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"temperature": 0.0, "do_sample": True, "top_p": 0.9}, {}),  # lmms-eval's word for greedy
        ({"do_sample": True, "seed": 3, "top_k": 5}, {"do_sample": True, "seed": 3, "top_k": 5}),
        ({"num_beams": 3, "length_penalty": 0.5}, {"num_beams": 3, "length_penalty": 0.5}),
        ({"min_new_tokens": 2, "no_repeat_ngram_size": 3}, {"min_new_tokens": 2, "no_repeat_ngram_size": 3}),
        ({"top_p": None, "image_aspect_ratio": "original", "num_return_sequences": 1, "output_scores": False}, {}),
    ],
)
def test_harmless_settings_are_passed_on_or_left_out(given, expected):
    assert dict(generation_settings(given)[0]) == {"do_sample": False, "max_new_tokens": 128, **expected}


def test_settings_that_generate_does_not_take_are_named():
    for given, told in (
        ({"max_tokens": 3}, "got 'max_tokens', expected a setting of GenerationConfig, seed or until"),
        ({"num_return_sequences": 2}, "num_return_sequences: got 2, expected 1"),
        ({"output_scores": True}, "output_scores: got True, expected False"),
    ):
        with pytest.raises(SettingsError, match=told):
            generation_settings(given)


def test_settings_reach_generate(loaded):
    model = FusedLlava(*loaded, 1)
    question = [VqaPrompt("what is it?", [Image.new("RGB", (64, 64), "red")])]

    def said(**given):
        return model.answer(question, generation_settings({"max_new_tokens": 12, **given})[0], ())

    for wrong in ({"max_new_tokens": -3}, {"temperature": -1, "do_sample": True}, {"num_beams": 0}):
        with pytest.raises(SettingsError, match=rf"^generate\(.*{next(iter(wrong))}=.*\): .+") as raised:
            said(**wrong)
        assert len(str(raised.value).splitlines()) == 1
    greedy = said()
    assert said(top_k=1, repetition_penalty=1.0, seed=1) == greedy
    first = loaded[1].tokenizer.encode(greedy[0], add_special_tokens=False)[0]
    assert said(suppress_tokens=[first]) != greedy
    torch.manual_seed(3)
    after = torch.rand(1)
    torch.manual_seed(3)
    sampled = said(do_sample=True, temperature=2.0, seed=1)
    assert torch.equal(torch.rand(1), after)  # the process's own random state is left alone
    assert said(do_sample=True, temperature=2.0, seed=1) == sampled != said(do_sample=True, temperature=2.0, seed=2)


def test_model_args_name_checkpoint_and_schedule(quickstart_run):
    made = FusedLlava.create_from_arg_string(f"pretrained={quickstart_run},schedule=vtw", {"batch_size": 8})
    assert made.batch_size == 8
    assert made._held[0].schedule.inner == VTW(layer=4)  # 16 of 32 layers, scaled to 8; inside the plan
    for wrong in (
        "schedule=vtw",
        f"pretrained={quickstart_run},schedul=vtw",
        f"pretrained={quickstart_run},schedule=x",
        f"pretrained={quickstart_run},schedule=cdpruner",
    ):
        with pytest.raises(CheckpointError, match=r"--model_args: .*got .*expected "):
            FusedLlava.create_from_arg_string(wrong)
    for batch in (0, "abc", "auto", "-1"):
        with pytest.raises(UsageError, match=f"^--batch_size: got '{batch}', expected a whole number above 0"):
            FusedLlava.create_from_arg_string(f"pretrained={quickstart_run}", {"batch_size": batch})


def test_model_args_name_one_of_the_checkpoints_plans(quickstart_run, tmp_path):
    shutil.copytree(quickstart_run, tmp_path / "run")
    config = tmp_path / "run/final/config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "plans": {"early": {"enter": 0, "exit": 2}, "dense": None}}))
    made = FusedLlava.create_from_arg_string(f"pretrained={tmp_path}/run,schedule=early", {})
    assert made._held[0].schedule == Fused(StagePlan(0, 2))
    with pytest.raises(CheckpointError, match="--model_args: schedule: got 'late', expected one of trained, early, "):
        FusedLlava.create_from_arg_string(f"pretrained={tmp_path}/run,schedule=late", {})


def test_lmms_evals_command_line_knows_model_and_tasks(quickstart_run, tmp_path):
    command = [
        sys.executable,
        "-m",
        "eval.lmms",
        "--model",
        "fused_llava",
        "--batch_size",
        "2",
        "--limit",
        "4",
    ]
    args = f"pretrained={quickstart_run}, schedule=fastv"
    good = [
        *command,
        "--model_args",
        args,
        "--tasks",
        "easy_vqa",
        "--output_path",
        str(tmp_path),
        "--gen_kwargs",
        "top_k=1,repetition_penalty=1.0,seed=1",
    ]
    ended = subprocess.run(good, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert list(tmp_path.rglob("*results.json"))
    unknown = [*good[:-1], "max_tokens=3"]
    ended = subprocess.run(unknown, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "got 'max_tokens'" in ended.stderr.splitlines()[-1]
