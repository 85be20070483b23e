"""Image files of every kind, written byte by byte where Pillow would not write them."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

from igpt.data.images import decode

RGB_HEIGHT, RGB_WIDTH = 11, 13
RANDOM_RGB = np.random.default_rng(0).integers(0, 256, (RGB_HEIGHT, RGB_WIDTH, 3), np.uint8)
RANDOM_ALPHA = np.random.default_rng(1).integers(0, 256, (RGB_HEIGHT, RGB_WIDTH), np.uint8)
RANDOM_16_BITS = np.random.default_rng(3).integers(0, 65536, (RGB_HEIGHT, RGB_WIDTH)).astype(np.uint16)
SMOOTH_RGB = np.stack(np.broadcast_arrays(np.arange(48)[:, None] * 5, np.arange(64) * 3, 90), -1).astype(np.uint8)


def encode_image(image, format="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decode_to_array(content, channels=3) -> np.ndarray:
    image = decode(content, "it", channels)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey_to_rgb(array) -> np.ndarray:
    return np.repeat(np.asarray(array)[..., None], 3, -1)


def png_chunk(kind, content) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_file(width, height, *chunks, depth=8, color=2) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def tiff_file(width, height, content=b"", bits=(8,), photometric=1, kind=1, tile=None) -> bytes:
    """An uncompressed little-endian TIFF file with any header. `kind`: 1 unsigned, 2 signed, 3 floats."""
    strips = {278: [height], 273: [0], 279: [len(content)]}
    if tile:
        strips = {322: [tile], 323: [tile], 324: [0], 325: [len(content)]}
    tags = {
        256: [width],
        257: [height],
        258: [*bits],
        259: [1],
        262: [photometric],
        277: [len(bits)],
        339: [kind] * len(bits),
    }
    tags = dict(sorted((tags | strips).items()))
    end = 8 + 2 + 12 * len(tags) + 4
    values, entries = b"", b""
    for tag, numbers in tags.items():
        at = end + len(values)
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        values += packed if len(numbers) > 1 else b""
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + (packed if len(numbers) == 1 else struct.pack("<I", at))
    start = struct.pack("<I", end + len(values))
    for tag in (273, 324):
        entries = entries.replace(struct.pack("<HHII", tag, 4, 1, 0), struct.pack("<HHI", tag, 4, 1) + start)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + values + content


@functools.cache
def lossless_images():
    """name -> (a file, its pixels), for every lossless mode that we read."""
    colors, alpha, gray = RANDOM_RGB, RANDOM_ALPHA, RANDOM_RGB[..., 0]
    indices = (gray // 16).astype(np.uint8)  # into 16 colours
    table = np.random.default_rng(2).integers(0, 256, (16, 3), np.uint8)

    def on_white(colors, alpha) -> np.ndarray:
        share = np.asarray(alpha)[..., None] / 255
        return share * colors + (1 - share) * 255

    def indexed() -> Image.Image:
        image = Image.fromarray(indices)
        image.putpalette(table.tobytes())
        return image

    rgb, luma = Image.fromarray(colors), Image.fromarray(gray)
    rgba, la = rgb.copy(), luma.copy()
    rgba.putalpha(Image.fromarray(alpha))
    la.putalpha(Image.fromarray(alpha))
    hard = np.where(alpha > 127, 255, 0).astype(np.uint8)
    cut = rgb.copy()
    cut.putalpha(Image.fromarray(hard))
    color = tuple(map(int, colors[3, 4]))
    deep, deep_big_endian = Image.fromarray(RANDOM_16_BITS), Image.fromarray(RANDOM_16_BITS.astype(">u2"))
    by_index = np.arange(0, 256, 16, dtype=np.uint8)
    frames = dict(save_all=True, append_images=[Image.new("RGB", (RGB_WIDTH, RGB_HEIGHT), "red")], duration=9)
    gif_frames = dict(save_all=True, append_images=[Image.new("P", (RGB_WIDTH, RGB_HEIGHT), 1)])
    return {
        "png 1": (encode_image(Image.fromarray(gray > 127)), grey_to_rgb((gray > 127) * 255)),
        "png L": (encode_image(luma), grey_to_rgb(gray)),
        "png L, one grey transparent": (
            encode_image(luma, transparency=int(gray[3, 4])),
            grey_to_rgb(np.where(gray[3, 4] == gray, 255, gray)),
        ),
        "png LA": (encode_image(la), on_white(grey_to_rgb(gray), alpha)),
        "png P": (encode_image(indexed()), table[indices]),
        "png P, one colour transparent": (
            encode_image(indexed(), transparency=5),
            np.where((indices == 5)[..., None], 255, table[indices]),
        ),
        "png P, colours half transparent": (
            encode_image(indexed(), transparency=by_index.tobytes()),
            on_white(table[indices], by_index[indices]),
        ),
        "png RGB": (encode_image(rgb), colors),
        "png RGB, one colour transparent": (
            encode_image(rgb, transparency=color),
            np.where((color == colors).all(-1, keepdims=True), 255, colors),
        ),
        "png RGBA": (encode_image(rgba), on_white(colors, alpha)),
        "png I;16": (encode_image(Image.fromarray(RANDOM_16_BITS)), grey_to_rgb(np.round(RANDOM_16_BITS / 257))),
        "png animated": (encode_image(rgb, **frames), colors),
        "tiff 1": (encode_image(Image.fromarray(gray > 127), "TIFF"), grey_to_rgb((gray > 127) * 255)),
        "tiff L": (encode_image(luma, "TIFF", compression="tiff_lzw"), grey_to_rgb(gray)),
        "tiff LA": (encode_image(la, "TIFF"), on_white(grey_to_rgb(gray), alpha)),
        "tiff P": (encode_image(indexed(), "TIFF", compression="packbits"), table[indices]),
        "tiff RGB": (encode_image(rgb, "TIFF", compression="tiff_adobe_deflate"), colors),
        "tiff RGBA": (encode_image(rgba, "TIFF"), on_white(colors, alpha)),
        "tiff I;16": (encode_image(deep, "TIFF"), grey_to_rgb(np.round(RANDOM_16_BITS / 257))),
        "tiff I;16B": (encode_image(deep_big_endian, "TIFF"), grey_to_rgb(np.round(RANDOM_16_BITS / 257))),
        "tiff of two pages": (encode_image(rgb, "TIFF", save_all=True, append_images=[luma]), colors),
        "bmp 1": (encode_image(Image.fromarray(gray > 127), "BMP"), grey_to_rgb((gray > 127) * 255)),
        "bmp L": (encode_image(luma, "BMP"), grey_to_rgb(gray)),
        "bmp P": (encode_image(indexed(), "BMP"), table[indices]),
        "bmp RGB": (encode_image(rgb, "BMP"), colors),
        "gif L": (encode_image(luma, "GIF"), grey_to_rgb(gray)),
        "gif P": (encode_image(indexed(), "GIF"), table[indices]),
        "gif animated": (encode_image(indexed(), "GIF", **gif_frames), table[indices]),
        "gif transparent": (
            encode_image(indexed(), "GIF", transparency=5),
            np.where((indices == 5)[..., None], 255, table[indices]),
        ),
        "webp lossless": (encode_image(rgb, "WEBP", lossless=True), colors),
        "webp lossless L": (encode_image(luma, "WEBP", lossless=True), grey_to_rgb(gray)),
        "webp lossless RGBA": (encode_image(cut, "WEBP", lossless=True, exact=True), on_white(colors, hard)),
        "webp animated": (encode_image(rgb, "WEBP", lossless=True, **frames), colors),
    }
