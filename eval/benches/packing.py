"""Training steps on rows of mixed lengths: padded, grouped by length, and packed, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from data.dataset import Collator, LengthModalitySampler
from data.token_batches import TokenBatches
from eval import measure
from eval.measure import Shape
from models import StagePlan
from models.attention import SDPA_PACKED
from models.batch_facts import BatchFacts

SHAPES = (Shape(8, 192, 64, 30),)
QUICK = (Shape(4, 128, 36, 17),)
GPU_SHAPES = (Shape(16, 4096, 576, 273),)
VISUAL, LONGEST = 576, 2048  # tokens of an image and of the longest sample, before both are scaled to the shape
# llava_v1_5_mix665k: rows of each source (github.com/haotian-liu/LLaVA, issue 702), whether they have an image, and the
# mean of their text tokens, which nobody published: assumed
MIX = (
    ("LLaVA-Instruct", 157_712, True, 300),
    ("ShareGPT", 40_688, False, 1100),
    ("VQAv2", 82_783, True, 120),
    ("GQA", 72_140, True, 220),
    ("OKVQA", 8_998, True, 60),
    ("OCR-VQA", 80_000, True, 150),
    ("A-OKVQA", 66_160, True, 90),
    ("TextCaps", 21_953, True, 110),
    ("RefCOCO", 48_447, True, 300),
    ("VG", 86_417, True, 330),
)
SPREAD = 0.5  # of the logarithm of a source's text lengths
ROWS, BATCH, PASSES = 3200, 8, 4  # rows drawn, of a forward pass, passes of a step
TIMED = 8  # forward passes of each way, spread over all of them by size


@dataclass(frozen=True)
class Row:
    """A sample: tokens of its image, 0 without one, and of its text."""

    visual: int
    text: int

    @property
    def length(self) -> int:
        """Tokens of both."""
        return self.visual + self.text


class _Shuffled:
    """The rows in a random order."""

    def __init__(self, rows: int) -> None:
        self._order = torch.randperm(rows, generator=Generator().manual_seed(0)).tolist()

    def set_epoch(self, epoch: int) -> None:
        """There is one epoch alone."""

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)


def draw_rows(shape: Shape, count: int = ROWS) -> list[Row]:
    """Returns rows of LLaVA-665k's mix, every length scaled so that an image has the shape's visual tokens."""
    random, scale = Generator().manual_seed(0), shape.visual / VISUAL
    sources = torch.multinomial(torch.tensor([rows for _, rows, _, _ in MIX]).double(), count, True, generator=random)
    noise = torch.randn(count, generator=random)
    rows = []
    for source, deviation in zip(sources.tolist(), noise.tolist(), strict=True):
        _, _, has_image, mean = MIX[source]
        visual = VISUAL if has_image else 0
        text = mean * float(torch.exp(torch.tensor(SPREAD * deviation - SPREAD**2 / 2)))
        text = min(text, LONGEST - visual)
        rows.append(Row(round(visual * scale), max(10, round(text * scale))))
    return rows


def ways(rows: Sequence[Row]) -> dict[str, list[list[int]]]:
    """Returns the forward passes of each way to make them, as numbers of rows."""
    lengths, order = [row.length for row in rows], list(_Shuffled(len(rows)))
    grouped = list(LengthModalitySampler(lengths, [row.visual > 0 for row in rows], batch_size=BATCH * PASSES, seed=0))
    budget = BATCH * PASSES * sum(lengths) // len(lengths)
    return {
        "padded": [order[start : start + BATCH] for start in range(0, len(rows), BATCH)],
        "grouped by length": [grouped[start : start + BATCH] for start in range(0, len(rows), BATCH)],
        "packed": list(TokenBatches(_Shuffled(len(rows)), lengths, tokens_per_step=budget, passes=PASSES)),
    }


def timed(passes: Sequence[list[int]], rows: Sequence[Row]) -> list[list[int]]:
    """Returns some of the passes, of all sizes."""
    by_size = sorted(passes, key=lambda one: sum(rows[number].length for number in one))
    step = len(by_size) / TIMED
    return [by_size[int(step * (place + 0.5))] for place in range(TIMED)]


def make_batch(shape: Shape, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Returns a padded batch of rows: a few words, the image, more words, of which the last half are the answer."""
    random, samples = Generator().manual_seed(1), []
    side = int(shape.visual**0.5) * 2
    for row in rows:
        words = torch.randint(0, measure.IMAGE_TOKEN, (row.text,), generator=random)
        before, image = min(4, row.text // 4), torch.full((row.visual,), measure.IMAGE_TOKEN)
        labels = words.where(torch.arange(row.text) >= row.text // 2, -100)
        sample = {
            "input_ids": torch.cat([words[:before], image, words[before:]]),
            "labels": torch.cat([labels[:before], torch.full_like(image, -100), labels[before:]]),
        }
        if row.visual:
            sample["pixel_values"] = torch.randn(1, 3, side, side, generator=random)
        samples.append(sample)
    return Collator(0)(samples)


def prepare(shape: Shape, plan: StagePlan | None, rows: Sequence[Row], way: str) -> Callable[[], None]:
    """Returns forward and backward over the timed passes of one way."""
    model = measure.build(shape, plan=plan)
    model.model.vision_tower.requires_grad_(False)
    if way == "packed":
        model.set_attn_implementation({"text_config": SDPA_PACKED})
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model.train().to(measure.device(), dtype)
    batches = []
    for one in timed(ways(rows)[way], rows):
        batch = make_batch(shape, [rows[number] for number in one])
        facts = BatchFacts.of(batch, measure.IMAGE_TOKEN)
        moved = {name: tensor.to(measure.device()) for name, tensor in batch.items()}
        batches.append({**moved, "facts": facts, "packed": way == "packed"})
    return lambda: _run(model, batches)


def _run(model: PreTrainedModel, batches: Sequence[dict[str, object]]) -> None:
    for batch in batches:
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


def _largest(passes: Sequence[list[int]], rows: Sequence[Row], way: str) -> int:
    """Returns the tokens of the largest pass, padding included: what decides over memory."""
    lengths = [[rows[number].length for number in one] for one in passes]
    return max(sum(one) if way == "packed" else len(one) * max(one) for one in lengths)


def table(shape: Shape, repeats: int) -> str:
    """Returns the markdown table of one shape."""
    rows, made = draw_rows(shape), ways(draw_rows(shape))
    plans = {"dense": None, "fused full": StagePlan(shape.layers // 4, shape.layers // 2)}
    calls = {(plan, way): prepare(shape, plans[plan], rows, way) for plan in plans for way in made}
    seconds = measure.time_side_by_side({f"{plan}: {way}": call for (plan, way), call in calls.items()}, repeats)
    text = statistics.mean(row.text for row in rows)
    lines = [
        f"### {shape.layers} layers x {shape.width}, {shape.visual} visual + {text:.0f} text tokens on average, "
        f"{sum(row.visual == 0 for row in rows) / len(rows):.0%} of the rows without image",
        "",
        "| step | tokens/s (median) | quartiles | this / grouped by length | padding | largest pass, tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for plan in plans:
        speeds = {}
        for way in made:
            chosen = [[rows[number].length for number in one] for one in timed(made[way], rows)]
            tokens, width = sum(map(sum, chosen)), sum(len(one) * max(one) for one in chosen)
            speeds[way] = [tokens / one for one in seconds[f"{plan}: {way}"]], tokens, width
        against = speeds["grouped by length"][0]
        for way, (found, tokens, width) in speeds.items():
            low, median, high = statistics.quantiles(found, n=4)
            ratio = statistics.median(one / other for one, other in zip(found, against, strict=True))  # of a round each
            padding = 0.0 if way == "packed" else 1 - tokens / width
            lines.append(
                f"| {plan}, {way} | {median:,.0f} | {low:,.0f} - {high:,.0f} | {ratio:.2f} | {padding:.0%} "
                f"| {_largest(made[way], rows, way):,} |"
            )
    return "\n".join(lines)
