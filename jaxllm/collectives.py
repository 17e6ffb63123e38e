# SPDX-License-Identifier: Apache-2.0
"""Gradients over a mesh: weights are gathered along fsdp, and their gradients are reduced.

They are computed inside a shard_map over the axes that split the rows of a batch
(`shard_over_rows`), so that what is sent does not depend on XLA's partitioner. There `gathered` is
an all-gather, whose transpose is a reduce-scatter (`scattered`); elsewhere it is a sharding
constraint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxllm.config import MeshSection
from jaxllm.mesh import ROWS, STACKED, Axes, automatic_axes, constrain, manual_rows, platform, spec


@dataclass(frozen=True)
class Reduction:
    """How gradients are summed over devices.

    dtype: on the wire; None = that of the gradient. line: devices, consecutive along fsdp, that the
    last stage of a reduce-scatter sums over (`fsdp_line`).
    """

    dtype: Any = None
    line: int = 1


UNROUNDED = Reduction()
_reduction: ContextVar[Reduction] = ContextVar("reduction", default=UNROUNDED)


@contextmanager
def reducing(reduction: Reduction) -> Iterator[None]:
    """Traces `gathered` and `scattered` with this reduction."""
    token = _reduction.set(reduction)
    try:
        yield
    finally:
        _reduction.reset(token)


def fsdp_dim(spec: P) -> int:
    """The dim that a spec splits along fsdp; -1 if it splits none."""
    return next((d for d, entry in enumerate(spec) if entry and "fsdp" in entry), -1)


def keep_axes(spec: P, axes: Iterable[str]) -> P:
    """The spec with these mesh axes alone."""
    entries = [(e,) if isinstance(e, str) else e or () for e in spec]
    return P(*(tuple(a for a in entry if a in axes) or None for entry in entries))


def shard_over_rows(f: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any) -> Any:
    """f on each device's own rows: a shard_map over ROWS and all axes of size 1.

    The specs may name other axes too; these stay automatic in f.
    """
    axes = {a for a in mesh.axis_names if a in ROWS or mesh.shape[a] == 1}
    ins, outs = (
        jax.tree.map(partial(keep_axes, axes=axes), specs, is_leaf=lambda x: isinstance(x, P))
        for specs in (in_specs, out_specs)
    )
    # check_vma=False: Pallas kernels do not declare along which axes their results vary.
    return jax.shard_map(f, in_specs=ins, out_specs=outs, axis_names=axes, check_vma=False)


def gathered(w: jax.Array, axes: Axes, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    """All-gathers a weight along fsdp (ZeRO-3); the result has w's dtype.

    shape: of the gathered weight. dtype: values are rounded to it before they are sent, if it is
    narrower than w's. The gradient is rounded only to the dtype of the reduction.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return w
    narrow = dtype if dtype is not None and dtype.itemsize < w.dtype.itemsize else w.dtype
    if not manual_rows():
        return _constrained(w, axes, narrow)
    dim = _split_dim(w.shape, shape, axes)
    if dim is None:
        return w
    return _gathered(w, dim, spec(axes, w.shape, mesh), narrow)


def reduces_in(dtype: Any) -> bool:
    """True if gradients are summed over devices in this dtype."""
    return _reduction.get().dtype == dtype


def _split_dim(part: tuple[int, ...], whole: tuple[int, ...], axes: Axes) -> int | None:
    """The dim along which `part` is smaller than `whole`, of those that do not count matrices; None
    if there is none."""
    dims = enumerate(zip(part, whole, axes, strict=True))
    return next((d for d, (a, b, axis) in dims if a != b and axis not in STACKED), None)


def _per_device(f: Callable[..., Any], x: jax.Array, split: P) -> jax.Array:
    """f of a device's shard of x along the automatic axes. (XLA would replicate x along them before
    a collective of the manual axes.)"""
    axes = automatic_axes()
    if not axes:
        return f(x)
    run = jax.shard_map(f, in_specs=split, out_specs=split, axis_names=axes, check_vma=False)
    return run(x)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _constrained(w: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    return constrain(w.astype(dtype), *axes, drop="fsdp").astype(w.dtype)


def _constrained_backward(axes: Axes, dtype: Any, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (g,)


_constrained.defvjp(lambda w, *static: (_constrained(w, *static), None), _constrained_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(w: jax.Array, dim: int, split: P, dtype: Any) -> jax.Array:
    gather = partial(lax.all_gather, axis_name="fsdp", axis=dim, tiled=True)
    # XLA removes the second conversion where the product reads the narrower dtype.
    return _per_device(gather, w.astype(dtype), split).astype(w.dtype)


_gathered.defvjp(
    lambda w, *static: (_gathered(w, *static), None),
    lambda dim, split, dtype, _, g: (scattered(g, dim, split),),
)


def scattered(g: jax.Array, dim: int, split: P) -> jax.Array:
    """Reduce-scatters a gradient along fsdp, over `dim`; the transpose of `gathered`.

    g: a device's gradient of a gathered weight. split: how the automatic axes split the weight.
    Returns the device's shard of the sum, in g's dtype.

    There are two stages: over every `line`-th device, then over lines. In one stage over
    all dims of a TPU's torus, libtpu would compile an all-reduce, which sends twice as much. The
    stages give each device its part only in this order.
    """
    reduction = _reduction.get()
    size, line = lax.axis_size("fsdp"), reduction.line
    stages: list[Any] = [None]
    if 1 < line < size:
        grid = np.arange(size).reshape(-1, line)
        stages = [grid.T.tolist(), grid.tolist()]

    def scatter(x: jax.Array) -> jax.Array:
        # Along a dim of its own: libtpu pads a part of fewer rows than a tile has.
        before, after = x.shape[:dim], x.shape[dim + 1 :]
        x = x.reshape(*before, size, -1, *after)
        for groups in stages:
            x = lax.psum_scatter(
                x, "fsdp", scatter_dimension=dim, axis_index_groups=groups, tiled=True
            )
        return x.reshape(*before, -1, *after)

    return _per_device(scatter, g.astype(reduction.dtype or g.dtype), split).astype(g.dtype)


def summed_gradient(g: jax.Array, spec: P) -> jax.Array:
    """A device's gradient summed over all rows. spec: of the gradient; along axes that split it, it
    is already summed."""
    split = {a for a in ROWS if any(entry and a in entry for entry in spec)}
    axes = tuple(a for a in ROWS if a not in split and lax.axis_size(a) > 1)
    if not axes:
        return g
    dtype = _reduction.get().dtype or g.dtype
    return lax.psum(g.astype(dtype), axes).astype(g.dtype)


def across_rows(reduce: Callable[..., Any], tree: Any) -> Any:
    """lax.psum, pmin or pmax of a device's values over all rows; as they are outside
    `shard_over_rows`."""
    return reduce(tree, manual_rows()) if manual_rows() else tree


def reduction(section: MeshSection, mesh: Any) -> Reduction:
    """The reduction of a mesh's gradients."""
    dtype = section.reduce_dtype
    if dtype == "auto":
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            dtype = "float32" if platform() == "cpu" else "bfloat16"
    return Reduction(jnp.dtype(dtype), fsdp_line(mesh))


def fsdp_line(mesh: Any) -> int:
    """Devices, consecutive along fsdp, in which one coordinate of a TPU's torus changes: a line.

    1, for one stage, if there are no TPUs, if all of fsdp is a line, or if it spans slices.
    """
    if not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform != "tpu":
        return 1
    size = mesh.shape["fsdp"]
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index("fsdp"), -1).reshape(-1, size)[0]
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return 1
    coords = np.array([device.coords for device in devices])
    changes = [(coords[:n] != coords[0]).any(0).sum() for n in range(1, size + 1)]
    lines = [n for n in range(2, size + 1) if size % n == 0 and changes[n - 1] == 1]
    line = max(lines, default=1)
    return 1 if line == size else line
