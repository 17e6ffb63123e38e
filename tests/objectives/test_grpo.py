# SPDX-License-Identifier: Apache-2.0
"""GRPO: each formula against a few lines of plain Python, and the loss on a model."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import assert_same_update, batch_of, decoder, descent, experience, plain

from jaxllm.objectives.grpo import (
    clipped_terms,
    group_advantages,
    grpo_loss,
    kl_terms,
    token_weights,
)

CLIP = {"clip": 0.2, "clip_high": 0.28}


@pytest.fixture(scope="module")
def model():
    return decoder()


# ---- formulas


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_compare_the_rewards_that_there_are_in_a_group(scale):
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(7, 5))
    groups[rng.random(groups.shape) < 0.2] = np.nan  # None
    groups[1], groups[2, 1:], groups[3] = np.nan, np.nan, 0.5  # none, one alone, all equal
    want = []
    for group in groups:
        known = [r for r in group if not math.isnan(r)]
        mean = sum(known) / max(len(known), 1)
        std = math.sqrt(sum((r - mean) ** 2 for r in known) / max(len(known) - 1, 1))
        for r in group:
            away = 0.0 if math.isnan(r) or len(known) < 2 else r - mean
            want.append(away / (std + 1e-4) if scale else away)
    got = group_advantages(groups.reshape(-1), 5, scale=scale)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert not got[5:20].any() and got[:5].any()


def test_terms_are_clipped_where_that_makes_the_objective_smaller():
    rng = np.random.default_rng(0)
    old = rng.normal(size=(5, 40)).astype(np.float32)
    logp = (old + 0.4 * rng.normal(size=old.shape)).astype(np.float32)
    advantage = rng.normal(size=old.shape).astype(np.float32)
    terms, clipped = clipped_terms(logp, old, advantage, **CLIP)
    for index in np.ndindex(old.shape):
        ratio = math.exp(float(logp[index]) - float(old[index]))
        a = float(advantage[index])
        held = min(max(ratio, 0.8), 1.28)
        assert float(terms[index]) == pytest.approx(-min(ratio * a, held * a), abs=1e-6)
        assert bool(clipped[index]) == (ratio > 1.28 if a > 0 else ratio < 0.8)
    assert 0 < np.mean(clipped) < 0.5


def test_a_higher_upper_end_lets_more_of_a_good_token_through():
    ratio = jnp.log(jnp.array([1.25, 1.25, 0.75, 0.75]))
    sign = jnp.array([1.0, -1.0, 1.0, -1.0])
    low, _ = clipped_terms(ratio, 0.0, sign, clip=0.2, clip_high=0.2)
    high, _ = clipped_terms(ratio, 0.0, sign, **CLIP)
    np.testing.assert_allclose(low, [-1.2, 1.25, -0.75, 0.8], atol=1e-6)
    np.testing.assert_allclose(high, [-1.25, 1.25, -0.75, 0.8], atol=1e-6)


def test_estimates_of_the_kl():
    rng = np.random.default_rng(0)
    logp, reference = rng.normal(size=(2, 200)).astype(np.float32)
    k1, k3 = (np.asarray(kl_terms(logp, reference, kind)) for kind in ("k1", "k3"))
    for p, q, one, three in zip(logp.tolist(), reference.tolist(), k1, k3, strict=True):
        assert one == pytest.approx(p - q, abs=1e-6)
        assert three == pytest.approx(math.exp(q - p) - 1 - (q - p), rel=1e-6, abs=1e-6)
    assert (k3 >= 0).all() and (k1 < 0).any()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_both_estimate_the_kl_without_bias(kind):
    p, q = (x / x.sum() for x in np.random.default_rng(0).random((2, 30)))
    mean = (p * np.asarray(kl_terms(np.log(p), np.log(q), kind))).sum()
    assert mean == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)


@pytest.mark.parametrize("normalizer", ["tokens", "sequence", "constant"])
def test_normalizers(normalizer):
    weights = experience()["weights"]
    x = np.random.default_rng(1).normal(size=weights.shape)
    sums = [(row * w).sum() for row, w in zip(x, weights, strict=True)]
    lengths = [w.sum() for w in weights]
    learned = sum(n > 0 for n in lengths)
    want = {
        "tokens": sum(sums) / sum(lengths),
        "sequence": sum(s / n for s, n in zip(sums, lengths, strict=True) if n) / learned,
        "constant": sum(s / 16 for s in sums) / learned,
    }
    each, weight = token_weights(jnp.asarray(weights), normalizer, 16)
    assert learned == len(weights) - 1
    assert float((x * each).sum() / weight) == pytest.approx(want[normalizer], abs=1e-6)


# ---- the loss


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"clip_high": 0.28, "normalizer": "sequence"},
        {"beta": 0.3, "kl": "k3", "normalizer": "constant", "max_tokens": 16},
        {"beta": 0.3, "kl": "k1", "temperature": 0.7},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())) or "default",
)
def test_the_loss_equals_the_formula_on_a_plain_softmax(model, keys):
    rows = experience()
    logps, entropy = plain(model, rows, keys.get("temperature", 1.0))
    w = rows["weights"].astype(np.float64)
    ratio = np.exp(logps - rows["old_logps"])
    held = np.clip(ratio, 0.8, 1 + keys.get("clip_high", 0.2))
    terms = -np.minimum(ratio * rows["advantages"], held * rows["advantages"])
    if keys.get("beta"):
        ahead = logps - rows["reference_logps"]
        kl = ahead if keys["kl"] == "k1" else np.exp(-ahead) - 1 + ahead
        terms = terms + keys["beta"] * kl
    sums, lengths = (terms * w).sum(1), w.sum(1)
    kind, learned = keys.get("normalizer"), (lengths > 0).sum()
    want = sums.sum() / lengths.sum()
    if kind is not None:
        divided = sums / (np.maximum(lengths, 1) if kind == "sequence" else 16)
        want = divided.sum() / learned
    loss, weight, metrics = grpo_loss(model, batch_of(rows), None, **keys)
    assert float(loss / weight) == pytest.approx(want, rel=1e-5)
    found = {name: float(a / b) for name, (a, b) in metrics.items()}
    assert found["entropy"] == pytest.approx((entropy * w).sum() / w.sum(), rel=1e-5)
    gap = ((rows["old_logps"] - logps) * w).sum() / w.sum()
    assert found["update_kl"] == pytest.approx(gap, rel=1e-5)
    counts = held * rows["advantages"] < ratio * rows["advantages"]
    assert found["clip_fraction"] == pytest.approx((counts * w).sum() / w.sum(), abs=1e-6)


def test_at_ratio_1_the_gradient_is_that_of_plain_policy_gradient(model):
    rows = experience()
    rows["old_logps"] = np.float32(plain(model, rows)[0]) * (rows["weights"] > 0)
    batch = batch_of(rows)
    graph, params = nnx.split(model)

    def grpo(params):
        loss, weight, _ = grpo_loss(nnx.merge(graph, params), batch, None)
        return loss / weight

    def reinforce(params):
        model = nnx.merge(graph, params)
        logits = model(batch.tokens, batch.segment_ids, batch.positions)
        logps = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(logps, batch.targets[..., None], -1)[..., 0]
        return -jnp.sum(picked * batch.advantages * batch.weights) / batch.weights.sum()

    got, want = (jax.tree.leaves(jax.jit(jax.grad(f))(params)) for f in (grpo, reinforce))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert max(float(jnp.abs(b).max()) for b in want) > 1e-2


def test_on_policy_the_models_own_log_probabilities_are_the_old_ones(model):
    rows = experience()
    sampler, w = rows["old_logps"], rows["weights"]
    own = np.float32(plain(model, rows)[0]) * (w > 0)
    graph, params = nnx.split(model)

    def update(rows, **keys):
        def loss(params):
            loss, weight, metrics = grpo_loss(
                nnx.merge(graph, params), batch_of(rows), None, **keys
            )
            return loss / weight, metrics

        return jax.value_and_grad(loss, has_aux=True)(params)

    (got, metrics), grads = update(rows, on_policy=True)
    (want, others), expected = update(rows | {"old_logps": own})
    assert float(got) == pytest.approx(float(want), abs=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    gap, tokens = metrics.pop("sampler_gap")
    assert float(gap / tokens) == pytest.approx((abs(sampler - own) * w).sum() / w.sum(), rel=1e-5)
    assert metrics.keys() == others.keys() and float(metrics["update_kl"][0]) == 0


@pytest.mark.parametrize("normalizer", ["tokens", "sequence"])
def test_neither_padding_nor_the_division_into_micro_batches_changes_an_update(model, normalizer):
    loss = partial(grpo_loss, beta=0.3, normalizer=normalizer)
    assert_same_update(descent(model, loss, model.peft.trains), experience(), (4,))


def test_an_update_with_nothing_to_learn_changes_nothing(model):
    rows = experience()
    rows["weights"] = np.zeros_like(rows["weights"])
    before = nnx.to_pure_dict(nnx.split(model, model.peft.trains, ...)[1])
    metrics, after = descent(model, grpo_loss, model.peft.trains)(batch_of(rows, 2))
    assert metrics["loss"] == [0.0, 0.0] and metrics["grad_norm"][0] == 0.0
    jax.tree.map(np.testing.assert_array_equal, after, before)
