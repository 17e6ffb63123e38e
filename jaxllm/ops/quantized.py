# SPDX-License-Identifier: Apache-2.0
"""Frozen kernels held in fewer bits, widened where they are used (QLoRA, arXiv:2305.14314).

int8: one float32 scale for each output. nf4: 16 levels that are the quantiles of a normal
distribution, one bfloat16 scale for TILE inputs of an output. Bytes a weight: about 1.01 and 0.53.

Dims: L layers, I in, O out.
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
from jaxllm.mesh import Axes, gathered

TILE = 64


@struct.dataclass
class Quantized:
    """A kernel [(L,) I, O] as codes and scales.

    codes: int8 [.., I, O]; of nf4 uint8 [.., I / 2, O], two inputs a byte (a scan over layers would
    unpack a sub-byte dtype). scale: [.., 1, O], of nf4 [.., I / tile, O].
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
        return self.codes.nbytes + self.scale.nbytes


def _tile(inputs: int) -> int:
    """The even divisor of the inputs nearest to TILE."""
    fits = [size for size in range(16, 129, 2) if inputs % size == 0]
    if not fits:
        raise UserError(
            f"peft.quantize_base nf4 wants inputs that divide by 16 to 128, seen {inputs}; use int8"
        )
    return min(fits, key=lambda size: abs(size - TILE))


@partial(jax.jit, static_argnums=1)  # qwix's nf4 takes 129 bytes a weight by itself, 8 when jitted
def _quantize_layer(w: jax.Array, kind: str) -> Quantized:
    w = w.astype(jnp.float32)
    if kind == "int8":
        found = qwix.quantize(w, jnp.int8, channelwise_axes=(1,))
        return Quantized(found.qvalue, found.scale, kind)
    tiles = {0: _tile(w.shape[0])}
    found = qwix.quantize(
        w, "nf4", channelwise_axes=(1,), tiled_axes=tiles, scale_dtype=jnp.bfloat16
    )
    codes = found.qvalue.astype(jnp.uint8)
    return Quantized(codes[0::2] | codes[1::2] << 4, found.scale, kind)


def quantize(kernel: jax.Array, kind: str, place: Callable[[jax.Array], jax.Array]) -> Quantized:
    """A stack of kernels [L, I, O] as int8 or nf4, layer by layer; `place` lays the results out.

    Raises ValueError where nf4's tiles do not divide the inputs.
    """
    if kind == "nf4":
        _tile(kernel.shape[1])
    layers = [_quantize_layer(w, kind) for w in kernel]
    return jax.tree.map(lambda *leaves: place(jnp.stack(leaves)), *layers)


def dense(w: Any, axes: Axes, dtype: Any) -> jax.Array:
    """A layer's kernel [I, O] in `dtype`, whole along fsdp; codes are gathered as they are."""
    if not isinstance(w, Quantized):
        return gathered(w.astype(dtype), axes)
    codes, scale = gathered(w.codes, axes), gathered(w.scale, axes).astype(jnp.float32)
    if w.kind == "int8":
        return (codes.astype(jnp.float32) * scale).astype(dtype)
    codes = jnp.stack([codes & 15, codes >> 4], 1).reshape(scale.shape[0], -1, scale.shape[1])
    values = _levels().at[codes].get(mode="promise_in_bounds") * scale[:, None]
    return values.reshape(-1, scale.shape[1]).astype(dtype)


def _levels() -> jax.Array:
    """What the 16 codes of nf4 stand for, float32."""
    codes = qwix.QArray(jnp.arange(16, dtype=jnp.uint8), jnp.ones(1), None, "nf4")
    return qwix.dequantize(codes)
