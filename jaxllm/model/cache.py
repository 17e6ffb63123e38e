# SPDX-License-Identifier: Apache-2.0
"""Keys and values that precede the tokens of a call: a decoding cache, or virtual tokens.

Dims: L layers, B rows, T tokens, S slots of the cache, P virtual tokens, N key/value heads,
K head_dim. In latent attention (model/mla.py) k is the rotated part of the keys and v the latent:
N is 1, and the widths of k and v differ. Of a delta net (model/delta.py): G and H heads, K and V
features, w = W - 1 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.mesh import constrain
from jaxllm.model.config import ModelConfig
from jaxllm.ops.attention import EVERYWHERE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of a layer, or of a stack of layers. Only this class depends on their layout.

    Each has the layout in which a CPU computes its product fastest.
    """

    k: jax.Array  # [(L,) B, N, K, S]
    v: jax.Array  # [(L,) B, N, S, K]

    def write(self, k_BTNK: jax.Array, v_BTNK: jax.Array, offset: Any) -> LayerCache:
        """Stores keys and values [(L,) B, T, N, K] at slots offset, offset + 1, …; B may be 1."""
        k, v = jnp.moveaxis(k_BTNK, -3, -1), v_BTNK.swapaxes(-3, -2)
        shape = self.k.shape[:-3]
        k, v = (jnp.broadcast_to(x, (*shape, *x.shape[-3:])).astype(self.k.dtype) for x in (k, v))
        zeros = (0,) * len(shape)
        return LayerCache(
            lax.dynamic_update_slice(self.k, k, (*zeros, 0, 0, offset)),
            lax.dynamic_update_slice(self.v, v, (*zeros, 0, offset, 0)),
        )

    def read(self, length: int | None = None) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the first `length` slots (default: all), [(L,) B, S, N, K]."""
        k, v = self.k[..., :length], self.v[..., :length, :]
        return jnp.moveaxis(k, -1, -3), v.swapaxes(-3, -2)

    def grown(self, slots: int) -> LayerCache:
        """With empty slots after its own, `slots` in all."""
        more, none = (0, slots - self.k.shape[-1]), [(0, 0)]
        k = jnp.pad(self.k, none * (self.k.ndim - 1) + [more])
        return LayerCache(k, jnp.pad(self.v, none * (self.v.ndim - 2) + [more, (0, 0)]))

    def extend(
        self, k_BTNK: jax.Array, v_BTNK: jax.Array, offset: Any
    ) -> tuple[LayerCache, jax.Array, jax.Array]:
        """Writes the keys and values of the tokens: (new cache, keys and values [B, S, N, K]).

        With a static offset, as in a prefill, the empty slots are left out and the result has the
        tokens' dtype. Otherwise it has the cache's.
        """
        cache = self.write(k_BTNK, v_BTNK, offset)
        if isinstance(offset, int) and not offset:
            return cache, k_BTNK, v_BTNK
        if not isinstance(offset, int):
            return cache, *cache.read()
        k_BSNK, v_BSNK = cache.read(offset + k_BTNK.shape[1])
        return cache, k_BSNK.astype(k_BTNK.dtype), v_BSNK.astype(v_BTNK.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StateCache:
    """What a recurrent layer, or a stack of them, knows of the past tokens of a row, which are one
    text: the last inputs of its convolution, and its state (`ModelConfig.remembered`)."""

    # of q and k, each [(L,) B, G, w, K], and of v [(L,) B, H, w, V]; of a short convolution the one
    # [(L,) B, 1, w, D]; of a state space those of v, k and q; 0 where a text is shorter
    windows: tuple[jax.Array, ...]
    state: Any = None  # float32 [(L,) B, H, K, V]; None of a short convolution

    @staticmethod
    def empty(cfg: ModelConfig, *lead: int, dtype: Any) -> StateCache:
        """lead: B, or L and B."""
        window, inputs, state = cfg.remembered
        windows = (jnp.zeros((*lead, heads, window, width), dtype) for heads, width in inputs)
        return StateCache(tuple(windows), state and jnp.zeros((*lead, *state), jnp.float32))

    def after(self, inputs: Any, real_BT: jax.Array, state: Any = None) -> StateCache:
        """After more tokens: `inputs` like the windows, but [B, T, heads, .], 0 for padding."""
        T = real_BT.shape[1]
        stop_B = jnp.max(jnp.where(real_BT, 1 + jnp.arange(T), 0), 1)

        def last(window_BHwF: jax.Array, x_BTHF: jax.Array) -> jax.Array:
            x_BHTF = x_BTHF.swapaxes(1, 2).astype(window_BHwF.dtype)
            both = jnp.concatenate([window_BHwF, x_BHTF], 2)
            at = stop_B[:, None] + jnp.arange(window_BHwF.shape[2])
            return jnp.take_along_axis(both, at[:, None, :, None], 2)

        return StateCache(tuple(map(last, self.windows, inputs)), state)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VirtualTokens:
    """Keys and values of a layer, or of a stack of layers, that precede every text of every row."""

    k: jax.Array  # [(L,) 1, P, N, K]
    v: jax.Array  # [(L,) 1, P, N, K]

    def extend(
        self, k_BTNK: jax.Array, v_BTNK: jax.Array, offset: Any
    ) -> tuple[None, jax.Array, jax.Array]:
        """(None, keys and values [B, P + T, N, K])."""

        def prepend(prefix: jax.Array, x: jax.Array) -> jax.Array:
            prefix = jnp.broadcast_to(prefix, (x.shape[0], *prefix.shape[1:]))
            return jnp.concatenate([prefix, x], 1)

        return None, prepend(self.k, k_BTNK), prepend(self.v, v_BTNK)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """The keys and values that a layer attended to, which later layers use too, and its new past.
    A stack has one such layer."""

    k: jax.Array  # [(1,) B, S, N, K]
    v: jax.Array  # [(1,) B, S, N, K]
    past: LayerCache | None

    @staticmethod
    def split(stack: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        """(the new past of a stack, stacked or not, the keys and values of its layer)."""
        if isinstance(stack, tuple):
            (layer,) = stack
            return (layer.past,), (layer.k, layer.v)
        return stack.past, (stack.k[0], stack.v[0])


def virtual_tokens(
    cfg: ModelConfig, k_L1PNK: jax.Array, v_L1PNK: jax.Array
) -> tuple[VirtualTokens, ...]:
    """The virtual tokens of each stack, from those of all layers."""
    stacks = cfg.stacks.values()
    if len(stacks) == 1:
        return (VirtualTokens(k_L1PNK, v_L1PNK),)
    return tuple(VirtualTokens(k_L1PNK[np.array(at)], v_L1PNK[np.array(at)]) for at in stacks)


def _read(stack: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of a stack, stacked or not, [R, B, S, N, K]."""
    if isinstance(stack, LayerCache):
        return stack.read()
    k, v = zip(*(layer.read() for layer in stack), strict=True)
    return jnp.stack(k), jnp.stack(v)


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the past tokens. All rows write the same slots, short rows padding."""

    # of each stack: a LayerCache or StateCache, or a tuple of those of unstacked layers; None where
    # layers use the keys and values of others, or have no mixer
    layers: tuple[Any, ...]
    segment_ids: Any  # int32 [B, S]; 0 = empty or padding
    length: Any  # slots that are written: a Python int where it is static, else an int32 scalar

    @staticmethod
    def empty(cfg: ModelConfig, rows: int, slots: int, dtype: Any) -> Cache:
        def stack(layers: range) -> LayerCache | StateCache | None:
            count, kind = len(layers), cfg.kinds_by_layer[layers[0]]
            if kind.mixer == "none" or kind.uses is not None:
                return None
            if kind.mixer != "attention":
                return StateCache.empty(cfg, count, rows, dtype=dtype)
            heads, k_dim, v_dim = cfg.of(kind).cached_dims
            k = jnp.zeros((count, rows, heads, k_dim, slots), dtype)
            return LayerCache(k, jnp.zeros((count, rows, heads, slots, v_dim), dtype))

        layers = tuple(map(stack, cfg.stacks.values()))
        return Cache(layers, jnp.zeros((rows, slots), jnp.int32), 0).constrained()

    def with_prefix(self, tokens: tuple[VirtualTokens, ...]) -> Cache:
        """This empty cache with virtual tokens, of each stack, in its first slots, seen by every
        token."""
        P = tokens[0].k.shape[2]
        pairs = zip(self.layers, tokens, strict=True)
        layers = tuple(stack.write(virtual.k, virtual.v, 0) for stack, virtual in pairs)
        return Cache(layers, self.segment_ids.at[:, :P].set(EVERYWHERE), P)

    def read(self, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
        """Keys and values of all slots and layers, [L, B, S, N, K]."""
        k, v = zip(*map(_read, self.layers), strict=True)
        if len(k) == 1:
            return k[0], v[0]
        place = np.argsort(np.concatenate([*cfg.stacks.values()]))
        return jnp.concatenate(k)[place], jnp.concatenate(v)[place]

    def repeated(self, copies: int) -> Cache:
        """A cache with `copies` of each row, one after another."""
        if copies == 1:
            return self
        layers = jax.tree.map(lambda x: jnp.repeat(x, copies, x.ndim - 4), self.layers)
        segment_ids = jnp.repeat(self.segment_ids, copies, 0)
        return Cache(layers, segment_ids, self.length).constrained()

    def grown(self, slots: int) -> Cache:
        """A copy with empty slots after its own, `slots` in all."""

        def grow(layer: Any) -> Any:
            return layer.grown(slots) if isinstance(layer, LayerCache) else _copy(layer)

        kinds = (LayerCache, StateCache)
        layers = jax.tree.map(grow, self.layers, is_leaf=lambda x: isinstance(x, kinds))
        more = slots - self.segment_ids.shape[1]
        segment_ids = jnp.pad(self.segment_ids, ((0, 0), (0, more)))
        return Cache(layers, segment_ids, _copy(self.length)).constrained()

    def constrained(self) -> Cache:
        """Rows sharded over the mesh's data axes and heads over its tensor axis."""

        def shard(x: jax.Array) -> jax.Array:
            axes = ("layers", "batch", "kv_heads", None, None)
            return constrain(x, *axes[-x.ndim :])

        layers = jax.tree.map(shard, self.layers)
        return Cache(layers, constrain(self.segment_ids, "batch", None), self.length)
