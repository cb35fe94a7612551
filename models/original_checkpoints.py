"""Loads checkpoints in the format of LLaVA's and MobileVLM's code, by rules for the names of their weights.

Their config.json is that of the language model, with fields that start with `mm_`. The result is what llava-hf
publishes of the same checkpoint: its config fields, its names of weights, `<image>` and `<pad>` as the next two ids.

Sources: LLaVA 1.5 and 1.6 (arXiv 2310.03744), MobileVLM V2 (arXiv 2402.03766).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, CLIPVisionConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file

from .families import UnsupportedModelError, family_of
from .token_scorer import is_scorer

_DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "mobilevlm": "llama"}
_TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
_PROJECTORS = {  # mm_projector_type: names of its parts, there and here
    "mlp2x_gelu": {"0": "linear_1", "2": "linear_2"},
    "ldpnetv2": {"mlp.mlp.0": "linear_1", "mlp.mlp.2": "linear_2", "peg.peg.0": "positions"},
}
_TOWER = "model.vision_tower.vision_tower."
_PARTS = ("model.embed_tokens", "model.layers", "model.norm", "lm_head", "model.mm_projector", _TOWER)
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load_original(source: Any, fields: Mapping[str, Any], *args: Any, hub: dict[str, Any], **kwargs: Any) -> Any:
    """Returns the fused model of a checkpoint in the original format: see FusedAutoModel.from_pretrained.

    `fields` are those of config.json; `hub` are those of `kwargs` that say where files come from.
    """
    if kwargs.pop("config", None) is not None:
        raise ValueError(f"config: got one, expected None: the config of {source} is made from its original one")
    family = family_of(_check(source, fields))
    tower_hub = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    tower = _tower_config(source, fields, family.model_type == "llava", tower_hub)
    planned = {**_config_fields(fields, family, tower), "stages": kwargs.pop("stages", None)}
    wants_report = kwargs.pop("output_loading_info", False)
    dtypes: dict[str, Any] = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
    config, kwargs = family.config_class.from_dict(planned, return_unused_kwargs=True, **kwargs)
    names = _weight_names(source, hub)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = "lm_head.weight" not in names
    if tower.model_type == "siglip_vision_model":
        _cut_siglip(config, names)
    has_tower = any(name.startswith(_TOWER) for name in names)
    kind = family.model_class if has_tower else _lenient(family.model_class, "missing", r"\bvision_tower\.")
    rules = _name_rules(source, fields, names)
    kwargs |= {**dtypes, "config": config, "key_mapping": rules, "output_loading_info": True}
    model, report = kind.from_pretrained(source, *args, **kwargs)
    missing = {name for name in report["missing_keys"] if not is_scorer(name)}  # a plan's scorer is new
    if not has_tower:
        model.__class__ = family.model_class
        missing |= _load_tower(model, fields["mm_vision_tower"], tower_hub)
    if missing:
        raise ValueError(f"{source}: got no weights for {min(missing)} ({len(missing)} missing), expected all")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the new rows, drawn around the mean of the old, are the same each time
        rows, has_values = config.text_config.vocab_size + 2, model.device.type != "meta"
        model.resize_token_embeddings(rows, pad_to_multiple_of=64, mean_resizing=has_values)
    vars(model).pop("_weight_conversions", None)  # with it, save_pretrained goes back to the original names
    model.eval()  # as from_pretrained leaves it; the head is a new module
    return (model, report) if wants_report else model


def _check(source: Any, fields: Mapping[str, Any]) -> str:
    """Returns the family's model_type; refuses what config.json says and the rules below do not cover."""
    is_mobile, is_tiled = fields.get("model_type") == "mobilevlm", fields.get("image_aspect_ratio") == "anyres"
    accepted: dict[str, Any] = {
        "model_type": list(_DECODERS),
        "mm_projector_type": ["ldpnetv2" if is_mobile else "mlp2x_gelu"],
        "mm_vision_select_feature": ["patch", *([] if is_mobile or is_tiled else ["cls_patch"]), None],
        "image_aspect_ratio": ["square", "pad", *([] if is_mobile else ["anyres"]), None],
        **({"mm_patch_merge_type": ["spatial_unpad"], "image_grid_pinpoints": list} if is_tiled else {}),
        **{name: [False, None] for name in ("mm_use_im_start_end", "mm_resampler_type", "s2", "quantization_config")},
        **{"mm_vision_tower": str, "mm_vision_select_layer": int, "vocab_size": int},
    }
    for name, expected in accepted.items():
        got, is_type = fields.get(name), isinstance(expected, type)
        if not (isinstance(got, expected) if is_type else got in expected):
            _refuse(source, name, got, f"a value of type {expected.__name__}" if is_type else _either(expected))
    return "mobilevlm" if is_mobile else "llava_next" if is_tiled else "llava"


def _either(values: Sequence[Any]) -> str:
    return " or ".join(map(str, values))


def _refuse(source: Any, name: str, got: Any, expected: str) -> None:
    raise UnsupportedModelError(f"{source}: config.json in LLaVA's format: {name}: got {got}, expected {expected}")


def _tower_config(source: Any, fields: Mapping[str, Any], takes_siglip: bool, hub: dict[str, Any]) -> Any:
    """Returns the config of `mm_vision_tower`, from its config.json."""
    name, layer = fields["mm_vision_tower"], fields["mm_vision_select_layer"]
    try:
        found = str(PreTrainedConfig.get_config_dict(name, **hub)[0].get("model_type"))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{source}: config.json: mm_vision_tower: config of {name} cannot be read: {reason}") from error
    kind = found.removesuffix("_vision_model")
    if kind not in _TOWERS or (kind == "siglip" and not takes_siglip):
        _refuse(source, "mm_vision_tower", f"{name} of type {found}", "clip or siglip" if takes_siglip else "clip")
    if kind == "siglip" and layer != -2:
        _refuse(source, "mm_vision_select_layer", layer, "-2 with a siglip tower")
    tower = _TOWERS[kind].from_pretrained(name, **hub)
    if fields.get("mm_hidden_size", tower.hidden_size) != tower.hidden_size:
        _refuse(source, "mm_hidden_size", fields["mm_hidden_size"], f"{tower.hidden_size}, the width of {name}")
    return tower


def _config_fields(fields: Mapping[str, Any], family: Any, tower: Any) -> dict[str, Any]:
    """Returns the fields of the config, as llava-hf has them."""
    text_class = CONFIG_MAPPING[_DECODERS[fields["model_type"]]]
    named = (*text_class.__annotations__, "rope_theta", "rope_scaling")  # the last two are old names that it reads
    is_clip = tower.model_type == "clip_vision_model"
    takes_class = fields.get("mm_vision_select_feature") == "cls_patch"
    tokens = (tower.image_size // tower.patch_size) ** 2 + (is_clip and takes_class)
    tiles = {"image_grid_pinpoints": fields["image_grid_pinpoints"]} if family.model_type == "llava_next" else {}
    return {
        "text_config": text_class(**{name: fields[name] for name in named if name in fields}),
        "vision_config": tower,
        "image_token_index": fields["vocab_size"],
        "pad_token_id": fields["vocab_size"] + 1,
        "image_seq_length": family.config_class.token_grid**2 if family.model_type == "mobilevlm" else tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": fields["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default" if is_clip and not takes_class else "full",
        "dtype": fields.get("dtype", fields.get("torch_dtype")),
        **tiles,
    }


def _weight_names(source: Any, hub: dict[str, Any]) -> list[str]:
    """Returns the names of the checkpoint's weights, from its index where it is sharded."""
    for file in _FILES:
        path = cached_file(source, file, _raise_exceptions_for_missing_entries=False, **hub)
        if path is not None and file.endswith(".json"):
            return list(json.loads(Path(path).read_text("utf-8"))["weight_map"])
        if path is not None:
            return list(load_state_dict(path, map_location="meta"))
    raise UnsupportedModelError(f"{source}: got no weights of a whole model, expected {_either(_FILES)}")


def _name_rules(source: Any, fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Returns {pattern of an original name: name here}; transformers' own rules then apply to the tower's."""
    rules = {
        r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
        rf"^{re.escape(_TOWER)}": "model.vision_tower.",
    }
    for old, new in _PROJECTORS[fields["mm_projector_type"]].items():
        rules[rf"^model\.mm_projector\.{re.escape(old)}\."] = f"model.multi_modal_projector.{new}."
    kept = ["lm_head.weight", *(["model.image_newline"] if fields.get("image_aspect_ratio") == "anyres" else [])]
    unknown = [name for name in names if name not in kept and not any(re.search(rule, name) for rule in rules)]
    if unknown:
        raise UnsupportedModelError(f"{source}: got a weight {min(unknown)}, expected those of {_either(_PARTS)}")
    return rules


def _cut_siglip(config: Any, names: Sequence[str]) -> None:
    """Deletes the last layer and the head of a SigLIP tower, as LLaVA-NeXT's code does, where the file lacks them."""
    vision, tower = config.vision_config, [name for name in names if name.startswith(_TOWER)]
    vision.vision_use_head = any(".head." in name for name in tower)
    if not any(f".layers.{vision.num_hidden_layers - 1}." in name for name in tower):
        vision.num_hidden_layers -= 1
        config.vision_feature_layer += 1


def _lenient(kind: Any, fault: str, pattern: str) -> Any:
    """Returns a class whose loading does not report weights of a pattern as missing, or as unexpected."""
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, f"_keys_to_ignore_on_load_{fault}": [pattern]})


def _load_tower(model: Any, name: str, hub: dict[str, Any]) -> set[str]:
    """Loads the tower that the checkpoint only names; returns the names of weights that are missing."""
    built = model.model.vision_tower
    kind = _lenient(type(built), "unexpected", ".")  # a text model; the layer and the head that SigLIP loses
    tower, report = kind.from_pretrained(name, config=built.config, dtype=built.dtype, output_loading_info=True, **hub)
    tower.__class__ = type(built)
    model.model.vision_tower = tower.to(built.device)
    return {f"model.vision_tower.{missing}" for missing in report["missing_keys"]}
