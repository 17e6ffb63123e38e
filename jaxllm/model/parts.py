# SPDX-License-Identifier: Apache-2.0
"""The weights of a layer, of which a device holds parts: gathered, and in blocks of one dim.

Inside `collectives.shard_over_rows` arrays are the parts, so variables store the shapes of the
whole arrays in their metadata.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from jaxllm.collectives import gathered, reduces_in
from jaxllm.mesh import manual_rows
from jaxllm.ops.quantized import Quantized


def record_shapes(model: Any) -> None:
    """Stores the shapes of a layer's arrays on all devices in the metadata of the variables: inside
    `collectives.shard_over_rows` these hold parts."""
    for _, variable in nnx.iter_graph(model):
        if is_variable(variable):
            variable.set_metadata(shapes=shapes_here(variable))


def is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def shapes_here(variable: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of a layer's arrays of a variable, on this device where arrays are parts."""
    rank, leaves = len(variable.get_metadata("axes")), jax.tree.leaves(variable.get_value())
    return tuple(x.shape[x.ndim - rank :] for x in leaves)


def shapes_of(variable: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of a layer's arrays of a variable, on all devices together."""
    shapes = variable.get_metadata().get("shapes")
    assert shapes or not manual_rows(), "record_shapes was not called"
    return shapes or shapes_here(variable)


def narrowed(weights: Any, dtype: Any) -> Any:
    """The split matrices of all layers in `dtype`, if their gradients are rounded to it anyway: the
    gradients of all layers then take less memory until they are converted back.

    (XLA converts the weights before the loop over layers in any case.)
    """
    if not (manual_rows() and reduces_in(dtype)):
        return weights

    def one(variable: Any) -> Any:
        value, rank = variable.get_value(), len(variable.get_metadata("axes"))
        if not isinstance(variable, nnx.Param) or rank < 2 or isinstance(value, Quantized):
            return variable
        split = value.shape[-rank:] != shapes_of(variable)[0]
        wider = value.dtype.itemsize > jnp.dtype(dtype).itemsize
        return variable.replace(value.astype(dtype)) if split and wider else variable

    return jax.tree.map(one, weights, is_leaf=is_variable)


def gathered_layer(weights: Any, dtype: Any, skip: str = "") -> Any:
    """All-gathers a layer's matrices along fsdp, in `dtype`, except those with the dim `skip`.

    Quantized kernels are sent as they are. Vectors are not split.
    """

    def one(variable: Any) -> Any:
        axes, value = variable.get_metadata("axes"), variable.get_value()
        if len(axes) < 2 or skip in axes:
            return variable
        leaves, structure = jax.tree.flatten(value)
        shapes = shapes_of(variable)
        narrow = None if isinstance(value, Quantized) else jnp.dtype(dtype)
        pairs = zip(leaves, shapes, strict=True)
        whole = [gathered(x, axes, shape, narrow) for x, shape in pairs]
        return variable.replace(structure.unflatten(whole))

    return jax.tree.map(one, weights, is_leaf=is_variable)


@jax.custom_vjp
def _row_major(x: jax.Array) -> jax.Array:
    """x, stored row by row, and its gradient too. (A TPU's compiler would otherwise choose a layout
    for blocks of one layer and copy the weights and gradients of all layers into it.)"""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


_row_major.defvjp(lambda x: (_row_major(x), None), lambda _, g: (_row_major(g),))


def split_into_blocks(weights: Any, axis: str, count: int) -> tuple[Any, Any]:
    """A layer's weights with a dim `axis`, as `count` blocks of it [count, ...]; and the others.

    A block has elements of each device's part of the dim, so that none moves to another device.
    """
    named, others = nnx.split_state(weights, lambda _, v: axis in v.get_metadata("axes"), ...)
    variables = jax.tree.leaves(named, is_leaf=is_variable)

    def dim(variable: Any) -> int:
        return variable.get_metadata("axes").index(axis)

    # The parts that devices have of the dim: 1 of a matrix that is split along its other dim.
    parts = max(shapes_of(v)[0][dim(v)] // v.get_value().shape[dim(v)] for v in variables)

    def split(variable: Any) -> Any:
        x, (shape,), d = variable.get_value(), shapes_of(variable), dim(variable)
        before, after = x.shape[:d], x.shape[d + 1 :]
        x = _row_major(x) if manual_rows() else x
        x = x.reshape(*before, -1, count, shape[d] // (parts * count), *after)
        x = jnp.moveaxis(x, d + 1, 0).reshape(count, *before, -1, *after)
        variable = variable.replace(x)
        variable.set_metadata(shapes=((*shape[:d], shape[d] // count, *shape[d + 1 :]),))
        return variable

    return jax.tree.map(split, named, is_leaf=is_variable), others
