"""Where arrays live: one device mesh, and one table from parameter paths to mesh axes.

Axes: `data` splits the batch; `fsdp` splits the batch and every large parameter with its Adam moments; `tensor`
splits heads and mlp channels inside a block (Shoeybi et al. 2019). Their product is the number of devices.
"""

import dataclasses
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from igpt.errors import UserError
from igpt.fields import check_at_least

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# Path (as in "blocks.qkv.kernel") -> mesh axis of each dimension. An optimizer moment ends in its parameter's path,
# so that one table serves both. Every leaf matches exactly one rule: see `spec_of`.
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
    (r"step|count|updates|skipped", P()),  # counters
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
        """The mesh over all devices, or those given."""
        return make_mesh(self.data, self.fsdp, self.tensor, devices, self.dcn_data)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None, dcn_data: int = 1) -> Mesh:
    """The mesh over all devices (or those given). One axis may be -1: whatever the others leave.

    Of several slices, `dcn_data` is their number: the data axis then runs through one slice after the other, and only
    its all-reduce of gradients leaves a slice. Devices without slices are taken a process at a time.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * 3
    if dcn_data > 1:
        return Mesh(_over_slices(sizes, dcn_data, devices), AXES, axis_types=types)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # a size is no product of the torus's sides, such as 2 on 4 x 4 x 8: split one
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def _over_slices(sizes: dict[str, int], dcn_data: int, devices) -> np.ndarray:
    """The devices in the order of the mesh, slice by slice along its first axis."""
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
    return make_mesh(data=1, devices=jax.local_devices()[:1])


def mesh_sizes(data: int, fsdp: int, tensor: int, devices: int) -> dict[str, int]:
    """The size of each axis of a mesh over so many devices, or UserError."""
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh is {sizes}; every axis must be at least 1, and one of them may be -1 (all that is left)")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if devices % fixed or (not free and fixed != devices):
        asked = f"{'a multiple of ' if free else ''}{fixed} devices"
        raise UserError(f"mesh {sizes} asks for {asked}, but there are {devices}; choose sizes with that product")
    return sizes | dict.fromkeys(free, devices // fixed)


def spec_of(path: str) -> P:
    """The one rule for a leaf's path; UserError when none or several match."""
    found = [spec for pattern, spec in RULES if re.fullmatch(rf"(.*\.)?({pattern})", path)]
    if len(found) != 1:
        raise UserError(f"{len(found)} sharding rules match {path!r}, one must; amend RULES in igpt/sharding.py")
    return found[0]


def path_of(key_path) -> str:
    """A leaf's place in a tree as dotted names: ['params']['head']['kernel'] -> params.head.kernel."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in key_path)


def shardings(tree, mesh: Mesh | AbstractMesh):
    """A NamedSharding for every leaf of a tree of (abstract) arrays, by RULES."""

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
    """Every device must get the same number of examples of every micro-batch."""
    shards = batch_shards(mesh)
    parts = shards * accumulate
    if batch_size < 1 or accumulate < 1 or batch_size % parts:
        groups = f"{shards} device groups (mesh data x fsdp) x {accumulate} accumulation steps"
        remedy = f"use a multiple of {parts}, such as {max(batch_size // parts * parts, parts)}"
        raise UserError(f"{name} {batch_size} does not divide into {groups}; {remedy}")


def process_rows(batch_size: int, mesh: Mesh) -> Int[np.ndarray, "n"]:
    """The rows of a global batch that this process's devices hold, ascending, so that it reads no others.

    They need not lie together: on a pod the mesh follows the torus, and a host is a block of it.
    """
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in held.values()]))


def to_devices(batch: dict, batch_size: int, mesh: Mesh, axis: int = 0) -> dict:
    """This process's rows of a batch, along `axis` in the order of `process_rows` -> global arrays, split by BATCH."""
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
    """Keeps the leading dimension split over the batch axes; outside a mesh (one device, sampling) does nothing."""
    return _constrain(x, BATCH)


def shard_cache(x: jax.Array) -> jax.Array:
    """Keeps a layer's cached keys or values [B, N, T, K] split by example and head; outside a mesh does nothing."""
    return _constrain(x, P(*BATCH, "tensor"))


def replicate(x: jax.Array) -> jax.Array:
    """Gives every device the whole of x, so that any process can read it; outside a mesh does nothing."""
    return _constrain(x, P())


def _constrain(x: jax.Array, spec: P) -> jax.Array:
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec)
