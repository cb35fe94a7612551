"""The built-in set scenes: right answers, no hint in the words, held-out pairs, the same bytes everywhere."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from data import built_in, scenes
from data.images import open_image
from data.rows import DataError
from data.scene_images import COLOURS, SHAPES, SIDE, draw
from data.scene_questions import FAMILIES, NUMBERS, WORDS, caption, is_held_out

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rows():
    """Returns the first rows of each set: (image name, scene, questions)."""
    return {name: list(scenes.generate_rows(name, limit)) for name, limit in
            (("train", 1800), ("test", 900), ("compositional", 150))}  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Makes sets of 15 images each in a folder of this test."""
    monkeypatch.setenv("SCENES_CACHE", str(tmp_path / "cache"))
    for name in scenes.NAMES:
        monkeypatch.setitem(scenes.ROWS, name, 15)
    return tmp_path / "cache"


def truth(scene, text):
    """Returns the answer to a question, read off the scene by the question's words alone."""

    def matching(words):
        words = [word if word == "cross" else re.sub("(?<=cross)es$|s$", "", word) for word in words.split()]
        return [thing for thing in scene.things
                if all(word in ("object", thing.colour, thing.shape, thing.size) for word in words)]  # fmt: skip

    def only(words):
        (thing,) = matching(words)
        return thing

    if found := re.fullmatch(r"how many (.*) are there\?", text):
        return str(len(matching(found[1])))
    if found := re.fullmatch(r"is the number of (.*) greater than, less than or equal to the number of (.*)\?", text):
        one, other = len(matching(found[1])), len(matching(found[2]))
        return "equal" if one == other else "greater" if one > other else "less"
    if found := re.fullmatch(r"where is the (.*), seen from the (.*)\?", text):
        one, other = only(found[1]), only(found[2])
        if one.row == other.row:
            return "left" if one.x < other.x else "right"
        assert one.column == other.column
        return "above" if one.y < other.y else "below"
    if found := re.fullmatch(r"what (color|shape|size) is the object directly (.*?) the (\w+ \w+)\?", text):
        start, steps = only(found[3]), {"to the left of": (-1, 0), "to the right of": (1, 0)}
        right, down = {**steps, "above": (0, -1), "below": (0, 1)}[found[2]]
        (other,) = [thing for thing in scene.things
                    if (thing.column, thing.row) == (start.column + right, start.row + down)]  # fmt: skip
        return {"color": other.colour, "shape": other.shape, "size": other.size}[found[1]]
    if found := re.fullmatch(r"is there a (.*)\?", text):
        return "yes" if matching(found[1]) else "no"
    return read(scene, text)


def read(scene, text):
    if found := re.fullmatch(r"what number is under the word (\w+)\?", text):
        return {sign.word: sign.number for sign in scene.signs}[found[1]]
    if found := re.fullmatch(r"what word is above the number (\d)\?", text):
        return {sign.number: sign.word for sign in scene.signs}[found[1]]
    found = re.fullmatch(r"what (word|number) is written\?", text)
    (sign,) = scene.signs
    return getattr(sign, found[1])


@pytest.mark.parametrize("name", scenes.NAMES)
def test_every_answer_is_what_the_scene_shows(rows, name):
    for _, scene, asked in rows[name]:
        for question in asked:
            assert truth(scene, question.text) == question.answer, (question, scene)


@pytest.mark.parametrize("name", scenes.NAMES)
def test_a_row_asks_four_families_and_all_are_asked_alike(rows, name):
    assert all(len({question.family for question in asked}) == 4 for _, _, asked in rows[name])
    counts = Counter(question.family for _, _, asked in rows[name] for question in asked)
    assert set(counts) == set(FAMILIES)
    assert len(set(counts.values())) == 1


def test_words_alone_stay_near_a_fair_guess_in_every_family(rows):
    known = [(one.family, one.text, one.answer) for _, _, asked in rows["train"] for one in asked]
    for name in ("train", "test"):
        asked = [one for _, _, questions in rows[name] for one in questions]
        half = known if name == "test" else known[: len(known) // 2]
        asked = asked if name == "test" else asked[len(known) // 2 :]
        said = scenes.words_only(half, [(one.family, one.text) for one in asked])
        for family in FAMILIES:
            members = [(one, answer) for one, answer in zip(asked, said, strict=True) if one.family == family]
            right = sum(one.answer == answer for one, answer in members) / len(members)
            chance = sum(one.chance for one, _ in members) / len(members)
            assert right < chance + 0.06, (name, family)  # three standard errors of 600 questions


def test_of_two_objects_beside_each_other_one_tells_nothing_of_the_other(rows):
    """A scene has few colours; that neighbours are alike more often than by chance must not show in the questions."""
    for asked, among in (("color", COLOURS), ("shape", SHAPES)):
        members = [one for _, _, questions in rows["train"] for one in questions
                   if one.text.startswith(f"what {asked}")]  # fmt: skip
        same = sum(one.answer in one.text.split("?")[0].split() for one in members) / len(members)
        assert abs(same - 1 / len(among)) < 0.05


def test_training_and_test_have_no_held_out_pair(rows):
    for name in ("train", "test"):
        for _, scene, _ in rows[name]:
            assert not any(is_held_out((thing.colour, thing.shape)) for thing in scene.things)
            assert not any(is_held_out((sign.word, sign.number)) for sign in scene.signs)
        texts = {one.text for _, _, asked in rows[name] for one in asked}
        for colour, shape in filter(is_held_out, product(COLOURS, SHAPES)):
            assert not any(re.search(rf"\b{colour} {shape}", text) for text in texts)


def test_every_compositional_question_is_about_a_held_out_pair(rows):
    for _, scene, asked in rows["compositional"]:
        assert all(is_held_out((sign.word, sign.number)) for sign in scene.signs)
        for one in asked:
            named = [pair for pair in product(COLOURS, SHAPES) if re.search(rf"\b{' '.join(pair)}", one.text)]
            if one.family == "attribute":  # of the object named, or of its neighbour
                assert named
            elif one.family != "read":
                assert any(map(is_held_out, named))


def test_held_out_pairs_leave_every_colour_shape_word_and_number_alike():
    for firsts, seconds, of_first, of_second in ((COLOURS, SHAPES, 2, 2), (WORDS, NUMBERS, 2, 3)):
        held = [pair for pair in product(firsts, seconds) if is_held_out(pair)]
        assert set(Counter(first for first, _ in held).values()) == {of_first}
        assert set(Counter(second for _, second in held).values()) == {of_second}


def test_sizes():
    assert 4 * scenes.ROWS["train"] >= 50_000
    assert 4 * scenes.ROWS["test"] == 4 * scenes.ROWS["compositional"] == 6_000
    assert not any(rows % 15 for rows in scenes.ROWS.values())  # so that every family has as many questions


def test_rows_and_pixels_are_the_same_on_every_machine(rows):
    digest = hashlib.sha256()
    for name in scenes.NAMES:
        for file, scene, asked in rows[name][:60]:
            digest.update(repr((file, [(one.text, one.answer) for one in asked], caption(scene))).encode())
            digest.update(draw(scene).tobytes())
    assert digest.hexdigest()[:16] == "8eaaea4210ae6bdc", "another set needs another scenes.VERSION"


def test_objects_and_signs_lie_inside_and_apart(rows):
    for _, scene, _ in rows["test"][:40]:
        blank = draw(type(scene)(scene.background, (), ())).tobytes()
        parts = [type(scene)(scene.background, (thing,), ()) for thing in scene.things]
        parts += [type(scene)(scene.background, (), (sign,)) for sign in scene.signs]
        drawn = [draw(part).tobytes() for part in (*parts, scene)]
        pixels = range(0, len(blank), 3)
        inked = [sum(picture[place : place + 3] != blank[place : place + 3] for place in pixels) for picture in drawn]
        assert inked[-1] == sum(inked[:-1])


def test_a_set_is_made_on_first_use_and_read_after(small):
    folder = scenes.image_folder("test")
    assert folder.is_relative_to(small)
    assert len(list(folder.glob("*.png"))) == 15
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    conversations = list(scenes.conversations("test"))
    asked = scenes.questions("test")
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert [row["image"] for row in conversations] == [f"{number:05}.png" for number in range(15)]
    assert len({row["id"] for row in conversations}) == 15
    turns = [turn["value"].removeprefix("<image>\n") for row in conversations for turn in row["conversations"]]
    assert turns == [text for one in asked for text in (one.text, one.answer)]
    assert all(row["conversations"][0]["value"].startswith("<image>\n") for row in conversations)
    for (name, scene, _), row in zip(scenes.generate_rows("test"), conversations, strict=True):
        assert row["image"] == name
        with Image.open(folder / name) as image:
            assert image.size == (SIDE, SIDE)
        assert open_image(folder, name).tobytes() == draw(scene).tobytes()


def test_a_caption_names_what_each_cell_shows_in_reading_order(small):
    captions, questions = (list(scenes.conversations(name)) for name in (scenes.CAPTIONS, "train"))
    assert [row["image"] for row in captions] == [row["image"] for row in questions]  # the training images
    assert scenes.image_folder(scenes.CAPTIONS) == scenes.image_folder("train")
    for (_, scene, _), row in zip(scenes.generate_rows("train"), captions, strict=True):
        question, answer = (turn["value"] for turn in row["conversations"])
        assert question == "<image>\ndescribe the picture."
        cells = [cell for line in answer.removesuffix(".").split(". ") for cell in line.split(": ")[1].split(", ")]
        assert [line.split(":")[0] for line in answer.split(". ")] == ["top", "center", "bottom"]
        drawn = {(one.row, one.column): f"{one.size} {one.colour} {one.shape}" for one in scene.things}
        drawn |= {(one.row, one.column): f"{one.word} {one.number}" for one in scene.signs}
        assert cells == [drawn.get(place, "nothing") for place in product(range(3), range(3))]


def test_a_set_cut_off_while_it_was_made_is_made_anew(small):
    folder = scenes.image_folder("test")
    partial = folder.with_name("train.partial")
    partial.mkdir()
    (partial / "00000.png").write_bytes(b"half")
    assert open_image(scenes.image_folder("train"), "00000.png").size == (SIDE, SIDE)
    assert not partial.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCENES_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"^scenes:test: .* cannot be written .*SCENES_CACHE"):
        scenes.image_folder("test")


def test_names():
    assert scenes.is_built_in("scenes")
    assert scenes.name_of("scenes") == "train"
    for name in scenes.FILES:
        assert built_in.is_built_in(f"scenes:{name}")
        assert scenes.name_of(f"scenes:{name}") == name
        assert f"scenes:{name}" in built_in.NAMES
    for file in ("scenes:", "scenes:val", "scenes.json", "my/scenes", "scenes:train.json", "scenestrain", "train"):
        assert not built_in.is_built_in(file), file


def test_the_command_writes_llava_rows_and_checks_them(small, tmp_path, capsys):
    out = tmp_path / "out"
    assert scenes.main(["--out", str(out), "--montage", str(tmp_path / "montage.png")]) == 0
    for name in scenes.FILES:
        found = json.loads((out / f"{name}.json").read_text())
        assert len(found) == 15
        assert all(open_image(out, row["image"]).size == (SIDE, SIDE) for row in found)
    assert {path.name for path in out.iterdir() if path.is_dir()} == set(scenes.NAMES)  # captions are of train's images
    with Image.open(tmp_path / "montage.png") as montage:
        assert montage.width > 6 * SIDE
    capsys.readouterr()
    assert scenes.main([]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == ["test"] * 6 + ["compositional"] * 6
    (tmp_path / "file").write_text("")
    assert scenes.main(["--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_two_processes_make_a_set_once(tmp_path):
    code = "from data import scenes; scenes.ROWS['test'] = 60; print(scenes.image_folder('test'))"
    environment = {"SCENES_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert len({process.communicate(timeout=120)[0] for process in both}) == 1
    assert all(process.returncode == 0 for process in both)
    assert len(list((tmp_path / scenes.VERSION / "test").glob("*.png"))) == 60
