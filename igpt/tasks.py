"""The two things that train.py trains: what each draws as it trains, and what it leaves behind."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from igpt.codes import Codes
from igpt.data.examples import Source
from igpt.files import AnyPath, storage_errors
from igpt.interop.load import Pretrained
from igpt.plots import image_grid
from igpt.run.cluster import is_first_process
from igpt.sample import sample_images
from igpt.trained import Run


class Task(NamedTuple):
    """`picture` draws (model, source) -> uint8 [H, W, 3] or None. `result` is what train.run returns."""

    picture: Callable[[Pretrained, Source], np.ndarray | None]
    result: Callable[[AnyPath, Pretrained, Mapping], Run | Codes]


def samples(model: Pretrained, source: Source) -> np.ndarray | None:
    """A grid of new images. None if the network cannot begin one, or does not learn pixels."""
    config = model.config
    if not (config.model.sos and config.objective.generative):
        return None
    return image_grid(sample_images(model, config.train.num_samples, config.seed))


def trained_run(workdir: AnyPath, model: Pretrained, evaluation: Mapping) -> Run:
    return Run.of(model, workdir, evaluation)


def reconstructions(model: Pretrained, source: Source) -> np.ndarray:
    """Images of the validation split, and below them their reconstructions."""
    images = source.validation.images[: model.config.train.num_samples]
    codes = codes_of(model)
    return image_grid(np.concatenate([images, codes.decode(codes.encode(images))]), columns=len(images))


def trained_codes(workdir: AnyPath, model: Pretrained, evaluation: Mapping) -> Codes:
    """The tokenizer, which the directory keeps as vqvae.safetensors: what igpt prepare and config.tokenizer read."""
    codes = codes_of(model)
    if is_first_process():
        with storage_errors(workdir):
            codes.save(workdir / codes.file)
    return codes


def codes_of(model: Pretrained) -> Codes:
    return Codes(model.config.vqvae, nnx.to_pure_dict(nnx.state(model.model)))


TASKS = {"igpt": Task(samples, trained_run), "vqvae": Task(reconstructions, trained_codes)}
