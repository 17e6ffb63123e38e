# SPDX-License-Identifier: Apache-2.0
"""The layers of a model: scans over stacks of equal layers, or a loop once they are unstacked.

Dims: B rows, T tokens, D model width, R layers of a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxllm.errors import UserError
from jaxllm.mesh import constrain, context_splits, manual_rows
from jaxllm.model import indexer
from jaxllm.model.adapter import Adapter
from jaxllm.model.block import Block
from jaxllm.model.cache import Kept, LayerCache, StateCache
from jaxllm.model.config import LayerKind, ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.delta import OBSTACLE
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


CACHES = LayerCache, StateCache
UNBOUNDED = 2**31 - 1  # the window of a layer that sees all keys, where other layers have a window
WHOLE_ROWS = OBSTACLE.format("layers that use the keys of others or embeddings of their own")


def context_obstacle(cfg: ModelConfig) -> str:
    """Why the mesh axis `context` cannot split rows; empty if it can."""
    if cfg.recurrent:
        return OBSTACLE.format(cfg.recurrent)
    if cfg.indexer is not None:
        return indexer.WHOLE_ROWS
    uses = any(kind.uses is not None for kind in cfg.kinds)
    return WHOLE_ROWS if uses or cfg.layer_embeds is not None else ""


def make_stack(cfg: ModelConfig, name: str, *, peft: Adapter, dtype: Any, rngs: nnx.Rngs) -> Block:
    """The stack `name` of cfg.stacks: a Block whose weights have a leading dim R."""
    layers = cfg.stacks[name]
    kind = cfg.kinds_by_layer[layers[0]]

    @nnx.split_rngs(splits=len(layers))
    @partial(nnx.vmap, in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> Block:
        return Block(cfg, name, kind, peft=peft, dtype=dtype, rngs=rngs)

    return make(rngs)


@dataclass(frozen=True)
class Scan:
    """Layers that one scan goes through, which are called alike in training and in decoding.

    The scan's body is one layer of each stack: one layer, or a period of unlike ones. Where kinds
    differ within a stack, the RoPE table and the window are selected by the layer's index, so there
    is one attention and no branch. (A body of one period of kinds would take +50 % of memory on
    XLA:CPU, which then copies the stacked weights. A period of unlike layers compiles in half the
    time of twelve stacks of one layer, in a fourth of their memory with remat.)

    blocks: of each stack, a Block whose weights have a leading dim R, or one Block per layer
    (`unstack`). layers: of each stack. kinds: of each layer of each stack. dtype: of products.
    remat: a key of REMAT, or none. unroll: iterations of the scan that are one of the loop.
    """

    blocks: tuple[Any, ...]
    layers: tuple[range, ...]
    kinds: tuple[tuple[LayerKind, ...], ...]
    dtype: Any
    remat: str = "none"
    unroll: int = 1

    def __call__(
        self, x_BTD: jax.Array, ctx: Context, pasts: Any
    ) -> tuple[jax.Array, Any, Any, Context]:
        """(x after the last layer, the new past of each stack, the Routing of each, the context of
        the next scan).

        pasts: of each stack, a LayerCache, StateCache or VirtualTokens, stacked or as a tuple with
        one per layer; or None. A Routing is None without experts, and where layers are unstacked.
        """
        if isinstance(self.blocks[0], nnx.List):
            run = self.loop
        elif _caches(pasts) or not context_splits(x_BTD.shape[1]):
            run = self.scan
        else:
            run = self.over_context
        x_BTD, new, routings = run(x_BTD, ctx, pasts)
        pasts, kept = list(new), dict(ctx.kept)
        for place, (first, *_) in enumerate(self.kinds):
            if first.keeps is not None:
                pasts[place], kept[first.keeps] = Kept.split(new[place])
        return x_BTD, tuple(pasts), routings, replace(ctx, kept=kept)

    def loop(self, x_BTD: jax.Array, ctx: Context, pasts: Any) -> tuple[jax.Array, Any, Any]:
        def unstacked(past: Any) -> Any:
            if isinstance(past, tuple):
                return past
            layers = range(len(self.kinds[0]))
            return [jax.tree.map(lambda x, i=i: x[i], past) for i in layers]

        pasts, new = [unstacked(past) for past in pasts], [[] for _ in pasts]
        for index, place in product(range(len(self.kinds[0])), range(len(pasts))):
            kind = self.kinds[place][index]
            embeds = None if ctx.embeds is None else ctx.embeds[self.layers[place][index]]
            here = ctx.at_layer(index, kind.rope, kind.window, embeds)
            graph, weights = nnx.split(self.blocks[place][index])
            block = nnx.merge(graph, gathered_layer(weights, self.dtype))
            x_BTD, past, _ = block(x_BTD, here, pasts[place][index])
            new[place].append(past)
        return x_BTD, tuple(map(tuple, new)), (None,) * len(pasts)

    def over_context(self, x_BTD: jax.Array, ctx: Context, past: Any) -> tuple[jax.Array, Any, Any]:
        """`scan` in a shard_map over the axis `context`: a device has a part of each row.

        So the gradient of a weight is scattered along fsdp before it is summed along context, where
        XLA's partitioner would first all-reduce the whole of it.
        """
        if ctx.embeds is not None or any(kinds[0].keeps is not None for kinds in self.kinds):
            raise UserError(f"mesh.context is not possible: {WHOLE_ROWS}")
        graph, weights = nnx.split(self.blocks)
        prefix = None if ctx.key_segment_ids is None else ctx.key_segment_ids[:, : ctx.offset]
        tokens = (x_BTD, ctx.segment_ids, ctx.positions, ctx.next_BTD)
        shared = (weights, past, prefix, ctx.rng, ctx.adapter_weights)

        def run(tokens: Any, tables: Any, shared: Any) -> tuple[jax.Array, Any]:
            x_BTD, segments, positions, next_BTD = tokens
            weights, past, prefix, rng, adapter_weights = shared
            here = replace(
                ctx,
                segment_ids=segments,
                positions=positions,
                next_BTD=next_BTD,
                key_segment_ids=prefix if prefix is None else jnp.hstack([prefix, segments]),
                rope_tables=tables,
                rng=rng,
                adapter_weights=adapter_weights,
            )
            x_BTD, _, routings = replace(self, blocks=nnx.merge(graph, weights)).scan(
                x_BTD, here, past
            )
            total = partial(lax.psum, axis_name="context")
            return x_BTD, tuple(r and replace(r, load=total(r.load)) for r in routings)

        length = P(None, "context")
        start = [nothing_routed(block.mlp, x_BTD) for block in self.blocks]
        routings = tuple(r and replace(jax.tree.map(lambda _: length, r), load=P()) for r in start)
        mapped = jax.shard_map(
            run,
            in_specs=(length, P(None, *length), P()),
            out_specs=(length, routings),
            axis_names={"context"},
            check_vma=False,
        )
        x_BTD, routings = mapped(tokens, ctx.rope_tables, shared)
        return x_BTD, (None,) * len(past), routings

    def scan(self, x_BTD: jax.Array, ctx: Context, pasts: Any) -> tuple[jax.Array, Any, Any]:
        graphs, weights = zip(*map(nnx.split, self.blocks), strict=True)
        weights = tuple(narrowed(one, self.dtype) for one in weights)
        decoding = _caches(pasts) and not manual_rows()
        pairs = zip(graphs, weights, self.kinds, strict=True)
        period = [self.layer(*pair, ctx, decoding) for pair in pairs]

        def body(carry, inputs):
            (x_BTD, totals), (index, *by_stack) = carry, inputs
            sums, new, loads = [], [], []
            for layer, total, *own in zip(period, totals, *by_stack, strict=True):
                x_BTD, after, routing = layer(x_BTD, index, *own)
                new.append(after)
                # Outside of jax.checkpoint, which would store the sums.
                routed = routing and replace(routing, load=None)
                sums.append(routed and jax.tree.map(jnp.add, total, routed))
                loads.append(routing and routing.load)
            return (x_BTD, tuple(sums)), (tuple(new), tuple(loads))

        embeds = tuple(
            None if ctx.embeds is None else ctx.embeds[at.start : at.stop : at.step]
            for at in self.layers
        )
        inputs = jnp.arange(len(self.kinds[0])), weights, pasts, embeds
        start = x_BTD, tuple(nothing_routed(block.mlp, x_BTD) for block in self.blocks)
        (x_BTD, totals), (new, loads) = lax.scan(body, start, inputs, unroll=self.unroll)
        pairs = zip(totals, loads, strict=True)
        return x_BTD, new, tuple(total and replace(total, load=load) for total, load in pairs)

    def layer(
        self, graph: Any, weights: Any, kinds: tuple[LayerKind, ...], ctx: Context, decoding: bool
    ) -> Callable[..., tuple[jax.Array, Any, Any]]:
        """(x_BTD, a layer's index, its weights, its past, its embeddings) -> (x_BTD, its new past,
        its Routing), for the layers of a stack with `weights`. decoding: there is no backward
        pass."""
        skip = "mlp" if ctx.mlp_blocks > 1 else ""  # gathered by the MLP
        ropes, windows = [kind.rope for kind in kinds], [kind.window for kind in kinds]
        if any(windows):
            windows = [UNBOUNDED if window is None else window for window in windows]

        def layer(x_BTD, index, weights, past, embeds):
            x_BTD = saveable(x_BTD, "layer")
            here = ctx.at_layer(index, _select(ropes, index), _select(windows, index), embeds)
            block = nnx.merge(graph, gathered_layer(weights, self.dtype, skip))
            return block(x_BTD, here, past)

        policy = _activations(weights) if manual_rows() else None
        if self.remat != "none":
            policy = REMAT[self.remat]
        if policy is None or decoding:
            return layer
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _caches(pasts: Any) -> bool:
    """True if a stack of a scan has a cache: the model decodes."""
    return any(isinstance(past, CACHES) for past in pasts)


def _select(values: list[Any], index: jax.Array) -> Any:
    """values[index]; a static value where all are equal."""
    return values[0] if len(set(values)) == 1 else jnp.asarray(values, jnp.int32)[index]


def unstack(model: Any, *, release: bool = False) -> Any:
    """Splits the stacked arrays of a Decoder by layer, for decoding; returns the model.

    Kernels, biases and the token table are rounded to the compute dtype once, and stored in the
    dtype in which they are multiplied: in a decoding step a cast costs more than its product.
    release: outside of a jitted function, delete each array once it is split, so that the model
    never needs twice its memory.
    """

    def converted(path: Any, variable: Any, layers: int | None = None) -> list[Any]:
        """The variable of each layer; of a module that is not stacked, of the module alone."""
        value, name = variable.get_value(), path[-1]
        axes = variable.get_metadata("axes") if name in ROUNDED else ()
        parts = _converted(value, layers, name, tuple(axes), model.compute_dtype)
        if release:
            kept = {id(x) for x in jax.tree.leaves(jax.block_until_ready(parts))}
            for x in jax.tree.leaves(value):
                if id(x) not in kept:
                    x.delete()
        return [variable.replace(part) for part in parts]

    for name, layers in model.cfg.stacks.items():
        graph, stacked = nnx.split(getattr(model, name))
        split = [(path, converted(path, v, len(layers))) for path, v in nnx.to_flat_state(stacked)]
        states = [nnx.from_flat_state([(p, vs[i]) for p, vs in split]) for i in range(len(layers))]
        setattr(model, name, nnx.List([nnx.merge(graph, state) for state in states]))
    for name in ("embed", "layer_embeds", "head"):
        if (module := getattr(model, name)) is not None:
            graph, state = nnx.split(module)
            flat = [(path, converted(path, v)[0]) for path, v in nnx.to_flat_state(state)]
            setattr(model, name, nnx.merge(graph, nnx.from_flat_state(flat)))
    return model


ROUNDED = ("kernel", "bias", "embedding")


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _converted(value: Any, layers: int | None, name: str, axes: tuple[Any, ...], dtype: Any) -> Any:
    """What `unstack` makes of a value, one for each layer."""

    def one(value: Any) -> Any:
        if name not in ROUNDED or isinstance(value, Quantized):
            return value
        value = constrain(operand(value.astype(dtype)), *axes[-value.ndim :])
        return kernel_for_decoding(value) if name == "kernel" else value

    if layers is None:
        return [one(value)]
    return [one(jax.tree.map(itemgetter(i), value)) for i in range(layers)]
