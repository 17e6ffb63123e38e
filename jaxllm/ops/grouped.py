# SPDX-License-Identifier: Apache-2.0
"""Products of rows with the matrices of the groups they belong to: the experts of a layer.

Rows are sorted by group, and none is dropped, however uneven the groups are. Accelerators have a
kernel; on a CPU a loop over the groups multiplies blocks of rows.

Dims: N rows, E groups, I inputs, O outputs, M rows of a block.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxllm.mesh import platform
from jaxllm.ops.matmul import product, weight_gradient
from jaxllm.ops.quantized import dense

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 256


@jax.custom_vjp
def grouped(x: jax.Array, w: Any, sizes: jax.Array) -> jax.Array:
    """x [N, I] · w[e] [I, O], e being the group of the row -> [N, O] in x's dtype.

    w: [E, I, O]; a Quantized w has no gradient. sizes: int32 [E], the rows of each group; rows
    after their sum give 0. The gradient of w has w's dtype, without rounding before.
    """
    return _products(x, dense(w, x.dtype), sizes)


def _forward(x: Any, w: Any, sizes: Any):
    # A frozen weight has no gradient, so its input is not stored.
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(w))
    w = jax.tree.map(lambda leaf: leaf.value, w)
    residual = x.value if trained else jnp.zeros((), x.value.dtype)
    return grouped(x.value, w, sizes.value), (residual, w, sizes.value)


def _backward(residuals: Any, g: Any):
    x, w, sizes = residuals
    g = jnp.zeros(g.shape, x.dtype) if isinstance(g, SymbolicZero) else g.astype(x.dtype)
    dw = _gradients(x, g, sizes, w.dtype) if x.ndim else None
    return _products(g, dense(w, x.dtype), sizes, transposed=True), dw, None


grouped.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_vjp
def permuted(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order], whose gradient is a gather too. inverse: order[inverse[i]] = i."""
    return x[order]


permuted.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, g: (g[inverse], None, None),
)


def by_group(groups: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(order that sorts rows by their groups int32 [N], its inverse [N], sizes [E])."""
    order = jnp.argsort(groups, stable=True)
    ends = jnp.searchsorted(groups[order], jnp.arange(count), side="right")
    return order, jnp.argsort(order), jnp.diff(ends, prepend=0).astype(jnp.int32)


def _products(x: jax.Array, w: jax.Array, sizes: jax.Array, transposed: bool = False) -> jax.Array:
    """`grouped`; if transposed, x [N, O] · w[e]ᵀ -> [N, I]."""
    contract, output = (2, 1) if transposed else (1, 2)
    if platform() != "cpu":
        dims = lax.RaggedDotDimensionNumbers((((1,), (contract,)), ((), ())), [0], [0])
        return lax.ragged_dot_general(x, w, sizes, dims, preferred_element_type=x.dtype)
    M = _block(x, sizes)

    def group(e: jax.Array, y: jax.Array) -> jax.Array:
        matrix = w[e]

        def block(i: jax.Array, y: jax.Array) -> jax.Array:
            at, own = _rows(sizes, e, i, len(x), M)
            part = product(lax.dynamic_slice_in_dim(x, at, M), matrix, (1, contract - 1), x.dtype)
            part = jnp.where(own, part, lax.dynamic_slice_in_dim(y, at, M))
            return lax.dynamic_update_slice_in_dim(y, part, at, 0)

        return lax.fori_loop(0, -(-sizes[e] // M), block, y)

    return lax.fori_loop(0, len(w), group, jnp.zeros((len(x), w.shape[output]), x.dtype))


def _gradients(x: jax.Array, g: jax.Array, sizes: jax.Array, dtype: Any) -> jax.Array:
    """xᵀ g summed over the rows of each group, [E, I, O]."""
    if platform() != "cpu":
        dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return lax.ragged_dot_general(x, g, sizes, dims, preferred_element_type=dtype)
    M = _block(x, sizes)

    def group(e: jax.Array) -> jax.Array:
        def block(i: jax.Array, total: jax.Array) -> jax.Array:
            at, own = _rows(sizes, e, i, len(x), M)
            part = jnp.where(own, lax.dynamic_slice_in_dim(x, at, M), 0)
            part = weight_gradient(part, lax.dynamic_slice_in_dim(g, at, M), jnp.float32)
            return total + part

        zeros = jnp.zeros((x.shape[1], g.shape[1]), jnp.float32)
        return lax.fori_loop(0, -(-sizes[e] // M), block, zeros).astype(dtype)

    return lax.map(group, jnp.arange(len(sizes)))


def _rows(
    sizes: jax.Array, e: jax.Array, i: jax.Array, N: int, M: int
) -> tuple[jax.Array, jax.Array]:
    """(first row of block i of group e; which of its M rows are the block's own, bool [M, 1]).

    The last blocks begin earlier, so that each has M of the N rows.
    """
    end = jnp.cumsum(sizes)[e]
    first = end - sizes[e] + i * M
    at = jnp.minimum(first, N - M)
    rows = at + jnp.arange(M)[:, None]
    return at, (rows >= first) & (rows < end)


def _block(x: jax.Array, sizes: jax.Array) -> int:
    """M: a power of two near half an average group, whose last block then wastes little."""
    half = max(len(x) // len(sizes) // 2, 1)
    return min(max(1 << (half.bit_length() - 1), SMALLEST_BLOCK), LARGEST_BLOCK, len(x))
