"""A VQ-VAE: a convolutional encoder, a codebook, and a decoder (van den Oord et al. 2017, arXiv 1711.00937).

    images [B, H, W, C] -> latents [B, h, w, D] -> codes [B, h, w] -> codebook rows [B, h, w, D] -> images

Dims: B batch, H W pixels, C channels, h w the grid of codes (H / stride, W / stride), V codes, D the codebook's width.
The codebook follows the latents as an exponential moving average (their appendix A.1; Razavi et al. 2019, arXiv
1906.00446, use it, too). Gradients pass straight through the choice of the code. A code that is hardly used is revived:
it becomes a random latent of the batch (as in Dhariwal et al. 2020, arXiv 2005.00341). igpt/codes.py makes a tokenizer
of a trained network.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from igpt.errors import UserError
from igpt.fields import check_at_least, check_choice

STRIDES = {2: 1, 4: 2, 8: 3}  # pixels of a code's side -> layers that halve the image
MOST_CODES = 1 << 16  # tokens are stored in two bytes
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """The network and its codebook. configs/base.py explains every field; `channels` is that of the data."""

    codes: int = 512
    stride: int = 4
    width: int = 64
    code_width: int = 64
    residual_blocks: int = 2
    residual_width: int = 32
    commitment: float = 0.25
    decay: float = 0.99
    revive_below: float = 0.1
    channels: int = 3

    def __post_init__(self):
        least = dict(width=2, code_width=1, residual_blocks=0, residual_width=1)
        check_at_least(self, "vqvae.", codes=2, commitment=0.0, decay=0.0, revive_below=0.0, **least)
        check_choice(self, "vqvae.", stride=tuple(STRIDES), channels=(1, 3))
        if self.codes > MOST_CODES:
            raise UserError(f"vqvae.codes is {self.codes}; files of tokens have room for {MOST_CODES:,}")
        if not (self.decay < 1 and self.revive_below < 1):
            raise UserError(f"vqvae.decay is {self.decay} and revive_below {self.revive_below}; both must be below 1")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The rows and columns of codes of an image. Raises UserError if the stride does not divide its sides."""
        if height % self.stride or width % self.stride:
            problem = f"images of {height} x {width} cannot be cut into codes of {self.stride} x {self.stride} pixels"
            raise UserError(f"{problem}; choose sides that vqvae.stride={self.stride} divides, or another stride")
        return height // self.stride, width // self.stride


class Conv(nnx.Module):
    """A convolution with a square kernel [k, k, in, out] and a bias.

    `__call__` keeps the image's size, with k = 1 or 3. With k = 4, `halved` has stride 2 and a border of one pixel, and
    `doubled` is its transpose, as PyTorch's ConvTranspose2d defines it.
    """

    def __init__(self, channels: int, out: int, size: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (size, size, channels, out)))
        self.bias = nnx.Param(jnp.zeros(out))

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        return self._convolved(x, self.kernel[...], self.kernel[...].shape[0] // 2)

    def halved(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        return self._convolved(x, self.kernel[...], 1, strides=2)

    def doubled(self, x: Float[Array, "B h w I"]) -> Float[Array, "B H W O"]:
        return self._convolved(x, self.kernel[...][::-1, ::-1], 2, dilation=2)

    def _convolved(self, x: Array, kernel: Array, border: int, strides: int = 1, dilation: int = 1) -> Array:
        sides, dims = ((border, border),) * 2, ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (strides,) * 2, sides, (dilation,) * 2, dimension_numbers=dims)
        return x + jnp.expand_dims(self.bias[...], (0, 1, 2))


class Residual(nnx.Module):
    """x + a 1 x 1 convolution of a 3 x 3 convolution of x."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.hidden = Conv(width, hidden, 3, rngs)
        self.out = Conv(hidden, width, 1, rngs)

    def __call__(self, x: Float[Array, "B h w W"]) -> Float[Array, "B h w W"]:
        return x + self.out(nnx.relu(self.hidden(nnx.relu(x))))


def _residuals(config: VQConfig, rngs: nnx.Rngs) -> dict:
    return {f"residual_{i}": Residual(config.width, config.residual_width, rngs) for i in range(config.residual_blocks)}


class VQVAE(nnx.Module):
    """The network. The sizes of its layers are those of van den Oord et al. (section 4.1), with other widths."""

    def __init__(self, config: VQConfig, rngs: nnx.Rngs):
        self.config = config
        half, full, halvings = config.width // 2, config.width, STRIDES[config.stride]
        widths = [half, *[full] * (halvings - 1)]  # the layers at the image's own size are the dearest
        down = zip([config.channels, *widths[:-1]], widths, strict=True)
        grown = widths[-2::-1] if halvings > 1 else []
        up = zip([full, *grown], [*grown, config.channels], strict=True)
        self.encoder = nnx.Dict(
            {f"down_{i}": Conv(*pair, 4, rngs) for i, pair in enumerate(down)}
            | {"middle": Conv(widths[-1], full, 3, rngs)}
            | _residuals(config, rngs)
            | {"out": Conv(full, config.code_width, 1, rngs)}
        )
        start = jax.random.normal(rngs.params(), (config.codes, config.code_width)) / config.codes
        self.codebook = nnx.Param(start)  # the first step revives its codes
        self.decoder = nnx.Dict(
            {"middle": Conv(config.code_width, full, 3, rngs)}
            | _residuals(config, rngs)
            | {f"up_{i}": Conv(*pair, 4, rngs) for i, pair in enumerate(up)}
        )

    def encode(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """The latents of images in [-1, 1]."""
        layers = self.encoder
        for i in range(STRIDES[self.config.stride]):
            x = nnx.relu(layers[f"down_{i}"].halved(x))
        return layers["out"](nnx.relu(self._residual(layers, layers["middle"](x))))

    def decode(self, x: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
        """The images, about [-1, 1], of rows of the codebook."""
        layers = self.decoder
        x = self._residual(layers, layers["middle"](x))
        for i in range(STRIDES[self.config.stride]):
            x = layers[f"up_{i}"].doubled(nnx.relu(x))
        return x

    def _residual(self, layers, x: Array) -> Array:
        for i in range(self.config.residual_blocks):
            x = layers[f"residual_{i}"](x)
        return x


def nearest(latents: Float[Array, "*B D"], codebook: Float[Array, "V D"]) -> Int[Array, "*B"]:
    """The codes whose rows are the nearest. Distances are float32: in bfloat16 near codes would tie."""
    products = jnp.einsum("...d,vd->...v", latents, codebook, precision="highest")
    squares = jnp.expand_dims(jnp.sum(codebook**2, axis=-1), tuple(range(latents.ndim - 1)))
    return jnp.argmin(squares - 2 * products, axis=-1)  # the latent's own square is the same for all codes


def straight_through(latents: Float[Array, "*B D"], rows: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """The rows, whose gradient goes to the latents unchanged."""
    return latents + jax.lax.stop_gradient(rows - latents)


class Passed(NamedTuple):
    """What a forward pass knows: latents, their codes, the images x in [-1, 1], and their reconstruction."""

    latents: Float[Array, "B h w D"]
    codes: Int[Array, "B h w"]
    x: Float[Array, "B H W C"]
    reconstruction: Float[Array, "B H W C"]


def forward(model: VQVAE, images: Array) -> Passed:
    """Encodes, quantises and decodes bytes [B, H, W, 3]."""
    x = to_units(images, model.config.channels)
    latents = model.encode(x)
    codes = nearest(jax.lax.stop_gradient(latents), model.codebook[...])
    quantised = straight_through(latents, model.codebook[...][codes])
    return Passed(latents, codes, x, model.decode(quantised))


def losses_of(model: VQVAE, passed: Passed) -> dict[str, Array]:
    """Losses and PSNR of each image, [B]: "loss" is the mean square error + `commitment` x the commitment loss.

    PSNR is in decibels, for a range from -1 to 1. The codebook has no loss: it is a moving average.
    """
    error = jnp.mean((passed.reconstruction - passed.x) ** 2, axis=(1, 2, 3))
    rows = jax.lax.stop_gradient(model.codebook[...][passed.codes])
    commitment = jnp.mean((passed.latents - rows) ** 2, axis=(1, 2, 3))
    loss = error + model.config.commitment * commitment
    psnr = 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))
    return {"loss": loss, "reconstruction_loss": error, "commitment_loss": commitment, "psnr": psnr}


def to_units(images: Array, channels: int) -> Float[Array, "*B H W C"]:
    """Bytes of RGB images as floats in [-1, 1]. Grey images have three equal channels, of which one is kept."""
    return images[..., :channels].astype(jnp.float32) / 127.5 - 1


def perplexity(share: Float[Array, "V"]) -> Float[Array, ""]:
    """exp(entropy) of the shares of the codes: V if all are used equally, 1 if one is always used."""
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, TINY)), 0.0)))


def shares(codes: Int[Array, "N"], config: VQConfig) -> Float[Array, "V"]:
    """The share of each code."""
    return jnp.mean(jax.nn.one_hot(codes, config.codes), axis=0)


def eval_metrics(means: dict) -> dict:
    """The metrics of an evaluation: means over the images, of which "share" [V] becomes perplexity and dead codes."""
    share = jnp.asarray(means["share"])
    used = {"perplexity": float(perplexity(share)), "dead_codes": int(jnp.sum(share == 0))}
    return {name: float(mean) for name, mean in means.items() if name != "share"} | used


class Averages(NamedTuple):
    """Moving averages over the steps: the share of each code among the latents, and the sum of its latents.

    revived: the number of codes that the last step revived.
    """

    usage: Float[Array, "V"]
    sums: Float[Array, "V D"]
    revived: Int[Array, ""]


def follow(
    averages: Averages, latents: Float[Array, "N D"], codes: Int[Array, "N"], key: Array, config: VQConfig
) -> tuple[Float[Array, "V D"], Averages]:
    """The codebook after a batch, and its averages.

    A code is the mean of its latents. Below `revive_below` of the mean usage, it becomes a random latent of the batch
    with the mean usage. Under jit the means run over the latents of all devices and processes.
    """
    one_hot = jax.nn.one_hot(codes, config.codes)
    sums = jnp.einsum("nv,nd->vd", one_hot, latents, precision="highest") / len(latents)
    usage = config.decay * averages.usage + (1 - config.decay) * shares(codes, config)
    sums = config.decay * averages.sums + (1 - config.decay) * sums
    dead = usage <= max(config.revive_below / config.codes, TINY)
    chosen = latents[jax.random.randint(key, (config.codes,), 0, len(latents))]
    codebook = jnp.where(dead[:, None], chosen, sums / jnp.maximum(usage, TINY)[:, None])
    usage = jnp.where(dead, 1 / config.codes, usage)
    sums = jnp.where(dead[:, None], chosen / config.codes, sums)
    return codebook, Averages(usage, sums, jnp.sum(dead))


def with_codebook(adam: optax.GradientTransformation, config: VQConfig) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose "codebook" follows the latents, and whose other parameters follow `adam`.

    `update` also reads the batch's `latents` [N, D], their `codes` [N] and a random `key`.
    """

    def init(params):
        usage, sums = jnp.zeros(config.codes), jnp.zeros((config.codes, config.code_width))  # all unused, so revived
        return adam.init(params), Averages(usage, sums, jnp.zeros((), jnp.int32))

    def update(grads, state, params, *, latents, codes, key):
        updates, inner = adam.update(grads, state[0], params)
        codebook, averages = follow(state[1], jax.lax.stop_gradient(latents), codes, key, config)
        return updates | {"codebook": codebook - params["codebook"]}, (inner, averages)

    return optax.GradientTransformationExtraArgs(init, update)
