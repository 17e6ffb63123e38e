# SPDX-License-Identifier: Apache-2.0
"""Platform choices of decoding: dtype of the cache, layout of the weights, greedy argmax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.mesh import platform
from jaxllm.ops.matmul import ByOutputs


def cache_dtype(compute_dtype: Any) -> Any:
    """dtype of the key/value cache: `compute_dtype`, float32 on a CPU.

    XLA:CPU writes a slot of a bfloat16 array through a float32 copy of the full array.
    """
    return jnp.float32 if platform() == "cpu" else compute_dtype


def prefers_unstacked() -> bool:
    """True where decoding is faster with one array per layer than with stacked weights.

    XLA:CPU copies every slice that it takes of a stack.
    """
    return platform() == "cpu"


def kernel_for_decoding(w: jax.Array) -> Any:
    """A layer's kernel [I, O], stored as it multiplies few rows fastest."""
    single_device = jax.sharding.get_abstract_mesh().size <= 1
    turned = platform() == "cpu" and single_device and w.ndim == 2 and w.dtype == jnp.float32
    return ByOutputs(w.T) if turned else w


def shared_length(length: int) -> int:
    """The length of rows which is that of all calls, so that they share one program: a little more
    than `length` on a CPU, whose work grows with the padding, and a multiple of 64 elsewhere."""
    multiple = 8 if platform() == "cpu" else 64
    return -(-length // multiple) * multiple


def argmax(x: jax.Array) -> jax.Array:
    """int32 [...]: index of the first maximum over the last dim; XLA:CPU's own is 10 times slower.

    Without a maximum (NaN) it is the last index on a CPU.
    """
    if platform() != "cpu":
        return jnp.argmax(x, -1).astype(jnp.int32)
    indices = jnp.arange(x.shape[-1], dtype=jnp.int32)
    is_max = x == jnp.max(x, -1, keepdims=True)
    return jnp.min(jnp.where(is_max, indices, x.shape[-1] - 1), -1)
