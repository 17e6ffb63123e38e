# SPDX-License-Identifier: Apache-2.0
"""Quantized frozen kernels, dequantized where they are used (QLoRA, arXiv:2305.14314).

    kind   code                                      scale                        bytes per weight
    int8   int8                                      float32, per output          1.01
    nf4    4 bits: 16 quantiles of a normal          bfloat16, per TILE inputs    0.53
           distribution                              of an output

Dims: L layers, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import struct

from jaxllm.errors import UserError

TILE = 64  # inputs that share a scale: QLoRA's block size


@struct.dataclass
class Quantized:
    """A kernel [..., I, O] as codes and scales; leading dims count layers and experts.

    codes: int8 [..., I, O]; for nf4 uint8 [..., I / 2, O], two inputs in a byte, because a scan
    over layers would unpack a sub-byte dtype. scale: [..., 1, O]; for nf4 [..., I / tile, O].
    """

    codes: Any
    scale: Any
    kind: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        *layers, rows, outputs = self.codes.shape
        return (*layers, rows * 2 if self.kind == "nf4" else rows, outputs)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return self.codes.dtype

    @property
    def nbytes(self) -> int:
        # Not of the arrays: a model built as shapes has ShapeDtypeStructs, which have no nbytes.
        return sum(x.size * x.dtype.itemsize for x in (self.codes, self.scale))


def _tile(inputs: int) -> int:
    """Even divisor of `inputs` that is nearest to TILE."""
    sizes = [size for size in range(16, 129, 2) if inputs % size == 0]
    if not sizes:
        raise UserError(
            "peft.quantize_base: nf4 needs weights whose number of inputs has an even divisor from "
            f"16 to 128, not {inputs}; use int8"
        )
    return min(sizes, key=lambda size: abs(size - TILE))


@partial(jax.jit, static_argnums=1)  # qwix's nf4 needs 129 bytes per weight unless jitted, then 8
def _quantize_layer(w: jax.Array, kind: str) -> Quantized:
    if w.ndim > 2:
        return jax.lax.map(lambda expert: _quantize_layer(expert, kind), w)
    w = w.astype(jnp.float32)
    if kind == "int8":
        quantized = qwix.quantize(w, jnp.int8, channelwise_axes=(1,))
        return Quantized(quantized.qvalue, quantized.scale, kind)
    tiles = {0: _tile(w.shape[0])}
    quantized = qwix.quantize(
        w, "nf4", channelwise_axes=(1,), tiled_axes=tiles, scale_dtype=jnp.bfloat16
    )
    codes = quantized.qvalue.astype(jnp.uint8)
    return Quantized(codes[0::2] | codes[1::2] << 4, quantized.scale, kind)


def quantize(kernel: jax.Array, kind: str, place: Callable[[jax.Array], jax.Array]) -> Quantized:
    """A stack of kernels [L, (E,) I, O] as int8 or nf4, quantized layer by layer.

    `place` puts each resulting array on its devices. Raises UserError if no nf4 tile divides I.
    """
    layers = [_quantize_layer(w, kind) for w in kernel]
    return jax.tree.map(lambda *leaves: place(jnp.stack(leaves)), *layers)


def dense(w: Any, dtype: Any) -> jax.Array:
    """A layer's kernel [(E,) I, O] in `dtype`."""
    if not isinstance(w, Quantized):
        return w.astype(dtype)
    codes, scale = w.codes, w.scale.astype(jnp.float32)
    if w.kind == "int8":
        return (codes.astype(jnp.float32) * scale).astype(dtype)
    if codes.ndim > 2:
        return jax.vmap(lambda expert: dense(expert, dtype))(w)
    codes = jnp.stack([codes & 15, codes >> 4], 1).reshape(scale.shape[0], -1, scale.shape[1])
    levels = qwix.dequantize(qwix.QArray(jnp.arange(16, dtype=jnp.uint8), jnp.ones(1), None, "nf4"))
    values = levels.at[codes].get(mode="promise_in_bounds") * scale[:, None]
    return values.reshape(-1, scale.shape[1]).astype(dtype)
