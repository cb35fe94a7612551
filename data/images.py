"""Finds images inside their folder and opens them in RGB, as an image viewer would."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data.config import shorten
from data.kinds import HEAD, kind_of
from data.rows import EmbeddedImage, RowError

MAX_PIXELS: Final = Image.MAX_IMAGE_PIXELS or 89_478_485  # Pillow's limit against decompression bombs
MAX_RATIO: Final = 1_000  # longer side : shorter side; padding makes a square of the longer one
_END_MARKS: Final = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
_TAIL: Final = 1 << 10  # bytes at a file's end that are read for its end mark
_ORIENTATION: Final = 0x0112  # EXIF tag
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS: Final = (5, 6, 7, 8)  # orientations that swap width and height
_PNG_EXIF: Final = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}  # where Pillow finds an orientation
_SIXTEEN: Final = {  # formats whose grey of more than 8 bits is unsigned, by mode; I may hold 32 bits elsewhere
    "I": ("PNG", "PPM", "JPEG2000"),
    "I;16": (None, "PNG", "PPM", "JPEG2000", "TIFF"),  # None: an image in memory
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_WHITE_IS_ZERO, _SIGNED = 0, (2,)  # values of the last two
# What Pillow raises for a broken file; an assertion for a palette that is not there.
_BROKEN: Final = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, struct.error, zlib.error),
)
_BY_PROGRAM: Final = ("EPS", "WMF")  # formats that Pillow has another program decode

Exif = Literal["apply", "ignore"]


@dataclass(frozen=True)
class ImageOptions:
    """How to read the images of a recipe; fields are keys of `DataConfig`."""

    aspect: Literal["pad", "processor"] = "pad"
    exif: Exif = "apply"
    follow_links: bool = False
    decode: bool = False


_DEFAULT: Final = ImageOptions()


def resolve(folder: Path | None, name: str, *, follow_links: bool = False) -> Path:
    """Returns the file `name` in `folder`.

    Raises:
        RowError: there is no folder, the path leaves it (`..`, absolute, link), or there is no such file.
    """
    shown = shorten(name)
    if name.startswith("data:"):
        raise RowError(f"image: got the data URL {shown!r}, expected data:image/...;base64,")
    if "://" in name[:12]:
        raise RowError(f"image: got the URL {shown!r}, expected a path inside the image folder (download it first)")
    if folder is None:
        raise RowError(f"image {shown!r} without an image folder, expected data.images in the recipe")
    try:
        base = _resolved(folder)
        plain = Path(base / name)
        file = plain.resolve()
        is_file = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # no permission, name too long, NUL; a loop of links
        reason = getattr(error, "strerror", None) or error
        raise RowError(f"image {shown!r} cannot be looked up: {reason}") from None
    if not file.is_relative_to(base):
        is_link = ".." not in plain.parts and plain.is_relative_to(base)
        if not is_link:
            raise RowError(f"image {shown!r} lies outside the image folder {folder}")
        if not follow_links:
            raise RowError(
                f"image {shown!r} lies outside the image folder {folder}, behind a link to {shorten(str(file))}; "
                "data.follow_links: true allows links"
            )
    if not is_file:
        raise RowError(f"image {shown!r} is missing in {folder}")
    return file


@lru_cache(64)
def _resolved(folder: Path) -> Path:
    return folder.resolve()


def inspect_image(
    folder: Path | None, image: str | EmbeddedImage, options: ImageOptions = _DEFAULT
) -> tuple[list[str], tuple[int, int]]:
    """Checks an image by its header, and decodes it only if it does not end with its format's end marker.

    Args:
        folder: folder that a path is relative to.
        image: path, `data:` URL, or embedded image.
        options: with `decode`, every file is decoded, JPEG strictly.

    Returns:
        Notes to count, keys of `rows.NOTES`; and width and height after rotation and padding.

    Raises:
        RowError: as `resolve`; not an image, too many pixels, a mode of unknown range, or truncated.
    """
    name, place = _locate(folder, image, options)
    if options.decode:
        with _opened(place, name, options) as opened:
            opened.verify()  # a PNG's checksums; no pixel can be read after it
    with _opened(place, name, options) as opened:
        kind, (width, height) = opened.format or "", opened.size
        tail = _tail(place) if kind in _END_MARKS else b""
        notes = ["frames"] if getattr(opened, "is_animated", False) else []
        if options.decode or b"eXIf" in tail or not _has_end(tail, kind):  # a PNG's EXIF may stand behind its pixels
            opened.load()
            _check_palette(opened)
        turn = _orientation(opened) if options.exif == "apply" else 1
    if options.decode and kind in ("JPEG", "MPO"):
        _check_jpeg(place, name)
    notes += ["turned"] if turn in _TURNS else []
    if turn in _SIDEWAYS:
        width, height = height, width
    return notes, (max(width, height),) * 2 if options.aspect == "pad" else (width, height)


def open_image(folder: Path | None, image: str | EmbeddedImage, options: ImageOptions = _DEFAULT) -> Image.Image:
    """Returns the decoded RGB image, as `rgb` makes it.

    Raises:
        RowError: as `inspect_image`.
    """
    name, place = _locate(folder, image, options)
    with _opened(place, name, options) as opened:
        return rgb(opened, exif=options.exif)


def read_image(file: str | Path, options: ImageOptions = _DEFAULT) -> Image.Image:
    """Returns the RGB image of a file outside any image folder, such as an upload.

    Raises:
        RowError: it is not an image, or training would reject it.
    """
    with _opened(Path(file), Path(file).name, options) as opened:
        return rgb(opened, exif=options.exif)


def rgb(image: Image.Image, *, exif: Exif = "apply") -> Image.Image:
    """Returns the image in RGB as a viewer shows it: upright, transparency on white, 16 bits scaled to 8.

    Idempotent. Colour profiles are not applied, as in LLaVA.

    Args:
        image: of any mode.
        exif: `ignore` leaves a photo as its file stores it.

    Raises:
        RowError: the value range of the mode is unknown.
    """
    _check_mode(image, "image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.load()
        orientation = _orientation(image) if exif == "apply" else 1
        image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("LA") if image.mode == "La" else image
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            image = white
        image = image.convert("RGB")
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    image.info = {}  # without the orientation, so that the image is not turned again
    return image


def prepare_image(image: Image.Image, aspect: str, mean: Sequence[float] | None) -> Image.Image:
    """Returns the input of the image processor: the image in RGB and, under `pad`, on a square of the colour `mean`.

    Raises:
        RowError: the aspect ratio is too extreme.
    """
    check_size(image.size, "image", aspect)
    image = rgb(image)
    return pad_to_square(image, tuple(int(255 * part) for part in mean or ())) if aspect == "pad" else image


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Returns the image in the middle of a square of its longer side. Source: LLaVA-1.5, image_aspect_ratio pad."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _locate(folder: Path | None, image: str | EmbeddedImage, options: ImageOptions) -> tuple[str, Path | bytes]:
    """Returns an image's name for messages, and its file or its bytes."""
    if isinstance(image, EmbeddedImage):
        return shorten(image.name), image.data
    if image.startswith("data:image/"):
        try:
            text = "".join(image.partition(",")[2].split())  # base64 may be wrapped
            return shorten(image, 40), base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise RowError(f"image {shorten(image, 40)!r} is broken: its base64 cannot be read") from None
    return shorten(image), resolve(folder, image, follow_links=options.follow_links)


@contextmanager
def _opened(place: Path | bytes, name: str, options: ImageOptions) -> Iterator[Image.Image]:
    """Opens an image's header; turns errors of the file, also in the `with` block, into RowError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's: faults are reported as RowError instead
            with Image.open(io.BytesIO(place) if isinstance(place, bytes) else place) as image:
                check_size(image.size, f"image {name!r}", options.aspect)
                _check_mode(image, f"image {name!r}")
                if image.format == "PNG":  # other formats may have theirs behind the header
                    _check_palette(image)
                yield image
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(f"image {name!r} is huge: {error}") from None
    except UnidentifiedImageError:
        head = _head(place)
        kind = "an empty file" if not head else kind_of(head)
        looks = f": it looks like {kind}" if kind else ""
        raise RowError(f"image {name!r} is not an image that Pillow reads, or its header is broken{looks}") from None
    except _BROKEN as error:
        reason = shorten(str(error)) or type(error).__name__
        raise RowError(f"image {name!r} is truncated or broken: {reason}") from None


def check_size(size: tuple[int, int], what: str, aspect: str) -> None:
    """Raises RowError if an image has too many pixels or an extreme aspect ratio."""
    width, height = size
    longer, shorter = max(size), min(size)
    if width * height > MAX_PIXELS:
        raise RowError(f"{what} is huge: {width} x {height}, expected up to {MAX_PIXELS:,} pixels")
    if longer > MAX_RATIO * max(shorter, 1):
        raise RowError(f"{what} is too long and thin: {width} x {height}, expected sides of up to {MAX_RATIO:,} : 1")
    if aspect == "pad" and longer * longer > MAX_PIXELS:
        raise RowError(
            f"{what} is too long to pad: {width} x {height}, expected sides of up to {int(MAX_PIXELS**0.5):,} "
            "(data.image_aspect: pad)"
        )


def _check_mode(image: Image.Image, what: str) -> None:
    """Rejects pixels of unknown range, and formats that Pillow needs another program for."""
    found = ""
    if image.mode == "F":
        found = "floating-point pixels (mode F)"
    elif image.mode == "I" and image.format not in _SIXTEEN["I"]:
        found = "32-bit pixels (mode I)"
    elif image.mode.startswith("I;16") and image.format not in _SIXTEEN["I;16"]:
        found = f"pixels of format {image.format} (mode {image.mode})"
    elif getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, ())[:1] == _SIGNED:
        found = "signed pixels"
    if found:
        raise RowError(f"{what} has {found}, expected unsigned 8 or 16 bits, whose range is known")
    if image.format in _BY_PROGRAM:
        raise RowError(f"{what} is {image.format}, which another program decodes, expected PNG or JPEG")


def _check_palette(image: Image.Image) -> None:
    """Raises ValueError if an image's palette is missing; Pillow would fail as it converts the image."""
    if image.mode in ("P", "PA") and image.palette is None:
        raise ValueError("got no palette")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Returns a grey image of more than 8 bits scaled to 8, transparency white; others as they are."""
    if not image.mode.startswith("I"):
        return image
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))
    values = np.asarray(image).astype(np.int64)
    grey = values >> ((bits[0] if isinstance(bits, tuple) else bits) - 8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" in image.info:  # one value, of all 16 bits
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation; 1 (upright) if there is none or it cannot be read."""
    if image.format == "PNG" and not _PNG_EXIF & image.info.keys():
        return 1  # reading further would decode the file
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1


def _has_end(tail: bytes, kind: str) -> bool:
    """Returns whether a file ends as its format does; False for a format without an end mark."""
    return kind in _END_MARKS and tail.rstrip(b"\0\r\n").endswith(_END_MARKS[kind])


def _head(place: Path | bytes) -> bytes:
    if isinstance(place, bytes):
        return place[:HEAD]
    with place.open("rb") as stream:
        return stream.read(HEAD)


def _tail(place: Path | bytes) -> bytes:
    if isinstance(place, bytes):
        return place[-_TAIL:]
    with place.open("rb") as stream:
        stream.seek(max(0, place.stat().st_size - _TAIL))
        return stream.read()


def _check_jpeg(place: Path | bytes, name: str) -> None:
    """Rejects a JPEG that libjpeg warns about; Pillow would decode it silently."""
    data = place if isinstance(place, bytes) else place.read_bytes()
    try:
        colours = simplejpeg.decode_jpeg_header(data)[2]
        simplejpeg.decode_jpeg(data, colorspace="CMYK" if colours in ("CMYK", "YCCK") else "GRAY", strict=True)
    except ValueError as error:
        if "orrupt" in str(error) or "remature" in str(error):  # not what it merely cannot decode
            raise RowError(f"image {name!r} is truncated or broken: {shorten(str(error))}") from None
