# SPDX-License-Identifier: Apache-2.0
"""What a GPU's attention kernels are told of a row's segments; the kernels run on a GPU alone
(benchmarks/gpu.py compares their results)."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops import attention
from jaxllm.ops import attention_gpu as kernels

SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 7 + [0] * 3, [4] * 16, [1, 2, 3, 4] * 4], np.int32)


def test_a_token_sees_from_where_its_segment_begins():
    np.testing.assert_array_equal(
        kernels.starts(jnp.asarray(SEGMENTS[:2])), [[0] * 5 + [5] + [6] * 7 + [13] * 3, [0] * 16]
    )


@pytest.mark.parametrize("window", [None, 3])
def test_a_first_key_and_causality_are_what_attention_sees(window):
    segments = jnp.asarray(SEGMENTS[:2])
    places = jnp.arange(segments.shape[1])
    first = kernels.starts(segments)
    if window is not None:
        first = jnp.maximum(first, places - (window - 1))
    told = (places >= first[:, :, None]) & (places <= places[:, None])
    seen = attention.visible(segments, segments, jnp.zeros_like(segments), places, places, window)
    np.testing.assert_array_equal(told, seen)


@pytest.mark.parametrize("dtype, fused", [("bfloat16", True), ("float32", False)])
def test_whole_rows_of_bfloat16_go_to_the_kernel_and_others_do_not(monkeypatch, dtype, fused):
    segments, seen = jnp.asarray(SEGMENTS), []
    q = jnp.full((*segments.shape, 4, 8), 1.5, dtype)
    k = v = jnp.ones((len(segments), 2, segments.shape[1], 8), dtype)

    def attend(kernel, q, k, v, segments, **options):
        seen.append((kernel, q.shape, k.shape, v.shape))
        assert options["scale"] == 144**-0.5 and (q == 1.5).all()  # scaled there, in float32
        return q

    monkeypatch.setattr(attention, "GPU_KERNEL", "mosaic")
    monkeypatch.setattr(kernels, "attend", attend)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    attention.attention(q, k, v, segments, segments, segments, scale=144**-0.5)
    heads = tuple((3, 16, n, 8) for n in (4, 2, 2))
    assert seen == ([("mosaic", *heads)] if fused else [])
