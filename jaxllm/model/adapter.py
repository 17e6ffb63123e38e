# SPDX-License-Identifier: Apache-2.0
"""What a PEFT method may add to a model, and which of its weights are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxllm.model.config import ModelConfig
from jaxllm.ops.quantized import Quantized


class PeftParam(nnx.Variable):
    """A weight that a PEFT method adds, float32. No nnx.Param: who asks for the model's own weights
    does not get it, in whatever order they ask."""


@dataclass(frozen=True)
class Peft:
    """What is trained, and what a PEFT method adds where the model asks: here all, and nothing.

    `path` names a place in the model's tree, the layers as one ("layers.attn.q"). Must be hashable:
    it is part of the model's graph. `mix` is how much of each of several adapters a row gets.
    """

    method = "none"  # its row in interop.METHODS
    mix = ()
    saved = ()  # paths of the model's own weights that are trained beside what is added
    length = 0  # virtual tokens before each text
    needs_base = False  # whether what was trained means nothing without them

    @property
    def frozen(self) -> bool:
        """Whether the model's own weights stay as they are, but those `saved`."""
        return self.method != "none"

    def begin(self, model: Any) -> None:
        """Sets those of the added weights that depend on the model's own, once it has these."""

    def count(self, model: Any) -> int:
        """How many numbers are trained."""
        return sum(
            v.get_value().size
            for path, v in nnx.to_flat_state(nnx.state(model))
            if self.trains(path, v)
        )

    def summary(self, model: Any) -> list[str]:
        """What a user is told of it when a run begins."""
        if not self.frozen:
            return []
        held = [v.get_value() for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))]
        total, trained = sum(math.prod(x.shape) for x in held), self.count(model)
        lines = [f"trainable: {trained:,} parameters beside {total:,} ({trained / total:.2%})"]
        if packed := [x for x in held if isinstance(x, Quantized)]:
            half = sum(math.prod(x.shape) for x in packed) * 2 / 2**20
            lines.append(
                f"base: the layers' kernels as {packed[0].kind} take "
                f"{sum(x.nbytes for x in packed) / 2**20:,.1f} MiB; float32 would {2 * half:,.1f}, "
                f"bfloat16 {half:,.1f}"
            )
        return lines

    def trains(self, path: tuple[Any, ...], variable: Any) -> bool:
        """Whether a weight of the model is trained; the rest is frozen."""
        return isinstance(variable, nnx.Param)

    def linear(
        self, path: str, axes: tuple[str, str], shape: tuple[int, int], rngs: nnx.Rngs
    ) -> Any:
        """None, or `f(x, y, kernel, at)`: y, the result of a Linear (before its bias) or of Embed,
        changed; x came in (Embed: tokens), `at` tells layer, dropout key and mix of adapters,
        `kernel()` is the weight."""

    def sublayer(self, path: str, size: int, rngs: nnx.Rngs) -> Any:
        """None, or `f(h)`: what attention or MLP adds to the residual, changed."""

    def prefix(self, cfg: ModelConfig, rngs: nnx.Rngs) -> Any:
        """None, or an object whose `length` is a number of virtual tokens before each text and
        whose `kv(decoder)` gives their keys and values, [L, 1, length, N, K] each."""


PLAIN = Peft()


def score_of(cfg: ModelConfig) -> tuple[str, ...]:
    """Paths of a reward model's head, which every method trains: no base has it."""
    return ("score.kernel",) if cfg.scores else ()
