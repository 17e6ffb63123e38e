# SPDX-License-Identifier: Apache-2.0
"""Matrix products with float32 accumulation, in the form that is fastest on the platform.

Dims: B rows, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from jaxllm.mesh import Axes, automatic_axes, manual_rows, platform, spec, stream_specs
from jaxllm.ops.quantized import dense

# XLA:CPU multiplies up to this many rows two times faster as the second operand.
FEW = 256
THIN = 8  # a gradient with this many times fewer outputs than inputs is computed transposed


@cache
def has_bfloat16() -> bool:
    """False on an x86 processor without instructions for products of bfloat16 numbers."""
    file = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)", file.read_text(), re.MULTILINE) if file.is_file() else None
    return flags is None or "bf16" in flags[1]


def operand(x: jax.Array) -> jax.Array:
    """An operand of a product in the dtype that is fastest: float32 for bfloat16 on a processor
    without bfloat16 products. Products are accumulated in float32 in any case."""
    widens = platform() == "cpu" and x.dtype == jnp.bfloat16 and not has_bfloat16()
    return x.astype(jnp.float32) if widens else x


def transposed(x: jax.Array) -> jax.Array:
    """[I, O] -> [O, I], with a row-major layout where XLA:CPU's fast product needs one.

    XLA folds a transpose into the product that reads it. On a CPU the folded form is a slower
    kernel (bfloat16: 180 instead of 370 GFLOP/s), so the layout is pinned there; on one device
    only, because XLA does not shard an array with a pinned layout.
    """
    single_device = jax.sharding.get_abstract_mesh().size <= 1
    if platform() == "cpu" and x.dtype == jnp.bfloat16 and single_device and has_bfloat16():
        return with_layout_constraint(x.T, Layout((0, 1)))
    return x.T


def product(x: jax.Array, w: jax.Array, contract: tuple[int, int], dtype: Any) -> jax.Array:
    """Matrix product over the dims `contract`, accumulated in float32, rounded once to `dtype`."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    # XLA:CPU has a fast bfloat16 kernel for float32 results only. Other platforms accumulate in
    # float32 and write `dtype`.
    result_dtype = jnp.float32 if platform() == "cpu" else dtype
    y = lax.dot_general(operand(x), operand(w), dims, preferred_element_type=result_dtype)
    return y.astype(dtype)


@struct.dataclass
class ByOutputs:
    """A kernel [I, O] that is stored as [O, I], for decoding."""

    rows: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape[::-1]

    @property
    def dtype(self) -> Any:
        return self.rows.dtype

    def astype(self, dtype: Any) -> jax.Array:
        """The kernel [I, O]."""
        return self.rows.T.astype(dtype)


def by_outputs(w: Any, dtype: Any) -> jax.Array:
    """A kernel [I, O] as [O, I] in `dtype`."""
    return w.rows.astype(dtype) if isinstance(w, ByOutputs) else dense(w, dtype).T


def product_by_outputs(x: jax.Array, rows: jax.Array, dtype: Any) -> jax.Array:
    """x [..., I] · rowsᵀ, [O, I] -> [..., O] in `dtype`."""
    few = math.prod(x.shape[:-1]) <= FEW
    if not (few and platform() == "cpu" and operand(x).dtype == jnp.float32):
        return product(x, rows, (x.ndim - 1, 1), dtype)
    return jnp.moveaxis(product(rows, x, (1, x.ndim - 1), dtype), 0, -1)


def weight_gradient(x: jax.Array, g: jax.Array, dtype: Any) -> jax.Array:
    """xᵀ g summed over all leading dims: [..., I], [..., O] -> [I, O]."""
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    if g.shape[1] * THIN <= x.shape[1]:  # LoRA's A: transposing g costs less than transposing x
        return lax.optimization_barrier(product(transposed(g), x, (1, 0), dtype)).T
    return product(transposed(x), g, (1, 0), dtype)


@jax.custom_vjp
def dot(x: jax.Array, w: Any) -> jax.Array:
    """x [..., I] · w [I, O] in x's dtype; the gradient of w has w's dtype, without rounding before.

    A Quantized w is dequantized here and again in the backward pass; it has no gradient.
    """
    if isinstance(w, ByOutputs):
        return product_by_outputs(x, w.rows, x.dtype)
    return product(x, dense(w, x.dtype), (x.ndim - 1, 0), x.dtype)


def _dot_forward(x: Any, w: Any):
    # A frozen weight has no gradient, so its input is not stored.
    trained = any(leaf.perturbed for leaf in jax.tree.leaves(w))
    w = jax.tree.map(lambda leaf: leaf.value, w)
    residual = x.value if trained else jnp.zeros((), x.value.dtype)
    return dot(x.value, w), (residual, w)


def _dot_backward(residuals, g):
    x, w = residuals
    g = jnp.zeros(g.shape, x.dtype) if isinstance(g, SymbolicZero) else g.astype(x.dtype)
    dw = weight_gradient(x, g, w.dtype) if x.ndim else None
    if dw is not None and manual_rows() and platform() != "cpu":
        # First, so that x is freed, and the sum of dw over devices overlaps with the next product.
        dw, g = lax.optimization_barrier((dw, g))
    return product(g, dense(w, x.dtype), (g.ndim - 1, 1), x.dtype), dw


dot.defvjp(_dot_forward, _dot_backward, symbolic_zeros=True)


def dots(x: jax.Array, ws: list[Any], axes: list[Axes]) -> list[jax.Array]:
    """x [B, T, I] · each w [I, O], as `dot`. axes: the logical axes of each w.

    Inside `collectives.shard_over_rows`, where a tensor axis splits the weights and the residual
    stream is split along T: the products of one x begin with one all-gather, or end with one
    reduce-scatter, and their backward pass the other way round (arXiv:2205.05198).
    """
    if "tensor" not in automatic_axes() or not manual_rows():
        return [dot(x, w) for w in ws]
    mesh = jax.sharding.get_abstract_mesh()
    specs = [
        jax.tree.map(lambda leaf, a=a: spec(a, leaf.shape, mesh), w)
        for w, a in zip(ws, axes, strict=True)
    ]
    # (how the inputs are split, how the outputs are) of each leaf
    splits = [tuple(leaf) for w in specs for leaf in jax.tree.leaves(w)]
    stream, (_, length, _) = stream_specs(x.shape)
    by_sequence = stream[1] != length

    def from_stream(x: jax.Array, *ws: Any) -> list[jax.Array]:
        x = lax.all_gather(x, "tensor", axis=1, tiled=True) if by_sequence else x
        return [dot(x, w) for w in ws]

    def to_stream(x: jax.Array, *ws: Any) -> list[jax.Array]:
        ys = [dot(x, w) for w in ws]
        if not by_sequence:
            return lax.psum(ys, "tensor")
        return [lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True) for y in ys]

    if all(inputs is None for inputs, _ in splits):
        run, ins, outs = (
            from_stream,
            stream,
            [P(None, length, jax.tree.leaves(w)[0][1]) for w in specs],
        )
    elif all(outputs is None for _, outputs in splits) and None not in [i for i, _ in splits]:
        run, ins, outs = to_stream, P(None, length, "tensor"), [stream] * len(ws)
    else:
        return [dot(x, w) for w in ws]
    split = jax.shard_map(
        run, in_specs=(ins, *specs), out_specs=outs, axis_names=automatic_axes(), check_vma=False
    )
    return split(x, *ws)


def softcapped(logits: jax.Array, cap: float) -> jax.Array:
    """cap · tanh(logits / cap), within (-cap, cap); a cap of 0 changes nothing."""
    return cap * jnp.tanh(logits / cap) if cap else logits
