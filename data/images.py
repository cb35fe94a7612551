"""Images: found below their folder, opened lazily and safely, turned into pixel values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.records import RowError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # Pillow's own limit against decompression bombs
_END_MARKS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_TAIL = 1 << 10  # bytes at a file's end that are read for its end mark


def resolve(folder: Path | None, name: str) -> Path:
    """Returns the file that `name` means below `folder`.

    Raises:
        RowError: no folder is given, the path leads out of it (`..`, absolute, symlink), or nothing is there.
    """
    if folder is None:
        raise RowError(f"image {name!r} without an image folder, accepted: data.images in the recipe")
    try:
        base = folder.resolve()
        file = (base / name).resolve()
        is_file = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # no permission, name too long, NUL; a loop of links
        reason = getattr(error, "strerror", None) or error
        raise RowError(f"image {name!r} cannot be looked up: {reason}") from None
    if not file.is_relative_to(base):
        raise RowError(f"image {name!r} lies outside the image folder {folder}")
    if not is_file:
        raise RowError(f"image {name!r} is missing in {folder}")
    return file


def check_image(folder: Path | None, name: str) -> None:
    """Opens the header, and decodes the whole file only where it does not end with its format's end mark.

    Raises:
        RowError: as `resolve`; not an image, too many pixels, or truncated.
    """
    file = resolve(folder, name)
    with _opened(file, name) as image:
        mark = _END_MARKS.get(image.format or "")
        if mark is None or not _tail(file).rstrip(b"\0\r\n").endswith(mark):
            image.load()


def open_image(folder: Path | None, name: str) -> Image.Image:
    """Returns the decoded RGB image. Its EXIF orientation is not applied: LLaVA does not either.

    Raises:
        RowError: as `check_image`.
    """
    with _opened(resolve(folder, name), name) as image:
        return image.convert("RGB")


def pixel_values(image: Image.Image, image_processor: Any, *, aspect: str) -> Tensor:
    """Returns (1, 3, height, width) as the tower wants it.

    Args:
        image: RGB.
        image_processor: Hugging Face's.
        aspect: `pad` to a square in the processor's mean colour first (LLaVA-1.5), or `processor` for its default.
    """
    if aspect == "pad":
        image = pad_to_square(image, tuple(int(255 * mean) for mean in image_processor.image_mean))
    return image_processor(image, return_tensors="pt")["pixel_values"]


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Returns the image in the middle of a square of its longer side. Source: LLaVA-1.5, image_aspect_ratio pad."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def visual_tokens(processor: Any) -> int:
    """Returns the visual tokens of one image: patches of the processor's crop, and the class token where kept.

    Source: transformers' LlavaProcessor.
    """
    crop = processor.image_processor.crop_size
    patches = (crop["height"] // processor.patch_size) * (crop["width"] // processor.patch_size)
    dropped = 1 if processor.vision_feature_select_strategy == "default" else 0
    return patches + processor.num_additional_image_tokens - dropped


@contextmanager
def _opened(file: Path, name: str) -> Iterator[Image.Image]:
    """Opens an image's header; whatever goes wrong with the file inside is a fault of the row."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused here, not warned about
            with Image.open(file) as image:
                _check_size(image, name)
                yield image
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(f"image {name!r} is huge: {error}") from None
    except UnidentifiedImageError:
        raise RowError(f"image {name!r} is not an image, or its header is broken") from None
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        raise RowError(f"image {name!r} is truncated or broken: {error}") from None


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RowError(f"image {name!r} is huge: {width} x {height}, accepted: up to {MAX_PIXELS:,} pixels")


def _tail(file: Path) -> bytes:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _TAIL))
        return stream.read()
