# SPDX-License-Identifier: Apache-2.0
"""The shape and features of a decoder. A family chooses among them and adds no code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal, get_type_hints

from jaxllm.errors import UserError, seen

Placement = Literal["pre", "post", "sandwich", "parallel", "parallel_each"]  # of norms in a layer


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base and how it is stretched to longer contexts (rope.rope_frequencies).

    Fields that a kind does not use stay at their defaults. Lengths are in tokens.
    """

    theta: float = 10_000.0
    # "none": no rotation (NoPE)
    kind: Literal[
        "default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional", "none"
    ] = "default"
    partial: float = 1.0  # share of head_dim that is rotated
    factor: float = 1.0
    original_length: int = 0  # context length before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range outward
    mscale: float = 1.0  # what cos and sin are multiplied by: yarn and longrope
    long_factor: tuple[float, ...] = ()  # longrope, one each frequency
    short_factor: tuple[float, ...] = ()  # longrope
    # Latent attention multiplies its scores by (1 + 0.1 · mscale_all_dim · log factor)²: yarn.
    mscale_all_dim: float = 0.0
    # Queries are multiplied by 1 + query_beta · log(1 + ⌊(position + shift) / original_length⌋).
    query_beta: float = 0.0
    query_shift: int = 0


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer: RoPE, window, and which weights a layer has."""

    rope: int = 0  # index into ModelConfig.ropes
    window: int | None = None  # attend to this many last tokens, itself included; None = all
    dense: bool = False  # an MLP in a model whose other layers have experts
    # A layer may be one of the two alone: a mixer, or an MLP or experts.
    mixer: Literal["attention", "delta", "conv", "mamba", "none"] = "attention"
    mlp: bool = True
    # Of such a layer where they differ from the model's (`ModelConfig.of`).
    head_dim: int | None = None
    num_kv_heads: int | None = None
    intermediate_size: int | None = None
    norm_placement: Placement | None = None
    sinks: bool | None = None
    values_from_keys: bool = False  # its values are its keys before their norm and positions
    # A layer keeps its keys and values under a number, and later ones that have none use them.
    keeps: int | None = None
    uses: int | None = None

    @property
    def routed(self) -> bool:
        """True if it has experts, in a model that has some."""
        return self.mlp and not self.dense

    @property
    def structure(self) -> tuple[Any, ...]:
        """Equal for layers that one stack can hold, whose weights have equal shapes."""
        rest = self.values_from_keys, self.keeps, self.uses
        parts = self.mixer, self.mlp, self.dense
        return (*parts, *(getattr(self, name) for name in OWN), *rest)


OWN_SIZES = "head_dim", "num_kv_heads", "intermediate_size"
OWN = *OWN_SIZES, "norm_placement", "sinks"


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP (model/moe.py)."""

    count: int
    top_k: int  # experts of a token
    size: int  # hidden features of an expert
    score: Literal["softmax", "sigmoid"] = "softmax"  # of the router's logits
    has_bias: bool = False  # added to the scores for the choice alone
    renormalised: bool = True  # the weights of the chosen experts are divided by their sum
    sum_eps: float = 0.0  # added to that sum
    scale: float = 1.0  # of the weights
    # The experts are in groups; those of the best ones can be chosen, by the sum of a group's best
    # scores: of two (arXiv:2412.19437), or the best alone (arXiv:2405.04434).
    groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    shared_size: int = 0  # hidden features of the MLP that every token passes; 0 = none
    shared_gate: bool = False  # its output is multiplied by sigmoid(w · x)
    shared_mean: bool = False  # the output is the mean of those of the chosen and shared experts
    # The router, the other experts and their output have norms apart from the shared expert's, and
    # the output of each expert a learned scale.
    branch: bool = False
    bias: bool = False  # the router and the matrices of the experts have biases
    # (up + 1) · gate · sigmoid(alpha · gate) of gate and up clamped to the limit, in place of
    # act(gate) · up; limit 0 = not clamped.
    limit: float = 0.0
    alpha: float = 1.702
    on_input: bool = False  # the weights multiply the experts' inputs in place of their outputs
    latent_size: int = 0  # features of their inputs and outputs, between projections; 0 = D


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (model/mla.py). head_dim is that of the rotated features."""

    kv_rank: int  # features of a token's latent, from which all heads' keys and values are made
    nope_dim: int  # features of a head's queries and keys that are not rotated
    value_dim: int  # features of a head's values
    q_rank: int = 0  # of the queries' latent; 0 = queries are made from x


@dataclass(frozen=True)
class Indexer:
    """What chooses the keys of each query of latent attention (model/indexer.py)."""

    top_keys: int  # of a query
    heads: int
    dim: int  # features of a head; as many are rotated as in the attention
    pairs: Literal["halves", "neighbours"] = "halves"  # which are rotated together


@dataclass(frozen=True)
class Delta:
    """The gated delta net of layers whose mixer it is (model/delta.py)."""

    key_heads: int  # of queries and keys
    value_heads: int  # a multiple of key_heads
    key_dim: int  # features of a head
    value_dim: int
    taps: int  # tokens that the convolution sees
    # q, k, v and the gate are one tensor, in which the heads follow one another; so are beta and
    # decay. Else q, k and v follow one another in one tensor, and the others have their own.
    grouped: bool = False
    negative: bool = False  # β is up to 2: a token may turn what it corrects into its negative
    norm_eps: float = 0.0  # of the norm of the output; 0 = the model's


@dataclass(frozen=True)
class Convolution:
    """The short convolution of layers whose mixer it is (model/conv.py)."""

    taps: int  # tokens that it sees
    bias: bool = False  # it and the projections have biases


@dataclass(frozen=True)
class Mamba:
    """The state-space mixer of layers whose mixer it is (model/mamba.py)."""

    heads: int
    head_dim: int
    groups: int  # of heads that share the keys and queries of the state
    state: int  # features of such a key
    taps: int  # tokens that the convolution sees
    conv_bias: bool = True
    bias: bool = False  # of the projections
    activation: str = "silu"  # after the convolution
    least_step: float = 0.0  # δ of a token is at least this

    @property
    def widths(self) -> dict[str, int]:
        """{a part of the projection: its features}, in the order of HF's tensor."""
        inner, keys = self.heads * self.head_dim, self.groups * self.state
        return dict(zip(MAMBA_PARTS, (inner, inner, keys, keys, self.heads), strict=True))


MAMBA_PARTS = "gate", "x", "b", "c", "dt"


@dataclass(frozen=True)
class LayerEmbeds:
    """An embedding of each layer, which it adds to the residual stream (model/layer_embeds.py)."""

    size: int  # features
    vocab_size: int


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape. Widths are in features, lengths in tokens."""

    family: str  # key of families.table.FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    ropes: tuple[Rope, ...] = (Rope(),)
    kinds: tuple[LayerKind, ...] = (LayerKind(),)  # the distinct kinds of layer
    layer_kinds: tuple[int, ...] = ()  # per layer, index into kinds; empty = all of kind 0
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # gemma multiplies by (1 + weight)
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_weight: bool = True  # olmo and nanochat have none
    # olmo2: post; gemma2: sandwich; cohere2: parallel, one norm before both attention and MLP;
    # gpt_neox: parallel_each, one before each of them
    norm_placement: Placement = "pre"
    # Over each head (qwen3), over all (olmo2), or over each head after RoPE (hunyuan); "unit" is
    # that without weights, in layers with RoPE (llama4).
    qk_norm: Literal["none", "head", "full", "rotated", "unit"] = "none"
    value_dim: int | None = None  # features of a head's values; None = head_dim
    value_scale: float = 1.0  # multiplies values
    value_norm: bool = False  # each head's values are divided by their root mean square
    qkv_bias: bool = False
    qkv_clip: float = 0.0  # queries, keys and values are clipped to ± this; 0 = not clipped
    o_bias: bool = False
    sinks: bool = False  # each head has a learned score of no key, which adds to its softmax's sum
    mlp_bias: bool = False
    gated_mlp: bool = True  # down(act(gate x) · up x); False: down(act(up x))
    activation: Literal["silu", "gelu_tanh", "gelu", "relu2", "xielu"] = "silu"
    # Which features are rotated together; "swapped" turns the halves the other way round.
    rope_pairs: Literal["halves", "swapped", "neighbours"] = "halves"
    query_scale: float = 0.0  # multiplies q·k; 0 = head_dim ** -0.5
    attention_softcap: float = 0.0  # 0 = none
    # The tokens of a text are in chunks as long as a layer's window; a query sees those of its own.
    chunked: bool = False
    logit_softcap: float = 0.0
    embed_scale: float = 1.0
    embed_norm: bool = False  # each embedding is divided by its root mean square
    residual_scale: float = 1.0  # multiplies what a sub-layer adds to the residual stream
    layer_scale: bool = False  # each layer multiplies the residual stream by a number, not trained
    logit_scale: float = 1.0
    latent: Latent | None = None
    indexer: Indexer | None = None
    delta: Delta | None = None
    conv: Convolution | None = None
    mamba: Mamba | None = None
    # Attention's output is multiplied by the sigmoid of a part of q's output, or of a projection of
    # its own, with a number for each feature or for each head.
    output_gate: Literal["none", "query", "feature", "head"] = "none"
    experts: Experts | None = None
    layer_embeds: LayerEmbeds | None = None
    mtp: int = 0  # modules of multi-token prediction that are trained with the model (model/mtp.py)
    head_bias: bool = False
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    scores: bool = False  # a reward model: a score of each text in place of the next token's logits
    wrapper: str = ""  # model_type of the multimodal model that it is a part of (families.wrappers)

    def of(self, kind: LayerKind) -> ModelConfig:
        """The config with what a layer of that kind has of its own."""
        own = {name: getattr(kind, name) for name in OWN}
        return replace(self, **{name: value for name, value in own.items() if value is not None})

    @property
    def kinds_by_layer(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return tuple(self.kinds[k] for k in self.layer_kinds or (0,) * self.num_layers)

    @property
    def scans(self) -> tuple[tuple[range, ...], ...]:
        """The layers cut into scans, each over one or more stacks, as `cut_into_scans` does."""
        return cut_into_scans(tuple(kind.structure for kind in self.kinds_by_layer))

    @property
    def stacks(self) -> dict[str, range]:
        """{attribute of the decoder that holds a stack: its layers}, in the order of the scans. The
        only stack is `layers`; one of several is named by its first layer, as `layers_3`."""
        stacks = [layers for scan in self.scans for layers in scan]
        if len(stacks) == 1:
            return {"layers": stacks[0]}
        return {f"layers_{layers.start}": layers for layers in stacks}

    @property
    def mtp_names(self) -> tuple[str, ...]:
        """Attributes of the decoder that hold modules of multi-token prediction, in order."""
        return tuple(f"mtp_{depth}" for depth in range(1, self.mtp + 1))

    @property
    def mtp_kind(self) -> LayerKind:
        """The kind of their layers: attention, and the MLP or experts of the last layer."""
        return replace(self.kinds_by_layer[-1], mixer="attention")

    @property
    def attention_dims(self) -> tuple[int, int]:
        """Features of a head's queries and keys, and of its values."""
        if (latent := self.latent) is None:
            return self.head_dim, self.value_dim or self.head_dim
        return latent.nope_dim + self.head_dim, latent.value_dim

    @property
    def cached_dims(self) -> tuple[int, int, int]:
        """Heads of the cache, features of a key, and of a value. That of latent attention has one
        head: the rotated part of all heads' keys with the indexer's key, and the latent."""
        if self.latent is None:
            return self.num_kv_heads, *self.attention_dims
        index_dim = 0 if self.indexer is None else self.indexer.dim
        return 1, self.head_dim + index_dim, self.latent.kv_rank

    @property
    def recurrent(self) -> str:
        """What has a state that goes from token to token; "" in a model of attention alone."""
        names = {"delta": "delta nets", "conv": "convolutions", "mamba": "state spaces"}
        return next((names[kind.mixer] for kind in self.kinds if kind.mixer in names), "")

    @property
    def remembered(self) -> tuple[int, tuple[tuple[int, int], ...], tuple[int, int, int] | None]:
        """What such a layer knows of the past: tokens of its convolution's window, (heads,
        features) of its inputs, and the dims of its state, if it has one."""
        if (delta := self.delta) is not None:
            G, H, K, V = delta.key_heads, delta.value_heads, delta.key_dim, delta.value_dim
            return delta.taps - 1, ((G, K), (G, K), (H, V)), (H, K, V)
        if (mamba := self.mamba) is not None:
            H, P, G, N = mamba.heads, mamba.head_dim, mamba.groups, mamba.state
            return mamba.taps - 1, ((H, P), (G, N), (G, N)), (H, N, P)
        assert self.conv is not None
        return self.conv.taps - 1, ((1, self.hidden_size),), None

    @property
    def tied_head(self) -> bool:
        """True if the token table is also the head; never for a reward model."""
        return self.tie_embeddings and not self.scores


LONGEST_PERIOD = 8  # layers in the body of a scan


@cache
def cut_into_scans(structures: tuple[Any, ...]) -> tuple[tuple[range, ...], ...]:
    """The layers, whose structures are given, as scans that repeat a period of unlike layers.

    A scan is a tuple of stacks, one for each place in its period: six layers of two alternating
    structures are `(range(0, 6, 2), range(1, 6, 2))`, 45 equal ones `(range(45),)`. There are as
    few stacks as possible, since each is compiled on its own.
    """
    total = len(structures)
    fewest = [0] * (total + 1)  # stacks of the layers from i on
    first: list[tuple[range, ...]] = [()] * total  # the scan that begins at i then
    repeats = [[1] * total for _ in range(LONGEST_PERIOD + 1)]  # of the period that begins at i
    for i in reversed(range(total)):
        fewest[i] = total
        for period in range(1, min(LONGEST_PERIOD, total - i) + 1):
            after = i + period
            if structures[i:after] == structures[after : after + period]:
                repeats[period][i] = repeats[period][after] + 1
            most = repeats[period][i]
            for count in (most, max(most - 1, 1)):  # the next scan may begin with the last period
                stop = i + period * count
                if period + fewest[stop] < fewest[i] or not first[i]:
                    fewest[i] = period + fewest[stop]
                    first[i] = tuple(range(i + place, stop, period) for place in range(period))
    scans = [first[0]]
    while (stop := scans[-1][-1][-1] + 1) < total:
        scans.append(first[stop])
    return tuple(scans)


def check_numbers(cfg: ModelConfig, keys: Mapping[str, str]) -> None:
    """Raises UserError for sizes that are not positive int32, and numbers that are not finite.

    keys: {field: the name of its key, for messages}.
    """
    parts: list[Any] = [cfg, *cfg.ropes, *cfg.kinds]
    groups = cfg.latent, cfg.indexer, cfg.delta, cfg.conv, cfg.mamba, cfg.experts, cfg.layer_embeds
    parts += [part for part in groups if part is not None]
    optional_sizes = "window", "value_dim", *OWN_SIZES
    for part in parts:
        hints = get_type_hints(type(part))
        for f in fields(part):
            value, hint = getattr(part, f.name), hints[f.name]
            is_size = hint is int or (f.name in optional_sizes and value is not None)
            optional = ("rope", "original_length", "query_shift", "q_rank", "mtp")
            optional += ("shared_size", "latent_size")
            low = 0 if f.name in optional else 1
            if is_size and not (type(value) is int and low <= value < 2**31):
                raise UserError(
                    f"{keys.get(f.name, f.name)} is {seen(value)}; it must be an integer from {low}"
                )
            numbers: Any = value if hint == tuple[float, ...] else [value] if hint is float else []
            if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
                raise UserError(
                    f"{keys.get(f.name, f.name)} is {seen(value)}; it must be a finite number"
                )
