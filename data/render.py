"""Turns -> one text, with the places of what a model has to say and of what people wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data.records import IMAGE_MARK, Turn

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Span = tuple[int, int]  # characters [start, end) of a rendered text


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text; spans are in order and do not overlap.

    Attributes:
        text: what is tokenised.
        answers: what a model has to generate: each answer, from where its prompt ends, with its end mark.
        written: what people wrote, in which special tokens mean nothing.
    """

    text: str
    answers: tuple[Span, ...]
    written: tuple[Span, ...]


class Writer:
    """Writes a text piece by piece and keeps the spans."""

    def __init__(self) -> None:
        self.text = ""
        self._answers: list[Span] = []
        self._written: list[Span] = []

    def frame(self, text: str) -> None:
        """Writes what the format says, in which special tokens are special."""
        self.text += text

    def question(self, text: str) -> None:
        """Writes a user's text; its image marks stay marks."""
        for place, part in enumerate(text.split(IMAGE_MARK)):
            if place > 0:
                self.frame(IMAGE_MARK)
            self._people(part)

    def answer(self, text: str, *, lead: str, end_mark: str) -> None:
        """Writes an answer.

        Args:
            text: the answer's own text.
            lead: what stands between the prompt and it: a model has to generate that too.
            end_mark: what ends it.
        """
        start = len(self.text)
        self.frame(lead)
        self._people(text)
        self.frame(end_mark)
        self._answers.append((start, len(self.text)))

    def rendered(self) -> Rendered:
        """Returns all that was written."""
        return Rendered(self.text, tuple(self._answers), tuple(self._written))

    def _people(self, text: str) -> None:
        start = len(self.text)
        self.text += text
        if text:
            self._written.append((start, len(self.text)))


def vicuna(turns: Sequence[Turn], end_mark: str) -> Rendered:
    """Returns the system prompt, then `USER: question ASSISTANT: answer</s>` for each pair.

    The prompt ends with `ASSISTANT:`, so the space after it belongs to the answer; most tokenizers write it into the
    answer's first token, but not before a Chinese character.

    Source: LLaVA's conv_vicuna_v1. An empty answer differs: LLaVA leaves out the space and the end mark.
    """
    writer = Writer()
    writer.frame(VICUNA_SYSTEM + " ")
    for turn in turns:
        if turn.role == "user":
            writer.frame("USER: ")
            writer.question(turn.text)
            writer.frame(" ASSISTANT:")
        else:
            writer.answer(turn.text, lead=" ", end_mark=end_mark)
    return writer.rendered()


def plain(turns: Sequence[Turn]) -> Rendered:
    """Returns image, newline, caption, newline; the question is left out.

    Source: LLaVA's conv_llava_plain. The newline between image and caption differs: a caption's first token is
    predicted from the token before it, and a fused model no longer holds a visual token's state at the end.
    """
    writer = Writer()
    for turn in turns:
        if turn.role == "user":
            writer.frame(IMAGE_MARK * turn.text.count(IMAGE_MARK) + "\n")
        else:
            writer.answer(turn.text, lead="", end_mark="\n")
    return writer.rendered()
