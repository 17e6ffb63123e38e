# SPDX-License-Identifier: Apache-2.0
"""PPO: each formula against a few lines of plain Python, and the loss on a model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import assert_same_update, batch_of, decoder, descent, experience, plain

from jaxllm.objectives.ppo import (
    KlController,
    Value,
    act,
    gae,
    ppo_loss,
    token_rewards,
    value_terms,
    whiten,
)
from jaxllm.program import trained_by


def ragged(seed=0, count=9, length=20):
    """Masks of one run of tokens each, the last one empty, and noise that covers all of it."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((count, length), np.float32)
    for row in weights[:-1]:
        start = rng.integers(0, length - 1)
        row[start : rng.integers(start, length) + 1] = 1
    return weights, rng.normal(size=(2, count, length)).astype(np.float32)


def runs(weights):
    """(row, the places of its tokens) of each row that has some."""
    return [(i, np.flatnonzero(row).tolist()) for i, row in enumerate(weights) if row.any()]


# ---- formulas


@pytest.mark.parametrize(
    ("discount", "decay"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)]
)
def test_advantages_are_discounted_sums_of_surprises(discount, decay):
    weights, (rewards, values) = ragged()
    advantages, returns = gae(rewards, values, weights, discount, decay)
    want = np.zeros(weights.shape)
    for i, places in runs(weights):
        r, v = rewards[i, places].tolist(), [*values[i, places].tolist(), 0.0]
        surprises = [r[k] + discount * v[k + 1] - v[k] for k in range(len(r))]
        for k, t in enumerate(places):
            ahead = enumerate(surprises[k:])
            want[i, t] = sum((discount * decay) ** j * surprise for j, surprise in ahead)
    np.testing.assert_allclose(advantages, want, atol=1e-6)
    np.testing.assert_allclose(returns, (want + values) * weights, atol=1e-6)
    assert advantages.dtype == returns.dtype == np.float32


def test_without_decay_a_return_is_all_that_is_still_earned():
    weights, (rewards, values) = ragged(1)
    returns = gae(rewards, values, weights, 1.0, 1.0)[1]
    for i, places in runs(weights):
        for k, t in enumerate(places):
            assert returns[i, t] == pytest.approx(sum(rewards[i, places[k:]].tolist()), abs=1e-5)


def test_whitening_is_over_the_tokens_that_count():
    weights, (x, _) = ragged()
    known = [x[i, t].item() for i, places in runs(weights) for t in places]
    mean = sum(known) / len(known)
    std = math.sqrt(sum((v - mean) ** 2 for v in known) / len(known))
    got = whiten(np.where(weights > 0, x, 1e6), weights)
    np.testing.assert_allclose(got, np.where(weights > 0, (x - mean) / std, 0), atol=1e-6)
    assert not whiten(x, np.zeros_like(weights)).any()


def test_the_score_lands_on_the_last_token_and_the_kl_on_each():
    weights, (kl, _) = ragged()
    scores = np.random.default_rng(3).normal(size=len(weights))
    scores[-1] = np.nan  # of a completion that has no tokens
    want = np.zeros(weights.shape)
    for i, places in runs(weights):
        want[i, places] = [-0.3 * v for v in kl[i, places].tolist()]
        want[i, places[-1]] += scores[i]
    np.testing.assert_allclose(token_rewards(kl, scores, weights, 0.3), want, atol=1e-6)


def test_value_terms_take_the_worse_of_the_value_and_its_clipped_self():
    old, change, returns = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)
    values = old + np.float32(0.4) * change
    terms, held = value_terms(values, old, returns, 0.2)
    for i in range(len(old)):
        v, o, r = (float(x[i]) for x in (values, old, returns))
        clipped = o + min(max(v - o, -0.2), 0.2)
        worse = max((v - r) ** 2, (clipped - r) ** 2)
        assert float(terms[i]) == pytest.approx(0.5 * worse, rel=1e-6, abs=1e-6)
        if abs((v - r) ** 2 - (clipped - r) ** 2) > 1e-5:
            assert bool(held[i]) == ((clipped - r) ** 2 > (v - r) ** 2)
    assert 0.1 < np.mean(held) < 0.9


def test_beta_follows_its_target_by_bounded_steps():
    steady, led = KlController(0.1), KlController(0.1, target=4.0, horizon=100.0)
    for kl, factor in ((4.4, 1.02), (100.0, 1.04), (4.0, 1.0), (-3.0, 0.96), (3.6, 0.98)):
        before = led.beta
        led.update(kl, 20)
        steady.update(kl, 20)
        assert led.beta == pytest.approx(before * factor)
    assert steady.beta == 0.1


# ---- the loss


def critic(kind):
    """A policy whose value is of its own hidden states, or of a trunk's."""
    model = decoder()
    model.value = Value(32, None if kind == "shared" else decoder())
    rng = np.random.default_rng(5)
    model.value.kernel[...] = jnp.asarray(rng.normal(size=(32, 1)) * 0.3, jnp.float32)
    model.value.bias[...] = jnp.array([0.4])
    if kind == "separate":
        params = nnx.state(model.value.trunk)
        nnx.update(model.value.trunk, jax.tree.map(lambda x: 1.3 * x, params))
    return model


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("keys", [{}, {"clip_high": 0.28, "temperature": 0.7, "value_weight": 2.0}])
def test_the_loss_equals_the_formula_on_a_plain_softmax(kind, keys):
    model, rows = critic(kind), experience()
    logps, entropy = plain(model, rows, keys.get("temperature", 1.0))
    trunk = model if kind == "shared" else model.value.trunk
    hidden = trunk.hidden(*(jnp.asarray(rows[k]) for k in ("tokens", "segment_ids", "positions"))).x
    values = np.float64(hidden) @ np.float64(model.value.kernel[...])[:, 0] + 0.4
    w = rows["weights"].astype(np.float64)

    def mean(x):
        return (x * w).sum() / w.sum()

    ratio = np.exp(logps - rows["old_logps"])
    held = np.clip(ratio, 0.8, 1 + keys.get("clip_high", 0.2))
    policy = -np.minimum(ratio * rows["advantages"], held * rows["advantages"])
    near = rows["old_values"] + np.clip(values - rows["old_values"], -0.2, 0.2)
    plainly, other = (values - rows["returns"]) ** 2, (near - rows["returns"]) ** 2
    value = np.maximum(plainly, other) / 2
    loss, weight, metrics = ppo_loss(model, batch_of(rows), None, **keys)
    want = mean(policy) + keys.get("value_weight", 0.1) * mean(value)
    assert float(loss / weight) == pytest.approx(want, rel=2e-5)
    found = {name: float(a / b) for name, (a, b) in metrics.items()}
    assert found == pytest.approx(
        {
            "policy_loss": mean(policy),
            "value_loss": mean(value),
            "entropy": mean(entropy),
            "clip_fraction": mean(held * rows["advantages"] < ratio * rows["advantages"]),
            "value_clip_fraction": mean(other > plainly),
            "update_kl": mean(rows["old_logps"] - logps),
        },
        rel=2e-5,
    )


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_neither_padding_nor_the_division_into_micro_batches_changes_an_update(kind):
    model = critic(kind)
    assert_same_update(descent(model, ppo_loss, trained_by(model.peft)), experience(), (4,))


@pytest.mark.parametrize("kind", ["shared", "separate"])
def test_what_the_value_learns_moves_the_policy_only_where_they_share(kind):
    model, rows = critic(kind), experience()
    rows["advantages"] = np.zeros_like(rows["advantages"])
    trains = trained_by(model.peft)
    before = nnx.to_pure_dict(nnx.split(model, trains, ...)[1])
    _, after = descent(model, ppo_loss, trains)(batch_of(rows, 1))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after, before)
    value = moved.pop("value")
    assert max(jax.tree.leaves(value)) > 1e-3
    if kind == "shared":
        assert max(jax.tree.leaves(moved)) > 1e-3
    else:
        assert max(jax.tree.leaves(value["trunk"])) > 1e-3
        assert max(jax.tree.leaves(moved)) == 0.0


def test_a_new_value_expects_nothing():
    model = decoder()
    assert not np.any(act(model, batch_of(experience()))[2])
    model.value = Value(32)
    assert not np.any(act(model, batch_of(experience()))[2])
