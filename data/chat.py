"""Chat formats: turns -> one text -> one tokenisation -> token ids and labels.

The supervised text is known as character spans of the one rendered text, and the one tokenisation reports each
token's characters, so there are no two token counts that could differ. (LLaVA's own code compares two, and drops
a sample's labels in silence where they do.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from data.records import IMAGE_MARK, RowError, Turn
from data.render import Rendered, Span, plain, vicuna
from data.template import ChatTemplate, TokenizerError

__all__ = ["IGNORE_INDEX", "ChatFormat", "TokenizerError"]

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's own


class ChatFormat:
    """Turns conversations into ids and labels, for one tokenizer and one of the three formats.

    Args:
        name: `vicuna_v1`, `chat_template` or `plain`.
        tokenizer: a fast Hugging Face tokenizer that knows the image mark as one token.

    Attributes:
        image_token_id: the token that stands for an image.

    Raises:
        TokenizerError: the tokenizer is slow, has no end mark or image token, ends every text by a token of its own,
            or its chat template cannot be labelled.
    """

    def __init__(self, name: str, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(
                f"tokenizer: found {type(tokenizer).__name__}, accepted: a fast one, because labels need the "
                "characters of each token"
            )
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise TokenizerError(f"tokenizer: has no token {IMAGE_MARK}, accepted: one that has")
        if tokenizer.eos_token is None:
            raise TokenizerError("tokenizer: has no eos_token, accepted: one that ends an answer")
        bare = tokenizer(IMAGE_MARK, add_special_tokens=False)["input_ids"]
        if tokenizer(IMAGE_MARK)["input_ids"][-len(bare) :] != bare:
            raise TokenizerError("tokenizer: ends every text by a token of its own, accepted: add_eos_token false")
        self.name, self.tokenizer = name, tokenizer
        self._template = ChatTemplate(tokenizer) if name == "chat_template" else None
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special - {tokenizer.unk_token_id} | {self.image_token_id}

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Returns ids, with one image token an image, and labels: ids where supervised, IGNORE_INDEX elsewhere.

        Raises:
            RowError: the chat template rewrites the conversation.
        """
        return self._tokenise(self._render(turns))

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Returns the ids of a conversation that ends with a question, up to where the answer begins."""
        return self.encode(turns)[0]

    def _render(self, turns: Sequence[Turn]) -> Rendered:
        if self._template is not None:
            return self._template.render(turns)
        return plain(turns) if self.name == "plain" else vicuna(turns, self.tokenizer.eos_token)

    def _tokenise(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        encoding = self.tokenizer(
            rendered.text,
            add_special_tokens=self._template is None,  # a template writes its own
            return_offsets_mapping=True,
            verbose=False,
        )
        ids: list[int] = []
        labels: list[int] = []
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            tokens = [token]
            if token in self._special and _is_written(rendered, start, end):
                tokens = self._as_text(rendered.text[start:end])
            ids += tokens
            labels += tokens if _overlaps(rendered.answers, start, end) else [IGNORE_INDEX] * len(tokens)
        return ids, labels

    def _as_text(self, name: str) -> list[int]:
        """Returns the ids of a special token's name that somebody wrote in a question or an answer."""
        encoding = self.tokenizer(  # behind a newline, because many tokenizers write a space at a text's beginning
            "\n" + name, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        tokens = [
            token
            for token, (_, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            if end > 1 and token not in self._special
        ]
        if not tokens and self.tokenizer.unk_token_id is None:
            raise RowError(f"found {name!r}, which this tokenizer cannot write as text")
        return tokens or [self.tokenizer.unk_token_id]


def _overlaps(spans: Sequence[Span], start: int, end: int) -> bool:
    """Returns whether any of the ordered spans has characters of [start, end)."""
    place = bisect_right(spans, start, key=lambda span: span[1])  # the first that ends after `start`
    return place < len(spans) and spans[place][0] < end


def _is_written(rendered: Rendered, start: int, end: int) -> bool:
    """Returns whether people wrote the special token there; the white space that some swallow does not count."""
    name = rendered.text[start:end]
    start += len(name) - len(name.lstrip())
    return bool(name.strip()) and _overlaps(rendered.written, start, start + len(name.strip()))
