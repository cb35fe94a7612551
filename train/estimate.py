"""Estimates the memory per GPU under each ZeRO stage and the FLOPs of a phase, before it runs.

DeepSpeed's estimators assume that Adam trains every weight in 16 bits; this one also covers adapters, frozen parts and
activations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import LlavaConfig

from models.attention import CacheShim, project_visual_kv, rotary, rotary_kind, run_layer, uses_mrope
from models.cost import Cost, plan_cost, search_cost, spread_flops, training_flops
from models.families import family_of
from models.schedules import TRAINED
from recipes.schema import Learn, NamedPlan, RecipeError, TrainSection
from train.arguments import resolve_dtype
from train.parameters import add_adapters, freeze, muon_matrices, trainable_counts

_STATES: Final[dict[str, int]] = {  # bytes of a learned number's states: Adam keeps two, Lion one, AdEMAMix three
    "adamw_torch_fused": 8,
    "adamw_torch": 8,
    "adamw_8bit": 2,
    "paged_adamw_32bit": 8,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "paged_lion_32bit": 4,
    "paged_lion_8bit": 1,
    "ademamix": 12,
    "ademamix_8bit": 3,
    "sgd": 0,
    "muon": 8,  # of what it leaves to Adam; a matrix has a momentum alone
}
_MOMENTUM: Final = 4
SEARCH: Final = "search"
_PARTS: Final = ("optimizer", "param")
_ATTENTION: Final = {  # torch leaves it out
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    )
}
_MASTER: Final = 4  # bytes of DeepSpeed's float32 copy of a weight that learns
# Source: the data sheets of NVIDIA and AMD. The first name that stands in a device's as whole words counts, so
# `H100 PCIe` is before `H100`.
_CARDS: Final = {  # name: (GB, TFLOP/s)
    "B200": (180, 2250.0),
    "H200": (141, 989.0),
    "H100 PCIe": (80, 756.0),
    "H100": (80, 989.0),
    "MI300X": (192, 1307.0),
    "A100-SXM4-40GB": (40, 312.0),
    "A100": (80, 312.0),
    "L40S": (48, 362.0),
    "L40": (48, 181.0),
    "L4": (24, 121.0),
    "A40": (48, 150.0),
    "A10": (24, 125.0),
    "RTX 4090": (24, 165.0),
    "RTX 3090": (24, 71.0),
    "V100": (32, 125.0),
    "T4": (16, 65.0),
}
_OTHER: Final = r"(?! (?:Ti|D|Laptop)\b)"  # words after a name that make it another card's
_WANTED: Final = re.compile(r"(?:(\d+)x)?(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float

    @property
    def total(self) -> float:
        """All together, without activations."""
        return self.weights + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class Batch:
    """Samples that are computed together, and the tokens of each, or their mean."""

    samples: int
    visual: int
    text: int


class Estimate:
    """The costs of training one phase of a model, from its shapes alone.

    Args:
        config: of the model.
        train: the phase's.
        plans: the stage plans of which each step draws one, by name.
        learn: the search that finds the stage plan, in the place of `plans`; then there are two: `search`, of its
            steps, and `trained`, of the others.
        steps: of the run, where `learn` is given; None: not known, and the search's share of it neither.

    Attributes:
        weights: parameters; `trained`: those that learn; `counts`: these by part of the model.
        ratios: each stage plan's share of the steps.
    """

    def __init__(
        self,
        config: Any,
        train: TrainSection,
        plans: Mapping[str, NamedPlan],
        learn: Learn | None = None,
        steps: int | None = None,
    ) -> None:
        self.config, self.train, self.dtype = config, train, resolve_dtype(train)
        self.learn = learn
        self._plans = plans if learn is None else _search_plans(learn, config.text_config.num_hidden_layers, steps)
        weights = sum(plan.weight for plan in self._plans.values())
        self.ratios = {name: plan.weight / weights for name, plan in self._plans.items()}
        with torch.device("meta"):
            model: Any = family_of(config.model_type).model_class._from_config(config, dtype=self.dtype)
            self._model = model
            if train.lora is not None:
                model = add_adapters(model, train.lora)
        freeze(model, train)
        self._mode = FakeTensorMode()
        with self._mode:
            _fill(model)
        self._weights = {id(one): one for one in model.parameters()}
        self.weights = sum(one.numel() for one in self._weights.values())
        self.trained = sum(one.numel() for one in self._weights.values() if one.requires_grad)
        self.counts = trainable_counts(model)
        self._state_bytes = _STATES[train.optimizer] * self.trained
        if train.optimizer == "muon":
            matrices = sum(one.numel() for one in muon_matrices(model))
            self._state_bytes -= (_STATES["muon"] - _MOMENTUM) * matrices
        self._learns = {part: count > 0 for part, count in self.counts.items()}
        self._known: dict[tuple[Any, ...], float] = {}  # bytes kept by a part of a layer

    def states(self, deepspeed: Mapping[str, Any], *, stage: int, ranks: int) -> Memory:
        """Returns the memory of weights, gradients and optimizer under a ZeRO stage on so many ranks.

        `deepspeed` is the phase's configuration, whose buckets and offloading count.
        """
        zero, size = deepspeed.get("zero_optimization", {}), self.dtype.itemsize
        is_offloaded = {part: (zero.get(f"offload_{part}") or {}).get("device", "none") != "none" for part in _PARTS}
        buffers = 2 * size * _number(zero.get("reduce_bucket_size"), 5e8)
        live = min(self.weights, _number(zero.get("stage3_max_live_parameters"), 1e9))
        return Memory(
            weights=0 if stage == 3 and is_offloaded["param"] else self._weight_bytes() / (ranks if stage == 3 else 1),
            gradients=self.trained * size / (ranks if stage >= 2 else 1),
            optimizer=0 if is_offloaded["optimizer"] else (self.trained * _MASTER + self._state_bytes) / ranks,
            buffers=buffers + (size * live if stage == 3 and ranks > 1 else 0),
        )

    def activations(self, batch: Batch, *, checkpointing: bool) -> float:
        """Returns the bytes that forward keeps for backward, and what backward needs on top at its peak.

        Every text token counts as labelled. `checkpointing` is of the decoder; a tower that learns counts in full.
        """
        layers, text, size = self._layers(batch), self.config.text_config, self.dtype.itemsize
        logits = batch.samples * batch.text * text.vocab_size * (size + 8)  # float32 ones and their gradient too
        kept, largest = sum(saved for saved, _, _ in layers), 0.0
        if checkpointing:
            kept = sum(batch.samples * rows * text.hidden_size * size for saved, rows, _ in layers if saved)
            largest = max(saved for saved, _, _ in layers)
        kept += sum(extra for saved, _, extra in layers if saved)
        gradients = 3 * batch.samples * max(rows for _, rows, _ in layers) * text.intermediate_size * size  # of an MLP
        return self._image[0] * self._images(batch) + kept + max(logits, largest + gradients)

    def step_flops(self, batch: Batch, *, labels: float | None = None) -> float:
        """Returns the model FLOPs of a batch's forward, backward and teacher: decoder, head, tower and projector.

        `labels`: labelled tokens of the batch, on which alone the head runs; None takes every text token. What
        checkpointing computes again does not count, as usual for MFU.
        """
        text = self.config.text_config
        decoder = self.decoder_flops(self.costs(visual=batch.visual, text=batch.text)) * batch.samples
        labels = batch.samples * batch.text if labels is None else labels
        teachers = sum(self.ratios[name] for name, plan in self._plans.items() if plan.distill is not None)
        head = 2 * labels * text.hidden_size * text.vocab_size * (self.passes + teachers)
        tower = self._image[1] * self._images(batch) * ((3 if self._learns["vision_tower"] else 1) + teachers)
        return decoder + head + tower

    @property
    def passes(self) -> int:
        """The FLOPs of forward and backward, in forward passes; backward makes no gradients of frozen weights."""
        return 3 if self._learns_weights else 2

    @property
    def _learns_weights(self) -> bool:
        """Whether the decoder's weights are trained directly rather than through adapters."""
        lora = self.train.lora
        return self._learns["language_model"] and (lora is None or "language_model" not in lora.parts)

    def costs(self, *, visual: int, text: int) -> dict[str, Cost]:
        """Returns the cost of a sample's forward pass under each stage plan, measures for a penalty included."""
        config = self.config.text_config
        costs = {name: plan_cost(config, plan.stages, visual=visual, text=text) for name, plan in self._plans.items()}
        if self.learn is not None:
            costs[SEARCH] = search_cost(config, self.learn.update, visual=visual, text=text)
        if self.train.sparse_attention is not None:
            for name, plan in self._plans.items():
                more = spread_flops(config, plan.stages, visual=visual, text=text)
                costs[name] = replace(costs[name], flops=costs[name].flops + more)
        return costs

    def count_only(self, name: str) -> None:
        """Makes all steps count as steps under one plan, from here on."""
        self.ratios = {other: float(other == name) for other in self._plans}

    def decoder_flops(self, costs: Mapping[str, Cost]) -> float:
        """Returns the decoder's FLOPs of training on a sample, the mean over the plans, teachers' passes included."""
        teachers = {name: plan.distill.teacher for name, plan in self._plans.items() if plan.distill is not None}
        flops = {name: cost.flops for name, cost in costs.items()}
        return training_flops(flops, self.ratios, teachers, passes=self.passes)

    def window_flops(self, sums: Mapping[str, float]) -> float:
        """Returns the model FLOPs of training on samples of the mean length: see `TrainMetrics`.

        Attention grows with the square of a length, so a mixed batch takes a little more.
        """
        samples, text = round(sums["samples"]), sums["tokens"] - sums["visual"]
        batch = Batch(samples, round(sums["visual"] / samples), round(text / samples))
        return self.step_flops(batch, labels=sums["image_labels"] + sums["text_labels"])

    @cached_property
    def _image(self) -> tuple[float, float]:
        """The bytes that tower and projector keep of one image, and the FLOPs of their forward; 0 if not known."""
        if not isinstance(self.config, LlavaConfig):  # the others look at values, which there are none of here
            return 0.0, 0.0
        with self._mode:
            blank = type(self._model).family_blank(self.config)
            image = {name: one.to(self.dtype) if one.is_floating_point() else one for name, one in blank.items()}
        counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
        with counter:
            saved = self._saved(lambda: self._model.model.get_image_features(**image, return_dict=True))
        return saved, float(counter.get_total_flops())

    def _images(self, batch: Batch) -> float:
        return batch.samples * batch.visual / getattr(self.config, "image_seq_length", batch.visual or 1)

    def _weight_bytes(self) -> float:
        bits = self.train.lora.bits if self.train.lora is not None else None
        if bits is None:
            return self.weights * self.dtype.itemsize
        frozen = sum(
            module.weight.numel()
            for module in self._model.model.get_decoder().modules()
            if isinstance(module, nn.Linear) and not module.weight.requires_grad
        )
        return (self.weights - frozen) * self.dtype.itemsize + frozen * bits / 8

    def _layers(self, batch: Batch) -> list[tuple[float, int, float]]:
        """Returns (bytes, rows, extra bytes) of each decoder layer.

        Bytes are the saved activations, 0 without a graph; rows are its tokens of one sample; extra bytes are those of
        gates and penalties, which checkpointing does not free.
        """
        depth, costs = self.config.text_config.num_hidden_layers, self.costs(visual=batch.visual, text=batch.text)
        costliest = max(costs, key=lambda name: costs[name].flops)  # it decides the peak memory
        plan, is_gated = self._plans[costliest].stages, self.learn is not None and costliest == SEARCH
        counts = [batch.visual] * depth if plan is None else plan.visual_counts(batch.visual, depth)
        is_kv = plan is not None and plan.update == "kv"
        samples, found = batch.samples, []
        has_graph = self._learns_weights and self.train.layers is None
        for number, visual in enumerate(counts):
            learns = any(one.requires_grad for one in self._model.model.get_decoder().layers[number].parameters())
            has_graph = has_graph or visual > 0 or learns
            rows, kv = batch.text + (0 if is_kv else visual), visual if is_kv else 0
            kept = partial(self._kept, number, learns)
            saved, extra = kept(self._layer, samples, rows, kv) if has_graph else 0.0, 0.0
            if is_gated and has_graph:  # the layer on text alone, and what the gate lies between
                saved += kept(self._layer, samples, batch.text, 0)
                width = self.config.text_config.hidden_size
                extra += samples * (2 * rows + batch.text) * width * self.dtype.itemsize
            if visual and has_graph and self.train.sparse_attention is not None:
                extra += kept(self._keys, samples, batch.text + visual)
            found.append((saved, rows, extra))
        return found

    def _kept(self, number: int, learns: bool, run: Callable[..., Tensor], *shape: int) -> float:
        """Returns the bytes that a part of a layer keeps, the same for all layers that learn, or do not."""
        key = learns, run.__name__, *shape
        if key not in self._known:
            self._known[key] = self._saved(partial(run, number, *shape))
        return self._known[key]

    def _tokens(self, number: int, samples: int, count: int) -> tuple[Tensor, Tensor, Any]:
        """Returns hidden states, positions and rotary embeddings of so many tokens at a layer."""
        decoder = self._model.model.get_decoder()
        hidden = torch.empty(samples, count, self.config.text_config.hidden_size, dtype=self.dtype).requires_grad_()
        positions = torch.arange(count).expand(samples, count)
        at = positions.expand(3, samples, count) if uses_mrope(decoder) else positions
        try:
            return hidden, positions, rotary(decoder, rotary_kind(decoder, number), hidden, at)
        except DataDependentOutputException:  # dynamic scaling looks at positions, which have no values here
            size = 2 * decoder.rotary_emb.inv_freq.numel()
            return hidden, positions, (torch.empty(samples, count, size, dtype=self.dtype),) * 2

    def _keys(self, number: int, samples: int, count: int) -> Tensor:
        hidden, _, at = self._tokens(number, samples, count)
        return project_visual_kv(self._model.model.get_decoder().layers[number], hidden, at)[0].float()

    def _layer(self, number: int, samples: int, rows: int, kv: int) -> Tensor:
        decoder = self._model.model.get_decoder()
        hidden, positions, at = self._tokens(number, samples, rows)
        layer, mask, shim = decoder.layers[number], None, None
        if kv:
            visual, _, of_visual = self._tokens(number, samples, kv)
            shim = CacheShim(None, partial(project_visual_kv, layer, visual, of_visual), None)
            mask = torch.ones(samples, 1, rows, kv + rows, dtype=torch.bool)
        return run_layer(layer, hidden, mask, None if uses_mrope(decoder) else positions, shim, at)

    def _saved(self, run: Callable[[], Any]) -> float:
        """Returns the bytes that autograd keeps of a forward, weights excepted."""
        weights = {one.untyped_storage()._cdata for one in self._weights.values()}
        kept: dict[int, Tensor] = {}  # by storage

        def pack(one: Tensor) -> Tensor:
            kept.setdefault(one.untyped_storage()._cdata, one)
            return one

        with self._mode, saved_tensors_hooks(pack, lambda one: one):
            output = run()
        found = sum(one.untyped_storage().nbytes() for key, one in kept.items() if key not in weights)
        del output
        return float(found)


def _search_plans(learn: Learn, num_layers: int, steps: int | None) -> dict[str, NamedPlan]:
    """Returns what the steps of a search and those after it run under, by their share of the run."""
    every = [{"enter": 0, "exit": end, "update": learn.update} for end in (num_layers, learn.width(num_layers))]
    after = learn.steps if steps is None else steps - learn.steps
    return {
        SEARCH: NamedPlan(name=SEARCH, weight=learn.steps, plan=every[0]),
        TRAINED: NamedPlan(name=TRAINED, weight=after, plan=every[1]),
    }


def _fill(model: nn.Module) -> None:
    """Puts tensors of the current mode in the place of a model's, of the same shapes."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, one in tensors.items():
                if one is not None and id(one) not in made:
                    empty = torch.empty(one.shape, dtype=one.dtype)
                    is_weight = isinstance(one, nn.Parameter)
                    made[id(one)] = nn.Parameter(empty, requires_grad=one.requires_grad) if is_weight else empty
                if one is not None:
                    tensors[name] = made[id(one)]


def _number(value: Any, default: float) -> float:
    """Returns a number of a DeepSpeed configuration; "auto" and nothing are `default`."""
    return float(value) if isinstance(value, int | float) else default


@dataclass(frozen=True)
class Card:
    """GPUs of one kind; `peak` is FLOP/s of one, None where it is not known."""

    count: int
    gigabytes: float
    peak: float | None


def parse_card(text: str, *, count: int) -> Card:
    """Returns what `--gpu` names: `24` (GB), `A100`, or `8xH100`; `count` is the number where none is given.

    Raises:
        RecipeError: a card that is not in the table.
    """
    found = _WANTED.fullmatch(text.strip())
    number, name = found.groups() if found else (None, "")
    count = int(number) if number else count
    if count > 0 and re.fullmatch(r"\d+(\.\d+)?", name) and float(name) > 0:
        return Card(count, float(name), None)
    for known, (gigabytes, peak) in _CARDS.items():
        if count > 0 and known.casefold() == name.casefold():
            return Card(count, gigabytes, peak * 1e12)
    raise RecipeError(
        f"--gpu: got '{text}', expected GB such as 24, or one of {', '.join(_CARDS)}; 8x before it is eight"
    )


def peak_here() -> float | None:
    """Returns the FLOP/s of this process' GPU at its peak; None where there is none, or none that is known."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_name()
    names = (name for name in _CARDS if re.search(rf"\b{name}\b{_OTHER}", device))
    return next((_CARDS[name][1] * 1e12 for name in names), None)
