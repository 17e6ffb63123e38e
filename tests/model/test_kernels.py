# SPDX-License-Identifier: Apache-2.0
"""What a GPU's attention kernels are told of a row's segments; the kernels run on a GPU alone
(benchmarks/gpu.py compares their results)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.model import attention, kernels

SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 7 + [0] * 3, [4] * 16, [1, 2, 3, 4] * 4], np.int32)


def test_starts_and_runs_are_those_of_the_segments():
    np.testing.assert_array_equal(
        kernels.starts(jnp.asarray(SEGMENTS[:2])), [[0] * 5 + [5] + [6] * 7 + [13] * 3, [0] * 16]
    )
    first, lengths = kernels.runs(jnp.asarray(SEGMENTS), 4)
    np.testing.assert_array_equal(first[:2], [[0, 5, 6, 13, -1], [0, -1, -1, -1, -1]])
    np.testing.assert_array_equal(lengths[:2], [[5, 1, 7, 3], [16, -1, -1, -1]])
    assert first[2, -1] == 4  # more than four


@pytest.mark.parametrize("window", [None, 3])
def test_a_first_key_and_causality_are_what_attention_sees(window):
    segments = jnp.asarray(SEGMENTS[:2])
    places = jnp.arange(segments.shape[1])
    first = kernels.starts(segments)
    if window is not None:
        first = jnp.maximum(first, places - (window - 1))
    told = (places >= first[:, :, None]) & (places <= places[:, None])
    seen = attention.visible(segments, segments, jnp.zeros_like(segments), 0, window)
    np.testing.assert_array_equal(told, seen)


def packed(q, k, v, segments, *, scale, count):
    """cuDNN's packed layout spelt out: causal attention in each of a row's runs."""
    first, lengths = (np.asarray(x) for x in kernels.runs(segments, count))
    ids = np.zeros(segments.shape, np.int32)
    for row in range(len(ids)):
        for index in range(count):
            if first[row, index] >= 0:
                start = first[row, index]
                ids[row, start : start + lengths[row, index]] = index + 1
    ids, k, v = jnp.asarray(ids), k.swapaxes(1, 2), v.swapaxes(1, 2)
    return attention._plain(q, k, v, ids, ids, ids, offset=0, window=None, softcap=0.0, scale=scale)


@pytest.mark.parametrize("rows, packs", [(slice(0, 2), True), (slice(0, 3), False)])
def test_rows_of_few_segments_go_to_cudnn_and_others_do_not(monkeypatch, rows, packs):
    segments = jnp.asarray(SEGMENTS[rows])
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (*segments.shape, heads, 8), jnp.bfloat16)
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    )

    def run():
        return attention.attention(
            q, k.swapaxes(1, 2), v.swapaxes(1, 2), segments, segments, segments, scale=0.5
        )

    asked = run()
    seen = []

    def cudnn(*args, **options):
        seen.append(options)
        return packed(*args, **options)

    def cond(fits, then, other):  # outside jit: which branch, and not both
        return then() if fits else other()

    monkeypatch.setattr(attention, "GPU_KERNEL", "cudnn")
    monkeypatch.setattr(kernels, "SEGMENTS", 4)
    monkeypatch.setattr(kernels, "cudnn", cudnn)
    monkeypatch.setattr(kernels.lax, "cond", cond)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    out = run()
    assert bool(seen) == packs
    np.testing.assert_allclose(np.float32(out), np.float32(asked), atol=0.02)
