# SPDX-License-Identifier: Apache-2.0
"""What the routers of mixtures of experts did in a forward pass: their losses and metrics.

Dims: B rows, T tokens, E experts, C chosen ones, L layers, S texts of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """What the routers of several layers did: sums over the layers, each float32."""

    probs: Any  # [B, T, E]: softmax of the router's logits
    chosen: Any  # [B, T, E]: 1 for each chosen expert
    square: Any  # [B, T]: (log Σ exp logits)²
    entropy: Any  # [B, T]: of probs, in nats
    load: Any = None  # [E]; of several layers [L, E]: tokens without padding that chose the expert


def routing_of(logits_BTE: jax.Array, chosen_BTC: jax.Array, real_BT: jax.Array) -> Routing:
    """Of one layer. real: False for padding."""
    log_z_BT = jax.nn.logsumexp(logits_BTE, -1)
    probs_BTE = jnp.exp(logits_BTE - log_z_BT[..., None])
    entropy_BT = log_z_BT - jnp.sum(probs_BTE * logits_BTE, -1)
    chosen_BTE = jnp.sum(jax.nn.one_hot(chosen_BTC, logits_BTE.shape[-1]), -2)
    load_E = jnp.sum(chosen_BTE, (0, 1), where=real_BT[..., None])
    return Routing(probs_BTE, chosen_BTE, jnp.square(log_z_BT), entropy_BT, load_E)


def router_metrics(
    routings: Mapping[str, Routing | None], segment_ids_BT: jax.Array
) -> dict[str, Any]:
    """{metric: (Σ, weight)} of a forward pass; {} without experts. routings: by stack of layers.

    The weight is the number of tokens without padding. The balance loss of a text is E Σ_e f_e P_e,
    where f_e is the mean over its tokens and all layers of the number of choices of expert e, and
    P_e that of its probability (arXiv:2101.03961, eq. 4 to 6): `load_balancing_loss_func` of
    transformers on the text alone. It is taken text by text so that it does not depend on which
    texts share a row or a micro-batch. `router_z_loss` is the mean over tokens and layers of
    (log Σ exp logits)² (arXiv:2202.08906, eq. 5). `expert_load` has the load of each expert,
    {stack: [L, E]}.
    """
    present = {name: routing for name, routing in routings.items() if routing is not None}
    if not present:
        return {}
    loads = {name: routing.load for name, routing in present.items()}
    layers = sum(len(load_LE) for load_LE in loads.values())
    parts = [replace(routing, load=None) for routing in present.values()]
    total: Any = jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *parts)
    real_BT = segment_ids_BT != 0
    tokens = jnp.sum(real_BT, dtype=jnp.float32)

    def by_text(x_BTE: jax.Array) -> jax.Array:
        """Sums over the tokens of each text, [B, S, E]."""
        slots = x_BTE.shape[1] + 1  # texts are numbered from 1; a shared prompt is -1, the last
        at_BT = segment_ids_BT % slots
        zeros = jnp.zeros((slots, x_BTE.shape[2]))
        return jax.vmap(lambda x_TE, at_T: zeros.at[at_T].add(x_TE))(x_BTE, at_BT)

    probs_BSE, chosen_BSE = (by_text(x * real_BT[..., None]) for x in (total.probs, total.chosen))
    length_BS1 = jnp.maximum(by_text(jnp.float32(real_BT)[..., None]), 1)
    products = probs_BSE * lax.stop_gradient(chosen_BSE) / length_BS1
    balance = total.probs.shape[-1] / layers**2 * jnp.sum(products)
    entropy = jnp.sum(total.entropy, where=real_BT)
    return {
        "balance_loss": (balance, tokens),
        "router_z_loss": (jnp.sum(total.square, where=real_BT) / layers, tokens),
        "router_entropy": (lax.stop_gradient(entropy) / layers, tokens),
        "expert_load": (lax.stop_gradient(loads), tokens),
    }
