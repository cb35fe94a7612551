"""Training steps on rows of mixed lengths: padded, grouped by length, and packed, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DistributedSampler

from data.dataset import Collator, LengthModalitySampler
from data.token_batches import TokenBatches
from eval import measure
from eval.benches.models import IMAGE_TOKEN, Shape, build, make_sample
from eval.comparison.tables import markdown
from models import StagePlan
from models.attention import SDPA_PACKED
from models.batch_facts import BatchFacts

TITLE = "Padded, grouped and packed rows, side by side"
NOTE = """The ratio is the median of the rounds'.

Rows: the sources of LLaVA-665k in their published proportions (LLaVA's issue 702); nobody published their lengths, so
the mean text length of each is assumed (eval/benches/packing.py) and spread log-normally; all lengths are scaled with
the image. A forward pass has 8 rows, or as many tokens as 8 rows have on average; tokens/s counts no padding; the
passes that are timed are of all sizes. Packed rows run under sdpa_packed, the others under sdpa.
"""
HEADING = ["step", "tokens/s (median)", "quartiles", "this / grouped by length", "padding", "largest pass, tokens"]
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
    lengths = [row.length for row in rows]
    shuffled: Any = DistributedSampler(rows, num_replicas=1, rank=0)  # type: ignore[arg-type]  # reads the length alone
    order = list(shuffled)
    grouped = list(LengthModalitySampler(lengths, [row.visual > 0 for row in rows], batch_size=BATCH * PASSES, seed=0))
    budget = BATCH * PASSES * sum(lengths) // len(lengths)
    return {
        "padded": [order[start : start + BATCH] for start in range(0, len(rows), BATCH)],
        "grouped by length": [grouped[start : start + BATCH] for start in range(0, len(rows), BATCH)],
        "packed": list(TokenBatches(shuffled, lengths, tokens_per_step=budget, passes=PASSES)),
    }


def timed(passes: Sequence[list[Row]]) -> list[list[Row]]:
    """Returns TIMED of the passes, of all sizes."""
    by_size = sorted(passes, key=lambda one: sum(row.length for row in one))
    step = len(by_size) / TIMED
    return [by_size[int(step * (place + 0.5))] for place in range(TIMED)]


def make_batch(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Returns a padded batch of rows."""
    random = Generator().manual_seed(1)
    return Collator(0)([make_sample(row.visual, row.text, random) for row in rows])


def step_of(shape: Shape, plan: StagePlan | None, batches: Sequence[dict[str, Tensor]], way: str) -> Callable[[], None]:
    """Returns forward and backward over the batches of one way."""
    model = build(shape, plan=plan)
    model.model.vision_tower.requires_grad_(False)
    if way == "packed":
        model.set_attn_implementation({"text_config": SDPA_PACKED})
    model.train()
    inputs = []
    for batch in batches:
        facts = BatchFacts.of(batch, IMAGE_TOKEN)
        moved = {name: tensor.to(measure.device()) for name, tensor in batch.items()}
        inputs.append({**moved, "facts": facts, "packed": way == "packed"})

    def run() -> None:
        for batch in inputs:
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def table(shape: Shape, repeats: int) -> str:
    """Returns the markdown table of one shape."""
    rows = draw_rows(shape)
    passes = {way: [[rows[number] for number in one] for one in found] for way, found in ways(rows).items()}
    chosen = {way: timed(found) for way, found in passes.items()}
    plans = {"dense": None, "fused full": StagePlan(shape.layers // 4, shape.layers // 2)}
    calls = {
        f"{plan}, {way}": step_of(shape, plans[plan], [make_batch(one) for one in chosen[way]], way)
        for plan in plans
        for way in chosen
    }
    seconds = measure.time_side_by_side(calls, repeats)
    lines = [HEADING]
    for plan in plans:
        sizes = {way: _sizes(found, way) for way, found in chosen.items()}
        speeds = {way: [sizes[way][0] / one for one in seconds[f"{plan}, {way}"]] for way in chosen}
        for way, found in speeds.items():
            low, median, high = statistics.quantiles(found, n=4)
            pairs = zip(found, speeds["grouped by length"], strict=True)
            ratio = statistics.median(one / other for one, other in pairs)  # of a round each
            cells = [f"{plan}, {way}", f"{median:,.0f}", f"{low:,.0f} - {high:,.0f}", f"{ratio:.2f}"]
            padding = 1 - sizes[way][0] / sizes[way][1]
            lines.append([*cells, f"{padding:.0%}", f"{_sizes(passes[way], way)[2]:,}"])
    text = statistics.mean(row.text for row in rows)
    without = sum(row.visual == 0 for row in rows) / len(rows)
    about = f"{shape.visual} visual + {text:.0f} text tokens on average, {without:.0%} of the rows without image"
    return f"### {shape.layers} layers x {shape.width}, {about}\n\n{markdown(lines)}"


def _sizes(passes: Sequence[Sequence[Row]], way: str) -> tuple[int, int, int]:
    """Returns the tokens of passes, without and with padding, and those of the largest, which decides over memory."""
    lengths = [[row.length for row in one] for one in passes]
    padded = [sum(one) if way == "packed" else len(one) * max(one) for one in lengths]
    return sum(map(sum, lengths)), sum(padded), max(padded)
