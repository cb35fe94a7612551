"""easy-VQA by generation: every test question asked alone, the generated answer compared with the truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.chat import ChatFormat
from data.easy_vqa import Question, answers_by_words, questions
from data.images import pixel_values, visual_tokens
from data.records import IMAGE_MARK, Turn

KINDS = ("yes/no", "shape", "colour")
MAX_NEW_TOKENS = 8  # the longest answer has one word


@dataclass(frozen=True)
class Answers:
    """What a model said to each question.

    Attributes:
        questions: the questions, in order.
        said: the generated text of each, lower case, without white space around it.
    """

    questions: Sequence[Question]
    said: Sequence[str]


def answer(model: Any, processor: Any, *, limit: int | None, title: str, batch: int = 256) -> Answers:
    """Returns the model's greedy answers.

    Args:
        model: a FusedLlavaForConditionalGeneration; its schedule decides the way through the decoder.
        processor: its LlavaProcessor.
        limit: only the first so many questions; None is all.
        title: of the progress bar.
        batch: questions of one generate() call.
    """
    asked = questions("test")[:limit]
    said: list[str] = []
    for inputs in tqdm(batches(asked, processor, size=batch), desc=title, unit="batch", total=-(-len(asked) // batch)):
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        said += [text.strip().lower() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return Answers(asked, said)


def batches(asked: Sequence[Question], processor: Any, *, size: int) -> Iterator[dict[str, Tensor]]:
    """Yields the questions as inputs of generate(): input_ids, attention_mask and pixel_values, padded on the left."""
    chat = ChatFormat("chat_template", processor.tokenizer)
    images, prompts = pixels_of(asked, processor), [prompt(question, chat, processor) for question in asked]
    for start in range(0, len(asked), size):
        part = slice(start, start + size)
        inputs = pad_left(prompts[part], processor.tokenizer.pad_token_id)
        inputs["pixel_values"] = torch.cat([images[question.image.name] for question in asked[part]])
        yield inputs


def accuracy(answers: Answers) -> dict[str, float]:
    """Returns the share of right answers: `all`, and of each kind that was asked."""
    right = [said == question.answer for said, question in zip(answers.said, answers.questions, strict=True)]
    shares = {"all": sum(right) / len(right)}
    for kind in KINDS:
        members = [hit for hit, question in zip(right, answers.questions, strict=True) if question.kind == kind]
        if members:
            shares[kind] = sum(members) / len(members)
    return shares


def always_yes(limit: int | None) -> dict[str, float]:
    """Returns the accuracy of answering "yes" to everything."""
    asked = questions("test")[:limit]
    return accuracy(Answers(asked, ["yes"] * len(asked)))


def words_only(limit: int | None) -> dict[str, float]:
    """Returns the accuracy of the most frequent training answer to the same words: the floor of a model that looks."""
    asked, known = questions("test")[:limit], answers_by_words()
    return accuracy(Answers(asked, [known.get(question.text, "") for question in asked]))


def prompt(question: Question, chat: ChatFormat, processor: Any) -> list[int]:
    """Returns the ids of one question about its image, the image token repeated for its visual tokens."""
    ids = chat.prompt([Turn("user", f"{IMAGE_MARK}\n{question.text}")])
    counts = [visual_tokens(processor) if token == chat.image_token_id else 1 for token in ids]
    return [token for token, count in zip(ids, counts, strict=True) for _ in range(count)]


def pixels_of(asked: Sequence[Question], processor: Any) -> dict[str, Tensor]:
    """Returns the pixel values of each image that is asked about, by file name."""
    images = {question.image.name: question.image for question in asked}
    return {
        name: pixel_values(Image.open(file).convert("RGB"), processor.image_processor, aspect="processor")
        for name, file in images.items()
    }


def pad_left(prompts: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """Returns input_ids and attention_mask (B, S), padded on the left, where generation does not look."""
    size = max(map(len, prompts))
    ids = torch.tensor([[pad] * (size - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (size - len(ids)) + [1] * len(ids) for ids in prompts])
    return {"input_ids": ids, "attention_mask": mask}
