import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from data.images import MAX_PIXELS, check_image, open_image, pad_to_square, pixel_values, visual_tokens
from data.records import RowError


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg"):
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


def test_good_images_are_opened(folder):
    for name in ("a.png", "a.jpg"):
        check_image(folder, name)
        assert open_image(folder, name).size == (40, 60)
        assert open_image(folder, name).mode == "RGB"


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("kept", [0.6, 0.01])
def test_truncated_images_are_found(folder, name, kept):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * kept)])
    for read in (check_image, open_image):
        with pytest.raises(RowError, match=r"truncated or broken|header is broken"):
            read(folder, name)


def test_an_empty_file_and_a_text_are_no_images(folder):
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("404 not found")
    for name in ("empty.jpg", "text.jpg"):
        with pytest.raises(RowError, match="not an image"):
            check_image(folder, name)


@pytest.mark.parametrize("side", [int(MAX_PIXELS**0.5) + 1, 60_000])
def test_decompression_bombs_are_refused(folder, side):
    bomb(folder / "bomb.png", side)
    for read in (check_image, open_image):
        with pytest.raises(RowError, match="huge"):
            read(folder, "bomb.png")


def test_paths_out_of_the_folder_are_refused(folder):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    for name in ("../outside.png", str(folder.parent / "outside.png"), "link.png", "sub/../../outside.png"):
        with pytest.raises(RowError, match="outside the image folder"):
            check_image(folder, name)


def test_missing_images_and_folders(folder):
    with pytest.raises(RowError, match=r"'b\.png' is missing in"):
        check_image(folder, "b.png")
    with pytest.raises(RowError, match="without an image folder"):
        check_image(None, "b.png")


def test_padding_puts_the_image_in_the_middle():
    square = pad_to_square(Image.new("RGB", (4, 2), (255, 0, 0)), (1, 2, 3))
    assert square.size == (4, 4)
    assert square.getpixel((0, 0)) == (1, 2, 3)
    assert square.getpixel((0, 1)) == (255, 0, 0)
    assert square.getpixel((3, 3)) == (1, 2, 3)


def test_padding_keeps_what_a_crop_would_cut():
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    wide = Image.new("RGB", (32, 8))
    wide.paste((255, 255, 255), (0, 0, 4, 8))  # a white edge, which a center crop throws away
    padded = pixel_values(wide, processor, aspect="pad")
    cropped = pixel_values(wide, processor, aspect="processor")
    assert padded.shape == cropped.shape == (1, 3, 8, 8)
    assert padded.max() > cropped.max()


@pytest.mark.parametrize(("strategy", "expected"), [("default", 576), ("full", 577)])
def test_visual_tokens_of_llava(strategy, expected):
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(crop_size={"height": 336, "width": 336}),
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy=strategy,
    )
    assert visual_tokens(processor) == expected
