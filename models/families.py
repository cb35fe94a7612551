"""The supported families: a fused class and config for each, made with FusedMixin. Adding one is an entry in FAMILIES.

docs/families.md lists what is tested for each, and explains how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, Signature, signature
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .fused import FusedMixin
from .mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from .schedule_choice import settle_stages
from .token_scorer import is_scorer

_ADDED = ("stages", "plans", "schedule")  # to a family's config


class UnsupportedModelError(ValueError):
    """The checkpoint is of a kind that cannot be staged."""


class StagesConfigMixin:
    """Adds to a family's config `stages`, `plans` and `schedule`.

    `stages` are the fields of the stage plan, None is dense. `plans` has all the plans that a checkpoint was trained
    for, {name: fields, or None for dense}; None where there is one alone. `schedule` is the one to start with.
    """

    base_model_type: str
    model_type: str
    stages: dict[str, Any] | None
    plans: dict[str, Any] | None
    schedule: dict[str, Any] | str | None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # PreTrainedConfig's
        settle_stages(self)

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns what config.json says: of a dense model the family's, which transformers then loads as it is."""
        fields = super().to_diff_dict()  # type: ignore[misc]  # PreTrainedConfig's
        if is_plain(self):
            names = [name.removeprefix("Fused") for name in fields.get("architectures") or ()]
            fields = {name: value for name, value in fields.items() if name not in (*_ADDED, "auto_map")}
            fields |= {"model_type": self.base_model_type} | ({"architectures": names} if names else {})
        return fields

    @classmethod
    def get_config_dict(cls, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the fields of config.json, whose kind is checked before anything is built from them."""
        fields, kwargs = super().get_config_dict(source, **kwargs)  # type: ignore[misc]  # PreTrainedConfig's
        found = fields.get("model_type")
        if found not in (cls.model_type, cls.base_model_type):
            raise UnsupportedModelError(
                f"{source}: config.json: got model_type {found}, expected {cls.base_model_type} or {cls.model_type}"
            )
        if is_original(fields):
            raise UnsupportedModelError(
                f"{source}: config.json: got the original format of LLaVA, expected Hugging Face's; "
                "FusedAutoModel.from_pretrained loads both"
            )
        return {**fields, "model_type": cls.model_type}, kwargs


def is_plain(config: Any) -> bool:
    """Returns whether Hugging Face's classes of the family compute the same: dense, and transformers has them."""
    has_classes = type(config).__bases__[-1].__module__.startswith("transformers.")
    return has_classes and not any((config.stages, config.plans, config.schedule))


def is_original(fields: Mapping[str, Any]) -> bool:
    """Returns whether the fields of a config.json are those of LLaVA's code: see original_checkpoints.py."""
    return "text_config" not in fields and ("mm_vision_tower" in fields or "mm_projector_type" in fields)


def _square(config: Any) -> dict[str, Tensor]:
    """One image of the tower's size; Pixtral towers also want its sides."""
    size = config.vision_config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.zeros(1, 3, height, width)}


def _llava(config: Any) -> dict[str, Tensor]:
    if config.vision_config.model_type != "pixtral":
        return _square(config)
    return _pixtral(config, config.vision_config.patch_size)


def _pixtral(config: Any, side: int) -> dict[str, Tensor]:
    """Two visual tokens, each `side` pixels wide: transformers cannot split the features of one."""
    return {"pixel_values": torch.zeros(1, 3, side, 2 * side), "image_sizes": torch.tensor([[side, 2 * side]])}


def _tiles(config: Any) -> dict[str, Tensor]:
    """LLaVA-NeXT, LLaVA-OneVision: an image of the tower's size, as the tiles that its grid makes of it."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    size = config.vision_config.image_size
    tiles = image_size_to_num_patches([size, size], config.image_grid_pinpoints, size)
    return {"pixel_values": torch.zeros(tiles, 3, size, size), "image_sizes": torch.tensor([[size, size]])}


def _patches(config: Any) -> dict[str, Tensor]:
    """Qwen-VL, GLM-4V: the patches of one visual token."""
    vision = config.vision_config
    side = vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.zeros(side * side, values), "image_grid_thw": torch.tensor([[1, side, side]])}


def _listed(config: Any) -> dict[str, Tensor]:
    """Idefics3, SmolVLM: a sample with a list of one image; one of zeros would be taken for padding."""
    return {"pixel_values": torch.ones_like(_square(config)["pixel_values"])[None]}


def _molmo2(config: Any) -> dict[str, Tensor]:
    """One crop, pooled to one visual token."""
    vision = config.vision_config
    patches = torch.zeros(1, vision.num_position_embeddings, vision.num_channels * vision.patch_size**2)
    grid = torch.tensor([[1, 1, 0, 0]])
    return {"pixel_values": patches, "image_token_pooling": torch.tensor([[0]]), "image_grids": grid}


def _gemma3_blocks(given: Mapping[str, Any]) -> Tensor | None:
    """A block for each image: its tokens see each other in both directions."""
    if given.get("token_type_ids") is None:
        return None
    is_image = given["token_type_ids"] == 1
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    return torch.where(is_image, starts.long().cumsum(dim=1) - 1, -1)


def _molmo2_blocks(given: Mapping[str, Any]) -> Tensor | None:
    """One block for all image tokens of a sample, marks included."""
    if given.get("mm_token_type_ids") is None:
        return None
    return torch.where(given["mm_token_type_ids"] == 1, 0, -1)


PARTS = ("projector", "vision_tower", "language_model")


@dataclass(frozen=True)
class Family:
    """One family of VLMs. See FusedMixin for `blank`, `blocks` and `merges`.

    `tower` and `projector` name modules or weights below `model`; a name in `projector` wins over the tower that holds
    it (Qwen's merger lies inside its tower). What neither names is the language model, but for a plan's scorer of
    projected features, which learns with the projector.
    """

    model_type: str  # of Hugging Face's config; the fused config's has `fused_` before it
    prefix: str  # of the names of Hugging Face's classes: `Qwen3VL` for Qwen3VLForConditionalGeneration
    blank: Callable[[Any], dict[str, Tensor]] = _square
    blocks: Callable[[Mapping[str, Any]], Tensor | None] = lambda given: None
    bases: tuple[Any, Any] | None = None  # config and model class, where they are not those of transformers
    merges: bool = False  # see FusedMixin
    tower: tuple[str, ...] = ("vision_tower",)
    projector: tuple[str, ...] = ("multi_modal_projector", "image_newline")

    def part_of(self, name: str) -> str:
        """Returns which of PARTS a weight belongs to, by its name in the model, or in one with adapters around it."""
        if is_scorer(name):
            return "projector"
        place = f".{name}."
        for part, modules in (("projector", self.projector), ("vision_tower", self.tower)):
            if any(f".model.{module}." in place for module in modules):
                return part
        return "language_model"

    @cached_property
    def config_class(self) -> Any:
        """The fused config's class: everything the family's config takes, `stages`, `plans` and `schedule`."""
        base = self.bases[0] if self.bases else getattr(transformers, f"{self.prefix}Config")
        fields: dict[str, Any] = {
            "__module__": __name__,
            "__annotations__": {
                "stages": dict[str, Any] | None,
                "plans": dict[str, Any] | None,
                "schedule": dict[str, Any] | str | None,
            },
            "__doc__": f"Everything {base.__name__} takes, `stages`, `plans` and `schedule`: see StagesConfigMixin.",
            "model_type": f"fused_{self.model_type}",
            "base_model_type": self.model_type,
            "stages": None,
            "plans": None,
            "schedule": None,
        }
        return type(f"Fused{base.__name__}", (StagesConfigMixin, base), fields)

    @cached_property
    def model_class(self) -> Any:
        """The fused model's class."""
        base = self.bases[1] if self.bases else getattr(transformers, f"{self.prefix}ForConditionalGeneration")
        fields: dict[str, Any] = {
            "__module__": __name__,
            "__doc__": f"{base.__name__} with staged visual tokens: see FusedMixin.",
            "config_class": self.config_class,
            "family_blank": staticmethod(self.blank),
            "family_blocks": staticmethod(self.blocks),
            "family_merges": self.merges,
            "forward": _forward_like(base),
        }
        return type(f"Fused{base.__name__}", (FusedMixin, base), fields)

    def register(self) -> None:
        """Registers the fused class with the Auto classes, `transformers serve` and the rules for weight names."""
        if not __name__.startswith("transformers_modules."):  # a release's auto_map says it, for that release alone
            AutoConfig.register(self.config_class.model_type, self.config_class, exist_ok=True)
            AutoModelForImageTextToText.register(self.config_class, self.model_class, exist_ok=True)
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(self.config_class.model_type, self.model_class.__name__)
        # files name their weights as the family's do; these rules go by class name or model_type
        base = f"{self.prefix}ForConditionalGeneration"
        rules = get_checkpoint_conversion_mapping(base) or get_checkpoint_conversion_mapping(self.model_type)
        if rules is not None:
            register_checkpoint_conversion_mapping(self.model_class.__name__, rules, overwrite=True)


def _forward_like(base: Any) -> Callable[..., Any]:
    """Returns FusedMixin.forward with the arguments of the family's and those that FusedMixin adds."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FusedMixin.forward(self, *args, **kwargs)

    parameters = dict(signature(base.forward).parameters)
    variable = parameters.pop("kwargs", Parameter("kwargs", Parameter.VAR_KEYWORD))
    names = ("schedule", "visual", "relevance", "query_mask", "facts", "packed")
    added = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in names]
    forward.__doc__ = FusedMixin.forward.__doc__
    forward.__signature__ = Signature([*parameters.values(), *added, variable])  # type: ignore[attr-defined]  # generate() reads it
    return forward


_QWEN3_MERGERS = ("visual.merger", "visual.deepstack_merger_list")
_OVIS2_TABLE = ("visual_embeddings_table", "vision_tower.head_linear", "vision_tower.head_norm")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llava", "Llava", _llava, merges=True),
        Family("llava_next", "LlavaNext", _tiles, merges=True),
        Family("llava_onevision", "LlavaOnevision", _tiles, merges=True),
        Family("internvl", "InternVL", merges=True),
        Family("qwen2_vl", "Qwen2VL", _patches, tower=("visual",), projector=("visual.merger",)),
        Family("qwen2_5_vl", "Qwen2_5_VL", _patches, tower=("visual",), projector=("visual.merger",)),
        Family("qwen3_vl", "Qwen3VL", _patches, tower=("visual",), projector=_QWEN3_MERGERS),
        Family("glm4v", "Glm4v", _patches, tower=("visual",), projector=("visual.merger", "visual.downsample")),
        Family("smolvlm", "SmolVLM", _listed, tower=("vision_model",), projector=("connector",)),
        Family("idefics3", "Idefics3", _listed, tower=("vision_model",), projector=("connector",)),
        Family(
            "mistral3",
            "Mistral3",
            lambda c: _pixtral(c, c.vision_config.patch_size * c.spatial_merge_size),
            merges=True,
        ),
        Family("gemma3", "Gemma3", blocks=_gemma3_blocks, merges=True),
        Family("ovis2", "Ovis2", projector=_OVIS2_TABLE),
        Family("molmo2", "Molmo2", _molmo2, _molmo2_blocks),
        Family("mobilevlm", "MobileVLM", bases=(MobileVLMConfig, MobileVLMForConditionalGeneration), merges=True),
    )
}
for _family in FAMILIES.values():
    _family.register()
    for _class in (_family.config_class, _family.model_class):  # a release's auto_map names them in this module
        globals()[_class.__name__] = _class


def family_of(model_type: str | None, source: Any = "config.json") -> Family:
    """Returns the family of a model_type, of Hugging Face's config or of the fused one.

    Raises:
        UnsupportedModelError: it is none of FAMILIES.
    """
    name = str(model_type).removeprefix("fused_")
    if name not in FAMILIES:
        raise UnsupportedModelError(f"{source}: got model_type {model_type}, expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
