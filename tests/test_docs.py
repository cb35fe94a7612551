"""README and docs: links lead somewhere, and commands name modules, options, recipes and files that there are."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from recipes.schema import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
STARTS = ("python ", "HF_HUB_OFFLINE=1 ", "./launch.sh", "deepspeed ", "torchrun ", "accelerate ")
OURS = ("models/", "data/", "recipes/", "train/", "eval/", "tests/", "docs/")  # other files are the reader's


def commands_of(text):
    """Returns the commands of a page's fenced blocks, continued lines joined, comments gone."""
    found = []
    for language, block in FENCE.findall(text):
        if language not in ("", "bash"):
            continue
        lines = block.replace("\\\n", " ").splitlines()
        lines = [line for line in lines if line.startswith(STARTS) and not line.startswith("python -c")]
        found += [shlex.split(line, comments=True) for line in lines]
    return found


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page.read_text(encoding="utf-8"))]


def title(slug):
    return re.sub(r"[^a-z0-9 -]", "", slug.lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [title(heading) for heading in headings], f"{page.name}: {link}"


def test_there_are_commands():
    assert len(COMMANDS) > 40
    assert {page.name for page, _ in COMMANDS} >= {"README.md", "training.md", "evaluation.md", "data.md"}


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{page.name}-{' '.join(words)[:60]}" for page, words in COMMANDS]
)
def test_a_command_names_what_there_is(page, command):
    script = next((word for word in command if word.endswith(".py")), None)
    if "-m" in command:
        name = command[command.index("-m") + 1]
        if name.split(".")[0] not in ("models", "data", "recipes", "train", "eval"):
            return
        source = (ROOT / name.replace(".", "/")).with_suffix(".py")
        source = source if source.is_file() else ROOT / name.replace(".", "/") / "__main__.py"
    elif command[0] == "./launch.sh":
        source = ROOT / "launch.sh"
    elif script is not None:
        source = ROOT / script
    else:
        return
    assert source.is_file(), source
    check_files(command)
    if source.name != "lmms.py":  # its options are lmms-eval's
        check_options(command, source)


def check_files(command):
    for before, word in pairwise(command):
        if before != "--write" and word.startswith(OURS) and "=" not in word:
            assert (ROOT / word).exists(), word
    recipes = [
        word
        for before, word in pairwise(command)
        if before != "--write" and word.startswith("recipes/") and "/" not in word[8:]
    ]
    changes = [word for word in command if re.match(r"^[a-z_.]+=", word) and not word.startswith("--")]
    for recipe in recipes:
        load_recipe(ROOT / recipe, [change for change in changes if "..." not in change])


def check_options(command, source):
    """Every --option of ours stands in the sources that the command's folder has."""
    if source.name == "launch.sh":
        text = source.read_text(encoding="utf-8") + (ROOT / "train/elastic.py").read_text(encoding="utf-8")
        options = [word for word in command[2:] if word.startswith("--")] if command[1:2] == ["train"] else []
    else:
        text = "".join(path.read_text(encoding="utf-8") for path in source.parent.rglob("*.py"))
        marker = source.name if source.name in " ".join(command) else command[command.index("-m") + 1]
        after = next(place for place, word in enumerate(command) if marker in word)
        options = [word for word in command[after:] if word.startswith("--")]
    for option in options:
        name = option.partition("=")[0]
        assert f'"{name}"' in text, f"{name} is no option of {source}"
