"""The built-in set is what its package says."""

import pytest

from data import easy_vqa


@pytest.mark.parametrize(
    ("name", "images", "asked"), [("train", 4000, 38_575), ("test", 1000, 9673), ("open", 3816, 10_168)]
)
def test_every_image_is_one_conversation(name, images, asked):
    rows = list(easy_vqa.conversations(name))
    folder = easy_vqa.image_folder(name)
    assert len(rows) == images
    assert sum(len(row["conversations"]) for row in rows) / 2 == asked
    assert len({row["id"] for row in rows}) == images
    for row in rows:
        first, *others = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
        assert first.startswith("<image>\n")
        assert not any("<image>" in text for text in others)
        assert (folder / row["image"]).is_file()


def test_open_is_the_part_of_train_without_yes_and_no():
    rows = list(easy_vqa.conversations("open"))
    answers = {turn["value"] for row in rows for turn in row["conversations"] if turn["from"] == "gpt"}
    assert answers > set(easy_vqa.SHAPES)
    assert not answers & {"yes", "no"}


def test_short_is_train_in_rows_of_up_to_three_questions():
    rows = list(easy_vqa.conversations("short"))
    assert {len(row["conversations"]) for row in rows} == {2, 4, 6}
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["conversations"][0]["value"].startswith("<image>\n") for row in rows)

    def asked(name):
        turns = [(row["image"], turn) for row in easy_vqa.conversations(name) for turn in row["conversations"]]
        return [(image, turn["from"], turn["value"].removeprefix("<image>\n")) for image, turn in turns]

    assert asked("short") == asked("train")


def test_questions_stand_one_by_one():
    asked = easy_vqa.questions("test")
    assert len(asked) == 9673
    assert asked[0].image.is_file()
    assert {question.kind for question in asked} == {"yes/no", "shape", "colour"}
    for question in asked:
        expected = "yes/no" if "what" not in question.text else "colour" if "color" in question.text else "shape"
        assert question.kind == expected


def test_always_yes_is_right_37_times_in_100():
    asked = easy_vqa.questions("test")
    assert round(100 * sum(question.answer == "yes" for question in asked) / len(asked), 2) == 37.33


def test_names():
    for name in easy_vqa.NAMES:
        assert easy_vqa.is_built_in(f"easy_vqa:{name}")
        assert easy_vqa.name_of(f"easy_vqa:{name}") == name
    assert not easy_vqa.is_built_in("easy_vqa:val")
    assert not easy_vqa.is_built_in("data.json")
