"""Rows become records; every fault of a row has its words."""

import pytest

from data.rows import Fault, Record, RowError, Turn, parse


def row(*texts, image=None, roles=("human", "gpt"), **more):
    turns = [{"from": roles[place % 2], "value": text} for place, text in enumerate(texts)]
    return {**({} if image is None else {"image": image}), "conversations": turns, **more}


def test_a_row_with_several_images_keeps_its_marks():
    record = parse(row("<image> <image> which?", "left", image=["a.jpg", "b.jpg"], extra={"model": "x"}))
    assert record == Record(
        ("a.jpg", "b.jpg"), (Turn("user", "<image> <image> which?"), Turn("assistant", "left")), ignored=("extra",)
    )


def test_a_row_without_image():
    for image in (None, []):
        record = parse(row("hi", "", image=image))
        assert record == Record((), (Turn("user", "hi"), Turn("assistant", "")), notes=("empty_answer",))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("what is it?\n<image>", "<image>\nwhat is it?"),
        ("<image>\nwhat is it?", "<image>\nwhat is it?"),
        ("  what <image> is it?  ", "<image>\nwhat  is it?"),
        ("<image>", "<image>"),
    ],
)
def test_a_single_image_stands_first(given, expected):
    for image in ("a.jpg", ["a.jpg"]):
        assert parse(row(given, "x", image=image)).turns[0].text == expected


def test_a_leading_answer_is_left_out_and_seen():
    record = parse(row("hello", "question", "answer", roles=("gpt", "human")))
    assert record.turns == (Turn("user", "question"), Turn("assistant", "answer"))
    assert record.notes == ("answer_first",)
    assert parse(row("question", "answer")).notes == ()


def test_an_image_mark_in_an_answer_is_text():
    record = parse(row("<image> what does it mean?", "<image> is a tag", image="a.jpg"))
    assert record.turns[1].text == "<image> is a tag"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], "got a list, expected an object"),
        (None, "got null, expected an object"),
        ({}, "missing key 'conversations' .*: got keys none"),
        ({"id": 1, "dialog": []}, "missing key 'conversations' .or 'messages'.: got keys 'id', 'dialog'"),
        ({"conversations": []}, "conversations: got no turns"),
        ({"conversations": {"from": "human"}}, "conversations: got an object, expected a list of messages"),
        ({"conversations": "[]"}, "conversations: got text, expected a list of messages"),
        ({"conversations": ["hi"]}, r"conversations\[0\]: got text, expected an object"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: missing key 'value' .*got keys 'from'"),
        ({"conversations": [{"value": "x"}]}, r"conversations\[0\]: missing key 'from' .*got keys 'value'"),
        ({"conversations": [{"from": "human", "value": 7}]}, r"conversations\[0\]: got a number as content"),
        (row("a", "b", roles=("human", "narrator")), r"conversations\[1\]: got role 'narrator', expected human"),
        (row("a", "b", roles=("human", "human")), "got turns user, user, expected user and assistant in turns"),
        (row("a", "b", roles=("gpt", "gpt")), "got turns assistant, expected user and assistant in turns"),
        (row("only a question"), "at least one answer"),
        (row("only an answer", roles=("gpt", "gpt")), "at least one answer"),
        (row("no mark", "x", image="a.jpg"), "got 0 <image> in the questions for 1 images"),
        (row("what", "<image>", image="a.jpg"), "got 0 <image> in the questions for 1 images"),
        (row("<image><image>", "x", image="a.jpg"), "got 2 <image> in the questions for 1 images"),
        (row("<image>", "x", image=["a.jpg", "b.jpg"]), "got 1 <image> in the questions for 2 images"),
        (row("<image>", "x", image=7), "image.0.: got a number, expected a path or an image"),
        (row("<image>", "x", image=["a.jpg", None]), "image.1.: got null"),
        (row("half of \ud83d", "x"), r"conversations\[0\]: got '\\ud83d', half a character"),
        (row("<image>", "x", image="\ud83d.jpg"), "image.0.: got .*half a character"),
    ],
)
def test_faults_of_a_row(given, message):
    with pytest.raises(RowError, match=message):
        parse(given)


def test_a_fault_says_where():
    assert str(Fault("data.json", 7, "missing key 'x'")) == "data.json:7: missing key 'x'"
