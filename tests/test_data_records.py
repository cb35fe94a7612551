import json
import tracemalloc

import pytest

from data import easy_vqa
from data.records import DataError, Record, RowError, Turn, parse, read_rows, starts_with_answer


def row(*texts, image=None, roles=("human", "gpt"), **more):
    turns = [{"from": roles[place % 2], "value": text} for place, text in enumerate(texts)]
    return json.dumps({**({} if image is None else {"image": image}), "conversations": turns, **more})


ROWS = [
    row("<image>\nhi", "yes", image="a.jpg", id=1),
    row("<image> <image> which?", "left", image=["a.jpg", "b.jpg"], extra={"model": ""}),
    row("text only", "fine"),
]


@pytest.mark.parametrize(
    "text",
    [
        "[" + ", ".join(ROWS) + "]",
        "[\n" + ",\n".join(ROWS) + "\n]\n",
        "\n".join(ROWS),
        "\n\n".join(ROWS) + "\n\n",
    ],
)
def test_arrays_and_lines_give_the_same_rows(tmp_path, text):
    file = tmp_path / "data.json"
    file.write_text(text, encoding="utf-8")
    rows = read_rows([str(file)])
    assert [json.loads(row) for row in rows["text"]] == [json.loads(row) for row in ROWS]
    assert rows["row"][:] == [0, 1, 2]
    assert set(rows["file"]) == {str(file)}


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(ROWS[0])
    assert len(read_rows([str(file)])) == 1
    file.write_text("\n".join(ROWS))
    assert len(read_rows([str(file)])) == 3


def test_an_array_is_not_held_in_memory(tmp_path):
    file = tmp_path / "data.json"
    long = row("question", "word " * 2000)
    file.write_text("[" + ",".join([long] * 3000) + "]")  # 30 MB
    tracemalloc.start()
    rows = read_rows([str(file)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 3000
    assert peak < 24e6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" + ROWS[0] + ", {broken]", r"data.json:1: broken JSON.*rows after it cannot be read"),
        ("[" + ROWS[0], r"data.json:1: broken JSON: the array is not closed"),
    ],
)
def test_an_array_that_breaks_off_is_an_error(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows([str(tmp_path / "data.json")])


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"nothing.json: No such file or directory, accepted: a LLaVA JSON"):
        read_rows([str(tmp_path / "nothing.json")])


def test_parse():
    record = parse(ROWS[1])
    assert record == Record(("a.jpg", "b.jpg"), (Turn("user", "<image> <image> which?"), Turn("assistant", "left")))
    assert parse(row("what is it?\n<image>", "x", image="a.jpg")).turns[0].text == "<image>\nwhat is it?"
    assert parse(ROWS[2]).images == ()


def test_a_leading_answer_is_left_out_and_seen():
    text = row("hello", "question", "answer", roles=("gpt", "human"))
    assert parse(text).turns == (Turn("user", "question"), Turn("assistant", "answer"))
    assert starts_with_answer(text)
    assert not starts_with_answer(ROWS[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "broken JSON"),
        ("[1]", "found list, accepted: an object"),
        ("{}", "missing key 'conversations'"),
        ('{"conversations": []}', "found no turns"),
        ('{"conversations": [{"from": "human"}]}', r"conversations\[0\]: missing key 'value'"),
        ('{"conversations": [{"value": "x"}]}', r"conversations\[0\]: missing key 'from'"),
        (row("a", "b", roles=("human", "bot")), "unknown role 'bot', accepted: human, gpt"),
        (row("a", "b", roles=("human", "human")), "turns out of order"),
        (row("only a question"), "at least one answer"),
        (row("no mark", "x", image="a.jpg"), "found 0 <image> in the questions for 1 images"),
        (row("<image>", "x"), "found 1 <image> in the questions for 0 images"),
        (row("<image>", "x", image=7), "image: found 7"),
        (row("<image>", "x", image=[""]), "image: found"),
    ],
)
def test_faults_of_a_row(text, message):
    with pytest.raises(RowError, match=message):
        parse(text)


def test_an_image_mark_in_an_answer_is_text():
    assert parse(row("what does <image> mean?", "<image> is a tag", image="a.jpg")).turns[1].text == "<image> is a tag"


def test_easy_vqa_is_complete():
    rows = list(easy_vqa.conversations("train"))
    assert len(rows) == 4000
    assert sum(len(row["conversations"]) for row in rows) == 2 * 38_575
    asked = easy_vqa.questions("test")
    assert len(asked) == 9673
    assert {question.kind for question in asked} == {"yes/no", "shape", "colour"}
    assert round(100 * sum(question.answer == "yes" for question in asked) / len(asked), 2) == 37.33
