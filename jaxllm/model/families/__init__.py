# SPDX-License-Identifier: Apache-2.0
"""Model families as tables: HF config <-> ModelConfig, and the name of every weight.

    table      the families
    family     what a row of the table says
    dense, experts, hybrid   the rows
    names      HF names of modules of some of them
    options, expert_options   ModelConfig fields that a family sets, and the HF keys they are under
    rope       RoPE of a config
    layers     the kinds of layers
    tensors    the HF name of every weight
    wrappers   multimodal models, whose language part is read and written

transformers' own config classes first fill in defaults and translate old spellings (`rope_scaling`,
`rope_theta`, `type`), so a config.json of any age reads the same. A model computes
the same as transformers does from its config. A config that this decoder cannot compute is refused
with UserError.
"""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

from jaxllm.errors import UserError, seen
from jaxllm.model.config import (
    Convolution,
    Delta,
    Experts,
    Indexer,
    Latent,
    LayerEmbeds,
    Mamba,
    ModelConfig,
    check_numbers,
)
from jaxllm.model.families.family import Family
from jaxllm.model.families.layers import read_layers, write_layers
from jaxllm.model.families.rope import renamed
from jaxllm.model.families.table import FAMILIES, MISSING
from jaxllm.model.families.wrappers import (
    TOKEN_IDS,
    WRAPPER,
    WRAPPERS,
    family_of,
    rewrapped,
    unwrapped,
    wrapper_of,
)
from jaxllm.untrusted import odd_values

# How transformers' names of a language model and of a reward model end.
CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
GROUPS = {
    "experts": Experts,
    "latent": Latent,
    "indexer": Indexer,
    "delta": Delta,
    "conv": Convolution,
    "mamba": Mamba,
    "layer_embeds": LayerEmbeds,
}
MTP_COUNT = "num_nextn_predict_layers"
# Limits of counts, by which tables are made before the weights are compared.
LIMITS = {"num_hidden_layers": 10_000}


def _family(config: dict[str, Any]) -> Family:
    kind = family_of(config)
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    if kind is None:
        raise UserError(
            "the config has no model_type; set it to the family that the weights belong to: "
            + ", ".join(FAMILIES)
        )
    if isinstance(text := config.get("text_config"), dict):
        inner = text.get("model_type")
        wraps = f"model_type {seen(kind)} wraps a language model of model_type {seen(inner)}"
        if inner not in [*FAMILIES]:
            raise UserError(f"{wraps}, which is not supported{_lacking(inner)}")
        raise UserError(
            f"{wraps}; of such models only {', '.join(WRAPPERS)} are supported: save the language "
            "model on its own with transformers"
        )
    known = ", ".join((*FAMILIES, *WRAPPERS))
    raise UserError(f"model_type {seen(kind)} is not supported{_lacking(kind)}; known: {known}")


def _lacking(kind: Any) -> str:
    """What a model type needs that the decoder lacks, for a message; "" if that is not known."""
    feature = next((f for f, kinds in MISSING.items() if kind in kinds), "")
    return f": it needs {feature}, which this decoder lacks" if feature else ""


def _floats(value: Any) -> Any:
    """A copy of a value of a config, with the numbers that JSON lacks in place of what transformers
    5 writes for them, as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if [*value] == ["__float__"] and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _floats(item) for key, item in value.items()}
    return [_floats(item) for item in value] if isinstance(value, list) else copy.copy(value)


def normalised(config: dict[str, Any]) -> dict[str, Any]:
    """The config in transformers' newest spelling with every default filled in; a new dict.

    Raises ValueError for an unknown family, quantized weights, and what transformers finds wrong.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    config = unwrapped(config)
    family = _family(config)
    if config.get("quantization_config"):
        raise UserError(
            "the config is of quantized weights (quantization_config). Load the directory with its "
            "weights, which dequantizes FP8 and MXFP4, or remove the key to start from random ones"
        )
    keep = _floats(config)  # a copy: transformers writes into nested dicts
    keep.pop(WRAPPER, None)
    kind = keep.pop("model_type")
    keep |= {key: renamed(keep[key]) for key in ("rope_scaling", "rope_parameters") if key in keep}
    for key, most in LIMITS.items():  # before transformers makes lists of that length
        if type(value := keep.get(key, 1)) is not int or not 1 <= value <= most:
            raise UserError(f"{key} is {seen(value)}; it must be an integer from 1 to {most:,}")
    with odd_values(f"config of a {kind} model", StrictDataclassError):
        filled = AutoConfig.for_model(kind, **keep)
        c, layers = filled.to_dict(), filled.num_hidden_layers
        if keep.get("num_hidden_layers", layers) != layers:  # which nemotron_h ignores
            raise UserError(
                f"num_hidden_layers is {seen(keep['num_hidden_layers'])}, but layers_block_type or "
                f"hybrid_override_pattern has {layers} layers; make them agree"
            )
        if layers > LIMITS["num_hidden_layers"]:
            raise UserError(f"layers_block_type has {layers:,} layers, which are too many")
        c["num_hidden_layers"] = layers
        # Published configs and transformers 5 may differ in the name of a key: both are set.
        for name, other in filled.attribute_map.items():
            if hasattr(filled, other):
                c[name] = getattr(filled, other)
        c["head_dim"] = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        c["model_type"] = family_of(config)
    if c.get("is_causal") is False:
        raise UserError("is_causal is false; only causal attention is supported")
    wrapper = WRAPPERS.get(wrapper_of(config))
    c |= wrapper.implied if wrapper else {}
    for key, reason in (family.refused | (wrapper.refused if wrapper else {})).items():
        if c.get(key):
            raise UserError(f"{key} is {seen(c[key])}: {reason}")
    return c


def is_reward(config: dict[str, Any]) -> bool:
    """True for the config.json of a reward model."""
    names = config.get("architectures")
    return any(str(n).endswith(CLASSIFIER) for n in (names if isinstance(names, list) else ()))


def as_reward(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a reward model of that shape."""
    config = unwrapped(config)
    family = _family(config)
    if WRAPPER in config:
        raise _wrapped_reward(config)
    if family.scores_as is None:
        kind = config["model_type"]
        raise UserError(f"transformers has no reward model of model_type {kind}; use another model")
    name = (family.scores_as or family.name) + CLASSIFIER
    one = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config | {"architectures": [name]} | one


def _wrapped_reward(config: dict[str, Any]) -> UserError:
    return UserError(
        f"reward models of model_type {wrapper_of(config)} are not supported: save the language "
        "model on its own with transformers"
    )


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """The decoder that a HF config.json describes; keys that do not affect it are ignored.

    Raises ValueError for a family, activation, rope type or option that is not supported.
    """
    config = unwrapped(config)
    if is_reward(config.get(WRAPPER, {})):
        raise _wrapped_reward(config)
    family, c = _family(config), normalised(config)
    with odd_values(f"config of a {c['model_type']} model"):
        values = {o.field: o.read(*o.arguments(c[o.key], c)) for o in family.every_option()}
        kind = {"family": c["model_type"], "scores": is_reward(config)}
        kind["wrapper"] = wrapper_of(config)
        if kind["scores"] and len(c.get("id2label") or (0,)) != 1:
            raise UserError(f"num_labels is {len(c['id2label'])}; a reward model gives one score")
        values |= kind | family.fixed | read_layers(c)
        for name, group in GROUPS.items():
            dotted = [key for key in values if key.startswith(f"{name}.")]
            parts = {key.partition(".")[2]: values.pop(key) for key in dotted}
            # A model of a family that may have the group lacks it if a part is missing.
            values |= {name: group(**parts)} if parts and None not in parts.values() else {}
        cfg = ModelConfig(**values)
    check_numbers(cfg, {o.field.rpartition(".")[2]: o.key for o in family.every_option()})
    for heads in {cfg.of(kind).num_kv_heads for kind in cfg.kinds}:
        if cfg.num_heads % heads:
            doubled = f", of which layers with a window have {heads}" * (heads != cfg.num_kv_heads)
            raise UserError(
                f"num_attention_heads {cfg.num_heads} is no multiple of "
                f"num_key_value_heads {cfg.num_kv_heads}{doubled}"
            )
    if cfg.indexer is not None and not (cfg.latent and cfg.latent.q_rank):
        raise UserError("q_lora_rank is 0, which is not supported with an indexer")
    if (indexer := cfg.indexer) is not None and indexer.dim < cfg.head_dim:
        raise UserError(
            f"index_head_dim {indexer.dim} is less than qk_rope_head_dim {cfg.head_dim}"
        )
    if (delta := cfg.delta) is not None and delta.value_heads % delta.key_heads:
        raise UserError(
            f"linear_num_value_heads {delta.value_heads} is no multiple of "
            f"linear_num_key_heads {delta.key_heads}"
        )
    if (mamba := cfg.mamba) is not None and mamba.heads % mamba.groups:
        raise UserError(
            f"{mamba.heads} heads of state spaces are no multiple of {mamba.groups} groups"
        )
    if (experts := cfg.experts) is not None and experts.top_k > experts.count:
        raise UserError(
            f"num_experts_per_tok {experts.top_k} is more than the {experts.count} experts"
        )
    if experts is not None and experts.groups > 1:
        each, rest = divmod(experts.count, experts.groups)
        most = each * min(experts.top_groups, experts.groups)
        if rest or each < experts.group_best or experts.top_k > most:
            raise UserError(
                f"n_group {experts.groups}, topk_group {experts.top_groups}: {experts.count} "
                f"experts are not in such groups, or they have fewer than {experts.top_k} to choose"
            )
    return cfg


def mtp_modules(cfg: ModelConfig, config: dict[str, Any]) -> int:
    """How many modules of multi-token prediction a model of that config has."""
    place, c = FAMILIES[cfg.family].mtp, normalised(config)
    count = c.get(MTP_COUNT, 0) if place == "layers" else c.get("mtp_num_hidden_layers", 1)
    return count if place and type(count) is int and count > 0 else 0


def with_mtp(cfg: ModelConfig, config: dict[str, Any]) -> ModelConfig:
    """The decoder with the modules of multi-token prediction that the config describes.

    Raises UserError if it has none, or such that are not supported.
    """
    place, count = FAMILIES[cfg.family].mtp, mtp_modules(cfg, config)
    if count and not FAMILIES[cfg.family].mtp_trained:
        raise UserError(
            f"model.mtp_loss: the multi-token prediction of {cfg.family} is not supported; set it "
            "to 0, and its weights stay as they are"
        )
    if not 0 < count <= (cfg.num_layers if place == "layers" else 1):
        raise UserError(
            f"model.mtp_loss: the config of this {cfg.family} model has {count or 'no'} modules of "
            "multi-token prediction; set it to 0"
        )
    return replace(cfg, mtp=count)


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The HF config.json of a decoder: `from_hf(to_hf(cfg)) == cfg`.

    Raises ValueError naming the fields when the family cannot express `cfg`.
    """
    family = _family({"model_type": cfg.family})
    config: dict[str, Any] = {}
    for o in family.every_option():
        name, _, part = o.field.partition(".")
        value = getattr(cfg, name)
        value = getattr(value, part) if part and value is not None else value
        config[o.key] = o.write(*o.arguments(value, config))
    config |= write_layers(cfg)
    if cfg.wrapper:
        texts = WRAPPERS[cfg.wrapper].texts
        config["model_type"] = next(kind for kind, same in texts.items() if same == cfg.family)
        config = rewrapped(config | {WRAPPER: {"model_type": cfg.wrapper, "text_config": {}}})
    else:
        config |= {"model_type": cfg.family, "architectures": [family.name + CAUSAL]}
    config = as_reward(config) if cfg.scores else config
    # Defaults may be outside the vocabulary, and not every class accepts null.
    back = from_hf(config | dict.fromkeys(TOKEN_IDS, 0))
    back = replace(back, mtp=cfg.mtp)
    if cfg.mtp and family.mtp == "layers":
        config[MTP_COUNT] = cfg.mtp
    if lost := [f.name for f in fields(cfg) if getattr(back, f.name) != getattr(cfg, f.name)]:
        raise UserError(f"a {cfg.family} config cannot express this model's {', '.join(lost)}")
    return config
