"""Encoded images that Hugging Face's forward does not merge into the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LazyImages(dict[str, Any]):
    """Stands in for `mm_encoder_outputs`: encodes the images on first access, and reports none to merge.

    A batch without images encodes a blank one, so that every rank runs the same modules in the same order, as ZeRO-3
    requires. A batch whose visual tokens are already counted passes its features straight to the decoder, because
    Hugging Face's merging synchronises with the device in forward and backward.
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
