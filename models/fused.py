"""The mixins that make a Hugging Face VLM staged: FusedMixin around the whole model, FusedTextMixin for its decoder.

A VLM of transformers ends in one call of its text model with the image features merged into the embeddings. The outer
forward marks the visual tokens and names the schedule; the text model then runs through run_decoder. Tiles, position
indices, DeepStack features, processors and generate() stay Hugging Face's, and so do names of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache as remembered
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .batch_facts import IGNORE_INDEX, BatchFacts, instruction_ends, next_labels
from .cache import CACHE
from .decoder import DecoderOutput, run_decoder
from .forward_inputs import check_masks, named_inputs, seen_tokens, this_part
from .image_tokens import ImageTokens, image_tokens, states_around
from .lazy_images import LazyImages, flat_features
from .live_tokens import rows_at
from .schedule_base import Dense, Schedule, ScheduleError
from .schedule_choice import plan_of, resolve_config, settle_stages
from .schedules import Choice
from .stage_plan import StagePlan
from .token_scorer import SCORER, TokenScorer, needs_scorer, zero_scorer_loss

VISION_INPUTS = {"image": ("pixel_values", "image_hidden_states"), "video": ("pixel_values_videos",)}


@dataclass
class FusedOutput(CausalLMOutputWithPast):
    """What the forward of a fused model returns.

    `loss` is the next-token loss, the mean over labelled tokens; None without labels. `logits` (B, S or kept,
    vocabulary) are valid at text positions; at visual positions of a staged model they are meaningless. transformers
    calls the KV cache `past_key_values`, from 5.24 on `cache`.
    """

    image_hidden_states: Any = None  # the projected image features, from the families that return them

    def __post_init__(self) -> None:
        super().__post_init__()
        self.decoder: DecoderOutput | None = None
        self.visual: Tensor | None = None  # (B, S) bool, the visual tokens of the input

    @property
    def live(self) -> list[list[Tensor]]:
        """As DecoderOutput.live."""
        if self.decoder is None:
            raise ValueError("live: this output was not made by a forward of a fused model")
        return self.decoder.live


@dataclass
class _Call:
    """What the outer forward gives to the text model, and what it gets back."""

    schedule: Schedule
    visual: Tensor
    attention_mask: Tensor | None
    query_mask: Tensor | None
    answers: Tensor | None
    blocks: Tensor | None
    images: LazyImages | None
    embeddings_learn: bool
    relevance: Tensor | None
    is_prompt: bool
    facts: BatchFacts | None = None
    packed: bool = False
    tower: ImageTokens | None = None
    output: DecoderOutput | None = None


@dataclass
class _Generation:
    """A running generate() of one model: the length of its prompt and the schedule that it was started with."""

    model: Any
    prompt_length: int
    schedule: Schedule
    on_prefill: Callable[[FusedOutput], Any] | None  # None once it was called
    images: tuple[Tensor, ...] = ()  # under a schedule that reads the tower: the features of each image


# Context variables, so that two threads that run one model do not see each other's call.
_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)
_GENERATION: ContextVar[_Generation | None] = ContextVar("generation", default=None)


class FusedTextMixin:
    """A text model that runs through run_decoder inside a fused model's forward; elsewhere as Hugging Face's does."""

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """Arguments and result are those of Hugging Face's text model; the masks come from the outer forward."""
        call = _CALL.get()
        if call is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # the text model's
        embeds, cache, use_cache = kwargs["inputs_embeds"], kwargs.get(CACHE), kwargs.get("use_cache")
        positions = kwargs.get("position_ids")
        if positions is None:  # counted from 0, padding too, as Hugging Face does
            seen = seen_tokens(kwargs)
            positions = torch.arange(seen, seen + embeds.shape[1], device=embeds.device)[None]
        deepstack, visual_embeds = list(kwargs.get("deepstack_visual_embeds") or ()), None
        counts = None if call.facts is None else call.facts.visual
        if call.images is not None:
            visual_embeds, deepstack = call.images.features()
            visual_embeds = visual_embeds.to(embeds.device, embeds.dtype)
        elif not isinstance(call.schedule, Dense) and not call.embeddings_learn:
            # The gradient reaches the projector through these rows alone, so layers before `enter` keep no graph.
            visual_embeds, embeds = rows_at(embeds, call.visual, counts), embeds.detach()
        call.output = run_decoder(
            self,  # type: ignore[arg-type]  # a mixin of nn.Module
            embeds,
            call.visual,
            attention_mask=call.attention_mask,
            position_ids=positions,
            schedule=call.schedule,
            past_key_values=cache,
            use_cache=bool(getattr(self.config, "use_cache", True) if use_cache is None else use_cache),  # type: ignore[attr-defined]
            visual_embeds=visual_embeds,
            query_mask=call.query_mask,
            answers=call.answers,
            blocks=call.blocks,
            deepstack=deepstack,
            tower=call.tower,
            relevance=call.relevance,
            facts=call.facts,
            packed=call.packed,
        )
        if call.is_prompt:
            _require_live_end(call.output, call.schedule)
        return BaseModelOutputWithPast(call.output.last_hidden_state, call.output.past_key_values)


class FusedMixin:
    """A VLM whose visual tokens are live only where its stage plan, or another schedule, says so.

    Any checkpoint of the family loads into it: `config.stages` is None then, and it computes what Hugging Face does.
    """

    accepts_loss_kwargs = True  # Trainer: num_items_in_batch is used, in every family
    family_blank: Callable[[Any], dict[str, Any]]  # of the config: inputs of get_image_features for a blank image
    family_blocks: Callable[[Mapping[str, Any]], Tensor | None]  # of forward's inputs: `blocks` as in run_decoder
    family_merges: bool  # the family's forward only merges image features into the embeddings
    config: Any
    model: Any
    lm_head: Any
    training: bool

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Builds the family's model; errors as settle_stages."""
        schedule = settle_stages(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the family's
        self._choice, self._schedule, self._stages = config.schedule, schedule, deepcopy(config.stages)
        text = self.model.get_decoder()
        text.__class__ = fused_text_class(type(text))  # type: ignore[arg-type]  # mypy: a class is no Hashable
        if needs_scorer(config):
            text.add_module(SCORER, TokenScorer(config.text_config.hidden_size))
            text.get_submodule(SCORER).apply(self._init_weights)  # type: ignore[attr-defined]  # PreTrainedModel's

    @property
    def schedule(self) -> Schedule:
        """The schedule of forward() and generate().

        Assign another to switch: an object, the name of a plan of `config.plans`, a name of SCHEDULES with its
        published settings, or {"name": ..., setting: ...}. None goes back to the trained plan. A pruner on a model with
        a plan prunes inside the plan's window.
        """
        if self._stages != self.config.stages:
            self.schedule = self._choice
        return self._schedule

    @schedule.setter
    def schedule(self, choice: Choice) -> None:
        self._schedule = self.resolve(choice)
        self._choice, self._stages = choice, deepcopy(self.config.stages)

    @property
    def plan(self) -> StagePlan | None:
        """The stage plan of the config; None: dense."""
        return plan_of(self.config.stages)

    def resolve(self, choice: Choice) -> Schedule:
        """Returns the schedule that a choice means for this checkpoint: see `schedule`; errors as resolve_schedule."""
        return resolve_config(self.config, choice)

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        schedule: Choice = None,
        on_prefill: Callable[[FusedOutput], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates as Hugging Face does.

        `schedule` is for this call alone, None the model's; `on_prefill` is called once, with the prompt's FusedOutput.
        """
        prompt = next((kwargs[key] for key in ("inputs_embeds", "input_ids") if kwargs.get(key) is not None), inputs)
        length = 0 if prompt is None else prompt.shape[1]
        chosen = self.schedule if schedule is None else self.resolve(schedule)
        self._check_generation(chosen, kwargs)
        running = _Generation(self, length, chosen, on_prefill)
        if chosen.reads_tower and kwargs.get("pixel_values") is not None:
            with torch.no_grad():
                image = self._encoded(kwargs.pop("pixel_values"))
            kwargs["mm_encoder_outputs"], running.images = {"image": image}, tuple(image.pooler_output)
        token = _GENERATION.set(running)
        try:
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]  # GenerationMixin's
        finally:
            _GENERATION.reset(token)

    def _check_generation(self, schedule: Schedule, options: Mapping[str, Any]) -> None:
        """Raises ValueError for settings of generate() under which a schedule would do something else."""

        def setting(name: str) -> Any:
            configs = (options.get("generation_config"), self.generation_config)  # type: ignore[attr-defined]
            given = (options.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in given if value is not None), None)

        name, chunk = type(getattr(schedule, "inner", schedule)).__name__, setting("prefill_chunk_size")
        if chunk is not None and not isinstance(schedule, Dense):
            raise ValueError(f"prefill_chunk_size: got {chunk} under {name}, expected None: it sees the whole prompt")
        if schedule.masks_values and setting("use_cache") is False:
            raise ValueError(f"use_cache: got False under {name}, expected True: it masks vision in the prompt alone")

    @can_return_tuple
    def forward(self, *args: Any, **kwargs: Any) -> FusedOutput:
        """Runs the model as Hugging Face's class of the family does, over the live tokens only.

        Takes what the family's forward takes, with these differences:

        - labels: (B, S), -100 where nothing is to be predicted. The head then runs on the labelled positions alone.
        - logits_to_keep: None, the default, is all positions without labels, and no logits with labels.
        - use_cache: None is the text config's value without labels, False with labels.
        - schedule: for this call alone; None is the model's.
        - visual: (B, S) bool, the visual tokens, where `inputs_embeds` holds the image already.
        - relevance: (B, S), how relevant each visual token is to the question, for CDPruner: see there.
        - query_mask: (B, S) bool, the tokens whose attention a schedule reads; None is the last instruction token.
        - facts: what BatchFacts.of says of this batch, with labels and without a cache. Nothing then waits for the
          device, forward or backward, unless the family's code does.
        - packed: each layer runs on one row, the live tokens of all samples without padding; no sample sees another.
          The output is that of the padded batch. Without a cache, under a schedule that trains. It saves time under
          flash-attention and `sdpa_packed`; sdpa and eager take a mask of the whole row.
        - num_items_in_batch: labelled tokens of the global batch: the loss is then a sum over this number.

        Returns:
            FusedOutput. A training batch without an image passes a blank one through tower and projector, so that
            every rank runs the same modules.

        Raises:
            TypeError: a keyword that the family's forward does not know.
            ValueError: image tokens and features differ in number; a label directly follows a visual token in a staged
                model; a pruner is asked to train; merged embeddings come without `visual` under a staged schedule.
        """
        inputs, running = named_inputs(self, args, kwargs), self._running()
        check_masks(inputs, running.prompt_length if running else None)
        chosen = inputs.pop("schedule", None)
        schedule = self.resolve(chosen) if chosen is not None else running.schedule if running else self.schedule
        labels, kept = inputs.pop("labels", None), inputs.pop("logits_to_keep", None)
        items = inputs.pop("num_items_in_batch", None)
        query_mask, facts = inputs.pop("query_mask", None), inputs.pop("facts", None)
        call = self._call(inputs, schedule, inputs.pop("visual", None), inputs.pop("relevance", None), labels)
        if query_mask is not None:
            call.query_mask = query_mask
        call.packed = bool(inputs.pop("packed", False))
        if (labels is not None or call.packed) and inputs.get("use_cache") is None:
            inputs["use_cache"] = False
        if facts is not None:
            call.facts = facts if query_mask is None and labels is not None else replace(facts, queries=None)
            call.images = self._lazy_images(inputs, schedule, facts) if call.images is None else call.images
        if call.images is not None:
            inputs["mm_encoder_outputs"] = call.images
        if schedule.reads_tower:
            call.tower = self._tower(inputs)
        token = _CALL.set(call)
        try:
            outputs = self.model(**inputs)
        finally:
            _CALL.reset(token)
        hidden, loss, logits = outputs[0], None, None
        if labels is not None:
            loss = self._loss(hidden, labels, call, items)
        if labels is None or kept is not None:
            logits = self.lm_head(_kept_rows(hidden, kept))
        images = getattr(outputs, "image_outputs", None)  # transformers 5.24
        features = getattr(outputs, "image_hidden_states", None) if images is None else images.pooler_output
        output = FusedOutput(loss, logits, call.output and call.output.past_key_values, image_hidden_states=features)
        output.decoder, output.visual = call.output, call.visual
        if running is not None and running.on_prefill is not None:
            callback, running.on_prefill = running.on_prefill, None
            callback(output)
        return output

    def _running(self) -> _Generation | None:
        """Returns the generate() that this model's forward runs in, or None."""
        running = _GENERATION.get()
        return running if running is not None and running.model is self else None

    def _call(
        self,
        inputs: dict[str, Any],
        schedule: Schedule,
        visual: Tensor | None,
        relevance: Tensor | None,
        labels: Tensor | None,
    ) -> _Call:
        """Returns what the text model needs beside its inputs."""
        vision_tokens = self._vision_tokens(inputs)
        visual = self._visual(inputs, vision_tokens, schedule, visual)
        if labels is not None and self.training:
            self.check_training(schedule)
        query_mask = None
        if schedule.reads_attention or schedule.reads_scores:
            query_mask = self._prompt_end(inputs, visual) if labels is None else instruction_ends(labels)
        embeddings = self.get_input_embeddings()  # type: ignore[attr-defined]
        hooked = any(getattr(self, name, None) for name in ("_require_grads_hooks", "_require_grads_hook"))
        is_leaf_input = hooked or "inputs_embeds" in inputs
        # a training batch without an image; merged embeddings may hold one, and decode steps follow one
        needs_blank = self.training and not vision_tokens and "input_ids" in inputs and not seen_tokens(inputs)
        return _Call(
            schedule=schedule,
            visual=visual,
            attention_mask=inputs.get("attention_mask"),
            query_mask=query_mask,
            answers=None if labels is None else labels != IGNORE_INDEX,
            blocks=type(self).family_blocks(inputs),
            images=LazyImages(partial(self._blank, visual.device)) if needs_blank else None,
            embeddings_learn=is_leaf_input or any(weight.requires_grad for weight in embeddings.parameters()),
            relevance=None if relevance is None else this_part(relevance, seen_tokens(inputs), visual.shape[1]),
            is_prompt=self._running() is not None and not seen_tokens(inputs),
        )

    def _lazy_images(self, inputs: dict[str, Any], schedule: Schedule, facts: BatchFacts) -> LazyImages | None:
        """Returns what encodes this call's images apart from the embeddings, and takes the pixels out of `inputs`.

        None where the family's forward does more with them than merging them, or a schedule reads the tower.
        """
        encoded = any(map(inputs.get, (*VISION_INPUTS["video"], "image_hidden_states", "mm_encoder_outputs")))
        if not self.family_merges or schedule.reads_tower or "pixel_values" not in inputs or encoded:
            return None
        known = signature(self.model.get_image_features).parameters
        image_inputs = {name: value for name, value in inputs.items() if name in known}
        del inputs["pixel_values"]

        def encode() -> tuple[Tensor, list[Tensor]]:
            rows, expected = (
                flat_features(self.model.get_image_features(**image_inputs, return_dict=True).pooler_output),
                sum(facts.visual),
            )
            if len(rows) != expected:
                raise ValueError(f"image features and image tokens do not match: got {len(rows)} and {expected}")
            return rows, []

        return LazyImages(encode)

    def _tower(self, inputs: dict[str, Any]) -> ImageTokens | None:
        """Returns the tower's tokens of this call's images, None without any; encodes the pixels in `inputs`.

        Raises:
            ScheduleError: encoded images came without the tower's hidden states.
        """
        if "pixel_values" in inputs:
            inputs["mm_encoder_outputs"] = {"image": self._encoded(inputs.pop("pixel_values"))}
        image, running = (inputs.get("mm_encoder_outputs") or {}).get("image"), self._running()
        if image is None:
            return None
        states = getattr(image, "hidden_states", None)
        if states is None or any(states[number] is None for number in states_around(self.config)):
            raise ScheduleError("mm_encoder_outputs: got no hidden_states, expected those around the layer it projects")
        tower = image_tokens(self.model, states)
        if running is None or len(image.pooler_output) == len(running.images):
            return tower
        # beams: generate() repeats the features of the images alone, the same tensors
        number_of = {id(features): number for number, features in enumerate(running.images)}
        return tower.of([number_of[id(features)] for features in image.pooler_output])

    def _encoded(self, pixels: Tensor) -> Any:
        """Returns get_image_features' output with the hidden states that ImageTokens are made of."""
        return self.model.get_image_features(pixels, output_hidden_states=states_around(self.config), return_dict=True)

    def _vision_tokens(self, inputs: dict[str, Any]) -> list[int]:
        """Returns the ids of the tokens that this call's vision inputs replace; none without such inputs."""
        encoded = inputs.get("mm_encoder_outputs") or {}
        return [
            getattr(self.config, f"{kind}_token_id")
            for kind, names in VISION_INPUTS.items()
            if encoded.get(kind) is not None or any(name in inputs for name in names)
        ]

    def _visual(
        self, inputs: dict[str, Any], vision_tokens: list[int], schedule: Schedule, visual: Tensor | None
    ) -> Tensor:
        """Returns (B, S) bool: the visual tokens of this call's input."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        tokens = inputs["input_ids" if embeds is None else "inputs_embeds"]
        size, device, seen = tokens.shape[1], tokens.device, seen_tokens(inputs)
        if visual is not None:
            visual = visual.to(device=device, dtype=torch.bool)
            return this_part(visual, seen, size)
        is_decode_step = seen > 0 and size == 1
        if ids is None and not vision_tokens and not is_decode_step and not isinstance(schedule, Dense):
            raise ValueError(
                f"visual: got inputs_embeds without it under {type(schedule).__name__}, expected the (batch, "
                "sequence) mask of the visual tokens merged into them (all False: none)"
            )
        found = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=device)
        for token in vision_tokens:
            if ids is not None:
                found |= ids == token
            else:
                found |= (embeds == self.get_input_embeddings()(torch.tensor(token, device=device))).all(dim=-1)  # type: ignore[attr-defined]
        return found

    def _prompt_end(self, inputs: dict[str, Any], visual: Tensor) -> Tensor | None:
        """Returns (B, S) bool: the last token of generate()'s prompt, where candidates of an assistant follow it."""
        running, size = self._running(), visual.shape[1]
        column = -1 if running is None else running.prompt_length - 1 - seen_tokens(inputs)
        if not 0 <= column < size - 1:
            return None
        columns = torch.arange(size, device=visual.device)
        text = (columns <= column) & ~visual
        return columns == columns.where(text, -1).amax(dim=1, keepdim=True)

    def _blank(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Returns the features (R, D) of a blank image, and its DeepStack features.

        Looks up no weight by name: ZeRO-3 would gather it, on ranks without an image alone.
        """
        inputs = {
            name: value.to(device, self.dtype if value.is_floating_point() else None)  # type: ignore[attr-defined]
            for name, value in type(self).family_blank(self.config).items()
        }
        features = self.model.get_image_features(**inputs, return_dict=True)
        levels = getattr(features, "deepstack_features", None) or ()
        return flat_features(features.pooler_output), [flat_features(level) for level in levels]

    def check_training(self, schedule: Schedule) -> None:
        """Raises ValueError where a schedule cannot train this model, or would leave a part of it without gradient."""
        if not schedule.trainable:
            raise ValueError(f"schedule: got {type(schedule).__name__}, expected Dense or Fused in training")
        levels = len(getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ())
        plan = getattr(schedule, "plan", None)
        if plan is None or levels == 0:
            return
        seeing = sum(plan.sees(layer) for layer in range(self.config.text_config.num_hidden_layers))
        if seeing <= levels:
            raise ValueError(
                f"stages: got {seeing} layers that see vision, expected at least {levels + 1} in training: DeepStack "
                f"adds {levels} features, one after each, and the projector of one that no later layer reads would not "
                "learn"
            )

    def _loss(self, hidden: Tensor, labels: Tensor, call: _Call, num_items_in_batch: Any) -> Tensor:
        """Returns the next-token loss; the head runs on labelled positions alone, and on every rank."""
        following = next_labels(labels)
        if call.facts is None:
            labelled = following != IGNORE_INDEX
            places, wrong = labelled.flatten().nonzero()[:, 0], (labelled & call.visual).any(dim=1).nonzero()[:1, 0]
            sample = wrong.tolist()[0] if len(wrong) else None
        else:
            places, sample = call.facts.labelled.to(hidden.device, non_blocking=True), call.facts.after_visual
        if sample is not None and not isinstance(call.schedule, Dense):
            raise ValueError(
                f"labels: sample {sample} of the batch has a label directly after a visual token, whose state the "
                "deep layers no longer hold; expected a text token (a newline) between image and answer"
            )
        logits = self.lm_head(hidden.flatten(0, 1).index_select(0, places))
        targets = following.flatten().index_select(0, places)
        is_unread = self.training and not call.schedule.reads_scores
        unused = zero_scorer_loss(self.model.get_decoder(), hidden) if is_unread else 0.0
        if len(targets) == 0:
            return logits.sum() * 0.0 + unused
        return unused + self.loss_function(  # type: ignore[attr-defined]  # PreTrainedModel's
            logits=logits,
            labels=targets,
            shift_labels=targets,
            vocab_size=logits.shape[-1],
            num_items_in_batch=num_items_in_batch,
        )


@remembered
def fused_text_class(kind: Any) -> Any:
    """Returns a text model's class with FusedTextMixin, of the same name: rules for weight names go by it."""
    if issubclass(kind, FusedTextMixin):
        return kind
    return type(kind.__name__, (FusedTextMixin, kind), {"__module__": kind.__module__})


def _require_live_end(output: DecoderOutput, schedule: Schedule) -> None:
    """Raises ValueError where a prompt ends with a visual token that the last layer does not run: no logits follow."""
    if isinstance(schedule, Dense):
        return
    rows = output.layers[-1].rows
    dropped = (rows.columns(output.last_hidden_state.shape[1])[:, -1] < 0).nonzero()[:1, 0].tolist()
    if dropped:
        name = type(getattr(schedule, "inner", schedule)).__name__
        raise ValueError(
            f"input_ids: sample {dropped[0]} of the prompt ends with a visual token that {name} drops, expected a text "
            "token (a newline) after the image, from which the answer is predicted"
        )


def _kept_rows(hidden: Tensor, kept: int | Tensor | None) -> Tensor:
    """Returns the hidden states whose logits are asked for: see Hugging Face's `logits_to_keep`."""
    if isinstance(kept, Tensor):
        return hidden[kept] if kept.dtype == torch.bool and kept.ndim == 2 else hidden[:, kept]
    return hidden[:, -kept:] if kept else hidden
