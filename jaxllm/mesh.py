# SPDX-License-Identifier: Apache-2.0
"""Devices as a mesh, and one table that says along which mesh axis each logical dim is split.

A weight names the logical meaning of its dims (`axes`), e.g. ("layers", "embed", "mlp"); RULES maps
them to mesh axes. ZeRO stages differ only in which tensors keep the `fsdp` axis:

    stage   optimizer state   gradients   weights
    0       whole             whole       whole
    1       split             whole       whole
    2       split             split       whole
    3       split             split       split
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.config import MeshSection
from jaxllm.errors import UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")

# Logical dim -> mesh axes. Every name a weight or an activation may use is listed.
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "norm": (),
    "micro": (),  # micro-batches of one update
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "features": (),  # the model width of an activation
}


def make_mesh(section: MeshSection, devices: list[Any] | None = None) -> Mesh:
    """The mesh of all devices (or of `devices`), axes in the order of AXES.

    Raises ValueError when the sizes do not multiply to the number of devices, and under several
    processes: stopping and saving together is yet to be built.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"this is one of {jax.process_count()} processes, and a run is one for now; "
            "start it without jax.distributed, it uses all devices of its host"
        )
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
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def platform() -> str:
    """The platform that is compiled for: "cpu", "gpu" or "tpu".

    It is read from the mesh in context, which is part of jit's cache key, so a function is traced
    again for another platform. The mesh may be abstract, of devices that are not attached. Without
    a mesh it is the platform of the first device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return "gpu" if device.platform == "cuda" else device.platform


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any, drop: str = "") -> P:
    """The PartitionSpec of a tensor with logical `axes`; mesh axis `drop` is left out.

    A dim that does not divide by its mesh axes stays whole (an odd vocabulary, say). Raises
    ValueError for an unknown logical name, or when two dims want the same mesh axis.
    """
    assert len(axes) == len(shape), f"{axes} does not name the dims of {shape}"
    used: set[str] = set()
    entries: list[Any] = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise UserError(f"logical axis {name!r} has no rule; known: {', '.join(RULES)}")
        want = tuple(a for a in RULES[name] if a != drop) if name else ()
        want = tuple(a for a in want if mesh.shape[a] > 1)
        if used & set(want):
            raise UserError(f"axes {axes}: mesh axis {used & set(want)} is asked for twice")
        used |= set(want)
        fits = size % math.prod(mesh.shape[a] for a in want) == 0
        entries.append(want if want and fits else None)
    return P(*entries)


def param_sharding(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...], *, whole: bool = False
) -> NamedSharding:
    """Where a weight (or its gradient or moments) lies, split along fsdp or `whole` there."""
    return NamedSharding(mesh, spec(axes, shape, mesh, drop="fsdp" if whole else ""))


def axes_of(variable: Any) -> tuple[str | None, ...]:
    """Logical axes of a weight; those of a stack of layers begin with "layers"."""
    axes = variable.get_metadata("axes")
    return ("layers",) * (variable.get_value().ndim - len(axes)) + tuple(axes)


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Rows [B, T], or micro-batches of rows [A, B, T]."""
    return NamedSharding(mesh, spec(("micro", "batch", "length")[-len(shape) :], shape, mesh))


def data_parallel(mesh: Any) -> int:
    """Devices among which the rows of a batch are divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain(x: jax.Array, *axes: str | None, drop: str = "") -> jax.Array:
    """Fixes the layout of `x` inside jit by logical axes; nothing on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh, drop))


def gathered(w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A layer's weight, whole along fsdp: the all-gather of ZeRO-3, in the dtype it is used in."""
    return constrain(w, *axes, drop="fsdp")


def put(mesh: Mesh, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Rows on the host, the same global batch in every process -> arrays over the mesh."""
    return {
        name: jax.make_array_from_callback(
            value.shape, batch_sharding(mesh, value.shape), value.__getitem__
        )
        for name, value in rows.items()
    }
