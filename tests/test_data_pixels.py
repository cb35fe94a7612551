"""Images decode to what a person sees, whatever their mode, or are refused by name."""

import io
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.image_utils import load_image

from data.images import ImageOptions, inspect_image, open_image, prepare_image, read_image, rgb
from data.rows import NOTES, EmbeddedImage, RowError

DECODED = ImageOptions(decode=True)
RAMP = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)


def check_image(*given):
    return inspect_image(*given)[0]


def saved(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return EmbeddedImage(f"x.{form.lower()}", stream.getvalue())


def tiff(values, bits, photometric, order="<"):
    """Returns a grey TIFF of one strip; `values` are packed as they are."""
    tags = [(256, 64), (257, 64), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 64)]
    tags.append((279, len(values)))
    body = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(values))
    return EmbeddedImage("x.tif", header + values + struct.pack(f"{order}H", len(tags)) + body + b"\0" * 4)


def packed_12_bits():
    values = (RAMP >> 4).reshape(-1, 2).astype(np.uint32)
    triples = (values[:, 0] << 12) | values[:, 1]
    return np.stack([triples >> 16, triples >> 8 & 255, triples & 255], axis=1).astype(np.uint8).tobytes()


SIXTEEN = {
    "PNG": lambda: saved(Image.fromarray(RAMP), "PNG"),
    "TIFF": lambda: saved(Image.fromarray(RAMP), "TIFF"),
    "TIFF of big-endian values": lambda: tiff(RAMP.astype(">u2").tobytes(), 16, 1, ">"),
    "PGM": lambda: EmbeddedImage("x.pgm", b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes()),
    "PGM of 12 bits": lambda: EmbeddedImage("x.pgm", b"P5 64 64 4095\n" + (RAMP >> 4).astype(">u2").tobytes()),
    "TIFF of 12 bits": lambda: tiff(packed_12_bits(), 12, 1),
    "TIFF, white is zero": lambda: tiff((65535 - RAMP).astype("<u2").tobytes(), 16, 0),
}


@pytest.mark.parametrize("name", SIXTEEN)
def test_grey_of_more_than_8_bits_is_scaled(name):
    image = SIXTEEN[name]()
    assert check_image(None, image) == []
    grey = np.asarray(open_image(None, image))
    assert len(np.unique(grey)) == 256
    assert np.abs(grey[..., 0].astype(int) - (RAMP >> 8)).max() <= 1


@pytest.mark.parametrize(
    ("array", "mode"), [(np.zeros((4, 4), np.int32), "I"), (np.zeros((4, 4), np.float32), "F")], ids=["int32", "float"]
)
def test_modes_without_a_known_range_are_refused_by_name(array, mode):
    image = Image.fromarray(array)
    for read in (check_image, open_image):
        with pytest.raises(RowError, match=rf"image 'x.tiff' has .*\(mode {mode}\), expected unsigned 8 or 16 bits"):
            read(None, saved(image, "TIFF"))
    with pytest.raises(RowError, match=rf"mode {mode}"):
        rgb(image)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_other_mode_is_what_it_shows(mode):
    white = Image.new("RGB", (4, 4), "white")
    steps = {"La": ("LA",), "RGBa": ("RGBA",), "PA": ("P",), "LAB": ()}.get(mode, ())
    for step in steps:
        white = white.convert(step)
    image = Image.new("LAB", (4, 4), (255, 128, 128)) if mode == "LAB" else white.convert(mode)
    pixels = np.asarray(rgb(image))
    assert pixels.shape == (4, 4, 3)
    assert pixels.min() >= 250


def raw_png(depth, kind, row, *before, after=()):
    """Returns a PNG of one row of two pixels; chunks are pairs of name and body."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    whole = [header, *(chunk(*one) for one in before), data, *(chunk(*one) for one in after), chunk(b"IEND", b"")]
    return EmbeddedImage("x.png", b"\x89PNG\r\n\x1a\n" + b"".join(whole))


def signed(bits):
    """Returns a grey TIFF of signed values."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 4), (339, 2)]
    body = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    return EmbeddedImage("x.tif", b"II*\0" + struct.pack("<I", 12) + bytes(4) + struct.pack("<H", 10) + body + bytes(4))


FITS = b"".join(line.ljust(80) for line in (
    b"SIMPLE  =                    T", b"BITPIX  =                   16", b"NAXIS   =                    2",
    b"NAXIS1  =                    2", b"NAXIS2  =                    2", b"END",
)).ljust(2880) + bytes(2880)  # fmt: skip


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (signed(8), "has signed pixels, expected unsigned 8 or 16 bits"),
        (signed(16), "has 32-bit pixels"),
        (EmbeddedImage("x", FITS), r"has pixels of format FITS \(mode I;16\), expected unsigned"),
        (EmbeddedImage("x", b"Pf\n2 2\n-1.0\n" + bytes(16)), "has floating-point pixels"),
        (
            EmbeddedImage("x", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF"),
            "is EPS, which another program decodes, expected PNG or JPEG",
        ),
    ],
)
def test_what_no_rule_makes_right_is_refused_by_name(image, reason):
    for read in (check_image, open_image):
        with pytest.raises(RowError, match=reason):
            read(None, image)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>404", "a web page or XML"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a web page or XML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"%PDF-1.7", "a PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", r"an image \(HEIC\)"),
        (b"\xff\x0a and more", r"an image \(JPEG XL\)"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
        (b"PK\x03\x04", "a zip archive"),
    ],
)
def test_what_is_no_image_says_what_it_looks_like(tmp_path, data, kind):
    (tmp_path / "x.jpg").write_bytes(data)
    for read in (lambda: open_image(None, EmbeddedImage("x.jpg", data)), lambda: check_image(tmp_path, "x.jpg")):
        with pytest.raises(RowError, match=f"image 'x.jpg' is not an image that Pillow reads.*: it looks like {kind}"):
            read()


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()[6:]


XMP = b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><a tiff:Orientation=\"6\"/></x:xmpmeta>"


@pytest.mark.parametrize("options", [ImageOptions(), DECODED])
@pytest.mark.parametrize(
    "image",
    [
        raw_png(8, 2, bytes(6), (b"eXIf", orientation(6))),
        raw_png(8, 2, bytes(6), after=[(b"eXIf", orientation(6))]),
        raw_png(8, 2, bytes(6), (b"iTXt", XMP)),
    ],
    ids=["EXIF", "EXIF behind the pixels", "XMP"],
)
def test_an_orientation_is_found_wherever_a_png_holds_it(image, options):
    assert check_image(None, image, options) == ["turned"]
    assert inspect_image(None, image, ImageOptions(aspect="processor"))[1] == (1, 2)
    assert open_image(None, image).size == (1, 2)
    with Image.open(io.BytesIO(image.data)) as stored:
        assert load_image(stored).size == (1, 2)  # transformers and its servers


def coloured(mode):
    """Returns blue beside something invisible that is red, as RGBA-like modes can hold it."""
    image = Image.new("RGBA", (4, 4), (0, 0, 255, 255))
    image.paste((255, 0, 0, 0), (0, 0, 2, 4))
    return image if mode == "RGBA" else image.convert(mode)


def palette(transparency):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 2, 4))
    return saved(image, "PNG", transparency=transparency)


def key_colour(mode, colour, blue):
    image = Image.new(mode, (4, 4), blue)
    image.paste(colour, (0, 0, 2, 4))
    return saved(image, "PNG", transparency=colour)


TRANSPARENT = {
    "RGBA PNG": lambda: saved(coloured("RGBA"), "PNG"),
    "RGBA WebP": lambda: saved(coloured("RGBA"), "WEBP", lossless=True, exact=True),
    "RGBA TIFF": lambda: saved(coloured("RGBA"), "TIFF"),
    "palette and an index": lambda: palette(0),
    "palette and bytes": lambda: palette(b"\0\xff"),
    "RGB and a key colour": lambda: key_colour("RGB", (255, 0, 0), (0, 0, 255)),
    "L and a key colour": lambda: key_colour("L", 80, 0),
    "LA PNG": lambda: saved(Image.merge("LA", (Image.new("L", (4, 4), 0), coloured("RGBA").getchannel("A"))), "PNG"),
    "GIF": lambda: saved(coloured("RGBA"), "GIF"),
    "16-bit grey and a key value": lambda: raw_png(16, 0, struct.pack(">2H", 40_000, 0), (b"tRNS", b"\x9c\x40")),
    "16-bit grey and alpha": lambda: raw_png(16, 4, struct.pack(">4H", 40_000, 0, 0, 65_535)),
    "16-bit RGB and a key colour": lambda: raw_png(
        16, 2, struct.pack(">6H", 65_535, 0, 0, 0, 0, 65_535), (b"tRNS", struct.pack(">3H", 65_535, 0, 0))
    ),
    "1 bit and a key value": lambda: raw_png(1, 0, b"\x80", (b"tRNS", b"\0\1")),
}


@pytest.mark.parametrize("name", TRANSPARENT)
@pytest.mark.filterwarnings("error")
def test_transparency_is_on_white(name):
    image = TRANSPARENT[name]()
    check_image(None, image)
    opened = open_image(None, image)
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((opened.width - 1, opened.height - 1))[:2] == (0, 0)


def test_half_transparency_is_mixed_with_white():
    assert rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


FRAMES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_animated_and_multi_page_files_are_noted(form):
    options = {"lossless": True} if form == "WEBP" else {}
    several = saved(FRAMES[0], form, save_all=True, append_images=FRAMES[1:], **options)
    assert check_image(None, several) == ["frames"]
    assert open_image(None, several).getpixel((4, 4))[0] > 200
    assert "frames" in NOTES
    if form != "MPO":
        assert check_image(None, saved(FRAMES[0], form)) == []


def noise(size=200):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))


def zeroed(data, count=2000):
    middle = len(data) // 2
    return data[:middle] + bytes(count) + data[middle + count :]


DAMAGED = {
    "JPEG, its middle zeroed": lambda: zeroed(saved(noise(), "JPEG").data),
    "JPEG, cut with an end": lambda: saved(noise(), "JPEG").data[:9000] + b"\xff\xd9",
    "progressive, zeroed": lambda: zeroed(saved(noise(), "JPEG", progressive=True).data),
    "progressive, cut with an end": lambda: saved(noise(), "JPEG", progressive=True).data[:9000] + b"\xff\xd9",
    "grey JPEG": lambda: zeroed(saved(noise().convert("L"), "JPEG").data),
    "CMYK JPEG": lambda: zeroed(saved(noise().convert("CMYK"), "JPEG").data),
    "PNG, a byte replaced": lambda: saved(noise(), "PNG").data[:5000] + b"\0" + saved(noise(), "PNG").data[5001:],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_in_the_middle_is_found_by_decoding(name):
    image = EmbeddedImage("x", DAMAGED[name]())
    check_image(None, image)  # its end is there
    with pytest.raises(RowError, match="image 'x' is truncated or broken"):
        check_image(None, image, DECODED)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True, "quality": 20}])
def test_whole_files_pass_the_decoding(mode, options):
    whole = saved(noise().convert(mode), "JPEG", **options)
    assert check_image(None, whole, DECODED) == []
    junk = EmbeddedImage("x", whole.data + b"more")
    assert check_image(None, junk, DECODED) == []
    for form in ("PNG", "WEBP", "GIF", "TIFF", "BMP"):
        assert check_image(None, saved(noise().convert("RGB"), form), DECODED) == []


SIDES = [(1, 8000), (8000, 1), (1, 40_000), (2, 20_000), (60_000, 40)]


@pytest.mark.parametrize("aspect", ["pad", "processor"])
@pytest.mark.parametrize("sides", SIDES)
def test_long_thin_images_are_refused_with_their_sides_before_memory_is_taken(sides, aspect):
    image, options = saved(Image.new("RGB", sides), "PNG"), ImageOptions(aspect=aspect)
    processor = CLIPImageProcessor()
    tracemalloc.start()
    for refuse in (
        lambda: check_image(None, image, options),
        lambda: open_image(None, image, options),
        lambda: prepare_image(Image.new("RGB", sides), aspect, processor.image_mean),
    ):
        with pytest.raises(
            RowError, match=f"too long and thin: {sides[0]} x {sides[1]}, expected sides of up to 1,000"
        ):
            refuse()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_a_panorama_is_too_long_to_pad_but_not_for_the_processor(tmp_path):
    Image.new("RGB", (9500, 20)).save(tmp_path / "wide.png")
    with pytest.raises(
        RowError, match=r"too long to pad: 9500 x 20, expected sides of up to 9,459 \(data.image_aspect"
    ):
        check_image(tmp_path, "wide.png")
    check_image(tmp_path, "wide.png", ImageOptions(aspect="processor"))
    assert read_image(tmp_path / "wide.png", ImageOptions(aspect="processor")).size == (9500, 20)


def test_an_orientation_that_cannot_be_read_is_none(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage"
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path, "a.jpg").size == (4, 2)


def test_a_link_out_of_the_folder_is_followed_where_the_recipe_says_so(tmp_path):
    (tmp_path / "disk").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "disk/a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/coco").symlink_to(tmp_path / "disk")
    with pytest.raises(RowError, match=r"behind a link to .*; data.follow_links: true allows links"):
        check_image(tmp_path / "images", "coco/a.png")
    followed = ImageOptions(follow_links=True)
    assert check_image(tmp_path / "images", "coco/a.png", followed) == []
    for name in ("../disk/a.png", str(tmp_path / "disk/a.png")):
        with pytest.raises(RowError, match="lies outside the image folder"):
            check_image(tmp_path / "images", name, followed)


def test_training_and_demo_see_the_same_pixels(tmp_path):
    exif = Image.new("RGB", (1, 1)).getexif()
    exif[0x0112] = 6
    noise(64).resize((24, 16)).save(tmp_path / "a.jpg", exif=exif)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})

    def pixels(image):
        return processor(prepare_image(image, "pad", processor.image_mean), return_tensors="pt")["pixel_values"]

    trained, shown = pixels(open_image(tmp_path, "a.jpg")), pixels(read_image(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "a.jpg") as stored:
        benchmark = pixels(stored)  # images that lmms-eval brings
    assert np.array_equal(trained, shown)
    assert np.array_equal(trained, benchmark)
    assert json.dumps(trained.shape) == "[1, 3, 8, 8]"
