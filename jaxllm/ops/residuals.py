# SPDX-License-Identifier: Apache-2.0
"""Values that a layer keeps for its backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxllm.mesh import platform


def named(x: jax.Array, name: str) -> jax.Array:
    """x under a name that a policy of decoder.REMAT may keep for the backward pass; without a
    gradient: for the forward rule of a function that has its own.

    Of what it keeps of its layers a scan writes slot by slot, and of bfloat16 a CPU does so by way
    of a float32 copy of the whole: there the bits are kept.
    """
    if platform() != "cpu" or x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    bits = checkpoint_name(lax.bitcast_convert_type(x, jnp.uint16), name)
    return lax.bitcast_convert_type(bits, x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def kept(x: jax.Array, name: str) -> jax.Array:
    """`named`, with the gradient of x."""
    return named(x, name)


@kept.defjvp
def _kept_jvp(name: str, x: Any, dx: Any) -> tuple[jax.Array, Any]:
    return named(x[0], name), dx[0]
