# SPDX-License-Identifier: Apache-2.0
"""Splash attention, JAX's Pallas kernel for TPUs; scores are never written to memory.

The kernel reads a table of visible pairs of blocks. JAX's own functions make it from a static mask;
here it is computed in the program, so that it also excludes pairs of blocks of other texts, and
that windows and the indices of the queries may be traced: layers of different kinds in one scan,
and rows that are split along the mesh axis `context`.

Dims: B rows, T queries, S keys, H query heads, N key/value heads, K head_dim of queries and keys,
V head_dim of values; n and m numbers of blocks of queries and keys.
"""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.ops.attention_mask import SELECTED, in_chunks, visible_blocks

SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"  # imported when a kernel is traced
LANES = 128  # blocks are multiples of it
# Kind of chip -> most tokens in a block of queries and of keys. Larger blocks read keys less often,
# smaller ones skip more pairs. Not measured here: the sizes that MaxText runs with.
BLOCKS = {"TPU v6 lite": (2048, 512)}
DEFAULT_BLOCKS = (512, 512)
# A traced window is packed into the index of each query, in 16 bits of an int32 each.
PACKED_TOKENS = 2**16


def obstacle(
    *,
    dtype: Any,
    prefix: bool = False,
    length: int = 0,
    mixed_windows: bool = False,
    selected: bool = False,
    **_: Any,
) -> str:
    """Why the kernel cannot run; empty if it can.

    dtype is that of q. prefix: keys precede each text. length: tokens in a row. mixed_windows:
    layers of one scan have different windows. selected: an indexer chooses the keys.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it needs model.compute_dtype bfloat16 or float32, not {jnp.dtype(dtype)}"
    if prefix:
        return "keys of a prefix precede each text"
    if selected:
        return SELECTED
    if mixed_windows and length > PACKED_TOKENS:
        return f"layers have different windows and rows are longer than {PACKED_TOKENS} tokens"
    return ""


def block_sizes(queries: int, keys: int) -> tuple[int, int]:
    """Tokens in a block of queries and in a block of keys, for rows of so many."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    most = BLOCKS.get(device.device_kind, DEFAULT_BLOCKS)

    def divisor(length: int, limit: int) -> int:
        sizes = range(LANES, min(length, limit) + 1, LANES)
        return max(size for size in sizes if length % size == 0)

    return divisor(queries, most[0]), divisor(keys, most[1])


@cache
def _mask(window: int | None) -> Any:
    """The kernel's mask function: (indices of queries, indices of keys) -> bool, of equal shapes.

    One function object for each window: it is part of the key of a jit cache.
    """

    def visible(q, k):
        return (k <= q) if window is None else (k <= q) & (q - k < window)

    return visible


def _packed_mask(q, k):
    """The mask function where `_packed` has put the window into q."""
    index, reach = (q >> 16) & 0xFFFF, q & 0xFFFF
    return (k <= index) & (index - k <= reach)


def _packed(indices: jax.Array, window: jax.Array) -> jax.Array:
    return (indices << 16) | (jnp.clip(window, 1, PACKED_TOKENS) - 1)


def _mask_info(seen: jax.Array, q_sequence: jax.Array, by_keys: bool) -> Any:
    """What the kernel reads of a mask: seen [n, m], True for the pairs of blocks that it visits.

    It visits the blocks of queries one by one and the blocks of keys of each; with `by_keys` the
    other way round. At a pair that it skips, `data_next` is the block of the next pair that it
    visits, which is then loaded early; 0 after the last one.
    """
    module: Any = import_module(f"{SPLASH}.splash_attention_mask_info")
    order = seen.T if by_keys else seen
    places = jnp.arange(order.size, dtype=jnp.int32)
    after = lax.cummin(jnp.where(order.ravel(), places, order.size), reverse=True)
    after = (after % order.shape[1]).reshape(order.shape)
    small = jnp.int8 if order.shape[1] <= 128 else jnp.int16  # scalar memory is small
    return module.MaskInfo(
        data_next=(after.T if by_keys else after).astype(small)[None],
        mask_next=None,
        block_mask=seen.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=q_sequence,
    )


def _each_row(kernel: Any, segments: Any, q, k, v, sinks: Any) -> jax.Array:
    """kernel(q, k, v) of each row; sinks [H] or None."""
    return jax.vmap(kernel, (0, 0, 0, 0, None))(q, k, v, segments, sinks)


_attend = jax.custom_vjp(_each_row)


def _attend_forward(kernel: Any, segments: Any, *inputs: jax.Array) -> Any:
    # The kernel repeats each log-sum-exp 128 times. The barrier keeps one of each from here on;
    # XLA would keep all until the backward pass.
    out = jax.vjp(partial(_each_row, kernel, segments), *inputs)
    return lax.optimization_barrier(out)


def _attend_backward(pull: Any, g: jax.Array) -> Any:
    *inputs, sinks = pull(g)
    return None, None, *inputs, None if sinks is None else sinks.astype(jnp.float32)


_attend.defvjp(_attend_forward, _attend_backward)


def run(
    q_BTHK: jax.Array,
    k_BNSK: jax.Array,
    v_BNSV: jax.Array,
    q_segments: jax.Array,
    k_segments: jax.Array,
    offset: Any,
    *,
    scale: float,
    window: Any,
    softcap: float,
    chunked: bool = False,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of tokens to the keys of their own segments, [B, T, H, V].

    A query's own key must be among the keys. Segments are int32 [B, T] and [B, S]. offset: as in
    `attention_blocks.attend`. The output and the log-sum-exp have the checkpoint name "attention".
    """
    splash: Any = import_module(f"{SPLASH}.splash_attention_kernel")
    B, T, H, _ = q_BTHK.shape
    N, S = k_BNSK.shape[1:3]
    # The kernel does not scale. In bfloat16 the scale itself would be off by up to 0.2 %.
    q = (scale * q_BTHK.astype(jnp.float32)).astype(q_BTHK.dtype).swapaxes(1, 2)
    parts = jnp.reshape(jnp.asarray(offset, jnp.int32), (-1, 1))
    indices = (parts + jnp.arange(T // len(parts), dtype=jnp.int32)).ravel()

    if chunked:
        k_segments, window = in_chunks(k_segments, window), None
        q_segments = jnp.take(k_segments, indices, 1)

    # Added queries have the segment and the index of the last one, so they make no further block
    # visible. Added keys come after all queries, which therefore do not see them.
    more = ((0, 0), (0, -T % LANES))
    q = jnp.pad(q, ((0, 0), *more, (0, 0)))
    indices, q_segments = jnp.pad(indices, more[1], "edge"), jnp.pad(q_segments, more, "edge")
    more = ((0, 0), (0, -S % LANES))
    k, v = (jnp.pad(x, ((0, 0), *more, (0, 0))) for x in (k_BNSK, v_BNSV))
    k_segments = jnp.pad(k_segments, more)

    q_size, k_size = block_sizes(q.shape[2], k.shape[2])
    first_keys = jnp.arange(0, k.shape[2], k_size)
    q_blocks = indices.reshape(-1, q_size)
    seen = visible_blocks(
        q_segments.reshape(B, -1, q_size).swapaxes(0, 1),
        k_segments.reshape(B, -1, k_size).swapaxes(0, 1),
        (q_blocks.min(1), q_blocks.max(1)),
        (first_keys, first_keys + k_size - 1),
        window,
    )
    traced = isinstance(window, jax.Array)
    q_sequence = _packed(indices, window) if traced else indices
    forward, by_keys = (_mask_info(seen, q_sequence, flag) for flag in (False, True))
    sizes = splash.BlockSizes(
        block_q=q_size,
        block_kv=k_size,
        block_q_dkv=q_size,
        block_kv_dkv=k_size,
        block_q_dq=q_size,
        block_kv_dq=k_size,
    )
    kernel = splash.SplashAttentionKernel(
        forward,
        forward,
        by_keys,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention",
        mask_function=_packed_mask if traced else _mask(window),
        interpret=interpret,
    )
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    out = _attend(kernel, splash.SegmentIds(q_segments, k_segments), q, k, v, sinks)
    return out[:, :, :T].swapaxes(1, 2)
