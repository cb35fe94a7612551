"""The generator of the built-in set `scenes`: random scenes, and questions whose text does not reveal the answer.

A question's form and the class of its answer are drawn first, at chance probabilities; then scenes are drawn until one
has such a question for each of a row's families. Within a form all colours, shapes, words and numbers are treated
alike, so that given the text alone the answer stays at chance.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations, product
from typing import Final, TypeVar

from data.scene_images import CELL, COLOURS, GRID, RADII, SHAPES, Scene, Sign, Thing

Pair = tuple[str, str]

FAMILIES: Final = ("count", "compare", "relation", "attribute", "existence", "read")
WORDS: Final = (
    "bag", "bar", "bat", "cab", "cap", "car", "cat", "lap", "pad", "pat", "rag", "rap", "rat", "tag", "tap",
)  # fmt: skip
NUMBERS: Final = tuple(map(str, range(10)))
QUESTIONS: Final = 4  # of a scene, each of another family
_FAMILY_SETS: Final = tuple(combinations(FAMILIES, QUESTIONS))
_PAIRS: Final = tuple(product(COLOURS, SHAPES))
_CELLS: Final = tuple(product(range(GRID), range(GRID)))
_COLOURS: Final = tuple(COLOURS)
_SIZES: Final = tuple(RADII)
_SIDES: Final = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
_ROWS: Final = ("top", "center", "bottom")  # of a caption
_BESIDE: Final = {
    "left": "directly to the left of",
    "right": "directly to the right of",
    "above": "directly above",
    "below": "directly below",
}
_HELD_OUT: Final = frozenset(
    [pair for pair in _PAIRS if (_COLOURS.index(pair[0]) - SHAPES.index(pair[1])) % 3 == 0]
    + [pair for pair in product(WORDS, NUMBERS) if (WORDS.index(pair[0]) - NUMBERS.index(pair[1])) % 5 == 0]
)
_Choice = TypeVar("_Choice")


@dataclass(frozen=True, slots=True)
class SceneQuestion:
    """A question about a scene.

    `chance` is the accuracy of a random guess among the training answers to such a question.
    """

    family: str
    text: str
    answer: str
    chance: float


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A possible question about a scene, the class of its answer (`kind`), and the pairs in its text."""

    kind: str
    text: str
    answer: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Objects that share an attribute or a pair: their name, their number, and that pair, if any."""

    name: str
    size: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class _Form:
    """One form of a family's questions.

    Attributes:
        odds: probability of each class of answers.
        chance: accuracy of a random guess.
        find: yields every question of this form about a scene.
        has_pairs: its questions mention pairs of colour and shape, or of word and number.
    """

    odds: Mapping[str, float]
    chance: float
    find: Callable[[Scene], Iterator[_Candidate]]
    has_pairs: bool


class PortableRandom:
    """Random choices that are the same under every version of Python, because they use random() alone.

    Args:
        key: the seed.
    """

    def __init__(self, key: str) -> None:
        self._random = random.Random(key)

    def below(self, limit: int) -> int:
        """Returns a whole number from 0 to limit - 1."""
        return int(self._random.random() * limit)

    def pick(self, choices: Sequence[_Choice]) -> _Choice:
        """Returns one of the choices."""
        return choices[self.below(len(choices))]

    def sample(self, choices: Sequence[_Choice], count: int) -> list[_Choice]:
        """Returns `count` of the choices in random order."""
        rest = list(choices)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def weighted_pick(self, odds: Mapping[str, float]) -> str:
        """Returns a key, with a probability proportional to its value."""
        left = self._random.random() * sum(odds.values())
        for name, share in odds.items():
            left -= share
            if left < 0:
                return name
        return name


def is_held_out(pair: Pair) -> bool:
    """Returns whether training has no scene with this pair: (colour, shape), or (word, number).

    For each colour two of the six shapes are held out, and for each shape two of the six colours; for each word two of
    the ten numbers, and for each number three of the fifteen words.
    """
    return pair in _HELD_OUT


def caption(scene: Scene) -> str:
    """Describes the content of each cell of a scene, in reading order."""
    cells = {(sign.column, sign.row): f"{sign.word} {sign.number}" for sign in scene.signs}
    cells |= {(one.column, one.row): f"{one.size} {one.colour} {one.shape}" for one in scene.things}
    rows = [", ".join(cells.get((column, row), "nothing") for column in range(GRID)) for row in range(GRID)]
    return ". ".join(f"{place}: {row}" for place, row in zip(_ROWS, rows, strict=True)) + "."


def generate(seed: str, row: int, *, compositional: bool) -> tuple[Scene, list[SceneQuestion]]:
    """Returns one row: a scene and QUESTIONS questions about it, each of another family.

    Args:
        seed: names the set of rows.
        row: its number.
        compositional: every question is about a held-out pair; otherwise no held-out pair occurs.
    """
    draws = PortableRandom(f"{seed}:{row}")
    targets = []
    for family in draws.sample(_FAMILY_SETS[row % len(_FAMILY_SETS)], QUESTIONS):
        form = draws.pick([form for form in _FORMS[family] if form.has_pairs or not compositional])
        targets.append((family, form, draws.weighted_pick(form.odds)))
    while True:
        scene = _scene(draws, compositional=compositional)
        found = []
        for _, form, kind in targets:
            fitting = [one for one in form.find(scene) if one.kind == kind and _fits(one, compositional)]
            if not fitting:
                break
            found.append(draws.pick(fitting))
        if len(found) == len(targets):
            break
    return scene, [
        SceneQuestion(family, one.text, one.answer, form.chance)
        for (family, form, _), one in zip(targets, found, strict=True)
    ]  # fmt: skip


def _fits(found: _Candidate, compositional: bool) -> bool:
    """Returns whether a question belongs to the set; a held-out pair counts even if only its text mentions it."""
    return any(map(is_held_out, found.pairs)) == compositional


def _scene(draws: PortableRandom, *, compositional: bool) -> Scene:
    """Returns a scene of few colours and shapes, so that counts, comparisons and likenesses of all kinds occur."""
    pairs: list[Pair] = []
    while not pairs:
        colours = draws.sample(_COLOURS, 1 + draws.below(4))
        shapes = draws.sample(SHAPES, 1 + draws.below(4))
        pairs = [pair for pair in product(colours, shapes) if compositional or not is_held_out(pair)]
    novel = [pair for pair in pairs if is_held_out(pair)]
    background = (225 + draws.below(31), 225 + draws.below(31), 225 + draws.below(31))
    num_signs, num_things = 1 + draws.below(2), 3 + draws.below(5)
    cells = draws.sample(_CELLS, num_signs + num_things)
    signs = _signs(draws, cells[:num_signs], compositional=compositional)
    things = [
        _thing(draws, cell, draws.pick(novel if novel and draws.below(2) else pairs)) for cell in cells[num_signs:]
    ]
    return Scene(background, tuple(things), tuple(signs))


def _thing(draws: PortableRandom, cell: tuple[int, int], pair: Pair) -> Thing:
    colour, shape = pair
    size = draws.pick(_SIZES)
    shade = draws.below(25) - 12
    red, green, blue = COLOURS[colour]
    paint = (red + shade, green + shade, blue + shade)
    return Thing(shape, colour, size, *cell, *_centre(draws, cell, CELL // 2 - RADII[size] - 1), paint)


def _signs(draws: PortableRandom, cells: Sequence[tuple[int, int]], *, compositional: bool) -> list[Sign]:
    signs: list[Sign] = []
    for cell in cells:
        while True:
            word, number = draws.pick(WORDS), draws.pick(NUMBERS)
            used = {text for sign in signs for text in (sign.word, sign.number)}
            if is_held_out((word, number)) == compositional and not used & {word, number}:
                break
        signs.append(Sign(word, number, *cell, *_centre(draws, cell, 1)))
    return signs


def _centre(draws: PortableRandom, cell: tuple[int, int], play: int) -> tuple[int, int]:
    """Returns the middle of a cell, moved by up to `play` pixels."""
    column, row = cell
    middle = CELL // 2 - play
    return column * CELL + middle + draws.below(2 * play + 1), row * CELL + middle + draws.below(2 * play + 1)


def _groups(scene: Scene, kind: str) -> list[_Group]:
    """Returns the groups that a question can be about: every colour, every shape, or every pair.

    A pair counts where its colour and its shape are both there, if only on two objects: else one of them would tell.
    """
    counts = Counter(_label(thing, kind) for thing in scene.things)
    if kind != "pair":
        names = _COLOURS if kind == "colour" else SHAPES
        return [_Group(_plural(name) if kind == "shape" else f"{name} objects", counts[name], ()) for name in names]
    colours, shapes = ({_label(thing, kind) for thing in scene.things} for kind in ("colour", "shape"))
    pairs = [(colour, shape) for colour, shape in _PAIRS if colour in colours and shape in shapes]
    return [_Group(_plural(" ".join(pair)), counts[" ".join(pair)], (pair,)) for pair in pairs]


def _plural(words: str) -> str:
    return f"{words}es" if words.endswith("s") else f"{words}s"


def _label(thing: Thing, kind: str) -> str:
    """Returns the words for an object's colour, shape, size, or pair of colour and shape."""
    return " ".join(_pair(thing)) if kind == "pair" else str(getattr(thing, kind))


def _pair(thing: Thing) -> Pair:
    return thing.colour, thing.shape


def _counted(scene: Scene, kind: str) -> Iterator[_Candidate]:
    for group in _groups(scene, kind):
        number = str(group.size)
        yield _Candidate(number, f"how many {group.name} are there?", number, group.pairs)


def _compared(scene: Scene, kind: str) -> Iterator[_Candidate]:
    """Yields comparisons of groups that are both there."""
    for one, other in permutations([group for group in _groups(scene, kind) if group.size], 2):
        answer = "equal" if one.size == other.size else "greater" if one.size > other.size else "less"
        text = f"is the number of {one.name} greater than, less than or equal to the number of {other.name}?"
        yield _Candidate(answer, text, answer, one.pairs + other.pairs)


def _unique(scene: Scene) -> list[Thing]:
    """Returns the objects that colour and shape name alone."""
    counts = Counter(map(_pair, scene.things))
    return [thing for thing in scene.things if counts[_pair(thing)] == 1]


def _related(scene: Scene) -> Iterator[_Candidate]:
    """Yields where an object stands that shares a row or a column with another."""
    for thing, other in permutations(_unique(scene), 2):
        for side, (right, down) in _SIDES.items():
            across, along = thing.column - other.column, thing.row - other.row
            if (across * right > 0 and along == 0) or (along * down > 0 and across == 0):
                text = f"where is the {_label(thing, 'pair')}, seen from the {_label(other, 'pair')}?"
                yield _Candidate(side, text, side, (_pair(thing), _pair(other)))


def _beside(scene: Scene, kind: str) -> Iterator[_Candidate]:
    """Yields the colour, shape or size of the object in the cell beside another."""
    by_cell = {(thing.column, thing.row): thing for thing in scene.things}
    for thing, (side, (right, down)) in product(_unique(scene), _SIDES.items()):
        other = by_cell.get((thing.column + right, thing.row + down))
        if other is None:
            continue
        answer = _label(other, kind)
        odds = answer if kind == "size" else "same" if answer == _label(thing, kind) else "other"
        attribute = {"colour": "color"}.get(kind, kind)
        text = f"what {attribute} is the object {_BESIDE[side]} the {_label(thing, 'pair')}?"
        yield _Candidate(odds, text, answer, (_pair(thing), _pair(other)))


def _existing(scene: Scene, first: str, second: str) -> Iterator[_Candidate]:
    """Yields whether two attributes that are both there are there on one object."""
    both = [(_label(thing, first), _label(thing, second)) for thing in scene.things]  # no set: its order is not fixed
    for one, other in product(dict.fromkeys(one for one, _ in both), dict.fromkeys(other for _, other in both)):
        answer = "yes" if (one, other) in both else "no"
        noun = other if second == "shape" else f"{other} object"
        yield _Candidate(answer, f"is there a {one} {noun}?", answer, ((one, other),) if first == "colour" else ())


def _read(scene: Scene, target: str) -> Iterator[_Candidate]:
    """Yields what the only sign says, or of two signs the half that goes with the other."""
    for sign in scene.signs:
        pairs = ((sign.word, sign.number),)
        if target in ("word", "number") and len(scene.signs) == 1:
            yield _Candidate("any", f"what {target} is written?", str(getattr(sign, target)), pairs)
        elif target == "number of word" and len(scene.signs) == 2:
            yield _Candidate("any", f"what number is under the word {sign.word}?", sign.number, pairs)
        elif target == "word of number" and len(scene.signs) == 2:
            yield _Candidate("any", f"what word is above the number {sign.number}?", sign.word, pairs)


def _even(answers: Sequence[str], find: Callable[[Scene], Iterator[_Candidate]], *, has_pairs: bool) -> _Form:
    """Returns a form whose answers are equally likely."""
    return _Form(dict.fromkeys(answers, 1 / len(answers)), 1 / len(answers), find, has_pairs)


def _likeness(kind: str, choices: int) -> _Form:
    """Returns the form of `_beside` for an attribute that the other object has too, once in `choices`."""
    odds = {"same": 1 / choices, "other": 1 - 1 / choices}
    return _Form(odds, 1 / choices, partial(_beside, kind=kind), has_pairs=True)


def _reading(target: str, choices: int) -> _Form:
    return _Form({"any": 1.0}, 1 / choices, partial(_read, target=target), has_pairs=True)


_MOST: Final = {"colour": 4, "shape": 4, "pair": 3}  # objects that are counted, by what they have in common
_FORMS: Final[dict[str, list[_Form]]] = {
    "count": [
        _even(tuple(map(str, range(most + 1))), partial(_counted, kind=kind), has_pairs=kind == "pair")
        for kind, most in _MOST.items()
    ],
    "compare": [
        _even(("greater", "less", "equal"), partial(_compared, kind=kind), has_pairs=kind == "pair") for kind in _MOST
    ],
    "relation": [_even(tuple(_SIDES), _related, has_pairs=True)],
    "attribute": [
        _likeness("colour", len(COLOURS)),
        _likeness("shape", len(SHAPES)),
        _even(tuple(RADII), partial(_beside, kind="size"), has_pairs=True),
    ],
    "existence": [
        _even(("yes", "no"), partial(_existing, first=first, second=second), has_pairs=first == "colour")
        for first, second in (("colour", "shape"), ("size", "shape"), ("size", "colour"))
    ],
    "read": [
        _reading("word", len(WORDS)),
        _reading("number", len(NUMBERS)),
        _reading("word of number", 12),  # of the fifteen words, three are held out from each number
        _reading("number of word", 8),
    ],
}
