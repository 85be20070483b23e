import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from igpt import sample
from igpt.__main__ import main as run_igpt
from igpt.config import Config
from igpt.draw import Sampling, image_keys
from igpt.errors import UserError
from igpt.interop.load import Pretrained
from igpt.model import ModelConfig
from igpt.palette import Palette
from igpt.sample import complete_images, completion_picture, kept_rows, sample_images, sample_tokens
from igpt.sharding import make_mesh, shardings
from tests.helpers import TINY_MODEL, random_model, write_run


def nothing(count):
    return np.zeros((count, 0), np.int32)


def test_a_sample_does_not_depend_on_the_batch_it_is_in():
    model = random_model()
    together = sample_tokens(model, nothing(7), image_keys(0, 7))
    alone = sample_tokens(model, nothing(1), image_keys(0, 1, first=4))
    np.testing.assert_array_equal(together[4:5], alone)


def test_the_same_seed_gives_the_same_images_and_another_does_not():
    model = random_model()
    one, same, other = (sample_tokens(model, nothing(3), image_keys(seed, 3)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])


def test_greedy_tokens_are_the_argmax_of_the_full_forward():
    model = random_model()
    tokens = sample_tokens(model, nothing(2), image_keys(0, 2), Sampling(temperature=0.0))
    np.testing.assert_array_equal(tokens, model(tokens).argmax(-1))


def test_a_completion_keeps_the_given_tokens_and_depends_on_them():
    model = random_model()
    prefix = np.array([[3, 1, 4, 1, 5], [3, 1, 4, 1, 6]], np.int32)
    tokens = sample_tokens(model, prefix, image_keys(0, 2), Sampling(temperature=0.0))
    np.testing.assert_array_equal(tokens[:, :5], prefix)
    np.testing.assert_array_equal(tokens[:, 5:], model(tokens).argmax(-1)[:, 5:])


def test_without_sos_a_completion_goes_on_from_the_given_tokens():
    model = random_model(dataclasses.replace(TINY_MODEL, sos=False))
    for prefix in (np.array([[3], [5]], np.int32), np.tile(np.arange(12, dtype=np.int32) % 11, (2, 1))):
        tokens = sample_tokens(model, prefix, image_keys(0, 2), Sampling(temperature=0.0))
        given = prefix.shape[1]
        np.testing.assert_array_equal(tokens[:, :given], prefix)
        np.testing.assert_array_equal(tokens[:, given:], model(tokens).argmax(-1)[:, given - 1 : -1])


def test_drawn_tokens_follow_the_models_distribution():
    model = random_model()
    count = 20_000
    prefix = np.tile(np.arange(TINY_MODEL.seq_len - 2, dtype=np.int32) % 11, (count, 1))
    tokens = np.asarray(sample_tokens(model, prefix, image_keys(3, count), Sampling(temperature=1.7)))
    expected = jax.nn.softmax(model(jnp.asarray(tokens[:1]))[0, -2] / 1.7) * count
    observed = np.bincount(tokens[:, -2], minlength=11)
    assert np.sum((observed - expected) ** 2 / expected) < 29.6  # chi-square, 10 degrees of freedom, p = 0.001


def test_top_1_is_greedy():
    model = random_model()
    greedy = sample_tokens(model, nothing(3), image_keys(0, 3), Sampling(temperature=0.0))
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6)):
        np.testing.assert_array_equal(sample_tokens(model, nothing(3), image_keys(0, 3), sampling), greedy)


def pretrained(height=3, width=4, model_width=14, num_heads=2):
    config = ModelConfig(width=model_width, depth=2, num_heads=num_heads, vocab_size=11, seq_len=height * width)
    greys = Palette((np.linspace(-1, 1, 11))[:, None].repeat(3, axis=1))
    return Pretrained(Config.of_network(config, (height, width), 1), random_model(config), greys)


def test_images_do_not_depend_on_the_batch_size():
    ours = pretrained()
    images = sample_images(ours, num=7, seed=1)
    assert images.shape == (7, 3, 4, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(sample_images(ours, num=7, seed=1, batch_size=3), images)
    np.testing.assert_array_equal(sample_images(ours, num=2, seed=1), images[:2])


def on_mesh(ours, mesh):
    graph, params = nnx.split(ours.model)
    params = nnx.to_pure_dict(params)
    return ours._replace(model=nnx.merge(graph, jax.device_put(params, shardings(params, mesh))))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_images_are_the_same_on_any_mesh_also_if_it_does_not_divide_them(monkeypatch, sizes):
    ours, mesh, batches = pretrained(model_width=16, num_heads=4), make_mesh(*sizes), []
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3), np.uint8)
    alone = complete_images(ours, images, keep=0.4, num=1, seed=1)

    def record(model, prefix, *arguments):
        batches.append(len(prefix))
        return sample_tokens(model, prefix, *arguments)

    monkeypatch.setattr(sample, "sample_tokens", record)
    with jax.set_mesh(mesh):
        together = complete_images(on_mesh(ours, mesh), images, keep=0.4, num=1, seed=1, batch_size=3)
    np.testing.assert_array_equal(together, alone)
    assert batches == {8: [8], 4: [4, 4], 2: [4, 4]}[sizes[0] * sizes[1]]


def test_the_command_makes_the_same_picture_with_fsdp_and_tensor_and_prints_its_speed(tmp_path, capsys):
    run = write_run(tmp_path / "run", source="", steps=(2,), depth=1)
    for name, flags in (("apart", []), ("shared", ["--fsdp=2", "--tensor=2"])):
        run_igpt(["sample", f"--model={run}", "--num=3", f"--out={tmp_path}/{name}.png", *flags])
    assert (tmp_path / "apart.png").read_bytes() == (tmp_path / "shared.png").read_bytes()
    speeds = re.findall(
        r"drew 3 images: ([\d,]+) tokens/s; memory bandwidth allows ([\d,]+)\n", capsys.readouterr().out
    )
    assert len(speeds) == 2 and all(int(number.replace(",", "")) > 0 for pair in speeds for number in pair)


def test_completed_images_keep_their_upper_rows():
    ours = pretrained()
    images = ours.tokenizer.decode(np.random.default_rng(0).integers(0, 11, (2, 3, 4)))
    finished = complete_images(ours, images, keep=0.67, num=5)
    assert finished.shape == (2, 5, 3, 4, 3)
    np.testing.assert_array_equal(finished[:, :, :2], np.repeat(images[:, None, :2], 5, axis=1))
    assert len(np.unique(finished[0, :, 2], axis=0)) > 1


def test_a_completion_row_shows_given_rows_continuations_and_original(monkeypatch):
    palette = pretrained().tokenizer
    images = palette.decode(np.random.default_rng(0).integers(0, 11, (2, 3, 4)))
    continuations = np.zeros((2, 5, 3, 4, 3), np.uint8)
    monkeypatch.setattr(sample, "image_grid", lambda cells, columns: cells.reshape(-1, columns, *cells.shape[1:]))
    rows = completion_picture(palette, images, 0.67, continuations)
    np.testing.assert_array_equal(rows[:, 0, :2], images[:, :2])
    assert (rows[:, 0, 2:] == 255).all()
    np.testing.assert_array_equal(rows[:, 1:-1], continuations)
    np.testing.assert_array_equal(rows[:, -1], images)


def test_at_least_one_row_is_left_to_complete():
    assert [kept_rows(keep, 8) for keep in (0.0, 0.5, 0.99)] == [0, 4, 7]
    for keep in (1.0, -0.1):
        with pytest.raises(UserError, match="keep is"):
            kept_rows(keep, 8)


def test_a_bert_model_does_not_sample():
    model = random_model(dataclasses.replace(TINY_MODEL, causal=False))
    with pytest.raises(UserError, match="BERT objective"):
        sample_tokens(model, np.zeros((1, 0), np.int32), image_keys(0, 1))


def test_a_model_without_sos_draws_no_first_pixel():
    model = random_model(dataclasses.replace(TINY_MODEL, sos=False))
    with pytest.raises(UserError, match=r"without SOS .*, so that it knows no first pixel; complete an image"):
        sample_tokens(model, nothing(1), image_keys(0, 1))


@pytest.mark.parametrize(
    "settings", [dict(temperature=1e-39), dict(temperature=1e-31), dict(temperature=1e-29)], ids=str
)
def test_tiny_temperatures_are_greedy(settings):
    model = random_model()
    greedy = sample_tokens(model, nothing(3), image_keys(0, 3), Sampling(temperature=0.0))
    np.testing.assert_array_equal(sample_tokens(model, nothing(3), image_keys(0, 3), Sampling(**settings)), greedy)


def test_the_command_refuses_such_a_seed(capsys):
    with pytest.raises(SystemExit) as caught:
        run_igpt(["sample", "--model=nowhere", "--out=x.png", "--seed=4294967296"])
    assert caught.value.code == 2 and "--seed is 4294967296; it must be at most 4294967295" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--complete="], "--complete is empty; name an image file, or 'test'"),
        (["--keep=0.3"], "--keep=0.3 needs --complete"),
        (["--images=3"], "--images=3 needs --complete=test"),
        (["--complete=photo.png", "--images=3"], "--images=3 needs --complete=test"),
    ],
    ids=str,
)
def test_flags_of_completions_are_not_ignored(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_igpt(["sample", "--model=nowhere", f"--out={tmp_path}/x.png", *flags])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_prefix_has_only_ids_of_colours():
    model = random_model()
    for prefix in ([[3, 11]], [[200, 3]], [[3, -1]]):
        with pytest.raises(UserError, match="tokens run from"):
            sample_tokens(model, np.array(prefix), image_keys(0, 1))
    with pytest.raises(UserError, match="inputs run from 12 to 12"):
        sample.continue_inputs(model, np.array([[12]]), 3, image_keys(0, 1), Sampling())
    given = np.array([[3, 1, 4]])
    one, other = (sample_tokens(model, given.astype(t), image_keys(0, 1)) for t in (np.uint8, np.uint64))
    np.testing.assert_array_equal(one, other)
