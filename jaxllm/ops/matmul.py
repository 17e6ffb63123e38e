# SPDX-License-Identifier: Apache-2.0
"""Matrix products with float32 accumulation, in the form that is fastest on the platform.

Dims: B rows, T tokens, I in, O out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint

from jaxllm.mesh import Axes, platform
from jaxllm.ops.quantized import dense


def transposed(x: jax.Array) -> jax.Array:
    """[I, O] -> [O, I], written out row by row where the CPU's fast product needs it so.

    XLA folds a transpose into the product that reads it; on CPU the folded form is a slower kernel
    (bf16: 180 against 370 GFLOP/s), so the layout is pinned there; on one device, since a pinned
    layout is not divided among several.
    """
    alone = jax.sharding.get_abstract_mesh().size <= 1
    if platform() == "cpu" and x.dtype == jnp.bfloat16 and alone:
        return with_layout_constraint(x.T, Layout((0, 1)))
    return x.T


def product(x: jax.Array, w: jax.Array, contract: tuple[int, int], dtype: Any) -> jax.Array:
    """One matrix product with float32 accumulation, its result rounded once to `dtype`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    # A CPU multiplies bfloat16 fast only when asked for float32 results; others keep the sum in
    # float32 inside and write the short form.
    wide = jnp.float32 if platform() == "cpu" else dtype
    return lax.dot_general(x, w, dims, preferred_element_type=wide).astype(dtype)


def weight_gradient(x: jax.Array, g: jax.Array, dtype: Any) -> jax.Array:
    """xᵀ g over all leading dims: [..., I], [..., O] -> [I, O]."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if g.shape[1] * 8 <= x.shape[1]:  # LoRA's A: the thin side is the one to turn round
        return lax.optimization_barrier(product(transposed(g), x, (1, 0), dtype)).T
    return product(transposed(x), g, (1, 0), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(x: jax.Array, w: Any, axes: Axes) -> jax.Array:
    """x [..., I] · w [I, O] in x's dtype; the gradient of w comes out in w's dtype, unrounded.

    `axes` are w's logical axes: what ZeRO-3 has split is gathered here, after the cast. A Quantized
    w is widened here, again in the backward pass, and has no gradient.
    """
    return product(x, dense(w, axes, x.dtype), (x.ndim - 1, 0), x.dtype)


def _dot_forward(x: Any, w: Any, axes: Axes):
    # Only what a gradient is asked of costs memory or arithmetic: of a frozen weight there is none.
    learned = any(leaf.perturbed for leaf in jax.tree.leaves(w))
    w = jax.tree.map(lambda leaf: leaf.value, w)
    kept = x.value if learned else jnp.zeros((), x.value.dtype)
    return dot(x.value, w, axes), (kept, w)


def _dot_backward(axes: Axes, saved, g):
    x, w = saved
    g = jnp.zeros(g.shape, x.dtype) if isinstance(g, SymbolicZero) else g.astype(x.dtype)
    dx = product(g, dense(w, axes, x.dtype), (g.ndim - 1, 1), x.dtype)
    return dx, weight_gradient(x, g, w.dtype) if x.ndim else None


dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)


def softcapped(logits: jax.Array, cap: float) -> jax.Array:
    """cap · tanh(logits / cap), within (-cap, cap); 0 leaves them as they are."""
    return cap * jnp.tanh(logits / cap) if cap else logits
