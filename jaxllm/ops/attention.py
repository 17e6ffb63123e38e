# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention inside segments: one function, its kernels, and their shards.

Dims: B rows, T queries, S keys, H query heads, N key/value heads, K head_dim of queries and keys,
V head_dim of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxllm.errors import UserError
from jaxllm.mesh import RULES, context_shards, context_splits, platform
from jaxllm.ops import attention_blocks as blocks
from jaxllm.ops import attention_context as context
from jaxllm.ops import attention_gpu as gpu
from jaxllm.ops import attention_tpu as tpu
from jaxllm.ops.attention_mask import EVERYWHERE

__all__ = ["EVERYWHERE", "attention", "notes"]


class Kernel(NamedTuple):
    """A fused kernel, for rows that attend to themselves."""

    name: str  # value of model.attention
    platform: str
    obstacle: Callable[..., str]  # facts of `choose` -> why it cannot run; empty if it can
    unproven: Callable[[], str]  # why "auto" does not select it; empty if it is the fastest
    run: Callable[..., jax.Array]  # arguments: those of `blocks.attend` without `size`


def _splash(q, k, v, q_segments, k_segments, _, **options) -> jax.Array:
    return tpu.run(q, k, v, q_segments, k_segments, **options)


def _tokamax(name: str) -> Callable[..., jax.Array]:
    def run(q, k, v, segments, _, __, *, offset, sinks, **options) -> jax.Array:
        assert sinks is None
        return gpu.run(name, q, k, v, segments, **options)

    return run


# In the order of preference. jax.nn's cudnn attention is not one of them: it takes segments only as
# a mask [B, 1, T, T], which it reads from memory.
KERNELS = (
    Kernel("splash", "tpu", tpu.obstacle, lambda: "", _splash),
    Kernel("mosaic", "gpu", gpu.obstacle, gpu.mosaic_unproven, _tokamax("mosaic")),
    Kernel(
        "triton",
        "gpu",
        partial(gpu.obstacle, soft_caps=False),
        lambda: "it is slower than mosaic",
        _tokamax("triton"),
    ),
)
DEVICES = {"tpu": "a TPU", "gpu": "an NVIDIA GPU"}


def choose(kernel: str, **facts: Any) -> tuple[str, str]:
    """(kernel to run, why it is not a faster one) for a value of model.attention.

    facts, where known: dtype of q; softcap; head_dims of (q, v); prefix, True if keys precede each
    text; length of a row; mixed_windows, True if layers of one scan have different windows; sinks,
    True if each head has one; selected, True if an indexer chooses the keys of each query.

    "auto" is the first of KERNELS that is the fastest measured on the platform and can run, else
    xla: `attention_blocks`. Raises UserError for a requested kernel that cannot run.
    """
    if kernel == "xla":
        return "xla", ""
    here, reasons = platform(), []
    for row in KERNELS:
        if row.name != kernel and (kernel, row.platform) != ("auto", here):
            continue
        if row.platform == here:
            mesh = jax.sharding.get_abstract_mesh()
            reason = row.obstacle(context=dict(mesh.shape).get("context", 1), **facts)
            reason = reason or (row.unproven() if kernel == "auto" else "")
        else:
            needed = DEVICES[row.platform]
            reason = f"it needs {needed}, and this program is for a {here.upper()}"
        if not reason:
            return row.name, ""
        reasons.append(reason)
    if kernel == "auto":
        return "xla", next(iter(reasons), "")
    raise UserError(f"model.attention: {kernel} cannot run: {reasons[0]}; set it to auto or xla")


def shares_prefixes(kernel: str) -> bool:
    """True if rows may begin with keys of EVERYWHERE: no fused kernel has their mask."""
    return kernel == "xla" or (kernel == "auto" and platform() == "cpu")


def attention(
    q_BTHK: jax.Array,
    k_BNSK: jax.Array,
    v_BNSV: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array | None,
    q_positions: jax.Array,
    *,
    offset: jax.Array | int = 0,
    window: jax.Array | int | None = None,
    chunked: bool = False,
    softcap: float = 0.0,
    scale: float,
    sinks: jax.Array | None = None,
    selected: jax.Array | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """softmax(softcap(scale q·k)) v under the mask of `attention_mask.visible`, [B, T, H, V].

    The result has q's dtype; scores and softmax are float32. Where keys are wider than q, as in a
    float32 cache, the products have the keys' dtype.

    Args:
      q_segments: int32 [B, T]. k_segments: int32 [B, S], or None if the keys are the row's own,
        neither a cache nor a prefix; only then can a fused kernel run.
      q_positions: int32 [B, T], positions within the texts.
      offset: index of the first query among the keys.
      window: number of keys that a query sees at most, an int or int32 scalar; None = all.
      chunked: the keys that a query sees begin with its chunk, of `window` tokens of its text.
      softcap: scores are within (-softcap, softcap); 0 = unbounded.
      sinks: [H], for each head a score of no key, which adds to the sum of its softmax alone.
      selected: bool [B, T, S], which of the visible keys each query attends to; None = all.
      kernel: auto | xla | splash | mosaic | triton, as `choose` describes.

    Raises UserError if `kernel` cannot run here.
    """
    T, S = q_BTHK.shape[1], k_BNSK.shape[2]
    options: dict[str, Any] = dict(scale=scale, softcap=softcap)
    options["chunked"] = chunked = chunked and window is not None
    given: dict[str, Any] = dict(window=window, sinks=sinks)  # may be arrays
    given |= {} if selected is None else {"selected": selected}
    own = k_segments is None
    inputs = (q_BTHK, k_BNSK, v_BNSV, q_segments, q_segments if own else k_segments, q_positions)
    if own:
        length = T * context_shards()
        facts: dict[str, Any] = dict(dtype=q_BTHK.dtype, softcap=softcap, length=length)
        facts |= dict(head_dims=(q_BTHK.shape[-1], v_BNSV.shape[-1]), sinks=sinks is not None)
        facts["selected"] = selected is not None
        mixed = isinstance(window, jax.Array) and not chunked
        name, _ = choose(kernel, mixed_windows=mixed, **facts)
        for row in KERNELS:
            if row.name == name:
                return _per_shard(partial(row.run, **options), *inputs, offset=0, **given)
    if not (isinstance(offset, int) and T + offset == S):
        # A cache of unknown length, or one with empty slots, is read in one block.
        return blocks.attend(*inputs, size=T, offset=offset, **given, **options)

    def in_blocks(q, *others, offset, **given) -> jax.Array:
        parts = 1 if isinstance(offset, int) else offset.size
        size = blocks.block_size(q.shape[1] // parts)
        return blocks.attend(q, *others, size=size, offset=offset, **given, **options)

    if blocks.block_size(T) == T and context_shards() == 1 and not context_splits(T):
        return in_blocks(*inputs, offset=offset, **given)
    return _per_shard(in_blocks, *inputs, offset=offset, **given)


def _shards(axis: str) -> int:
    """Devices along a mesh axis, 1 if it is manual: arrays are then a device's parts."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if axis in mesh.manual_axes else dict(mesh.shape).get(axis, 1)


def _per_shard(
    attend: Callable[..., Any],
    q,
    k,
    v,
    q_segments,
    k_segments,
    q_positions,
    *,
    offset: int,
    **given: Any,
) -> jax.Array:
    """`attend`, with these arguments, on each device's own rows and heads.

    A kernel cannot be partitioned by XLA, and the list of visible blocks needs no other device's
    rows. q is [B, T, H, K], k and v are [B, N, S, .], the others [B, .]; given: window, sinks and
    selected. Inside, all mesh axes are manual, also those that are not yet in a shard_map around
    it: rows are split along data and fsdp, heads along tensor where both H and N divide, queries
    and keys along context where T divides, and everything else is replicated. Only context
    communicates (`attention_context`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if context_splits(q.shape[1]):
        split = context.split(partial(_per_shard, attend))
        return split(q, k, v, q_segments, k_segments, q_positions, offset=offset, **given)
    if context_shards() > 1:
        attend = context.attend_split(attend)
    free = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    if mesh.size <= 1 or not free:
        tokens = q_segments, k_segments, q_positions
        return attend(q, k, v, *tokens, offset=offset, **given)
    parts, (B, _, H, _), N = _shards("tensor"), q.shape, k.shape[1]
    if H % parts == 0 and N % parts and parts % N == 0:  # several devices share a key/value head
        k, v = (jnp.repeat(x, parts // N, axis=1) for x in (k, v))
        N = parts
    heads = "tensor" if "tensor" in free and H % parts == 0 and N % parts == 0 else None
    # The gradient of an input is summed over the axes that its spec leaves out. Axes of size 1 are
    # named, so that these sums do not become all-reduces of one device each.
    split = RULES["batch"] if B % math.prod(map(_shards, RULES["batch"])) == 0 else ()
    rows = tuple(a for a in free if a in split or mesh.shape[a] == 1 and a != heads)
    q_spec, kv_spec, token_spec = P(rows, None, heads), P(rows, heads), P(rows)
    inputs = (q, k, v, q_segments, k_segments, q_positions)
    arrays = context.arrays_of(given)
    array_specs = {n: {"sinks": P(heads), "selected": token_spec}.get(n, P()) for n in arrays}
    specs = (q_spec, kv_spec, kv_spec, *[token_spec] * 3, array_specs)

    def run(*inputs) -> Any:
        *inputs, arrays = inputs
        return attend(*inputs, offset=offset, **given | arrays)

    # check_vma=False: Pallas kernels do not declare along which axes their results vary.
    axes = frozenset(free)
    mapped = jax.shard_map(run, in_specs=specs, out_specs=q_spec, axis_names=axes, check_vma=False)
    return mapped(*inputs, arrays)


def notes(mesh: Mesh, kernel: str, **facts: Any) -> list[str]:
    """What train() prints: the kernel that attention runs on an accelerator, and why.

    facts: keyword arguments of `choose`. Raises UserError if `kernel` cannot run.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        name, reason = choose(kernel, **facts)
        if platform() == "cpu":
            return []
    return [f"attention: {name}" + (f" ({reason})" if reason else "")]
