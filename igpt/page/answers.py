"""What the page asks a model for: images drawn row by row, the probe's curve, the nearest training images."""

import functools
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from igpt.data.classes import full_names
from igpt.data.images import Preprocess, decode
from igpt.data.sources import open_source
from igpt.draw import Sampling
from igpt.errors import UserError
from igpt.files import as_path, read_json
from igpt.interop.load import picture_settings
from igpt.pictures import Pictures
from igpt.probe.neighbours import unit
from igpt.rows import completed_rows, sampled_rows
from igpt.trained import Run

MOST_AT_ONCE = 16  # pictures that are drawn together
EXAMPLES = 8  # pictures of the test split
NEIGHBOURS = 8


class Answers:
    """Answers for one model. One drawing or search runs at a time. Raises UserError for a wrong request."""

    def __init__(self, run: Run, train_images: int, probe: str | Path | None = None):
        self.run, self.data = run, run.config.data
        self.computing, self.decoding = threading.Lock(), threading.Lock()
        self.probe_folder = as_path(probe) if probe else run.path / "probe"
        if self.probe_folder.is_file():
            self.probe_folder = self.probe_folder.parent
        self.probe = read_json(self.probe_folder / "probe.json") if self._has_probe(probe) else None
        self.accuracies, self.best_layer, self.probe_step = self._accuracies()
        self.examples, self.train, self.why_no_data = None, None, ""
        try:
            if self.data.source:
                source = open_source(self.data)
                self.examples, self.train, self.names = source.test.images[:EXAMPLES], source.train, source.class_names
        except UserError as error:  # the images may be on another machine
            self.why_no_data = str(error)
        if self.train is not None and len(self.train) > train_images:
            self.train = self.train.some(train_images)
        self._features = functools.lru_cache(maxsize=4)(self._features)

    def _has_probe(self, asked: str | Path | None) -> bool:
        found = (self.probe_folder / "probe.json").is_file()
        if asked and not found:
            raise UserError(f"--probe={asked} has no probe.json; eval_probe.py --workdir={asked} writes it")
        return found

    def _accuracies(self) -> tuple[dict[int, float], int, int | None]:
        """The probe's accuracy of each layer, its best layer, and its step, or None if that is the run's.

        If it has no results of the run's step, these are its main results.
        """
        depth = self.run.model.config.depth
        if self.probe is None:
            return {}, depth // 2, None
        path, remedy = self.probe_folder / "probe.json", "name the folder of this model's probe: --probe"
        try:
            main = {"step": self.probe.get("step")} | self.probe["pretrained"]
            fits = next((fits for fits in self.probe.get("checkpoints", []) if fits["step"] == self.run.step), main)
            accuracies = {int(fit["layer"]): float(fit["test_accuracy"]) for fit in fits["layers"]}
            best, step, deepest = int(fits["best_layer"]), fits["step"], max(accuracies)
        except (KeyError, TypeError, ValueError):  # another program may have written the file
            raise UserError(f"{path} is no result of eval_probe.py; {remedy}, or remove the file") from None
        if deepest > depth:
            problem = f"{path} is of a model with layer {deepest}, and this one has layers 0 to {depth}"
            raise UserError(f"{problem}; {remedy}")
        return accuracies, best, None if step == self.run.step else step

    def about(self) -> dict:
        """What the page shows at its start."""
        model = self.run.model.config
        return {
            "text": repr(self.run).strip("<>").removeprefix("igpt.Run "),
            "rows": self.run.tokenizer.grid(*self.data.image_size)[0],  # of tokens: so many steps draw an image
            "noun": self.run.tokenizer.noun,
            "causal": model.causal,
            "can_complete": bool(model.causal and model.pixel_head),
            "can_sample": bool(model.causal and model.pixel_head and model.sos),
            "vocab_size": model.vocab_size,
            "layers": [{"layer": i, "accuracy": self.accuracies.get(i)} for i in range(model.depth + 1)],
            "best_layer": self.best_layer,
            "probe_step": self.probe_step,  # None: the accuracies are those of this step
            "has_probe_picture": bool(self.probe) and (self.probe_folder / "probe.png").is_file(),
            "examples": 0 if self.examples is None else len(self.examples),
            "train_images": 0 if self.train is None else len(self.train),
            "why_no_data": self.why_no_data or "The run does not know its training images.",
        }

    def picture(self, content: bytes, example: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
        """An uploaded file, or an image of the test split, as the model reads it."""
        if example is None:
            with self.decoding:  # one picture may take a gigabyte
                image = decode(content, "the picture", self.data.channels)
                return Preprocess.of(picture_settings(self.run.config, "shrink"))(image, None, "the picture")
        if self.examples is None or not 0 <= example < len(self.examples):
            raise UserError(f"there is no example {example}")
        return np.asarray(self.examples[example])

    def quantised(self, image: np.ndarray) -> np.ndarray:
        """The image as its tokens keep it."""
        return self.run.tokenizer.decode(self.run.tokenizer.encode(image))

    def complete(self, image, keep: float, num: int, seed: int, sampling: Sampling) -> Iterator[Pictures]:
        """The continuations after each row: see `completed_rows`."""
        check_number(num)
        return completed_rows(self.run, image, keep, num, seed, sampling)

    def sample(self, num: int, seed: int, sampling: Sampling) -> Iterator[Pictures]:
        """New images after each row: see `sampled_rows`."""
        check_number(num)
        return sampled_rows(self.run, num, seed, sampling)

    def nearest(self, image, layer: int) -> list[tuple[np.ndarray, float, str]]:
        """The training images whose features are the most similar: (image, cosine, class), the most similar first."""
        if self.train is None:
            raise UserError(self.about()["why_no_data"])
        (own,) = unit(self.run.features(image, layer))
        features, indices = self._features(layer)
        cosines = features @ own
        order = np.argsort(-cosines, kind="stable")[:NEIGHBOURS]
        images, _ = self.train.read(indices[order])
        found = zip(images, cosines[order].tolist(), indices[order].tolist(), strict=True)
        return [(image, cosine, self._class(index)) for image, cosine, index in found]

    def _features(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Features of the training images that can be read, and the indices of these images."""
        wanted = np.arange(len(self.train))
        images, used = self.train.read(wanted)
        readable = used == wanted  # another image stands in for one that cannot be read
        return unit(self.run.features(images[readable], layer)), wanted[readable]

    def _class(self, index: int) -> str:
        if self.train.labels is None:
            return ""
        label = int(self.train.labels[np.array([index])][0])
        if label < 0:  # this image has none
            return ""
        return full_names(self.names, label + 1)[label] if self.names else str(label)


def check_number(num: int) -> None:
    """Raises UserError unless so many pictures may be drawn together."""
    if not 1 <= num <= MOST_AT_ONCE:
        raise UserError(f"{num} pictures were asked for; the page draws 1 to {MOST_AT_ONCE}")


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(file, format="PNG")
    return file.getvalue()
