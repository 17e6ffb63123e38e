# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention inside segments: one function, and the choice of its kernel.

Dims: B rows, T queries, S keys, H query heads, N key/value heads, K head_dim of queries and keys,
V head_dim of values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxllm.mesh import RULES, data_parallel, platform
from jaxllm.ops import attention_blocks as blocks
from jaxllm.ops import attention_gpu as gpu
from jaxllm.ops.attention_mask import EVERYWHERE
from jaxllm.ops.residuals import saveable

__all__ = ["EVERYWHERE", "attention", "notes"]


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
    softcap: float = 0.0,
    scale: float,
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
      softcap: scores are within (-softcap, softcap); 0 = unbounded.
      kernel: auto | xla | mosaic | triton, as `attention_gpu.choose` describes.

    Raises UserError if `kernel` cannot run here.
    """
    T, S = q_BTHK.shape[1], k_BNSK.shape[2]
    options: dict[str, Any] = dict(scale=scale, window=window, softcap=softcap)
    if k_segments is None:
        dims = (q_BTHK.shape[-1], v_BNSV.shape[-1])
        name, _ = gpu.choose(kernel, dtype=q_BTHK.dtype, softcap=softcap, head_dims=dims)
        if name != "xla":

            def fused(q, k, v, segments):
                k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
                return gpu.run(name, q, k, v, segments, **options)

            return saveable(_per_shard(fused, q_BTHK, k_BNSK, v_BNSV, q_segments), "attention")
        k_segments = q_segments
    # A cache of unknown length, or one with empty slots, is read in one block.
    in_blocks = isinstance(offset, int) and T + offset == S
    size = blocks.block_size(T) if in_blocks else T
    attend = partial(blocks.attend, size=size, offset=offset, **options)
    inputs = (q_BTHK, k_BNSK, v_BNSV, q_segments, k_segments, q_positions)
    return _per_shard(attend, *inputs) if size < T else attend(*inputs)


def _per_shard(attend: Callable[..., Any], q, k, v, *per_token: jax.Array) -> jax.Array:
    """attend(q, k, v, *per_token) on each device's own rows and heads, without communication.

    A kernel cannot be partitioned by XLA, and the list of visible blocks needs no other device's
    rows. q is [B, T, H, K], k and v are [B, N, S, .], per_token are [B, .]. All mesh axes are
    manual: rows are split along data and fsdp, heads along tensor where both H and N divide, and
    everything else is replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {a for a in mesh.axis_names if a not in mesh.manual_axes}
    if mesh.size <= 1 or not axes:
        return attend(q, k, v, *per_token)
    parts, (B, _, H, _), N = mesh.shape["tensor"], q.shape, k.shape[1]
    if H % parts == 0 and N % parts and parts % N == 0:  # several devices share a key/value head
        k, v = (jnp.repeat(x, parts // N, axis=1) for x in (k, v))
        N = parts
    heads = "tensor" if H % parts == 0 and N % parts == 0 else None
    # The gradient of an input is summed over the axes that its spec leaves out. Axes of size 1 are
    # named, so that these sums do not become all-reduces of one device each.
    split = RULES["batch"] if B % data_parallel(mesh) == 0 else ()
    rows = tuple(a for a in axes if a in split or mesh.shape[a] == 1 and a != heads)
    q_spec, kv_spec = P(rows, None, heads), P(rows, heads)
    in_specs = (q_spec, kv_spec, kv_spec, *[P(rows)] * len(per_token))
    # check_vma=False: Pallas kernels do not declare along which axes their results vary.
    run = jax.shard_map(
        attend, in_specs=in_specs, out_specs=q_spec, axis_names=axes, check_vma=False
    )
    return run(q, k, v, *per_token)


def notes(mesh: Mesh, kernel: str, **facts: Any) -> list[str]:
    """What train() prints: the kernel that attention runs on an accelerator, and why.

    facts: keyword arguments of `attention_gpu.choose`. Raises UserError if `kernel` cannot run.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        name, reason = gpu.choose(kernel, **facts)
        if platform() == "cpu":
            return []
    return [f"attention: {name}" + (f" ({reason})" if reason else "")]
