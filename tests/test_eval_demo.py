"""The demo page: what it answers, in Python and in a real browser; answers are really generated, by a random model."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

from data.easy_vqa import questions
from eval import demo
from eval.checkpoint import Checkpoint
from eval.overlay import GAP, LABEL, SIDE
from eval.prompts import Asked
from models.schedule import Dense, Fused
from models.schedules import SCHEDULES, published
from tests.browser import open_page
from tests.conftest import ROOT, write_run

LAYERS, VISUAL = 8, 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For tiny models faster than two on a busy machine, and the same sums here as in the served process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "fused", {"enter": 2, "exit": 5})
    files = "data:\n  files: [easy_vqa:short]\n  format: chat_template\n  image_aspect: processor\n"
    (folder / "final/recipe.yaml").write_text(files)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    checkpoint = Checkpoint.find(folder)
    model, processor = checkpoint.load()
    return checkpoint, model, checkpoint.prompter(processor)


@pytest.fixture(scope="module")
def asked():
    question = questions("test")[0]
    return Image.open(question.image).convert("RGB"), question.text


def generated(model, prompter, question, new):
    inputs = prompter.batch([question])
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=new)
    return prompter.decode(tokens[:, inputs["input_ids"].shape[1] :])[0]


def test_respond_is_generate_under_each_schedule(loaded, asked):
    _, model, prompter = loaded
    image, text = asked
    answers = {}
    for name in ("trained", "dense", "visipruner", "vtw"):
        response = demo.respond(model, prompter, image, text, name, 6)
        assert isinstance(model.schedule, Fused)  # put back
        model.schedule = None if name == "trained" else published(name, LAYERS)
        answers[name] = generated(model, prompter, Asked(text, [image]), 6)
        model.schedule = None
        assert response.answer == answers[name]
        assert 1 <= response.new_tokens <= 6
        assert response.prefill_seconds > 0
        assert response.decode_seconds > 0
        assert response.dense_token_layers == LAYERS * VISUAL
    assert answers["trained"] != answers["dense"]


def test_token_layers_and_overlay_follow_the_schedule(loaded, asked):
    _, model, prompter = loaded
    trained = demo.respond(model, prompter, *asked, "trained", 1)
    dense = demo.respond(model, prompter, *asked, "dense", 1)
    assert (trained.token_layers, dense.token_layers) == (3 * VISUAL, LAYERS * VISUAL)
    assert trained.overlay.size == (3 * SIDE + 2 * GAP, SIDE + LABEL)  # without, with, without the image
    assert dense.overlay.size == (SIDE, SIDE + LABEL)
    assert (trained.new_tokens, trained.decode_seconds) == (1, 0)


def test_a_question_without_an_image(loaded):
    _, model, prompter = loaded
    response = demo.respond(model, prompter, None, "what shape?", "trained", 5)
    assert response.answer == generated(model, prompter, Asked("what shape?"), 5)
    assert (response.token_layers, response.dense_token_layers, response.overlay) == (0, 0, None)
    assert "without an image" in demo.figures(response)


def test_the_schedule_is_put_back_after_an_error(loaded, asked, monkeypatch):
    _, model, prompter = loaded
    model.schedule = Dense()
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.respond(model, prompter, *asked, "vtw", 5)
    assert isinstance(model.schedule, Dense)
    model.schedule = None


def test_choices_and_examples(loaded, tmp_path, monkeypatch):
    checkpoint, model, _ = loaded
    choices = demo.schedule_choices(model)
    assert [name for _, name in choices] == ["trained", *SCHEDULES]
    assert choices[0][0] == "trained, vision in 3 of 8 layers"
    assert ("dense", "dense") in choices
    assert ("vtw, within the plan", "vtw") in choices
    monkeypatch.setattr(model.config, "stages", None)
    assert demo.schedule_choices(model) == [(name, name) for name in SCHEDULES]
    shown = demo.examples(checkpoint)
    assert len({file for file, _ in shown}) == len(shown) == demo.EXAMPLES
    assert {tuple(example) for example in shown} <= {(str(each.image), each.text) for each in questions("test")}
    assert demo.examples(replace(checkpoint, weights=tmp_path)) == []  # no recipe: not known to be easy-VQA's


def test_the_page_answers_one_request_at_a_time(loaded):
    checkpoint, model, prompter = loaded
    (handler,) = (each for each in demo.page(checkpoint.name, model, prompter).fns.values() if each.name == "ask")
    assert handler.concurrency_limit == 1
    assert {event for _, event in handler.targets} == {"click", "submit"}


@pytest.fixture
def served(folder):
    command = [sys.executable, "-m", "eval.demo", str(folder), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    yield process, process.stdout.readline().split()[0]
    process.kill()
    process.wait()


def upload(page, image, text):
    page.set_input_files("#image input[type=file]", image)
    page.wait_for_selector("#image img", state="attached")
    page.fill("#question textarea", text)


def test_the_page_in_a_browser(served, loaded, asked, tmp_path):
    process, url = served
    checkpoint, model, prompter = loaded
    (tmp_path / "broken.png").write_text("no image")
    with open_page(url) as opened:
        page = opened.page
        upload(page, tmp_path / "broken.png", asked[1])
        page.click("#ask")
        page.wait_for_selector("text=broken.png cannot be read as an image: it is")
        page.reload()
        upload(page, questions("test")[0].image, asked[1])
        page.click("#schedule input")
        page.click("text=fastv, within the plan")
        page.fill("#most input[type=number]", "12")
        page.keyboard.press("Tab")
        page.click("#ask")
        page.wait_for_selector("#overlay img")
        expected = demo.respond(model, prompter, *asked, "fastv", 12)
        assert page.input_value("#answer textarea") == expected.answer
        assert f"{expected.token_layers} of dense's {LAYERS * VISUAL}" in page.inner_text("#took")
        drawn = page.eval_on_selector("#overlay img", "async (image) => (await image.decode(), image.naturalWidth)")
        assert drawn == expected.overlay.width
        page.screenshot(path=tmp_path / "wide.png")
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.screenshot(path=tmp_path / "narrow.png", full_page=True)
        page.click("#examples tbody tr >> nth=1")
        page.wait_for_selector("#image img[src*='/1.png']")
        assert page.input_value("#question textarea") == demo.examples(checkpoint)[1][1]
        assert opened.errors == []
        assert {urlsplit(url).hostname for url in opened.urls} == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)  # with the page still open
        assert process.wait(20) == 0


def test_wrong_folder_leaves_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # main sets it; this puts it back
    assert demo.main([str(tmp_path), "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: no checkpoint found" in line


def test_a_taken_port_leaves_with_2(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as left:
            demo.main([str(folder), "--port", str(port)])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--port {port}: Address already in use" in line
