# SPDX-License-Identifier: Apache-2.0
"""The decoder: embedding, stacks of layers, final norm, head.

Dims: B rows, T tokens, D model width, V vocabulary, R inner width of a term of the head (D, or
LoRA's rank), L layers, S texts of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.core import Tracer

from jaxllm.collectives import gathered
from jaxllm.mesh import manual_rows
from jaxllm.model.adapter import NO_ADAPTER, Adapter
from jaxllm.model.cache import Cache, virtual_tokens
from jaxllm.model.config import ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.layer_embeds import LayerEmbeds
from jaxllm.model.layers import NORMS, Embed, Linear, unit_rms
from jaxllm.model.mtp import MTP, predict_ahead
from jaxllm.model.rope import rope_tables
from jaxllm.model.routing import router_metrics
from jaxllm.model.stack import Scan, make_stack
from jaxllm.ops.attention import EVERYWHERE
from jaxllm.ops.cross_entropy import HEAD_AXES, gathered_head
from jaxllm.ops.decoding import cache_dtype
from jaxllm.ops.matmul import ByOutputs, product, product_by_outputs, softcapped
from jaxllm.ops.quantized import Quantized

SCORE_AXES: Any = (None, None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Forward:
    """The result of a forward pass up to the head."""

    x: jax.Array  # [B, T, D] after the final norm, in compute_dtype
    cache: Cache | None  # after the tokens of the call; None without one
    aux: dict[str, Any]  # {name: (Σ, weight)} of auxiliary losses and metrics (`router_metrics`)
    ahead: tuple[jax.Array, ...] = ()  # as x, of each module of multi-token prediction


class Decoder(nnx.Module):
    """A causal language model: `model(tokens) -> logits`; a reward model: scores.

    Args:
      cfg: the model's shape.
      rngs: stream `params` initializes the weights, stream `peft` those of the PEFT method.
      dtype: of the weights. compute_dtype: of activations and products (default: the weights').
      remat: none | full | dots | names | offload, what a layer's backward pass recomputes.
      scan_unroll: layers in one iteration of the scan.
      attention: auto | xla | splash | mosaic | triton, the kernel (ops.attention).
      loss_blocks: blocks of the vocabulary in the loss; 0 = `cross_entropy.blocks_of`.
      mlp_blocks: blocks of an MLP's hidden features (`MLP.in_blocks`).
      peft: the PEFT method, which adds weights and selects those that are trained.
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
        attention: str = "auto",
        loss_blocks: int = 0,
        mlp_blocks: int = 1,
        peft: Adapter = NO_ADAPTER,
    ):
        self.cfg = cfg
        self.peft = peft
        self.hf_config = ""  # the config.json it was made from, as text
        self.base = ""  # where its weights were loaded from
        self.compute_dtype = jnp.dtype(compute_dtype or dtype)
        self.remat, self.scan_unroll, self.attention = remat, scan_unroll, attention
        self.loss_blocks, self.mlp_blocks = loss_blocks, mlp_blocks
        keys: dict[str, Any] = dict(peft=peft, dtype=dtype, rngs=rngs)
        self.embed = Embed(cfg, "embed", (cfg.vocab_size, cfg.hidden_size), **keys)
        self.layer_embeds = LayerEmbeds(cfg, **keys) if cfg.layer_embeds else None
        # Each is a Block whose weights have a leading dim; an nnx.List of Blocks after `unstack`.
        for name in cfg.stacks:  # "layers", if all layers have one structure
            setattr(self, name, make_stack(cfg, name, **keys))
        self.norm = NORMS[cfg.norm](cfg, cfg.hidden_size, dtype=dtype)
        for name in cfg.mtp_names:
            setattr(self, name, MTP(cfg, name, dtype=dtype, rngs=rngs))
        head_shape = (cfg.hidden_size, cfg.vocab_size)
        self.score = (
            Linear(cfg, "score", SCORE_AXES, (cfg.hidden_size, 1), **keys) if cfg.scores else None
        )
        self.head = (
            None
            if cfg.tie_embeddings or cfg.scores
            else Linear(cfg, "head", HEAD_AXES, head_shape, bias=cfg.head_bias, **keys)
        )
        self.prefix = peft.prefix(cfg, rngs)
        self.value: Any = nnx.data(None)  # PPO's critic (objectives/ppo.py)

    @property
    def quantized(self) -> bool:
        """True if the kernels of the layers are quantized."""
        first = self.first_stack
        module = first.mlp.down if first.attn is None else first.attn.o
        return isinstance(module.kernel.get_value(), Quantized)

    @property
    def first_stack(self) -> Any:
        """A Block whose weights have a leading dim, or an nnx.List of its layers (`unstack`)."""
        return getattr(self, next(iter(self.cfg.stacks)))

    @property
    def scans(self) -> tuple[Scan, ...]:
        """The layers, in order, as the scans that go through them."""
        kinds, names = self.cfg.kinds_by_layer, iter(self.cfg.stacks)

        def scan(stacks: tuple[range, ...]) -> Scan:
            blocks = tuple(getattr(self, next(names)) for _ in stacks)
            own = tuple(tuple(kinds[i] for i in layers) for layers in stacks)
            return Scan(blocks, stacks, own, self.compute_dtype, self.remat, self.scan_unroll)

        return tuple(map(scan, self.cfg.scans))

    def context(
        self, rng: jax.Array | None = None, adapter_weights: jax.Array | None = None
    ) -> Context:
        """The context of the embedding and the head."""
        if adapter_weights is None and self.peft.adapter_weights:
            adapter_weights = jnp.asarray([self.peft.adapter_weights])
        return Context(rng=rng, adapter_weights=adapter_weights, kernel=self.attention)

    def hidden(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        rng: jax.Array | None = None,
        adapter_weights: jax.Array | None = None,
    ) -> Forward:
        """Hidden states after the final norm; with a cache also the cache after these tokens.

        Args:
          tokens: int32 [B, T]. With a cache they are written to its next slots and attend to all
            of its tokens.
          segment_ids: int32 [B, T]; default: one segment, no padding.
          positions: int32 [B, T]; default: 0, 1, …, after the cache's.
          rng: typed keys [B], one per row, for dropout; None = no dropout.
          adapter_weights: float32 [B, adapters], weight of each adapter in each row; default: the
            PEFT config's.
        """
        ctx = self.context(rng, adapter_weights)
        with jax.named_scope("embed"):
            x_BTD = self.embed(tokens, self.compute_dtype, ctx)
            if self.cfg.embed_scale != 1.0:
                x_BTD = x_BTD * jnp.asarray(self.cfg.embed_scale, x_BTD.dtype)
            if self.layer_embeds is not None:
                ctx = replace(ctx, embeds=self.layer_embeds(tokens, x_BTD, ctx))
        return self.forward(x_BTD, segment_ids, positions, cache, ctx)

    def forward(
        self,
        x_BTD: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        ctx: Context | None = None,
    ) -> Forward:
        """`hidden` from the scaled embeddings x_BTD on."""
        cfg, (B, T), embedded_BTD = self.cfg, x_BTD.shape[:2], x_BTD
        x_BTD = unit_rms(x_BTD, cfg.norm_eps) if cfg.embed_norm else x_BTD
        if segment_ids is None:
            segment_ids = jnp.ones((B, T), jnp.int32)
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = jnp.broadcast_to(start + jnp.arange(T), (B, T))
        pasts: tuple[Any, ...] = (None,) * len(cfg.stacks)
        key_segment_ids, offset = None, 0
        if cache is not None:
            pasts, offset = cache.layers, cache.length
            cached = lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, offset))
            if not isinstance(offset, int):
                key_segment_ids = cached
            elif offset:  # after a prefix; in an empty cache the keys are the tokens' own
                key_segment_ids = cached[:, : offset + T]
        elif self.prefix is not None:
            pasts, offset = virtual_tokens(cfg, *self.prefix.kv(self)), self.prefix.length
            positions = positions + offset
            key_segment_ids = jnp.pad(
                segment_ids, ((0, 0), (offset, 0)), constant_values=EVERYWHERE
            )
        assert positions is not None
        slots = None if cache is None else cache.segment_ids.shape[1]
        # Elsewhere, in an evaluation over a mesh, XLA would replicate the blocks of split weights.
        divisible = manual_rows() or jax.sharding.get_abstract_mesh().size <= 1
        ctx = replace(
            ctx or self.context(),
            mlp_blocks=self.mlp_blocks if cache is None and divisible else 1,
            segment_ids=segment_ids,
            positions=positions,
            key_segment_ids=key_segment_ids,
            offset=offset,
            rope_tables=rope_tables(cfg, segment_ids, positions, slots),
        )
        new: tuple[Any, ...] = ()
        routings: tuple[Any, ...] = ()
        for scan in self.scans:
            here = pasts[len(new) : len(new) + len(scan.blocks)]
            x_BTD, after, routed, ctx = scan(x_BTD, ctx, here)
            new, routings = new + after, routings + routed
        x_BTD = self.norm(x_BTD)
        if cache is not None:
            return Forward(x_BTD, Cache(new, cached, offset + T).constrained(), {})
        by_stack = dict(zip(cfg.stacks, routings, strict=True))
        ahead, more = predict_ahead(self, embedded_BTD, x_BTD, ctx)
        return Forward(x_BTD, None, router_metrics(by_stack | more, segment_ids), ahead)

    def empty_cache(self, rows: int, slots: int) -> Cache:
        """A cache with `slots` for texts, after the slots of the virtual tokens."""
        length = 0 if self.prefix is None else self.prefix.length
        cache = Cache.empty(self.cfg, rows, length + slots, cache_dtype(self.compute_dtype))
        if self.prefix is None:
            return cache
        return cache.with_prefix(virtual_tokens(self.cfg, *self.prefix.kv(self)))

    def head_kernel(self) -> jax.Array:
        """[D, V], the transposed token table when tied; float32 or bfloat16 as stored. Split along
        fsdp."""
        return self.embed.embedding[...].T if self.head is None else self.head.kernel.get_value()

    def head_input(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D], multiplied by the factor of the logits."""
        scale = self.cfg.logit_scale
        return hidden if scale == 1 else hidden * jnp.asarray(scale, hidden.dtype)

    def head_terms(
        self, hidden: jax.Array, rng: jax.Array | None = None, adapter_weights: Any = None
    ) -> list[tuple[jax.Array, jax.Array]]:
        """[(x [..., K], w [K, V])], whose products add up to the logits: the head's, of ones and
        its bias, and LoRA's."""
        hidden = self.head_input(hidden)
        terms = [(hidden, self.head_kernel())]
        if self.head is not None and self.head.bias is not None:
            terms.append((jnp.ones_like(hidden[..., :1]), self.head.bias[...][None]))
        if self.head is not None and self.head.lora is not None:
            terms += self.head.lora.terms(hidden, self.context(rng, adapter_weights))
        return terms

    def logits(self, hidden: jax.Array, adapter_weights: jax.Array | None = None) -> jax.Array:
        """[..., D] -> float32 [..., V], soft-capped where the family does; not rounded before."""
        if self.head is None:  # a CPU has a bfloat16 kernel for the table's own layout only
            table = self.embed.embedding[...]
            if not isinstance(self.first_stack, nnx.List):  # `unstack` has rounded it
                table = table.astype(hidden.dtype)
            table = gathered(table, HEAD_AXES[::-1], (self.cfg.vocab_size, self.cfg.hidden_size))
            hidden = self.head_input(hidden)
            logits = product_by_outputs(hidden, table, jnp.float32)
            return softcapped(logits, self.cfg.logit_softcap)

        def term(x: jax.Array, w: Any) -> jax.Array:
            if isinstance(w, ByOutputs):
                return product_by_outputs(x, w.rows, jnp.float32)
            return product(x, gathered_head(x, w), (x.ndim - 1, 0), jnp.float32)

        raw = [term(x, w) for x, w in self.head_terms(hidden, adapter_weights=adapter_weights)]
        return softcapped(sum(raw[1:], raw[0]), self.cfg.logit_softcap)

    def scores(self, hidden: jax.Array, segment_ids: jax.Array, segments: jax.Array) -> jax.Array:
        """A reward model's score of each of `segments` [B, S] (0 = none, whose score is 0).

        It is read at the segment's last token, whichever token that is; float32 [B, S].
        """
        last = last_tokens(segment_ids, segments)
        found = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[..., None], 1)
        assert self.score is not None
        w_DO = self.score.kernel[...].astype(jnp.float32)
        score = jnp.einsum("bsd,do->bs", found.astype(jnp.float32), w_DO)
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
        hidden = self.hidden(tokens, segment_ids, positions).x
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


def merge(graph: Any, trainable: Any, frozen: Any) -> Any:
    """The model whose weights are the leaves of two nested dicts."""
    state = nnx.State({})
    for part in (frozen, trainable):
        state = nnx.merge_state(state, nnx.State(part))
    return nnx.merge(graph, state)
