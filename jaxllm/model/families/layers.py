# SPDX-License-Identifier: Apache-2.0
"""The kinds of a model's layers: windows, mixers, and which RoPE each layer has."""

from __future__ import annotations

from operator import or_
from typing import Any

from jaxllm.errors import UserError
from jaxllm.model.config import LayerKind, ModelConfig, Rope
from jaxllm.model.families.family import Family
from jaxllm.model.families.rope import read_nope, read_rope, write_nope, write_rope
from jaxllm.model.families.table import FAMILIES

# Their names in `layer_types`.
MIXERS = {"delta": "linear_attention", "conv": "conv", "mamba": "linear_attention"}
# Family.window -> the name there of layers with a window, and the key of its length
LOCAL = {
    "typed": ("sliding_attention", "sliding_window"),
    "chunked": ("chunked_attention", "attention_chunk_size"),
}
DENSE_PATTERN = "prefix_dense_sliding_window_pattern"  # 1 where dense layers rotate
POSITIONS = "position_embedding_type"
ALONE = ("mlp", "moe")  # layers without a mixer, in `layers_block_type`
# Family.dense -> the key of how many layers come before those with experts
FIRST = {"first": "first_k_dense_replace", "leading": "num_dense_layers"}


def read_layers(c: dict[str, Any]) -> dict[str, Any]:
    """`ropes`, the distinct `kinds` of layer, and `layer_kinds`: the index of each layer's kind."""
    family, count = FAMILIES[c["model_type"]], c["num_hidden_layers"]
    local, length = LOCAL.get(family.window, LOCAL["typed"])
    window = c.get(length)
    types = [local if family.window == "all" else "full_attention"] * count
    if family.window in LOCAL or family.mixer:
        types = c.get("layer_types") or types  # the text of qwen3_vl has none
    known = {"full_attention", *(ALONE if family.alone else ())}
    known |= {MIXERS[family.mixer]} if family.mixer else set()
    known |= {local} if family.window != "none" else set()
    if strange := set(types) - known:
        raise UserError(f"layer_types {', '.join(sorted(strange))} are not supported")
    ropes, which = _read_ropes(c, types)
    layers = [
        LayerKind(
            **own,
            rope=rope,
            window=window if kind == local else None,
            dense=dense,
            mixer=_mixer(family, kind),
            mlp=kind in ALONE or not family.alone,
            norm_placement=None if _mixer(family, kind) == "attention" else family.norms_of_mixer,
        )
        for kind, rope, dense, own in zip(
            types, which, _read_dense(c), _read_shapes(c, types), strict=True
        )
    ]
    kinds = tuple(dict.fromkeys(layers))
    index = tuple(map(kinds.index, layers)) if len(kinds) > 1 else ()
    return {"ropes": ropes, "kinds": kinds, "layer_kinds": index}


def _read_ropes(c: dict[str, Any], types: list[str]) -> tuple[tuple[Rope, ...], list[int]]:
    """(`ropes`, the index of each layer's)"""
    family, p = FAMILIES[c["model_type"]], c.get("rope_parameters", {})
    if family.theta_listed:
        bases = list(dict.fromkeys(listed := c["layer_rope_theta"]))
        each = (read_rope(p | {"rope_theta": n}, c) if n else read_nope(c) for n in bases)
        return tuple(each), [bases.index(n) for n in listed]
    baseless = family.nope == "baseless" and p["rope_theta"] is None
    names, rotates = ["full_attention"], family.nope != "always" and not baseless
    if family.rope_by_type:
        attending = [kind for kind in types if _mixer(family, kind) == "attention"]
        names = list(dict.fromkeys(attending)) or names
    which = names if rotates else ()
    ropes = tuple(read_rope(p[n] if family.rope_by_type else p, c) for n in which)
    if len({rope.partial for rope in ropes if rope.kind != "proportional"}) > 1:
        raise UserError("partial_rotary_factor differs among layers, which is not supported")
    local, length = LOCAL.get(family.window, LOCAL["typed"])
    rotated = [rotates] * len(types)
    if family.nope == "listed":
        rotated = c["no_rope_layers"][: len(types)]
    elif family.nope == "all":
        rotated = [c[POSITIONS] == "rope"] * len(types)
    elif family.nope == "full" and c.get(length) is not None:
        rotated = [kind == local for kind in types]
    if family.rotates_dense and c[DENSE_PATTERN] == 1:
        rotated = [*map(or_, rotated, _read_dense(c))]
    ropes += () if all(rotated) else (read_nope(c),)
    by_type = [names.index(kind) if kind in names else 0 for kind in types]
    return ropes, [n if one else len(ropes) - 1 for n, one in zip(by_type, rotated, strict=True)]


def _mixer(family: Family, kind: str) -> Any:
    """LayerKind.mixer of a layer that `layer_types` calls so."""
    if family.alone and kind in ALONE:
        return "none"
    return family.mixer if family.mixer and kind == MIXERS[family.mixer] else "attention"


def _type_of(cfg: ModelConfig, kind: LayerKind, local: str) -> str:
    """The name in `layer_types` of a layer. local: that of one with a window."""
    if kind.mixer == "none":
        return "moe" if cfg.experts is not None and kind.routed else "mlp"
    return MIXERS.get(kind.mixer, "full_attention" if kind.window is None else local)


def _read_dense(c: dict[str, Any]) -> list[bool]:
    """True for each layer with an MLP in place of experts."""
    family, layers = FAMILIES[c["model_type"]], range(c["num_hidden_layers"])
    if family.alone:
        return [kind == "mlp" and "moe" in c["layer_types"] for kind in c["layer_types"]]
    if family.dense in FIRST:
        return [i < c[FIRST[family.dense]] for i in layers]
    if family.dense == "steps":
        step, listed = c["decoder_sparse_step"], c["mlp_only_layers"] or ()
        return [i in listed or (i + 1) % step > 0 for i in layers]
    if family.dense == "interval":
        span = range(c["moe_layer_start_index"], c["moe_layer_end_index"] + 1)
        return [i not in span or (i + 1) % c["moe_layer_interval"] > 0 for i in layers]
    if family.dense == "typed":
        return [kind == "dense" for kind in c["mlp_layer_types"]]
    if family.dense == "unlisted":
        return [i not in c["moe_layers"] for i in layers]
    return [False for _ in layers]


def _write_dense(family: Family, dense: list[bool]) -> dict[str, Any]:
    sparse = [i for i, one in enumerate(dense) if not one]
    if family.dense in FIRST:
        return {FIRST[family.dense]: sparse[0] if sparse else len(dense)}
    if family.dense == "steps":
        listed = [i for i, one in enumerate(dense) if one]
        return {"mlp_only_layers": listed, "decoder_sparse_step": 1}
    if family.dense == "interval":
        first, last = (sparse[0], sparse[-1]) if sparse else (len(dense), len(dense))
        interval = sparse[1] - sparse[0] if len(sparse) > 1 else 1
        bounds = {"moe_layer_start_index": first, "moe_layer_end_index": last}
        return bounds | {"moe_layer_interval": interval}
    if family.dense == "typed":
        return {"mlp_layer_types": ["dense" if one else "sparse" for one in dense]}
    if family.dense == "unlisted":
        return {"moe_layers": sparse}
    return {}


# Sizes of a layer -> their keys in HF's config, of all layers and of full ones.
SIZES = {
    "head_dim": ("head_dim", "global_head_dim"),
    "num_kv_heads": ("num_key_value_heads", "num_global_key_value_heads"),
}


def _read_shapes(c: dict[str, Any], types: list[str]) -> list[dict[str, Any]]:
    """The sizes of each layer that differ from the model's, and whose keys and values it uses."""
    family = FAMILIES[c["model_type"]]
    if not family.shapes_by_layer:
        if not family.doubled_windows:
            return [{} for _ in types]
        doubled = {"num_kv_heads": 2 * c["num_key_value_heads"], "sinks": True}
        return [doubled if kind == "sliding_attention" else {} for kind in types]
    first = len(types) - c["num_kv_shared_layers"]  # of those without keys and values
    last = {kind: i for i, kind in enumerate(types[:first]) if kind in types[first:]}
    wide = 2 * c["intermediate_size"] if c["use_double_wide_mlp"] else None
    by_layer = {int(layer): sizes for layer, sizes in c["per_layer_config"].items()}  # "05"
    layers: list[dict[str, Any]] = []
    for i, kind in enumerate(types):
        listed = by_layer.get(i, {})
        if strange := listed.keys() - {key for key, _ in SIZES.values()}:
            raise UserError(f"per_layer_config of {', '.join(sorted(strange))} is not supported")
        sizes = {size: listed.get(key, c[key]) for size, (key, _) in SIZES.items()}
        own = {size: n if n != c[SIZES[size][0]] else None for size, n in sizes.items()}
        if i >= first:
            if kind not in last:
                raise UserError(f"num_kv_shared_layers leaves no {kind} layer its keys and values")
            own |= {"uses": last[kind], "intermediate_size": wide}
        else:
            own["values_from_keys"] = bool(c["attention_k_eq_v"]) and kind == "full_attention"
            own["keeps"] = i if last.get(kind) == i else None
        layers.append(own)
    return layers


def _write_shapes(cfg: ModelConfig) -> dict[str, Any]:
    layers = cfg.kinds_by_layer
    full = next((kind for kind in layers if kind.window is None), LayerKind())
    config = {key: getattr(cfg.of(full), size) for size, (_, key) in SIZES.items()}
    return config | {
        "attention_k_eq_v": any(kind.values_from_keys for kind in layers),
        "num_kv_shared_layers": sum(kind.uses is not None for kind in layers),
        "use_double_wide_mlp": any(kind.intermediate_size is not None for kind in layers),
    }


def write_layers(cfg: ModelConfig) -> dict[str, Any]:
    family = FAMILIES[cfg.family]
    layers = cfg.kinds_by_layer
    rotated = [cfg.ropes[kind.rope].kind != "none" for kind in layers]
    local, length = LOCAL.get(family.window, LOCAL["typed"])
    types = [_type_of(cfg, kind, local) for kind in layers]
    window = next((kind.window for kind in layers if kind.window is not None), None)
    config: dict[str, Any] = {}
    if family.attention_listed:
        config["attn_layer_indices"] = [i for i, n in enumerate(types) if n == "full_attention"]
    elif family.mixer:
        config["layers_block_type" if family.alone else "layer_types"] = types
    if family.window == "all":
        config[length] = window
    elif family.window != "none":
        # A length even where no layer uses it: transformers builds gemma's mask from it. But where
        # full layers lack RoPE if there are windows, none means that they have it.
        unused = None if family.nope == "full" and all(rotated) else cfg.max_positions
        config |= {"layer_types": types, length: window or unused}
    if family.switched:
        config["use_sliding_window"] = window is not None
    config |= _write_dense(family, [kind.dense for kind in layers])
    if family.nope == "listed":
        config["no_rope_layers"] = [*map(int, rotated)]
    if family.nope == "all":
        config[POSITIONS] = "rope" if rotated[0] else None
    if family.rotates_dense:
        dense = [one for one, kind in zip(rotated, layers, strict=True) if kind.dense]
        config[DENSE_PATTERN] = 1 if all(dense) else 2
    if family.scaled_nope:
        config |= write_nope(cfg.ropes[-1])
    if family.shapes_by_layer:
        config |= _write_shapes(cfg)
    if family.rope_by_type:
        attending = (
            pair for pair in zip(types, layers, strict=True) if pair[1].mixer == "attention"
        )
        by_type = {n: cfg.ropes[kind.rope] for n, kind in attending}
        by_type = by_type or {"full_attention": cfg.ropes[0]}
        config["rope_parameters"] = {n: write_rope(rope, family) for n, rope in by_type.items()}
    elif family.nope != "always":
        first = next((rope for rope in cfg.ropes if rope.kind != "none"), Rope())
        rope = write_rope(first, family)
        baseless = family.nope == "baseless" and not any(rotated)
        config["rope_parameters"] = rope | ({"rope_theta": None} if baseless else {})
    if family.theta_listed:
        ropes = [cfg.ropes[kind.rope] for kind in layers]
        config["layer_rope_theta"] = [0 if r.kind == "none" else r.theta for r in ropes]
    if cfg.ropes[0].kind == "longrope":  # phi3 gives this one precedence over rope_parameters
        config["original_max_position_embeddings"] = cfg.ropes[0].original_length
    return config
