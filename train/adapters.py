"""LoRA on the language model, and the merge that makes its result an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from recipes.schema import Lora
from train.errors import TrainingError
from train.initial import load_checkpoint

_TOLERANCE: Final = 1e-3  # float32, relative to the largest logit


def add_adapters(model: Any, lora: Lora) -> PeftModel:
    """Returns the model with low-rank adapters on every Linear layer of its language model, but not on the head."""
    decoder = model.model.get_decoder()
    place = next(name for name, module in model.named_modules() if module is decoder)
    targets = [f"{place}.{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    return get_peft_model(
        model,
        LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets),
    )


def merged(weights: Mapping[str, Tensor], lora: Lora, *, initial: Path, dtype: torch.dtype) -> Any:
    """Returns the full model: the initial checkpoint with what was learned, adapters merged in float32.

    Args:
        weights: learned weights by their names in the adapted model.
        lora: the adapters' shape.
        initial: checkpoint that the training started from.
        dtype: of the returned weights.

    Raises:
        TrainingError: a weight has no place, or the merged model's logits are not the adapted model's.
    """
    base = load_checkpoint(initial, dtype=torch.float32)
    adapted = add_adapters(base, lora).eval()
    report = adapted.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    if report.unexpected_keys:
        raise TrainingError(f"merge: {report.unexpected_keys[0]} has no place in the model")
    tokens = torch.arange(3, 19)[None] % base.config.text_config.vocab_size  # text alone: no image token
    tokens[tokens == base.config.image_token_id] = 0
    with torch.no_grad():
        before = adapted(input_ids=tokens).logits
        model = adapted.merge_and_unload(safe_merge=True)
        after = model(input_ids=tokens).logits
    error = float((before - after).abs().max() / before.abs().max())
    if not error <= _TOLERANCE:
        raise TrainingError(f"merge: logits differ by {error:.1e}, expected at most {_TOLERANCE:.0e}")
    return model.to(dtype)
