import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from igpt import images
from igpt.images import UnreadableImage, decode, read_image

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


@pytest.mark.parametrize("format", ["TIFF", "PDF", "EPS", "ICO", "ICNS", "TGA", "PPM", "JPEG2000", "PCX", "DDS"])
def test_other_formats_are_refused_whatever_their_name(format, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (64, 64), "red"), format))
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be read as an image: it is no PNG, JPEG"):
        read_image(str(tmp_path / "a.png"), 8, 8, 3)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"8BPS\0\x01" + bytes(40), b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(UnreadableImage, match="photo cannot be read as an image"):
        decode(content, "photo")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_file_cut_short_is_refused(format):
    content = encoded(Image.effect_noise((97, 89), 90).convert("RGB"), format)
    for keep in (20, len(content) // 3, len(content) - 400):
        with pytest.raises(UnreadableImage, match="photo cannot be read as an image"):
            decode(content[:keep], "photo")


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "absent")
    for name, message in (("pipe", "is no file"), ("folder", "is no file"), ("link", "no image"), ("none", "no image")):
        with pytest.raises(UnreadableImage, match=rf"{message}|.*{name}\.png {message}"):
            read_image(str(tmp_path / f"{name}.png"), 8, 8, 3)


def test_a_file_that_may_not_be_opened_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "Denied")))
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be opened: Denied"):
        read_image(str(tmp_path / "a.png"), 8, 8, 3)


def chunk(kind, content) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, depth=8, color=2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def headers_of(width, height):
    """Files that are only headers, and claim to have so many pixels."""
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0) + b"\x08\x01\0\x3b"
    sof = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    vp8x = b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return {
        "png": png(width, height, chunk(b"IDAT", zlib.compress(bytes(99)))),
        "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0),
        "gif": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0xF0, 0, 0) + bytes(6) + frame,
        "jpeg": b"\xff\xd8" + sof + b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0",
        "webp": b"RIFF" + struct.pack("<I", len(vp8x) + 4) + b"WEBP" + vp8x,
    }


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "jpeg", "webp"])
@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (11_000, 10_000), (8192, 8193)])
def test_an_image_too_large_is_refused_by_its_header(kind, width, height):
    started = time.perf_counter()
    reason = "at most 67,108,864( pixels)? are opened"
    if kind == "webp":  # whose headers are checked more closely
        reason += "|cannot be read"
    with pytest.raises(UnreadableImage, match=f"photo .*({reason})"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decode(headers_of(width, height)[kind], "photo")
    assert time.perf_counter() - started < 1.0


def test_a_file_of_too_many_bytes_is_refused_unread(tmp_path, monkeypatch):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # takes no room on the disk
    monkeypatch.setattr("pathlib.Path.read_bytes", None)
    with pytest.raises(UnreadableImage, match=r"a\.png has 134,217,729 bytes; at most 134,217,728 are opened"):
        decode(tmp_path / "a.png", str(tmp_path / "a.png"))
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(UnreadableImage, match="it has 11 bytes; at most 10"):
        decode(bytes(11), "it")


def test_a_jpeg_of_endless_passes_is_refused():
    content = encoded(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    with pytest.raises(UnreadableImage, match="photo would be drawn in .* passes"):
        decode(content[:-2] + content[last:-2] * 5000 + content[-2:], "photo")
    assert decode(content, "photo").size == (4096, 4096)


MEMORY = """
import re, sys
from pathlib import Path
from igpt.images import UnreadableImage, decode

for path in sys.argv[1:]:
    try:
        print(decode(Path(path), path).size)
    except UnreadableImage as error:
        print(error)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak of memory where Linux keeps it")
def test_no_image_takes_a_gigabyte_or_a_word_on_the_terminal(tmp_path):
    side, bomb = 8192, zlib.compress(bytes(1 << 27), 1)
    assert side * side == images.MAX_PIXELS

    def rows(width):
        deflate = zlib.compressobj(1)
        return b"".join(deflate.compress(bytes(1 + width)) for _ in range(side)) + deflate.flush()

    notes = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage"
    files = {
        "deep.png": png(side, side, chunk(b"IDAT", rows(2 * side)), depth=16, color=0),
        "alpha.png": png(side, side, chunk(b"IDAT", rows(4 * side)), color=6),
        "cmyk.jpg": encoded(Image.new("CMYK", (side, side)), "JPEG", progressive=True),
        "large.webp": encoded(Image.new("RGBA", (5792, 5792)), "WEBP", lossless=True, quality=0, method=0),
        "notes.jpg": encoded(Image.fromarray(SMOOTH), "JPEG", exif=notes),
        "data.png": png(WIDTH, HEIGHT, chunk(b"IDAT", bomb)),
        "text.png": png(WIDTH, HEIGHT, chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"IDAT", bomb)),
        "icc.png": png(WIDTH, HEIGHT, chunk(b"iCCP", b"a\0\0" + bomb), chunk(b"IDAT", bomb)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    made = subprocess.run(
        [sys.executable, "-c", MEMORY, *(tmp_path / name for name in files)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    *results, peak = made.stdout.splitlines()
    assert made.stderr == ""
    assert results[:5] == ["(8192, 8192)"] * 3 + ["(5792, 5792)", "(64, 48)"]
    assert all(result == "(13, 11)" or "cannot be read" in result for result in results[5:]) and len(results) == 8
    assert int(peak) < 1 << 20  # KiB


def mutations(content, rng, count):
    for _ in range(count):
        bytes_ = bytearray(content)
        match rng.integers(5):
            case 0:
                bytes_ = bytes_[: rng.integers(len(bytes_))]
            case 1:
                start = rng.integers(len(bytes_))
                del bytes_[start : start + rng.integers(1, 40)]
            case 2:
                at = rng.integers(min(len(bytes_), 64))
                bytes_[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
            case 3:
                start, end = np.sort(rng.integers(len(bytes_), size=2))
                bytes_[start:start] = bytes_[start:end]
            case 4:
                for at in rng.integers(len(bytes_), size=rng.integers(1, 9)):
                    bytes_[at] = rng.integers(256)
        yield bytes(bytes_)


def test_damaged_files_are_decoded_or_refused_and_nothing_else():
    rng, outcomes = np.random.default_rng(5), {"decoded": 0, "refused": 0}
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = [content for content, _ in LOSSLESS.values()]
    originals += [encoded(Image.fromarray(SMOOTH), "JPEG", progressive=p, exif=exif) for p in (False, True)]
    originals += [encoded(Image.fromarray(SMOOTH), "WEBP")]
    for content in originals:
        for mutated in mutations(content, rng, 25):
            started = time.perf_counter()
            try:
                decode(mutated, "it", channels=int(rng.choice([1, 3])))
                outcomes["decoded"] += 1
            except UnreadableImage as error:
                assert "it " in str(error) and "0x" not in str(error)
                outcomes["refused"] += 1
            assert time.perf_counter() - started < 5.0
    assert min(outcomes.values()) > 50


def test_a_bomb_among_the_notes_is_refused():
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 21)))
    with pytest.raises(UnreadableImage, match="photo cannot be read as an image, it is damaged: Decompressed data too"):
        decode(png(WIDTH, HEIGHT, profile, chunk(b"IDAT", zlib.compress(bytes(999)))), "photo")


def test_the_grey_of_sixteen_bits_that_is_transparent_is_white():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP)
    clear = chunk(b"tRNS", struct.pack(">H", DEEP[2, 5]))
    found = array_of(png(WIDTH, HEIGHT, clear, chunk(b"IDAT", zlib.compress(rows)), depth=16, color=0))
    np.testing.assert_array_equal(found, grey(np.where(DEEP[2, 5] == DEEP, 255, np.round(DEEP / 257))))


def test_threads_decode_without_touching_what_they_share(monkeypatch):
    monkeypatch.setattr(warnings, "catch_warnings", None)  # it swaps the filters of all threads
    good, large, bad = encoded(Image.fromarray(COLORS)), headers_of(8192, 8193)["png"], b"hello"

    def attempt(content):
        try:
            return array_of(content)
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor(8) as threads:
        for content, result in zip([good, large, bad] * 50, threads.map(attempt, [good, large, bad] * 50), strict=True):
            if content is good:
                np.testing.assert_array_equal(result, COLORS)
            else:
                assert ("8192 x 8193" if content is large else "cannot be read") in result


def test_memory_that_runs_out_is_not_taken_for_a_bad_file(monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(images, "_rgb", exhausted)
    with pytest.raises(MemoryError):
        decode(encoded(Image.fromarray(COLORS)), "it")
