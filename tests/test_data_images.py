"""Images are found, refused or opened; padding and the number of visual tokens are LLaVA's."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor

from data.images import (
    MAX_PIXELS,
    ImageOptions,
    inspect_image,
    open_image,
    pad_to_square,
    prepare_image,
    rgb,
)
from data.rows import RowError


def check_image(*given):
    return inspect_image(*given)[0]


READS = (check_image, open_image)


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg", "a.gif", "a.webp"):
        Image.fromarray(noise).save(images / name)
    Image.new("P", (5, 5)).save(tmp_path / "outside.png")
    return images


def bomb(file, side):
    """A PNG whose header claims side x side pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp"])
def test_good_images_are_opened(folder, name):
    (folder / "named_wrong.jpg").write_bytes((folder / name).read_bytes())
    for file in (name, "named_wrong.jpg", f"../images/{name}", str(folder / name)):
        check_image(folder, file)
        image = open_image(folder, file)
        assert (image.size, image.mode) == ((40, 60), "RGB")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp"])
@pytest.mark.parametrize("kept", [0.9, 0.6, 0.01])
def test_truncated_images_are_found(folder, name, kept):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * kept)])
    for read in READS:
        with pytest.raises(RowError, match=r"truncated or broken|header is broken"):
            read(folder, name)


def test_the_end_mark_of_a_thumbnail_inside_does_not_hide_a_truncation(folder):
    thumbnail = io.BytesIO()
    Image.new("RGB", (8, 8)).save(thumbnail, "JPEG")
    whole = (folder / "a.jpg").read_bytes()
    comment = b"\xff\xfe" + struct.pack(">H", len(thumbnail.getvalue()) + 2) + thumbnail.getvalue()
    (folder / "a.jpg").write_bytes(whole[:2] + comment + whole[2:-300])
    for read in READS:
        with pytest.raises(RowError, match="truncated or broken"):
            read(folder, "a.jpg")


def without_palette(data):
    """Returns a PNG without its chunk PLTE."""
    start = data.index(b"PLTE") - 4
    return data[:start] + data[start + 12 + int.from_bytes(data[start : start + 4], "big") :]


@pytest.mark.parametrize("kind", ["PNG", "ICNS"])
@pytest.mark.parametrize("decode", [False, True])
def test_a_palette_that_is_not_there_is_a_fault(folder, kind, decode):
    stream = io.BytesIO()
    Image.effect_noise((16, 16), 80).convert("P").save(stream, "PNG")
    data = without_palette(stream.getvalue())
    if kind == "ICNS":
        block = b"icp4" + (8 + len(data)).to_bytes(4, "big") + data
        data = b"icns" + (8 + len(block)).to_bytes(4, "big") + block
    (folder / "bare").write_bytes(data)
    options = ImageOptions("processor", decode=decode)
    for read in (inspect_image, open_image):
        with pytest.raises(RowError, match="image 'bare' is truncated or broken: "):
            read(folder, "bare", options)


def test_good_files_are_not_decoded_by_the_check(folder, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    check_image(folder, "a.png")
    check_image(folder, "a.jpg")


def test_an_empty_file_and_a_text_are_no_images(folder):
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("404 not found")
    for name in ("empty.jpg", "text.jpg"):
        for read in READS:
            with pytest.raises(RowError, match="not an image"):
                read(folder, name)


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 60_000])
@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_refused(folder, side):
    bomb(folder / "bomb.png", side)
    for read in READS:
        with pytest.raises(RowError, match="huge"):
            read(folder, "bomb.png")


def test_paths_out_of_the_folder_are_refused(folder):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "folder").symlink_to(folder.parent)
    outside = ("../outside.png", str(folder.parent / "outside.png"), "link.png", "folder/outside.png", "/etc/passwd")
    for name in (*outside, "sub/../../outside.png", "../images2/a.png", "../nothing.png"):
        for read in READS:
            with pytest.raises(RowError, match="outside the image folder"):
                read(folder, name)


def test_a_link_inside_the_folder_and_a_folder_that_is_one_are_fine(folder):
    (folder / "link.png").symlink_to(folder / "a.png")
    (folder.parent / "linked").symlink_to(folder)
    check_image(folder.parent / "linked", "link.png")


@pytest.mark.parametrize("name", ["b.png", "", ".", "a.png/b.png"])
def test_missing_images(folder, name):
    with pytest.raises(RowError, match="is missing in"):
        check_image(folder, name)


@pytest.mark.parametrize("name", ["a\0.png", "a" * 300 + ".png", "loop.png"])
def test_names_that_cannot_be_looked_up(folder, name):
    (folder / "loop.png").symlink_to(folder / "loop.png")
    with pytest.raises(RowError, match="cannot be looked up"):
        check_image(folder, name)


def test_an_image_without_a_folder():
    with pytest.raises(RowError, match=r"without an image folder, expected data\.images in the recipe"):
        check_image(None, "b.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_camera_is_applied_unless_the_recipe_ignores_it(folder, suffix, orientation):
    image = Image.new("RGB", (32, 16), "white")
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = orientation
    file = folder / f"turned.{suffix}"
    image.save(file, exif=exif, quality=95)
    with Image.open(file) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    turned = open_image(folder, file.name)
    assert turned.size == expected.size
    assert np.array_equal(np.asarray(turned), np.asarray(expected))
    assert np.array_equal(np.asarray(rgb(turned)), np.asarray(turned))  # nobody turns it twice
    if suffix == "tif":
        return  # Pillow turns it while it reads it
    ignored = ImageOptions(exif="ignore")
    assert open_image(folder, file.name, ignored).size == (32, 16)
    assert rgb(open_image(folder, file.name, ignored)).size == (32, 16)
    assert check_image(folder, file.name, ignored) == []
    assert check_image(folder, file.name) == (["turned"] if orientation > 1 else [])


def test_padding_puts_the_image_in_the_middle():
    square = pad_to_square(Image.new("RGB", (4, 2), (255, 0, 0)), (1, 2, 3))
    assert square.size == (4, 4)
    assert [square.getpixel((0, y)) for y in range(4)] == [(1, 2, 3), (255, 0, 0), (255, 0, 0), (1, 2, 3)]
    tall = pad_to_square(Image.new("RGB", (1, 4), (255, 0, 0)), (1, 2, 3))
    assert [tall.getpixel((x, 0)) for x in range(4)] == [(1, 2, 3), (255, 0, 0), (1, 2, 3), (1, 2, 3)]


def test_padding_keeps_what_a_crop_would_cut():
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    wide = Image.new("RGB", (32, 8))
    wide.paste((255, 255, 255), (0, 0, 4, 8))  # a white edge, which a center crop throws away
    padded, cropped = (
        processor(prepare_image(wide, aspect, processor.image_mean), return_tensors="pt")["pixel_values"]
        for aspect in ("pad", "processor")
    )
    assert padded.shape == cropped.shape == (1, 3, 8, 8)
    assert padded.max() > cropped.max()
    assert padded[0, :, 0, 0].abs().max() < 0.03  # the mean colour becomes zero
