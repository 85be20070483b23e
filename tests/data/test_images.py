import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from igpt.data import images
from tests.image_files import (
    RANDOM_16_BITS,
    RANDOM_RGB,
    RGB_HEIGHT,
    RGB_WIDTH,
    SMOOTH_RGB,
    decode_to_array,
    encode_image,
    grey_to_rgb,
    lossless_images,
    png_chunk,
    png_file,
    tiff_file,
)


@pytest.mark.parametrize("tile", [images.TILE, 5])
@pytest.mark.parametrize("name", lossless_images())
def test_every_lossless_mode_gives_its_pixels_whole_or_in_tiles(name, tile, monkeypatch):
    monkeypatch.setattr(images, "TILE", tile)
    content, expected = lossless_images()[name]
    # Blending rounds once; everything else is exact.
    np.testing.assert_allclose(decode_to_array(content), expected, atol=1.0 if "A" in name or "half" in name else 0.0)


def test_sixteen_bits_are_scaled_in_older_modes_too():
    for mode in (np.int32, ">u2"):
        found = np.asarray(images._convert(Image.fromarray(RANDOM_16_BITS.astype(mode)), 3))
        np.testing.assert_array_equal(found, grey_to_rgb(np.round(RANDOM_16_BITS / 257)))


@pytest.mark.parametrize("tile", [images.TILE, 5])
def test_one_channel_is_the_grey_of_the_colours(tile, monkeypatch):
    monkeypatch.setattr(images, "TILE", tile)
    luminance = RANDOM_RGB @ (0.299, 0.587, 0.114)
    np.testing.assert_allclose(
        decode_to_array(encode_image(Image.fromarray(RANDOM_RGB)), channels=1), grey_to_rgb(luminance), atol=0.51
    )


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}, {"format": "WEBP"}])
def test_lossy_files_give_nearly_their_pixels(mode, options):
    options = {"format": "JPEG", "quality": 95} | options
    if mode == "CMYK" and options["format"] == "WEBP":
        pytest.skip("WebP has no CMYK")
    image = Image.fromarray(SMOOTH_RGB).convert(mode)
    found = decode_to_array(encode_image(image, **options)).astype(int)
    expected = SMOOTH_RGB if mode != "L" else grey_to_rgb(np.round(SMOOTH_RGB @ (0.299, 0.587, 0.114)))
    assert np.abs(found - expected).mean() < 4.0


def turned(stored, orientation):
    """What a picture `stored` so is to look like, by EXIF's table: the 0th row and column are ..."""
    return {
        1: stored,  # top, left
        2: stored[:, ::-1],  # top, right
        3: stored[::-1, ::-1],  # bottom, right
        4: stored[::-1],  # bottom, left
        5: stored.transpose(1, 0, 2),  # left, top
        6: stored.transpose(1, 0, 2)[:, ::-1],  # right, top
        7: stored.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: stored.transpose(1, 0, 2)[::-1],  # left, bottom
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = encode_image(Image.fromarray(RANDOM_RGB), format, exif=exif, **options)
        np.testing.assert_array_equal(decode_to_array(content), turned(RANDOM_RGB, orientation))
    found = decode_to_array(encode_image(Image.fromarray(SMOOTH_RGB), "JPEG", exif=exif, quality=95)).astype(int)
    assert np.abs(found - turned(SMOOTH_RGB, orientation)).mean() < 4.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encode_image(Image.fromarray(np.float32(RANDOM_16_BITS) / 65535), "TIFF"), "a TIFF of 32-bit floats; save it"),
        (encode_image(Image.fromarray(RANDOM_16_BITS.astype(np.int32)), "TIFF"), "a TIFF of 32-bit signed integers;"),
        (encode_image(Image.fromarray(RANDOM_RGB), "TIFF", compression="lzma"), "a TIFF compressed by lzma; save it"),
    ],
    ids=["float", "32 bits", "rare compression"],
)
def test_a_tiff_without_a_known_scale_or_of_a_rare_kind_is_refused(content, message):
    with pytest.raises(images.UnreadableImage, match=f"it is {message}"):
        decode_to_array(content)


def test_a_tiff_whose_zero_is_white_is_turned_around_or_refused():
    grey = RANDOM_RGB[..., 0]
    found = decode_to_array(tiff_file(RGB_WIDTH, RGB_HEIGHT, grey.tobytes(), photometric=0))
    np.testing.assert_array_equal(found, grey_to_rgb(255 - grey))
    with pytest.raises(images.UnreadableImage, match="16-bit unsigned integers where 0 is white; save it"):
        decode_to_array(tiff_file(RGB_WIDTH, RGB_HEIGHT, RANDOM_16_BITS.tobytes(), bits=(16,), photometric=0))


def test_colours_of_sixteen_bits_are_scaled():
    values = np.random.default_rng(4).integers(0, 65536, (RGB_HEIGHT, RGB_WIDTH, 3)).astype("<u2")
    found = decode_to_array(tiff_file(RGB_WIDTH, RGB_HEIGHT, values.tobytes(), bits=(16, 16, 16), photometric=2))
    np.testing.assert_allclose(found, values / 257, atol=1.0)


def test_damaged_notes_do_not_spoil_a_picture():
    content = encode_image(Image.fromarray(SMOOTH_RGB), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage")
    assert decode_to_array(content).shape == SMOOTH_RGB.shape
    rows = b"".join(b"\0" + row.tobytes() for row in RANDOM_RGB)
    content = png_file(
        RGB_WIDTH, RGB_HEIGHT, png_chunk(b"eXIf", b"no directory"), png_chunk(b"IDAT", zlib.compress(rows))
    )
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(content)).getexif()
    np.testing.assert_array_equal(decode_to_array(content), RANDOM_RGB)


def test_several_photos_in_one_jpeg_give_the_first(tmp_path):
    content = encode_image(
        Image.fromarray(SMOOTH_RGB), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))]
    )
    assert np.abs(decode_to_array(content).astype(int) - SMOOTH_RGB).mean() < 4.0


def test_a_file_is_known_by_its_content_not_by_its_name(tmp_path):
    Image.fromarray(RANDOM_RGB).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "b.jpg")
    np.testing.assert_array_equal(decode_to_array(tmp_path / "b.jpg"), RANDOM_RGB)


def test_the_grey_of_sixteen_bits_that_is_transparent_is_white():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RANDOM_16_BITS)
    clear = png_chunk(b"tRNS", struct.pack(">H", RANDOM_16_BITS[2, 5]))
    found = decode_to_array(
        png_file(RGB_WIDTH, RGB_HEIGHT, clear, png_chunk(b"IDAT", zlib.compress(rows)), depth=16, color=0)
    )
    np.testing.assert_array_equal(
        found, grey_to_rgb(np.where(RANDOM_16_BITS[2, 5] == RANDOM_16_BITS, 255, np.round(RANDOM_16_BITS / 257)))
    )
