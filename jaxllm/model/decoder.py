# SPDX-License-Identifier: Apache-2.0
"""The decoder: embed, L blocks under one scan, final norm, head.

Dims: B rows, T tokens, D model width, H heads, N key/value heads, K head_dim, L layers, V tokens of
the vocabulary, S texts in a row.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.core import Tracer

from jaxllm.mesh import constrain, gathered
from jaxllm.model.adapter import NO_ADAPTER, Adapter
from jaxllm.model.block import Block
from jaxllm.model.cache import Cache, written
from jaxllm.model.config import ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.layers import Embed, Linear, RMSNorm
from jaxllm.model.rope import rope_table, text_lengths
from jaxllm.ops.attention import EVERYWHERE
from jaxllm.ops.decoding import cache_dtype
from jaxllm.ops.matmul import product, softcapped
from jaxllm.ops.quantized import Quantized
from jaxllm.ops.residuals import kept

# What the backward pass may keep; it recomputes the rest of each layer.
REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.save_only_these_names("layer"),
    "dots": jax.checkpoint_policies.save_only_these_names("layer", "attention", "dot"),
    "names": jax.checkpoint_policies.save_only_these_names("layer", "attention"),
}

HEAD_AXES = ("embed", "vocab")
SCORE_AXES: Any = ("embed", None)


class Decoder(nnx.Module):
    """A causal language model: `model(tokens) -> logits`; a reward model: scores.

    Args:
      cfg: its shape.
      rngs: `params` stream for the random weights, `peft` for those that a PEFT method adds.
      dtype: of the weights. compute_dtype: of activations and products (default: the weights').
      remat: none | full | dots | names, what a layer's backward pass recomputes.
      scan_unroll: layers in one iteration of the scan.
      peft: what is added to the weights, and which of them are trained.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        compute_dtype: Any = None,
        remat: str = "none",
        scan_unroll: int = 1,
        peft: Adapter = NO_ADAPTER,
    ):
        @nnx.split_rngs(splits=cfg.num_layers)
        @partial(nnx.vmap, in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(cfg, peft=peft, dtype=dtype, rngs=rngs)

        self.cfg = cfg
        self.peft = peft
        self.hf_config = ""  # the config.json it was made from, as text
        self.base = ""  # where its weights were loaded from
        self.compute_dtype = jnp.dtype(compute_dtype or dtype)
        self.remat, self.scan_unroll = remat, scan_unroll
        self.embed = Embed(cfg, peft=peft, dtype=dtype, rngs=rngs)
        self.layers: Any = stack(rngs)  # one Block whose weights are stacked, or a list: `apart`
        self.norm = RMSNorm(cfg, cfg.hidden_size, dtype=dtype)
        head_shape = (cfg.hidden_size, cfg.vocab_size)
        self.score = (
            Linear(
                cfg, "score", SCORE_AXES, (cfg.hidden_size, 1), peft=peft, dtype=dtype, rngs=rngs
            )
            if cfg.scores
            else None
        )
        self.head = (
            None
            if cfg.tie_embeddings or cfg.scores
            else Linear(cfg, "head", HEAD_AXES, head_shape, peft=peft, dtype=dtype, rngs=rngs)
        )
        self.prefix = peft.prefix(cfg, rngs)
        self.value: Any = nnx.data(None)  # PPO's critic (objectives/ppo.py)

    @property
    def quantized(self) -> bool:
        """Whether weights of the layers are held in fewer bits."""
        return isinstance(self.layers.attn.o.kernel.get_value(), Quantized)

    def hidden(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        rng: jax.Array | None = None,
        adapter_weights: jax.Array | None = None,
    ) -> Any:
        """Last hidden states after the final norm, [B, T, D] in compute_dtype.

        tokens, segment_ids (default: one segment, no padding) and positions (default: 0, 1, …) are
        int32 [B, T]. With a cache the tokens are written into its next slots and attend to what it
        holds; returns (hidden, cache) then. rng: typed keys [B] for dropout, None = no
        dropout. adapter_weights: float32 [B, adapters], how much of each adapter a row gets (default: peft's own).
        """
        segments = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
        ctx = self.context(rng, adapter_weights)
        x = self.embed(tokens, self.compute_dtype, ctx)
        if self.cfg.embed_scale != 1.0:
            x = x * jnp.asarray(self.cfg.embed_scale, x.dtype)
        return self.run(x, segments, positions, cache, ctx)

    def context(
        self, rng: jax.Array | None = None, adapter_weights: jax.Array | None = None
    ) -> Context:
        """The context of the embedding and the head."""
        if adapter_weights is None and self.peft.adapter_weights:
            adapter_weights = jnp.asarray([self.peft.adapter_weights])
        return Context(rng=rng, adapter_weights=adapter_weights)

    def run(
        self, x: jax.Array, segments: jax.Array, positions: Any, cache: Cache | None, ctx: Context
    ) -> Any:
        """`hidden` from the embeddings on."""
        cfg = self.cfg
        B, T = segments.shape
        keys, offset = segments, 0
        if positions is None:
            positions = jnp.arange(T) + (0 if cache is None else cache.length)
            positions = jnp.broadcast_to(positions, (B, T))
        kv: Any = None
        if cache is not None:
            kv, offset = (cache.k, cache.v), cache.length
            keys = lax.dynamic_update_slice(cache.segments, segments, (0, offset))
        elif self.prefix is not None:
            kv, offset = self.prefix.kv(self), self.prefix.length
            positions = positions + offset
            keys = jnp.pad(segments, ((0, 0), (offset, 0)), constant_values=EVERYWHERE)
        if cache is None:
            lengths = text_lengths(segments, positions)
            ropes = [rope_table(r, cfg.head_dim, positions, lengths) for r in cfg.ropes]
        else:  # rows of a table of all slots: else each layer computes its angles anew
            slots = cache.segments.shape[1]
            tables = [rope_table(r, cfg.head_dim, jnp.arange(slots), slots) for r in cfg.ropes]
            ropes = [tuple(jnp.take(x, positions, 0, mode="clip") for x in t) for t in tables]
        ctx = replace(
            ctx,
            segment_ids=segments,
            key_segment_ids=keys,
            positions=positions,
            rope_tables=ropes,
            offset=offset,
        )
        prefix = cache is None and kv is not None
        if isinstance(self.layers, nnx.List):
            assert cache is not None
            return self.through(x, cache, ctx)
        graph, stacked = nnx.split(self.layers)

        def body(x, scanned):
            params, kind, layer, kv = scanned
            block = nnx.merge(graph, params)
            return block(kept(x, "layer"), ctx.at_layer(layer), kind, kv, prefix)

        if self.remat != "none" and cache is None:
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        layers = jnp.arange(cfg.num_layers)
        kinds = jnp.asarray(cfg.layer_kinds or (0,) * cfg.num_layers, jnp.int32)
        x, kv = lax.scan(body, x, (stacked, kinds, layers, kv), unroll=self.scan_unroll)
        x = self.norm(x)
        return x if cache is None else (x, Cache(kv[0], kv[1], keys, offset + T).laid())

    def through(self, x: jax.Array, cache: Cache, ctx: Context) -> tuple[jax.Array, Cache]:
        """The rest of `run` with a cache, one layer after another where they are `apart`."""
        kinds = self.cfg.layer_kinds or (0,) * self.cfg.num_layers
        ks, vs = [], []
        for layer, (block, kind) in enumerate(zip(self.layers, kinds, strict=True)):
            kv = cache.k[layer], cache.v[layer]
            x, (k, v) = block(x, ctx.at_layer(layer), kind, kv, False)
            ks.append(k)
            vs.append(v)
        gather = tuple if isinstance(cache.k, tuple) else jnp.stack
        made = Cache(gather(ks), gather(vs), ctx.key_segment_ids, cache.length + x.shape[1])
        return self.norm(x), made.laid()

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """A cache of `slots` for texts, which holds what the model puts before each of them."""
        P = 0 if self.prefix is None else self.prefix.length
        cache = Cache.empty(self.cfg, rows, P + slots, cache_dtype(self.compute_dtype))
        k, v, segments = cache.k, cache.v, cache.segments
        if self.prefix is not None:
            before = (y.swapaxes(2, 3) for y in self.prefix.kv(self))
            k, v = jax.vmap(partial(written, offset=0))((k, v), *before)
            segments = segments.at[:, :P].set(EVERYWHERE)
        if isinstance(self.layers, nnx.List):
            k, v = tuple(k), tuple(v)
        return Cache(k, v, segments, P)

    def head_kernel(self) -> jax.Array:
        """[D, V], the transposed token table when tied; float32 or bfloat16 as stored."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def head_terms(
        self, hidden: jax.Array, rng: jax.Array | None = None, adapter_weights: Any = None
    ) -> list[tuple[jax.Array, jax.Array]]:
        """[(x [..., K], w [K, V])], whose products add up to the logits: the head's, and LoRA's."""
        terms = [(hidden, self.head_kernel())]
        if self.head is not None and self.head.lora is not None:
            terms += self.head.lora.terms(hidden, self.context(rng, adapter_weights))
        return terms

    def logits(self, hidden: jax.Array, adapter_weights: jax.Array | None = None) -> jax.Array:
        """[..., D] -> float32 [..., V], soft-capped where the family does; not rounded before."""
        if self.head is None:  # a CPU has a bfloat16 kernel for the table as it lies alone
            table = gathered(self.embed.embedding[...].astype(hidden.dtype), HEAD_AXES[::-1])
            logits = product(hidden, table, (hidden.ndim - 1, 1), jnp.float32)
            return softcapped(logits, self.cfg.logit_softcap)
        raw = [
            product(x, gathered(w.astype(x.dtype), HEAD_AXES), (x.ndim - 1, 0), jnp.float32)
            for x, w in self.head_terms(hidden, adapter_weights=adapter_weights)
        ]
        return softcapped(sum(raw[1:], raw[0]), self.cfg.logit_softcap)

    def scores(self, hidden: jax.Array, segment_ids: jax.Array, segments: jax.Array) -> jax.Array:
        """A reward model's score of each of `segments` [B, S] (0 = none, whose score is 0).

        It is read at the segment's last token, whatever that is; float32 [B, S].
        """
        last = last_tokens(segment_ids, segments)
        found = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[..., None], 1)
        assert self.score is not None
        w = gathered(self.score.kernel[...], SCORE_AXES)
        score = jnp.einsum("bsd,do->bs", found.astype(jnp.float32), w.astype(jnp.float32))
        return jnp.where(last >= 0, score, 0.0)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: int | None = None,
    ) -> jax.Array:
        """Logits of the next token, float32 [B, T, V]; a reward model's scores, float32 [B, S].

        segments: S, texts in a row; default: as many as there are (inside jit: 1).
        """
        hidden = self.hidden(tokens, segment_ids, positions)
        if not self.cfg.scores:
            return self.logits(hidden)
        ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
        traced = isinstance(ids, Tracer)
        count = segments or (1 if traced else max(int(ids.max()), 1))
        each = jnp.broadcast_to(jnp.arange(1, count + 1), (len(ids), count))
        return self.scores(hidden, ids, each)


def last_tokens(segment_ids: jax.Array, segments: jax.Array) -> jax.Array:
    """Where each of `segments` [B, S] ends in its row: int32 [B, S], -1 = it has no token there."""
    here = segment_ids[:, None, :] == segments[..., None]
    here &= segments[..., None] > 0
    return jnp.max(jnp.where(here, jnp.arange(segment_ids.shape[1]), -1), -1)


def apart(model: Decoder) -> Decoder:
    """The model with each layer's weights in arrays of their own, no stack; kernels, biases and the
    token table are cast to the compute dtype once. For generation on CPU: there every slice of a
    bfloat16 stack is copied, and a cast at each step costs more than its product.
    """
    dtype = model.compute_dtype

    def ready(state: Any, layer: int | None = None) -> Any:
        def one(path: Any, variable: Any) -> Any:
            value = variable.get_value()
            if layer is not None:
                value = jax.tree.map(lambda x: x[layer], value)
            if path[-1] in ("kernel", "bias", "embedding") and not isinstance(value, Quantized):
                axes = variable.get_metadata("axes")[-value.ndim :]
                value = constrain(value.astype(dtype), *axes)
            return variable.replace(value)

        return nnx.from_flat_state([(p, one(p, v)) for p, v in nnx.to_flat_state(state)])

    graph, stacked = nnx.split(model.layers)
    layers = [nnx.merge(graph, ready(stacked, i)) for i in range(model.cfg.num_layers)]
    model.layers = nnx.List(layers)
    for name in ("embed", "head"):
        if (module := getattr(model, name)) is not None:
            graph, state = nnx.split(module)
            setattr(model, name, nnx.merge(graph, ready(state)))
    return model


def merge(graph: Any, trainable: Any, frozen: Any) -> Any:
    """The model whose weights are the leaves of two nested dicts."""
    state = nnx.State({})
    for part in (frozen, trainable):
        state = nnx.merge_state(state, nnx.State(part))
    return nnx.merge(graph, state)
