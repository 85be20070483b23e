"""The VQ-VAE: its convolutions, its quantiser's gradients, its codebook, and its training on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from igpt import vqvae
from igpt.config import Config
from igpt.errors import UserError
from igpt.sharding import make_mesh, one_device, to_devices
from igpt.state import build_program
from igpt.vqvae import Averages, Conv, VQConfig

TINY = VQConfig(codes=7, stride=2, width=6, code_width=3, residual_blocks=1, residual_width=5, channels=1)


def as_torch(kernel, order):
    return torch.tensor(np.asarray(kernel)).permute(*order)


@pytest.mark.parametrize("name", ["same", "pointwise", "halved", "doubled"])
def test_a_convolution_is_that_of_pytorch(name):
    size = {"same": 3, "pointwise": 1}.get(name, 4)
    conv = Conv(3, 5, size, nnx.Rngs(0))
    conv.bias[...] = jnp.arange(5.0)
    x = np.random.default_rng(0).normal(size=(2, 6, 10, 3)).astype(np.float32)
    images, bias = torch.tensor(x).permute(0, 3, 1, 2), torch.arange(5.0)
    if name == "doubled":
        theirs = torch.conv_transpose2d(images, as_torch(conv.kernel[...], (2, 3, 0, 1)), bias, stride=2, padding=1)
    else:
        stride = 2 if name == "halved" else 1
        theirs = torch.conv2d(
            images, as_torch(conv.kernel[...], (3, 2, 0, 1)), bias, stride, padding=size // 2 - (size == 4)
        )
    ours = getattr(conv, name)(jnp.asarray(x)) if size == 4 else conv(jnp.asarray(x))
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=2e-6)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_a_code_stands_for_a_square_of_pixels(stride):
    model = vqvae.VQVAE(dataclasses.replace(TINY, stride=stride, channels=3), nnx.Rngs(0))
    passed = vqvae.forward(model, jnp.zeros((2, 16, 24, 3), np.uint8))
    assert passed.codes.shape == (2, 16 // stride, 24 // stride)
    assert passed.reconstruction.shape == (2, 16, 24, 3)


class Linear(vqvae.VQVAE):
    """A VQ-VAE whose encoder and decoder are one matrix each, so that its gradients fit on a page."""

    def __init__(self, encoder, codebook, decoder):
        self.config = TINY
        self.encoder, self.codebook, self.decoder = nnx.Param(encoder), nnx.Param(codebook), nnx.Param(decoder)

    def encode(self, x):
        return x @ self.encoder[...]

    def decode(self, x):
        return x @ self.decoder[...]


def test_gradients_through_the_quantiser_are_those_of_a_float64_reference():
    rng = np.random.default_rng(0)
    encoder, codebook, decoder = rng.normal(size=(1, 3)), rng.normal(size=(7, 3)), rng.normal(size=(3, 1))
    images = jnp.asarray(rng.integers(0, 256, (4, 3, 5, 1), np.uint8).repeat(3, -1))
    graph, params = nnx.split(Linear(*[jnp.asarray(x, jnp.float32) for x in (encoder, codebook, decoder)]))

    def mean_loss(params):
        model = nnx.merge(graph, params)
        return jnp.mean(vqvae.losses_of(model, vqvae.forward(model, images))["loss"])

    loss, grads = jax.value_and_grad(mean_loss)(params)
    grads = nnx.to_pure_dict(grads)

    x = np.asarray(images[..., :1], np.float64).reshape(-1, 1) / 127.5 - 1.0
    latents = x @ encoder
    codes = [min(range(7), key=lambda k: np.sum((latent - codebook[k]) ** 2)) for latent in latents]
    rows = codebook[codes]
    error = rows @ decoder - x
    of_output = 2 * error / error.size
    of_latents = of_output @ decoder.T + 0.25 * 2 * (latents - rows) / latents.size  # straight through, and commitment
    assert loss == pytest.approx(np.mean(error**2) + 0.25 * np.mean((latents - rows) ** 2), rel=1e-5)
    np.testing.assert_allclose(grads["decoder"], rows.T @ of_output, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads["encoder"], x.T @ of_latents, rtol=1e-4, atol=1e-6)
    assert not np.any(grads["codebook"])


def test_the_codebook_follows_its_latents_and_revives_dead_codes_as_a_float64_reference_does():
    rng, V, D, N = np.random.default_rng(1), TINY.codes, TINY.code_width, 11
    config = dataclasses.replace(TINY, decay=0.6, revive_below=0.3)
    ours = Averages(jnp.zeros(V), jnp.zeros((V, D)), jnp.zeros((), jnp.int32))
    usage, sums, revived = np.zeros(V), np.zeros((V, D)), []
    for step in range(6):
        latents, codes = rng.normal(size=(N, D)), rng.integers(0, 4, N)  # the codes 4, 5 and 6 never occur
        key = jax.random.fold_in(jax.random.key(3), step)
        codebook, ours = vqvae.follow(ours, jnp.asarray(latents, jnp.float32), jnp.asarray(codes), key, config)
        expected, chosen, dead = np.zeros((V, D)), np.asarray(jax.random.randint(key, (V,), 0, N)), 0
        for k in range(V):
            usage[k] = 0.6 * usage[k] + 0.4 * np.mean(codes == k)
            sums[k] = 0.6 * sums[k] + 0.4 * latents[codes == k].sum(axis=0) / N
            if usage[k] <= 0.3 / V:
                usage[k], sums[k], dead = 1 / V, latents[chosen[k]] / V, dead + 1
            expected[k] = sums[k] / usage[k]
        np.testing.assert_allclose(codebook, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(ours.usage, usage, rtol=1e-5)
        revived.append(int(ours.revived))
        assert revived[-1] == dead
    assert revived[0] >= 3 and 0 in revived and sum(revived[1:]) >= 3  # revived at once, spared for a while, and again


def test_without_a_threshold_only_codes_that_no_batch_has_used_are_revived():
    config = dataclasses.replace(TINY, revive_below=0.0)
    averages = Averages(jnp.zeros(TINY.codes), jnp.zeros((TINY.codes, TINY.code_width)), jnp.zeros((), jnp.int32))
    latents, codes = jnp.ones((8, TINY.code_width)), jnp.array([0, 1, 2, 0, 1, 2, 0, 1])
    for expected in (TINY.codes - 3, 0):
        codebook, averages = vqvae.follow(averages, latents, codes, jax.random.key(0), config)
        assert averages.revived == expected
        np.testing.assert_allclose(codebook, 1.0, rtol=1e-6)  # and no code is zero


def test_a_code_that_no_batch_has_used_for_long_is_revived_before_its_average_is_lost():
    config = dataclasses.replace(TINY, revive_below=0.0)
    usage, sums = jnp.full(TINY.codes, 1e-37), jnp.full((TINY.codes, TINY.code_width), 1e-37)
    latents, codes = jnp.ones((8, TINY.code_width)), jnp.zeros(8, jnp.int32)
    averages = Averages(usage, sums, jnp.zeros((), jnp.int32))
    codebook, averages = vqvae.follow(averages, latents, codes, jax.random.key(0), config)
    assert averages.revived == TINY.codes - 1
    np.testing.assert_allclose(codebook, 1.0, rtol=1e-6)


def test_perplexity_counts_the_codes_that_are_used_equally():
    assert vqvae.perplexity(jnp.array([0.25, 0.25, 0.0, 0.25, 0.25])) == pytest.approx(4)
    assert vqvae.perplexity(jnp.array([0.0, 1.0])) == pytest.approx(1)


def configuration(**fields):
    from configs import digits

    config = digits.get_config()
    config.program, config.optim.name = "vqvae", "adam"
    config.vqvae.update(
        {"codes": 13, "stride": 2, "width": 6, "code_width": 5, "residual_blocks": 1, "residual_width": 4}
    )
    config.train.update(batch_size=16, eval_batch_size=16, steps=9)
    config.update_from_flattened_dict(fields)
    return Config.of(config, trains=True)


@functools.cache
def trained(devices: int):
    mesh = make_mesh() if devices == 8 else one_device()
    program = build_program(configuration(), mesh)
    state, rng, metrics = program.create_state(0), np.random.default_rng(0), []
    with jax.set_mesh(mesh):
        for _ in range(4):
            images = rng.integers(0, 256, (16, 8, 8, 1), np.uint8).repeat(3, -1)
            batch = to_devices({"tokens": images.reshape(16, -1)}, 16, mesh)
            state, found = program.train_step(state, batch)
            metrics.append(jax.device_get(found))
        sums, count = program.eval_step(
            state.params, to_devices({"tokens": images.reshape(16, -1), "mask": np.ones(16, np.float32)}, 16, mesh)
        )
    return jax.device_get((state.params, state.opt_state)), metrics, jax.device_get(sums), float(count)


def test_eight_devices_train_it_like_one():
    (one, ours, sums, _), (eight, theirs, others, _) = trained(1), trained(8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, eight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (ours, sums), (theirs, others))


def test_the_first_step_takes_its_codes_from_the_images_and_metrics_say_how_many():
    _, metrics, sums, count = trained(1)
    assert metrics[0]["train/revived"] >= 11 and 1 <= metrics[3]["train/perplexity"] <= 13
    found = vqvae.eval_metrics({name: value / count for name, value in sums.items()})
    assert found["dead_codes"] == np.sum(sums["share"] == 0) and np.sum(sums["share"]) == pytest.approx(16)
    assert found["psnr"] > 0 and found["loss"] == pytest.approx(
        found["reconstruction_loss"] + 0.25 * found["commitment_loss"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.image_size": (9, 8)}, "9 x 8 cannot be cut into codes of 2 x 2"),
        ({"vqvae.stride": 3}, "vqvae.stride is 3; choose 2, 4, 8"),
        ({"vqvae.decay": 1.0}, "must be below 1"),
        ({"vqvae.codes": 65_537}, "room for 65,536"),
        ({"init_from": "runs/a"}, "starts from scratch"),
        ({"train.accumulate": 2}, "whole batches"),
        ({"optim.name": "muon"}, "for transformers; set optim.name=adam"),
        ({"program": "vqgan"}, "program is 'vqgan'; choose igpt, vqvae"),
    ],
)
def test_impossible_settings_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        configuration(**fields)
