"""How arrays are sharded: one device mesh, and one table that maps parameter paths to mesh axes.

Axes: `data` splits the batch; `fsdp` splits the batch and every large parameter with its Adam moments; `tensor`
splits heads and mlp channels inside a block (Shoeybi et al. 2019). The product of the sizes is the number of devices.
"""

import dataclasses
import os
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from igpt.errors import UserError, first_line
from igpt.fields import check_at_least

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# Path of a leaf (such as "blocks.qkv.kernel") -> mesh axis of each dimension. The path of an optimizer's moment ends in
# its parameter's path, so that one table serves both. `spec_of` checks that each leaf matches exactly one rule.
RULES = (
    (r"token_table", P(None, "fsdp")),  # [V+1, D]
    (r"position_table", P(None, "fsdp")),  # [T, D]
    (r"blocks\.qkv\.kernel", P(None, "fsdp", None, "tensor", None)),  # [L, D, 3, N, K]
    (r"blocks\.qkv\.bias", P(None, None, "tensor", None)),  # [L, 3, N, K]
    (r"blocks\.out\.kernel", P(None, "tensor", None, "fsdp")),  # [L, N, K, D]
    (r"blocks\.up\.kernel", P(None, "fsdp", "tensor")),  # [L, D, F]
    (r"blocks\.up\.bias", P(None, "tensor")),  # [L, F]
    (r"blocks\.down\.kernel", P(None, "tensor", "fsdp")),  # [L, F, D]
    (r"blocks\.(out|down)\.bias", P()),  # [L, D]
    (r"(blocks\.attention_norm|blocks\.mlp_norm|final_norm)\.gain", P()),  # [L, D], [D]
    (r"(head|classifier)\.kernel", P("fsdp", None)),  # [D, V], [D, C]
    (r"(encoder|decoder)\..*|codebook|usage|sums|revived", P()),  # a VQ-VAE, which is small: every device has all of it
    (r"step|count|updates|skipped|ns_coeffs", P()),  # counters, and Muon's three constants
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The sizes of the mesh's axes; `make` raises UserError if they do not fit the devices."""

    data: int
    fsdp: int
    tensor: int
    cpu_devices: int
    dcn_data: int = 1

    def __post_init__(self):
        check_at_least(self, "mesh.", dcn_data=1, cpu_devices=0)

    def make(self, devices=None) -> Mesh:
        """Makes the mesh over the given devices (default: all devices)."""
        return make_mesh(self.data, self.fsdp, self.tensor, devices, self.dcn_data)


def all_devices(cpu_devices: int = 0) -> list[jax.Device]:
    """Returns the devices of all processes. With `cpu_devices`, first makes so many devices from this CPU's cores.

    Raises UserError if JAX cannot start these devices, or has already started another number of CPU devices.
    """
    try:
        if cpu_devices:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
    except RuntimeError:  # JAX has started its devices
        if (there := len(jax.local_devices(backend="cpu"))) != cpu_devices:
            raise UserError(
                f"mesh.cpu_devices is {cpu_devices}, but JAX has already started {there} in this process; set it to "
                f"{there}, or start a new process (in a notebook: restart the kernel)"
            ) from None
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a back end which it was told to use exists
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX cannot start its devices ({first_line(error)}); JAX_PLATFORMS is {asked!r}. Unset it to use the "
            'devices that there are, or install what the named ones need: pip install -e ".[gpu]" or ".[tpu]"'
        ) from None


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None, dcn_data: int = 1) -> Mesh:
    """Makes the mesh over the given devices (default: all). One axis may be -1: then it gets all remaining devices.

    `dcn_data` is the number of slices. The data axis passes through one slice after the other, so that only the
    all-reduce of gradients crosses slices. If devices have no slices, the devices of a process count as a slice.
    """
    devices = all_devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * 3
    if dcn_data > 1:
        return Mesh(_over_slices(sizes, dcn_data, devices), AXES, axis_types=types)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # no product of the torus's sides is this size, such as 2 on 4 x 4 x 8: split one side
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def _over_slices(sizes: dict[str, int], dcn_data: int, devices) -> np.ndarray:
    """The devices as an array of the mesh's shape. The data axis passes through one slice after the other."""
    by_process = not hasattr(devices[0], "slice_index")
    slices = {device.process_index if by_process else device.slice_index for device in devices}
    if len(slices) != dcn_data or sizes["data"] % dcn_data:
        kind = "processes" if by_process else "slices"
        found = f"the devices lie in {len(slices)} {kind} and mesh.data is {sizes['data']}"
        remedy = f"set mesh.dcn_data to the number of {kind}, which must divide mesh.data"
        raise UserError(f"mesh.dcn_data is {dcn_data}, but {found}; {remedy}")
    within, across = (sizes["data"] // dcn_data, sizes["fsdp"], sizes["tensor"]), (dcn_data, 1, 1)
    options = dict(process_is_granule=by_process, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, **options)


def one_device() -> Mesh:
    """The mesh of this process's first device."""
    all_devices()  # raises if there are none
    return make_mesh(data=1, devices=jax.local_devices()[:1])


def mesh_sizes(data: int, fsdp: int, tensor: int, devices: int) -> dict[str, int]:
    """The size of each axis of a mesh over `devices` devices. Raises UserError if no such mesh exists."""
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh is {sizes}; every axis must be at least 1, and one of them may be -1 (all that is left)")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if devices % fixed or (not free and fixed != devices):
        asked = f"{'a multiple of ' if free else ''}{fixed} devices"
        raise UserError(
            f"mesh {sizes} asks for {asked}, but there are {devices}; choose sizes with that product. The "
            "environment variable JAX_NUM_CPU_DEVICES, or mesh.cpu_devices of a configuration, makes several of a CPU"
        )
    return sizes | dict.fromkeys(free, devices // fixed)


def spec_of(path: str) -> P:
    """The PartitionSpec of the rule that matches a leaf's path. Raises UserError unless exactly one rule matches."""
    found = [spec for pattern, spec in RULES if re.fullmatch(rf"(.*\.)?({pattern})", path)]
    if len(found) != 1:
        raise UserError(f"{len(found)} sharding rules match {path!r}, one must; amend RULES in igpt/sharding.py")
    return found[0]


def path_of(key_path) -> str:
    """The path of a leaf in a tree, as dotted names: ['params']['head']['kernel'] -> params.head.kernel."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in key_path)


def shardings(tree, mesh: Mesh | AbstractMesh):
    """NamedShardings by RULES for a tree of (abstract) arrays. Raises UserError if an axis cannot split a dimension."""

    def sharding(key_path, leaf):
        path = path_of(key_path)
        spec = spec_of(path)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                split = f"its dimension of {size} cannot be split over mesh.{axis}={mesh.shape[axis]}"
                raise UserError(f"{path} has shape {tuple(leaf.shape)}: {split}; choose a size that divides it")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_shards(mesh) -> int:
    """How many parts a batch is split into; 1 outside a mesh."""
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(name: str, batch_size: int, accumulate: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError unless every device gets the same number of examples of every micro-batch."""
    shards = batch_shards(mesh)
    parts = shards * accumulate
    if batch_size < 1 or accumulate < 1 or batch_size % parts:
        groups = f"{shards} device groups (mesh data x fsdp) x {accumulate} accumulation steps"
        remedy = f"use a multiple of {parts}, such as {max(batch_size // parts * parts, parts)}"
        raise UserError(f"{name} {batch_size} does not divide into {groups}; {remedy}")


def process_rows(batch_size: int, mesh: Mesh) -> Int[np.ndarray, "n"]:
    """Sorted indices of the rows of a global batch that this process's devices hold. The process reads only these rows.

    The indices may have gaps, because the mesh of a pod follows the torus, and a host holds a block of the torus.
    """
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in held.values()]))


def to_devices(batch: dict, batch_size: int, mesh: Mesh, axis: int = 0) -> dict:
    """Makes global arrays, split by BATCH along `axis`, from this process's rows in the order of `process_rows`."""
    sharding = NamedSharding(mesh, P(*[None] * axis, *BATCH))
    mine = process_rows(batch_size, mesh)

    def placed(local: np.ndarray) -> jax.Array:
        def of_device(index):
            first, stop, _ = index[axis].indices(batch_size)
            start = int(np.searchsorted(mine, first))
            return local[(slice(None),) * axis + (slice(start, start + stop - first),)]

        shape = (*local.shape[:axis], batch_size, *local.shape[axis + 1 :])
        return jax.make_array_from_callback(shape, sharding, of_device)

    return {name: placed(np.asarray(local)) for name, local in batch.items()}


def shard_batch(x: jax.Array) -> jax.Array:
    """Shards the leading dimension of `x` over the batch axes. Outside a mesh (one device) it changes nothing."""
    return _constrain(x, BATCH)


def channels_last(x: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T D"]:
    """x, whose dimensions lie in memory in this order on each device. XLA may otherwise put B or T last.

    The constraint stands in a shard_map: for one outside, the partitioner may gather the whole of x.
    """

    def constrain(x):
        return with_layout_constraint(x, Layout((0, 1, 2)))

    if not jax.sharding.get_abstract_mesh().empty:
        constrain = jax.shard_map(constrain, in_specs=BATCH, out_specs=BATCH)
    return constrain(x)


def shard_cache(x: jax.Array) -> jax.Array:
    """Shards a layer's cached keys or values [B, N, T, K] by example and head. Outside a mesh it changes nothing."""
    return _constrain(x, P(*BATCH, "tensor"))


def replicate(x: jax.Array) -> jax.Array:
    """Copies all of x to every device, so that every process can read it. Outside a mesh it changes nothing."""
    return _constrain(x, P())


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec)
