# SPDX-License-Identifier: Apache-2.0
"""Experts that are divided among the devices of the mesh axis `expert`.

A device gathers the tokens of the axis, computes the outputs of its own experts, and these are
summed while they are scattered back. (An all-to-all of fixed size that drops no token would have a
place for each token between any two devices, and send as much.)

Any number of tokens may choose the experts of one device, so its rows are computed in as many
chunks of a fixed size as there are. The gathered tokens take more memory with a larger axis; the
rows of a chunk do not.

Dims: N tokens, C chosen experts of a token, D model width, E experts of the device, M rows of a
chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxllm.ops.grouped import by_group

CHUNKS = 2  # of a device, if all devices' experts are chosen equally often
# (rows [M, D] sorted by expert, their weights [M], the expert of each [M], rows of each expert [E],
# kernels) -> float32 [M, D]
ExpertRows = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Any], jax.Array]

_gathered = partial(lax.all_gather, axis_name="expert", tiled=True)
_scattered = partial(lax.psum_scatter, axis_name="expert", tiled=True)


@dataclass(frozen=True)
class Chunk:
    """Rows of a device's experts, sorted by expert."""

    choice: jax.Array  # [M]: index into the choices [N · C] of all tokens
    token: jax.Array  # [M]
    expert: jax.Array  # [M]: on this device
    sizes: jax.Array  # [E]: rows of each expert; those after their sum belong to none

    def weighted(
        self, run: ExpertRows, rows: jax.Array, weights: jax.Array, kernels: Any
    ) -> jax.Array:
        """The rows' outputs, weighted, float32 [M, D]."""
        out_MD = run(rows, weights, self.expert, self.sizes, kernels)
        real = jnp.arange(len(rows)) < jnp.sum(self.sizes)
        return jnp.where(real[:, None], out_MD, 0)


class Chunks:
    """The rows of a device's experts. chosen: int32 [N, C], of the device's own tokens; experts: of
    the device."""

    def __init__(self, chosen_NC: jax.Array, experts: int):
        first = lax.axis_index("expert") * experts
        own = _gathered(chosen_NC).ravel() - first
        # The rows of the other devices' experts are the last.
        self.expert = jnp.where((own >= 0) & (own < experts), own, experts)
        order, _, sizes = by_group(self.expert, experts + 1)
        self.size = max(chosen_NC.size // CHUNKS, 1)
        self.order = jnp.pad(order, (0, self.size))
        self.ends = jnp.cumsum(sizes[:-1])
        self.count = -(-self.ends[-1] // self.size)
        self.choices = chosen_NC.shape[1]

    def at(self, i: jax.Array) -> Chunk:
        choice = lax.dynamic_slice_in_dim(self.order, i * self.size, self.size)
        ends = jnp.clip(self.ends - i * self.size, 0, self.size)
        sizes = jnp.diff(ends, prepend=0).astype(jnp.int32)
        return Chunk(choice, choice // self.choices, self.expert[choice], sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def over_experts(
    run: ExpertRows, x_ND: jax.Array, weights_NC: jax.Array, chosen_NC: jax.Array, kernels: Any
) -> jax.Array:
    """Σ of the outputs of the chosen experts, weighted: float32 [N, D].

    Called where the axis `expert` is manual. x, weights and chosen are those of the device's own
    tokens, kernels those of its experts. The backward pass computes the rows again.
    """
    x_ND, weights_NC = _gathered(x_ND), _gathered(weights_NC)
    chunks = Chunks(chosen_NC, len(jax.tree.leaves(kernels)[0]))

    def add(i: jax.Array, y_ND: jax.Array) -> jax.Array:
        at = chunks.at(i)
        out_MD = at.weighted(run, x_ND[at.token], weights_NC.ravel()[at.choice], kernels)
        return y_ND.at[at.token].add(out_MD)

    y_ND = lax.fori_loop(0, chunks.count, add, jnp.zeros(x_ND.shape, jnp.float32))
    return _scattered(y_ND)


def _forward(run: ExpertRows, *primals: Any) -> tuple[jax.Array, Any]:
    """primals: with symbolic zeros, which say which weights have a gradient."""
    trained = [i for i, leaf in enumerate(jax.tree.leaves(primals[3])) if leaf.perturbed]
    args = jax.tree.map(lambda leaf: leaf.value, primals)
    return over_experts(run, *args), (args, dict.fromkeys(trained))


def _backward(run: ExpertRows, residuals: Any, g_ND: Any) -> tuple[Any, ...]:
    (x_ND, weights_NC, chosen_NC, kernels), trained = residuals
    leaves, tree = jax.tree.flatten(kernels)
    chunks = Chunks(chosen_NC, len(leaves[0]))
    g_ND = jnp.zeros(g_ND.shape) if isinstance(g_ND, SymbolicZero) else g_ND
    x, weights, g = _gathered(x_ND), _gathered(weights_NC), _gathered(g_ND)
    zeros = [jnp.zeros(y.shape, jnp.float32) for y in (x, weights.ravel())]
    start = (*zeros, [jnp.zeros(leaves[i].shape, jnp.float32) for i in trained])

    def add(i: jax.Array, totals: Any) -> Any:
        dx_ND, dweights, dleaves = totals
        at = chunks.at(i)

        def weighted(rows: jax.Array, weights_M: jax.Array, some: list[jax.Array]) -> jax.Array:
            new = dict(zip(trained, some, strict=True))
            whole = tree.unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)])
            return at.weighted(run, rows, weights_M, whole)

        inputs = x[at.token], weights.ravel()[at.choice], [leaves[i] for i in trained]
        drows, dweights_M, dsome = jax.vjp(weighted, *inputs)[1](g[at.token])
        return (
            dx_ND.at[at.token].add(drows.astype(jnp.float32)),
            dweights.at[at.choice].add(dweights_M),
            jax.tree.map(jnp.add, dleaves, dsome),
        )

    dx, dweights, dsome = lax.fori_loop(0, chunks.count, add, start)
    new = dict(zip(trained, dsome, strict=True))
    dleaves = [new[i].astype(leaf.dtype) if i in new else None for i, leaf in enumerate(leaves)]
    dweights = _scattered(dweights.reshape(weights.shape))
    return _scattered(dx).astype(x_ND.dtype), dweights, None, tree.unflatten(dleaves)


over_experts.defvjp(_forward, _backward, symbolic_zeros=True)
