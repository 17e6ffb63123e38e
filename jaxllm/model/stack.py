# SPDX-License-Identifier: Apache-2.0
"""A stack of layers with equal weights' shapes: a scan, or a loop once they are unstacked.

Dims: B rows, T tokens, D model width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxllm.mesh import constrain, context_splits, manual_rows
from jaxllm.model.adapter import Adapter
from jaxllm.model.block import Block
from jaxllm.model.cache import LayerCache
from jaxllm.model.config import LayerKind, ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.moe import nothing_routed
from jaxllm.model.parts import gathered_layer, is_variable, narrowed, shapes_here, shapes_of
from jaxllm.ops.decoding import kernel_for_decoding
from jaxllm.ops.matmul import operand
from jaxllm.ops.quantized import Quantized
from jaxllm.ops.residuals import saveable

# Residuals that the backward pass reads; it recomputes the rest of each layer. "offload" keeps them
# in the host's memory.
REMAT: dict[str, Any] = {
    "full": jax.checkpoint_policies.save_only_these_names("layer"),
    "dots": jax.checkpoint_policies.save_only_these_names("layer", "attention", "dot"),
    "names": jax.checkpoint_policies.save_only_these_names("layer", "attention"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _activations(weights: Any) -> Any:
    """The policy without remat where weights are gathered: saves what is computed from activations
    [B, T, ...] and what is named, so that gathered weights are not saved."""
    variables = jax.tree.leaves(weights, is_leaf=is_variable)
    experts = [v for v in variables if len(v.get_metadata("axes")) > 2]
    shapes = {shape for v in experts for shape in (*shapes_of(v), *shapes_here(v))}

    def saves(primitive: Any, *inputs: Any, **options: Any) -> bool:
        activations = any(x.ndim > 2 and x.shape not in shapes for x in inputs)
        return activations or primitive.name == "name"

    return saves


UNBOUNDED = 2**31 - 1  # the window of a layer that sees all keys, where other layers have a window


def make_stack(cfg: ModelConfig, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs) -> Block:
    """A Block whose weights have a leading dim L."""

    @nnx.split_rngs(splits=cfg.num_layers)
    @partial(nnx.vmap, in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Block:
        return Block(cfg, peft=peft, dtype=dtype, rngs=rngs)

    return make(rngs)


@dataclass(frozen=True)
class Stack:
    """The layers of a stack, which are called alike in training and in decoding.

    A scan's body is one layer. Where kinds differ, the RoPE table and the window are selected by
    the layer's index, so there is one attention and no branch. (A body of one period of kinds would
    take +50 % of memory on XLA:CPU, which then copies the stacked weights.)

    blocks: a Block whose weights have a leading dim L, or one Block per layer (`unstack`).
    kinds: of each layer. dtype: of products. remat: a key of REMAT, or none. unroll: layers in an
    iteration of the scan.
    """

    blocks: Any
    kinds: tuple[LayerKind, ...]
    dtype: Any
    remat: str = "none"
    unroll: int = 1

    def __call__(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any, Any]:
        """(x after the last layer, the layers' new past, their Routing).

        past: a LayerCache or VirtualTokens, stacked or as a tuple with one per layer; or None.
        The Routing is None without experts, and where layers are unstacked.
        """
        if isinstance(self.blocks, nnx.List):
            return self.loop(x_BTD, ctx, past)
        if isinstance(past, LayerCache) or not context_splits(x_BTD.shape[1]):
            return self.scan(x_BTD, ctx, past)
        x_BTD, routing = self.over_context(x_BTD, ctx, past)
        return x_BTD, None, routing

    @property
    def ropes(self) -> list[int]:
        """The RoPE table of each layer; of a layer without RoPE the last one, -1."""
        return [-1 if kind.rope is None else kind.rope for kind in self.kinds]

    def loop(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any, Any]:
        new, pasts = [], past
        if not isinstance(past, tuple):
            count = len(self.kinds)
            pasts = [jax.tree.map(lambda x, i=i: x[i], past) for i in range(count)]
        ropes, windows = self.ropes, [kind.window for kind in self.kinds]
        for layer, block in enumerate(self.blocks):
            here = ctx.at_layer(layer, ropes[layer], windows[layer])
            graph, weights = nnx.split(block)
            block = nnx.merge(graph, gathered_layer(weights, self.dtype))
            x_BTD, after, _ = block(x_BTD, here, pasts[layer])
            new.append(after)
        return x_BTD, tuple(new), None

    def over_context(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any]:
        """`scan` in a shard_map over the axis `context`: a device has a part of each row.

        So the gradient of a weight is scattered along fsdp before it is summed along context, where
        XLA's partitioner would first all-reduce the whole of it.
        """
        graph, weights = nnx.split(self.blocks)
        prefix = None if ctx.key_segment_ids is None else ctx.key_segment_ids[:, : ctx.offset]
        tokens = (x_BTD, ctx.segment_ids, ctx.positions)
        shared = (weights, past, prefix, ctx.rng, ctx.adapter_weights)

        def run(tokens: Any, tables: Any, shared: Any) -> tuple[jax.Array, Any]:
            x_BTD, segments, positions = tokens
            weights, past, prefix, rng, adapter_weights = shared
            here = replace(
                ctx,
                segment_ids=segments,
                positions=positions,
                key_segment_ids=prefix if prefix is None else jnp.hstack([prefix, segments]),
                rope_tables=tables,
                rng=rng,
                adapter_weights=adapter_weights,
            )
            stack = replace(self, blocks=nnx.merge(graph, weights))
            x_BTD, _, routing = stack.scan(x_BTD, here, past)
            if routing is not None:
                routing = replace(routing, load=lax.psum(routing.load, "context"))
            return x_BTD, routing

        length = P(None, "context")
        routing = nothing_routed(self.blocks.mlp, x_BTD)
        if routing is not None:
            routing = replace(jax.tree.map(lambda _: length, routing), load=P())
        mapped = jax.shard_map(
            run,
            in_specs=(length, P(None, *length), P()),
            out_specs=(length, routing),
            axis_names={"context"},
            check_vma=False,
        )
        return mapped(tokens, ctx.rope_tables, shared)

    def scan(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any, Any]:
        graph, weights = nnx.split(self.blocks)
        weights = narrowed(weights, self.dtype)
        skip = "mlp" if ctx.mlp_blocks > 1 else ""  # gathered by the MLP
        windows = [kind.window for kind in self.kinds]
        if any(windows):
            windows = [UNBOUNDED if window is None else window for window in windows]

        def layer(x_BTD, inputs):
            weights, index, past = inputs
            x_BTD = saveable(x_BTD, "layer")
            here = ctx.at_layer(index, _select(self.ropes, index), _select(windows, index))
            block = nnx.merge(graph, gathered_layer(weights, self.dtype, skip))
            return block(x_BTD, here, past)

        policy = _activations(weights) if manual_rows() else None
        if self.remat != "none":
            policy = REMAT[self.remat]
        decoding = isinstance(past, LayerCache) and not manual_rows()
        if policy is not None and not decoding:
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)

        def add(carry, inputs):  # outside of jax.checkpoint, which would store the sums
            x_BTD, total = carry
            x_BTD, past, routing = layer(x_BTD, inputs)
            if routing is None:
                return (x_BTD, None), (past, None)
            total = jax.tree.map(jnp.add, total, replace(routing, load=None))
            return (x_BTD, total), (past, routing.load)

        inputs = weights, jnp.arange(len(self.kinds)), past
        start = x_BTD, nothing_routed(self.blocks.mlp, x_BTD)
        (x_BTD, routing), (past, load) = lax.scan(add, start, inputs, unroll=self.unroll)
        return x_BTD, past, routing and replace(routing, load=load)


def _select(values: list[Any], index: jax.Array) -> Any:
    """values[index]; a static value where all are equal."""
    return values[0] if len(set(values)) == 1 else jnp.asarray(values, jnp.int32)[index]


def unstack(model: Any) -> Any:
    """Splits the stacked arrays of a Decoder by layer, for decoding; returns the model.

    Kernels, biases and the token table are rounded to the compute dtype once, and stored in the
    dtype in which they are multiplied: in a decoding step a cast costs more than its product.
    """

    def converted(state: Any, layer: int | None = None) -> Any:
        def one(path: Any, variable: Any) -> Any:
            value = variable.get_value()
            if layer is not None:
                value = jax.tree.map(lambda x: x[layer], value)
            if path[-1] in ("kernel", "bias", "embedding") and not isinstance(value, Quantized):
                axes = variable.get_metadata("axes")[-value.ndim :]
                value = constrain(operand(value.astype(model.compute_dtype)), *axes)
                value = kernel_for_decoding(value) if path[-1] == "kernel" else value
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
