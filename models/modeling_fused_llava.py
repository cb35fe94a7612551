"""LLaVA whose image is live only where its stage plan, or any other schedule, says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration_fused_llava import FusedLlavaConfig
from .decoder import run_decoder
from .plan import StagePlan
from .schedule import Dense, Fused, Schedule, Within

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's own


class FusedLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """Hugging Face's LLaVA with another way through the decoder; no parameter is added or renamed.

    Any LLaVA checkpoint loads into it: `config.stages` is None then, and it computes what LLaVA computes.
    """

    config_class = FusedLlavaConfig

    def __init__(self, config: FusedLlavaConfig) -> None:
        super().__init__(config)
        self._chosen_schedule: Schedule | None = None

    @property
    def schedule(self) -> Schedule:
        """The schedule of forward() and generate(). Assign another to switch; None goes back to the trained plan.

        A pruner on a model with a plan prunes inside the plan's window.
        """
        chosen, stages = self._chosen_schedule, self.config.stages
        if stages is None:
            return Dense() if chosen is None else chosen
        plan = StagePlan.from_dict(stages)
        if chosen is None:
            return Fused(plan)
        return chosen if chosen.trainable or isinstance(chosen, Within) else Within(plan, chosen)

    @schedule.setter
    def schedule(self, schedule: Schedule | None) -> None:
        if schedule is not None:
            schedule.check(self.config.text_config.num_hidden_layers)
        self._chosen_schedule = schedule

    @can_return_tuple
    def forward(  # noqa: PLR0913  # Hugging Face's own arguments
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Runs the model as Hugging Face's LLaVA does, over the live tokens only.

        Args:
            input_ids: (B, S), one image token for each visual token.
            pixel_values: (images, 3, height, width), in the order of their tokens. A training batch without an
                image passes a dummy through tower and projector, so that every rank runs the same modules.
            attention_mask: (B, S), 0 on padding; with a filled cache (B, seen + S).
            position_ids: (B, S); None counts all positions from 0, as Hugging Face does.
            past_key_values: None, an empty DynamicCache, or what an earlier call returned.
            inputs_embeds: (B, S, D) in place of input_ids.
            vision_feature_layer: as in Hugging Face's LLaVA; None is the config's.
            vision_feature_select_strategy: as in Hugging Face's LLaVA; None is the config's.
            labels: (B, S), -100 where nothing is to be predicted.
            use_cache: return a KV cache; None is the text config's value, without labels.
            logits_to_keep: compute logits for the last so many positions (0: all), or for these indices. None:
                all without labels, none with labels.
            image_sizes: as in Hugging Face's LLaVA (Pixtral towers).
            kwargs: `num_items_in_batch`, the labelled tokens of the global batch, makes the loss a sum over it.

        Returns:
            LlavaCausalLMOutputWithPast. Logits (B, S or kept, vocab) are right at text positions; visual positions
            of a staged model mean nothing. The loss is Hugging Face's: next token, mean over labelled tokens.

        Raises:
            ValueError: image tokens and image features differ in number; a label directly follows a visual token
                in a staged model; a pruner is asked to train.
        """
        _refuse_outputs(kwargs, self.config)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: accepted: exactly one of the two")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        features, visual = self._visual(
            input_ids,
            embeds,
            pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_sizes=image_sizes,
        )
        schedule = self.schedule
        if labels is not None and self.training and not schedule.trainable:
            raise ValueError(f"schedule: found {type(schedule).__name__}, accepted in training: Dense, Fused")
        if use_cache is None:
            use_cache = labels is None and bool(getattr(self.config.text_config, "use_cache", True))
        output = run_decoder(
            self.model.language_model,
            embeds,
            visual,
            attention_mask=attention_mask,
            position_ids=_counted_positions(position_ids, embeds, past_key_values),
            schedule=schedule,
            past_key_values=past_key_values,
            use_cache=use_cache,
            visual_embeds=features,
            queries=_instruction_ends(labels) if schedule.reads_attention else None,
        )
        hidden, loss, logits = output.last_hidden_state, None, None
        if labels is not None:
            staged = not isinstance(schedule, Dense)
            loss = self._loss(hidden, labels, visual if staged else None, kwargs)
        if labels is None or logits_to_keep is not None:
            kept = 0 if logits_to_keep is None else logits_to_keep
            rows = slice(-kept, None) if isinstance(kept, int) and kept else slice(None)
            logits = self.lm_head(hidden[:, kept if isinstance(kept, Tensor) else rows])
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            image_hidden_states=features,
        )

    def _visual(
        self, input_ids: Tensor | None, embeds: Tensor, pixel_values: Tensor | None, **options: Any
    ) -> tuple[Tensor | None, Tensor]:
        """Returns the projected features (R, D), or None, and the (B, S) bool mask of their positions."""
        nothing = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        if pixel_values is None and not self.training:
            return None, nothing
        dummy = pixel_values is None
        if pixel_values is None:
            size = self.config.vision_config.image_size
            pixel_values = torch.zeros(1, 3, size, size, dtype=self.dtype, device=embeds.device)
        given = {name: value for name, value in options.items() if value is not None}
        images = self.model.get_image_features(pixel_values=pixel_values, return_dict=True, **given)
        features = torch.cat(list(images.pooler_output)).to(embeds.device, embeds.dtype)
        if dummy:
            return features, nothing
        mask = self.model.get_placeholder_mask(input_ids, embeds, features[None])
        return features, mask[..., 0]

    def _loss(self, hidden: Tensor, labels: Tensor, visual: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """Returns the next-token loss; the head runs on labelled positions alone, and on every rank."""
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        labelled = following != IGNORE_INDEX
        if visual is not None and bool((labelled & visual).any()):
            sample = int((labelled & visual).any(dim=1).nonzero()[0])
            raise ValueError(
                f"labels: sample {sample} of the batch has a label directly after a visual token, whose state the "
                "deep layers no longer hold; accepted: a text token (a newline) between image and answer"
            )
        logits, targets = self.lm_head(hidden[labelled]), following[labelled]
        if len(targets) == 0:
            return logits.sum() * 0.0
        return self.loss_function(
            logits=logits,
            labels=targets,
            shift_labels=targets,
            vocab_size=logits.shape[-1],
            num_items_in_batch=kwargs.get("num_items_in_batch"),
        )


def _counted_positions(position_ids: Tensor | None, embeds: Tensor, cache: Any) -> Tensor:
    """Returns the given position ids, or every position counted from 0, padding too, as Hugging Face does."""
    if position_ids is not None:
        return position_ids
    seen = cache.get_seq_length() if cache is not None else 0
    return torch.arange(seen, seen + embeds.shape[1], device=embeds.device)[None]


def _instruction_ends(labels: Tensor | None) -> Tensor | None:
    """Returns (B, S) bool: the tokens directly before a supervised span; None leaves it to the last token."""
    if labels is None:
        return None
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return (following != IGNORE_INDEX) & (labels == IGNORE_INDEX)


def _refuse_outputs(kwargs: dict[str, Any], config: FusedLlavaConfig) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name, getattr(config, name, False)):
            raise ValueError(f"{name}: found True, accepted: False, because layers hold different tokens")


AutoConfig.register("fused_llava", FusedLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(FusedLlavaConfig, FusedLlavaForConditionalGeneration, exist_ok=True)
# files on disk name their weights as LLaVA's do ("language_model.lm_head", ...), in both directions
register_checkpoint_conversion_mapping(
    FusedLlavaForConditionalGeneration.__name__, get_checkpoint_conversion_mapping("llava"), overwrite=True
)
