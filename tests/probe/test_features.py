import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from igpt.data.batches import Drops
from igpt.data.examples import ArrayImages, EncodedImages, Split
from igpt.data.images import Preprocess
from igpt.errors import UserError
from igpt.palette import Palette
from igpt.probe.features import Features, keep_features, raw_pixels, stream_features, write_features
from igpt.sharding import make_mesh
from tests.helpers import TINY_MODEL, random_model, with_config

ONE = make_mesh(1, 1, 1, devices=jax.devices()[:1])
features_of = jax.jit(lambda model, tokens, keep=None: model.features(tokens, keep=keep))


def random_split(count=23, height=1, width=13):
    palette = Palette(np.linspace(-1, 1, 11)[:, None].repeat(3, axis=1))
    tokens = np.random.default_rng(0).integers(0, 11, (count, height, width))
    return palette, Split(ArrayImages(palette.decode(tokens)), np.arange(count, dtype=np.int32) % 3)


def streamed(model, split, palette, batch_size=10, mesh=ONE, **kwargs):
    """A whole stream: features [N, l, M, D] and labels [N]."""
    batches = list(stream_features(model, split, palette, batch_size, mesh, **kwargs))
    assert len(batches) == -(-len(split) // batch_size)
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def at_once(model, split, palette, keep=None):
    """[N, l, D]"""
    return np.swapaxes(np.asarray(features_of(model, palette.encode(split.images[:])[:, 0], keep)), 0, 1)


@pytest.mark.parametrize("layers", [None, (0,), (2,), (3, 1)])
def test_streamed_features_equal_those_of_one_large_batch(layers):
    model, (palette, split) = random_model(), random_split()
    features, labels = streamed(model, split, palette, layers=layers)
    wanted = list(range(TINY_MODEL.depth + 1)) if layers is None else list(layers)
    assert features.shape == (23, len(wanted), 1, TINY_MODEL.width) and features.dtype == np.float32
    np.testing.assert_allclose(features[:, :, 0], at_once(model, split, palette)[:, wanted], atol=1e-5)
    np.testing.assert_array_equal(labels, split.labels)


def test_grid_pooling_gives_the_mean_of_each_part_of_the_image():
    model, (palette, split) = with_config(random_model(), seq_len=12), random_split(height=3, width=4)
    features, _ = streamed(model, split, palette, pool="grid:2")
    tokens, parts = palette.encode(split.images[:]).reshape(23, -1), np.array([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3])
    means = [lambda normed, part=part: normed[:, np.flatnonzero(parts == part)].mean(axis=1) for part in range(4)]
    expected = np.concatenate([model.features(tokens, pooling=mean) for mean in means], axis=-1)
    np.testing.assert_allclose(features[:, :, 0], np.swapaxes(expected, 0, 1), atol=1e-5)
    with pytest.raises(UserError, match="an image of 3 x 4 cannot be cut into 4 x 4 parts"):
        streamed(model, split, palette, pool="grid:4")


def test_attention_gets_every_position_whose_mean_is_the_pooled_feature(tmp_path):
    model, (palette, split) = random_model(), random_split()
    features, labels = streamed(model, split, palette, pool="attention")
    positions = TINY_MODEL.seq_len
    kept = keep_features([(features, labels)], range(TINY_MODEL.depth + 1), tmp_path / "kept", positions)
    means = np.stack([kept.mean(layer) for layer in kept.layers], axis=1)
    assert features.shape[-1] == positions * TINY_MODEL.width
    np.testing.assert_allclose(means[:, :, 0], at_once(model, split, palette), atol=1e-5)


def test_eight_devices_stream_the_same_as_one():
    model, (palette, split) = random_model(), random_split()
    features, labels = streamed(model, split, palette, batch_size=8, mesh=make_mesh(2, 2, 2))
    np.testing.assert_allclose(features[:, :, 0], at_once(model, split, palette), atol=1e-5)
    np.testing.assert_array_equal(labels, split.labels)


def test_bert_sees_an_image_under_the_same_masks_every_time():
    model, (palette, split) = with_config(random_model(), causal=False), random_split()
    drops = Drops(rate=0.4, masks=3, seed=5)
    features, _ = streamed(model, split, palette, drops=drops)
    assert features.shape == (23, TINY_MODEL.depth + 1, 3, TINY_MODEL.width)
    keep = drops.of_images(np.arange(23), 13)
    for m in range(3):
        np.testing.assert_allclose(features[:, :, m], at_once(model, split, palette, keep[:, m]), atol=1e-5)
    np.testing.assert_allclose(streamed(model, split, palette, batch_size=7, drops=drops)[0], features, atol=1e-5)
    assert not np.allclose(features[:, :, 0], features[:, :, 1], atol=1e-2)


@pytest.mark.parametrize("bad", [{3, 4, 17}, {0, 22}, set(range(10, 20))])  # the last one is a whole batch
def test_unreadable_images_are_left_out_with_their_labels(bad):
    model, (palette, split) = random_model(), random_split()
    files = [(b"no image" if i in bad else split.images[i], f"photo {i}") for i in range(23)]
    labels = np.arange(23, dtype=np.int32)
    damaged = Split(EncodedImages(files, Preprocess((1, 13)), skip=True), labels)
    good = [i for i in range(23) if i not in bad]
    features, found = streamed(model, damaged, palette)
    assert found.tolist() == good
    np.testing.assert_allclose(features[:, :, 0], at_once(model, split, palette)[good], atol=1e-5)
    pixels = list(raw_pixels(damaged, 3, batch_size=10))
    assert np.concatenate([labels for _, labels in pixels]).tolist() == good
    np.testing.assert_allclose(
        pixels[0][0][:, 0, 0], split.images[[i for i in good if i < 10]].reshape(-1, 39) / 127.5 - 1
    )


def test_features_in_files_equal_those_of_the_stream(tmp_path):
    model, (palette, split) = with_config(random_model(), causal=False), random_split()
    settings = dict(layers=(3, 1), drops=Drops(masks=2))
    rows, labels = streamed(model, split, palette, **settings)
    kept = keep_features(stream_features(model, split, palette, 10, ONE, **settings), (3, 1), tmp_path / "new")
    for index, layer in enumerate((3, 1)):
        assert isinstance(kept.layers[layer], np.memmap)
        np.testing.assert_array_equal(kept.layers[layer], rows[:, index])
    np.testing.assert_array_equal(kept.labels, labels)
    np.testing.assert_array_equal(kept.joined([1, 3]), np.concatenate([rows[:, 1], rows[:, 0]], axis=-1))
    assert isinstance(kept.joined([3]), np.memmap)  # a single layer stays in its file: it may be too large for memory
    few = kept.take(np.array([20, 2]))
    np.testing.assert_array_equal(few.layers[1], rows[[20, 2], 1])
    np.testing.assert_array_equal(few.labels, labels[[20, 2]])


def test_a_full_disk_raises_a_user_error(tmp_path):
    def stream():
        yield np.zeros((2, 1, 1, 3)), np.zeros(2, np.int32)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; name another --workdir"):
        keep_features(stream(), [0], tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="name another --workdir"):
        keep_features(stream(), [0], tmp_path / "file" / "new")


def test_features_below_a_block_do_not_depend_on_it():
    model, (palette, split) = random_model(), random_split()

    def poison(path, leaf):
        if path[0] != "blocks":
            return leaf if path[0].endswith("table") else leaf * jnp.nan
        first = 3 if path[1] == "attention_norm" else 2  # block 2's first norm belongs to feature 2
        return leaf.at[first:].set(jnp.nan)

    graph, params = nnx.split(model)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: poison([key.key for key in path], leaf), nnx.to_pure_dict(params)
    )
    poisoned = nnx.merge(graph, params)
    features, _ = streamed(poisoned, split, palette, layers=(0, 2))
    np.testing.assert_allclose(features[:, :, 0], at_once(model, split, palette)[:, [0, 2]], atol=1e-5)
    assert np.isnan(streamed(poisoned, split, palette)[0]).any()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_features_below_a_block_do_not_compute_it(layer):
    tokens = jnp.zeros((3, 13), jnp.int32)

    def features(model, layers):
        return jax.jit(lambda params: nnx.merge(nnx.graphdef(model), params).features(tokens, layers))

    scanned = str(jax.make_jaxpr(features(random_model(), (layer,)))(nnx.state(random_model())))
    assert f"length={layer}" in scanned and "length=3" not in scanned

    unrolled = with_config(random_model(), scan_layers="no")  # the compiler counts one iteration of a loop only
    flops = [
        features(unrolled, layers).lower(nnx.state(unrolled)).compile().cost_analysis()["flops"]
        for layers in ((layer,), (TINY_MODEL.depth,))
    ]
    assert flops[0] < flops[1] * (layer + 0.2) / TINY_MODEL.depth


def test_raw_pixels_of_grey_images_have_one_channel():
    _, split = random_split()
    (grey, labels), (colour, _) = (next(raw_pixels(split, channels)) for channels in (1, 3))
    assert grey.shape == (23, 1, 1, 13) and colour.shape == (23, 1, 1, 39)
    np.testing.assert_allclose(grey, colour[..., ::3])
    assert grey.min() == -1.0 and grey.max() == 1.0
    np.testing.assert_array_equal(labels, split.labels)


def test_features_are_written_whole_or_not_at_all(tmp_path):
    part = Features({3: np.ones((2, 1, 4), np.float32)}, np.zeros(2, np.int32))
    write_features({"train": part}, tmp_path / "features.npz")
    with np.load(tmp_path / "features.npz") as arrays:
        assert arrays["train_layer_03"].shape == (2, 4) and arrays["train_labels"].shape == (2,)
    with pytest.raises(UserError, match="features_out=.* cannot be written: No such file"):
        write_features({"train": part}, tmp_path / "absent" / "features.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]
