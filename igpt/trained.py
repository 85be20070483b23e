"""`igpt.load`: a trained model with its uses as methods, for Python and notebooks.

    run = igpt.load("runs/digits")
    run.sample(16)  # a notebook shows the images

Images go in as PIL images or arrays of bytes, and come out as arrays of bytes. The commands `igpt sample` and
`igpt predict` call the same functions, so that the same seed gives the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import SupportsIndex

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from igpt.data.classes import full_names
from igpt.data.examples import ArrayImages, Split
from igpt.data.images import Preprocess
from igpt.draw import Sampling
from igpt.errors import UserError
from igpt.interop.hub import resolve
from igpt.interop.load import Pretrained, picture_settings
from igpt.interop.load import load as load_pretrained
from igpt.interop.pixels import rgb_batches
from igpt.pictures import Pictures
from igpt.predict import best_classes, predict
from igpt.probe.features import stream_features
from igpt.probe.selection import chosen_layers
from igpt.sample import complete_images, sample_images
from igpt.sharding import batch_shards, one_device
from igpt.track.lines import records


class Run(Pretrained):
    """A model with everything that is needed to use it (see Pretrained), and its uses.

    path: its directory. evaluation: the metrics of the last evaluation by `train.run`, {} for a model that was loaded.
    """

    path = None
    evaluation: Mapping = MappingProxyType({})

    @classmethod
    def of(cls, model: Pretrained, path, evaluation: Mapping = MappingProxyType({})) -> "Run":
        run = cls(*model)
        run.path, run.evaluation = path, evaluation
        return run

    @property
    def mesh(self) -> Mesh:
        """The devices of the parameters."""
        placement = jax.tree.leaves(nnx.state(self.model))[0].sharding
        return getattr(placement, "mesh", None) or one_device()

    def sample(
        self, num: int = 16, *, seed: int = 0, temperature=1.0, top_k: int = 0, top_p=1.0, batch_size: int = 64
    ) -> Pictures:
        """Samples images [num, H, W, 3], as `igpt sample` does."""
        sampling = Sampling(temperature, top_k, top_p)
        with jax.set_mesh(self.mesh):
            return sample_images(self, num, seed, sampling, batch_size).view(Pictures)

    def complete(
        self,
        images,
        keep: float = 0.5,
        num: int = 7,
        *,
        seed: int = 0,
        temperature=1.0,
        top_k: int = 0,
        top_p=1.0,
        batch_size: int = 64,
    ) -> Pictures:
        """Continues the upper part of each of N images in `num` ways: [N, num, H, W, 3]. `keep` is the part's share.

        Images of another size are cut to the model's aspect ratio and resized, as `igpt sample --complete` does.
        """
        images = self.prepared(images, "shrink")
        sampling = Sampling(temperature, top_k, top_p)
        with jax.set_mesh(self.mesh):
            return complete_images(self, images, keep, num, seed, sampling, batch_size).view(Pictures)

    def features(
        self,
        images,
        layers: SupportsIndex | Sequence[int] | None = None,
        batch_size: int = 64,
        preprocess: str | None = None,
    ) -> Float[np.ndarray, "*l N D"]:
        """The mean features of `layers` (default: all) of each of N images: [l, N, D], or [N, D] for one number.

        Layer 0 is the embedding, and the last one the final norm. A BERT network reads whole images here. `preprocess`:
        see `prepared`.
        """
        depth = self.model.config.depth
        wanted = range(depth + 1) if layers is None else np.atleast_1d(layers).tolist()
        if not wanted or not all(isinstance(layer, int) for layer in wanted):
            raise UserError(f"layers is {layers!r}; give whole numbers from 0 to {depth}, or None for all")
        _check_counts(batch_size=batch_size)
        chosen_layers(wanted, depth)
        images = self.prepared(images, preprocess)
        split = Split(ArrayImages(images), np.zeros(len(images), np.int32))
        batch_size = min(batch_size, len(images))
        batch_size += -batch_size % batch_shards(self.mesh)
        stream = stream_features(self.model, split, self.tokenizer, batch_size, self.mesh, tuple(wanted))
        features = np.concatenate([rows[:, :, 0] for rows, _ in stream])  # [N, l, D]
        return features[:, 0] if layers is not None and np.ndim(layers) == 0 else np.moveaxis(features, 1, 0)

    def predict(
        self, images, top: int = 5, masks: int = 5, batch_size: int = 64, preprocess: str | None = None
    ) -> list[list[dict]]:
        """The `top` likeliest classes of each image: [{"class": name, "probability": share}, ...], the best first.

        Equal to the JSON of `igpt predict`, which crops images of the model's size, too. `preprocess`: see `prepared`.
        Raises UserError if the model has no classifier.
        """
        _check_counts(top=top, masks=masks, batch_size=batch_size)
        split = Split(ArrayImages(self.prepared(images, preprocess)), None)
        shares = predict(self, split, batch_size, masks, self.mesh)
        names = full_names(self.class_names, shares.shape[1])
        return [best_classes(of_image, names, top) for of_image in shares]

    def metrics(self) -> list[dict]:
        """The records of the run's metrics.jsonl, in the order of training. [] if there are none."""
        return records(self.path) if self.path else []

    def prepared(self, images, preprocess: str | None = None) -> UInt8[np.ndarray, "N H W 3"]:
        """PIL images or arrays of any size as the model reads them.

        preprocess: none, shrink or crop. By default, images of the model's size, such as samples, are taken as they
        are, and others are resized as in the run's evaluation.
        """
        settings = picture_settings(self.config, preprocess)
        batches, _ = rgb_batches(images, layout="channels_last", convert_rgb=True, upright=True)
        arrays = [image for batch in batches for image in batch]
        if settings.channels == 1:
            arrays = [np.asarray(Image.fromarray(image).convert("L").convert("RGB")) for image in arrays]
        resize, size = Preprocess.of(settings), tuple(settings.image_size)
        for i, image in enumerate(arrays):
            if preprocess or image.shape[:2] != size:
                arrays[i] = resize(Image.fromarray(image), None, f"image {i}")
        return np.stack(arrays)

    def __repr__(self) -> str:
        height, width = self.config.data.image_size
        model, count = self.model.config, sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(self.model)))
        what = f"{model.num_classes} classes" if model.num_classes else "causal" if model.causal else "BERT"
        where = f" {self.path}" if self.path else ""
        return (
            f"<igpt.Run{where}, step {self.step}: {height} x {width} pixels of {model.vocab_size} "
            f"{self.tokenizer.noun}, {what}, width {model.width}, depth {model.depth}, {count:,} parameters>"
        )


def _check_counts(**counts) -> None:
    """Raises UserError unless all are whole numbers of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise UserError(f"{name} is {value!r}; give a whole number of at least 1")


def load(ref: str | Path, step: int | None = None, mesh: Mesh | None = None) -> Run:
    """Loads the model `ref`: a run directory, a Hugging Face directory or a hub id.

    step: the checkpoint to load. The default is the newest, or in a fine-tuned run the best on the validation images.
    mesh: the devices to load it onto, by default one. Raises UserError when there is no such model, or when it is
    damaged. No code in the files is executed.
    """
    directory = resolve(ref)
    return Run.of(load_pretrained(directory, step, mesh), directory)
