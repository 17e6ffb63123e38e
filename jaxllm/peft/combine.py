# SPDX-License-Identifier: Apache-2.0
"""Several LoRA adapters in one model: rows of a batch use one, none, or a weighted sum of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxllm.errors import UserError
from jaxllm.model.adapter import Adapter
from jaxllm.model.config import ModelConfig
from jaxllm.peft.lora import LoraAdapter
from jaxllm.peft.targets import Target, adaptable_modules

# One of a model's adapters by name, none, or {name: weight}.
Choice = str | Mapping[str, float] | None


def combine(cfg: ModelConfig, adapters: Mapping[str, Any]) -> LoraAdapter:
    """One adapter whose ranks are those of all; the first adapter is in use.

    Raises UserError for any that is not plain LoRA.
    """
    for name, adapter in adapters.items():
        if not adapter.names or adapter.always_on or adapter.needs_base:
            raise UserError(
                f"adapter {name} cannot be combined with another: only LoRA can, without DoRA, "
                "PiSSA or modules_to_save"
            )
    targets = []
    for path, module in adaptable_modules(cfg).items():
        matching = [next((t for t in a.targets if t.path == path), None) for a in adapters.values()]
        if any(matching):
            layers = next(len(t.ranks[0]) for t in matching if t)
            unadapted: tuple[Any, Any] = ((0,) * layers, (1.0,) * layers)
            pairs = [(t.ranks[0], t.alphas[0]) if t else unadapted for t in matching]
            ranks, alphas = zip(*pairs, strict=True)
            targets.append(Target(path, module, ranks, alphas))
    return LoraAdapter(
        targets=tuple(targets),
        names=tuple(adapters),
        rslora=tuple(adapter.rslora[0] for adapter in adapters.values()),
        adapter_weights=(1.0,) + (0.0,) * (len(adapters) - 1),
    )


def choice_weights(adapter: Adapter, choice: Choice) -> tuple[float, ...]:
    """The weight of each of a model's adapters, in the order of its names.

    Raises UserError for an unknown name, and if the adapter cannot be turned off.
    """
    if not adapter.names:
        raise UserError("only LoRA adapters can be chosen; the model has none")
    weights = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice
    for name in weights:
        if name not in adapter.names:
            raise UserError(f"there is no adapter {name}; there are {', '.join(adapter.names)}")
    if adapter.always_on and set(weights.values()) != {1.0}:
        raise UserError(
            f"an adapter with {adapter.always_on} cannot be turned off or weighted; load the model "
            "without it"
        )
    return tuple(float(weights.get(name, 0.0)) for name in adapter.names)


def parse_choice(text: str) -> Choice:
    """`none`, NAME, or `NAME:WEIGHT,NAME:WEIGHT`, as --use has it."""
    if text == "none":
        return None
    if ":" not in text:
        return text
    pairs = [part.rpartition(":") for part in text.split(",")]
    try:
        return {name: float(weight) for name, _, weight in pairs}
    except ValueError:
        raise UserError(f"{text} is not a name, nor name:weight,name:weight") from None


def choose(model: Any, choice: Choice) -> None:
    """Sets which of the model's adapters are used from now on: one, none, or a weighted sum."""
    model.peft = replace(model.peft, adapter_weights=choice_weights(model.peft, choice))
