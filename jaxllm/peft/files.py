# SPDX-License-Identifier: Apache-2.0
"""Adapter directories in peft's format: adapter_config.json and adapter_model.safetensors.

Methods that peft does not have (bottlenecks) use the same two files. Nothing but JSON and
safetensors is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import PEFT_METHODS, PeftSection
from jaxllm.errors import UserError, seen
from jaxllm.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    READABLE,
    header,
    local_dir,
    open_tensors,
    read_json,
)
from jaxllm.model.adapter import NO_ADAPTER, Adapter
from jaxllm.model.config import ModelConfig
from jaxllm.model.families.tensors import key_table, module_name, tensor_names
from jaxllm.model.families.wrappers import head_of, is_text
from jaxllm.paths import as_path, hub_id
from jaxllm.peft import METHODS
from jaxllm.peft.base import SEQUENCE_CLASSIFICATION, PeftAdapter
from jaxllm.peft.combine import combine
from jaxllm.untrusted import odd_values

# Names of copies of the base, which peft saves of an adapted token table or head.
COPIES = (".base_layer.weight", ".base_layer.bias")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's directory and its adapter_config.json."""

    folder: Path
    config: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.folder / ADAPTER


def is_adapter(path: str) -> bool:
    """True if a directory or hub id has an adapter and no model."""
    folder = local_dir(path) if hub_id(path) else as_path(path)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def tokenizer_of(path: str) -> str:
    """The directory or hub id that has the tokenizer: `path`, or else its base model."""
    if not is_adapter(path) or (local_dir(path) / "tokenizer.json").is_file():
        return path
    return with_base(path, None)[0]


def is_reward(adapters: Mapping[str, AdapterFiles]) -> bool:
    """True if the adapters belong to a reward model."""
    return any(a.config.get("task_type") == SEQUENCE_CLASSIFICATION for a in adapters.values())


def find(path: str, weights: bool = True) -> AdapterFiles:
    """The adapter in a directory or hub id. Raises UserError if there is none.

    weights: require adapter_model.safetensors as well as adapter_config.json.
    """
    folder = local_dir(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path} has no {ADAPTER_CONFIG}; it is not an adapter")
    if weights and not (folder / ADAPTER).is_file():
        raise UserError(f"{path} has no {ADAPTER}; a pickled adapter is not read")
    return AdapterFiles(folder, read_json(folder / ADAPTER_CONFIG))


def with_base(path: str, adapter: str | Mapping[str, str] | None) -> tuple[str, dict[str, str]]:
    """(path of the base model, {name: path of an adapter}); `path` may itself be an adapter.

    Raises UserError if an adapter does not name its base model.
    """
    named = {} if adapter is None else {"default": adapter} if isinstance(adapter, str) else adapter
    if not is_adapter(path):
        return path, dict(named)
    if "default" in named:
        raise UserError(f"{path} is an adapter too; name the other: NAME={named['default']}")
    base = find(path).config.get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{path} does not name its base model; give the base model's path too")
    if not as_path(base).is_dir() and not hub_id(base):
        raise UserError(
            f"{path} is an adapter of {base}, which does not exist; give the base model's path too"
        )
    return base, {"default": path, **named}


def make_adapter(cfg: ModelConfig, section: PeftSection) -> Adapter:
    """The adapter that a run trains.

    Raises UserError for a module, layer or combination that the model does not have.
    """
    if section.method == "none":
        return NO_ADAPTER
    if not section.path:
        return METHODS[section.method].from_section(cfg, section)
    files = find(section.path, weights=False)
    method = method_of(files.config)
    if method != section.method:
        raise UserError(
            f"{section.path} is an adapter of method {method}; peft.method is {section.method}"
        )
    adapter = read_adapter(cfg, {"default": files})
    training = {key: getattr(section, key) for key in PEFT_METHODS[method].training}
    return replace(adapter, **training)


def method_of(config: dict[str, Any]) -> str:
    """The peft.method of an adapter_config.json. Raises UserError for an unsupported peft_type."""
    kind = config.get("peft_type")
    methods = {adapter.peft_type: method for method, adapter in METHODS.items()}
    if not isinstance(kind, str) or kind not in methods:
        raise UserError(
            f"{ADAPTER_CONFIG}: peft_type {seen(kind)} is not supported, only {', '.join(methods)}"
        )
    return methods[kind]


def read_adapter(cfg: ModelConfig, adapters: Mapping[str, AdapterFiles]) -> PeftAdapter:
    """The adapter that one adapter_config.json describes, or several of LoRA."""
    described = {}
    for name, files in adapters.items():
        method, file = METHODS[method_of(files.config)], files.folder / ADAPTER_CONFIG
        with odd_values(str(file)):
            described[name] = method.from_config(cfg, files.config, file)
    return combine(described) if len(described) > 1 else described.popitem()[1]


def _stored_names(cfg: ModelConfig, files: AdapterFiles) -> dict[str, str]:
    """{name of a tensor, by transformers' modules of today: its name in the adapter's file}."""
    names = {}
    for stored in header(files.weights)[1]:
        root, found, module = stored.rpartition(PeftAdapter.root)
        names[root + found + module_name(module, cfg.family, cfg.wrapper)] = stored
    return names


def check_weights(model: Any, files: AdapterFiles, which: int = 0) -> None:
    """Raises UserError for tensors of a directory that are missing, or of another shape or dtype
    than the `which`th adapter of an abstract model."""
    _, tensors = header(files.weights)
    for name, tensor in tensors.items():
        if tensor["dtype"] not in READABLE:
            raise UserError(f"{files.weights}: {name} is stored as {seen(tensor['dtype'])}")
    names = _stored_names(model.cfg, files)
    shapes = {name: tuple(tensors[stored]["shape"]) for name, stored in names.items()}
    adapter: PeftAdapter = model.peft
    adapter.check(model, shapes, files.weights, which)


def load_weights(model: Any, files: AdapterFiles, which: int = 0) -> None:
    """Loads a directory's weights, except for modules_to_save, into the model's `which`th adapter.

    `check_weights` must accept them. Raises UserError for unexpected tensors.
    """
    names = _stored_names(model.cfg, files)
    with open_tensors(files.weights) as file:
        tensors = {name: file.get_tensor(names[name]).astype(np.float32) for name in names}
    adapter: PeftAdapter = model.peft
    adapter.load(model, tensors, which)
    expected = set(saved_tensors(model.cfg, adapter, {"": files}))
    if model.head is None:
        expected.add(head_of(model.cfg.wrapper))  # a second copy of the token table
    for name in tensors:
        base, module = name.endswith(COPIES), name.removeprefix(adapter.root)
        if not base and module not in expected:
            what = "which its config does not name"
            if not is_text(module, model.cfg.wrapper):
                what = "which is not of the language model; only that is adapted here"
            raise UserError(f"{files.weights} has {names[name]}, {what}")


def saved_tensors(
    cfg: ModelConfig, adapter: Any, adapters: Mapping[str, AdapterFiles]
) -> dict[str, tuple[Path, str]]:
    """{HF tensor of modules_to_save: (the adapter's file, its name in it)}."""
    keys = [key for key in key_table(cfg) if key.path in adapter.saved]
    wanted = [name for key in keys for name in tensor_names(cfg, key.name)]
    places: dict[str, tuple[Path, str]] = {}
    for files in adapters.values() if wanted else ():
        names = _stored_names(cfg, files)
        if missing := {adapter.root + name for name in wanted} - names.keys():
            raise UserError(f"{files.weights} has no {min(missing)}, which its config asks for")
        places |= {name: (files.weights, names[adapter.root + name]) for name in wanted}
    return places
