"""FusedAutoModel: loads or builds the fused class of any supported checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from .families import family_of

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class FusedAutoModel:
    """Chooses the fused class by the checkpoint's kind, as transformers' Auto classes do."""

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, stages: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Returns the fused model of an ordinary or a fused checkpoint of any supported family.

        Args:
            source: a folder or a hub name; this and the rest as in Hugging Face's from_pretrained.
            args: likewise.
            stages: the fields of StagePlan; None is what the checkpoint says: dense for an ordinary one.
            kwargs: likewise.

        Raises:
            UnsupportedModelError: the checkpoint is of another kind; names the supported ones.
            ValueError: the plan does not fit the decoder.
        """
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        fields, _ = PreTrainedConfig.get_config_dict(source, **hub)
        if stages is not None:
            kwargs["stages"] = stages
        return family_of(fields.get("model_type"), source).model_class.from_pretrained(source, *args, **kwargs)

    @classmethod
    def from_config(cls, config: Any, stages: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """Returns a fused model with random weights.

        Args:
            config: the config of Hugging Face's class or of the fused one.
            stages: the fields of StagePlan; None is what the config says.
            kwargs: as in Hugging Face's from_config (`dtype`, `attn_implementation`).

        Raises:
            UnsupportedModelError: the config is of another kind.
            ValueError: the plan does not fit the decoder.
        """
        family = family_of(config.model_type)
        fields = config.to_dict()
        fields.pop("model_type", None)
        if stages is not None:
            fields["stages"] = stages
        if getattr(config, "_attn_implementation_internal", None) is not None:
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        return family.model_class._from_config(family.config_class(**fields), **kwargs)
