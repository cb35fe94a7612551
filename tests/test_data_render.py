"""The two fixed formats, letter by letter."""

import pytest

from data.chat import SpanWriter, render_plain, render_vicuna
from data.rows import Turn

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def turns(*texts):
    return [Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]


def cut(rendered, spans):
    return [rendered.text[start:end] for start, end in spans]


def test_vicuna_is_llavas_text():
    rendered = render_vicuna(turns("<image>\nWhat is it?", "A cat.", "Sure?", "Yes."), "</s>")
    assert rendered.text == (
        f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>"
    )
    assert cut(rendered, rendered.answers) == [" A cat.</s>", " Yes.</s>"]
    assert cut(rendered, rendered.user_spans) == ["\nWhat is it?", "A cat.", "Sure?", "Yes."]


def test_a_vicuna_prompt_ends_where_the_answer_begins():
    asked = turns("<image>\nWhat is it?", "A cat.", "Sure?")
    prompt = render_vicuna(asked, "</s>").text
    assert prompt.endswith("</s>USER: Sure? ASSISTANT:")
    whole = render_vicuna([*asked, Turn("assistant", "Yes.")], "</s>")
    assert whole.text.startswith(prompt)
    assert whole.answers[-1] == (len(prompt), len(whole.text))


@pytest.mark.parametrize("asked", ["<image>\nDescribe it.", "Describe it.\n<image>", "<image>"])
def test_plain_is_image_newline_caption_newline(asked):
    rendered = render_plain(turns(asked, "a red house"))
    assert rendered.text == "<image>\na red house\n"
    assert cut(rendered, rendered.answers) == ["a red house\n"]


def test_written_text_is_known_whatever_it_holds():
    writer = SpanWriter()
    writer.question("<image><image> a <image>")
    writer.literal("</s>")
    writer.answer("<image></s>", prefix=" ", end_mark="</s>")
    rendered = writer.rendered()
    assert rendered.text == "<image><image> a <image></s> <image></s></s>"
    assert cut(rendered, rendered.user_spans) == [" a ", "<image></s>"]
    assert cut(rendered, rendered.answers) == [" <image></s></s>"]
