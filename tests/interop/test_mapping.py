"""Tables from a weight file's tensors to our parameters: the check of the file, and the reader."""

import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from igpt.errors import UserError
from igpt.interop import openai
from igpt.interop.mapping import SHOWN, Target, Tensor, abstract_params, check_tensors, read_params, shortened, stacked
from igpt.model import ModelConfig
from igpt.sharding import make_mesh
from tests.helpers import OPENAI_DIMS, openai_variables

SIZES = dict(V=11, D=6, N=2, E=3, F=8)
DEPTH = 3
BLOCK = {
    "q": Target("DNE", ("blocks", "qkv"), "NED", (0,)),
    "k": Target("DNE", ("blocks", "qkv"), "NED", (1,)),
    "up": Target("FD", ("blocks", "up"), "DF"),
}
TABLE = {"table": Target("VD", ("table",)), **stacked(BLOCK, "h{}.", DEPTH)}
SHAPES = {"table": (11, 6), "blocks": {"qkv": (DEPTH, 2, 6, 6), "up": (DEPTH, 6, 8)}}


def random_arrays():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(target.shape(SIZES), np.float32) for name, target in TABLE.items()}


def as_tensors(arrays, dtype="F32"):
    return {name: Tensor(array.shape, dtype, Path("file"), lambda array=array: array) for name, array in arrays.items()}


def abstract(sharding=None):
    def leaf(shape):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda shape: isinstance(shape, tuple))


def test_one_error_lists_all_tensors_that_do_not_fit():
    found = as_tensors(random_arrays())
    check_tensors(found, TABLE, SIZES, ["F32", "F16"], "they do not fit")
    del found["table"]
    found |= as_tensors({"h0.up": np.zeros((8, 7)), "h1.up": np.zeros((6, 8)), "h9.up\x1b": np.zeros((8, 6))})
    found |= as_tensors({"h2.up": np.zeros((8, 6))}, "I32")
    sizes = {letter: size for letter, size in SIZES.items() if letter != "V"}  # no tensor of this file has V
    with pytest.raises(UserError) as caught:
        check_tensors(found, TABLE, sizes, ["F32", "F16"], "they do not fit", ["known before"])
    assert str(caught.value) == (
        "they do not fit:\n"
        "  known before\n"
        "  table [V, 6] is missing\n"
        "  h0.up has shape [8, 7]; it must be [8, 6]\n"
        "  h1.up has shape [6, 8]; it must be [8, 6]\n"
        "  h2.up is I32; weights are F32, F16\n"
        "  h9.up? [8, 6] is unknown"
    )


def test_a_long_list_and_a_long_name_are_cut():
    found = as_tensors(random_arrays() | {f"{i:04d}" * 100: np.zeros(5) for i in range(SHOWN + 7)})
    with pytest.raises(UserError) as caught:
        check_tensors(found, TABLE, SIZES, ["F32"], "they do not fit")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + SHOWN + 1 and lines[-1] == "  ... and 7 more"
    assert lines[1] == f"  {'0000' * 50} ..."
    assert shortened(["a"] * SHOWN) == ["a"] * SHOWN


def test_a_stacked_leaf_is_filled_layer_by_layer():
    arrays = random_arrays()
    params = read_params(as_tensors(arrays), TABLE, abstract())
    layers = range(DEPTH)
    np.testing.assert_array_equal(params["table"], arrays["table"])
    np.testing.assert_array_equal(params["blocks"]["up"], np.stack([arrays[f"h{i}.up"].T for i in layers]))
    q, k = (np.stack([arrays[f"h{i}.{name}"].reshape(6, 6).T for i in layers]) for name in "qk")
    np.testing.assert_array_equal(params["blocks"]["qkv"], np.stack([q, k], axis=1))


def test_extract_returns_what_fill_wrote():
    arrays = random_arrays()
    params = jax.tree.map(np.asarray, read_params(as_tensors(arrays), TABLE, abstract()))
    leaves = {("table",): params["table"]} | {("blocks", name): leaf for name, leaf in params["blocks"].items()}
    for name, target in TABLE.items():
        np.testing.assert_array_equal(target.extract(leaves[target.path], SIZES), arrays[name])


def test_a_leaf_is_read_onto_its_devices_and_left_out_without_tensors():
    arrays = random_arrays()
    del arrays["table"]
    sharding = NamedSharding(make_mesh(2, 2, 2), PartitionSpec(None, "fsdp"))
    params = read_params(as_tensors(arrays), TABLE, abstract(sharding))
    assert params.keys() == {"blocks"} and {leaf.sharding for leaf in params["blocks"].values()} == {sharding}
    for name, leaf in params["blocks"].items():
        np.testing.assert_array_equal(leaf, read_params(as_tensors(arrays), TABLE, abstract())["blocks"][name])


def test_the_largest_leaf_is_read_first_one_variable_at_a_time():
    V, D, N, T, F, L = OPENAI_DIMS.values()
    arrays = {name: value for name, value in openai_variables().items() if name.startswith("model/")}
    alive, order = [], []

    def variable(name, value):
        def read():
            assert not [reference for reference in alive if reference() is not None]
            copy = value.copy()
            alive.append(weakref.ref(copy))
            order.append(name.removeprefix("model/"))
            return copy

        return Tensor(value.shape, value.dtype.name, None, read)

    model = ModelConfig(width=D, depth=L, num_heads=N, vocab_size=V, seq_len=T, mlp_width=F)
    variables = {name: variable(name, value) for name, value in arrays.items()}
    params = read_params(variables, openai.targets(variables), abstract_params(model))
    assert params["head"]["kernel"].shape == (D, V)
    assert all("mlp" in name for name in order[: 2 * L]) and "ln_f/g" in order[-2 * L - 1 :]
    assert len(order) == 5 + 8 * L
