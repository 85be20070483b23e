import jax
import jax.numpy as jnp
import numpy as np
import optax

from igpt.loss import bits_per_dim, marginal_entropy, next_pixel


def test_next_pixel_is_the_mean_cross_entropy_of_each_image_with_its_gradient():
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
    assert np.isclose(bits_per_dim(np.log(2), tokens=64, height=8, width=8, channels=1), 1.0)
    assert np.isclose(bits_per_dim(2.0895, 1024, 32, 32, 3), 3.0145 / 3, atol=1e-4)  # iGPT-S on ImageNet


def test_the_marginal_entropy_is_what_the_best_order_0_model_pays():
    tokens = np.array([[0, 2], [0, 1], [0, 2], [0, 1]])
    assert np.isclose(marginal_entropy(tokens, vocab_size=3), np.log(2) / 2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, (200, 3))
    frequency = np.stack([np.bincount(column, minlength=5) for column in tokens.T]) / 200
    paid = -np.log(frequency[np.arange(3), tokens]).mean()
    assert np.isclose(marginal_entropy(tokens, 5), paid)
