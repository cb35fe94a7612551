"""Chat formats: render turns as one text, tokenise it once, and derive token ids and labels.

Answers are character spans of the rendered text, and the tokenizer reports the characters of each token: a token is
labelled if it overlaps an answer. (LLaVA's code compares two tokenisations, and silently drops a sample's labels where
they differ.)
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise, takewhile
from typing import Any, Final

from jinja2.exceptions import TemplateError

from data.config import shorten
from data.rows import IMAGE_PLACEHOLDER, RowError, Turn, count_placeholders, split_at_placeholders

IGNORE_INDEX = -100  # the default of torch.nn.functional.cross_entropy
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
FROZEN_DAY: Final = datetime(2024, 7, 26)  # the default date of Llama 3's template
_EXPECTED = "expected one that writes all turns in the same way (or data.format vicuna_v1)"
# What a chat template raises that fails as it is compiled or run: `{{ 1 / 0 }}`, an endless macro, 21 nested loops.
TEMPLATE_FAULTS: Final = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, NameError, RuntimeError, SyntaxError),
    *(TypeError, ValueError),
)
_NOW: Final = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
Parts = list[str | None]  # of a message: texts, and None for an image
Span = tuple[int, int]  # characters [start, end) of a rendered text


class TokenizerError(ValueError):
    """The tokenizer cannot render or label conversations; the message gives the reason."""


@dataclass(frozen=True)
class ImageMarkup:
    """How an image is written in the text of a conversation, before the processor expands its token.

    Attributes:
        token: the token that the processor expands, one for each image.
        mark: what `vicuna_v1` and `plain` write for an image: the token and the family's markers around it.
        template: the chat template; None is the tokenizer's.
        has_parts: the template takes content as a list of parts; otherwise content is text that contains the token.
        before: ordinary text that the processor inserts before the tokens of an image (Gemma 3: two newlines).
        after: ordinary text that it inserts after them.
        begin: prefix that the processor adds to every text without it (Molmo2).
    """

    token: str = IMAGE_PLACEHOLDER
    mark: str = IMAGE_PLACEHOLDER
    template: str | None = None
    has_parts: bool = False
    before: str = ""
    after: str = ""
    begin: str = ""

    def wrap_tokens(self, text: str) -> str:
        """Returns a text with `before` and `after` around each image token."""
        if not self.before + self.after:
            return text
        return text.replace(self.token, self.before + self.token + self.after)


class ChatFormat:
    """Turns conversations into ids and labels, for one tokenizer and one of the three formats.

    Args:
        name: `vicuna_v1`, `chat_template` or `plain`.
        tokenizer: a fast Hugging Face tokenizer with the image token in its vocabulary.
        image: how an image is written in the text; the default is LLaVA's way.

    Attributes:
        image_token_id: id of the image token.
        stop_ids: tokens that end an answer: the last token that training labels, and the tokenizer's EOS token. Empty
            for `plain`, which is for alignment and ends a caption with a newline.

    Raises:
        TokenizerError: the tokenizer is slow, has no EOS or image token, adds EOS to every text, or its chat template
            cannot be labelled, depends on the date, or does not end answers with a special token.
    """

    def __init__(self, name: str, tokenizer: Any, image: ImageMarkup = ImageMarkup()) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(
                f"tokenizer: got {type(tokenizer).__name__}, expected a fast one, because labels need the "
                "characters of each token"
            )
        self.image_token_id = tokenizer.convert_tokens_to_ids(image.token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise TokenizerError(f"tokenizer: got none with the token {image.token}, expected it in the vocabulary")
        if tokenizer.eos_token is None:
            raise TokenizerError("tokenizer: got no eos_token, expected one that ends an answer")
        bare = tokenizer(image.token, add_special_tokens=False)["input_ids"]
        if tokenizer(image.token)["input_ids"][-len(bare) :] != bare:
            raise TokenizerError("tokenizer: got eos_token after every text, expected add_eos_token false")
        self.name, self.tokenizer, self._mark = name, tokenizer, image.wrap_tokens(image.mark)
        self._begin = image.begin, tokenizer(image.begin, add_special_tokens=False)["input_ids"]
        self._template = ChatTemplate(tokenizer, image) if name == "chat_template" else None
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special - {tokenizer.unk_token_id} | {self.image_token_id}
        self.stop_ids = [] if name == "plain" else self._find_stop_ids()

    def encode(self, turns: Sequence[Turn], system: str | None = None) -> tuple[list[int], list[int]]:
        """Returns token ids, with one image token for each image, and labels, IGNORE_INDEX where unsupervised.

        Args:
            turns: user and assistant, alternating.
            system: system prompt; None means the format's default.

        Raises:
            RowError: the chat template rewrites the conversation, or the format has no system prompt.
        """
        return self._tokenise(self.render(turns, system))

    def prompt(self, turns: Sequence[Turn], system: str | None = None) -> list[int]:
        """Returns the ids of a conversation that ends with a question, generation prompt included."""
        return self.encode(turns, system)[0]

    def render(self, turns: Sequence[Turn], system: str | None = None) -> Rendered:
        """Returns the text to tokenise, with its spans; raises RowError as `encode` does."""
        if self._template is not None:
            return self._template.render(turns, system)
        if self.name == "plain":
            return render_plain(turns, system, mark=self._mark)
        return render_vicuna(turns, self.tokenizer.eos_token, system, mark=self._mark)

    def _find_stop_ids(self) -> list[int]:
        """Returns the last labelled token of an answer, and the tokenizer's EOS token."""
        _, labels = self.encode([Turn("user", "a"), Turn("assistant", "b")])
        end = [label for label in labels if label != IGNORE_INDEX][-1]
        if end not in self._special and end != self.tokenizer.eos_token_id:
            mark = self.tokenizer.convert_ids_to_tokens(end)
            raise TokenizerError(
                f"tokenizer.chat_template: got answers that end with {mark!r}, which cannot stop generation, expected "
                "a special token (or data.format vicuna_v1)"
            )
        return list(dict.fromkeys([end, self.tokenizer.eos_token_id]))

    def _tokenise(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        cuts = set[int]()
        ids, offsets = self._tokens(rendered.text)
        while more := self._cuts(rendered, ids, offsets) - cuts:  # what is cut may merge anew with what is behind it
            cuts |= more
            ids, offsets = self._tokens(rendered.text, sorted(cuts))
        starts, ends = zip(*offsets, strict=True) if offsets else ((), ())  # both ascending
        labels = [IGNORE_INDEX] * len(ids)
        for first, last in rendered.answers:
            tokens = slice(bisect_right(ends, first), bisect_left(starts, last))  # that share characters with it
            labels[tokens] = ids[tokens]
        special = [place for place, token in enumerate(ids) if token in self._special]
        for place in reversed(special):
            if _is_user_text(rendered, *offsets[place]):
                text = self._as_text(rendered.text[slice(*offsets[place])])
                labels[place : place + 1] = text if labels[place] != IGNORE_INDEX else [IGNORE_INDEX] * len(text)
                ids[place : place + 1] = text
        begin = [] if rendered.text.startswith(self._begin[0]) else self._begin[1]
        return begin + ids, [IGNORE_INDEX] * len(begin) + labels

    def _cuts(self, rendered: Rendered, ids: Sequence[int], offsets: Sequence[Span]) -> set[int]:
        """Returns the edges of answers that lie within a token, such as one of several newlines.

        Generation begins behind a prompt, so it cannot produce a token that reaches from there into an answer. At an
        answer's end, a special token that takes in the space behind it stays whole, as in generation.
        """
        return {
            edge
            for span in rendered.answers
            for edge in span
            if (place := bisect_right(offsets, edge, key=lambda token: token[1])) < len(ids)
            and offsets[place][0] < edge
            and (edge == span[0] or ids[place] not in self._special)
        }

    def _tokens(self, text: str, cuts: Sequence[int] = ()) -> tuple[list[int], list[Span]]:
        """Returns ids, and the characters of each; no token reaches over a cut."""
        ids, offsets = list[int](), list[Span]()
        for start, end in pairwise([0, *cuts, len(text)]):
            encoding = self.tokenizer(
                text[start:end],
                add_special_tokens=self._template is None and start == 0,  # a template writes them itself
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            ids += encoding["input_ids"]
            offsets += [(first + start, last + start) for first, last in encoding["offset_mapping"]]
        return ids, offsets

    def _as_text(self, name: str) -> list[int]:
        """Returns the ids of a special token's name as ordinary text, for questions and answers."""
        encoding = self.tokenizer(  # after a newline, because many tokenizers put a space before a text
            "\n" + name, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        tokens = [
            token
            for token, (_, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            if end > 1 and token not in self._special
        ]
        if not tokens and self.tokenizer.unk_token_id is None:
            raise RowError(f"got {name!r}, which this tokenizer cannot write as text")
        return tokens or [self.tokenizer.unk_token_id]


def _overlaps(spans: Sequence[Span], start: int, end: int) -> bool:
    """Returns whether any of the ordered spans has characters of [start, end)."""
    place = bisect_right(spans, start, key=lambda span: span[1])  # the first that ends after `start`
    return place < len(spans) and spans[place][0] < end


def _is_user_text(rendered: Rendered, start: int, end: int) -> bool:
    """Returns whether a special token lies in a question or an answer, white space around its name ignored."""
    name = rendered.text[start:end]
    start += len(name) - len(name.lstrip())
    return bool(name.strip()) and _overlaps(rendered.user_spans, start, start + len(name.strip()))


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text; spans are in order and do not overlap.

    Attributes:
        text: the text to tokenise.
        answers: the spans that a model has to generate: each answer, from the end of its prompt to its end mark.
        user_spans: questions and answers, in which names of special tokens are ordinary text.
    """

    text: str
    answers: tuple[Span, ...]
    user_spans: tuple[Span, ...]


class SpanWriter:
    """Builds a text piece by piece and records its spans; `mark` is written for each image."""

    def __init__(self, mark: str = IMAGE_PLACEHOLDER) -> None:
        self.text, self._mark = "", mark
        self._answers: list[Span] = []
        self._user_spans: list[Span] = []

    def literal(self, text: str) -> None:
        """Appends text of the format, in which names of special tokens are special tokens."""
        self.text += text

    def question(self, text: str) -> None:
        """Appends a user's text, with `mark` for each image placeholder."""
        for place, part in enumerate(split_at_placeholders(text)):
            if place > 0:
                self.literal(self._mark)
            self.user_text(part)

    def user_text(self, text: str) -> None:
        """Appends text of a row, in which names of special tokens are ordinary text."""
        start = len(self.text)
        self.text += text
        if text:
            self._user_spans.append((start, len(self.text)))

    def answer(self, text: str, *, prefix: str, end_mark: str, is_trained: bool = True) -> None:
        """Appends an answer.

        Args:
            text: the answer's text.
            prefix: text between prompt and answer, which a model has to generate too.
            end_mark: text that ends the answer.
            is_trained: whether the answer is supervised.
        """
        start = len(self.text)
        self.literal(prefix)
        self.user_text(text)
        self.literal(end_mark)
        if is_trained:
            self._answers.append((start, len(self.text)))

    def rendered(self) -> Rendered:
        """Returns the text and its spans."""
        return Rendered(self.text, tuple(self._answers), tuple(self._user_spans))


def render_vicuna(
    turns: Sequence[Turn], end_mark: str, system: str | None = None, *, mark: str = IMAGE_PLACEHOLDER
) -> Rendered:
    """Renders the system prompt (None is LLaVA's), then `USER: question ASSISTANT: answer</s>` for each pair.

    The prompt ends with `ASSISTANT:`, so the space after it belongs to the answer; most tokenizers write it into the
    answer's first token, but not before a Chinese character.

    Source: LLaVA's conv_vicuna_v1. An empty answer differs: LLaVA leaves out the space and the end mark.
    """
    writer = SpanWriter(mark)
    if system is None:
        writer.literal(VICUNA_SYSTEM)
    else:
        writer.user_text(system)
    writer.literal(" ")
    for turn in turns:
        if turn.role == "user":
            writer.literal("USER: ")
            writer.question(turn.text)
            writer.literal(" ASSISTANT:")
        else:
            writer.answer(turn.text, prefix=" ", end_mark=end_mark, is_trained=turn.is_trained)
    return writer.rendered()


def render_plain(turns: Sequence[Turn], system: str | None = None, *, mark: str = IMAGE_PLACEHOLDER) -> Rendered:
    """Renders image, newline, caption, newline; the question is left out.

    Source: LLaVA's conv_llava_plain. The newline between image and caption differs: a caption's first token is
    predicted from the token before it, and a fused model no longer holds a visual token's state at the end.
    """
    if system is not None:
        raise RowError("got a system prompt, which format plain does not have, expected another format")
    writer = SpanWriter()
    for turn in turns:
        if turn.role == "user":
            writer.literal(mark * count_placeholders(turn.text) + "\n")
        else:
            writer.answer(turn.text, prefix="", end_mark="\n", is_trained=turn.is_trained)
    return writer.rendered()


class ChatTemplate:
    """Renders conversations with a chat template and records the spans of their answers.

    An answer begins where the generation prompt ends, and includes its end mark: the text up to and including the first
    special token after every answer. Both are found once, by rendering two pairs of dummy messages.

    Args:
        tokenizer: provides the chat template, unless `image` has one.
        image: how an image is written in the text. Where content is a list of parts, the newline that LLaVA's rows
            have between image and text is dropped.

    Raises:
        TokenizerError: training would not fit generation, because the template is missing or fails, rewrites messages,
            does not end answers, or begins an answer differently after its generation prompt or at another place.
    """

    def __init__(self, tokenizer: Any, image: ImageMarkup = ImageMarkup()) -> None:
        if not tokenizer.chat_template and image.template is None:
            raise TokenizerError("data.format: got chat_template, but the tokenizer has none, expected vicuna_v1")
        self._tokenizer, self._image = tokenizer, image
        try:
            self._text = freeze_template(image.template or tokenizer.get_chat_template())
        except ValueError as error:  # several templates, none of them the default
            if isinstance(error, TokenizerError):
                raise
            raise _template_error(shorten(str(error).partition("!")[0], 120)) from None
        self._pieces: dict[tuple[Any, bool], list[str]] = {}
        messages = _stand_ins(4)
        contents: list[Parts] = [[message] for message in messages]
        try:
            whole = self._apply(contents)
            prompts = [self._apply(contents[:1]), self._apply(contents[:3])]
            around = _around(whole, messages)
        except RowError as error:
            raise _template_error(str(error)) from None
        except TEMPLATE_FAULTS as error:
            raise _template_error(f"fails: {_reason(error)}") from None
        if not all(whole.startswith(prompt) for prompt in prompts):
            raise _template_error("an answer does not follow the generation prompt")
        leads = {whole[len(prompts[place]) : whole.index(messages[2 * place + 1])] for place in (0, 1)}
        if len(leads) > 1:
            raise _template_error("the last answer begins differently from those before it")
        self._prefix = leads.pop()  # between generation prompt and answer: nothing, or a space
        self._end_mark = self._end_mark_of(around[2], around[4])
        if not self._end_mark:
            raise _template_error("no end mark follows an answer")

    def render(self, turns: Sequence[Turn], system: str | None = None) -> Rendered:
        """Returns the conversation's text, which ends with the generation prompt if the last turn is a question.

        Raises:
            RowError: the template does more to these messages than trim them.
        """
        contents = [self._parts(turn) for turn in turns]
        try:
            expected = self._image.wrap_tokens(self._apply(contents, system))
            before, *after = self._around(contents, system is not None)
        except RowError:
            raise
        except TEMPLATE_FAULTS as error:
            raise RowError(f"the chat template fails: {_reason(error)}") from None
        writer = SpanWriter(self._image.wrap_tokens(self._image.token))
        if system is not None:
            trim = _trim(system, system, expected[len(before) :], after[0])
            writer.literal(before)
            writer.user_text(trim(system))
            before, *after = after
        for turn, content in zip(turns, contents, strict=True):
            for text in content:
                if text is None:
                    continue
                shown = self._image.wrap_tokens(text)
                following, *after = after
                trim = _trim(shown, turn.text, expected[len(writer.text) + len(before) :], following)
                if turn.role == "user":
                    writer.literal(before)
                    if not self._image.has_parts:
                        writer.question(trim(turn.text))
                    else:
                        writer.user_text(trim(text))
                    before = following
                else:
                    writer.literal(before.removesuffix(self._prefix))
                    writer.answer(trim(text), prefix=self._prefix, end_mark=self._end_mark, is_trained=turn.is_trained)
                    before = following.removeprefix(self._end_mark)
        writer.literal(before)
        if writer.text != expected:
            raise RowError("the chat template rewrites this conversation")
        return writer.rendered()

    def _parts(self, turn: Turn) -> Parts:
        """Returns a turn's content: one text with the image tokens, or texts and images in order."""
        if turn.role != "user":
            return [turn.text]
        texts = split_at_placeholders(turn.text)
        if not self._image.has_parts:
            return [self._image.token.join(texts)]
        parts: Parts = []
        for place, text in enumerate(texts):
            text = text.removeprefix("\n") if place > 0 else text
            text = text.removesuffix("\n") if place < len(texts) - 1 else text
            parts += [None] if place > 0 else []
            parts += [text] if text or len(texts) == 1 else []
        return parts

    def _around(self, contents: Sequence[Parts], has_system: bool) -> list[str]:
        """Returns what the template writes before, between and after a system prompt and the texts of the contents."""
        key = tuple(tuple(part is None for part in content) for content in contents), has_system
        if key not in self._pieces:
            texts = _stand_ins(sum(part is not None for content in contents for part in content))
            places, system = iter(texts), _STAND_IN_SYSTEM if has_system else None
            stand_ins: list[Parts] = [
                [None if part is None else next(places) for part in content] for content in contents
            ]
            written = [system, *texts] if system else texts
            pieces = _around(self._apply(stand_ins, system), written)
            self._pieces[key] = [self._image.wrap_tokens(piece) for piece in pieces]
        return self._pieces[key]

    def _apply(self, contents: Sequence[Parts], system: str | None = None) -> str:
        """Returns the template's text, with the generation prompt if the last message is a question."""
        roles = ("user", "assistant")
        conversation = [] if system is None else [{"role": "system", "content": self._content([system])}]
        conversation += [
            {"role": roles[place % 2], "content": self._content(content)} for place, content in enumerate(contents)
        ]
        return self._tokenizer.apply_chat_template(
            conversation, chat_template=self._text, tokenize=False, add_generation_prompt=len(contents) % 2 == 1
        )

    def _content(self, parts: Parts) -> Any:
        if not self._image.has_parts:
            return parts[0]
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]

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


def _reason(error: BaseException) -> str:
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return shorten(f"{kind}{error}", 120)


def _template_error(reason: str) -> TokenizerError:
    return TokenizerError(f"tokenizer.chat_template: {reason}, {_EXPECTED}")


_STAND_IN_SYSTEM: Final = "(7f3C System 9a1E)"


def _stand_ins(count: int) -> list[str]:
    """Returns dummy messages that no template contains; in mixed case, to detect templates that change case."""
    return [f"(7f3C Message {place} 9a1E)" for place in range(count)]


def _around(text: str, messages: Sequence[str]) -> list[str]:
    """Returns the text before, between and after the messages: one piece more than there are messages."""
    pieces = []
    for message in messages:
        before, found, text = text.partition(message)
        if not found:
            raise RowError("the chat template rewrites or drops a message")
        pieces.append(before)
    return [*pieces, text]


def _trim(message: str, written: str, text: str, following: str) -> Callable[[str], str]:
    """Returns the trimming, if any, that the template applied to a message at the start of `text`."""
    trimmings: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
    for trim in trimmings:
        if text.startswith(trim(message) + following):
            return trim
    raise RowError(f"the chat template rewrites the message {shorten(written, 40)!r}")


def freeze_template(template: str) -> str:
    """Returns a chat template with FROZEN_DAY in place of the current date.

    Otherwise the training rows and later prompts would contain different dates.

    Raises:
        TokenizerError: the template uses the date in a way that cannot be replaced, or draws at random.
    """
    text = _NOW.sub(lambda found: repr(FROZEN_DAY.strftime(found[2])), template)
    if re.search(r"strftime_now(?!\s+is\s)|\|\s*random\b", text):
        raise _template_error("depends on the day, or on chance, in a way that cannot be frozen")
    return text


def freeze_templates(processor: Any) -> None:
    """Freezes the date in the chat templates of a processor and its tokenizer: see `freeze_template`."""
    for part in (processor, processor.tokenizer):
        template = getattr(part, "chat_template", None)
        if isinstance(template, str):
            part.chat_template = freeze_template(template)
        elif isinstance(template, dict):  # by name
            part.chat_template = {name: freeze_template(text) for name, text in template.items()}
