"""FusedAutoModel: loads or builds the fused class of any supported checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .families import family_of, is_original
from .original_checkpoints import load_original
from .schedule_choice import require_saveable
from .stage_plan import StagePlan

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What transformers raises for a config.json that describes no model.
CONFIG_FAULTS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, StrictDataclassError)


class FusedAutoModel:
    """Chooses the fused class by the checkpoint's kind, as transformers' Auto classes do."""

    @classmethod
    def from_pretrained(
        cls, source: Any, *args: Any, stages: StagePlan | dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Returns the fused model of a checkpoint of any family: ordinary, fused, or in LLaVA's original format.

        `source` is a folder or a hub name; `stages` is a StagePlan or its fields, None is what the checkpoint says:
        dense for an ordinary one. The rest is as in Hugging Face's from_pretrained.

        Raises before weights are downloaded:
            UnsupportedModelError, UnsupportedDecoderError: the checkpoint or its text model is of another kind.
            OSError: config.json cannot be read.
            ValueError: the plan does not fit the decoder.
        """
        stages = _plan_fields(stages)
        require_saveable(kwargs.get("schedule"))
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        fields = _read_config(source, hub)
        if is_original(fields):
            return load_original(source, fields, *args, hub=hub, stages=stages, **kwargs)
        family = family_of(fields.get("model_type"), source)
        if kwargs.get("config") is not None:
            if isinstance(kwargs["config"], str | Path):
                kwargs["config"] = family.config_class.from_pretrained(kwargs["config"], **hub)
            chosen = {name: kwargs.pop(name) for name in ("schedule", "plans") if name in kwargs}
            kwargs["config"] = _fused_config(kwargs["config"], stages, **chosen)
            return family.model_class.from_pretrained(source, *args, **kwargs)
        depth = family.config_class.from_pretrained(source, **hub).text_config.num_hidden_layers
        if stages is not None:
            StagePlan.from_dict(stages).check(depth)
            kwargs["stages"] = stages
        return family.model_class.from_pretrained(source, *args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, stages: StagePlan | dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Returns a fused model with random weights, of the config of Hugging Face's class or of the fused one.

        The rest is as in Hugging Face's from_config (`dtype`, `attn_implementation`); errors as from_pretrained.
        """
        fused = _fused_config(config, _plan_fields(stages))
        return family_of(config.model_type).model_class._from_config(fused, **kwargs)


def config_fields(config: str | None, checkpoint: str | None) -> Any:
    """Returns the fields of config.json: the checkpoint's, or the config folder's where that is missing or original.

    The config.json of LLaVA's original format does not describe the whole model; the config folder's does.

    Raises:
        OSError: neither can be read.
    """
    if checkpoint is not None:
        try:
            fields = _read_config(checkpoint, {})
        except OSError:
            if config is None:
                raise
        else:
            if config is None or not is_original(fields):
                return fields
    return json.loads((Path(str(config)) / "config.json").read_text(encoding="utf-8"))


def config_of(fields: Any, source: Any, **more: Any) -> Any:
    """Returns the fused config of the fields of a config.json, an ordinary one's too, and of `more`.

    Raises one of CONFIG_FAULTS where they describe no model of a supported family. `source` is for the message.
    """
    if not isinstance(fields, dict):
        raise TypeError(f"got {type(fields).__name__}, expected a mapping of keys")
    without_type = {name: value for name, value in fields.items() if name != "model_type"}
    return family_of(fields.get("model_type"), source).config_class(**{**without_type, **more})


def _read_config(source: Any, hub: dict[str, Any]) -> dict[str, Any]:
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source, **hub)
    except OSError as error:
        raise OSError(f"{source}: config.json cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict) or not fields:
        raise OSError(f"{source}: got no config.json or nothing in it, expected one that names a model_type")
    return fields


def _plan_fields(stages: StagePlan | dict[str, Any] | None) -> dict[str, Any] | None:
    return stages.to_dict() if isinstance(stages, StagePlan) else stages


def _fused_config(config: Any, stages: dict[str, Any] | None, **more: Any) -> Any:
    """Returns the fused config of Hugging Face's or of a fused one, under the given plan, or else its plan."""
    family = family_of(config.model_type)
    fields = {**config.to_dict(), **more}
    fields.pop("model_type", None)
    if stages is not None:
        fields["stages"] = stages
    if getattr(config, "_attn_implementation_internal", None) is not None:
        fields["attn_implementation"] = config._attn_implementation
    return family.config_class(**fields)
