"""Encoded images that Hugging Face's forward does not merge into the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ImagesApart(dict[str, Any]):
    """Encodes the images of a training batch where they are looked up, and merges none of them.

    For a batch without any, a blank one is encoded: every rank runs the same modules in the same order, containers too,
    which ZeRO-3 relies on. For one whose visual tokens are counted already, the decoder takes the features as they are:
    Hugging Face's merging waits for the device, forward and backward.
    """

    def __init__(self, encode: Callable[[], tuple[Tensor, list[Tensor]]]) -> None:
        super().__init__()
        self._encode = encode
        self._features: tuple[Tensor, list[Tensor]] | None = None

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the default, as for a batch without an image."""
        if key == "image":
            self.features()
        return default

    def features(self) -> tuple[Tensor, list[Tensor]]:
        """Returns the features (R, D) of the images, and their DeepStack features."""
        if self._features is None:
            self._features = self._encode()
        return self._features


def flat_features(features: Any) -> Tensor:
    """Returns image features, a tensor or one an image, as rows (R, D)."""
    joined = features if isinstance(features, Tensor) else torch.cat(list(features))
    return joined.flatten(0, -2)
