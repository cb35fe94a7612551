"""`python -m eval.demo DIR`: a page in the browser that asks a checkpoint about an image, under any schedule.

It shows the answer, what it took, and which visual tokens were live in which layer. The page needs no network.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from data.chat import TokenizerError
from data.easy_vqa import is_built_in, questions
from data.images import read_image as read_upload
from data.rows import RowError
from eval.checkpoint import TRAINED, Checkpoint, CheckpointError, set_schedule
from eval.live import live_visual
from eval.overlay import draw_overlay
from eval.prompts import Asked, Prompter
from models.plan import StagePlan
from models.schedules import SCHEDULES
from recipes.resolved import saved_data

NEW_TOKENS, MOST_NEW_TOKENS = 64, 1024
EXAMPLES = 4
_PORTS = range(1 << 16)
_SYSTEM_FONTS = ("system-ui", "sans-serif")  # the machine's own: nothing is fetched
_THEME = gr.themes.Base(font=_SYSTEM_FONTS, font_mono=("ui-monospace", "monospace"))
_CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important }
#image img { object-fit: contain; width: 100%; height: 100% }
/* an overlay of many pictures scrolls sideways */
#overlay .image-container { overflow-x: auto }
#overlay button { width: max-content; min-width: 100% }
#overlay img { max-width: none; width: auto }
"""


@dataclass(frozen=True)
class Response:
    """An answer and what it took.

    Attributes:
        answer: the text.
        new_tokens: tokens generated, the end mark too.
        prefill_seconds: until the first token arrived: vision tower, prompt, first token.
        decode_seconds: of all further tokens.
        token_layers: visual tokens that layers ran on in the prefill, summed over layers.
        dense_token_layers: the same if every layer saw every visual token.
        overlay: the live visual tokens drawn over the image as the model saw it; None without an image.
    """

    answer: str
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    token_layers: int
    dense_token_layers: int
    overlay: Image.Image | None


class _Clock(BaseStreamer):
    """Notes when generate() hands over the prompt, and when each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Notes the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be noted."""


def respond(
    model: Any, prompter: Prompter, image: Image.Image | None, question: str, schedule: str, max_new_tokens: int
) -> Response:
    """Returns the greedy answer to a question under a schedule; the model's own schedule is put back afterwards.

    Args:
        model: a FusedLlavaForConditionalGeneration, ready for inference. Not to be shared with another call meanwhile.
        prompter: asks it as it was trained to be asked.
        image: what the question is about; None asks the words alone.
        question: what a user typed.
        schedule: `trained`, or a name in `SCHEDULES`, with published settings scaled to the model's depth.
        max_new_tokens: at least 1.
    """
    depth, before = model.config.text_config.num_hidden_layers, model.schedule
    images = [] if image is None else [image.convert("RGB")]
    inputs = {name: part.to(model.device) for name, part in prompter.batch([Asked(question, images)]).items()}
    clock = _Clock()
    try:
        set_schedule(model, schedule)
        with torch.inference_mode():
            tokens = model.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, streamer=clock
            )
        live = live_visual(model, inputs, model.schedule)[:, 0]
    finally:
        model.schedule = before
    ids, overlay = inputs["input_ids"][0], None
    if images:
        picture = prompter.picture(inputs["pixel_values"][0])
        overlay = draw_overlay(picture, prompter.patches(live, ids), prompter.grid)
    new = tokens[:, len(ids) :]
    start, first, last = clock.times[0], clock.times[1], clock.times[-1]
    return Response(
        prompter.decode(new)[0],
        new.shape[1],
        first - start,
        last - first,
        int(live.sum()),
        int((ids == model.config.image_token_id).sum()) * depth,
        overlay,
    )


def schedule_choices(model: Any) -> list[tuple[str, str]]:
    """Returns (label, name) of each schedule that a model can be asked under; its own plan, if any, comes first."""
    if model.config.stages is None:
        return [(name, name) for name in SCHEDULES]
    plan, depth = StagePlan.from_dict(model.config.stages), model.config.text_config.num_hidden_layers
    trained = f"{TRAINED}, vision in {sum(map(plan.sees, range(depth)))} of {depth} layers"
    labels = {name: name if schedule.trainable else f"{name}, within the plan" for name, schedule in SCHEDULES.items()}
    return [(trained, TRAINED), *((label, name) for name, label in labels.items())]


def examples(checkpoint: Checkpoint) -> list[list[str]]:
    """Returns [image file, question] of some easy-VQA test questions for a checkpoint trained on it; else none."""
    recipe = checkpoint.weights / "recipe.yaml"
    if not recipe.is_file() or not any(is_built_in(source.path) for source in saved_data(recipe).sources):
        return []
    first = {question.image: question.text for question in reversed(questions("test"))}  # one of each image
    return [[str(image), text] for image, text in sorted(first.items())[:EXAMPLES]]


def figures(response: Response) -> str:
    """Returns what an answer took, in two lines of markdown."""
    tokens, dense = response.token_layers, response.dense_token_layers
    share = f"{tokens:,} of dense's {dense:,} ({100 * tokens / dense:.0f} %)" if dense else "none, without an image"
    return (
        f"Prefill **{response.prefill_seconds:.3f} s**, decoding **{response.decode_seconds:.3f} s**, "
        f"new tokens: {response.new_tokens}  \nVisual token-layers: **{share}**"
    )


def read_image(file: str) -> Image.Image:
    """Returns an uploaded image as training sees it: upright, in RGB, on white where it is transparent.

    Raises:
        gradio.Error: the file is none that can be read; the page shows what it says.
    """
    try:
        return read_upload(file)
    except RowError as error:
        reason = str(error).partition(f"{Path(file).name!r} ")[2] or str(error)
        raise gr.Error(f"{Path(file).name} cannot be read as an image: it {reason}.", print_exception=False) from error


def page(name: str, model: Any, prompter: Prompter, shown: Sequence[list[str]] = ()) -> gr.Blocks:
    """Returns the page; it answers one request at a time, because the schedule is the model's own state.

    Args:
        name: of the checkpoint.
        model: a FusedLlavaForConditionalGeneration, ready for inference.
        prompter: asks it as it was trained to be asked.
        shown: [image file, question] of each example.
    """

    def ask(file: Any, question: str, schedule: str, new: float) -> tuple[str, str, Image.Image | None]:
        if not question.strip():
            raise gr.Error("Type a question first.", print_exception=False)
        image = None if file is None else read_image(file["path"])
        try:
            response = respond(model, prompter, image, question, schedule, int(new))
        except Exception as error:  # the user reads one line; the terminal shows where it came from
            raise gr.Error(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        return response.answer, figures(response), response.overlay

    choices = schedule_choices(model)
    with gr.Blocks(title=f"Fused LLaVA: {name}", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"# Fused LLaVA: {name}")
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Image", sources=["upload", "clipboard"], height=260, buttons=[], elem_id="image"
                )
                question = gr.Textbox(label="Question", elem_id="question")
                schedule = gr.Dropdown(choices, value=choices[0][1], label="Schedule", elem_id="schedule")
                most = gr.Slider(1, MOST_NEW_TOKENS, NEW_TOKENS, step=1, label="Maximum new tokens", elem_id="most")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column():
                answer = gr.Textbox(label="Answer", lines=2, interactive=False, elem_id="answer")
                took = gr.Markdown(elem_id="took")
                gr.Markdown("Live visual tokens by layer; a faded patch is not live:")
                overlay = gr.Image(show_label=False, format="png", height=150, buttons=[], elem_id="overlay")
                if shown:
                    gr.Examples(list(shown), [image, question], label="Test questions of easy-VQA", elem_id="examples")
        gr.on(
            [button.click, question.submit],
            ask,
            [image, question, schedule, most],
            [answer, took, overlay],
            preprocess=False,  # Gradio's own says of a broken image what no user understands
            concurrency_limit=1,
            api_visibility="private",
        )
    return blocks.queue(api_open=False)  # else a request could go round the queue


def serve(blocks: gr.Blocks, listening: socket.socket) -> None:
    """Serves a page on a listening socket until SIGINT, which goes on as KeyboardInterrupt."""
    app = gr.mount_gradio_app(
        FastAPI(), blocks, path="/", theme=_THEME, css=_CSS, footer_links=[], run_history=False, ssr_mode=False
    )
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)  # an open page never hangs up
    host, port = listening.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends it)", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


def main(given: Sequence[str] | None = None) -> int:
    """Loads a checkpoint and serves its page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.demo", description=__doc__)
    parser.add_argument("checkpoint", metavar="DIR", help="run folder, released folder or hub name")
    parser.add_argument("--port", type=_port, default=7860, help="port to serve on (default 7860)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve on (default 127.0.0.1: this machine only)"
    )
    args = parser.parse_args(given)
    try:  # before weights are loaded, which may take minutes
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listening = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        found = f"--host {args.host} --port {args.port}: {reason}"
        parser.exit(2, f"{found}, accepted: an address of this machine and a free port\n")
    try:
        with listening, TemporaryDirectory() as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder  # of what is uploaded and drawn; Gradio itself keeps it for good
            checkpoint = Checkpoint.find(args.checkpoint)
            model, processor = checkpoint.load()
            serve(page(checkpoint.name, model, checkpoint.prompter(processor), examples(checkpoint)), listening)
    except (CheckpointError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # uvicorn hands it on after it has shut down
        print()
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) not in _PORTS:
        raise argparse.ArgumentTypeError(f"found {text!r}, accepted: 0 to {_PORTS[-1]}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
