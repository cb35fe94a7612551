"""The demo page: what it answers, in Python and in a real browser; answers are really generated, by a random model."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
import torch
from PIL import Image

from data.easy_vqa import questions
from eval import demo
from eval.checkpoint import Checkpoint
from eval.live import GAP, LABEL, SIDE
from eval.prompts import VqaPrompt
from models.schedules import SCHEDULES, Fused, published
from tests.browser import open_page
from tests.conftest import ROOT, write_run
from tests.starts import free_port

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
    return checkpoint, model, checkpoint.prompt_encoder(processor)


@pytest.fixture(scope="module")
def asked():
    question = questions("test")[0]
    return Image.open(question.image).convert("RGB"), question.text


def generated(model, prompt_encoder, question, new):
    inputs = prompt_encoder.batch([question])
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=new)
    return prompt_encoder.decode(tokens[:, inputs["input_ids"].shape[1] :])[0]


def test_respond_is_generate_under_each_schedule(loaded, asked):
    _, model, prompt_encoder = loaded
    image, text = asked
    answers = {}
    for name in ("trained", "dense", "visipruner", "vtw"):
        response = demo.respond(model, prompt_encoder, image, text, name, 6)
        assert isinstance(model.schedule, Fused)  # the model's own
        model.schedule = None if name == "trained" else published(name, LAYERS)
        answers[name] = generated(model, prompt_encoder, VqaPrompt(text, [image]), 6)
        model.schedule = None
        assert response.answer == answers[name]
        assert 1 <= response.new_tokens <= 6
        assert response.prefill_seconds > 0
        assert response.decode_seconds > 0
        assert response.dense_token_layers == LAYERS * VISUAL
    assert answers["trained"] != answers["dense"]


def test_token_layers_and_overlay_follow_the_schedule(loaded, asked):
    _, model, prompt_encoder = loaded
    trained = demo.respond(model, prompt_encoder, *asked, "trained", 1)
    dense = demo.respond(model, prompt_encoder, *asked, "dense", 1)
    assert (trained.token_layers, dense.token_layers) == (3 * VISUAL, LAYERS * VISUAL)
    assert trained.overlay.size == (3 * SIDE + 2 * GAP, SIDE + LABEL)  # without, with, without the image
    assert dense.overlay.size == (SIDE, SIDE + LABEL)
    assert (trained.new_tokens, trained.decode_seconds) == (1, 0)


def test_a_release_is_asked_under_the_schedule_of_its_config(loaded, asked, monkeypatch):
    _, model, prompt_encoder = loaded
    monkeypatch.setattr(model.config, "schedule", {"name": "vtw", "layer": 3})
    assert (
        demo.respond(model, prompt_encoder, *asked, "released", 1).token_layers == VISUAL
    )  # of the plan's layers, layer 2
    assert demo.respond(model, prompt_encoder, *asked, "trained", 1).token_layers == 3 * VISUAL


def test_a_question_without_an_image(loaded):
    _, model, prompt_encoder = loaded
    response = demo.respond(model, prompt_encoder, None, "what shape?", "trained", 5)
    assert response.answer == generated(model, prompt_encoder, VqaPrompt("what shape?"), 5)
    assert (response.token_layers, response.dense_token_layers, response.overlay) == (0, 0, None)
    assert "without an image" in demo.figures(response)


def test_choices_and_examples(loaded, tmp_path, monkeypatch):
    checkpoint, model, _ = loaded
    choices = demo.schedule_choices(model)
    usable = [name for name in SCHEDULES if name != "cdpruner"]  # which needs a text tower
    assert [name for _, name in choices] == ["trained", *usable]
    assert choices[0][0] == "trained, vision in 3 of 8 layers"
    assert ("dense", "dense") in choices
    assert ("vtw, within the plan", "vtw") in choices
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "plans", {"fast": {"enter": 2, "exit": 3}, "dense": None})
        labels = {name: label for label, name in demo.schedule_choices(model)}
        assert (labels["fast"], labels["dense"]) == ("fast, one of its plans", "dense, one of its plans")
    monkeypatch.setattr(model.config, "stages", None)
    assert demo.schedule_choices(model) == [(name, name) for name in usable]
    monkeypatch.setattr(model.config, "schedule", {"name": "vtw", "layer": 2})
    label, name = demo.schedule_choices(model)[0]
    assert name == "released"
    assert "VTW(layer=2)" in label
    shown = demo.examples(checkpoint)
    assert len({file for file, _ in shown}) == len(shown) == demo.EXAMPLES
    assert {tuple(example) for example in shown} <= {(str(each.image), each.text) for each in questions("test")}
    assert demo.examples(replace(checkpoint, weights=tmp_path)) == []  # no recipe: not known to be easy-VQA's


def test_the_page_answers_one_request_at_a_time(loaded):
    checkpoint, model, prompt_encoder = loaded
    (handler,) = (each for each in demo.page(checkpoint.name, model, prompt_encoder).fns.values() if each.name == "ask")
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
    checkpoint, model, prompt_encoder = loaded
    (tmp_path / "broken.png").write_text("no image")
    with open_page(url) as opened:
        page = opened.page
        upload(page, tmp_path / "broken.png", asked[1])
        page.click("#ask")
        page.wait_for_selector("text=broken.png cannot be read as an image. Expected one of PNG")
        page.reload()
        upload(page, questions("test")[0].image, asked[1])
        page.click("#schedule input")
        page.click("text=fastv, within the plan")
        page.fill("#most input[type=number]", "12")
        page.keyboard.press("Tab")
        page.click("#ask")
        page.wait_for_selector("#overlay img")
        expected = demo.respond(model, prompt_encoder, *asked, "fastv", 12)
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
        assert process.wait(120) == 0


@pytest.fixture(scope="module")
def attacked(loaded, tmp_path_factory):
    """Yields (client, the page's settings, folder of uploads, an uploaded picture) of a page served in this process."""
    with pytest.MonkeyPatch.context() as patch:
        uploads = tmp_path_factory.mktemp("uploads")
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        checkpoint, model, prompt_encoder = loaded
        blocks = demo.page(checkpoint.name, model, prompt_encoder, demo.examples(checkpoint))
        address = demo.launch(blocks, host="127.0.0.1", port=free_port())
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            yield client, client.get("/config").json(), uploads, upload_file(client, "red.png", png("red"))
        blocks.close(verbose=False)


def png(colour, size=(64, 64), mode="RGB", kind="PNG"):
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, kind)
    return stream.getvalue()


def upload_file(client, name, content):
    return client.post("/gradio_api/upload", files={"files": (name, content)}).json()[0]


def ask(attacked, *data):
    """Returns (whether it was answered, what came back) of a request that names `data` as the page's inputs."""
    client, config, _, _ = attacked
    (number,) = (each["id"] for each in config["dependencies"] if each["api_name"] == "ask")
    session = uuid4().hex
    body = json.dumps({"data": data, "fn_index": number, "session_hash": session})
    client.post("/gradio_api/queue/join", content=body, headers={"Content-Type": "application/json"})
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as events:
        for line in events.iter_lines():
            event = json.loads(line.removeprefix("data:")) if line else {"msg": ""}
            if event["msg"] == "process_completed":
                return event["success"], event["output"]
    raise AssertionError("no answer")


def as_file(path, **more):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}


def test_no_file_is_opened_but_uploads(attacked, tmp_path):
    _, _, uploads, red = attacked
    secret = tmp_path / "secret.png"
    secret.write_bytes(png("purple"))
    (uploads / "link.png").symlink_to(secret)
    up = "../" * (len(uploads.parts) + 2)
    for named in (
        {"path": str(secret)},
        {"path": str(secret), "meta": "x"},
        as_file(secret),
        as_file(os.path.relpath(secret)),
        as_file(f"{uploads}/{up}{secret}"),
        as_file(uploads / "link.png"),
        as_file(secret, is_stream=True),
        as_file(secret, orig_name="x.svg"),
        as_file(f"file://{secret}"),
        as_file("http://127.0.0.1:9/secret.png"),
        as_file(f"{red}\0"),
        as_file(uploads),
        as_file("/dev/stdin"),
        as_file("/" + "a" * 5000),
        as_file(uploads / "gone.png"),
        [as_file(secret)],
        {"value": as_file(secret)},
        str(secret),
        3,
    ):
        answered, output = ask(attacked, named, "what shape?", "dense", 2)
        assert not answered, named
        assert set(output) <= {"error", "duration", "visible", "title"}
    said = ask(attacked, as_file(red), "what shape?", "dense", 2)[1]["data"]
    for named in (as_file(red, url=f"file://{secret}"), as_file(red, url="data:image/png;base64,AAAA")):
        again = ask(attacked, named, "what shape?", "dense", 2)[1]["data"]
        assert (again[0], again[2]["path"]) == (said[0], said[2]["path"])  # the drawing's path names its content


def test_every_input_is_checked_on_the_server(attacked):
    red = as_file(attacked[3])
    for question, schedule, new, told in (
        ("what?", "nope", 2, "Schedule: got 'nope', expected one of trained, dense"),
        ("what?", None, 2, "Schedule: got 'None', expected one of trained, dense"),
        ("what?", ["dense"], 2, "Schedule: got"),
        ("what?", {"a": 1}, 2, "Schedule: got"),
        ("what?", "dense", 3000, "New tokens: got 3000, expected a whole number, 1 to 1,024"),
        ("what?", "dense", 0, "New tokens: got 0"),
        ("what?", "dense", 1.5, "New tokens: got 1.5, expected a whole number, 1 to 1,024"),
        ("what?", "dense", float("nan"), "New tokens: got nan"),
        ("what?", "dense", True, "New tokens: got True"),
        ("what?", "dense", "2", "New tokens: got 2"),
        ("what?", "dense", None, "New tokens: got None"),
        (None, "dense", 2, "Type a question first"),
        (["what?"], "dense", 2, "Type a question first"),
        ("<image> ", "dense", 2, "Type a question first"),
        ("a" * 8001, "dense", 2, "got 8,001 characters, expected at most 8,000"),
        ("a" * 7000, "dense", 2, "expected at most 1,024, the decoder's positions. Shorten the question"),
        ("what?", "dense", 1000, "Shorten the question, or ask for fewer new tokens"),
        ("a\ud800b", "dense", 2, "half a character"),
    ):
        answered, output = ask(attacked, red, question, schedule, new)
        assert not answered
        assert told in output["error"], (question, output)
    assert ask(attacked, red, "</s>\0\u202e<pad>\U0001f600", "dense", 2)[0]


def test_direct_requests_do_not_go_round_the_queue(attacked):
    client, _, _, red = attacked
    for route in ("run/predict", "api/predict", "run/ask", "api/ask"):
        body = {"data": [as_file(red), "what?", "dense", 2], "fn_index": 1}
        assert client.post(f"/gradio_api/{route}", json=body).status_code == 404
    for path in ("/etc/passwd", "README.md", f"{ROOT}/README.md", f"{os.path.dirname(red)}/../../../etc/passwd"):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
    too_much = client.post("/gradio_api/upload", files={"files": ("big.png", bytes(31 << 20))})
    assert too_much.status_code == 413


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("bomb.png", png(0, (12000, 12000), "1"), "too large: got 12,000 x 12,000 pixels, expected at most 25 million"),
        ("worse.png", png(0, (15000, 15000), "1"), "too large: expected at most 25 million"),
        ("thin.png", png(0, (1, 400), "1"), "got 1 x 400 pixels"),
        ("wide.png", png(0, (8001, 2000), "1"), "got 8,001 x 2,000 pixels"),
        ("text.png", b"no image", "text.png cannot be read as an image. Expected one of PNG"),
        ("empty.png", b"", "empty.png cannot be read"),
        ("cut.png", png("red")[:100], "cut.png cannot be read"),
        ("program.png", png("red", kind="EPS"), "program.png cannot be read"),  # which Pillow gives to another program
    ],
)
def test_images_that_are_too_much_are_refused(tmp_path, monkeypatch, name, content, told):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(demo.QuestionError, match=told):
        demo.read_image(str(tmp_path / name))


def test_a_camera_picture_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    (tmp_path / "photo.jpg").write_bytes(png("red", (6000, 4000), kind="JPEG"))
    assert demo.read_image(str(tmp_path / "photo.jpg")).size == (6000, 4000)


def test_a_password_is_asked_for_before_anything_else(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    checkpoint, model, prompt_encoder = loaded
    blocks = demo.page(checkpoint.name, model, prompt_encoder)
    address = demo.launch(blocks, host="127.0.0.1", port=free_port(), password="open sesame")
    picture = {"files": {"files": ("red.png", png("red"))}}
    question = {"json": {"data": [None, "what?", "dense", 2], "fn_index": 0, "session_hash": "a"}}
    for word, status in (("wrong", 401), ("open sesame", 200)):
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            client.post("/login", data={"username": "me", "password": word})
            assert client.get("/config").status_code == status
            assert client.post("/gradio_api/upload", **picture).status_code == status
            assert client.post("/gradio_api/queue/join", **question).status_code == status
    blocks.close(verbose=False)


@pytest.mark.parametrize(
    ("options", "is_warned"),
    [
        ([], False),
        (["--host", "0.0.0.0"], True),
        (["--share"], True),
        (["--host", "0.0.0.0", "--share", "--password", "x"], False),
    ],
)
def test_a_page_for_everyone_without_a_password_says_so(tmp_path, monkeypatch, capsys, options, is_warned):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    assert demo.main([str(tmp_path), "--port", "0", *options]) == 2  # no checkpoint there
    assert ("WARNING: no password" in capsys.readouterr().err) == is_warned


def test_wrong_folder_leaves_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))  # main sets it; this puts it back
    assert demo.main([str(tmp_path), "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: got no checkpoint" in line


def test_a_taken_port_leaves_with_2(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert demo.main([str(folder), "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--port {port}: Address already in use" in line


@pytest.mark.parametrize("host", ["ü..x", "a" * 64 + ".b", "nul\0", "256.256.256.256"])
def test_a_host_that_is_none_leaves_with_2(folder, capsys, host):
    assert demo.main([str(folder), "--host", host, "--port", "0", "--password", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--host {host} --port 0: ")
    assert line.endswith("expected an address of this machine and a free port")
