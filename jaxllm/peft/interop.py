# SPDX-License-Identifier: Apache-2.0
"""Adapters in and out of `peft`'s directories: adapter_config.json and adapter_model.safetensors.

What peft has no method for (bottlenecks) is kept in a directory of the same two files, which it
does not load. Nothing is read but JSON and safetensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxllm.config import PeftSection, validated
from jaxllm.config.checks import TUNES
from jaxllm.errors import UserError
from jaxllm.files import ADAPTER, ADAPTER_CONFIG, hub_id, local_dir, open_tensors, read_json
from jaxllm.model.adapter import PLAIN, Peft
from jaxllm.model.config import ModelConfig
from jaxllm.model.families import key_table
from jaxllm.peft import adapter, lora, prefix
from jaxllm.peft.adapter import AdapterParam, AdapterPeft
from jaxllm.peft.lora import EMBED, LoraPeft, Target
from jaxllm.peft.prefix import PrefixPeft, Prompt

# Which of a model's adapters: one, none, or a weighted sum.
Choice = str | Mapping[str, float] | None
# method -> (what a configuration means, peft's name)
METHODS: dict[str, tuple[Callable[..., Peft], str]] = {
    "lora": (lora.resolve, "LORA"),
    "adapter": (adapter.resolve, "BOTTLENECK"),
    "prefix": (prefix.resolve, "PREFIX_TUNING"),
    "prompt": (prefix.resolve, "PROMPT_TUNING"),
}
ROOT = "base_model.model."
BARE = "base_model."  # of a model that has virtual tokens before it, not modules in it
PROMPT = "prompt_embeddings"
SCORES = "SEQ_CLS"  # peft's task of a reward model
SCORE_MODULES = ("classifier", "score")  # what peft saves with it, whatever the model has
# Options of LoraConfig that change what is computed and are not done here, unless they are empty.
REFUSED = (
    "fan_in_fan_out lora_bias use_qalora layer_replication target_parameters "
    "alora_invocation_tokens trainable_token_indices use_bdlora arrow_config kasa_config "
    "velora_config monteclora_config"
).split()


@dataclass(frozen=True)
class Saved:
    """An adapter's directory and its configuration."""

    folder: Path
    config: dict[str, Any]


def is_adapter(path: str) -> bool:
    """Whether a directory or hub id holds an adapter and no model."""
    folder = local_dir(path) if hub_id(path) else Path(path).expanduser()
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def tokenizer_of(path: str) -> str:
    """Where the tokenizer lies: an adapter's own place, or where its model is."""
    if not is_adapter(path) or (local_dir(path) / "tokenizer.json").is_file():
        return path
    return with_base(path, None)[0]


def is_reward(saved: Mapping[str, Saved]) -> bool:
    """Whether adapters are of a reward model."""
    return any(one.config.get("task_type") == SCORES for one in saved.values())


def find(path: str, weights: bool = True) -> Saved:
    """The adapter in a directory or hub id. Raises ValueError where there is none."""
    folder = local_dir(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path} has no {ADAPTER_CONFIG}; it is no adapter")
    if weights and not (folder / ADAPTER).is_file():
        raise UserError(f"{path} has no {ADAPTER}; a pickled adapter is not read")
    return Saved(folder, read_json(folder / ADAPTER_CONFIG))


def with_base(path: str, adapter: str | Mapping[str, str] | None) -> tuple[str, dict[str, str]]:
    """(the model's path, {name: adapter}); a `path` that is an adapter brings both.

    Raises ValueError where an adapter does not say what it is an adapter of.
    """
    named = {} if adapter is None else {"default": adapter} if isinstance(adapter, str) else adapter
    if not is_adapter(path):
        return path, dict(named)
    if "default" in named:
        raise UserError(f"{path} is an adapter too; name the other: NAME={named['default']}")
    base = find(path).config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path} does not say which model it is an adapter of; give that one too")
    if not Path(base).expanduser().is_dir() and not hub_id(base):
        raise UserError(f"{path} is an adapter of {base}, which is not there; give its place too")
    return base, {"default": path, **named}


# ---- from a configuration to a plan


def plan_of(cfg: ModelConfig, section: PeftSection) -> Peft:
    """What a run's peft section adds to a model, and trains.

    Raises ValueError for a module, layer or combination that the model does not have.
    """
    if section.method == "none":
        return PLAIN
    if section.path:
        saved = find(section.path, weights=False)
        plan, other = read_plan(cfg, {"default": saved}), method_of(saved.config)
        if other != section.method:
            raise UserError(f"{section.path} is of method {other}, peft.method {section.method}")
        if isinstance(plan, LoraPeft):
            plan = replace(plan, dropout=section.lora_dropout)
        return plan
    return METHODS[section.method][0](cfg, section)


def method_of(config: dict[str, Any]) -> str:
    """Our name of an adapter_config's method."""
    kind = config.get("peft_type")
    for method, (_, name) in METHODS.items():
        if name == kind:
            return method
    known = ", ".join(name for _, name in METHODS.values())
    raise UserError(f"{ADAPTER_CONFIG}: peft_type {kind!r} is not known; known: {known}")


def section_of(config: dict[str, Any]) -> PeftSection:
    """An adapter_config.json as a peft section. Raises ValueError for what is not done here."""
    method = method_of(config)
    config = {key: value for key, value in config.items() if value is not None}
    if method != "lora":
        return _section({k: config[k] for k in TUNES[method] if k in config} | {"method": method})
    for key in REFUSED:
        if config.get(key):
            raise UserError(f"{ADAPTER_CONFIG}: {key} is {config[key]!r}, which is not done here")
    if config.get("bias", "none") != "none":
        raise UserError(f"{ADAPTER_CONFIG}: bias is {config['bias']!r}; only none is done here")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(("olora", "corda", "loftq", "lora_ga", "pissa_niter")):
        raise UserError(
            f"{ADAPTER_CONFIG}: init_lora_weights {init} changed the base; convert the adapter "
            "with peft's path_initial_model_for_weight_conversion"
        )

    def listed(key: str) -> list[Any]:
        value = config.get(key, [])
        return value if isinstance(value, list) else [value]

    lists = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
    kept = ("lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    section: dict[str, Any] = {key: listed(key) for key in lists}
    if config.get("task_type") == SCORES:
        saved = section["modules_to_save"]
        section["modules_to_save"] = [name for name in saved if name not in SCORE_MODULES]
    section |= {k: config[k] for k in kept if k in config}
    section |= {"r": config.get("r", 8), "lora_alpha": config.get("lora_alpha", 8)}  # peft's own
    section["init_lora_weights"] = "pissa" if init == "pissa" else "kaiming"
    return _section({"method": "lora"} | section)


def _section(values: dict[str, Any]) -> PeftSection:
    try:
        return validated({"peft": values}, {}).peft
    except ValueError as error:
        raise UserError(f"{ADAPTER_CONFIG}: {error}") from None


def read_plan(cfg: ModelConfig, adapters: Mapping[str, Saved]) -> Peft:
    """The plan of one adapter, or of several LoRA adapters beside one another."""
    plans: list[Any] = []
    for saved in adapters.values():
        section = section_of(saved.config)
        if cfg.tied_head and "lm_head" in _ends(section.target_modules + section.modules_to_save):
            raise UserError(_untie(saved, "adapts lm_head, which is the token table here"))
        plan = METHODS[section.method][0](cfg, section, strict=False)
        if isinstance(plan, LoraPeft):
            _check_tied(cfg, saved, plan)
            plan = replace(plan, dropout=0.0)
        plans.append(plan)
    if len(plans) == 1:
        return plans[0]
    for name, plan in zip(adapters, plans, strict=True):
        lone = not isinstance(plan, LoraPeft) or plan.dora or plan.saved or plan.init == "pissa"
        if lone:
            raise UserError(
                f"adapter {name} cannot stand beside another: only plain LoRA can, without DoRA, "
                "PiSSA or modules_to_save"
            )
    targets = []
    for path, module in lora.modules(cfg).items():
        found = [next((t for t in plan.targets if t.path == path), None) for plan in plans]
        if any(found):
            layers = next(len(t.ranks[0]) for t in found if t)
            none: tuple[Any, Any] = ((0,) * layers, (1.0,) * layers)
            pairs = [(t.ranks[0], t.alphas[0]) if t else none for t in found]
            ranks, alphas = zip(*pairs, strict=True)
            targets.append(Target(path, module, ranks, alphas))
    return LoraPeft(
        targets=tuple(targets),
        names=tuple(adapters),
        rslora=tuple(plan.rslora[0] for plan in plans),
        mix=(1.0,) + (0.0,) * (len(plans) - 1),
    )


def _check_tied(cfg: ModelConfig, saved: Saved, plan: LoraPeft) -> None:
    """Raises ValueError where peft would change the token table and the tied head otherwise."""
    whole = "embed.embedding" in plan.saved
    adapted = any(t.path == EMBED for t in plan.targets)
    tied = bool(saved.config.get("ensure_weight_tying"))
    if cfg.tied_head and ((whole and not tied) or (adapted and tied)):
        what = f"has ensure_weight_tying {str(tied).lower()}, so that embed_tokens and the head, "
        raise UserError(_untie(saved, f"{what}which are one here, would differ"))


def _ends(modules: tuple[str, ...]) -> set[str]:
    return {name.rpartition(".")[2] for name in modules}


def _untie(saved: Saved, what: str) -> str:
    base = saved.config.get("base_model_name_or_path")
    return (
        f"{saved.folder / ADAPTER_CONFIG} {what}; load it over an untied copy: "
        f"jaxllm.save_hf(jaxllm.load_hf({base!r}, overrides={{'tie_word_embeddings': False}}), "
        "'untied')"
    )


def shares(plan: Peft, chosen: Choice) -> tuple[float, ...]:
    """How much of each of a model's adapters: one by name, none, or {name: weight}.

    In the plan's order. Raises ValueError for a name that is not there, and for a model whose
    adapter is always on.
    """
    if not isinstance(plan, LoraPeft):
        raise UserError("only LoRA adapters are chosen among; the model has none")
    weights = {} if chosen is None else {chosen: 1.0} if isinstance(chosen, str) else chosen
    for name in weights:
        if name not in plan.names:
            raise UserError(f"there is no adapter {name}; there are {', '.join(plan.names)}")
    if (plan.dora or plan.saved) and set(weights.values()) != {1.0}:
        what = "DoRA" if plan.dora else "modules_to_save"
        raise UserError(f"an adapter with {what} is on or not loaded; it has no weight")
    return tuple(float(weights.get(name, 0.0)) for name in plan.names)


def parse_choice(text: str) -> Choice:
    """`none`, a name, or `name:weight,name:weight` as `shares` takes it."""
    if text == "none":
        return None
    if ":" not in text:
        return text
    pairs = [part.rpartition(":") for part in text.split(",")]
    try:
        return {name: float(weight) for name, _, weight in pairs}
    except ValueError:
        raise UserError(f"{text} is not a name, nor name:weight,name:weight") from None


def choose(model: Any, chosen: Choice) -> None:
    """Puts one of a model's adapters, none, or a weighted sum to use from here on."""
    model.peft = replace(model.peft, mix=shares(model.peft, chosen))


def room(cfg: ModelConfig, plan: Peft, length: int, new: int = 0) -> int:
    """Positions that a model leaves to a text. Raises ValueError for rows of more tokens, `new` of
    which an online run makes."""
    left = cfg.max_positions - plan.length
    if length + new > left:
        beside = f" beside {plan.length} virtual tokens" if plan.length else ""
        asked = f"data.max_length {length} is"
        if new:
            asked = f"data.max_length {length} and rl.max_new_tokens {new} together are"
        raise UserError(
            f"{asked} over the model's limit of {left} positions{beside}; lower "
            + ("one" if new else "it")
        )
    return left


# ---- the tensors


def _lora_tensors(plan: LoraPeft, which: int) -> Iterator[tuple[Target, int, int, str]]:
    """(target, layer, rank, beginning of its tensors' names) of one of the plan's adapters."""
    for target in plan.targets:
        for layer, r in enumerate(target.ranks[which]):
            if r:
                yield target, layer, r, f"{ROOT}{target.module.format(i=layer)}."


def _suffixes(target: Target, plan: LoraPeft) -> dict[str, str]:
    """{leaf of our branch: end of the tensor's name}."""
    names = {"a": "lora_A.weight", "b": "lora_B.weight"}
    if target.path == EMBED:
        names = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
    return names | ({"magnitude": "lora_magnitude_vector"} if plan.dora else {})


def pack(model: Any) -> dict[str, np.ndarray]:
    """The tensors of a model's adapter by peft's names, float32, without modules_to_save.

    PiSSA's are of twice the rank, A beside the one it began with and B beside its negative: what
    they add to the base as it is.
    """
    plan = model.peft
    if isinstance(plan, PrefixPeft):
        return _pack_prefix(model.prefix)
    if isinstance(plan, AdapterPeft):
        return {
            name: _turned(host[layer], leaf)
            for leaf, variable in _bottlenecks(model)
            for host in [jax.device_get(variable.get_value())]
            for layer, name in enumerate(_bottleneck_names(leaf, model.cfg.num_layers))
        }
    if len(plan.names) > 1:
        raise UserError(f"there are the adapters {', '.join(plan.names)}; load the one to write")
    out: dict[str, np.ndarray] = {}
    hosts: dict[str, dict[str, np.ndarray]] = {}
    for target, layer, r, name in _lora_tensors(plan, 0):
        if target.path not in hosts:
            branch = lora.lora_of(model, target.path)
            leaves = [
                n for n in ("a", "b", "a0", "b0", "magnitude") if getattr(branch, n) is not None
            ]
            hosts[target.path] = {n: jax.device_get(getattr(branch, n)[...]) for n in leaves}
        host = hosts[target.path]
        if "{i}" in target.module:
            host = {leaf: value[layer] for leaf, value in host.items()}
        found = {"a": host["a"][:, :r].T, "b": host["b"][:r].T, "magnitude": host.get("magnitude")}
        if "a0" in host:
            found["a"] = np.concatenate([found["a"], host["a0"][:, :r].T])
            found["b"] = np.concatenate([found["b"], -host["b0"][:r].T], 1)
        for leaf, suffix in _suffixes(target, plan).items():
            out[name + suffix] = np.ascontiguousarray(found[leaf])
    return out


def _pack_prefix(module: Any) -> dict[str, np.ndarray]:
    if isinstance(module, Prompt):
        return {PROMPT: jax.device_get(module.embeddings[...])}
    both = np.stack(jax.device_get((module.keys[...], module.values[...])), 1)  # [L, 2, P, N, K]
    return {PROMPT: both.transpose(2, 0, 1, 3, 4).reshape(module.length, -1)}


def unpack(model: Any, saved: Saved, which: int = 0) -> None:
    """Gives a model's adapter (its `which`th) the values in a directory.

    Raises ValueError for tensors that are missing, unexpected or of another shape.
    """
    with open_tensors(saved.folder / ADAPTER) as file:
        found = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}
    plan = model.peft
    values: dict[int, tuple[Any, np.ndarray]] = {}  # a copy of each weight, to be filled

    def fill(variable: Any, index: Any, name: str, turn: bool) -> None:
        if name not in found:
            raise UserError(f"{saved.folder / ADAPTER} has no {name}, which its config asks for")
        tensor = found.pop(name)
        _, value = values.setdefault(id(variable), (variable, np.array(variable.get_value())))
        tensor = tensor.T if turn else tensor
        if value[index].shape != tensor.shape:
            raise UserError(
                f"{saved.folder / ADAPTER}: {name} does not fit the model: its shape is "
                f"{tensor.shape}, {value[index].shape} is asked for"
            )
        value[index] = tensor

    if isinstance(plan, LoraPeft):
        for target, layer, r, name in _lora_tensors(plan, which):
            branch, widths = lora.lora_of(model, target.path), target.widths()
            at = (layer,) if "{i}" in target.module else ()
            ranks = slice(sum(widths[:which]), sum(widths[:which]) + r)
            index = {"a": (*at, slice(None), ranks), "b": (*at, ranks), "magnitude": at or ...}
            for leaf, suffix in _suffixes(target, plan).items():
                fill(getattr(branch, leaf), index[leaf], name + suffix, leaf != "magnitude")
    elif isinstance(plan, AdapterPeft):
        for leaf, variable in _bottlenecks(model):
            for layer, name in enumerate(_bottleneck_names(leaf, model.cfg.num_layers)):
                fill(variable, layer, name, not leaf.endswith("bias"))
    elif isinstance(model.prefix, Prompt):
        fill(model.prefix.embeddings, ..., PROMPT, False)
    else:
        if PROMPT not in found:
            raise UserError(f"{saved.folder / ADAPTER} has no {PROMPT}")
        keys, both = model.prefix.keys, model.prefix.values
        L, P, N, K = keys.get_value().shape
        if found[PROMPT].shape != (P, 2 * L * N * K):
            raise UserError(f"{saved.folder / ADAPTER}: {PROMPT} does not fit the model")
        split = found.pop(PROMPT).reshape(P, L, 2, N, K).transpose(1, 2, 0, 3, 4)
        values = {0: (keys, split[:, 0]), 1: (both, split[:, 1])}
    whole = trained_tensors(model.cfg, plan, {"": saved})
    tied = {"lm_head.weight"} if model.head is None else set()  # a second copy of the table
    names = [n for n in found if not n.endswith(".base_layer.weight")]
    if strange := [n for n in names if n.removeprefix(root(plan)) not in whole.keys() | tied]:
        raise UserError(
            f"{saved.folder / ADAPTER} has {strange[0]}, which its config does not name"
        )
    for variable, value in values.values():
        variable.set_value(jax.device_put(value, variable.get_value().sharding))


def root(plan: Peft) -> str:
    """What peft puts before the name of a HF tensor."""
    return BARE if isinstance(plan, PrefixPeft) else ROOT


def trained_tensors(
    cfg: ModelConfig, plan: Peft, saved: Mapping[str, Saved]
) -> dict[str, tuple[Path, str]]:
    """{HF tensor of modules_to_save: (the adapter's file, its name there)}."""
    layers = range(cfg.num_layers)
    names = [
        key.name.format(i=i)
        for key in key_table(cfg)
        if key.path in plan.saved
        for i in (layers if key.stacked else (0,))
    ]
    for one in saved.values() if names else ():
        with open_tensors(one.folder / ADAPTER) as file:
            if missing := {root(plan) + name for name in names} - set(file.keys()):
                raise UserError(
                    f"{one.folder / ADAPTER} has no {min(missing)}, which its config asks for"
                )
    return {n: (one.folder / ADAPTER, root(plan) + n) for n in names for one in saved.values()}


def _bottlenecks(model: Any) -> list[tuple[str, Any]]:
    return [
        (".".join(map(str, path[1:])), v)
        for path, v in nnx.to_flat_state(nnx.state(model, AdapterParam))
    ]


def _bottleneck_names(leaf: str, layers: int) -> list[str]:
    where, _, part = leaf.partition(".")
    name = part.replace("_bias", ".bias") if part.endswith("_bias") else f"{part}.weight"
    return [f"layers.{layer}.{where}.{name}" for layer in range(layers)]


def _turned(value: np.ndarray, leaf: str) -> np.ndarray:
    return value if leaf.endswith("bias") else np.ascontiguousarray(value.T)


# ---- the configuration


def config_of(model: Any) -> dict[str, Any]:
    """The adapter_config.json of a model."""
    plan, cfg = model.peft, model.cfg
    config: dict[str, Any] = {
        "peft_type": METHODS[plan.method][1],
        "task_type": SCORES if cfg.scores else "CAUSAL_LM",
        "base_model_name_or_path": model.base or None,
        "inference_mode": True,
    }
    if plan.saved:
        names = [k.name.rpartition(".")[0] for k in key_table(cfg) if k.path in plan.saved]
        stacked = {n.rpartition(".")[2] if "{i}" in n else n for n in names}
        config["modules_to_save"] = sorted(stacked)
    if isinstance(plan, AdapterPeft):
        return config | {"bottleneck": plan.width, "placement": plan.placement}
    if isinstance(plan, PrefixPeft):
        prefix = plan.method == "prefix"
        width = cfg.num_kv_heads * cfg.head_dim if prefix else cfg.hidden_size
        return config | {
            "num_virtual_tokens": plan.length,
            "num_layers": cfg.num_layers,
            "num_attention_heads": cfg.num_kv_heads if prefix else cfg.num_heads,
            "token_dim": width,
            "num_transformer_submodules": 1,
        }
    twice = 2 if plan.init == "pissa" else 1
    ranks: dict[str, dict[int, int]] = {}
    alphas: dict[str, dict[int, float]] = {}
    for target, layer, r, _ in _lora_tensors(plan, 0):
        alpha = target.alphas[0][layer] * (math.sqrt(twice) if plan.rslora[0] else twice)
        ranks.setdefault(target.module, {})[layer] = r * twice
        alphas.setdefault(target.module, {})[layer] = alpha
    r, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    config |= {
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": plan.dropout,
        "target_modules": _named(ranks, cfg),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": plan.rslora[0],
        "use_dora": plan.dora,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    if cfg.tied_head and "embed.embedding" in plan.saved:
        config["ensure_weight_tying"] = True
    return config


def _common(values: dict[str, dict[int, Any]]) -> tuple[Any, dict[str, Any]]:
    """The value most modules have, and a pattern for each of the others."""
    common = Counter(v for layers in values.values() for v in layers.values()).most_common(1)[0][0]
    pattern: dict[str, Any] = {}
    for module, layers in values.items():
        if set(layers.values()) == {common}:
            continue
        if len(set(layers.values())) == 1:
            pattern[module.rpartition("{i}.")[2]] = next(iter(layers.values()))
        else:
            pattern |= {module.format(i=i): v for i, v in layers.items() if v != common}
    return common, pattern


def _named(ranks: dict[str, dict[int, int]], cfg: ModelConfig) -> list[str]:
    """target_modules: ends of names, or whole names where not all with such an end are adapted."""
    count = {m: cfg.num_layers if "{i}" in m else 1 for m in ranks}
    if all(len(layers) == count[module] for module, layers in ranks.items()):
        return [module.rpartition(".")[2] for module in ranks]
    return [module.format(i=i) for module, layers in ranks.items() for i in layers]
