"""`python -m eval.demo DIR`: a page in the browser that asks a checkpoint about an image, under any schedule.

It shows the answer, its cost, and which visual tokens were live in which layer. The page needs no network. Whoever
reaches its address may ask the model: every input is checked here, and no file is opened but what was uploaded.
"""

from __future__ import annotations

import argparse
import hmac
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from data.chat import TokenizerError
from data.easy_vqa import is_built_in, questions
from data.images import read_image as read_upload
from data.rows import IMAGE_PLACEHOLDER, RowError
from eval.arguments import UsageError, command_line, free_port
from eval.checkpoint import Checkpoint
from eval.live import draw_overlay, live_mask
from eval.prompts import LengthError, PromptEncoder, VqaPrompt
from models.schedule_choice import usable_schedules
from models.schedules import SCHEDULES, TRAINED
from models.stage_plan import StagePlan
from recipes.resolved import saved_data

NEW_TOKENS, MAX_NEW_TOKENS = 64, 1024
MAX_CHARACTERS = 8_000
MAX_PIXELS, MAX_SIDE, MAX_ASPECT = 25_000_000, 8_000, 50  # padded to a square, a side of 8,000 takes 200 MB
MAX_FILE = "30mb"
MAX_WAITING = 32  # questions in the queue
KEPT_SECONDS = 3600  # of an uploaded file
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # none that Pillow decodes with another program
EXAMPLES = 4
RELEASED = "released"  # the name of the schedule in config.json
_SIZES = (
    f"expected at most {MAX_PIXELS // 10**6} million pixels, and no side above {MAX_SIDE:,} or "
    f"{MAX_ASPECT} times the other"
)
_PORTS = range(1 << 16)
_SYSTEM_FONTS = ("system-ui", "sans-serif")  # already on the machine: nothing is fetched
_THEME = gr.themes.Base(font=_SYSTEM_FONTS, font_mono=("ui-monospace", "monospace"))
_CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important }
#image img { object-fit: contain; width: 100%; height: 100% }
/* an overlay of many pictures scrolls sideways */
#overlay .image-container { overflow-x: auto }
#overlay button { width: max-content; min-width: 100% }
#overlay img { max-width: none; width: auto }
"""


class QuestionError(ValueError):
    """A question that the demo does not ask; the message is one line for the user who typed it."""


@dataclass(frozen=True)
class Response:
    """An answer and its cost."""

    answer: str
    new_tokens: int  # generated, the end mark included
    prefill_seconds: float  # until the first token: vision tower, prompt, first token
    decode_seconds: float  # of all further tokens
    token_layers: int  # visual tokens that layers ran on in the prefill, summed over layers
    dense_token_layers: int  # the same if every layer saw every visual token
    overlay: Image.Image | None  # the live visual tokens drawn over the image as the model saw it; None without one


class _Clock(BaseStreamer):
    """Records when generate() hands over the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Records the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Does nothing."""


def respond(
    model: Any,
    prompt_encoder: PromptEncoder,
    image: Image.Image | None,
    question: str,
    schedule: str,
    max_new_tokens: int,
) -> Response:
    """Returns the greedy answer to a question under a schedule; the model's schedule does not matter.

    An image of None asks the words alone. The schedule is `released`, the one that the model's config.json names;
    `trained`; or a name in `SCHEDULES`, with published settings scaled to the model's depth.

    Raises:
        QuestionError: prompt and answer do not fit into the model's positions, or the tokenizer cannot write the text.
    """
    chosen = model.resolve(model.config.schedule if schedule == RELEASED else schedule)
    images = [] if image is None else [image.convert("RGB")]
    try:
        batch = prompt_encoder.batch([VqaPrompt(question, images)], new_tokens=max_new_tokens)
    except LengthError as error:
        raise QuestionError(f"{error}. Shorten the question, or ask for fewer new tokens.") from error
    except RowError as error:
        raise QuestionError(str(error)) from error
    inputs = {name: part.to(model.device) for name, part in batch.items()}
    clock, prefills = _Clock(), list[Any]()
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    with torch.inference_mode():
        tokens = model.generate(**inputs, **options, schedule=chosen, streamer=clock, on_prefill=prefills.append)
    live, ids, overlay = live_mask(prefills[0])[:, 0], inputs["input_ids"][0], None
    visual = ids == model.config.image_token_id
    if images and (grid := prompt_encoder.grid(images[0], inputs)) is not None:
        patches = prompt_encoder.patches(live, visual, grid, images[0])
        overlay = draw_overlay(prompt_encoder.picture(images[0], inputs), patches, grid)
    new = tokens[:, len(ids) :]
    start, first, last = clock.times[0], clock.times[1], clock.times[-1]
    return Response(
        answer=prompt_encoder.decode(new)[0],
        new_tokens=new.shape[1],
        prefill_seconds=first - start,
        decode_seconds=last - first,
        token_layers=int(live.sum()),
        dense_token_layers=int(visual.sum()) * model.config.text_config.num_hidden_layers,
        overlay=overlay,
    )


def schedule_choices(model: Any) -> list[tuple[str, str]]:
    """Returns (label, name) of each schedule that a model can be asked under; first the one that it starts under."""
    config, plans = model.config, model.config.plans or {}
    choices = [(f"{name}, one of its plans", name) for name in plans]
    names = [name for name in usable_schedules(config) if name not in plans]
    if config.stages is None:
        choices += [(name, name) for name in names]
    else:
        plan, depth = StagePlan.from_dict(config.stages), config.text_config.num_hidden_layers
        choices.insert(0, (f"{TRAINED}, vision in {sum(map(plan.sees, range(depth)))} of {depth} layers", TRAINED))
        choices += [(name if SCHEDULES[name].trainable else f"{name}, within the plan", name) for name in names]
    if config.schedule is not None:
        choices.insert(0, (f"{RELEASED}: {model.resolve(config.schedule)}", RELEASED))
    return choices


def examples(checkpoint: Checkpoint) -> list[list[str]]:
    """Returns [image file, question] of some easy-VQA test questions for a checkpoint trained on it; else none."""
    recipe = checkpoint.weights / "recipe.yaml"
    if not recipe.is_file() or not any(is_built_in(source.path) for source in saved_data(recipe).sources):
        return []
    first = {question.image: question.text for question in reversed(questions("test"))}  # one of each image
    return [[str(image), text] for image, text in sorted(first.items())[:EXAMPLES]]


def figures(response: Response) -> str:
    """Returns the cost of an answer, in two lines of markdown."""
    tokens, dense = response.token_layers, response.dense_token_layers
    share = f"{tokens:,} of dense's {dense:,} ({100 * tokens / dense:.0f} %)" if dense else "none, without an image"
    return (
        f"Prefill **{response.prefill_seconds:.3f} s**, decoding **{response.decode_seconds:.3f} s**, "
        f"new tokens: {response.new_tokens}  \nVisual token-layers: **{share}**"
    )


def read_image(file: str) -> Image.Image:
    """Returns an uploaded image as training sees it: upright, in RGB, on white where it is transparent.

    Raises:
        QuestionError: the file is no upload, not an image, or larger than the demo takes.
    """
    path = _uploaded(file)
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):  # refused below
            image = Image.open(path, formats=FORMATS)
        with image:
            _check_size(*image.size)
        return read_upload(path)
    except QuestionError:
        raise
    except RowError as error:
        raise QuestionError(f"{path.name} cannot be read as an image: {error}.") from error
    except Image.DecompressionBombError as error:  # Pillow's limit, far above this one
        raise QuestionError(f"The image is too large: {_SIZES}.") from error
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        raise QuestionError(f"{path.name} cannot be read as an image. Expected one of {', '.join(FORMATS)}.") from error


def _uploaded(file: Any) -> Path:
    """Returns the file that a client names, if it lies in the folder of uploads; Gradio has checked that once.

    Raises:
        QuestionError: the path leads elsewhere, by `..` or a link too, or nothing is there.
    """
    with suppress(OSError, ValueError, RuntimeError):  # a name too long, a NUL in it, a loop of links
        path, folder = Path(str(file)).resolve(), Path(get_upload_folder()).resolve()
        if path.is_relative_to(folder) and path.is_file():
            return path
    raise QuestionError("That image is not, or no longer, among the uploads. Upload it again.")


def _check_size(width: int, height: int) -> None:
    long, short = max(width, height), min(width, height)
    if width * height > MAX_PIXELS or long > MAX_SIDE or long > MAX_ASPECT * short:
        raise QuestionError(f"The image is too large: got {width:,} x {height:,} pixels, {_SIZES}.")


def _only_uploads(image: gr.Image) -> gr.Image:
    """Returns the component; it refuses an address, which Gradio would fetch, and a folder, which it cannot delete."""
    move = image.async_move_resource_to_block_cache

    async def moved(place: str | Path | None) -> str | None:
        if "://" in str(place) or (place and Path(place).is_dir()):
            raise gr.Error("Upload the image: addresses and folders are not opened.", print_exception=False)
        return await move(place)

    # not in a subclass: Gradio writes a .pyi file beside the source of one
    image.async_move_resource_to_block_cache = moved  # type: ignore[method-assign, assignment]
    return image


def _checked(question: Any, schedule: Any, new: Any, names: Sequence[str]) -> tuple[str, str, int]:
    """Returns question, schedule and number of new tokens; raises QuestionError for what the page cannot send."""
    if not isinstance(question, str) or not question.replace(IMAGE_PLACEHOLDER, "").strip():
        raise QuestionError("Type a question first.")
    if len(question) > MAX_CHARACTERS:
        raise QuestionError(
            f"The question is too long: got {len(question):,} characters, expected at most {MAX_CHARACTERS:,}."
        )
    if any("\ud800" <= letter <= "\udfff" for letter in question):
        raise QuestionError("The question holds half a character (a lone surrogate). Type it again.")
    if schedule not in names:
        raise QuestionError(f"Schedule: got {str(schedule)[:40]!r}, expected one of {', '.join(names)}.")
    if type(new) not in (int, float) or not 1 <= new <= MAX_NEW_TOKENS or new != int(new):
        raise QuestionError(f"New tokens: got {str(new)[:40]}, expected a whole number, 1 to {MAX_NEW_TOKENS:,}.")
    return question, schedule, int(new)


def page(name: str, model: Any, prompt_encoder: PromptEncoder, shown: Sequence[list[str]] = ()) -> gr.Blocks:
    """Returns the page; it answers one request at a time, so that its memory is that of one.

    `name` is the checkpoint's, `shown` has [image file, question] of each example.
    """
    choices = schedule_choices(model)
    names = [name for _, name in choices]

    def ask(file: Any, question: Any, schedule: Any, new: Any) -> tuple[str, str, Image.Image | None]:
        try:
            checked = _checked(question, schedule, new, names)
            image = None if file is None else read_image(file["path"])
            response = respond(model, prompt_encoder, image, *checked)
        except QuestionError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise gr.Error("The machine has not enough memory for this question.") from error
        return response.answer, figures(response), response.overlay

    title, cleaned = f"Fused LLaVA: {name}", (KEPT_SECONDS // 4, KEPT_SECONDS)
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=cleaned) as blocks:
        gr.Markdown(f"# {title}")
        with gr.Row():
            with gr.Column():
                image = _only_uploads(
                    gr.Image(label="Image", sources=["upload", "clipboard"], height=260, buttons=[], elem_id="image")
                )
                question = gr.Textbox(label="Question", max_length=MAX_CHARACTERS, elem_id="question")
                schedule = gr.Dropdown(choices, value=choices[0][1], label="Schedule", elem_id="schedule")
                most = gr.Slider(1, MAX_NEW_TOKENS, NEW_TOKENS, step=1, label="Maximum new tokens", elem_id="most")
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
            preprocess=False,  # `ask` checks everything, and says what a broken image is
            concurrency_limit=1,
            api_visibility="private",
        )
    # a request to the API routes would go round the queue, and answer beside another one
    return blocks.queue(api_open=False, max_size=MAX_WAITING)


def launch(blocks: gr.Blocks, *, host: str, port: int, password: str | None = None, share: bool = False) -> str:
    """Starts to serve a page and returns its address; with `share` it is a public one, through Gradio's servers.

    A password is asked for before anything else is answered.
    """
    auth = None if password is None else lambda _, given: hmac.compare_digest(given.encode(), password.encode())
    _, local, shared = blocks.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        auth=auth,
        auth_message="Any user name; the password is the one that the demo was started with.",
        share=share,
        max_file_size=MAX_FILE,
        prevent_thread_lock=True,
        quiet=True,
        theme=_THEME,
        css=_CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
    )
    return shared or local


def main(argv: Sequence[str] | None = None) -> int:
    """Loads a checkpoint and serves its page; returns the exit code."""
    args = _arguments(argv)
    is_local = args.host in ("localhost", "::1") or args.host.startswith("127.")
    if (args.share or not is_local) and args.password is None:
        print(
            "WARNING: no password. Everyone who reaches this address can ask the model and upload images. "
            "Add --password WORD to ask for one.",
            file=sys.stderr,
        )
    try:
        port = free_port(args.host, args.port)  # before weights are loaded, which may take minutes
        with TemporaryDirectory() as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder  # of uploads and drawings; Gradio would keep its own folder for good
            checkpoint = Checkpoint.find(args.checkpoint)
            model, processor = checkpoint.load()
            blocks = page(checkpoint.name, model, checkpoint.prompt_encoder(processor), examples(checkpoint))
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are deleted then too
            address = launch(blocks, host=args.host, port=port, password=args.password, share=args.share)
            print(f"{address} (Ctrl-C ends it)", flush=True)
            blocks.block_thread()
    except (UsageError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line("eval.demo", __doc__)
    parser.add_argument("checkpoint", metavar="DIR", help="run folder, released folder or hub name")
    parser.add_argument("--port", type=_port, default=7860, help="port to serve on (default 7860; 0: any free one)")
    parser.add_argument("--host", default="127.0.0.1", help="to serve on (default 127.0.0.1: this machine only)")
    parser.add_argument("--share", action="store_true", help="serve at a public address too, through Gradio's servers")
    parser.add_argument("--password", type=_word, metavar="WORD", help="ask for it before anything else")
    return parser.parse_args(argv)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) not in _PORTS:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0 to {_PORTS[-1]}")
    return int(text)


def _word(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("got an empty word, expected at least one character")
    return text


if __name__ == "__main__":
    sys.exit(main())
