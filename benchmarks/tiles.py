"""Cuts photographs into square tiles: a folder for each photograph, named after its file.

    python benchmarks/tiles.py --out=photos FILE...

Each photograph is scaled to a height of 640 pixels and cut into tiles of 64 x 64; what is left at its right is dropped.
docs/vqvae.md and docs/reproduce.md say which photographs made their tiles.
"""

import argparse
import itertools
from pathlib import Path

from PIL import Image

HEIGHT, SIDE = 640, 64


def cut(photograph: Image.Image, side: int, folder: Path) -> None:
    """Writes the tiles of a photograph as folder/TOP-LEFT.png."""
    folder.mkdir(parents=True)
    tops, lefts = (range(0, length - side + 1, side) for length in (photograph.height, photograph.width))
    for top, left in itertools.product(tops, lefts):
        photograph.crop((left, top, left + side, top + side)).save(folder / f"{top:03d}-{left:04d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, help="a new folder for the tiles")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    for path in args.photographs:
        with Image.open(path) as image:
            width = round(image.width * HEIGHT / image.height)
            cut(image.convert("RGB").resize((width, HEIGHT), Image.Resampling.LANCZOS), SIDE, args.out / path.stem)


if __name__ == "__main__":
    main()
