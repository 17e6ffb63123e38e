# SPDX-License-Identifier: Apache-2.0
"""The HF name of every weight."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from jaxllm.model.config import Delta, LayerKind, Mamba, ModelConfig
from jaxllm.model.families.table import FAMILIES
from jaxllm.model.families.wrappers import WRAPPERS, head_bias_of, head_of


def root_of(family: str, wrapper: str) -> str:
    """What the names of a decoder's weights begin with, except for the head's."""
    return WRAPPERS[wrapper].root if wrapper else FAMILIES[family].root


def embed_name(family: str, wrapper: str) -> str:
    """The HF name of the token table of a decoder, which may be in a wrapper."""
    table = FAMILIES[family].modules.get("embed", "embed_tokens")
    return f"{root_of(family, wrapper)}{table}.weight"


def module_name(stored: str, family: str, wrapper: str) -> str:
    """The name of a tensor in files as transformers' modules have it today."""
    for pattern, start in WRAPPERS[wrapper].stored if wrapper else ():
        if found := re.match(pattern, stored):
            return start + stored[found.end() :]
    for there, here in () if wrapper else FAMILIES[family].stored + FAMILIES[family].read:
        stored = stored.replace(there, here, 1)
    return stored


def stored_name(cfg: ModelConfig, name: str) -> str:
    """The inverse of `module_name`; a model in a wrapper is written by the names of modules."""
    for there, here in () if cfg.wrapper else FAMILIES[cfg.family].stored:
        name = name.replace(here, there, 1)
    return name


def _indices(name: str) -> list[str]:
    return re.findall(r"{(\w+)}", name)


def tensor_names(cfg: ModelConfig, name: str) -> list[str]:
    """The HF names that `name` stands for: one for each layer of a stack, if it has the stack's
    name in braces, and for each expert, if it has `{expert}`."""
    values: dict[str, range] = dict(cfg.stacks)
    if cfg.experts is not None:
        values["expert"] = range(cfg.experts.count)
    indices = _indices(name)
    grid = product(*(values[index] for index in indices))
    return [name.format(**dict(zip(indices, at, strict=True))) for at in grid]


@dataclass(frozen=True)
class Key:
    """A weight of the decoder and the HF tensors that store it.

    path: of the weight, dotted. name: of the tensors; each index in it (`{layers}`) is a
    leading dim of the weight. transpose: the tensor is […, out, in], the weight […, in, out].
    part: the outputs of a fused tensor that are the weight's. unit: a dim of size 1 of the tensor,
    which the weight lacks. either: files of transformers 5 have its last two dims swapped. exact:
    stored in float32 whatever the dtype of the weights is.
    """

    path: str
    name: str
    transpose: bool = False
    part: Sequence[int] | None = None
    unit: int | None = None
    either: bool = False
    exact: bool = False

    @property
    def out_dim(self) -> int:
        """The dim of a tensor that counts outputs."""
        return -2 if self.transpose else -1 if self.unit is None else 0

    def with_unit(self, dims: tuple[Any, ...], entry: int) -> tuple[Any, ...]:
        """The shape or index of a tensor, from the weight's: `entry` for the dim that it lacks."""
        return dims if self.unit is None else (*dims[: self.unit], entry, *dims[self.unit :])

    def at_outputs(self, index: tuple[Any, ...], outputs: Any) -> tuple[Any, ...]:
        """The index of a tensor with other outputs."""
        dim = self.out_dim % len(index)
        return (*index[:dim], outputs, *index[dim + 1 :])

    def within(self, index: tuple[slice, ...]) -> tuple[Any, ...]:
        """Where a slice of the weight is in a tensor of which it may be a part. Its outputs are a
        slice, or an array where those of other weights are between them."""
        if self.part is None:
            return index
        outputs = self.part[index[self.out_dim]]
        if isinstance(outputs, range):
            return self.at_outputs(index, slice(outputs[0], outputs[-1] + 1, outputs.step))
        return self.at_outputs(index, np.asarray(outputs))

    @property
    def stacked(self) -> int:
        """Leading dims of the weight, which are not dims of a tensor."""
        return len(_indices(self.name))


NORMS: dict[str, dict[str, str]] = {
    "pre": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {
        "attn_post_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    "sandwich": {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    "parallel": {"attn_norm": "input_layernorm"},
    "parallel_each": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
}


BRANCH = {  # of `Experts.branch`
    "norm.scale": "pre_feedforward_layernorm_2.weight",
    "post_norm.scale": "post_feedforward_layernorm_2.weight",
    "shared_post_norm.scale": "post_feedforward_layernorm_1.weight",
    "router_scale": "router.scale",
    "scale": "router.per_expert_scale",
}


def key_table(cfg: ModelConfig) -> list[Key]:
    """Every weight of the decoder once. Parts of a fused tensor are in its order."""
    keys = [Key("embed.embedding", embed_name(cfg.family, cfg.wrapper))]
    root = root_of(cfg.family, cfg.wrapper)
    if cfg.layer_embeds is not None:
        projection = f"{root}per_layer_model_projection.weight"
        keys += [
            Key("layer_embeds.table.embedding", f"{root}embed_tokens_per_layer.weight"),
            Key("layer_embeds.project.kernel", projection, True),
            Key("layer_embeds.norm.scale", f"{root}per_layer_projection_norm.weight"),
        ]
    for stack, layers in cfg.stacks.items():
        layer = f"{root}layers.{{{stack}}}."
        keys += _layer_keys(cfg, stack, layer, cfg.kinds_by_layer[layers[0]])
    keys += _norm_keys(cfg, "norm", root + FAMILIES[cfg.family].modules.get("norm", "norm"))
    for depth, module in enumerate(cfg.mtp_names):
        keys += _mtp_keys(cfg, module, depth)
    if cfg.scores:
        keys.append(Key("score.kernel", "score.weight", True))
    elif not cfg.tie_embeddings:
        keys.append(Key("head.kernel", head_of(cfg.wrapper), True))
        if cfg.head_bias:
            keys.append(Key("head.bias", head_bias_of(cfg.wrapper)))
    return keys


def keys_in(cfg: ModelConfig, names: Container[str]) -> list[Key]:
    """`key_table` of a checkpoint with tensors of these names. Experts that we write one by one may
    be fused in it, [expert, out, in], as in the modules of transformers 5; and those that we write
    fused may be modules, as in quantized checkpoints of llama4."""
    experts = cfg.experts
    if experts is None:
        return key_table(cfg)
    F, mlp = experts.size, FAMILIES[cfg.family].modules.get("mlp", "mlp")

    def stored(key: Key) -> Key:
        if not re.fullmatch(r"[^.]+\.mlp\.(gate|up|down)\.kernel", key.path):
            return key
        _, _, matrix, _ = key.path.split(".")
        fused = cfg.gated_mlp and matrix != "down"
        tensor = "gate_up_proj" if fused else f"{matrix}_proj"
        one_by_one = "{expert}" in key.name
        end = tensor if one_by_one else f"{{expert}}.{matrix}_proj.weight"
        name = re.sub(r"(layers\.[^.]+)\..*", rf"\1.{mlp}.experts.{end}", key.name)
        if not any(one in names for one in tensor_names(cfg, name)):
            return key
        parts = {"gate": range(F), "up": range(F, 2 * F)} if one_by_one and fused else {}
        return replace(key, name=name, transpose=True, part=parts.get(matrix), either=False)

    return list(map(stored, key_table(cfg)))


def _norm_keys(cfg: ModelConfig, path: str, name: str) -> list[Key]:
    keys = [Key(f"{path}.scale", f"{name}.weight")] if cfg.norm_weight else []
    return [*keys, Key(f"{path}.shift", f"{name}.bias")] if cfg.norm_bias else keys


def _delta_keys(delta: Delta, path: str, name: str, modules: dict[str, str]) -> list[Key]:
    """The weights of a stack of delta nets. modules: names of their own, in place of fused ones."""
    QK, HV = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    parts = {"q": range(QK), "k": range(QK, 2 * QK), "v": range(2 * QK, 2 * QK + HV)}
    others = {"gate": "in_proj_z", "beta": "in_proj_b", "decay": "in_proj_a"}
    if delta.grouped:
        others = {"qkvz": "in_proj_qkvz", "ba": "in_proj_ba"}
    linears = {n: modules.get(n, t) for n, t in (others | {"o": "out_proj"}).items()}
    keys = [Key(f"{path}{n}.kernel", f"{name}{t}.weight", True) for n, t in linears.items()]
    for n, part in parts.items():
        linear, conv = modules.get(n, "in_proj_qkv"), modules.get(f"{n}_conv", "conv1d")
        part = None if n in modules else part
        if not delta.grouped:
            keys.append(Key(f"{path}{n}.kernel", f"{name}{linear}.weight", True, part))
        keys.append(Key(f"{path}{n}_conv", f"{name}{conv}.weight", False, part, unit=1))
    norm = modules.get("norm", "norm")
    return [
        *keys,
        Key(f"{path}a_log", f"{name}A_log", exact=True),
        Key(f"{path}dt_bias", f"{name}dt_bias", exact=True),
        Key(f"{path}norm.scale", f"{name}{norm}.weight", exact=True),
    ]


def _attention_parts(kind: LayerKind) -> str:
    """The projections that such a layer has before its attention."""
    if kind.uses is not None:
        return "q"
    return "qk" if kind.values_from_keys else "qkv"


def _attention_keys(
    cfg: ModelConfig, kind: LayerKind, stack: str, layer: str, linear: Any
) -> list[Key]:
    """The weights before the attention of a stack; those that are modules are added by `linear`."""
    Q, KV = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    if cfg.latent is not None:
        keys = list[Key]()
        if cfg.latent.q_rank:
            linear("attn.q_a", "self_attn.q_a_proj", cfg.qkv_bias)
            keys += _norm_keys(cfg, f"{stack}.attn.q_norm", f"{layer}self_attn.q_a_layernorm")
        linear("attn.q_b", f"self_attn.{'q_b' if cfg.latent.q_rank else 'q'}_proj", False)
        linear("attn.kv_a", "self_attn.kv_a_proj_with_mqa", cfg.qkv_bias)
        keys += _norm_keys(cfg, f"{stack}.attn.kv_norm", f"{layer}self_attn.kv_a_layernorm")
        linear("attn.kv_b", "self_attn.kv_b_proj", False)
        return keys + (_indexer_keys(f"{stack}.attn", layer, linear) if cfg.indexer else [])
    if {"qkv", "qkv_heads"} & {*fused_in(cfg)}:
        parts = {"q": range(Q), "k": range(Q, Q + KV), "v": range(Q + KV, Q + 2 * KV)}
        if "qkv_heads" in fused_in(cfg):
            heads = np.arange(3 * Q).reshape(cfg.num_heads, 3, cfg.head_dim)
            parts = {part: (*heads[:, i].flatten().tolist(),) for i, part in enumerate("qkv")}
        for part, outputs in parts.items():
            linear(f"attn.{part}", "self_attn.qkv_proj", cfg.qkv_bias, outputs)
        return []
    for part in _attention_parts(kind):
        linear(f"attn.{part}", f"self_attn.{part}_proj", cfg.qkv_bias)
    return []


def _indexer_keys(path: str, layer: str, linear: Any) -> list[Key]:
    """The weights of the indexers of a stack; those that are modules are added by `linear`."""
    for ours, theirs in {"q": "wq_b", "k": "wk", "weigh": "weights_proj"}.items():
        linear(f"attn.indexer.{ours}", f"self_attn.indexer.{theirs}", False)
    norm, name = f"{path}.indexer.k_norm", f"{layer}self_attn.indexer.k_norm"
    return [Key(f"{norm}.scale", f"{name}.weight"), Key(f"{norm}.shift", f"{name}.bias")]


def _mlp_keys(cfg: ModelConfig, fused: tuple[str, ...], linear: Any) -> None:
    """Adds the weights of a stack's MLP by `linear`."""
    F, mlp = cfg.intermediate_size, FAMILIES[cfg.family].modules.get("mlp", "mlp")
    if "gate_up" in fused:
        for part, outputs in (("gate", range(F)), ("up", range(F, 2 * F))):
            linear(f"mlp.{part}", f"{mlp}.gate_up_proj", cfg.mlp_bias, outputs)
    else:
        for part in ("gate", "up") if cfg.gated_mlp else ("up",):
            linear(f"mlp.{part}", f"{mlp}.{part}_proj", cfg.mlp_bias)
    linear("mlp.down", f"{mlp}.down_proj", cfg.mlp_bias)


XIELU = {"above": "alpha_p", "below": "alpha_n", "slope": "beta", "limit": "eps"}


def _expert_keys(cfg: ModelConfig, stack: str, layer: str, fused: Any, linear: Any) -> list[Key]:
    """The weights of a stack's experts; those that are modules are added by `linear`."""
    family, experts, keys = FAMILIES[cfg.family], cfg.experts, list[Key]()
    assert experts is not None
    mlp = family.modules.get("mlp", "mlp")
    router = family.modules.get("mlp.router", f"{mlp}.gate")
    keys.append(Key(f"{stack}.mlp.router", f"{layer}{router}.weight", True))
    if experts.has_bias:
        name = family.modules["mlp.choice_bias"]
        unit = 0 if "moe_statics" in name else None  # Ernie's [1, E]
        path = f"{stack}.mlp.choice_bias"
        keys.append(Key(path, layer + name, unit=unit, exact=True))
    if experts.bias:
        keys.append(Key(f"{stack}.mlp.router_bias", f"{layer}{router}.bias"))
    F, columns = experts.size, dict[str, range | None]()
    if "experts" in fused:
        columns = {"gate": range(0, 2 * F, 2), "up": range(1, 2 * F, 2), "down": None}
    elif {"expert_halves", "expert_halves_turned", "expert_rows"} & {*fused}:
        columns = {"gate": range(F), "up": range(F, 2 * F), "down": None}
    matrices = ("gate", "up", "down") if cfg.gated_mlp else ("up", "down")
    for part in matrices if not columns else ():
        name = family.modules.get(f"mlp.experts.{part}", f"{mlp}.experts.{{expert}}.{part}_proj")
        keys.append(Key(f"{stack}.mlp.{part}.kernel", f"{layer}{name}.weight", True))
    for part, outputs in columns.items():  # [experts, in, out]
        matrix = "gate_up" if outputs else "down"
        name = f"{layer}{family.modules.get('mlp.experts', f'{mlp}.experts')}.{matrix}_proj"
        either, rows = "expert_halves_turned" in fused, "expert_rows" in fused
        keys.append(Key(f"{stack}.mlp.{part}.kernel", name, rows, outputs, either=either))
        if experts.bias:
            keys.append(Key(f"{stack}.mlp.{part}.bias", f"{name}_bias", part=outputs))
    S = experts.shared_size
    halves = {"gate": range(S), "up": range(S, 2 * S)} if "gate_up" in fused else {}
    for part in matrices if S else ():
        name = f"{mlp}.shared_expert.{part}_proj"
        linear(f"mlp.shared.{part}", name, cfg.mlp_bias, halves.get(part))
    if experts.shared_gate:
        linear("mlp.shared_gate", f"{mlp}.shared_expert_gate", False)
    for part in ("inward", "outward") if experts.latent_size else ():
        linear(f"mlp.{part}", "", cfg.mlp_bias)
    for ours, name in BRANCH.items() if experts.branch else ():
        keys.append(Key(f"{stack}.mlp.{ours}", layer + name))
    return keys


def _conv_keys(cfg: ModelConfig, path: str, name: str) -> list[Key]:
    """The weights of a stack of short convolutions."""
    assert cfg.conv is not None
    D, keys = cfg.hidden_size, [Key(f"{path}conv", f"{name}conv.weight", unit=1)]
    modules = {"o": ("out_proj", None)}
    modules |= {n: ("in_proj", range(i * D, i * D + D)) for i, n in enumerate("bcx")}
    for ours, (module, part) in modules.items():
        keys.append(Key(f"{path}{ours}.kernel", f"{name}{module}.weight", True, part))
        if cfg.conv.bias:
            keys.append(Key(f"{path}{ours}.bias", f"{name}{module}.bias", False, part))
    return keys + ([Key(f"{path}conv_bias", f"{name}conv.bias")] if cfg.conv.bias else [])


def _mamba_keys(mamba: Mamba, path: str, name: str) -> list[Key]:
    """The weights of a stack of state-space mixers."""
    keys, start = list[Key](), 0
    modules: dict[str, Any] = {"o": ("out_proj", None)}
    for part, width in mamba.widths.items():
        modules[part] = "in_proj", range(start, start + width)
        start += width
    for part, (module, outputs) in modules.items():
        keys.append(Key(f"{path}{part}.kernel", f"{name}{module}.weight", True, outputs))
        if mamba.bias:
            keys.append(Key(f"{path}{part}.bias", f"{name}{module}.bias", False, outputs))
    keys.append(Key(f"{path}conv", f"{name}conv1d.weight", unit=1))
    if mamba.conv_bias:
        keys.append(Key(f"{path}conv_bias", f"{name}conv1d.bias"))
    exact = {"a_log": "A_log", "dt_bias": "dt_bias", "skip": "D"}
    keys += [Key(f"{path}{ours}", name + theirs, exact=True) for ours, theirs in exact.items()]
    return [*keys, Key(f"{path}scale", f"{name}norm.weight")]


def fused_in(cfg: ModelConfig) -> tuple[str, ...]:
    """`Family.fused` of the checkpoints of a model."""
    of_wrapper = WRAPPERS[cfg.wrapper].fused if cfg.wrapper else ()
    return of_wrapper or FAMILIES[cfg.family].fused


def _mtp_layer(cfg: ModelConfig, depth: int) -> str:
    """How the names of a module of multi-token prediction begin, whose layer is after the last."""
    return f"{root_of(cfg.family, cfg.wrapper)}layers.{cfg.num_layers + depth}."


def _mtp_keys(cfg: ModelConfig, module: str, depth: int) -> list[Key]:
    """The weights of a module of multi-token prediction, but its copies of table and head."""
    if FAMILIES[cfg.family].mtp == "layers":
        start = layer = _mtp_layer(cfg, depth)
        names = "enorm", "hnorm", "eh_proj", "shared_head.norm"
    else:
        start, layer = "mtp.", f"mtp.layers.{depth}."
        names = "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"
    embed_norm, hidden_norm, proj, norm = (start + name for name in names)
    return [
        *_norm_keys(cfg, f"{module}.embed_norm", embed_norm),
        *_norm_keys(cfg, f"{module}.hidden_norm", hidden_norm),
        Key(f"{module}.proj.kernel", f"{proj}.weight", True),
        *_layer_keys(cfg, module, layer, cfg.mtp_kind),
        *_norm_keys(cfg, f"{module}.norm", norm),
    ]


def mtp_copies(cfg: ModelConfig) -> dict[str, str]:
    """{tensor: the one that it is a copy of}: the table and the head that files have once more in
    each layer of multi-token prediction."""
    table = embed_name(cfg.family, cfg.wrapper)
    head = table if cfg.tie_embeddings else head_of(cfg.wrapper)
    layers = cfg.mtp if FAMILIES[cfg.family].mtp == "layers" else 0
    copies = {}
    for layer in (_mtp_layer(cfg, depth) for depth in range(layers)):
        copies[f"{layer}embed_tokens.weight"] = table
        copies[f"{layer}shared_head.head.weight"] = head
    return copies


def _layer_keys(cfg: ModelConfig, stack: str, layer: str, kind: LayerKind) -> list[Key]:
    """The weights of layers of a kind, or of one. stack: their path in the decoder. layer: how
    their names begin."""
    cfg = cfg.of(kind)
    family, fused, keys = FAMILIES[cfg.family], fused_in(cfg), list[Key]()

    def linear(path: str, name: str, bias: bool, part: Sequence[int] | None = None) -> None:
        name = family.modules.get(path, name)
        keys.append(Key(f"{stack}.{path}.kernel", f"{layer}{name}.weight", True, part))
        if bias:
            keys.append(Key(f"{stack}.{path}.bias", f"{layer}{name}.bias", False, part))

    attends = kind.mixer == "attention"
    if kind.mixer == "conv":
        keys += _conv_keys(cfg, f"{stack}.attn.", f"{layer}conv.")
    elif cfg.mamba is not None and kind.mixer == "mamba":
        name = f"{layer}{family.modules.get('mamba', 'mamba')}."
        keys += _mamba_keys(cfg.mamba, f"{stack}.attn.", name)
    elif cfg.delta is not None and kind.mixer == "delta":
        own = {n[6:]: name for n, name in family.modules.items() if n.startswith("delta.")}
        keys += _delta_keys(cfg.delta, f"{stack}.attn.", f"{layer}linear_attn.", own)
    elif attends:
        keys += _attention_keys(cfg, kind, stack, layer, linear)
    if kind.routed and cfg.experts is not None:
        keys += _expert_keys(cfg, stack, layer, fused, linear)
    elif kind.mlp:
        _mlp_keys(cfg, fused, linear)
        for ours, name in XIELU.items() if cfg.activation == "xielu" else ():
            keys.append(Key(f"{stack}.mlp.xielu.{ours}", f"{layer}mlp.act_fn.{name}"))
    if attends:
        linear("attn.o", "self_attn.o_proj", cfg.o_bias)
    if attends and cfg.output_gate in ("feature", "head"):
        linear("attn.gate", "self_attn.gate_proj", False)
    if cfg.sinks:
        keys.append(Key(f"{stack}.attn.sinks", f"{layer}self_attn.sinks"))
    if cfg.qk_norm not in ("none", "unit") and attends:
        for part in ("q_norm", "k_norm") if kind.uses is None else ("q_norm",):
            name = family.modules.get(f"attn.{part}", f"self_attn.{part}")
            keys.append(Key(f"{stack}.attn.{part}.scale", f"{layer}{name}.weight"))
    if cfg.layer_embeds is not None:
        linear("embed.gate", "per_layer_input_gate", False)
        linear("embed.up", "per_layer_projection", False)
        keys += _norm_keys(cfg, f"{stack}.embed.norm", f"{layer}post_per_layer_input_norm")
    if cfg.layer_scale:
        keys.append(Key(f"{stack}.scalar", f"{layer}layer_scalar"))
    has = {"attn": kind.mixer != "none", "mlp": kind.mlp}
    present = {n: name for n, name in NORMS[cfg.norm_placement].items() if has[n.split("_")[0]]}
    for ours, name in present.items():
        keys += _norm_keys(cfg, f"{stack}.{ours}", layer + family.modules.get(ours, name))
    return keys
