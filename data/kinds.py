"""Guesses a file's type from its first bytes, for messages about files that cannot be read."""

from __future__ import annotations

from typing import Final

HEAD: Final = 1 << 10  # bytes that `kind_of` needs
_MAGIC: Final = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\xff\xfe\0\0": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"II*\0": "an image (TIFF)",
    b"MM\0*": "an image (TIFF)",
    b"\xff\x0a": "an image (JPEG XL)",
    b"\0\0\0\x0cJXL ": "an image (JPEG XL)",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (git lfs pull fetches it)",
}
_MARKUP: Final = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<svg")
_BRANDS: Final = {b"heic": "an image (HEIC)", b"heix": "an image (HEIC)", b"mif1": "an image (HEIF)", b"avif": "AVIF"}


def kind_of(head: bytes) -> str:
    """Returns the type of a file with these first bytes, such as "a zip archive"; "" for text and unknown types."""
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video")
    if head.lstrip().lower().startswith(_MARKUP):
        return "a web page or XML"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle"
    if head[1:4:2] == b"\0\0" or head[:3:2] == b"\0\0":
        return "UTF-16 text or binary data"
    return "binary data" if b"\0" in head.rstrip(b"\0") else ""
