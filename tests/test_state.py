import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from igpt import chunked
from igpt.loss import make_loss
from igpt.model import ModelConfig
from igpt.optim import make_optimizer
from igpt.sharding import make_mesh, to_devices
from igpt.state import abstract_state, create_state, make_eval_step, make_train_step
from tests.helpers import optim_config

GOLDEN = Path(__file__).parent / "golden" / "train_steps.json"
TINY = dict(width=24, depth=2, num_heads=4, vocab_size=11, seq_len=13, mlp_width=28)


BERT = dict(causal=False, num_classes=5)  # trained with labels


def batch_of(step, size=16, bert=False):
    rng = np.random.default_rng(step)
    batch = {"tokens": rng.integers(0, 11, (size, 13)).astype(np.int32)}
    if bert:
        batch |= {"label": rng.integers(0, 5, size).astype(np.int32), "keep": rng.random((size, 1, 13)) < 0.7}
    return batch


@functools.cache  # several tests compare with the same runs
def train(mesh, steps=4, accumulate=1, seed=0, learning_rate=1e-2, one_batch=False, optimizer="adam", **changes):
    """Losses, gradient norms and the last state of a few updates on one fixed stream of batches."""
    config = ModelConfig(**TINY | changes)
    optim = optim_config(name=optimizer, learning_rate=learning_rate, clip_norm=1.0)
    optimizer, schedule = make_optimizer(optim, steps=10)
    graph, abstract = abstract_state(config, optimizer, mesh)
    state = create_state(config, optimizer, mesh, seed)
    dropout_seed = seed if config.residual_dropout else None
    loss = make_loss(graph, classification=float(bool(config.num_classes)))
    step = make_train_step(loss, optimizer, schedule, abstract, accumulate, dropout_seed)
    history = []
    with jax.set_mesh(mesh):
        for index in range(steps):
            state, metrics = step(
                state, to_devices(batch_of(0 if one_batch else index, bert=not config.causal), 16, mesh)
            )
            history.append([float(metrics["train/loss"]), float(metrics["train/grad_norm"])])
    return np.array(history), state


def one_device():
    return make_mesh(1, devices=jax.devices()[:1])


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (2, 1, 4)])
def test_eight_devices_give_the_losses_and_parameters_of_one(sizes):
    alone, alone_state = train(one_device())
    together, state = train(make_mesh(*sizes))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(alone_state.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)  # Adam divides by gradients that are almost zero


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_muon_is_the_same_on_eight_devices_and_keeps_its_moment_split(sizes):
    alone, _ = train(one_device(), optimizer="muon")
    together, state = train(make_mesh(*sizes), optimizer="muon")
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    kernel = state.params["blocks"]["up"]["kernel"]
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert [leaf.sharding for leaf in moments] == [kernel.sharding]  # one, where Adam has two


def test_dropout_is_the_same_on_any_mesh():
    alone, _ = train(one_device(), residual_dropout=0.2, embedding_dropout=0.1)
    together, _ = train(make_mesh(2, 2, 2), residual_dropout=0.2, embedding_dropout=0.1)
    plain, _ = train(one_device())
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert np.abs(alone[1:] - plain[1:]).max() > 1e-3


def test_dropout_differs_from_step_to_step():
    still = dict(learning_rate=1e-30, one_batch=True, steps=2)
    (_, first), (_, second) = train(one_device(), residual_dropout=0.2, **still)[0]
    assert abs(first - second) > 1e-4


def test_accumulated_micro_batches_are_one_batch():
    whole, _ = train(one_device())
    for mesh in (one_device(), make_mesh(2, 2, 2)):
        parts, _ = train(mesh, accumulate=4)
        np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_bert_learns_alike_on_one_device_on_eight_and_in_micro_batches():
    alone, alone_state = train(one_device(), **BERT)
    assert alone[0, 0] == pytest.approx(np.log(11) + np.log(5), abs=1e-5)
    for found, state in (train(make_mesh(2, 2, 2), **BERT), train(one_device(), accumulate=4, **BERT)):
        np.testing.assert_allclose(found, alone, rtol=1e-5)
        for one, other in zip(jax.tree.leaves(alone_state.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)


def test_the_state_keeps_its_shardings_and_gives_up_its_memory():
    mesh = make_mesh(2, 2, 2)
    _, state = train(mesh)
    kernel = state.params["blocks"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4  # fsdp x tensor
    config, (optimizer, schedule) = ModelConfig(**TINY), make_optimizer(optim_config(), steps=10)
    graph, abstract = abstract_state(config, optimizer, mesh)
    expected, found = (jax.tree.map(lambda x: x.sharding, tree) for tree in (abstract.params, state.params))
    assert found == expected
    fresh = create_state(config, optimizer, mesh, 0)
    step = make_train_step(make_loss(graph), optimizer, schedule, abstract)
    with jax.set_mesh(mesh):
        step(fresh, to_devices(batch_of(0), 16, mesh))
    assert fresh.params["blocks"]["up"]["kernel"].is_deleted()


def test_the_step_counts_updates():
    _, state = train(one_device())
    assert int(state.step) == 4


def test_chunked_attention_trains_alike_on_one_device_and_on_eight(monkeypatch):
    plain, _ = train(one_device())
    monkeypatch.setattr(chunked, "BLOCK", 4)  # several blocks, the last one incomplete
    for mesh in (one_device(), make_mesh(2, 2, 2)):
        history, _ = train.__wrapped__(mesh, remat="dots", attention="chunked")
        np.testing.assert_allclose(history, plain, rtol=1e-5)


def test_evaluation_weighs_every_unmasked_example_alike():
    config = ModelConfig(**TINY)
    optimizer, _ = make_optimizer(optim_config(), steps=10)
    mesh = one_device()
    graph, _ = abstract_state(config, optimizer, mesh)
    _, state = train(mesh)
    loss = make_loss(graph)
    batch = batch_of(0) | {"mask": np.array([1.0] * 5 + [0.0] * 11, np.float32)}
    sums, count = make_eval_step(loss)(state.params, batch)
    assert count == 5
    each = jax.jit(loss)(state.params, batch)["loss"]
    np.testing.assert_allclose(sums["loss"], np.sum(each[:5]), rtol=1e-6)


def test_the_first_updates_are_the_golden_ones():
    history, _ = train(one_device())
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(history.tolist()) + "\n")
        pytest.fail(f"{GOLDEN} was missing and has been written anew: look at it, then run again")
    np.testing.assert_allclose(
        history,
        json.loads(GOLDEN.read_text()),
        rtol=1e-4,
        err_msg="The arithmetic of training changed. If that was the intention, say so in the CHANGELOG, delete "
        "tests/golden/train_steps.json and run this test twice; if not, find out what changed.",
    )
