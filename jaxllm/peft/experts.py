# SPDX-License-Identifier: Apache-2.0
"""LoRA on the experts of a layer, in both spellings of peft.

    spelling            config key         modules                             tensors of an adapter
    modules             target_modules     experts.3.gate_proj, .up_proj, …    of each expert
    fused parameters    target_parameters  experts.gate_up_proj, .down_proj    of all experts

transformers 4 had the first, and peft converts such adapters for transformers 5, which has the
second. There gate and up have one A, and B [R, 2F] adds to both. Experts that are fused in
checkpoints too have the second alone.

Dims: E experts, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.errors import UserError
from jaxllm.peft.base import Slot
from jaxllm.peft.targets import Target, is_router

OTHER = "; name the experts in target_parameters instead"


@dataclass(frozen=True)
class FusedSlot(Slot):
    """A [E, I, R] or B [E, R, O] of all experts as a matrix, as peft has it: A [E R, I], whose rows
    are sorted by expert; B [O, R E], whose columns are sorted by rank.

    order: of our dims in peft's tensor before two of them are merged: the first two of its A, the
    last two of its B.
    """

    order: tuple[int, int, int] = (0, 1, 2)

    def to_file(self, value: np.ndarray) -> np.ndarray:
        value = super().to_file(value).transpose(self.order)
        shape = (-1, value.shape[2]) if self.order[0] == 0 else (len(value), -1)
        return value.reshape(shape)

    def from_file(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        value = tensor.reshape([shape[dim] for dim in self.order]).transpose(np.argsort(self.order))
        return super().from_file(value, shape)


def expert_slots(
    root: str,
    target: Target,
    names: list[str],
    branch: Any,
    layer: int,
    ranks: slice,
    nested: bool,
) -> Iterator[Slot]:
    """The tensors of the experts of a layer, which is one of a stack, in HF `names`' order.

    nested: another fused parameter of the layer is adapted after this one, so that peft's wrapper
    of this one is inside of that of the other.
    """
    every = slice(None)
    if not target.parameter:
        for expert, name in enumerate(names):
            prefix = f"{root}{name}.lora_"
            yield Slot(f"{prefix}A.weight", branch.a, (layer, expert, every, ranks), True)
            yield Slot(f"{prefix}B.weight", branch.b, (layer, expert, ranks, every), True)
        return
    prefix = root + names[0].rpartition(".")[0]
    prefix += ".base_layer.lora_" if nested else ".lora_"
    a, b = (layer, every, every, ranks), (layer, every, ranks, every)
    if target.turned:
        yield FusedSlot(f"{prefix}A.weight", branch.b, b)
        yield FusedSlot(f"{prefix}B.weight", branch.a, a, order=(1, 2, 0))
        return
    yield FusedSlot(f"{prefix}A.weight", branch.a, a, order=(0, 2, 1))
    yield FusedSlot(f"{prefix}B.weight", branch.b, b, outputs=target.outputs, order=(2, 1, 0))


def check_experts(targets: tuple[Target, ...], plain: bool) -> None:
    """Raises UserError for what peft does not do with experts. plain: LoRA without dropout, DoRA
    and PiSSA."""
    spelled = {target.parameter for target in targets if target.experts}
    if len(spelled) > 1:
        raise UserError("peft: the experts are named in target_modules and in target_parameters")
    if not plain and (spelled or any(is_router(target.path) for target in targets)):
        raise UserError(
            "peft: experts and routers are adapted without dropout, DoRA and PiSSA, as in peft; or "
            "set exclude_modules to [experts, gate]"
        )


def check_modules(targets: tuple[Target, ...], rslora: bool) -> None:
    """Raises UserError for an adapter of experts' modules that peft does not convert for
    transformers 5."""
    experts = [t for t in targets if t.experts and not t.parameter]
    if not experts:
        return
    names = dict.fromkeys(t.module.rpartition(".")[2] for t in experts)
    if len(names) < 3:  # gate, up and down
        names = ", ".join(names)
        raise UserError(f"peft: {names} of experts cannot be adapted without the others{OTHER}")
    shapes = {pair for t in experts for pair in zip(t.ranks[0], t.alphas[0], strict=True)}
    if rslora or len(shapes) > 1:
        raise UserError(
            "peft: modules of experts need one rank and alpha in all layers, and no use_rslora"
            + OTHER
        )
