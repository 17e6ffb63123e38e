# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and one table that maps logical dims to the mesh axes they are split along.

A weight names its dims (`axes`), e.g. ("layers", "embed", "mlp"); RULES maps the names to mesh
axes, and `fsdp` splits the first dim of a matrix that no other axis splits. ZeRO stages differ only
in which tensors are split along `fsdp`:

    stage   optimizer state   gradients    weights
    0       replicated        replicated   replicated
    1       split             replicated   replicated
    2       split             split        replicated
    3       split             split        split

Inside `collectives.shard_over_rows` some of the axes are manual: arrays are a device's parts.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.config import MeshSection
from jaxllm.errors import UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")
ROWS = ("data", "fsdp", "expert")  # the axes that split the rows of a batch

# A logical dim: its name, (name, units) where the dim is that many units which are never split, as
# ("heads", H) of H * head_dim elements, or None: replicated.
Axis = str | tuple[str, int] | None
Axes = tuple[Axis, ...]

# Logical name -> mesh axes; all names of weights and activations.
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "latent": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),
    "norm": (),
    "micro": (),  # micro-batches of one update
    "batch": ROWS,
    "length": ("context",),
    "sequence": ("context", "tensor"),  # the length of the residual stream
    "features": (),  # the model width of an activation
}
STACKED = ("layers", "experts")  # dims that count matrices
# Dims of a matrix that fsdp may split. The token table is not split along the vocabulary: a device
# could not look up all tokens in its part.
FSDP_DIMS = ("embed", "heads", "kv_heads", "latent", "mlp")


def make_mesh(section: MeshSection, devices: list[Any] | None = None) -> Mesh:
    """The mesh of all devices (or of `devices`), axes in the order of AXES.

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(section, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh: only one axis may be -1, seen {' and '.join(free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = max(len(devices) // fixed, 1)
    if math.prod(sizes.values()) != len(devices):
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
        raise UserError(f"mesh: {shape or 'one device'} does not make {len(devices)} devices")
    types = (AxisType.Auto,) * len(AXES)
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return Mesh(joined_slices(devices, sizes), AXES, axis_types=types)
    shape = tuple(sizes.values())
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis is no product of dims of the TPUs' torus
        grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def joined_slices(devices: list[Any], sizes: dict[str, int]) -> np.ndarray:
    """Devices of several slices, in the order of a mesh of `sizes`.

    The slices are joined along `data`, or along `fsdp` if data is no multiple of their number. All
    other communication stays within a slice, whose network is faster. Raises UserError if neither
    size is a multiple.
    """
    slices = len({device.slice_index for device in devices})
    axis = next((axis for axis in ("data", "fsdp") if sizes[axis] % slices == 0), None)
    if axis is None:
        raise UserError(
            f"mesh: the devices are in {slices} slices; mesh.data or mesh.fsdp must be a multiple "
            f"of {slices}"
        )
    inside = sizes | {axis: sizes[axis] // slices}
    across = dict.fromkeys(sizes, 1) | {axis: slices}
    return create_hybrid_device_mesh(tuple(inside.values()), tuple(across.values()), devices)


def platform() -> str:
    """Platform to compile for: "cpu", "gpu" or "tpu".

    Read from the mesh in context, which is part of jit's cache key, so a function is traced again
    for another platform. The mesh may be abstract, for devices that are not attached. Without a
    mesh: the platform of the first device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return "gpu" if device.platform == "cuda" else device.platform


def device_memory(device: Any) -> int:
    """Bytes of a device's memory; of a CPU the host's."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _manual(mesh: Any) -> tuple[str, ...]:
    return getattr(mesh, "manual_axes", ())  # a concrete mesh has none


def manual_rows() -> tuple[str, ...]:
    """The axes of ROWS that are manual; empty outside `collectives.shard_over_rows`."""
    return tuple(a for a in ROWS if a in _manual(jax.sharding.get_abstract_mesh()))


def automatic_axes() -> set[str]:
    """The axes of the mesh in context that are not manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return set(mesh.axis_names) - set(_manual(mesh))


def context_shards() -> int:
    """Size of the axis `context` where it is manual, so that a device has a part of each row; else
    1."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["context"] if "context" in _manual(mesh) else 1


def context_splits(length: int) -> bool:
    """True if the axis `context` is automatic and splits rows of so many tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        "context" in automatic_axes()
        and 1 < mesh.shape["context"]
        and not (length % mesh.shape["context"])
    )


def _split(axis: Axis, size: int, mesh: Any) -> tuple[str, tuple[str, ...], bool]:
    """(logical name, mesh axes that RULES splits the dim along, True if the dim divides by them).

    A dim of `units` divides where both the number of units and its size do; a packed weight's size
    is less than the number of its elements. Manual axes split nothing: a device's arrays are parts.
    """
    name, units = axis if isinstance(axis, tuple) else (axis, size)
    if name is None:
        return "", (), True
    if name not in RULES:
        raise UserError(f"logical axis {name!r} has no rule; known: {', '.join(RULES)}")
    along = tuple(a for a in RULES[name] if mesh.shape[a] > 1 and a not in _manual(mesh))
    parts = math.prod(mesh.shape[a] for a in along)
    return name, along, units % parts == 0 and size % parts == 0


def spec(axes: Axes, shape: tuple[int, ...], mesh: Any, drop: str = "") -> P:
    """PartitionSpec of a tensor with logical `axes`, without the mesh axis `drop`.

    A dim that does not divide by its mesh axes is replicated, e.g. an odd vocabulary; `replicated`
    lists these. Raises UserError for an unknown logical name, or if two dims use one mesh axis.
    """
    assert len(axes) == len(shape), f"{axes} does not name the dims of {shape}"
    used: set[str] = set()
    entries: list[Any] = []
    for axis, size in zip(axes, shape, strict=True):
        _, along, divides = _split(axis, size, mesh)
        if used & set(along):
            raise UserError(f"axes {axes}: two dims use mesh axis {', '.join(used & set(along))}")
        used |= set(along)
        while along and not divides:  # of several axes, by those that it divides by
            along = along[:-1]
            divides = bool(along) and size % math.prod(mesh.shape[a] for a in along) == 0
        entries.append(along or None)
    fsdp = _fsdp_dim(axes, shape, mesh)
    if fsdp is not None and drop != "fsdp" and entries[fsdp] is None:
        entries[fsdp] = ("fsdp",)
    return P(*entries)


def _fsdp_dim(axes: Axes, shape: tuple[int, ...], mesh: Any) -> int | None:
    """The dim of a matrix that is split along fsdp: the first of FSDP_DIMS that divides and that no
    other axis splits, so that no matrix is split along its last dim, the lanes of a TPU, if another
    is free. None if there is none, and for vectors, which are replicated."""
    names = [axis[0] if isinstance(axis, tuple) else axis for axis in axes]
    matrix = len([name for name in names if name not in STACKED]) == 2
    if mesh.shape["fsdp"] == 1 or "fsdp" in _manual(mesh) or not matrix or "batch" in names:
        return None
    for dim, (name, axis, size) in enumerate(zip(names, axes, shape, strict=True)):
        if name in FSDP_DIMS and size % mesh.shape["fsdp"] == 0:
            _, along, divides = _split(axis, size, mesh)
            if not (along and divides):
                return dim
    return None


def replicated(mesh: Any, variables: Iterable[Any], drop: str = "") -> list[str]:
    """A line for each dim of the weights that is replicated because it does not divide.

    variables: nnx variables with `axes` metadata. drop: as in `spec`.
    """
    lines = []
    fsdp = 1 if drop == "fsdp" else mesh.shape["fsdp"]
    for variable in variables:
        axes, shape = axes_of(variable), variable.get_value().shape
        for axis, size in zip(axes, shape, strict=True):
            name, along, divides = _split(axis, size, mesh)
            if not divides:
                count = axis[1] if isinstance(axis, tuple) else size
                by = " x ".join(f"{a} {mesh.shape[a]}" for a in along)
                lines.append(f"mesh: {count} {name} do not divide by {by}; they are replicated")
        names = [axis[0] if isinstance(axis, tuple) else axis for axis in axes]
        matrix = [name for name in names if name not in STACKED]
        whole = len(matrix) == 2 and None not in matrix and set(matrix) & set(FSDP_DIMS)
        if fsdp > 1 and whole and _fsdp_dim(axes, shape, mesh) is None:
            dims = " x ".join(f"{n} {name}" for n, name in zip(shape[-2:], matrix, strict=True))
            lines.append(f"mesh: no dim of {dims} is split along fsdp {fsdp}; it is replicated")
    return list(dict.fromkeys(lines))


def param_sharding(mesh: Mesh, axes: Axes, shape: tuple[int, ...], drop: str = "") -> NamedSharding:
    """Sharding of a weight, its gradient or moments; replicated along the mesh axis `drop`."""
    return NamedSharding(mesh, spec(axes, shape, mesh, drop))


def in_memory(shardings: Any, kind: str) -> Any:
    """Shardings of the same arrays in another memory: "device" or "pinned_host"."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), shardings)


def axes_of(variable: Any) -> Axes:
    """Logical axes of a weight; those of a stack of layers begin with "layers"."""
    axes = variable.get_metadata("axes")
    return ("layers",) * (variable.get_value().ndim - len(axes)) + tuple(axes)


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of rows [B, T], or of micro-batches of rows [A, B, T]."""
    return NamedSharding(mesh, spec(("micro", "batch", "length")[-len(shape) :], shape, mesh))


def data_parallel(mesh: Any) -> int:
    """Number of devices that the rows of a batch are split among; 1 inside `shard_over_rows`."""
    return math.prod(mesh.shape[a] for a in ROWS if a not in _manual(mesh))


def stream_specs(shape: tuple[int, ...]) -> tuple[P, P]:
    """(spec of the residual stream [B, T, D], the same without the tensor axis)."""
    mesh = jax.sharding.get_abstract_mesh()
    stream = spec(("batch", "sequence", None), shape, mesh)
    return stream, spec(("batch", "length", None), shape, mesh)


def constrain(x: jax.Array, *axes: Axis, drop: str = "") -> jax.Array:
    """Constrains the sharding of `x` inside jit to its logical axes, where axes are automatic; x
    itself on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if all(mesh.shape[a] == 1 or a in mesh.manual_axes for a in mesh.axis_names):
        return x
    return lax.with_sharding_constraint(x, spec(axes, x.shape, mesh, drop))


@cache
def local_rows(mesh: Mesh, size: int) -> tuple[int, ...]:
    """The rows of a batch of `size` rows that the devices of this process hold, ascending.

    Processes that differ only along `context` and `tensor` hold the same rows.
    """
    shape = (size, 1)
    indices: Any = batch_sharding(mesh, shape).addressable_devices_indices_map(shape)
    held = {row for rows, _ in indices.values() for row in range(*rows.indices(size))}
    return tuple(sorted(held))


def put(mesh: Mesh, rows: dict[str, np.ndarray], size: int | None = None) -> dict[str, jax.Array]:
    """Rows [B, T] or micro-batches of rows [A, B, T] on the host -> arrays sharded over the mesh.

    The rows are the same global batch in every process. With `size`, the number of rows B of the
    global batch, they are only those of this process: `local_rows(mesh, size)`.
    """

    def sharded(x: np.ndarray) -> jax.Array:
        *micro, count, length = x.shape
        total = size or count
        local = local_rows(mesh, total) if size else range(count)
        assert len(local) == count, f"{count} rows, but this process holds {len(local)} of {total}"

        def shard(index: Any) -> np.ndarray:
            *before, held, columns = index
            start, stop, _ = held.indices(total)
            first = bisect_left(local, start)
            return x[(*before, slice(first, first + stop - start), columns)]

        shape = (*micro, total, length)
        return jax.make_array_from_callback(shape, batch_sharding(mesh, shape), shard)

    return {name: sharded(x) for name, x in rows.items()}
