# SPDX-License-Identifier: Apache-2.0
"""The weights that a peft section names, matched against HF's module names as peft matches them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.config import PeftSection
from jaxllm.errors import UserError
from jaxllm.model.adapter import score_paths
from jaxllm.model.config import ModelConfig
from jaxllm.model.families.table import FAMILIES
from jaxllm.model.families.tensors import embed_name, fused_in, key_table, root_of, tensor_names
from jaxllm.untrusted import bounded

ALL_LINEAR = "all-linear"
EMBED, HEAD = "embed", "head"  # paths in the model
CONVERTED = (".gate_proj", ".up_proj", ".down_proj")
UNCONVERTED = ("qwen2_moe", "qwen3_5_moe_text", "lfm2_moe", "nemotron_h", "hy_v3", "mimo_v2_flash")
# Modules that peft does not adapt, since kernels for state spaces pass them by.
REFUSED = {"nemotron_h": (".out_proj",)}
# The router's names where it is a Linear in transformers 5 too.
LINEAR_ROUTER = (".wg", ".router.proj")
EXPERTS = ".experts.", ".block_sparse_moe."  # in the names of tensors of experts
# HF's fused tensors whose branch has another name here.
FUSED = {
    "attention.query_key_value": "qkv",
    "conv.in_proj": "bcx",
    "mamba.in_proj": "inputs",
    "mixer.in_proj": "inputs",
    "shared_mlp.input_linear": "gate_up",
}
PATTERN = r"(.*\.)?({})"  # a key of rank_pattern or alpha_pattern matches the end of a name


@dataclass(frozen=True)
class Target:
    """An adapted weight, in all layers of a stack.

    path: its module in the model; the parts of a tensor that HF fuses are one target.
    module: its module in HF's model, as `tensor_names` reads it: with the stack for the layer, and
      `{expert}` for the expert where each is a module.
    parameter: True if peft names it in target_parameters; `module` is then a parameter of
      transformers 5.
    ranks, alphas: [adapters][layers of the stack]; rank 0 = the layer is not adapted.
    outputs: where HF's weight has each of our outputs; () = in the same order.
    turned: True if peft takes the parameter's inputs for outputs, so that its A is our B.
    """

    path: str
    module: str
    ranks: tuple[tuple[int, ...], ...]
    alphas: tuple[tuple[float, ...], ...]
    parameter: bool = False
    outputs: tuple[int, ...] = ()
    turned: bool = False

    @property
    def experts(self) -> bool:
        """True if it is a matrix of every expert."""
        return ".experts." in self.module

    @property
    def stacked(self) -> bool:
        """True if the weight has a dim of layers."""
        return "{" in self.module

    def widths(self) -> list[int]:
        """Columns of A that each adapter has: its largest rank."""
        return [max(ranks) for ranks in self.ranks]

    def adapted_layers(self, which: int) -> list[tuple[int, int]]:
        """(index in the stack, rank) of each layer that the `which`th adapter adapts."""
        return [(layer, r) for layer, r in enumerate(self.ranks[which]) if r]

    def scales(self, rslora: Sequence[bool]) -> np.ndarray:
        """s of each column of A, float32 [L, R]; 0 beyond a layer's rank."""
        parts = []
        for ranks, alphas, root in zip(self.ranks, self.alphas, rslora, strict=True):
            r, alpha = np.asarray(ranks)[:, None], np.asarray(alphas)[:, None]
            s = alpha / np.maximum(np.sqrt(r) if root else r, 1)
            parts.append(np.where(np.arange(max(ranks)) < r, s, 0.0))
        return np.concatenate(parts, 1).astype(np.float32)


def adaptable_modules(cfg: ModelConfig) -> dict[str, str]:
    """{path: HF's module, as `tensor_names` reads it} of every weight that LoRA can adapt and that
    is a module.

    Checkpoints have experts and the router as modules too; peft converts adapters of them for
    transformers 5, and takes the modules of dense layers and shared experts for those of experts,
    so these are left out. In the families of UNCONVERTED it converts nothing.
    """
    converted = fuses_experts(cfg) and cfg.family not in UNCONVERTED
    modules: dict[str, str] = {}
    for key in key_table(cfg):
        path, _, leaf = key.path.rpartition(".")
        module = key.name.removesuffix(".weight")
        if key.part:  # a part of a fused tensor
            fused = module.rpartition(".")[2].removeprefix("in_proj_").removesuffix("_proj")
            fused = FUSED.get(within_layer(module), fused)
            path = f"{path.rpartition('.')[0]}.{fused}"
        routed = any(part in key.name for part in EXPERTS) or leaf == "router"
        linear_router = leaf == "router" and module.endswith(LINEAR_ROUTER)
        if key.path in score_paths(cfg) or module.endswith(REFUSED.get(cfg.family, ())):
            continue
        if routed and not linear_router and not fuses_experts(cfg):
            continue
        shared = cfg.experts is not None and cfg.experts.shared_size > 0
        if routed and (shared or not converted) and not linear_router:
            continue
        if converted and not routed and module.endswith(CONVERTED):
            continue
        table = leaf == "embedding" and path != EMBED  # of the layers
        if leaf in ("kernel", "embedding", "router") and not table:
            modules[key.path + "_lora" if leaf == "router" else path] = module
    return modules


def fuses_experts(cfg: ModelConfig) -> bool:
    """True if transformers 5 fuses the experts, which are one by one in checkpoints."""
    return any("{expert}" in key.name for key in key_table(cfg))


def adaptable_parameters(cfg: ModelConfig) -> dict[str, str]:
    """{path: HF's parameter} of the experts and the router, as transformers 5 has them."""
    if cfg.experts is None:
        return {}
    modules = FAMILIES[cfg.family].modules
    mlp = modules.get("mlp", "mlp")
    router = modules.get("mlp.router", f"{mlp}.gate")
    experts = modules.get("mlp.experts", f"{mlp}.experts")
    up = "gate_up" if cfg.gated_mlp else "up"
    names = {up: f"{experts}.{up}_proj", "down": f"{experts}.down_proj"}
    if not router.endswith(LINEAR_ROUTER):
        # transformers 5 renames mixtral's.
        names["router_lora"] = router.replace("block_sparse_moe", mlp) + ".weight"
    return {
        f"{stack}.mlp.{name}": f"{root_of(cfg.family, cfg.wrapper)}layers.{{{stack}}}.{end}"
        for stack, layers in cfg.stacks.items()
        if cfg.kinds_by_layer[layers[0]].routed
        for name, end in names.items()
    }


def layout_of(cfg: ModelConfig, path: str, parameter: bool) -> dict[str, Any]:
    """`outputs` and `turned` of a Target."""
    container, _, name = path.rpartition(".")
    fused = {"gate_up": ("gate", "up"), "qkv": ("q", "k", "v")}.get(name, ())
    parts = [f"{container}.{part}.kernel" for part in fused]
    columns = [o for key in key_table(cfg) if key.path in parts for o in key.part or ()]
    plain = columns == [*range(len(columns))]
    turned = parameter and not is_router(path) and "expert_halves" in fused_in(cfg)
    return {"outputs": () if plain else tuple(columns), "turned": turned}


def is_router(path: str) -> bool:
    return path.endswith(".router_lora")


def within_layer(name: str) -> str:
    """The name of a module within its layer."""
    return re.sub(r".*\.layers\.(\d+|{\w+})\.", "", name)


def names_by_layer(cfg: ModelConfig, module: str) -> list[list[str]]:
    """The names of `module` in each layer of its stack: one, or one for each expert."""
    layers = len(tensor_names(cfg, module.replace("{expert}", "0")))
    names = tensor_names(cfg, module)
    each = len(names) // layers
    return [names[i * each : (i + 1) * each] for i in range(layers)]


def _adapts(section: PeftSection, path: str, name: str, parameter: bool, fuses: bool) -> bool:
    """True if a module, or a parameter of transformers 5, is adapted. fuses: `fuses_experts`."""
    module = name.removesuffix(".weight")
    container = name.partition(".experts.")[0] + ".experts" if ".experts." in name else module
    for entry in section.exclude_modules:
        if _matches(entry, module) or _matches(entry, container):
            return False
    layer, chosen = re.search(r"\.(\d+)\.", name), section.layers_to_transform
    if chosen and (layer is None or int(layer[1]) not in chosen):
        return False
    if module.endswith(tuple(section.modules_to_save)):
        return False
    all_linear = ALL_LINEAR in section.target_modules
    if parameter:
        named = any(f".{name}".endswith(f".{e}") for e in section.target_parameters)
        return named if section.target_parameters else all_linear and fuses
    left_out = path in (EMBED, HEAD) or (is_router(path) and not module.endswith(LINEAR_ROUTER))
    if all_linear and not left_out and container == module:
        return True
    return any(_matches(e, name) for e in section.target_modules if e != ALL_LINEAR)


@bounded("matching the names of modules")
def find_targets(cfg: ModelConfig, section: PeftSection, strict: bool) -> tuple[Target, ...]:
    """The targets of target_modules, target_parameters, exclude_modules, layers_to_transform and
    the patterns.

    all-linear without target_parameters adapts experts and router as peft does, where checkpoints
    have the experts one by one: `gate_up_proj`, in which gate and up share A, with twice the rank
    and alpha.

    Raises UserError if there are none, for a layer that does not exist and, if strict, for a name
    that matches no module.
    """
    if strict:
        suffixes = [e for e in section.target_modules if e != ALL_LINEAR]
        _check_names(cfg, "target_modules", suffixes)
        _check_names(cfg, "target_parameters", section.target_parameters)
        _check_names(cfg, "exclude_modules", section.exclude_modules)
        _check_names(cfg, "rank_pattern", section.rank_pattern, PATTERN)
        _check_names(cfg, "alpha_pattern", section.alpha_pattern, PATTERN)
    for layer in section.layers_to_transform:
        if layer >= cfg.num_layers:
            raise UserError(
                f"peft.layers_to_transform: there is no layer {layer}; the model has "
                f"{cfg.num_layers} (0 to {cfg.num_layers - 1})"
            )

    parameters, fuses = adaptable_parameters(cfg), fuses_experts(cfg)

    def values(path: str, name: str, parameter: bool) -> tuple[int, float]:
        """(rank, alpha)"""
        twice = parameter and path.endswith(".gate_up") and not section.target_parameters
        r, alpha = section.r * (1 + twice), section.lora_alpha * (1 + twice)
        adapted = _adapts(section, path, name, parameter, fuses)
        rank = int(_pattern(section.rank_pattern, name, r)) if adapted else 0
        return rank, float(_pattern(section.alpha_pattern, name, alpha))

    targets = []
    modules = [(*item, False) for item in adaptable_modules(cfg).items()]
    for path, module, parameter in modules + [(*item, True) for item in parameters.items()]:
        found = [
            {values(path, name, parameter) for name in names}
            for names in names_by_layer(cfg, module)
        ]
        if any(len(each) > 1 for each in found):
            raise UserError(
                f"peft: {within_layer(module).format(expert='N')}: the experts of a layer need "
                "one rank and alpha; name all or none of them"
            )
        ranks, alphas = zip(*(each.pop() for each in found), strict=True)
        if max(ranks):
            layout = layout_of(cfg, path, parameter)
            targets.append(Target(path, module, (ranks,), (alphas,), parameter, **layout))
    if not targets:
        raise UserError("peft: no module is left to adapt; see target_modules and exclude_modules")
    return tuple(targets)


def saved_paths(cfg: ModelConfig, entries: Sequence[str]) -> tuple[str, ...]:
    """Paths of the weights of modules_to_save, the modules whose name ends with an entry, and of a
    reward model's head. Raises UserError for an entry without a match."""
    paths: dict[str, None] = {}
    names = {k.path: tensor_names(cfg, k.name.rpartition(".")[0]) for k in key_table(cfg)}
    for entry in entries:
        if not any(name.endswith(entry) for some in names.values() for name in some):
            modules = dict.fromkeys(k.name.split(".")[-2] for k in key_table(cfg))
            raise UserError(
                f"peft.modules_to_save: {entry!r} matches nothing; the model has "
                f"{', '.join(modules)}"
            )
    for path, some in names.items():
        hits = {name for name in some if name.endswith(tuple(entries))}
        if any(part in name for name in hits for part in EXPERTS):
            raise UserError(
                f"peft.modules_to_save: {', '.join(entries)} match experts or their router, as "
                f"{min(hits)}; adapt these with LoRA instead"
            )
        if hits and hits != set(some):
            raise UserError(
                f"peft.modules_to_save: {', '.join(entries)} match some layers of a stack, as "
                f"{min(hits)}; name all or none of them"
            )
        paths |= dict.fromkeys([path] if hits else [])
    return tuple(paths | dict.fromkeys(score_paths(cfg)))


def _matches(entry: str, name: str) -> bool:
    if name == entry or name.endswith(f".{entry}"):
        return True
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as error:
        raise UserError(f"peft: {entry!r} is neither a module nor a pattern: {error}") from None


def _check_names(cfg: ModelConfig, key: str, entries: Iterable[str], form: str = "{}") -> None:
    """Raises UserError for an entry that, inserted into the pattern `form`, matches no module."""
    modules, parameters = (
        adaptable(cfg) for adaptable in (adaptable_modules, adaptable_parameters)
    )
    among = [] if key == "target_parameters" else list(modules.values())
    among += [] if key == "target_modules" else list(parameters.values())
    names = [name for module in among for name in tensor_names(cfg, module)]
    suffixes = dict.fromkeys(name.rpartition(".")[2] for name in names)
    if key == "target_parameters":
        suffixes = dict.fromkeys(map(within_layer, among))
    elif key == "exclude_modules" and parameters:
        names += [name.rpartition(".")[0] for name in names]
    for entry in entries:
        if not any(_matches(form.format(entry), name) for name in names):
            if not suffixes:
                raise UserError(f"peft.{key}: the model has no parameters that it can name")
            table = embed_name(cfg.family, cfg.wrapper).split(".")[-2]
            tied = f" (the head is the token table: {table})" if cfg.tied_head else ""
            raise UserError(
                f"peft.{key}: {entry!r} matches nothing; the model has {', '.join(suffixes)}"
                f"{tied}, or use {ALL_LINEAR}"
            )


def _pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in peft."""
    values = (value for key, value in patterns.items() if _matches(PATTERN.format(key), name))
    return next(values, default)


# ---- what an adapter_config.json says of targets


def common_value(
    cfg: ModelConfig, values: dict[str, dict[int, Any]], module: str
) -> tuple[Any, dict[str, Any]]:
    """The value of the module, if one is given, or else the most common one of {module: {layer of
    its stack: value}}; and a pattern for the others."""
    among = values[module].values() if module else (v for n in values.values() for v in n.values())
    common = Counter(among).most_common(1)[0][0]
    by_place: dict[str, dict[str, Any]] = {}  # {the module's name within a layer: values}
    for name, layers in values.items():
        names = names_by_layer(cfg, name)
        place = within_layer(name).replace("{expert}", r"\d+")  # keys are patterns
        by_place.setdefault(place, {}).update(
            {one: value for index, value in layers.items() for one in names[index]}
        )
    pattern: dict[str, Any] = {}
    for place, named in by_place.items():
        if len(set(named.values())) == 1 and common not in named.values():
            pattern[place] = next(iter(named.values()))
        else:
            pattern |= {name: v for name, v in named.items() if v != common}
    return common, pattern


def target_names(
    cfg: ModelConfig, ranks: dict[str, dict[int, int]], parameters: Set[str]
) -> tuple[list[str] | str, list[str]]:
    """(target_modules, target_parameters): suffixes if each matches only what is adapted, else full
    names. ranks: {module: {layer of its stack: rank}}."""

    def adapted(chosen: Set[str]) -> list[str]:
        layers = [(name, i) for name in ranks if name in chosen for i in ranks[name]]
        return [one for name, i in layers for one in names_by_layer(cfg, name)[i]]

    def every(names: Iterable[str]) -> list[str]:
        return [one for name in names for one in tensor_names(cfg, name)]

    modules = adapted(ranks.keys() - parameters), every(adaptable_modules(cfg).values())
    fused = adapted(parameters), every(adaptable_parameters(cfg).values())
    return (
        (full_names if cfg.wrapper else shortened)(*modules),
        shortened(*fused, short=within_layer),
    )


def full_names(names: Iterable[str], every: Iterable[str]) -> list[str] | str:
    """target_modules of a multimodal model, whose other parts have modules of the same names: a
    pattern of full names if it matches no other module of `every`, else the names."""
    in_layers = (re.sub(r"layers\\\.\d+", r"layers\\.\\d+", re.escape(n)) for n in names)
    pattern = "|".join(dict.fromkeys(in_layers))
    matched = {name for name in every if re.fullmatch(pattern, name)}
    return pattern if matched == {*names} else [*names]


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def shortened(
    names: Iterable[str], every: Iterable[str], short: Callable[[str], str] = last_part
) -> list[str]:
    """The names as `short` gives them, if these match no other name of `every`; else the names."""
    names = dict.fromkeys(names)
    ends = dict.fromkeys(map(short, names))
    others = (name for name in every if name not in names)
    return list(names if any(short(name) in ends for name in others) else ends)
