"""A trained VQ-VAE as a tokenizer: images <-> grids of codes, and its file vqvae.safetensors.

The file has the network's configuration in its header and the arrays by name, such as encoder.down_0.kernel. Kernels
are [k, k, in, out]. docs/vqvae.md has a PyTorch module that reads it. Encoding and decoding run on this process's first
device, in float32, a few images at a time.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from safetensors.numpy import load as read_tensors
from safetensors.numpy import save as tensor_bytes

from igpt.errors import UserError, first_line
from igpt.fields import make_section
from igpt.files import AnyPath, open_binary, whole
from igpt.vqvae import VQVAE, VQConfig, nearest, to_units

PIXELS_AT_ONCE = 1 << 17  # pixels of the images that pass the network together
HEADER = "igpt.vqvae"  # the one entry of the file's metadata: the configuration as JSON


class Codes:
    """The tokenizer of a VQ-VAE's configuration and parameters (nested dicts of arrays)."""

    file, kind, place, noun = "vqvae.safetensors", "VQ-VAE", "code", "codes"
    bits_name = "bits_per_dim_of_codes"
    is_per_pixel, uses_all_cores, colors = False, True, None

    def __init__(self, config: VQConfig, params: dict):
        self.config = config
        self.params = jax.tree.map(np.asarray, params)

    @property
    def vocab_size(self) -> int:
        return self.config.codes

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self._file()).hexdigest()

    @property
    def content(self) -> np.ndarray:
        return np.frombuffer(self._file(), np.uint8)

    def fields(self, path) -> dict:
        """The fields of a configuration whose network reads these tokens, from the tokenizer at `path`."""
        return {"tokenizer": path, "vqvae.codes": self.config.codes, "vqvae.stride": self.config.stride}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.config.grid(height, width)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """[..., H, W, 3] uint8 -> [..., H / stride, W / stride] int32."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-1] != 3:
            raise UserError(f"encode takes uint8 images [..., H, W, 3], not {images.dtype} {list(images.shape)}")
        if self.config.channels == 1 and not (images == images[..., :1]).all():
            raise UserError("this VQ-VAE reads grey images, and these are in colour; set channels=1")
        grid = self.grid(*images.shape[-3:-1])
        return self._in_parts(0, images.reshape(-1, *images.shape[-3:])).reshape(*images.shape[:-3], *grid)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """[..., h, w] integers -> [..., h stride, w stride, 3] uint8."""
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu" or tokens.ndim < 2:
            raise UserError(f"decode takes grids of codes [..., h, w], not {tokens.dtype} {list(tokens.shape)}")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            raise UserError(f"codes run from {tokens.min()} to {tokens.max()}; allowed are 0..{self.vocab_size - 1}")
        images = self._in_parts(1, tokens.reshape(-1, *tokens.shape[-2:]).astype(np.int32))
        return images.reshape(*tokens.shape[:-2], *images.shape[1:])

    def _in_parts(self, which: int, inputs: np.ndarray) -> np.ndarray:
        """Passes inputs through the compiled encoder (0) or decoder (1). Parts of one size share a program."""
        pixels = inputs.shape[1] * inputs.shape[2] * (self.config.stride**2 if which else 1)
        size = max(1, PIXELS_AT_ONCE // pixels)
        size = min(size, 1 << max(0, len(inputs) - 1).bit_length())  # a power of two: few programs serve few images
        program, params = _programs(self.config)[which], self._params
        with (
            jax.default_matmul_precision("highest"),
            jax.set_mesh(jax.make_mesh((1,), ("one",), devices=[self._device], axis_types=(_AUTO,))),
        ):
            parts = []
            for start in range(0, max(len(inputs), 1), size):
                part = inputs[start : start + size]
                filled = np.concatenate([part, np.zeros((size - len(part), *inputs.shape[1:]), inputs.dtype)])
                parts.append(np.asarray(program(params, filled))[: len(part)])
        return np.concatenate(parts)

    @property
    def _device(self) -> jax.Device:
        return jax.local_devices()[0]

    @functools.cached_property
    def _params(self) -> dict:
        return jax.device_put(self.params, self._device)

    def _file(self) -> bytes:
        arrays = traverse_util.flatten_dict(self.params, sep=".")
        metadata = {HEADER: json.dumps(dataclasses.asdict(self.config))}
        return tensor_bytes({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}, metadata)

    def save(self, path: AnyPath | str) -> None:
        """Writes the file. If it cannot write the whole file, it raises OSError and leaves no file."""
        with whole(path) as file:
            file.write(self._file())

    @classmethod
    def load(cls, path: AnyPath | str) -> "Codes":
        """Reads a file that `save` wrote. Raises UserError unless its arrays are those of its configuration."""
        try:
            with open_binary(path) as file:
                content = file.read()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            config = make_section(VQConfig, "vqvae.", json.loads(header["__metadata__"][HEADER]))
            arrays = read_tensors(content)
            if config.residual_blocks > len(arrays):  # a header must not make us build a huge network
                raise ValueError(f"its header asks for {config.residual_blocks} residual blocks")
            params = traverse_util.unflatten_dict(arrays, sep=".")
        except FileNotFoundError:
            raise UserError(f"there is no VQ-VAE at {path}") from None
        except Exception as error:  # a file from a stranger can hold anything
            raise UserError(f"{path} is no VQ-VAE of igpt, or is damaged: {first_line(error)}") from None
        wanted = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: VQVAE(config, nnx.Rngs(0)))))
        if _shapes(params) != _shapes(wanted):
            raise UserError(f"{path} is damaged: its arrays are not those of the network in its header")
        return cls(config, params)


_AUTO = jax.sharding.AxisType.Auto


def _shapes(tree: dict) -> dict:
    return {name: (leaf.shape, leaf.dtype) for name, leaf in traverse_util.flatten_dict(tree, sep=".").items()}


@functools.cache
def _programs(config: VQConfig) -> tuple[Callable, Callable]:
    """The compiled encoder and decoder of such networks."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: VQVAE(config, nnx.Rngs(0))))

    def encode(params, images):
        model = nnx.merge(graph, params)
        return nearest(model.encode(to_units(images, config.channels)), model.codebook[...])

    def decode(params, codes):
        model = nnx.merge(graph, params)
        images = jnp.round(127.5 * (model.decode(model.codebook[...][codes]) + 1))
        return jnp.clip(jnp.broadcast_to(images, (*images.shape[:-1], 3)), 0, 255).astype(jnp.uint8)

    return jax.jit(encode), jax.jit(decode)
