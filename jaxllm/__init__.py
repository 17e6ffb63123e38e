# SPDX-License-Identifier: Apache-2.0
"""Train language models with JAX: a HuggingFace directory in, a HuggingFace directory out."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that holds it; nothing heavy is imported before a name is used.
_PUBLIC = {
    "TrainConfig": "config",
    "load_config": "config",
    "load_hf": "hf",
    "save_hf": "hf",
    "train": "train",
    "evaluate_files": "evaluate",
    "generate_text": "rollout",
    "Sampling": "rollout",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"jaxllm.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")


class _Package(ModuleType):
    """`jaxllm.train` is the function, also once the module of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _PUBLIC):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
