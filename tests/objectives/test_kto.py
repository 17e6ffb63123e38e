# SPDX-License-Identifier: Apache-2.0
"""KTO against numpy."""

import jax
import numpy as np
import pytest
from steps import decoder, judged_rows

from jaxllm.data.batch import Batch
from jaxllm.objectives.dpo import answer_logps
from jaxllm.objectives.kto import answer_terms, kto_baseline, kto_loss
from jaxllm.step import with_baseline


def numpy_terms(delta, z, good, beta, desirable, undesirable):
    signed = np.where(good, delta - z, z - delta)
    return np.where(good, desirable, undesirable) * (1 - 1 / (1 + np.exp(-beta * signed)))


def test_answer_terms_equal_numpy():
    rng = np.random.default_rng(0)
    delta, good = rng.normal(0, 6, (5, 7)).astype(np.float32), rng.random((5, 7)) < 0.5
    options = dict(beta=0.3, desirable=1.4, undesirable=0.6)
    got = answer_terms(delta, np.float32(0.8), good, **options)
    want = numpy_terms(np.float64(delta), np.float32(0.8), good, *options.values())
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def case():
    """A policy, a reference, packed rows, and Δ of each answer and of each mismatched one."""
    model, other = decoder(), decoder()
    other.embed.embedding[...] = other.embed.embedding[...] * 2
    batch = Batch(**judged_rows(6))
    names = ("chosen_segment", "rejected_segment", "unpaired_segment")
    segments = [getattr(batch, n) for n in names]
    ours, theirs = (answer_logps(m, batch, segments)[0] for m in (model, other))
    deltas = [np.float64(a) - np.float64(b) for a, b in zip(ours, theirs, strict=True)]
    return model, other, batch, segments, deltas


def test_the_baseline_is_the_mean_of_what_is_mismatched(case):
    model, other, batch, segments, deltas = case
    total, count = jax.jit(kto_baseline)(model, other, batch)
    assert float(count) == (segments[2] > 0).sum() == 9
    np.testing.assert_allclose(float(total), deltas[2].sum(), atol=1e-4)


@pytest.mark.parametrize("mean", [0.7, -0.7])
def test_the_loss_equals_numpy_and_its_baseline_is_not_below_0(case, mean):
    model, other, batch, (good, bad, _), deltas = case
    options = dict(beta=0.3, desirable=1.4, undesirable=0.6)
    batch = with_baseline(batch, mean)
    loss, weight, metrics = jax.jit(lambda m, o, b: kto_loss(m, b, None, o, **options))(
        model, other, batch
    )
    z = max(mean, 0.0)
    delta = np.where(good > 0, deltas[0], deltas[1])
    want = numpy_terms(delta, z, good > 0, *options.values())[(good + bad) > 0]
    np.testing.assert_allclose(float(loss), want.sum(), rtol=1e-5)
    assert float(weight) == len(want) == 9
    assert 0 < (good > 0).sum() < 9
    assert float(metrics["kl"][0] / metrics["kl"][1]) == pytest.approx(z)
    rewards = {
        "reward_chosen": 0.3 * deltas[0][good > 0].mean(),
        "reward_rejected": 0.3 * deltas[1][bad > 0].mean(),
    }
    for name, value in rewards.items():
        got, count = metrics[name]
        np.testing.assert_allclose(float(got / count), value, rtol=1e-4)


def test_the_policy_that_is_its_reference_costs_half_of_each_weight(case):
    model, _, batch, (good, bad, _), _ = case
    total, _ = kto_baseline(model, model, batch)
    assert float(total) == 0.0
    loss, _, _ = kto_loss(
        model, with_baseline(batch, 0.0), None, model, desirable=3.0, undesirable=1.0
    )
    want = 1.5 * (good > 0).sum() + 0.5 * (bad > 0).sum()
    assert float(loss) == pytest.approx(want, rel=1e-6)
