"""Pictures from strangers: refused by what they are, bounded in memory and time, never a surprise."""

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

from igpt.data import images
from igpt.data.images import UnreadableImage, decode, read_image
from igpt.data.settings import DataConfig
from tests.image_files import (
    RANDOM_RGB,
    RGB_HEIGHT,
    RGB_WIDTH,
    SMOOTH_RGB,
    decode_to_array,
    encode_image,
    lossless_images,
    png_chunk,
    png_file,
    tiff_file,
)

SETTINGS = DataConfig("", (8, 8), 3)


@pytest.mark.parametrize("format", ["PDF", "EPS", "ICO", "ICNS", "TGA", "PPM", "JPEG2000", "PCX", "DDS"])
def test_other_formats_are_refused_whatever_their_name(format, tmp_path):
    (tmp_path / "a.png").write_bytes(encode_image(Image.new("RGB", (64, 64), "red"), format))
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be read as an image: it is no PNG, JPEG"):
        read_image(str(tmp_path / "a.png"), SETTINGS)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"8BPS\0\x01" + bytes(40), b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(UnreadableImage, match="photo cannot be read as an image"):
        decode(content, "photo")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_cut_short_is_refused(format):
    content = encode_image(Image.effect_noise((97, 89), 90).convert("RGB"), format)
    for keep in (20, len(content) // 3, len(content) - 400):
        with pytest.raises(UnreadableImage, match="photo cannot be read as an image"):
            decode(content[:keep], "photo")


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "absent")
    for name, message in (("pipe", "is no file"), ("folder", "is no file"), ("link", "no image"), ("none", "no image")):
        with pytest.raises(UnreadableImage, match=rf"{message}|.*{name}\.png {message}"):
            read_image(str(tmp_path / f"{name}.png"), SETTINGS)


def test_a_file_that_may_not_be_opened_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "Denied")))
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be opened: Denied"):
        read_image(str(tmp_path / "a.png"), SETTINGS)


def headers_of(width, height):
    """Files that are only headers, and claim to have so many pixels."""
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0) + b"\x08\x01\0\x3b"
    sof = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    vp8x = b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return {
        "png": png_file(width, height, png_chunk(b"IDAT", zlib.compress(bytes(99)))),
        "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0),
        "gif": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0xF0, 0, 0) + bytes(6) + frame,
        "jpeg": b"\xff\xd8" + sof + b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0",
        "tiff": tiff_file(width, height, bytes(99)),
        "webp": b"RIFF" + struct.pack("<I", len(vp8x) + 4) + b"WEBP" + vp8x,
    }


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "jpeg", "tiff", "webp"])
@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (11_000, 10_000), (8192, 8193)])
def test_an_image_too_large_is_refused_by_its_header(kind, width, height):
    started = time.process_time()
    reason = "the limit is 67,108,864"
    if kind == "webp":  # whose headers are checked more closely
        reason += "|cannot be read"
    with pytest.raises(UnreadableImage, match=f"photo .*({reason})"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decode(headers_of(width, height)[kind], "photo")
    assert time.process_time() - started < 1.0


def test_a_small_tiff_of_one_enormous_tile_is_refused():
    with pytest.raises(UnreadableImage, match="photo has .* pixels; the limit is 67,108,864"):
        decode(tiff_file(16, 16, bytes(99), tile=1 << 15), "photo")


def test_a_file_of_too_many_bytes_is_refused_unread(tmp_path, monkeypatch):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # takes no room on the disk
    monkeypatch.setattr("pathlib.Path.read_bytes", None)
    with pytest.raises(UnreadableImage, match=r"a\.png has 134,217,729 bytes; the limit is 134,217,728"):
        decode(tmp_path / "a.png", str(tmp_path / "a.png"))
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(UnreadableImage, match="it has 11 bytes; the limit is 10"):
        decode(bytes(11), "it")


def test_a_jpeg_of_endless_passes_is_refused():
    content = encode_image(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    with pytest.raises(UnreadableImage, match="photo would be drawn in .* passes"):
        decode(content[:-2] + content[last:-2] * 5000 + content[-2:], "photo")
    assert decode(content, "photo").size == (4096, 4096)


MEMORY = """
import re, sys
from pathlib import Path
from igpt.data.images import UnreadableImage, decode

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
        "deep.png": png_file(side, side, png_chunk(b"IDAT", rows(2 * side)), depth=16, color=0),
        "alpha.png": png_file(side, side, png_chunk(b"IDAT", rows(4 * side)), color=6),
        "large.tif": encode_image(Image.new("RGBA", (side, side)), "TIFF", compression="tiff_adobe_deflate"),
        "cmyk.jpg": encode_image(Image.new("CMYK", (side, side)), "JPEG", progressive=True),
        "large.webp": encode_image(Image.new("RGBA", (5792, 5792)), "WEBP", lossless=True, quality=0, method=0),
        "notes.jpg": encode_image(Image.fromarray(SMOOTH_RGB), "JPEG", exif=notes),
        "data.png": png_file(RGB_WIDTH, RGB_HEIGHT, png_chunk(b"IDAT", bomb)),
        "text.png": png_file(RGB_WIDTH, RGB_HEIGHT, png_chunk(b"zTXt", b"a\0\0" + bomb), png_chunk(b"IDAT", bomb)),
        "icc.png": png_file(RGB_WIDTH, RGB_HEIGHT, png_chunk(b"iCCP", b"a\0\0" + bomb), png_chunk(b"IDAT", bomb)),
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
    assert results[:6] == ["(8192, 8192)"] * 4 + ["(5792, 5792)", "(64, 48)"]
    assert all(result == "(13, 11)" or "cannot be read" in result for result in results[6:]) and len(results) == 9
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
    originals = [content for content, _ in lossless_images().values()]
    originals += [encode_image(Image.fromarray(SMOOTH_RGB), "JPEG", progressive=p, exif=exif) for p in (False, True)]
    originals += [encode_image(Image.fromarray(SMOOTH_RGB), "WEBP")]
    for content in originals:
        for mutated in mutations(content, rng, 25):
            started = time.process_time()
            try:
                decode(mutated, "it", channels=int(rng.choice([1, 3])))
                outcomes["decoded"] += 1
            except UnreadableImage as error:
                assert "it " in str(error) and "0x" not in str(error)
                outcomes["refused"] += 1
            assert time.process_time() - started < 5.0
    assert min(outcomes.values()) > 50


def test_a_bomb_among_the_notes_is_refused():
    profile = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 21)))
    with pytest.raises(UnreadableImage, match="photo cannot be read as an image, it is damaged: Decompressed data too"):
        decode(png_file(RGB_WIDTH, RGB_HEIGHT, profile, png_chunk(b"IDAT", zlib.compress(bytes(999)))), "photo")


def test_threads_decode_without_touching_what_they_share(monkeypatch):
    good, large, bad = encode_image(Image.fromarray(RANDOM_RGB)), headers_of(8192, 8193)["png"], b"hello"

    def attempt(content):
        try:
            return decode_to_array(content)
        except UnreadableImage as error:
            return str(error)

    with monkeypatch.context() as patched, ThreadPoolExecutor(8) as threads:
        patched.setattr(warnings, "catch_warnings", None)  # it swaps the filters of all threads
        results = list(threads.map(attempt, [good, large, bad] * 50))
    for content, result in zip([good, large, bad] * 50, results, strict=True):
        if content is good:
            np.testing.assert_array_equal(result, RANDOM_RGB)
        else:
            assert ("8192 x 8193" if content is large else "cannot be read") in result


def test_memory_that_runs_out_is_not_taken_for_a_bad_file(monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(images, "_rgb", exhausted)
    with pytest.raises(MemoryError):
        decode(encode_image(Image.fromarray(RANDOM_RGB)), "it")
