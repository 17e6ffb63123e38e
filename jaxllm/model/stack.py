# SPDX-License-Identifier: Apache-2.0
"""A stack of layers with equal weights' shapes: a scan, or a loop once they are unstacked.

Dims: B rows, T tokens, D model width, L layers, G layers of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.mesh import constrain
from jaxllm.model.adapter import Adapter
from jaxllm.model.block import Block
from jaxllm.model.cache import LayerCache
from jaxllm.model.config import LayerKind, ModelConfig
from jaxllm.model.context import Context
from jaxllm.ops.quantized import Quantized
from jaxllm.ops.residuals import kept

# Residuals that the backward pass reads; it recomputes the rest of each layer.
REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.save_only_these_names("layer"),
    "dots": jax.checkpoint_policies.save_only_these_names("layer", "attention", "dot"),
    "names": jax.checkpoint_policies.save_only_these_names("layer", "attention"),
}
MAX_PERIOD = 8  # layers in the body of a scan, whose compile time grows with them


def make_stack(cfg: ModelConfig, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs) -> Block:
    """A Block whose weights have a leading dim L."""

    @nnx.split_rngs(splits=cfg.num_layers)
    @partial(nnx.vmap, in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Block:
        return Block(cfg, peft=peft, dtype=dtype, rngs=rngs)

    return make(rngs)


def period(kinds: tuple[LayerKind, ...]) -> int:
    """Length of the shortest sequence of kinds that repeats to give `kinds`; 0 if there is none."""
    for length in range(1, min(MAX_PERIOD, max(len(kinds) // 2, 1)) + 1):
        if len(kinds) % length == 0 and kinds == kinds[:length] * (len(kinds) // length):
            return length
    return 0


@dataclass(frozen=True)
class Stack:
    """The layers of a stack, which are called alike in training and in decoding.

    A scan's body runs one period of layers, each of a static kind. Kinds without a period (Gemma 3
    with 26 layers, say) run one layer in the body, and `lax.switch` selects its attention.

    blocks: a Block whose weights have a leading dim L, or one Block per layer (`unstack`).
    kinds: of each layer. remat: a key of REMAT, or none. unroll: layers in an iteration of the
    scan, at least a period.
    """

    blocks: Any
    kinds: tuple[LayerKind, ...]
    remat: str = "none"
    unroll: int = 1

    def __call__(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any]:
        """(x after the last layer, the layers' new past).

        past: a LayerCache or VirtualTokens, stacked or as a tuple with one per layer; or None.
        """
        if isinstance(self.blocks, nnx.List):
            return self.loop(x_BTD, ctx, past)
        return self.scan(x_BTD, ctx, past)

    def loop(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any]:
        pasts = past if isinstance(past, tuple) else _split(past, len(self.kinds))
        new = []
        for layer, (block, kind) in enumerate(zip(self.blocks, self.kinds, strict=True)):
            x_BTD, after = block(x_BTD, ctx.at_layer(layer, (kind,)), pasts[layer])
            new.append(after)
        return x_BTD, tuple(new)

    def scan(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any]:
        graph, weights = nnx.split(self.blocks)
        distinct = tuple(dict.fromkeys(self.kinds))
        size = period(self.kinds)
        # The kinds that a layer at each position of the body may be of.
        positions = [(kind,) for kind in self.kinds[:size]] if size else [distinct]
        size = size or 1
        indices = jnp.arange(len(self.kinds))
        choices = jnp.asarray([distinct.index(kind) for kind in self.kinds], jnp.int32)

        def layer(kinds, x, weights, index, choice, past):
            x = kept(x, "layer")
            return nnx.merge(graph, weights)(x, ctx.at_layer(index, kinds, choice), past)

        layers: list[Callable[..., Any]] = [partial(layer, kinds) for kinds in positions]
        if self.remat != "none" and not isinstance(past, LayerCache):
            policy = REMAT[self.remat]
            layers = [jax.checkpoint(f, policy=policy, prevent_cse=False) for f in layers]

        def body(x, group):
            new = []
            for run, inputs in zip(layers, _split(group, size), strict=True):
                x, after = run(x, *inputs)
                new.append(after)
            return x, _join(new)

        inputs = weights, indices, choices, past
        groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), inputs)
        x_BTD, new = lax.scan(body, x_BTD, groups, unroll=max(self.unroll // size, 1))
        return x_BTD, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), new)


def _split(tree: Any, count: int) -> list[Any]:
    """The `count` parts of a tree along the leading dim of its leaves, which they lose.

    Unlike indexing, whose gradient is a sum of padded arrays, lax.split has a concatenation.
    """
    leaves, treedef = jax.tree.flatten(tree)
    parts = [[y[0] for y in lax.split(x, (1,) * count)] for x in leaves]
    return [treedef.unflatten([leaf[i] for leaf in parts]) for i in range(count)]


def _join(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(model: Any) -> Any:
    """Gives each layer of a Decoder arrays of its own, for decoding; returns the model.

    Kernels, biases and the token table are cast to the compute dtype once: in a decoding step a
    cast costs more than its product.
    """

    def converted(state: Any, layer: int | None = None) -> Any:
        def one(path: Any, variable: Any) -> Any:
            value = variable.get_value()
            if layer is not None:
                value = jax.tree.map(lambda x: x[layer], value)
            if path[-1] in ("kernel", "bias", "embedding") and not isinstance(value, Quantized):
                axes = variable.get_metadata("axes")[-value.ndim :]
                value = constrain(value.astype(model.compute_dtype), *axes)
            return variable.replace(value)

        return nnx.from_flat_state([(p, one(p, v)) for p, v in nnx.to_flat_state(state)])

    graph, stacked = nnx.split(model.layers)
    layers = [nnx.merge(graph, converted(stacked, i)) for i in range(model.cfg.num_layers)]
    model.layers = nnx.List(layers)
    for name in ("embed", "head"):
        if (module := getattr(model, name)) is not None:
            graph, state = nnx.split(module)
            setattr(model, name, nnx.merge(graph, converted(state)))
    return model
