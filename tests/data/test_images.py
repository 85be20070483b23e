import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from igpt.data import images
from igpt.data.images import decode

HEIGHT, WIDTH = 11, 13
COLORS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
GREY = COLORS[..., 0]
INDEX = (GREY // 16).astype(np.uint8)  # into 16 colours
TABLE = np.random.default_rng(2).integers(0, 256, (16, 3), np.uint8)
DEEP = np.random.default_rng(3).integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(48)[:, None] * 5, np.arange(64) * 3, 90), -1).astype(np.uint8)


def encoded(image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def array_of(content, channels=3) -> np.ndarray:
    image = decode(content, "it", channels)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(array) -> np.ndarray:
    return np.repeat(np.asarray(array)[..., None], 3, -1)


def on_white(colors, alpha) -> np.ndarray:
    share = np.asarray(alpha)[..., None] / 255
    return share * colors + (1 - share) * 255


def indexed() -> Image.Image:
    image = Image.fromarray(INDEX)
    image.putpalette(TABLE.tobytes())
    return image


def chunk(kind, content) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, depth=8, color=2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def lossless():
    """name -> (a file, its pixels)."""
    rgb, luma = Image.fromarray(COLORS), Image.fromarray(GREY)
    rgba, la = rgb.copy(), luma.copy()
    rgba.putalpha(Image.fromarray(ALPHA))
    la.putalpha(Image.fromarray(ALPHA))
    hard = np.where(ALPHA > 127, 255, 0).astype(np.uint8)
    cut = rgb.copy()
    cut.putalpha(Image.fromarray(hard))
    colour = tuple(map(int, COLORS[3, 4]))
    by_index = np.arange(0, 256, 16, dtype=np.uint8)
    frames = dict(save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT), "red")], duration=9)
    files = {
        "png 1": (encoded(Image.fromarray(GREY > 127)), grey((GREY > 127) * 255)),
        "png L": (encoded(luma), grey(GREY)),
        "png L, one grey transparent": (
            encoded(luma, transparency=int(GREY[3, 4])),
            grey(np.where(GREY[3, 4] == GREY, 255, GREY)),
        ),
        "png LA": (encoded(la), on_white(grey(GREY), ALPHA)),
        "png P": (encoded(indexed()), TABLE[INDEX]),
        "png P, one colour transparent": (
            encoded(indexed(), transparency=5),
            np.where((INDEX == 5)[..., None], 255, TABLE[INDEX]),
        ),
        "png P, colours half transparent": (
            encoded(indexed(), transparency=by_index.tobytes()),
            on_white(TABLE[INDEX], by_index[INDEX]),
        ),
        "png RGB": (encoded(rgb), COLORS),
        "png RGB, one colour transparent": (
            encoded(rgb, transparency=colour),
            np.where((colour == COLORS).all(-1, keepdims=True), 255, COLORS),
        ),
        "png RGBA": (encoded(rgba), on_white(COLORS, ALPHA)),
        "png I;16": (encoded(Image.fromarray(DEEP)), grey(np.round(DEEP / 257))),
        "png animated": (encoded(rgb, **frames), COLORS),
        "bmp 1": (encoded(Image.fromarray(GREY > 127), "BMP"), grey((GREY > 127) * 255)),
        "bmp L": (encoded(luma, "BMP"), grey(GREY)),
        "bmp P": (encoded(indexed(), "BMP"), TABLE[INDEX]),
        "bmp RGB": (encoded(rgb, "BMP"), COLORS),
        "gif L": (encoded(luma, "GIF"), grey(GREY)),
        "gif P": (encoded(indexed(), "GIF"), TABLE[INDEX]),
        "gif animated": (
            encoded(indexed(), "GIF", save_all=True, append_images=[Image.new("P", (WIDTH, HEIGHT), 1)]),
            TABLE[INDEX],
        ),
        "gif transparent": (
            encoded(indexed(), "GIF", transparency=5),
            np.where((INDEX == 5)[..., None], 255, TABLE[INDEX]),
        ),
        "webp lossless": (encoded(rgb, "WEBP", lossless=True), COLORS),
        "webp lossless L": (encoded(luma, "WEBP", lossless=True), grey(GREY)),
        "webp lossless RGBA": (encoded(cut, "WEBP", lossless=True, exact=True), on_white(COLORS, hard)),
        "webp animated": (encoded(rgb, "WEBP", lossless=True, **frames), COLORS),
    }
    return files


LOSSLESS = lossless()


@pytest.mark.parametrize("tile", [images.TILE, 5])
@pytest.mark.parametrize("name", LOSSLESS)
def test_every_lossless_mode_gives_its_pixels_whole_or_in_tiles(name, tile, monkeypatch):
    monkeypatch.setattr(images, "TILE", tile)
    content, expected = LOSSLESS[name]
    # Blending rounds once; everything else is exact.
    np.testing.assert_allclose(array_of(content), expected, atol=1.0 if "A" in name or "half" in name else 0.0)


def test_sixteen_bits_are_scaled_in_older_modes_too():
    for mode in (np.int32, ">u2"):
        found = np.asarray(images._convert(Image.fromarray(DEEP.astype(mode)), 3))
        np.testing.assert_array_equal(found, grey(np.round(DEEP / 257)))


@pytest.mark.parametrize("tile", [images.TILE, 5])
def test_one_channel_is_the_grey_of_the_colours(tile, monkeypatch):
    monkeypatch.setattr(images, "TILE", tile)
    luminance = COLORS @ (0.299, 0.587, 0.114)
    np.testing.assert_allclose(array_of(encoded(Image.fromarray(COLORS)), channels=1), grey(luminance), atol=0.51)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}, {"format": "WEBP"}])
def test_lossy_files_give_nearly_their_pixels(mode, options):
    options = {"format": "JPEG", "quality": 95} | options
    if mode == "CMYK" and options["format"] == "WEBP":
        pytest.skip("WebP has no CMYK")
    image = Image.fromarray(SMOOTH).convert(mode)
    found = array_of(encoded(image, **options)).astype(int)
    expected = SMOOTH if mode != "L" else grey(np.round(SMOOTH @ (0.299, 0.587, 0.114)))
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
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        content = encoded(Image.fromarray(COLORS), format, exif=exif, **options)
        np.testing.assert_array_equal(array_of(content), turned(COLORS, orientation))
    found = array_of(encoded(Image.fromarray(SMOOTH), "JPEG", exif=exif, quality=95)).astype(int)
    assert np.abs(found - turned(SMOOTH, orientation)).mean() < 4.0


def test_damaged_notes_do_not_spoil_a_picture():
    content = encoded(Image.fromarray(SMOOTH), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage")
    assert array_of(content).shape == SMOOTH.shape
    rows = b"".join(b"\0" + row.tobytes() for row in COLORS)
    content = png(WIDTH, HEIGHT, chunk(b"eXIf", b"no directory"), chunk(b"IDAT", zlib.compress(rows)))
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(content)).getexif()
    np.testing.assert_array_equal(array_of(content), COLORS)


def test_several_photos_in_one_jpeg_give_the_first(tmp_path):
    content = encoded(Image.fromarray(SMOOTH), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    assert np.abs(array_of(content).astype(int) - SMOOTH).mean() < 4.0


def test_a_file_is_known_by_its_content_not_by_its_name(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "b.jpg")
    np.testing.assert_array_equal(array_of(tmp_path / "b.jpg"), COLORS)


def test_the_grey_of_sixteen_bits_that_is_transparent_is_white():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP)
    clear = chunk(b"tRNS", struct.pack(">H", DEEP[2, 5]))
    found = array_of(png(WIDTH, HEIGHT, clear, chunk(b"IDAT", zlib.compress(rows)), depth=16, color=0))
    np.testing.assert_array_equal(found, grey(np.where(DEEP[2, 5] == DEEP, 255, np.round(DEEP / 257))))
