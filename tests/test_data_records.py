"""Rows become records; every fault of a row has its words."""

import json

import pytest

from data.records import Fault, Record, RowError, Turn, parse


def row(*texts, image=None, roles=("human", "gpt"), **more):
    turns = [{"from": roles[place % 2], "value": text} for place, text in enumerate(texts)]
    return json.dumps({**({} if image is None else {"image": image}), "conversations": turns, **more})


def test_a_row_with_several_images_keeps_its_marks():
    record = parse(row("<image> <image> which?", "left", image=["a.jpg", "b.jpg"], extra={"model": ""}))
    assert record == Record(("a.jpg", "b.jpg"), (Turn("user", "<image> <image> which?"), Turn("assistant", "left")))


def test_a_row_without_image():
    for image in (None, []):
        assert parse(row("hi", "", image=image)) == Record((), (Turn("user", "hi"), Turn("assistant", "")))


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
    assert record.is_cut_in_front
    assert not parse(row("question", "answer")).is_cut_in_front


def test_an_image_mark_in_an_answer_is_text():
    record = parse(row("<image> what does it mean?", "<image> is a tag", image="a.jpg"))
    assert record.turns[1].text == "<image> is a tag"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "broken JSON: .*, found '{'"),
        ("", "broken JSON"),
        ("[" * 100_000, "broken JSON: .*recursion"),
        ("9" * 10_000, "broken JSON"),
        ("[1]", "found list, accepted: an object"),
        ("{}", "missing key 'conversations'"),
        ('{"conversations": []}', "found no turns"),
        ('{"conversations": {"from": "human"}}', "found no turns"),
        ('{"conversations": ["hi"]}', r"conversations\[0\]: found str, accepted: an object"),
        ('{"conversations": [{"from": "human"}]}', r"conversations\[0\]: missing key 'value'"),
        ('{"conversations": [{"value": "x"}]}', r"conversations\[0\]: missing key 'from'"),
        ('{"conversations": [{"from": "human", "value": 7}]}', r"conversations\[0\]\.value: found int, accepted: text"),
        (row("a", "b", roles=("human", "bot")), r"conversations\[1\]\.from: unknown role 'bot', accepted: human, gpt"),
        (row("a", "b", roles=("human", "human")), "turns out of order"),
        (row("a", "b", roles=("gpt", "gpt")), "turns out of order"),
        (row("only a question"), "at least one answer"),
        (row("only an answer", roles=("gpt", "gpt")), "at least one answer"),
        (row("no mark", "x", image="a.jpg"), "found 0 <image> in the questions for 1 images"),
        (row("what", "<image>", image="a.jpg"), "found 0 <image> in the questions for 1 images"),
        (row("<image>", "x"), "found 1 <image> in the questions for 0 images"),
        (row("<image>", "x", image=["a.jpg", "b.jpg"]), "found 1 <image> in the questions for 2 images"),
        (row("<image>", "x", image=7), "image: found 7"),
        (row("<image>", "x", image=""), "image: found ''"),
        (row("<image>", "x", image=[""]), "image: found"),
        (row("half of \ud83d", "x"), r"conversations\[0\]\.value: found '\\ud83d', half a character"),
        (row("<image>", "x", image="\ud83d.jpg"), "image: found .*half a character"),
    ],
)
def test_faults_of_a_row(text, message):
    with pytest.raises(RowError, match=message):
        parse(text)


def test_a_fault_says_where():
    assert str(Fault("data.json", 7, "missing key 'x'")) == "data.json:7: missing key 'x'"
