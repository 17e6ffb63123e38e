# SPDX-License-Identifier: Apache-2.0
"""The table of PEFT methods."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from jaxllm.config import PEFT_METHODS
from jaxllm.errors import UserError
from jaxllm.files import ADAPTER_CONFIG
from jaxllm.peft.base import PeftAdapter


def _import(name: str) -> type[PeftAdapter]:
    module, _, kind = name.partition(".")
    return getattr(import_module(f"jaxllm.peft.{module}"), kind)


# peft.method -> its class, for each row of config.PEFT_METHODS that names one.
METHODS = {name: _import(row.adapter) for name, row in PEFT_METHODS.items() if row.adapter}


def method_of(config: dict[str, Any]) -> str:
    """The peft.method of an adapter_config.json. Raises UserError for an unsupported peft_type."""
    kind = config.get("peft_type")
    methods = {adapter.peft_type: method for method, adapter in METHODS.items()}
    if kind not in methods:
        supported = ", ".join(methods)
        raise UserError(
            f"{ADAPTER_CONFIG}: peft_type {kind!r} is not supported; supported: {supported}"
        )
    return methods[kind]
