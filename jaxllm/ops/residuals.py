# SPDX-License-Identifier: Apache-2.0
"""Residuals: values that a layer stores for its backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxllm.errors import UserError
from jaxllm.mesh import platform


def saveable_in_vjp(x: jax.Array, name: str) -> jax.Array:
    """`saveable` without a gradient, for the forward rule of a custom_vjp.

    A scan over layers writes its residuals into one buffer. XLA:CPU updates a bfloat16 buffer
    through a full float32 copy, so residuals are stored as uint16 there.
    """
    if platform() != "cpu" or x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    bits = checkpoint_name(lax.bitcast_convert_type(x, jnp.uint16), name)
    return lax.bitcast_convert_type(bits, x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def saveable(x: jax.Array, name: str) -> jax.Array:
    """x, under a name by which a policy of stack.REMAT saves it instead of recomputing it."""
    return saveable_in_vjp(x, name)


@saveable.defjvp
def _saveable_jvp(name: str, x: Any, dx: Any) -> tuple[jax.Array, Any]:
    return saveable_in_vjp(x[0], name), dx[0]


def check_offload(mesh: Any) -> None:
    """Raises UserError if the devices of a mesh do not keep residuals in the host's memory."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if platform() == "cpu":
            raise UserError("model.remat: offload requires a TPU or GPU; set it to full")
