# SPDX-License-Identifier: Apache-2.0
"""The weights that a peft section names, matched against HF's module names as peft matches them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.config import PeftSection
from jaxllm.errors import UserError
from jaxllm.model.adapter import score_paths
from jaxllm.model.config import ModelConfig
from jaxllm.model.families.tensors import key_table, tensor_names
from jaxllm.untrusted import bounded

ALL_LINEAR = "all-linear"
EMBED, HEAD = "embed", "head"  # paths in the model
PATTERN = r"(.*\.)?({})"  # a key of rank_pattern or alpha_pattern matches the end of a name


@dataclass(frozen=True)
class Target:
    """An adapted weight, in all layers of a stack.

    path: its module in the model; the parts of a tensor that HF fuses are one target.
    module: its module in HF's model, as `tensor_names` reads it, with the stack for the layer.
    ranks, alphas: [adapters][layers of the stack]; rank 0 = the layer is not adapted.
    """

    path: str
    module: str
    ranks: tuple[tuple[int, ...], ...]
    alphas: tuple[tuple[float, ...], ...]

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
    """{path: HF's module, as `tensor_names` reads it} of every weight that LoRA can adapt."""
    modules: dict[str, str] = {}
    for key in key_table(cfg):
        path, _, leaf = key.path.rpartition(".")
        module = key.name.removesuffix(".weight")
        if key.part:  # a part of a fused tensor
            path = path.rpartition(".")[0] + "." + module.rpartition(".")[2].removesuffix("_proj")
        # Experts are parameters in transformers 5; peft has another key for them.
        left_out = ".experts." in key.name or key.path in score_paths(cfg)
        if leaf in ("kernel", "embedding") and not left_out:
            modules[path] = module
    return modules


@bounded("matching the names of modules")
def find_targets(cfg: ModelConfig, section: PeftSection, strict: bool) -> tuple[Target, ...]:
    """The targets of target_modules, exclude_modules, layers_to_transform and the patterns.

    Raises UserError if there are none, for a layer that does not exist and, if strict, for a name
    that matches no module.
    """
    if strict:
        suffixes = [e for e in section.target_modules if e != ALL_LINEAR]
        _check_names(cfg, "target_modules", suffixes)
        _check_names(cfg, "exclude_modules", section.exclude_modules)
        _check_names(cfg, "rank_pattern", section.rank_pattern, PATTERN)
        _check_names(cfg, "alpha_pattern", section.alpha_pattern, PATTERN)
    for layer in section.layers_to_transform:
        if layer >= cfg.num_layers:
            raise UserError(
                f"peft.layers_to_transform: there is no layer {layer}; the model has "
                f"{cfg.num_layers} (0 to {cfg.num_layers - 1})"
            )

    def rank(path: str, name: str) -> int:
        excluded = any(_matches(entry, name) for entry in section.exclude_modules)
        if excluded or name.endswith(tuple(section.modules_to_save)):
            return 0
        adapted = any(
            path not in (EMBED, HEAD) if entry == ALL_LINEAR else _matches(entry, name)
            for entry in section.target_modules
        )
        layer = re.search(r"\.(\d+)\.", name)
        if section.layers_to_transform:
            adapted &= layer is not None and int(layer[1]) in section.layers_to_transform
        return int(_pattern(section.rank_pattern, name, section.r)) if adapted else 0

    targets = []
    for path, module in adaptable_modules(cfg).items():
        names = tensor_names(cfg, module)
        ranks = tuple(rank(path, name) for name in names)
        alphas = tuple(float(_pattern(section.alpha_pattern, n, section.lora_alpha)) for n in names)
        if max(ranks):
            targets.append(Target(path, module, (ranks,), (alphas,)))
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
        if hits and hits != set(some):
            raise UserError(
                f"peft.modules_to_save: {', '.join(entries)} match some layers of a stack, as "
                f"{min(hits)}; name all or none of them"
            )
        paths |= dict.fromkeys([path] if hits else [])
    return tuple(paths | dict.fromkeys(score_paths(cfg)))


def shortened(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The last parts of the names of modules, if they match no other module of `every`; else the
    names."""
    names = dict.fromkeys(names)
    last = dict.fromkeys(name.rpartition(".")[2] for name in names)
    others = (name for name in every if name not in names)
    return list(names if any(name.rpartition(".")[2] in last for name in others) else last)


def _matches(entry: str, name: str) -> bool:
    if name == entry or name.endswith(f".{entry}"):
        return True
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as error:
        raise UserError(f"peft: {entry!r} is neither a module nor a pattern: {error}") from None


def _check_names(cfg: ModelConfig, key: str, entries: Iterable[str], form: str = "{}") -> None:
    """Raises UserError for an entry that, inserted into the pattern `form`, matches no module."""
    names = [
        name for module in adaptable_modules(cfg).values() for name in tensor_names(cfg, module)
    ]
    for entry in entries:
        if not any(_matches(form.format(entry), name) for name in names):
            suffixes = dict.fromkeys(name.rpartition(".")[2] for name in names)
            tied = " (the head is the token table: embed_tokens)" if cfg.tied_head else ""
            raise UserError(
                f"peft.{key}: {entry!r} matches nothing; the model has {', '.join(suffixes)}"
                f"{tied}, or use {ALL_LINEAR}"
            )


def _pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in peft."""
    values = (value for key, value in patterns.items() if _matches(PATTERN.format(key), name))
    return next(values, default)
