import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from igpt.loss import (
    bits_per_dim,
    cross_entropy,
    dropped_pixels,
    make_loss,
    marginal_entropy,
    next_pixel,
    vote,
    wilson_interval,
)
from igpt.model import ModelConfig
from tests.helpers import TINY_MODEL, random_model, random_tokens


def test_next_pixel_equals_optax_s_cross_entropy_in_value_and_gradient():
    logits = jax.random.normal(jax.random.key(0), (3, 7, 11))
    tokens = jax.random.randint(jax.random.key(1), (3, 7), 0, 11)

    def peer(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean(-1)

    np.testing.assert_allclose(next_pixel(logits, tokens), peer(logits), rtol=1e-6)
    ours = jax.grad(lambda x: next_pixel(x, tokens).sum())(logits)
    np.testing.assert_allclose(ours, jax.grad(lambda x: peer(x).sum())(logits), atol=1e-7)


def test_palette_id_0_is_a_colour_not_padding():
    logits = jnp.zeros((1, 5, 4)).at[..., 0].set(-3.0)
    zeros, ones = (next_pixel(logits, jnp.full((1, 5), token)) for token in (0, 1))
    assert float(zeros[0]) > float(ones[0]) > 0


def test_bits_per_dim_counts_every_byte_of_the_image():
    model = ModelConfig(12, 2, 2, vocab_size=512, seq_len=1024)
    assert np.isclose(bits_per_dim(np.log(2), dataclasses.replace(model, seq_len=64), 8, 8, 1), 1.0)
    assert np.isclose(bits_per_dim(2.0895, model, 32, 32, 3), 3.0145 / 3, atol=1e-4)  # iGPT-S on ImageNet


def test_bits_per_dim_without_sos_count_log2_v_for_the_first_pixel():
    model = dataclasses.replace(TINY_MODEL, vocab_size=16, seq_len=9, sos=False)
    assert np.isclose(bits_per_dim(3 * np.log(2), model, 3, 3, 1), (8 * 3 + 4) / 9)
    uniform = np.log(16)  # the loss of a network that knows nothing: every pixel costs the same, the first one too
    assert np.isclose(bits_per_dim(uniform, model, 3, 3, 1), 4)


def test_marginal_entropy_is_the_loss_of_the_best_model_without_context():
    tokens = np.array([[0, 2], [0, 1], [0, 2], [0, 1]])
    assert np.isclose(marginal_entropy(tokens, vocab_size=3), np.log(2) / 2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, (200, 3))
    frequency = np.stack([np.bincount(column, minlength=5) for column in tokens.T]) / 200
    paid = -np.log(frequency[np.arange(3), tokens]).mean()
    assert np.isclose(marginal_entropy(tokens, 5), paid)


def test_dropped_pixels_averages_over_the_dropped_positions_of_an_image():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 7, 11))
    tokens, keep = rng.integers(0, 11, (5, 7)), rng.random((5, 7)) < 0.6
    keep[3], keep[4] = True, False
    expected = []
    for image in range(5):
        of_dropped = [
            np.log(np.exp(logits[image, i]).sum()) - logits[image, i, tokens[image, i]]
            for i in range(7)
            if not keep[image, i]
        ]
        expected.append(np.mean(of_dropped) if of_dropped else 0.0)
    assert expected[3] == 0.0 and len(of_dropped) == 7
    losses = dropped_pixels(jnp.asarray(logits, jnp.float32), jnp.asarray(tokens), jnp.asarray(keep))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def network_and_batch(masks=0, **fields):
    """A random network with five classes, its parameters, and a batch with labels and `masks` masks per image."""
    model = random_model(dataclasses.replace(TINY_MODEL, num_classes=5, causal=not masks, **fields))
    batch = {"tokens": random_tokens(), "label": jnp.array([4, 0, 2])}
    if masks:
        batch["keep"] = jax.random.bernoulli(jax.random.key(3), 0.7, (3, masks, TINY_MODEL.seq_len))
    return model, nnx.to_pure_dict(nnx.state(model)), batch


@pytest.mark.parametrize("masks", [0, 3])
def test_the_joint_loss_weights_its_parts_and_averages_over_masks(masks):
    model, params, batch = network_and_batch(masks)
    values = jax.jit(make_loss(nnx.graphdef(model), generative=0.5, classification=2.0))(params, batch)
    assert values.keys() == {"loss", "generative_loss", "classification_loss", "accuracy"}

    @jax.jit
    def under_mask(model, batch, keep):
        normed = model.normed(batch["tokens"], keep=keep)
        logits, of_classes = model.logits(normed), normed.mean(axis=1) @ model.classifier.kernel[...]
        pixels = dropped_pixels(logits, batch["tokens"], keep) if masks else next_pixel(logits, batch["tokens"])
        return pixels, cross_entropy(of_classes, batch["label"]), of_classes.argmax(axis=-1)

    keeps = jnp.moveaxis(batch["keep"], 1, 0) if masks else [None]
    pixels, labels, classes = (
        np.stack(part) for part in zip(*(under_mask(model, batch, k) for k in keeps), strict=True)
    )
    np.testing.assert_allclose(values["generative_loss"], pixels.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(values["classification_loss"], labels.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(values["loss"], 0.5 * pixels.mean(axis=0) + 2.0 * labels.mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(values["accuracy"], vote(jnp.asarray(classes)) == batch["label"])


def test_without_sos_each_position_predicts_the_token_after_it():
    model, params, batch = network_and_batch(sos=False)
    values = make_loss(nnx.graphdef(model), generative=1.0, classification=1.0)(params, batch)
    logits, normed = model(batch["tokens"]), model.normed(batch["tokens"])
    pixels = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["tokens"][:, 1:]).mean(-1)
    classes = cross_entropy(normed.mean(axis=1) @ model.classifier.kernel[...], batch["label"])
    np.testing.assert_allclose(values["generative_loss"], pixels, rtol=1e-5)
    np.testing.assert_allclose(values["classification_loss"], classes, rtol=1e-5)


def test_only_the_heads_that_a_loss_uses_get_a_gradient():
    model, params, batch = network_and_batch()

    def largest(generative, classification):
        loss = make_loss(nnx.graphdef(model), generative, classification)
        grads = jax.jit(jax.grad(lambda params: loss(params, batch)["loss"].mean()))(params)
        return {name: max(abs(leaf).max() for leaf in jax.tree.leaves(part)) for name, part in grads.items()}

    classes, pixels, both = largest(0.0, 1.0), largest(1.0, 0.0), largest(1.0, 1.0)
    assert classes.pop("head") == 0 and pixels.pop("classifier") == 0
    assert min(*classes.values(), *pixels.values(), *both.values()) > 1e-4


def test_a_loss_without_pixels_needs_no_head_for_them():
    model, params, batch = network_and_batch(masks=2, pixel_head=False)
    values = jax.jit(make_loss(nnx.graphdef(model), generative=0.0, classification=1.0))(params, batch)
    assert values.keys() == {"loss", "classification_loss", "accuracy"}
    np.testing.assert_array_equal(values["loss"], values["classification_loss"])


def test_the_class_with_most_votes_wins_for_any_order_of_the_masks():
    rng = np.random.default_rng(0)
    classes = np.array([[2, 2, 0, 1, 2], [4, 3, 3, 3, 3], [1, 1, 1, 1, 1], [0, 4, 4, 0, 4]]).T
    for _ in range(10):
        np.testing.assert_array_equal(vote(jnp.asarray(rng.permutation(classes))), [2, 3, 1, 4])


def test_a_tie_is_broken_at_random_and_equally_in_every_batch():
    rng = np.random.default_rng(0)
    classes = rng.permuted(np.repeat([[0], [0], [3], [3], [1]], 600, axis=1), axis=0)
    classes = jnp.asarray(classes)
    winners = np.asarray(vote(classes))
    assert set(winners) == {0, 3} and 240 < (winners == 0).sum() < 360
    for start, stop in ((0, 1), (7, 12), (100, 600)):
        np.testing.assert_array_equal(vote(classes[:, start:stop]), winners[start:stop])


def test_the_earliest_mask_decides_a_tie_of_any_number_of_masks():
    for masks in (2, 40, 200):  # the weights of so many masks once lay below float32's precision
        classes = np.repeat([[3, 1], [1, 3]], masks // 2, axis=0)
        np.testing.assert_array_equal(vote(jnp.asarray(classes)), [3, 1])


def test_the_interval_is_wilsons():
    np.testing.assert_allclose(wilson_interval(50, 100), (0.4038, 0.5962), atol=1e-4)
    low, high = wilson_interval(100, 100)
    assert 0.96 < low < high <= 1.0
