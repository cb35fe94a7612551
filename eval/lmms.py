"""Runs lmms-eval on checkpoints of any supported family, under any schedule.

`python -m eval.lmms --model fused_llava --model_args pretrained=DIR,schedule=visipruner --tasks pope` is lmms-eval's
own command line with our model and our tasks known to it, and with an exit code other than 0 where it fails.
`eval.compare` uses the same classes from Python. Only this file and eval/tasks/built_in.py import lmms_eval.

lmms-eval is installed without its dependencies (launch.sh): the torchvision that they bring is a CUDA build, beside
which transformers cannot be imported on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lmms_eval import evaluator
from lmms_eval import models as harness_models
from lmms_eval import tasks as harness_tasks
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger
from PIL import Image, ImageFile
from tqdm import tqdm
from transformers import GenerationConfig

from data.chat import TokenizerError
from eval.arguments import UsageError, positive
from eval.checkpoint import ASPECTS, FORMATS, Checkpoint, CheckpointError
from eval.comparison import ranks
from eval.prompts import PromptEncoder, VqaPrompt
from eval.tasks.benchmarks import BENCHMARKS
from models.schedule_choice import require_runnable
from models.schedules import TRAINED, ScheduleError

ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval's import lets broken images through, in the whole process
TASKS_FOLDER = Path(__file__).parent / "tasks"
MODEL_NAME = "fused_llava"
HARNESS = f"lmms-eval {version('lmms-eval')}"
NEW_TOKENS = 128  # of a task that sets none (textvqa, vizwiz, seedbench); LLaVA-1.5's scripts say 128 for them too
_KNOWN = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {"seed"}
_FIXED = {  # what `FusedLlava.answer` relies on
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    **dict.fromkeys((name for name in _KNOWN if name.startswith("output_")), False),
}
_SAMPLING = {"seed", "temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# images are shown as the checkpoint was trained to see them; special tokens are no part of an answer
_NOT_OURS = {"image_aspect_ratio", "skip_special_tokens"}
_ANSWER_END = "\n\n"  # lmms-eval's end of an answer where a task names none


class SettingsError(UsageError):
    """A task's generation settings are not what generate() takes."""


class FusedLlava(lmms):
    """A loaded checkpoint as lmms-eval sees a model: greedy or sampled answers to requests, in batches.

    `model` runs under its schedule; `prompt_encoder` formats prompts as in training; `batch` is the batch size.
    """

    is_simple = True

    def __init__(self, model: Any, prompt_encoder: PromptEncoder, batch: int = 1) -> None:
        super().__init__()
        self._held = (model, prompt_encoder)  # in a tuple: the harness deletes every module attribute after a task
        self._screen = sys.stderr  # as it is now: `Harness` sends the harness's own output elsewhere
        self.batch_size = batch

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> FusedLlava:
        """Returns the model of lmms-eval's `--model_args` and `--batch_size`.

        Accepted are `pretrained` (needed), `schedule`, `chat_format` and `image_aspect`; the batch comes from
        `--batch_size`. Under `accelerate launch` every process takes its own GPU.

        Raises:
            CheckpointError: an argument is wrong, or the checkpoint cannot be loaded.
        """
        parts = (part.partition("=") for part in arg_string.split(",") if part.strip())
        given = {name.strip(): value.strip() for name, _, value in parts}
        known = {"pretrained": (), "schedule": (), "chat_format": FORMATS, "image_aspect": ASPECTS}
        for name, value in given.items():
            if name not in known:
                raise CheckpointError(f"--model_args: got '{name}', expected {', '.join(known)}")
            if known[name] and value not in known[name]:
                raise CheckpointError(f"--model_args: {name}: got '{value}', expected {', '.join(known[name])}")
        if "pretrained" not in given:
            raise CheckpointError("--model_args: got no pretrained, expected pretrained=FOLDER or a hub name")
        batch = _batch((additional_config or {}).get("batch_size"))
        schedule = given.get("schedule") or TRAINED
        checkpoint = Checkpoint.find(given["pretrained"], given.get("chat_format"), given.get("image_aspect"))
        try:
            require_runnable(checkpoint.schedule(schedule), checkpoint.config)
        except ScheduleError as error:
            raise CheckpointError(f"--model_args: {error}") from None
        model, processor = checkpoint.load()
        if torch.cuda.is_available():
            model = model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
        model.schedule = schedule
        return cls(model, checkpoint.prompt_encoder(processor), batch)

    @property
    def device(self) -> torch.device:
        """Where the harness puts its tensors."""
        return self._held[0].device

    def clean(self) -> None:
        """Keeps the model: the harness would delete it after each task, and one model answers many."""

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns the answers, in the order of the requests."""
        settings = [generation_settings(request.args[1]) for request in requests]
        answers: list[str] = []
        with tqdm(total=len(requests), unit="question", leave=False, file=self._screen, disable=self.rank > 0) as bar:
            for _, members in groupby(range(len(requests)), key=lambda number: settings[number]):
                numbers = list(members)
                for start in range(0, len(numbers), self.batch_size):
                    part = numbers[start : start + self.batch_size]
                    prompts = [self._prompt_of(requests[number].args) for number in part]
                    answers += self.answer(prompts, *settings[part[0]])
                    bar.update(len(part))
        return answers

    def answer(
        self, prompts: Sequence[VqaPrompt], settings: tuple[tuple[str, Any], ...], ends: Sequence[str]
    ) -> list[str]:
        """Returns the answers to one batch, each cut at the first of `ends`."""
        model, prompt_encoder = self._held
        batch = prompt_encoder.batch(prompts, model.schedule)
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        options = dict(settings)
        seed = options.pop("seed", None)
        with torch.inference_mode(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            try:
                tokens = model.generate(**inputs, **options)
            except (ValueError, TypeError, ArithmeticError) as error:
                if isinstance(error, ScheduleError):
                    raise
                shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
                raise SettingsError(f"generate({shown}): {' '.join(str(error).split())}") from error
        texts = prompt_encoder.decode(tokens[:, inputs["input_ids"].shape[1] :])
        return [cut(text, ends) for text in texts]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuses: no task of LLaVA-1.5's set asks for it."""
        raise NotImplementedError("fused_llava: got a loglikelihood task, expected generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuses: no task of LLaVA-1.5's set asks for it."""
        raise NotImplementedError("fused_llava: got a multi-round task, expected generate_until")

    def _prompt_of(self, args: tuple[Any, ...]) -> VqaPrompt:
        text, _, doc_to_visual, doc_id, task, split = args
        return VqaPrompt(text, _images(doc_to_visual(self.task_dict[task][split][doc_id]), task))


def _batch(given: Any) -> int:
    """Returns lmms-eval's batch size; its default is 1."""
    try:
        return positive(str(1 if given is None else given))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--batch_size: {error}") from None


def generation_settings(given: Mapping[str, Any]) -> tuple[tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """Returns what generate() is given for a task's generation_kwargs, and what ends an answer.

    Every setting of Hugging Face's GenerationConfig is passed on. Those that shape a distribution, and `seed`, are left
    out of greedy decoding. `max_gen_toks` is lmms-eval's older name of `max_new_tokens`, a temperature of 0 its word
    for greedy.

    Raises:
        SettingsError: a setting that generate() does not know, or that would change what it returns.
    """
    settings = {name: value for name, value in given.items() if value is not None and name not in _NOT_OURS}
    if "max_gen_toks" in settings:
        settings.setdefault("max_new_tokens", settings.pop("max_gen_toks"))
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
    ends = settings.pop("until", _ANSWER_END)
    for name, value in settings.items():
        if name in _FIXED and value != _FIXED[name]:
            raise SettingsError(f"generation_kwargs: {name}: got {value!r}, expected {_FIXED[name]!r}")
        if name not in _KNOWN:
            raise SettingsError(
                f"generation_kwargs: got {name!r}, expected a setting of GenerationConfig, seed or until"
            )
    if settings.get("temperature") == 0:
        settings["do_sample"] = False
    unused = _FIXED.keys() if settings["do_sample"] else _FIXED.keys() | _SAMPLING
    settings = {name: value for name, value in settings.items() if name not in unused}
    return tuple(sorted(settings.items())), (ends,) if isinstance(ends, str) else tuple(ends)


def cut(text: str, ends: Sequence[str]) -> str:
    """Returns the text up to the first of `ends`, without white space around it."""
    for end in ends:
        text = text.partition(end)[0] if end else text
    return text.strip()


@dataclass(frozen=True)
class Outcome:
    """The results of lmms-eval for one model on one task."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # of each question doc_id, doc, target, filtered_resps, and its metrics
    prompt: dict[str, Any]  # the task's definition: prompt, generation settings, dataset, version


class Harness:
    """lmms-eval's tasks, each loaded once.

    In `folder` are the submission files of some tasks, and harness.log, what lmms-eval and its tasks print. `tasks`
    are the names that will be asked for.
    """

    def __init__(self, folder: Path, tasks: Iterable[str]) -> None:
        self._folder = folder
        logger.remove()
        logger.add(folder / "harness.log", level="INFO")
        wanted = {BENCHMARKS[task].folder if task in BENCHMARKS else None for task in tasks}
        every = None in wanted  # reading its 2,000 definitions takes 10 seconds
        theirs = Path(harness_tasks.__file__).parent
        folders = [] if every else [str(theirs / name) for name in wanted if name]
        self._manager = TaskManager("ERROR", include_path=[str(TASKS_FOLDER), *folders], include_defaults=every)
        self._task = cache(lambda name: get_task_dict([name], self._manager, "simple")[name])

    def known(self, name: str) -> bool:
        """Returns whether lmms-eval has a task of that name, or we have; a group of tasks is none."""
        return name in self._manager.all_tasks and name not in (*self._manager.all_groups, *self._manager.all_tags)

    def run(self, model: FusedLlava, name: str, limit: int | None) -> Outcome | None:
        """Returns the scores of the model on a task's first `limit` questions (None: all).

        Each rank answers its part; rank 0 gets the outcome, the others None.
        """
        with self._quiet():
            result = evaluator.simple_evaluate(
                model=model,
                tasks=[self._task(name)],
                task_manager=self._manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                verbosity="ERROR",
                process_docs_parallel=1,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                distributed_executor_backend="torchrun" if ranks.world_size() > 1 else "accelerate",
                cli_args=argparse.Namespace(output_path=str(self._folder), process_with_media=True),
            )
        if result is None:
            return None
        metrics = {
            key.removesuffix(",none"): float(value)
            for key, value in result["results"][name].items()
            if key.endswith(",none") and "_stderr" not in key and isinstance(value, int | float)
        }
        samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])  # each rank's stand together
        return Outcome(metrics, samples, result["configs"][name])

    def questions(self, name: str, limit: int | None, count: int) -> dict[int, VqaPrompt]:
        """Returns up to `count` of a task's first `limit` questions (None: all), evenly spaced, by their number."""
        with self._quiet():
            task = self._task(name)
            docs = task.eval_docs
            size = min(len(docs), limit or len(docs))
            numbers = sorted({place * size // count for place in range(count)})
            return {
                number: VqaPrompt(task.doc_to_text(docs[number]), _images(task.doc_to_visual(docs[number]), name))
                for number in numbers
            }

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with (self._folder / "harness.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            yield


def _images(visuals: Sequence[Any] | None, task: str) -> list[Image.Image]:
    for visual in visuals or []:
        if not isinstance(visual, Image.Image):
            raise TypeError(f"{task}: got a {type(visual).__name__} to look at, expected images")
    return [visual.convert("RGB") for visual in visuals or []]


def main() -> int:
    """Runs lmms-eval's command line with our model and tasks; returns the exit code."""
    manifest = ModelManifest(model_id=MODEL_NAME, simple_class_path="eval.lmms.FusedLlava")
    harness_models.MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    given = {part.partition("=")[0] for part in sys.argv}
    if "--include_path" not in given:
        sys.argv += ["--include_path", str(TASKS_FOLDER)]
    if "--verbosity" not in given:
        sys.argv += ["--verbosity", "DEBUG"]  # with any other it swallows errors and leaves with 0
    from lmms_eval.__main__ import cli_evaluate  # configures logging when imported

    try:
        cli_evaluate()
    except (UsageError, TokenizerError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
