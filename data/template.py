"""The tokenizer's own chat template: what it writes around messages, and where a generated answer begins and ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from jinja2.exceptions import TemplateError

from data.records import RowError, Turn
from data.render import Rendered, Writer

_ACCEPTED = "accepted: one that writes turns one after the other and alike (or data.format vicuna_v1)"


class TokenizerError(ValueError):
    """The tokenizer cannot render or label conversations; the text says why."""


class ChatTemplate:
    """Writes conversations as the tokenizer's template does, and knows the spans of their answers.

    An answer is what a model has to generate: it begins where the generation prompt ends, and its end mark, which is
    the first special token that follows every answer, belongs to it. Both are learned once, from two made-up pairs.

    Args:
        tokenizer: whose `chat_template` it is.

    Raises:
        TokenizerError: the template is missing or fails, rewrites messages, ends answers by nothing, or writes an
            answer otherwise than its generation prompt or its place suggests: training would not fit generation.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise TokenizerError("data.format: found chat_template, but the tokenizer has none, accepted: vicuna_v1")
        self._tokenizer = tokenizer
        messages = _stand_ins(4)
        try:
            whole = self._apply(messages)
            prompts = [self._apply(messages[:1]), self._apply(messages[:3])]
            around = _around(whole, messages)
        except TemplateError as error:
            raise _refused(f"fails: {error}") from None
        except RowError as error:
            raise _refused(str(error)) from None
        if not all(whole.startswith(prompt) for prompt in prompts):
            raise _refused("an answer does not follow the generation prompt")
        leads = {whole[len(prompts[place]) : whole.index(messages[2 * place + 1])] for place in (0, 1)}
        if len(leads) > 1:
            raise _refused("the last answer begins otherwise than those before it")
        self._lead = leads.pop()  # between generation prompt and answer: nothing, or a space
        self._end_mark = self._end_mark_of(around[2], around[4])
        if not self._end_mark:
            raise _refused("no end mark follows an answer")

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Returns the conversation's text; up to where an answer would begin when the last turn is a question.

        Raises:
            RowError: the template does more to these messages than trim them.
        """
        stand_ins = _stand_ins(len(turns))
        try:
            expected = self._apply([turn.text for turn in turns])
            before, *after = _around(self._apply(stand_ins), stand_ins)
        except TemplateError as error:
            raise RowError(f"the chat template fails: {error}") from None
        writer = Writer()
        for turn, following in zip(turns, after, strict=True):
            text = _as_written(turn.text, expected[len(writer.text) + len(before) :], following)
            if turn.role == "user":
                writer.frame(before)
                writer.question(text)
                before = following
            else:
                writer.frame(before.removesuffix(self._lead))
                writer.answer(text, lead=self._lead, end_mark=self._end_mark)
                before = following.removeprefix(self._end_mark)
        writer.frame(before)
        if writer.text != expected:
            raise RowError("the chat template rewrites this conversation")
        return writer.rendered()

    def _apply(self, messages: Sequence[str]) -> str:
        """Returns the template's text; up to where an answer begins when the last message is a question."""
        roles = ("user", "assistant")
        conversation = [{"role": roles[place % 2], "content": text} for place, text in enumerate(messages)]
        is_prompt = len(messages) % 2 == 1
        return self._tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=is_prompt)

    def _end_mark_of(self, between: str, end: str) -> str:
        """Returns what follows both answers, up to its first special token; with none, all but its trailing space."""
        special = {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        pieces = [re.split(f"({pattern})", text) for text in (between, end)]  # text, special token, text, ...
        if pieces[0][:2] == pieces[1][:2] and len(pieces[0]) > 1:
            return "".join(pieces[0][:2])
        pairs = zip(pieces[0][0], pieces[1][0], strict=False)
        text = "".join(first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return text.rstrip() or text


def _refused(reason: str) -> TokenizerError:
    return TokenizerError(f"tokenizer.chat_template: {reason}, {_ACCEPTED}")


def _stand_ins(count: int) -> list[str]:
    """Returns messages that no template writes by itself; mixed case, so that a change of case shows."""
    return [f"(7f3C Message {place} 9a1E)" for place in range(count)]


def _around(text: str, messages: Sequence[str]) -> list[str]:
    """Returns what stands before, between and after the messages: one piece more than there are messages."""
    pieces = []
    for message in messages:
        before, found, text = text.partition(message)
        if not found:
            raise RowError("the chat template rewrites or drops a message")
        pieces.append(before)
    return [*pieces, text]


def _as_written(message: str, text: str, following: str) -> str:
    """Returns the message as `text` begins with it: many templates trim messages."""
    for candidate in (message, message.strip(), message.lstrip(), message.rstrip()):
        if text.startswith(candidate + following):
            return candidate
    raise RowError(f"the chat template rewrites the message {message[:40]!r}")
