# SPDX-License-Identifier: Apache-2.0
"""The interface between a model and a PEFT method.

A model calls its adapter wherever a method may add something. The methods are subclasses of Adapter
in jaxllm/peft.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxllm.mesh import Axes
from jaxllm.model.config import ModelConfig
from jaxllm.ops.quantized import Quantized


class AdapterParam(nnx.Variable):
    """A float32 weight of an adapter. Not an nnx.Param, so filtering on nnx.Param never returns
    adapter weights."""


@dataclass(frozen=True)
class Adapter:
    """What a PEFT method adds to a model, and which weights are trained.

    This class adds nothing and trains every weight. An adapter must be hashable, because it is a
    static part of the model's graph. `path` is a dotted path in the model, without layer indices
    ("layers.attn.q"; "layers_3.attn.q" where a model has several stacks).
    """

    method = "none"  # the value of peft.method
    names = tuple[str, ...]()  # of the LoRA adapters that rows can choose among
    adapter_weights = ()  # default weight of each of them; empty = 1 each
    always_on = ""  # what keeps it from being turned off or weighted
    saved = ()  # paths of the base model's weights that are trained and saved with the adapter
    length = 0  # virtual tokens before each text
    needs_base = False  # True if the trained weights cannot be exported without the base weights

    @property
    def frozen(self) -> bool:
        """True if the base model's weights are frozen, except for `saved`."""
        return self.method != "none"

    @property
    def learning_rate_ratios(self) -> Mapping[str, float]:
        """{leaf name: its learning rate as a multiple of the others'}."""
        return {}

    def begin(self, model: Any) -> None:
        """Initializes the adapter weights that depend on the base model's weights."""

    def count(self, model: Any) -> int:
        """Number of trained parameters."""
        return sum(
            v.get_value().size
            for path, v in nnx.to_flat_state(nnx.state(model))
            if self.trains(path, v)
        )

    def summary(self, model: Any) -> list[str]:
        """Lines that a run prints at the start."""
        if not self.frozen:
            return []
        base = [v.get_value() for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))]
        total, trained = sum(math.prod(x.shape) for x in base), self.count(model)
        lines = [f"trainable: {trained:,} parameters ({trained / total:.2%} of {total:,})"]
        if packed := [x for x in base if isinstance(x, Quantized)]:
            half = sum(math.prod(x.shape) for x in packed) * 2 / 2**20
            lines.append(
                f"base: the layers' kernels as {packed[0].kind} take "
                f"{sum(x.nbytes for x in packed) / 2**20:,.1f} MiB; float32 would {2 * half:,.1f}, "
                f"bfloat16 {half:,.1f}"
            )
        return lines

    def trains(self, path: tuple[Any, ...], variable: Any) -> bool:
        """True if a variable of the model is trained; the others are frozen."""
        return isinstance(variable, nnx.Param)

    def linear(self, path: str, axes: Axes, shape: tuple[int, int], rngs: nnx.Rngs) -> Any:
        """None, or a module `f(x, y, kernel, context) -> y` that changes the output of a Linear
        (before its bias) or of Embed. x: the input (Embed: tokens). `kernel()`: the weight, float32
        [I, O]. context: a model.context.Context. Its method `factors(kernel, context, ndim)` gives
        the same change as matrices (peft.lora.LoraBranch.factors)."""

    def experts(self, path: str, axes: Axes, shape: tuple[int, ...], rngs: nnx.Rngs) -> Any:
        """None, or a module with `factors_of_experts(context) -> (A [E, I, R], B [E, R, O])`, whose
        products are added to the matrices [E, I, O] of experts."""

    def sublayer(self, path: str, size: int, rngs: nnx.Rngs) -> Any:
        """None, or a module `f(h) -> h` that changes what attention or MLP adds to the residual."""

    def prefix(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Any:
        """None, or a module with `length`, the number of virtual tokens before each text, and
        `kv(decoder)`, their keys and values, each [L, 1, length, N, K]."""


NO_ADAPTER = Adapter()


def score_paths(cfg: ModelConfig) -> tuple[str, ...]:
    """Paths of a reward model's head, which every method trains: no base model has one."""
    return ("score.kernel",) if cfg.scores else ()
