# SPDX-License-Identifier: Apache-2.0
"""Grouped products against a loop over the groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops import grouped as ops
from jaxllm.ops.grouped import by_group, grouped, permuted
from jaxllm.ops.quantized import Quantized, dense, quantize

N, INPUTS, OUTPUTS = 600, 24, 20
SIZES = {
    "uneven": (7, 300, 1, 40, 252),
    "empty": (0, 0, 600, 0, 0),
    "fewer than the rows": (0, 129, 5, 0, 300),
    "none": (0, 0, 0, 0, 0),
}


def looped(x, w, sizes):
    ends = np.cumsum(sizes)
    starts = ends - np.asarray(sizes)
    parts = [x[a:b] @ w[e] for e, (a, b) in enumerate(zip(starts, ends, strict=True))]
    return jnp.concatenate([*parts, jnp.zeros((len(x) - ends[-1], w.shape[-1]))])


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_equal_a_loop(sizes, platform, monkeypatch):
    """What runs on accelerators is JAX's own ragged product, computed here on the CPU."""
    monkeypatch.setattr(ops, "platform", lambda: platform)
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = jax.random.normal(keys[0], (N, INPUTS)), jax.random.normal(keys[1], (N, OUTPUTS))
    w = jax.random.normal(keys[2], (len(sizes), INPUTS, OUTPUTS))
    want, backward = jax.vjp(lambda x, w: looped(x, w, sizes), x, w)
    got, ours = jax.vjp(lambda x, w: grouped(x, w, jnp.asarray(sizes)), x, w)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(ours(g), backward(g), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_bfloat16_rows_have_float32_gradients_of_the_weights():
    sizes, key = SIZES["uneven"], jax.random.key(0)
    x = jax.random.normal(key, (N, INPUTS)).astype(jnp.bfloat16)
    w = jax.random.normal(key, (len(sizes), INPUTS, OUTPUTS))

    def total(f):
        return jax.grad(lambda w: jnp.sum(f(x, w, jnp.asarray(sizes)).astype(jnp.float32)))(w)

    got = total(grouped)
    want = jax.grad(lambda w: jnp.sum(looped(x.astype(jnp.float32), w, sizes)))(w)
    assert got.dtype == jnp.float32 and grouped(x, w, jnp.asarray(sizes)).dtype == jnp.bfloat16
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_rows_are_sorted_by_group_and_put_back():
    groups = np.random.default_rng(0).integers(0, 5, 50)
    groups[groups == 3] = 4
    order, inverse, sizes = by_group(jnp.asarray(groups), 6)
    np.testing.assert_array_equal(sizes, np.bincount(groups, minlength=6))
    assert (np.diff(groups[order]) >= 0).all()
    x, g = jax.random.normal(jax.random.key(0), (2, 50, 3))
    np.testing.assert_array_equal(permuted(permuted(x, order, inverse), inverse, order), x)
    (dx,) = jax.vjp(lambda x: permuted(x, order, inverse), x)[1](g)
    np.testing.assert_array_equal(dx[order], g)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_experts_are_quantized_one_by_one(kind):
    w = jax.random.normal(jax.random.key(0), (3, 4, 32, 6))
    packed = quantize(w, kind, lambda x: x)
    assert packed.shape == w.shape
    for layer in range(3):
        one = jax.tree.map(lambda x, layer=layer: x[layer], packed)
        alone = quantize(w[layer], kind, lambda x: x)
        want = [
            dense(Quantized(alone.codes[e], alone.scale[e], kind), jnp.float32) for e in range(4)
        ]
        np.testing.assert_array_equal(dense(one, jnp.float32), jnp.stack(want))
    x, sizes = jax.random.normal(jax.random.key(1), (10, 32)), jnp.asarray([1, 0, 6, 3])
    got, backward = jax.vjp(lambda x: grouped(x, one, sizes), x)
    want, plain = jax.vjp(lambda x: grouped(x, dense(one, jnp.float32), sizes), x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(backward(got)[0], plain(got)[0], atol=1e-5)
