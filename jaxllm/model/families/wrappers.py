# SPDX-License-Identifier: Apache-2.0
"""Multimodal models whose language part is trained: where their configs and files have it.

A wrapper's config.json has the config of its language model under `text_config`, and its tensors
have other prefixes. `unwrapped` gives that config with the whole one under WRAPPER, so that the
rest of the package sees a language model, and `rewrapped` puts the trained one back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxllm.errors import UserError, seen

WRAPPER = "wrapper_config"  # key of a language model's config that holds its wrapper's
ROOT = "model.language_model."  # of the modules of a wrapper's language model but its head
HEAD = "lm_head.weight"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that a wrapper may have for its language model; transformers reads dtype from there alone.
DTYPES = ("dtype", "torch_dtype")
INHERITED = (*TOKEN_IDS, *DTYPES)


@dataclass(frozen=True)
class Wrapper:
    """How the models of one multimodal `model_type` hold their language model.

    texts: {model_type of `text_config`: the family that computes the same for text}. If
      `text_config` names none, it is the first; a single one is used whatever it names.
    stored: (pattern of a tensor's name at its start, what today's name of the module has instead),
      for names in files that differ.
    root: what the names of the language model's modules begin with; head: the tensor of its head.
    fused: `Family.fused` of the text where it differs from the family's.
    implied: keys that `text_config` lacks, with the values that its class stands for.
    flat: a config.json without `text_config` has the keys of the language model beside its own.
    refused: keys of `text_config` that must be empty, each with the reason.
    """

    texts: dict[str, str]
    stored: tuple[tuple[str, str], ...] = ()
    root: str = ROOT
    head: str = HEAD
    fused: tuple[str, ...] = ()
    implied: dict[str, Any] = field(default_factory=dict)
    flat: bool = False
    refused: dict[str, str] = field(default_factory=dict)


_QWEN = ((r"model\.(?!language_model\.|visual\.)", ROOT),)
_LLAVA = ((r"language_model\.model\.", ROOT), (r"language_model\.lm_head\.", "lm_head."))

WRAPPERS = {
    "gemma3": Wrapper(
        {"gemma3_text": "gemma3_text"},
        _LLAVA,
        refused={"final_logit_softcapping": "transformers ignores it for gemma3; set it to null"},
    ),
    "gemma4": Wrapper({"gemma4_text": "gemma4_text"}),
    "gemma4_unified": Wrapper({"gemma4_unified_text": "gemma4_unified_text"}),
    "mistral3": Wrapper({"mistral": "mistral", "ministral3": "ministral3"}, _LLAVA),
    # Rotary positions of text are the same along all three axes of "mrope": those of plain RoPE.
    "qwen2_vl": Wrapper({"qwen2_vl_text": "qwen2"}, _QWEN, flat=True),
    "qwen2_5_vl": Wrapper({"qwen2_5_vl_text": "qwen2"}, _QWEN, flat=True),
    "qwen3_vl": Wrapper({"qwen3_vl_text": "qwen3"}),
    "qwen3_vl_moe": Wrapper(
        {"qwen3_vl_moe_text": "qwen3_moe"},
        fused=("expert_halves_turned",),
        implied={"norm_topk_prob": True},
    ),
    "llama4": Wrapper(
        {"llama4_text": "llama4_text"},
        root="language_model.model.",
        head="language_model.lm_head.weight",
    ),
    "qwen3_5": Wrapper({"qwen3_5_text": "qwen3_5_text"}),
    "qwen3_5_moe": Wrapper({"qwen3_5_moe_text": "qwen3_5_moe_text"}),
}


def head_of(wrapper: str) -> str:
    """The HF name of a decoder's head."""
    return WRAPPERS[wrapper].head if wrapper else HEAD


def head_bias_of(wrapper: str) -> str:
    return head_of(wrapper).removesuffix("weight") + "bias"


def is_text(name: str, wrapper: str) -> bool:
    """True if a tensor, by its `module_name`, belongs to the language model or to its multi-token
    prediction."""
    if not wrapper:
        return True
    head = head_of(wrapper).removesuffix("weight")
    return name.startswith((WRAPPERS[wrapper].root, head, "mtp."))


def family_of(config: dict[str, Any]) -> Any:
    """The name of the family that computes the (unwrapped) config."""
    kind: Any = config.get("model_type")
    return WRAPPERS[wrapper_of(config)].texts[kind] if WRAPPER in config else kind


def wrapper_of(config: dict[str, Any]) -> str:
    """The model_type of the wrapper of an unwrapped config; "" without one."""
    return config[WRAPPER]["model_type"] if WRAPPER in config else ""


def unwrapped(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model; one that is not in a wrapper is returned as it is.

    Raises UserError for a wrapper without `text_config`, or whose language model is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return config
    wrapper, text = WRAPPERS[kind], config.get("text_config")
    if text is None and wrapper.flat:
        own = ("architectures", "vision_config")
        text = {key: value for key, value in config.items() if key not in own}
    if not isinstance(text, dict):
        raise UserError(f"the config of a {kind} model has no text_config")
    first, *others = wrapper.texts
    inner = text.get("model_type") or first if others else first
    if inner not in [*wrapper.texts]:
        raise UserError(
            f"a {kind} model around a language model of model_type {seen(inner)} is not supported; "
            f"known: {', '.join(wrapper.texts)}"
        )
    outside = {key: config[key] for key in INHERITED if key in config}
    inside = {key: value for key, value in text.items() if key not in DTYPES}
    tied = {"tie_word_embeddings": _tied(config, text), "model_type": inner}
    return outside | inside | tied | {WRAPPER: config}


def _tied(config: dict[str, Any], text: dict[str, Any]) -> bool:
    """Whether transformers ties a wrapper's head; it asks the wrapper, whose defaults differ."""
    from transformers import CONFIG_MAPPING

    stated = config.get("tie_word_embeddings")
    if stated is None:
        default: Any = CONFIG_MAPPING[config["model_type"]]
        stated = default.tie_word_embeddings
    return bool(stated or text.get("tie_word_embeddings"))


def rewrapped(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a language model with this config: its wrapper's, if it has one."""
    if WRAPPER not in config:
        return config
    outer, text = config[WRAPPER], {k: v for k, v in config.items() if k != WRAPPER}
    is_flat = "text_config" not in outer and WRAPPERS[outer["model_type"]].flat
    before = outer if is_flat else outer["text_config"]
    changed = {k: text[k] for k in INHERITED if k in text and (k in outer or k in DTYPES)}
    tied = text["tie_word_embeddings"]  # which transformers 4 reads here, transformers 5 in `outer`
    if tied != _tied(outer, before):
        changed["tie_word_embeddings"] = tied
    if is_flat:
        changed |= {key: value for key, value in text.items() if key != "model_type"}
    else:
        changed["text_config"] = text
    lost = ("auto_map", "_name_or_path")  # code that is not copied; a local path
    return {key: value for key, value in outer.items() if key not in lost} | changed
