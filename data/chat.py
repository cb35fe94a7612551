"""Chat formats: turns -> one text -> one tokenisation -> token ids and labels.

The supervised text is known as character spans of the one rendered text, and the one tokenisation reports each
token's characters, so there are no two token counts that could differ. (LLaVA's own code compares two, and drops
a sample's labels in silence where they do.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.records import IMAGE_MARK, RowError, Turn

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's own
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Span = tuple[int, int]  # characters [start, end) of a rendered text


class TokenizerError(ValueError):
    """The tokenizer cannot render or label conversations; the text says why."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text.

    Attributes:
        text: what is tokenised.
        answers: the supervised characters: each answer with its end mark.
        literal: characters that came from the data, in which special tokens mean nothing.
    """

    text: str
    answers: tuple[Span, ...]
    literal: tuple[Span, ...]


class ChatFormat:
    """Turns conversations into ids and labels, for one tokenizer and one of the three formats.

    Args:
        name: `vicuna_v1`, `chat_template` or `plain`.
        tokenizer: a fast Hugging Face tokenizer that knows the image mark as one token.

    Raises:
        TokenizerError: the tokenizer is slow, has no end mark or image token, or lacks a chat template.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(f"tokenizer: found {type(tokenizer).__name__}, accepted: a fast one (with offsets)")
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise TokenizerError(f"tokenizer: has no token {IMAGE_MARK}, accepted: one that has")
        if tokenizer.eos_token is None:
            raise TokenizerError("tokenizer: has no eos_token, accepted: one that ends an answer")
        if name == "chat_template" and tokenizer.chat_template is None:
            raise TokenizerError("data.format: found chat_template, but the tokenizer has none, accepted: vicuna_v1")
        if name == "chat_template":
            _check_template(tokenizer)
        self.name, self.tokenizer = name, tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = {number for number, token in added.items() if token.special} | {self.image_token_id}

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Returns ids, with one image token an image, and labels: ids where supervised, IGNORE_INDEX elsewhere."""
        return self._tokenise(self._render(turns))

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Returns the ids of a conversation that ends with a question, up to where the answer begins."""
        return self._tokenise(self._render(turns))[0]

    def _render(self, turns: Sequence[Turn]) -> Rendered:
        if self.name == "plain":
            return _plain(turns)
        if self.name == "vicuna_v1":
            return _vicuna(turns, self.tokenizer.eos_token)
        return _template(turns, self.tokenizer)

    def _tokenise(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        encoding = self.tokenizer(
            rendered.text,
            add_special_tokens=self.name != "chat_template",  # a template writes its own
            return_offsets_mapping=True,
            verbose=False,
        )
        ids: list[int] = []
        labels: list[int] = []
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            tokens = [token]
            if token in self._special and end > start and _inside(start, end, rendered.literal):
                tokens = self._as_text(rendered.text[start:end])
            supervised = _overlaps(start, end, rendered.answers)
            ids += tokens
            labels += tokens if supervised else [IGNORE_INDEX] * len(tokens)
        return ids, labels

    def _as_text(self, literal: str) -> list[int]:
        """Returns the ids of a special token's name that somebody wrote in a question or an answer."""
        ids = self.tokenizer(literal, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [token for token in ids if token not in self._special] or [self.tokenizer.unk_token_id]


def truncate(turns: Sequence[Turn], length_of: Any, max_length: int) -> tuple[Turn, ...]:
    """Returns the longest beginning of `turns`, whole question-answer pairs, that fits into `max_length`.

    Args:
        turns: the conversation.
        length_of: returns the tokens of some turns, visual tokens included.
        max_length: tokens.

    Raises:
        RowError: not even the first pair fits, so nothing would be left to learn from.
    """
    kept = tuple(turns)
    while len(kept) >= 2:
        length = length_of(kept)
        if length <= max_length:
            return kept
        kept = kept[: len(kept) - (2 - len(kept) % 2)]
    raise RowError(f"no label is left: the first answer ends after {length} tokens, accepted: up to {max_length}")


class _Text:
    """A text being written, with the spans of what was written into it."""

    def __init__(self) -> None:
        self.text = ""
        self.answers: list[Span] = []
        self.literal: list[Span] = []
        self._open: int | None = None

    def write(self, text: str) -> Span:
        start = len(self.text)
        self.text += text
        return start, len(self.text)

    def question(self, text: str) -> None:
        """Writes a user's text; its image marks stay marks."""
        for place, part in enumerate(text.split(IMAGE_MARK)):
            if place > 0:
                self.write(IMAGE_MARK)
            self.literal.append(self.write(part))

    @property
    def is_open(self) -> bool:
        """An answer was written whose end mark was not."""
        return self._open is not None

    def open_answer(self, text: str) -> None:
        """Writes an answer's own text."""
        span = self.write(text)
        self.literal.append(span)
        self._open = span[0]

    def close_answer(self, end_mark: str) -> None:
        """Writes the open answer's end mark, which is supervised too."""
        if self._open is not None:
            self.answers.append((self._open, self.write(end_mark)[1]))
        self._open = None

    def rendered(self) -> Rendered:
        return Rendered(self.text, tuple(self.answers), tuple(self.literal))


def _vicuna(turns: Sequence[Turn], end_mark: str) -> Rendered:
    """Source: LLaVA's conv_vicuna_v1: system, then `USER: q ASSISTANT: a</s>` for each pair."""
    text = _Text()
    text.write(VICUNA_SYSTEM + " ")
    for turn in turns:
        if turn.role == "user":
            text.write("USER: ")
            text.question(turn.text)
            text.write(" ASSISTANT:")
        else:
            text.write(" ")
            text.open_answer(turn.text)
            text.close_answer(end_mark)
    return text.rendered()


def _plain(turns: Sequence[Turn]) -> Rendered:
    """Source: LLaVA's conv_llava_plain: image, caption, newline; the question is left out.

    Differs by a newline between image and caption: the caption's first token is predicted from the token before
    it, and a fused model no longer holds a visual token's state at the end.
    """
    text = _Text()
    for turn in turns:
        if turn.role == "user":
            text.write(IMAGE_MARK * turn.text.count(IMAGE_MARK) + "\n")
        else:
            text.open_answer(turn.text)
            text.close_answer("\n")
    return text.rendered()


def _template(turns: Sequence[Turn], tokenizer: Any) -> Rendered:
    """The tokenizer's own template; what it writes around each message is found by rendering stand-ins once.

    Raises:
        TokenizerError: the template rewrites a message, or writes no end mark after an answer.
    """
    stand_ins = [f"(7f3c message {place} 9a1e)" for place in range(len(turns))]
    rest = _applied(tokenizer, turns, stand_ins)
    text = _Text()
    for turn, stand_in in zip(turns, stand_ins, strict=True):
        before, found, rest = rest.partition(stand_in)
        if not found:
            raise TokenizerError(f"tokenizer.chat_template: rewrites or drops a message, {_ACCEPTED}")
        _write_around(text, before)
        if turn.role == "user":
            text.question(turn.text)
        else:
            text.open_answer(turn.text)
    _write_around(text, rest)
    written = _applied(tokenizer, turns, [turn.text for turn in turns])
    if written == text.text:
        return text.rendered()
    trimmed = [Turn(turn.role, turn.text.strip()) for turn in turns]
    if trimmed == list(turns) or _applied(tokenizer, trimmed, [turn.text for turn in trimmed]) != written:
        raise TokenizerError(f"tokenizer.chat_template: rewrites the text of a message, {_ACCEPTED}")
    return _template(trimmed, tokenizer)  # many templates trim messages


_ACCEPTED = "accepted: a template that writes turns one after the other (or data.format vicuna_v1)"


def _write_around(text: _Text, between: str) -> None:
    """Writes what stands between two messages; its first mark ends the answer before, if there was one."""
    if text.is_open:
        end_mark = between.split(maxsplit=1)[0] if between.strip() else between
        place = between.find(end_mark) + len(end_mark)
        if not end_mark:
            raise TokenizerError(f"tokenizer.chat_template: writes no end mark after an answer, {_ACCEPTED}")
        text.close_answer(between[:place])
        between = between[place:]
    text.write(between)


def _applied(tokenizer: Any, turns: Sequence[Turn], contents: Sequence[str]) -> str:
    """Returns the template's text; up to where an answer begins when the last turn is a question."""
    messages = [{"role": turn.role, "content": text} for turn, text in zip(turns, contents, strict=True)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=turns[-1].role == "user")


def _check_template(tokenizer: Any) -> None:
    """Refuses a template whose generation prompt is not how its answers begin: training would not fit generation."""
    asked = [Turn("user", "question")]
    prompt = _applied(tokenizer, asked, ["question"])
    if not _applied(tokenizer, [*asked, Turn("assistant", "answer")], ["question", "answer"]).startswith(prompt):
        raise TokenizerError(f"tokenizer.chat_template: an answer does not follow the generation prompt, {_ACCEPTED}")


def _inside(start: int, end: int, spans: Sequence[Span]) -> bool:
    return any(first <= start and end <= last for first, last in spans)


def _overlaps(start: int, end: int, spans: Sequence[Span]) -> bool:
    return any(start < last and first < end for first, last in spans)
