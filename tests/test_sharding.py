import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from igpt import sharding
from igpt.errors import UserError
from igpt.model import PRESETS, ModelConfig
from igpt.sharding import (
    BATCH,
    channels_last,
    check_batch_size,
    make_mesh,
    process_rows,
    replicate,
    shard_batch,
    shardings,
    spec_of,
    to_devices,
)
from igpt.state import abstract_state
from tests.helpers import default_optimizer


def abstract(mesh, **changes):
    fields = dict(width=16, depth=2, num_heads=4, vocab_size=11, seq_len=13, use_bias=True) | changes
    return abstract_state(ModelConfig(**fields), default_optimizer(), mesh)[1]


def leaf_paths(tree):
    from igpt.sharding import path_of

    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("use_bias", [True, False])
def test_every_leaf_of_the_state_matches_exactly_one_rule(use_bias):
    state = abstract(make_mesh(2, 2, 2), use_bias=use_bias)
    assert len(leaf_paths(state)) > 20  # a leaf without exactly one rule would have raised


def test_moments_are_sharded_like_their_parameters():
    leaves = leaf_paths(abstract(make_mesh(2, 2, 2)))
    params = {path.removeprefix("params."): leaf for path, leaf in leaves.items() if path.startswith("params.")}
    for path, leaf in params.items():
        moments = [
            other for name, other in leaves.items() if name.startswith("opt_state") and name.endswith("." + path)
        ]
        assert len(moments) == 2
        assert all(moment.sharding == leaf.sharding for moment in moments)


@pytest.mark.parametrize("preset", PRESETS)
def test_under_fsdp_a_chip_holds_its_share_of_the_state(preset):
    leaves = leaf_paths(
        abstract(make_mesh(1, 8, 1), use_bias=False, mlp_width=0, **PRESETS[preset] | {"vocab_size": 512})
    )
    total = sum(leaf.size for leaf in leaves.values())
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves.values())
    assert held < total / 8 * 1.01


def test_a_side_of_the_torus_is_split_where_no_product_of_sides_fits(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("what JAX says to 2 on a torus of 4 x 4 x 8")

    expected = make_mesh(2, 2, 2)
    monkeypatch.setattr(jax, "make_mesh", refuse)
    assert make_mesh(2, 2, 2) == expected


def test_an_unknown_leaf_and_a_doubly_matched_one_are_named(monkeypatch):
    with pytest.raises(UserError, match=r"0 sharding rules match 'blocks\.router\.kernel'"):
        spec_of("blocks.router.kernel")
    monkeypatch.setattr("igpt.sharding.RULES", ((r"token_table", P()), (r".*table", P())))
    with pytest.raises(UserError, match="2 sharding rules match 'token_table'"):
        spec_of("token_table")


def test_a_dimension_that_cannot_be_split_is_named():
    with pytest.raises(UserError, match=r"params\.blocks\.down\.kernel.*dimension of 14.*tensor=4"):
        abstract(make_mesh(1, 2, 4), mlp_width=14)


def test_one_axis_takes_what_the_others_leave():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(2, -1, 1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (4, 4, 1), (-2, 1, 1)])
def test_meshes_that_are_not_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(*sizes)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    mesh = make_mesh(2, 2, 2)
    check_batch_size("train.batch_size", 24, 2, mesh)
    with pytest.raises(UserError, match="train.batch_size 30 does not divide into 4 .* 2 .* such as 24"):
        check_batch_size("train.batch_size", 30, 2, mesh)


def test_a_process_reads_the_rows_its_devices_hold():
    np.testing.assert_array_equal(process_rows(24, make_mesh(2, 2, 2)), np.arange(24))


@pytest.mark.parametrize(
    ("mine", "expected"),
    [(range(4, 8), [*range(12, 24)]), (range(2, 4), [*range(6, 12)]), ((0, 1, 6, 7), [*range(6), *range(18, 24)])],
)
def test_a_process_reads_only_the_rows_of_its_devices_wherever_they_are(monkeypatch, mine, expected):
    mesh = make_mesh(2, 2, 2)  # 4 groups of 2 devices, 6 rows each
    whole = NamedSharding(mesh, BATCH).devices_indices_map((24,))
    held = {device: whole[device] for i, device in enumerate(mesh.devices.flat) if i in mine}
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda *_: held)
    np.testing.assert_array_equal(process_rows(24, mesh), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_come_to_the_devices_that_hold_them(axis):
    x = np.arange(24 * 3).reshape(24, 3).swapaxes(0, axis)
    there = to_devices({"x": x}, 24, make_mesh(2, 2, 2), axis)["x"]
    np.testing.assert_array_equal(there, x)
    assert {shard.data.shape[axis] for shard in there.addressable_shards} == {6}


def test_constraints_hold_inside_a_mesh_and_vanish_outside():
    x = jnp.ones((8, 3))
    assert jax.jit(shard_batch)(x).sharding.is_fully_replicated
    mesh = make_mesh(4, 2, 1)
    with jax.set_mesh(mesh):
        split = jax.jit(lambda x: shard_batch(x) * 2)(x)
        assert split.sharding.spec == BATCH
        assert jax.jit(replicate)(split).sharding.is_fully_replicated


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_layout_is_fixed_without_moving_anything_between_devices(sizes):
    def double(x):
        return shard_batch(2 * channels_last(shard_batch(jnp.sin(x))))

    def gradient(x):
        return jax.vjp(double, x)[1](x)

    mesh, x = make_mesh(*sizes), jnp.arange(8 * 5 * 6.0).reshape(8, 5, 6)
    with jax.set_mesh(mesh):
        for function in (double, gradient):
            lowered = jax.jit(function).lower(jax.device_put(x, NamedSharding(mesh, BATCH)))
            assert "LayoutConstraint" in lowered.as_text()
            assert not re.findall("all-[a-z]+|collective", lowered.compile().as_text())
        np.testing.assert_allclose(jax.jit(double)(x), 2 * np.sin(x), rtol=1e-6)
    np.testing.assert_array_equal(channels_last(x), x)  # on one device


def test_shardings_keep_the_structure_of_the_tree():
    tree = {"head": {"kernel": jax.ShapeDtypeStruct((8, 5), jnp.float32)}}
    found = shardings(tree, make_mesh(2, 2, 2))
    assert found["head"]["kernel"].spec == P("fsdp", None)


class Slice:
    """A device of one of several slices, with the fields that a mesh reads."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, index, slice_index):
        self.id, self.slice_index, self.process_index = index, slice_index, index // 2


def test_of_several_slices_the_data_axis_alone_leaves_one(monkeypatch):
    devices = [Slice(i, i % 2) for i in range(8)]  # the two slices alternate
    found = sharding._over_slices({"data": 4, "fsdp": 2, "tensor": 1}, 2, devices)
    assert found.shape == (4, 2, 1)
    assert [{device.slice_index for device in part.flat} for part in (found[:2], found[2:])] == [{0}, {1}]


@pytest.mark.parametrize(("sizes", "dcn_data"), [((4, 2, 1), 4), ((1, 8, 1), 2)])
def test_missing_slices_and_fsdp_across_slices_are_refused(sizes, dcn_data):
    devices = [Slice(i, i % 2) for i in range(8)]
    with pytest.raises(UserError, match=f"mesh.dcn_data is {dcn_data}, but the devices lie in 2 slices"):
        sharding._over_slices(dict(zip(sharding.AXES, sizes, strict=True)), dcn_data, devices)
    with pytest.raises(UserError, match="mesh.dcn_data is 2, but the devices lie in 1 processes"):
        make_mesh(dcn_data=2)


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'tpu'")])
def test_devices_that_jax_cannot_start_are_explained(monkeypatch, error):
    def fails():
        raise error

    monkeypatch.setattr(jax, "devices", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(UserError, match=r"JAX_PLATFORMS is 'tpu'. Unset it to use the devices that there are"):
        make_mesh()


def test_cpu_devices_are_made_only_before_jax_starts():
    there = len(jax.devices())
    assert sharding.all_devices(cpu_devices=there) == jax.devices()
    with pytest.raises(UserError, match=f"mesh.cpu_devices is 3, but JAX has already started {there}"):
        sharding.all_devices(cpu_devices=3)
