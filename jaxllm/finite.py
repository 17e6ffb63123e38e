# SPDX-License-Identifier: Apache-2.0
"""Checks that weights are finite, on the devices that have them."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import dist
from jaxllm.errors import UserError
from jaxllm.model.config import ModelConfig
from jaxllm.model.families.tensors import key_table, tensor_names


def check_finite(
    weights: Any, cfg: ModelConfig, where: str, remedy: str, dtype: str | None = None
) -> None:
    """Raises UserError that names a tensor with NaN or infinity, the same in every process.

    weights: a nested dict of arrays, some or all of those of a Decoder of shape `cfg`. where and
    remedy: the beginning and the end of the message. dtype: in which they must be finite.
    """
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    floats = [(path, x) for path, x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floats:
        return
    sharding = floats[0][1].sharding
    everywhere = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else None
    found = dist.gather(_finite(everywhere)([x for _, x in floats], dtype))
    for (path, _), finite in zip(floats, found, strict=True):
        if not finite.all():
            name = _tensor_name(path, int(np.argmin(finite)), cfg)
            raise UserError(f"{where}: {name} has values that are not finite; {remedy}")


@cache
def _finite(sharding: Any) -> Any:
    """Jitted (arrays, dtype) -> bool [N] of each array, N its first dim: True where all values are
    finite. sharding: of the results."""

    def finite(arrays: list[jax.Array], dtype: str | None) -> list[jax.Array]:
        own = [jnp.isfinite(x if dtype is None else x.astype(dtype)) for x in arrays]
        return [x.all(tuple(range(1, x.ndim))) for x in own]

    return jax.jit(finite, static_argnums=1, out_shardings=sharding)


def _tensor_name(path: Any, index: int, cfg: ModelConfig) -> str:
    """The name in a HF directory of a weight, or else its path; index: of the layer."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    for key in key_table(cfg):
        if key.path == name:
            names, layers = tensor_names(cfg, key.name), cfg.stacks.get(name.split(".")[0], ())
            at = index * len(names) // len(layers) if layers else index  # of a layer, an expert
            return names[min(at, len(names) - 1)]
    return name
