"""The search for the fusion window while a phase trains: gates on all layers, closed down to one window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from models.schedules import Gated, window_gates
from models.stage_plan import StagePlan
from recipes.schema import Learn, RecipeError
from train.parameters import base_of

PLAN: Final = "stages.json"
PICTURE: Final = "gates.png"
_CLIP: Final = 3.0  # a step's gradients count at most so many times the usual size
_MEMORY: Final = 0.2  # share of the search after which a gradient counts a third: early ones are of an open model


def check_search(learn: Learn, *, num_layers: int, steps: int | None) -> None:
    """Refuses a budget below one layer, and a search that does not end before the run does.

    Raises:
        RecipeError: naming the key.
    """
    if learn.width(num_layers) < 1:
        expected = f"at least {math.ceil(1e4 / num_layers) / 1e4:g}, one of the decoder's {num_layers} layers"
        raise RecipeError(f"model.stages.learn.budget: got {learn.budget:g}, expected {expected}")
    if steps is not None and learn.steps >= steps:
        raise RecipeError(
            f"model.stages.learn.steps: got {learn.steps}, expected fewer than the run's {steps}, because the model "
            "still has to learn under the window that is found"
        )


class WindowSearch:
    """Finds the window of layers that lowers the loss most, among all of one width, in the first steps of a training.

    The relaxation is a distribution over windows. A layer's gate is the share of windows that hold it, so every
    distribution keeps the budget, a one-hot one is a stage plan, and no penalty is added to the loss. Gates
    start open, where the model is the dense one that it was, and close in proportion to the steps done. The
    distribution follows the gates' gradients by exponentiated gradient ("Hedge"): a window's score is the sum, over
    steps and over its layers, of minus the gradient of the loss, older steps counting less, and the weights are the
    softmax of the scores divided by the root of the squares, summed alike. So a score counts in standard errors of
    itself: windows that differ by chance stay about equally likely, and no learning rate is needed. There is no
    sampling, so a resumed run needs the sums alone, and ranks that add up their gradients agree. The window with the
    highest score is taken, whatever its weight.

    Against L independent gates (hard concrete, arXiv 1712.01312): those need a penalty whose weight decides the
    budget, noise that a run of a few hundred steps cannot average out, and may end in layers with gaps, which no plan
    of full updates can express. Against two soft positions of enter and exit: those see only the gradient of layers
    at the window's edges, and stop at the first good place. `keep` is not searched: fewer tokens in more layers is a
    choice of tokens, which gates on layers say nothing about.

    Source: ours; Hedge is Freund and Schapire's (1997), with AdaGrad's scale.

    A run that goes on gives what `state` returned. `plan` is the window that was found; None while the search goes on.
    """

    def __init__(self, learn: Learn, num_layers: int, state: Mapping[str, Any] | None = None) -> None:
        self.learn, self.num_layers, self.width = learn, num_layers, learn.width(num_layers)
        state = state or {}
        windows = num_layers - self.width + 1
        self._scores = torch.tensor(state.get("scores", [0.0] * windows), dtype=torch.float64)
        self._squares = float(state.get("squares", 0.0))
        self.plan = StagePlan.from_dict(state["plan"]) if state.get("plan") else None
        self._step, self._gates = -1, torch.empty(0)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the search."""
        plan = None if self.plan is None else self.plan.to_dict()
        return {"scores": self._scores.tolist(), "squares": self._squares, "plan": plan}

    @property
    def weights(self) -> Tensor:
        """(L - width + 1,) float64: how likely the window is that begins at layer 0, 1, ..."""
        return (self._scores / math.sqrt(self._squares or 1.0)).softmax(dim=0)

    def gates(self, step: int) -> Tensor:
        """Returns (L,) float64, the gates after so many steps."""
        return 1 - step / self.learn.steps * (1 - window_gates(self.weights, self.num_layers))

    def schedule(self, step: int, device: torch.device) -> Gated:
        """Returns the gates of a step, counted from 0; all forward passes of a step share them and their gradient."""
        if step != self._step:
            self._step = step
            self._gates = self.gates(step).to(device, torch.float32).requires_grad_()
        closed = step / self.learn.steps
        begins = closed * torch.nn.functional.pad(self.weights, (0, self.width - 1))
        begins[0] += 1 - closed
        return Gated(self._gates, begins.to(device, torch.float32), self.learn.update)

    def end_step(self, step: int) -> StagePlan | None:
        """Takes the gradient of a step, counted from 1; returns the window after the last one. Every rank calls it.

        Raises:
            ValueError: no forward pass of the step ran under the gates.
        """
        gradient = self._gates.grad
        if gradient is None:
            raise ValueError(f"step {step}: got no gradient of the gates, expected a forward pass under them")
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()  # each rank's loss is scaled for the mean over ranks
        gains = -gradient.double().cpu().unfold(0, self.width, 1).sum(dim=1)
        gains -= gains.mean()
        memory = max(0.0, 1 - 1 / (_MEMORY * self.learn.steps))
        size, counted = float(gains.square().mean().sqrt()), sum(memory ** (2 * before) for before in range(step - 1))
        if self._squares > 0 and size > 0:  # as in gradient clipping: one odd batch must not decide
            gains *= min(1.0, _CLIP * math.sqrt(self._squares / counted) / size)
        self._scores = memory * self._scores + gains
        self._squares = memory**2 * self._squares + float(gains.square().mean())
        if step >= self.learn.steps:
            enter = int(self._scores.argmax())
            self.plan = StagePlan(enter, enter + self.width, update=self.learn.update)
        return self.plan

    @property
    def found(self) -> StagePlan:
        """The window; ValueError while the search goes on."""
        if self.plan is None:
            raise ValueError("the search for the window is not over")
        return self.plan

    def report(self, step: int) -> dict[str, float]:
        """Returns what the log says after a step: the gates and, once it is found, the window and its weight."""
        found = {f"gate_{layer}": round(gate, 4) for layer, gate in enumerate(self.gates(step).tolist())}
        if self.plan is not None:
            enter = int(self._scores.argmax())
            found |= {"enter": enter, "exit": enter + self.width, "window_weight": float(self.weights.max())}
        return found

    def summary(self) -> str:
        """Returns the window that was found, the next one, and how likely each is."""
        weights, order = self.weights.tolist(), self.weights.argsort(descending=True, stable=True).tolist()
        first, second = (f"[{start}, {start + self.width}) {weights[start]:.0%}" for start in order[:2])
        return f"found the window {first}, before {second}"


def apply_plan(model: Any, plan: StagePlan) -> None:
    """Makes a model, with adapters or without, run and be saved under a plan."""
    base = base_of(model)
    base.config.stages = plan.to_dict()
    base.schedule = None


def draw_gates(lines: list[Mapping[str, Any]], file: Path) -> None:
    """Draws the gates in the lines of log.jsonl over the steps, a row a layer, as a PNG."""
    import matplotlib

    matplotlib.use("agg")  # before pyplot: there may be no display
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    lines = [line for line in lines if "gate_0" in line]
    layers = sum(name.startswith("gate_") for name in lines[0])
    gates = [[line[f"gate_{layer}"] for line in lines] for layer in range(layers)]
    steps = [line["step"] for line in lines]
    borders, rows = [0, *steps], [layer - 0.5 for layer in range(layers + 1)]
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.25 * layers), layout="constrained")
    mesh = axes.pcolormesh(borders, rows, gates, vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="step", ylabel="layer", title="Gates: what each layer sees of vision")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(mesh, label="gate")
    figure.savefig(file, dpi=120)
    plt.close(figure)
