# SPDX-License-Identifier: Apache-2.0
"""The loss of a reward model against numpy, and its metrics over packed rows."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from steps import decoder, pair_rows

from jaxllm.data.batch import Batch
from jaxllm.objectives.reward import pair_terms, reward_loss


def log_sigmoid(x):
    return -np.logaddexp(0, -np.float64(x))


@pytest.mark.parametrize("centering", [0.0, 0.03])
def test_pair_terms_equal_numpy(centering):
    chosen, rejected, margin = np.random.default_rng(0).normal(0, 3, (3, 4, 5)).astype(np.float32)
    want = -log_sigmoid(chosen - rejected - margin)
    want += centering * (np.float64(chosen) + rejected) ** 2
    got = pair_terms(chosen, rejected, margin, centering=centering)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_equal_rewards_cost_ln_2_and_huge_ones_stay_finite():
    zero = np.float32(0)
    assert float(pair_terms(zero, zero, zero)) == pytest.approx(np.log(2), abs=1e-7)
    assert float(pair_terms(zero, np.float32(500), zero)) == pytest.approx(500)
    assert float(pair_terms(np.float32(500), zero, zero)) == 0.0


@pytest.fixture(scope="module")
def scored():
    """A random reward model, rows and what it says of each pair."""
    model = decoder(scores=True)
    rows = pair_rows(8, margin=True)
    batch = Batch(**rows)
    hidden = model.hidden(batch.tokens, batch.segment_ids, batch.positions).x
    chosen, rejected = (
        np.float64(model.scores(hidden, batch.segment_ids, s))
        for s in (batch.chosen_segment, batch.rejected_segment)
    )
    return model, batch, chosen, rejected


def test_loss_and_metrics_count_pairs_and_nothing_else(scored):
    model, batch, chosen, rejected = scored
    here = batch.chosen_segment > 0
    assert not here.all()  # some slots are empty
    c, r, margin = chosen[here], rejected[here], batch.margin[here]
    loss, weight, metrics = jax.jit(lambda m, b: reward_loss(m, b, None, centering=0.1))(
        model, batch
    )
    terms = -log_sigmoid(c - r - margin) + 0.1 * (c + r) ** 2
    assert float(weight) == here.sum()
    np.testing.assert_allclose(float(loss), terms.sum(), rtol=1e-5)
    both = np.concatenate([c, r])
    want = {
        "accuracy": (c > r).mean(),
        "margin": (c - r).mean(),
        "reward_mean": both.mean(),
        "reward_square": (both**2).mean(),
        "reward_min": both.min(),
        "reward_max": both.max(),
    }
    got = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert got == pytest.approx(want, rel=1e-4)


def test_a_tie_counts_as_wrong_and_rows_without_pairs_count_nothing(scored):
    model, batch, _, _ = scored
    tied = replace(batch, rejected_segment=batch.chosen_segment)
    _, weight, metrics = reward_loss(model, tied, None)
    assert float(metrics["accuracy"][0]) == 0.0 and float(weight) > 0
    nothing = batch.chosen_segment * 0
    none = replace(batch, chosen_segment=nothing, rejected_segment=nothing)
    loss, weight, metrics = reward_loss(model, none, None)
    assert float(loss) == float(weight) == 0.0
    assert all(np.isfinite(a) and a == w == 0.0 for a, w in metrics.values())
