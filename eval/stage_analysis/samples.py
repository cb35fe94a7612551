"""Questions with their known answers, as the stage analysis asks them: one padded batch after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from data import easy_vqa, scenes
from data.chat import IGNORE_INDEX
from data.images import open_image
from data.processor import EncodedImages
from data.rows import IMAGE_PLACEHOLDER, DataError, EmbeddedImage, Fault, Record, RowError, Turn, count_placeholders
from data.table import read_records
from eval.arguments import UsageError
from eval.prompts import LengthError, PromptEncoder, image_inputs, is_same_answer, pad_left
from eval.text_tower import SHORT_ANSWER
from models.decoder import DecoderOutput
from models.schedules import Schedule

_ROOM: Final = 2  # tokens that a model may write more than the known answer has: a full stop, another spelling


class SamplesError(UsageError):
    """The task cannot be asked; the text says what was got and what is expected."""


@dataclass(frozen=True)
class Sample:
    """One question about one or more images, and its answer.

    Attributes:
        id: names it in stages.json.
        images: RGB, in the order of the question's placeholders.
        turns: the question and its answer, as a training row has them.
        group: what it is about: samples of one group (questions about one image) are not independent.
        family: kind of question, where the task has kinds.
        system: the system prompt; None means the format's default.
    """

    id: str
    images: Sequence[Image.Image]
    turns: tuple[Turn, Turn]
    group: str
    family: str = ""
    system: str | None = None

    @property
    def answer(self) -> str:
        """The answer, as the model was trained to write it."""
        return self.turns[1].text

    def answered(self, answer: str) -> Sample:
        """Returns the sample with another answer."""
        question, known = self.turns
        return replace(self, turns=(question, replace(known, text=answer)))


@dataclass(frozen=True, eq=False)
class Batch:
    """Questions followed by their answers, padded on the left, images already encoded. B samples, S tokens.

    Attributes:
        inputs: of the model's forward, the encoded images in place of their pixels.
        visual: (B, S) bool, the visual tokens.
        mask: (B, S) int64, 0 on padding.
        ids: (B, S) int64.
        predicts: (B, S) bool, the tokens that predict a token of the answer; its end mark is one.
        ends: (B, S) bool, the last instruction token: the one that predicts the answer's first.
        reads: (B, S) bool, the text tokens that can see vision, up to the last instruction token.
    """

    inputs: dict[str, Any]
    visual: Tensor
    mask: Tensor
    ids: Tensor
    predicts: Tensor
    ends: Tensor
    reads: Tensor

    @classmethod
    def of(cls, model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Batch:
        """Returns a batch on the model's device.

        Args:
            model: a fused model of any family.
            inputs: as `PromptEncoder.batch` has them, of questions with images and their answers.
            labels: (B, S), IGNORE_INDEX outside the answers.
        """
        moved = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
        taken = signature(model.model.get_image_features).parameters
        encoded = model.model.get_image_features(
            **{name: value for name, value in moved.items() if name in taken and name != "input_ids"}, return_dict=True
        )
        del moved["pixel_values"]
        ids, mask, labels = moved["input_ids"], moved["attention_mask"], labels.to(model.device)
        visual = (ids == model.config.image_token_id) & mask.bool()
        predicts = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
        ends = predicts & (predicts.cumsum(dim=1) == 1)
        until_end = ends.flip(1).cumsum(dim=1).flip(1).bool()
        return cls(
            inputs={**moved, "mm_encoder_outputs": {"image": encoded}},
            visual=visual,
            mask=mask,
            ids=ids,
            predicts=predicts,
            ends=ends,
            reads=until_end & mask.bool() & ~visual & (visual.cumsum(dim=1) > 0),
        )

    def run(self, model: Any, schedule: Schedule, queries: Tensor | None = None) -> DecoderOutput:
        """Returns a prefill's result under a schedule; `queries` (B, S) are the tokens whose attention it reads."""
        query_mask = self.ends if queries is None else queries
        output = model(**self.inputs, schedule=schedule, query_mask=query_mask, use_cache=False, logits_to_keep=1)
        return output.decoder

    def predicting(self, model: Any, schedule: Schedule) -> Tensor:
        """Returns (R, D): the last hidden states, under a schedule, of the tokens that predict an answer."""
        return self.run(model, schedule).last_hidden_state[self.predicts]

    @property
    def first_answers(self) -> Tensor:
        """(B,) int64: the first token of each answer."""
        return self.ids.roll(-1, dims=1)[self.ends]

    @property
    def text_tokens(self) -> list[int]:
        """How many text tokens each sample has, the answer's too."""
        return (self.mask.bool() & ~self.visual).sum(dim=1).tolist()


class ProbeBatcher:
    """Makes batches of samples for one checkpoint.

    Args:
        model: a fused model of any family.
        prompt_encoder: formats prompts as in the checkpoint's training.
    """

    def __init__(self, model: Any, prompt_encoder: PromptEncoder) -> None:
        self.model, self.prompt_encoder = model, prompt_encoder

    def encode(self, sample: Sample, images: EncodedImages) -> tuple[list[int], list[int]]:
        """Returns ids and labels of question and answer, with what the processor writes for each image.

        Raises:
            SamplesError: nothing of the answer is left, the chat template rewrites the conversation, or it is longer
                than the decoder's positions.
        """
        try:
            ids, labels = self.prompt_encoder.chat.encode(sample.turns, sample.system)
        except RowError as error:
            raise SamplesError(f"sample {sample.id}: {error}") from None
        if all(label == IGNORE_INDEX for label in labels):
            raise SamplesError(f"sample {sample.id}: found no token of the answer {sample.answer!r}")
        spans, targets = iter(images.spans), list[int]()
        for token, label in zip(ids, labels, strict=True):
            is_image = token == self.prompt_encoder.vision.image_token_id
            targets += [IGNORE_INDEX] * len(next(spans)) if is_image else [label]
        try:
            self.prompt_encoder.check_length(len(targets))
        except LengthError as error:
            raise SamplesError(f"sample {sample.id}: {error}") from None
        return self.prompt_encoder.expand(ids, images), targets

    def check_longest(self, samples: Sequence[Sample]) -> None:
        """Encodes the sample with the longest text; raises SamplesError where it cannot be encoded."""
        longest = max(samples, key=lambda sample: sum(len(turn.text) for turn in sample.turns))
        self.encode(longest, self.images(longest))

    def images(self, sample: Sample) -> EncodedImages:
        """Returns a sample's images as tokens and inputs; raises SamplesError where the processor rejects one."""
        try:
            return self.prompt_encoder.vision.encode(sample.images)
        except RowError as error:
            raise SamplesError(f"sample {sample.id}: {error}") from None

    @torch.no_grad()
    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Returns the samples, each of which has an image, as one batch on the model's device."""
        images = [self.images(sample) for sample in samples]
        encoded = [self.encode(sample, one) for sample, one in zip(samples, images, strict=True)]
        labels = pad_left([labels for _, labels in encoded], IGNORE_INDEX)["input_ids"]
        inputs = {**self.prompt_encoder.padded([ids for ids, _ in encoded]), **image_inputs(images)}
        return Batch.of(self.model, inputs, labels)

    @torch.no_grad()
    def as_written(self, samples: Sequence[Sample], size: int, schedule: Schedule) -> list[Sample]:
        """Returns the samples, each with its answer as the model writes it: "Red." in place of "red".

        An answer that is wrong, by more than case and a full stop, leaves the known one in place.

        Args:
            samples: each with an image.
            size: samples of one forward pass.
            schedule: that the model answers under, by greedy decoding.
        """
        found = []
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            images = [self.images(sample) for sample in part]
            encoded = [self.encode(sample, one) for sample, one in zip(part, images, strict=True)]
            begins = [next(i for i, label in enumerate(labels) if label != IGNORE_INDEX) for _, labels in encoded]
            prompts = [ids[:begin] for (ids, _), begin in zip(encoded, begins, strict=True)]
            longest = max(len(ids) - begin for (ids, _), begin in zip(encoded, begins, strict=True))
            inputs = {**self.prompt_encoder.padded(prompts), **image_inputs(images)}
            moved = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
            tokens = self.model.generate(**moved, schedule=schedule, max_new_tokens=longest + _ROOM, do_sample=False)
            texts = self.prompt_encoder.decode(tokens[:, inputs["input_ids"].shape[1] :])
            found += [
                sample.answered(text) if is_same_answer(text, sample.answer) else sample
                for sample, text in zip(part, texts, strict=True)
            ]
        return found

    def batches(self, samples: Sequence[Sample], size: int) -> Iterator[tuple[Sequence[Sample], Batch]]:
        """Yields the samples `size` at a time, each with its batch."""
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            yield part, self.batch(part)


def spaced(total: int, limit: int) -> list[int]:
    """Returns `limit` of the numbers 0 ... total - 1, evenly spaced; all of them where there are no more."""
    count = min(total, limit)
    return [place * total // count for place in range(count)]


def easy_vqa_samples(limit: int, *, asks_short: bool = False) -> list[Sample]:
    """Returns test questions of easy-VQA, evenly spaced over all 9,673.

    With `asks_short` each asks for a single word or phrase, as LLaVA's training data does.
    """
    return _question_samples(easy_vqa.questions("test"), limit, SHORT_ANSWER if asks_short else "")


def scenes_samples(limit: int) -> list[Sample]:
    """Returns test questions of scenes, evenly spaced over all 6,000."""
    return _question_samples(scenes.questions("test"), limit)


def _question_samples(questions: Sequence[Any], limit: int, request: str = "") -> list[Sample]:
    chosen = [(number, questions[number]) for number in spaced(len(questions), limit)]
    return [
        Sample(
            id=str(number),
            images=[_rgb(one.image)],
            turns=question_and_answer(one.text + request, one.answer),
            group=one.image.stem,
            family=one.kind,
        )
        for number, one in chosen
    ]


def question_and_answer(question: str, answer: str) -> tuple[Turn, Turn]:
    """Returns the turns of a question about one image."""
    return Turn("user", f"{IMAGE_PLACEHOLDER}\n{question}"), Turn("assistant", answer)


def file_samples(file: Path, images: Path | None, limit: int) -> list[Sample]:
    """Returns first questions and their answers as training has them, evenly spaced over the rows of a file.

    Rows whose first question has no image are left out, and those that exclude its answer from training.

    Args:
        file: of any format that `data.files` takes.
        images: folder that its image paths are relative to.
        limit: at most so many.

    Raises:
        SamplesError: a row has a fault, an image is missing, or no first question has an image.
    """
    records = []
    try:
        for name, number, record in read_records(str(file)):
            if isinstance(record, RowError):
                raise SamplesError(f"--task: {Fault(name, number, str(record))}")
            if count_placeholders(record.turns[0].text) and record.turns[1].is_trained:
                records.append((number, record))
    except DataError as error:
        raise SamplesError(f"--task: {error}") from None
    if not records:
        raise SamplesError(
            f"--task: {file}: got no row whose first question has an image and an answer that is trained on, expected "
            "some that do"
        )
    chosen = [records[place] for place in spaced(len(records), limit)]
    return [_file_sample(str(file), number, record, images) for number, record in chosen]


def _file_sample(file: str, number: int, record: Record, images: Path | None) -> Sample:
    question, answer = record.turns[:2]
    shown = record.images[: count_placeholders(question.text)]
    is_inside = all(isinstance(image, EmbeddedImage) or image.startswith("data:") for image in shown)
    if images is None and not is_inside:
        raise SamplesError(f"--images: {Fault(file, number, 'names an image')}: got no folder, expected its images'")
    try:
        pictures = [open_image(images, image) for image in shown]
    except RowError as error:
        raise SamplesError(f"--images: {Fault(file, number, str(error))}") from None
    names = [sha256(image.data).hexdigest() if isinstance(image, EmbeddedImage) else image for image in shown]
    return Sample(str(number), pictures, (question, answer), ",".join(names), system=record.system)


def _rgb(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
