# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a large vocabulary that never stores all logits.

Dims: B rows, T tokens, D model width, V vocabulary, C tokens of a row per chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from jaxllm.collectives import gathered, scattered
from jaxllm.mesh import automatic_axes, constrain, data_parallel, manual_rows, platform, spec
from jaxllm.ops.matmul import product, softcapped, weight_gradient

HEAD_AXES = ("embed", "vocab")  # logical axes of an output kernel [D, V]
MASKED = -1e30  # a logit whose exp is 0
CPU_CHUNK, ACCELERATOR_CHUNK = 512, 4096
BLOCKS = 8  # of the vocabulary, on accelerators where fsdp splits the head


def default_chunk() -> int:
    """Tokens per device whose logits exist at one time: the fastest sizes measured.

    Small chunks fit a CPU's cache; an accelerator needs large products.
    """
    return CPU_CHUNK if platform() == "cpu" else ACCELERATOR_CHUNK


def blocks_of(blocks: int, split: bool) -> int:
    """Blocks of the vocabulary: `blocks`, or the default for 0. split: fsdp splits the head."""
    return blocks or (BLOCKS if split and platform() != "cpu" else 1)


def _parts(rows: int) -> int:
    """Number of devices that the rows are split among."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else data_parallel(mesh)
    return parts if rows % parts == 0 else 1


def gathered_head(h: jax.Array, w: jax.Array) -> jax.Array:
    """All-gathers the kernel [D, V] of h [..., D] along fsdp, in h's dtype."""
    return gathered(w.astype(h.dtype), HEAD_AXES, (h.shape[-1], w.shape[1]))


class Head(NamedTuple):
    """How logits become a loss. All fields are static."""

    softcap: float = 0.0  # logits are within (-softcap, softcap); 0 = unbounded
    z_loss: float = 0.0  # coefficient of the squared log-partition function
    chunk: int = 0  # tokens per device whose logits exist at one time; 0 = `default_chunk`
    temperature: float = 1.0  # divisor of the logits
    blocks: int = 0  # of the vocabulary; 0 = `blocks_of`


def _logits(hs, ws, head: Head) -> tuple[jax.Array, jax.Array]:
    """(soft-capped logits, these divided by the temperature), float32 [B, C, V]."""
    pairs = zip(hs, ws, strict=True)
    with jax.named_scope("head"):
        raw = [product(h, w, (h.ndim - 1, 0), jnp.float32) for h, w in pairs]
    capped = softcapped(sum(raw[1:], raw[0]), head.softcap)
    return capped, capped if head.temperature == 1 else capped / head.temperature


def _sums(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(max, exp(logits - max), Σ exp, Σ exp · logits) over the last dim; max keeps it."""
    top = jnp.max(logits, -1, keepdims=True)
    exps = jnp.exp(logits - top)
    # One reduction for both sums: with two, XLA would write exps * logits to memory.
    total, dotted = lax.reduce(
        (exps, exps * logits),
        (jnp.float32(0), jnp.float32(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        (logits.ndim - 1,),
    )
    return top, exps, total, dotted


def _with_block(sums: Any, logits: jax.Array, one_hot: jax.Array) -> tuple[jax.Array, ...]:
    """(max, Σ exp(logits - max), Σ exp · logits, the target's logit) with a block of the
    vocabulary, from those of the blocks before it."""
    top, _, total, dotted = _sums(logits)
    both = jnp.maximum(sums[0], top[..., 0])
    keep, add = jnp.exp(sums[0] - both), jnp.exp(top[..., 0] - both)
    picked = jnp.max(jnp.where(one_hot, logits, MASKED), -1)
    added = keep * sums[1] + add * total, keep * sums[2] + add * dotted
    return both, *added, jnp.maximum(sums[3], picked)


def _values(top, total, dotted, picked, head: Head) -> tuple[jax.Array, jax.Array]:
    """([loss, nll, correct, entropy] of each token, log Σ exp) from sums over the vocabulary, each
    float32 [...]. picked: the targets' logits."""
    lse = jnp.log(total) + top
    nll = lse - picked
    correct = (picked == top).astype(jnp.float32)
    return jnp.stack([nll + head.z_loss * lse * lse, nll, correct, lse - dotted / total]), lse


def _slope(probs, one_hot, capped, lse, head: Head) -> jax.Array:
    """Gradient of a token's loss with respect to its logits. probs: softmax, times 1 + 2 z lse."""
    slope = probs - one_hot
    if head.softcap:
        slope = slope * (1.0 - (capped / head.softcap) ** 2)
    return slope if head.temperature == 1 else slope / head.temperature


def _chunk_terms(hs, kernels, targets, head: Head):
    """(`_values` of a chunk, [4, B, C]; the gradient of its loss with respect to its logits,
    [B, C, V])."""
    capped, logits = _logits(hs, kernels, head)
    top, exps, total, dotted = _sums(logits)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    values, lse = _values(top[..., 0], total, dotted, picked, head)
    probs = exps * ((1.0 + 2.0 * head.z_loss * lse) / total)[..., None]
    one_hot = jnp.arange(logits.shape[-1]) == targets[..., None]
    return values, _slope(probs, one_hot, capped, lse, head)


class _Chunks:
    """Ranges of the tokens of all rows, so that every device works on its own rows in each chunk.

    Tokens of weight 0 are moved to the end of their rows; chunks of them alone are not `used`.
    """

    def __init__(self, rows: int, length: int, needed: jax.Array, chunk: int):
        self.rows, self.length = rows, length
        size = (chunk or default_chunk()) * _parts(rows) // rows
        self.size = min(length, max(size, 1))
        self.count = math.ceil(length / self.size)
        self.order = jnp.argsort(~needed, axis=1, stable=True)
        self.original = jnp.argsort(self.order, axis=1)
        self.used = -(-jnp.max(jnp.sum(needed, 1)) // self.size)

    def _reordered(self, x: jax.Array, order: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, order.reshape(self.rows, -1, *[1] * (x.ndim - 2)), 1)

    def split(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [count, B, size, ...], zero-padded at the end."""
        pad = [(0, 0), (0, self.count * self.size - self.length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(self._reordered(x, self.order), pad)
        return jnp.moveaxis(x.reshape(self.rows, self.count, self.size, *x.shape[2:]), 1, 0)

    def joined(self, x: jax.Array) -> jax.Array:
        """[count, B, size, ...] -> [B, T, ...], tokens in their original order."""
        x = jnp.moveaxis(x, 0, 1).reshape(self.rows, self.count * self.size, *x.shape[3:])
        return self._reordered(x, self.original)

    def each(self, body: Any, sums: Any) -> Any:
        """sums = body(i, sums) for each used chunk."""
        return lax.fori_loop(0, self.used, body, sums)


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, False), tree)


def _put(x: jax.Array, value: jax.Array, i: Any) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, value, i, 0)


@jax.named_scope("loss")
def _over_chunks(terms, targets, weights, head: Head, trained: list[bool] | None = None) -> Any:
    """(values [4, B, T] of `_chunk_terms`, gradients of the hs, gradients of the kernels).

    The gradients are those of Σ weight · loss, in the dtypes of the hs and the kernels.
    trained: which kernels need a gradient; None: no gradients, not of h either. Tokens of weight 0
    have values of 0.
    """
    blocks = blocks_of(head.blocks, any(w.shape[0] != h.shape[-1] for h, w in terms))
    if blocks > 1:
        return _over_blocks(terms, targets, weights, head._replace(blocks=blocks), trained)
    hs = [h for h, _ in terms]
    B, T, _ = hs[0].shape
    parts = _parts(B)
    needed = weights != 0
    chunks = _Chunks(B, T, needed, head.chunk)
    ws = [gathered_head(h, w) for h, w in terms]
    device_gradients = jax.vmap(partial(weight_gradient, dtype=jnp.float32))

    def body(i, sums):
        dws, values, dhs = sums
        hc, tc, wc = _at(inputs, i)
        chunk_values, slope = _chunk_terms(hc, ws, tc, head)
        values = _put(values, chunk_values, i)
        if trained is None:
            return dws, values, dhs
        slope = (slope * wc[..., None]).astype(hs[0].dtype)

        def added(dw, h):
            # Each device sums over its own rows, so one all-reduce follows, not one per chunk.
            by_device = (x.reshape(parts, -1, x.shape[-1]) for x in (h, slope))
            # The barrier keeps XLA from folding the transpose of a tied embedding into the product
            # of a single chunk, for which XLA:CPU has no bfloat16 kernel.
            part = lax.optimization_barrier(device_gradients(*by_device))
            return constrain(dw + part, "batch", None, "vocab")

        with jax.named_scope("head"):
            new = [product(slope, w, (2, 1), h.dtype) for h, w in zip(hc, ws, strict=True)]
            dhs = [_put(dh, x, i) for dh, x in zip(dhs, new, strict=True)]
            dws = [None if dw is None else added(dw, h) for dw, h in zip(dws, hc, strict=True)]
        return dws, values, dhs

    dws = [
        jnp.zeros((parts, *w.shape), jnp.float32) if needs_gradient else None
        for w, needs_gradient in zip(ws, trained or [False] * len(ws), strict=True)
    ]
    inputs = ([chunks.split(h) for h in hs], chunks.split(targets), chunks.split(weights))
    values = jnp.zeros((chunks.count, 4, B, chunks.size), jnp.float32)
    dhs = None if trained is None else [jnp.zeros_like(h) for h in inputs[0]]
    dws, values, dhs = chunks.each(body, (dws, values, dhs))
    values = jnp.stack([chunks.joined(x) for x in jnp.moveaxis(values, 1, 0)])
    values = jnp.where(needed, values, 0.0)
    if dhs is None:
        return values, None, None
    kernels = [w for _, w in terms]
    dws = [
        None if dw is None else _part(jnp.sum(dw, 0), w).astype(w.dtype)
        for dw, w in zip(dws, kernels, strict=True)
    ]
    return values, [chunks.joined(dh) for dh in dhs], dws


class _Blocks:
    """The vocabulary in blocks of columns of the kernels [D, V].

    Where the tensor axis splits the vocabulary, a block has columns of each part, so that no
    column moves.
    """

    LANES = 2048  # libtpu scatters columns in multiples of this; others become an all-reduce

    def __init__(self, size: int, blocks: int):
        mesh = jax.sharding.get_abstract_mesh()
        split = 1 if mesh.empty else mesh.shape["tensor"]
        self.parts = split if size % split == 0 else 1
        self.size, self.count = size, max(blocks // self.parts, 1)
        width = math.ceil(size / self.parts / self.count)
        self.width = width if width < self.LANES else math.ceil(width / self.LANES) * self.LANES
        self.count = math.ceil(size / self.parts / self.width)

    def _grouped(self, w: jax.Array) -> jax.Array:
        """[D, V] -> [D, parts, count, width], padded."""
        w = w.reshape(len(w), self.parts, -1)
        w = jnp.pad(w, ((0, 0), (0, 0), (0, self.count * self.width - w.shape[-1])))
        return w.reshape(len(w), self.parts, self.count, self.width)

    def split(self, w: jax.Array) -> jax.Array:
        """[D, V] -> [count, D, parts · width]"""
        w = jnp.moveaxis(self._grouped(w), 2, 0)
        return w.reshape(self.count, w.shape[1], -1)

    def ids(self) -> jax.Array:
        """The tokens of the columns, int32 [count, parts · width]; -1 = padding."""
        ids = jnp.arange(self.size).reshape(1, -1)
        return self.split(ids + 1)[:, 0] - 1

    def joined(self, blocks: jax.Array) -> jax.Array:
        """[count, D, parts · width] -> [D, V]"""
        w = blocks.reshape(self.count, -1, self.parts, self.width)
        w = jnp.moveaxis(w, 0, 2).reshape(w.shape[1], self.parts, -1)
        return w[..., : self.size // self.parts].reshape(len(w), self.size)


def _over_blocks(terms, targets, weights, head: Head, trained: list[bool] | None) -> Any:
    """`_over_chunks` with the kernels gathered block by block, and their gradients scattered so.

    A first pass over the blocks computes the sums of the softmax, a second one the gradients, so
    the logits are computed twice and no more than a block of a kernel is whole at one time.
    """
    hs, ws = [h for h, _ in terms], [w for _, w in terms]
    B, T, _ = hs[0].shape
    needed = weights != 0
    chunks = _Chunks(B, T, needed, head.chunk)
    vocab = _Blocks(ws[0].shape[1], head.blocks)
    inputs = ([chunks.split(h) for h in hs], chunks.split(targets), chunks.split(weights))
    blocks = [vocab.split(w.astype(h.dtype)) for h, w in zip(hs, ws, strict=True)], vocab.ids()

    def logits_of(hc, whole, ids):
        capped, logits = _logits(hc, whole, head)
        return capped, jnp.where(ids >= 0, logits, MASKED)

    def sums_of_block(sums, block):
        parts, ids = block
        whole = [gathered_head(h, w) for h, w in zip(hs, parts, strict=True)]

        def body(i, sums):
            hc, tc, _ = _at(inputs, i)
            _, logits = logits_of(hc, whole, ids)
            new = _with_block(_at(sums, i), logits, ids == tc[..., None])
            return [_put(x, y, i) for x, y in zip(sums, new, strict=True)]

        return chunks.each(body, sums), None

    zeros = jnp.zeros((chunks.count, B, chunks.size), jnp.float32)
    start = [zeros + MASKED, zeros, zeros, zeros + MASKED]
    sums, _ = lax.scan(sums_of_block, start, blocks)
    top, total, dotted, picked = sums
    values, lse = _values(top, total, dotted, picked, head)
    result = jnp.where(needed, jnp.stack([chunks.joined(x) for x in values]), 0.0)
    if trained is None:
        return result, None, None

    def gradients_of_block(dhs, block):
        parts, ids = block
        whole = [gathered_head(h, w) for h, w in zip(hs, parts, strict=True)]

        def body(i, sums):
            dhs, dws = sums
            (hc, tc, wc), lsec = _at((inputs, lse), i)
            capped, logits = logits_of(hc, whole, ids)
            probs = jnp.exp(logits - lsec[..., None]) * (1.0 + 2.0 * head.z_loss * lsec)[..., None]
            slope = _slope(probs, ids == tc[..., None], capped, lsec, head) * wc[..., None]
            slope = jnp.where(ids >= 0, slope, 0.0).astype(hs[0].dtype)
            with jax.named_scope("head"):
                new = [product(slope, w, (2, 1), jnp.float32) for w in whole]
                dhs = [_put(dh, _at(dh, i) + x, i) for dh, x in zip(dhs, new, strict=True)]
                dws = [
                    None if dw is None else dw + weight_gradient(h, slope, jnp.float32)
                    for dw, h in zip(dws, hc, strict=True)
                ]
            return dhs, dws

        dws = [
            jnp.zeros(w.shape, jnp.float32) if needs_gradient else None
            for w, needs_gradient in zip(whole, trained, strict=True)
        ]
        dhs, dws = chunks.each(body, (dhs, dws))
        pairs = zip(dws, parts, strict=True)
        return dhs, [None if dw is None else _part(dw, w) for dw, w in pairs]

    dhs = [jnp.zeros(h.shape, jnp.float32) for h in inputs[0]]
    dhs, dws = lax.scan(gradients_of_block, dhs, blocks)
    dws = [
        None if dw is None else vocab.joined(dw).astype(w.dtype)
        for dw, w in zip(dws, ws, strict=True)
    ]
    return result, [chunks.joined(dh).astype(h.dtype) for dh, h in zip(dhs, hs, strict=True)], dws


def _part(dw: jax.Array, w: jax.Array) -> jax.Array:
    """The gradient of w from that of the gathered kernel: reduce-scattered if fsdp splits w."""
    if dw.shape == w.shape:
        return dw
    return scattered(dw, 0, spec(HEAD_AXES, w.shape, jax.sharding.get_abstract_mesh()))


def _per_context_shard(f: Callable[..., Any], terms: Any, targets: Any, weights: Any) -> Any:
    """f of the tokens that a device of a context axis has: arrays [parts, ...] or [B, T]."""
    if "context" not in automatic_axes() or not manual_rows():
        return f(terms, targets, weights)
    tokens = P(None, "context")
    run = jax.shard_map(
        f,
        in_specs=([(tokens, P()) for _ in terms], tokens, tokens),
        out_specs=tokens,
        axis_names={"context"},
        check_vma=False,
    )
    return run(terms, targets, weights)


def cross_entropy(terms, targets, weights, head: Head) -> jax.Array:
    """Weighted sums over tokens of loss (nll + z-loss), nll, correct and entropy, float32 [4].

    terms: pairs (h [B, T, D], kernel [D, V]); the logits are the sum of their products. targets are
    int32 [B, T], weights float32 [B, T]. Only the loss has a gradient. The forward pass computes
    it, chunk by chunk, so no logits are stored or computed twice. A frozen kernel's gradient is not
    computed.
    """

    def sums(*args: Any) -> jax.Array:
        total: Any = _cross_entropy(*args, head)
        return total[:, None]

    return jnp.sum(_per_context_shard(sums, terms, targets, weights), 1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(terms, targets, weights, head: Head) -> Any:
    return jnp.sum(_over_chunks(terms, targets, weights, head)[0] * weights, (1, 2))


def _forward(terms: Any, targets: Any, weights: Any, head: Head):
    trained = [w.perturbed for _, w in terms]
    pairs = [(h.value, w.value) for h, w in terms]
    values, *gradients = _over_chunks(pairs, targets.value, weights.value, head, trained)
    return jnp.sum(values * weights.value, (1, 2)), gradients


def _backward(head: Head, residuals, g):
    dhs, dws = jax.tree.map(lambda d: d * g[0].astype(d.dtype), residuals)
    return list(zip(dhs, dws, strict=True)), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def token_logps(terms, targets, learned, head: Head) -> tuple[jax.Array, jax.Array]:
    """(log p(target), entropy) of each token, float32 [B, T]; 0 where `learned` [B, T] is not > 0.

    For losses that are not linear in the log-probabilities, so that the weight of a token is known
    only in the backward pass. If all kernels are frozen, the gradient of `h` is computed in the
    forward pass with weights of 1 and scaled later; if one is trained, the backward pass computes
    the logits again. The entropy has no gradient.
    """
    return _per_context_shard(partial(_token_logps, head=head), terms, targets, learned)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_logps(terms, targets, learned, head: Head) -> Any:
    values, _, _ = _over_chunks(terms, targets, jnp.float32(learned > 0), head)
    return -values[1], values[3]


def _logps_forward(terms: Any, targets: Any, learned: Any, head: Head):
    trained = [w.perturbed for _, w in terms]
    pairs = [(h.value, w.value) for h, w in terms]
    ones = jnp.float32(learned.value > 0)
    recompute = any(trained)
    values, dhs, _ = _over_chunks(pairs, targets.value, ones, head, None if recompute else trained)
    inputs = (pairs, targets.value, ones) if recompute else None
    # Residuals are a pytree of arrays, so `trained` is stored as its structure: () or None.
    return (-values[1], values[3]), (dhs, inputs, [() if w else None for w in trained])


def _logps_backward(head: Head, residuals, g):
    dhs, inputs, structure = residuals
    weights = jnp.zeros(()) if isinstance(g[0], SymbolicZero) else -g[0]
    if dhs is not None:
        return [(dh * weights[..., None].astype(dh.dtype), None) for dh in dhs], None, None
    pairs, targets, ones = inputs
    trained = [w is not None for w in structure]
    _, dhs, dws = _over_chunks(pairs, targets, weights * ones, head, trained)
    return list(zip(dhs, dws, strict=True)), None, None


_token_logps.defvjp(_logps_forward, _logps_backward, symbolic_zeros=True)


def token_scores(terms, targets, needed, head: Head) -> tuple[jax.Array, jax.Array]:
    """(log p(target), 1 if no token is more likely) of each token, float32 [B, T]; 0 where `needed`
    [B, T] is not > 0. Neither has a gradient."""

    def both(terms: Any, targets: Any, weights: Any) -> tuple[jax.Array, jax.Array]:
        values, _, _ = _over_chunks(terms, targets, weights, head)
        return -values[1], values[2]

    return _per_context_shard(both, terms, targets, jnp.float32(needed > 0))
