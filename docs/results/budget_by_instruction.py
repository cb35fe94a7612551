"""Would a budget that the instruction chooses pay? Prints score against cost, from the answers that a study kept.

For one checkpoint with three plans (64, 16 and 4 visual tokens): each plan for every question; a router that knows the
question's text, and takes for each text the plan with the best accuracy - price x cost on half of the images; and the
cheapest plan that answers a question right, which no router can know. Scores are of the other half of the images.

python docs/results/budget_by_instruction.py docs/results/easy_vqa
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import easy_vqa

PLANS = ("trained", "fast", "tiny")
PRICES = (0.05, 0.1, 0.2, 0.4)


def curve(file: Path) -> list[tuple[str, float, float]]:
    """Returns (what chooses, accuracy, decoder FLOPs of a prompt as a share of dense) of one seed's record."""
    answers = json.loads(file.read_text(encoding="utf-8"))["scores"]["easy_vqa"]
    right = np.array([[int(digit) for digit in answers[plan]["right"]] for plan in PLANS])
    cost = np.array([answers[plan]["flops"] / answers[plan]["dense_flops"] for plan in PLANS])
    questions = easy_vqa.questions("test")
    texts = np.unique([question.text for question in questions], return_inverse=True)[1]
    learned = np.array([int(question.image.stem) % 2 == 0 for question in questions])  # what the router learns from

    def point(name: str, chosen: np.ndarray) -> tuple[str, float, float]:
        scores = right[chosen, np.arange(len(chosen))]
        return name, 100 * scores[~learned].mean(), 100 * cost[chosen][~learned].mean()

    found = [point(f"always {plan}", np.full(len(texts), number)) for number, plan in enumerate(PLANS)]
    for price in PRICES:
        worth = [right[:, learned & (texts == text)].mean(axis=1) - price * cost for text in range(texts.max() + 1)]
        found.append(point(f"by the text, price {price}", np.argmax(worth, axis=1)[texts]))
    cheapest_first = right[::-1].argmax(axis=0)  # 0, the cheapest, also where none is right
    return [*found, point("cheapest that is right", len(PLANS) - 1 - cheapest_first)]


if __name__ == "__main__":
    curves = [curve(file) for file in sorted(Path(sys.argv[1]).glob("elastic_tokens_0_3-seed*.json"))]
    for points in zip(*curves, strict=True):
        scores, costs = ([point[axis] for point in points] for axis in (1, 2))
        print(f"| {points[0][0]} | {np.mean(scores):.2f} % | {np.mean(costs):.1f} % |")
