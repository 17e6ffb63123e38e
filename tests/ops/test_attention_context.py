# SPDX-License-Identifier: Apache-2.0
"""Attention in a shard_map that is manual along some axes, and with rows split along context."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.mesh import MeshSection, make_mesh
from jaxllm.ops import attention, attention_blocks, attention_context
from jaxllm.ops.attention_mask import EVERYWHERE, first_visible

ROWS, H, N, K = 8, 4, 2, 8
BATCH = ("data", "fsdp")
OPTIONS = {"softcap": 2.0, "scale": 0.3}


def inputs(length, before):
    """q, k, v, a gradient of the result, and segments with padding."""
    shapes = (length, H, K), (N, before + length, K), (N, before + length, K), (length, H, K)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (ROWS, *s)) for key, s in zip(keys, shapes, strict=True)]
    cuts = np.sort(np.random.default_rng(0).integers(1, length, (ROWS, 2, 1)), 1)
    indices = np.arange(length)
    segments = 1 + (indices >= cuts[:, 0]) - 2 * (indices >= cuts[:, 1])
    return (*arrays, jnp.asarray(np.where(segments > 0, segments, 0), jnp.int32))


def with_gradients(before, chunked=False):
    """A function of `inputs`, sinks and a window: (result and gradients of q, k and v, without
    padding, and the gradient of the sinks, [1, H])."""

    def compute(q, k, v, g, segments, sinks, window):
        wide = jnp.pad(segments, ((0, 0), (before, 0)), constant_values=EVERYWHERE)
        positions = jnp.arange(q.shape[1]) + before - first_visible(segments, None) * chunked
        positions = jnp.broadcast_to(positions, segments.shape)
        tokens = segments, wide if before else None, positions

        def text(q, k, v, sinks):
            options = OPTIONS | {"offset": before, "window": window, "sinks": sinks}
            options |= {"chunked": chunked}
            out = attention.attention(q, k, v, *tokens, **options)
            return jnp.where(segments[..., None, None] > 0, out, 0.0)

        out, back = jax.vjp(text, q, k, v, sinks)
        *gradients, of_sinks = back(g)
        return out, *gradients, *(() if of_sinks is None else (of_sinks[None],))

    return compute


@pytest.mark.parametrize(
    ("sizes", "manual", "length", "before", "chunked"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, ("data", "fsdp", "expert", "context"), 37, 0, False),
        ({"fsdp": 2, "tensor": 4}, ("data", "fsdp", "expert", "context"), 37, 5, False),
        ({"fsdp": 2, "context": 4}, (), 64, 0, False),
        ({"fsdp": 2, "context": 4}, (), 64, 5, True),
        ({"fsdp": 2, "context": 4}, (), 36, 5, False),  # its 9 queries are not two equal parts
        ({"fsdp": 2, "context": 2, "tensor": 2}, ("data", "fsdp", "expert"), 64, 5, False),
    ],
)
def test_attention_does_not_depend_on_the_mesh(monkeypatch, sizes, manual, length, before, chunked):
    """With soft cap, window, sinks, segments and padding; `before` keys of a prefix in front."""
    mesh = make_mesh(MeshSection(**{"data": 1, "fsdp": 1} | sizes), jax.devices())
    arrays = (*inputs(length, before), jnp.array([-1.0, 0.0, 1.0, 3.0]), jnp.int32(9))
    compute = with_gradients(before, chunked)
    want = jax.jit(compute)(*arrays)
    monkeypatch.setattr(attention_blocks, "CPU_BLOCK", 8)
    if manual:
        axes, rows = frozenset(manual), P(BATCH)
        specs = (*[rows] * 5, P(), P())
        compute = jax.shard_map(
            compute, in_specs=specs, out_specs=rows, axis_names=axes, check_vma=False
        )
    with jax.set_mesh(mesh):
        *got, of_sinks = jax.jit(compute)(*arrays)
    for ours, theirs in zip(got, want[:-1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)
    assert np.abs(want[-1]).min() > 0.05
    np.testing.assert_allclose(of_sinks.sum(0), want[-1][0], atol=2e-5)


def test_keys_are_gathered_and_their_gradients_are_scattered():
    """Collectives of a row split along context: no all-reduce, no gather of queries or scores."""
    mesh = make_mesh(MeshSection(fsdp=2, context=4), jax.devices())
    specs = P(BATCH, "context"), P(BATCH, None, "context"), P(BATCH, None, "context")
    *arrays, segments = inputs(64, 0)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip((*arrays, segments), (*specs, specs[0], specs[0]), strict=True)
        ]
        program = jax.jit(with_gradients(0)).lower(*placed, None, jnp.int32(9)).compile()
    names = "all-reduce|all-gather|all-to-all|reduce-scatter"
    found = re.findall(rf" = (\w+\[[\d,]*\])\S* ({names})[a-z-]*\(", program.as_text())
    keys, gradients = f"f32[4,{N},64,{K}]", f"f32[4,{N},16,{K}]"
    assert sorted(found) == sorted(
        [(keys, "all-gather")] * 2
        + [("s32[4,64]", "all-gather")]
        + [(gradients, "reduce-scatter")] * 2
    )


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_devices_that_share_a_row_have_the_same_work(shards):
    """Each index once, and the same number of visible keys for each device, within one a query."""
    length, before = 16 * shards, 3
    first = attention_context.first_indices(length, shards, before)
    indices = (first[..., None] + np.arange(length // first.size)).reshape(shards, -1)
    np.testing.assert_array_equal(np.sort(indices.ravel()), before + np.arange(length))
    assert len(set(indices.sum(1))) == 1
    odd = attention_context.first_indices(length + shards, shards, before)
    np.testing.assert_array_equal(odd[:, 0], before + np.arange(shards) * 17)
