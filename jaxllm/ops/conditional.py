# SPDX-License-Identifier: Apache-2.0
"""An update that happens only if a condition computed on the device is true."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.mesh import platform


def update_if(condition: jax.Array, update: Callable[..., Any], old: Any, *args: Any) -> Any:
    """`update(*old, *args)` if the bool scalar is true, else `old`; both have the same shapes.

    On a CPU it is a branch: to select between old and new weights, XLA:CPU needs a second buffer
    for the token table (SmolLM2 widths: 652 instead of 534 MiB of temporary memory). Elsewhere it
    selects: on an H100 a step took 169.7 ms with a branch, 166.2 and 167.6 ms with selection.
    """
    if platform() == "cpu":
        return jax.lax.cond(condition, update, lambda *values: values[: len(old)], *old, *args)
    return jax.tree.map(partial(jnp.where, condition), update(*old, *args), old)
