# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of answers against a plain log-softmax, and each loss against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import decoder, pair_rows

from jaxllm.data.batch import Batch
from jaxllm.objectives.dpo import (
    LOSSES,
    REFERENCE_FREE,
    Answers,
    Options,
    answer_lengths,
    answer_logps,
    dpo_baseline,
    dpo_loss,
)
from jaxllm.objectives.lm import segment_sums
from jaxllm.ops.cross_entropy import Head, token_logps

# ---- the log-probability of each token


def plain_logps(terms, targets, learned=1.0, softcap=0.0, temperature=1.0):
    logits = sum(h @ w for h, w in terms)
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    every = jax.nn.log_softmax(logits / temperature, -1)
    picked = jnp.take_along_axis(every, targets[..., None], -1)[..., 0]
    return picked * learned, -jnp.sum(jnp.exp(every) * every, -1) * learned


@pytest.fixture(scope="module")
def case():
    B, T, D, V = 2, 37, 16, 103
    k = jax.random.split(jax.random.key(0), 6)
    h, w = jax.random.normal(k[0], (B, T, D)), 0.5 * jax.random.normal(k[1], (D, V))
    low, up = jax.random.normal(k[2], (B, T, 3)), 0.5 * jax.random.normal(k[3], (3, V))
    return h, w, low, up, jax.random.randint(k[4], (B, T), 0, V), jax.random.normal(k[5], (B, T))


def apart(got, want):
    """The largest difference of two trees, as a share of the largest value (or of 1)."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(jnp.abs(a - b).max() / max(float(jnp.abs(b).max()), 1.0)) for a, b in pairs)


@pytest.mark.parametrize(
    ("chunk", "softcap", "temperature"),
    [(1, 0.0, 1.0), (20, 3.0, 1.0), (10_000, 0.0, 0.7), (20, 3.0, 1.6)],
)
@pytest.mark.parametrize("trained", ["all", "not the head", "only LoRA's second", "a tied table"])
def test_log_probabilities_and_their_gradients_equal_the_plain_ones(
    case, chunk, softcap, temperature, trained
):
    """The loss is not linear in the tokens, and some tokens have no weight in it at all."""
    h, w, low, up, targets, weigh = case
    learned = weigh > -0.5

    def loss(logps, *args):
        if trained == "a tied table":
            terms = [(h, args[0].T)]
        elif trained == "not the head":
            terms = [(args[0], w), (args[1], up)]
        elif trained == "only LoRA's second":
            terms = [(h, w), (low, args[0])]
        else:
            terms = [(args[0], args[1]), (args[2], args[3])]
        found, entropy = logps(terms, targets, learned)
        return jnp.sum(jnp.square(found + 1) * weigh * learned), (found, entropy)

    given = {"a tied table": (w.T,), "not the head": (h, low), "only LoRA's second": (up,)}
    args = given.get(trained, (h, w, low, up))
    head = Head(softcap, 0.0, chunk, temperature)
    at = tuple(range(len(args)))
    ours, theirs = (
        jax.jit(jax.value_and_grad(partial(loss, logps), at, has_aux=True))(*args)
        for logps in (
            partial(token_logps, head=head),
            partial(plain_logps, softcap=softcap, temperature=temperature),
        )
    )
    assert apart(ours, theirs) < 1e-5


def test_the_entropy_has_no_gradient(case):
    h, w, _, _, targets, weigh = case
    learned = weigh > -0.5
    slope = jax.grad(lambda x: jnp.sum(token_logps([(x, w)], targets, learned, Head())[1]))(h)
    assert float(jnp.abs(slope).max()) == 0.0


def test_frozen_heads_get_no_gradient_computed(case):
    """No product of the shape of the head's gradient stands in the program."""
    h, w, _, _, targets, weigh = case
    f = jax.grad(lambda x, k: jnp.sum(token_logps([(x, k)], targets, weigh, Head(chunk=20))[0]))
    g = jax.grad(
        lambda x, k: jnp.sum(token_logps([(x, k)], targets, weigh, Head(chunk=20))[0]), (0, 1)
    )
    frozen, both = (str(jax.make_jaxpr(fn)(h, w)) for fn in (f, g))
    assert "f32[1,16,103]" in both and "f32[1,16,103]" not in frozen


# ---- the log-probabilities of answers


@pytest.fixture(scope="module")
def rows():
    return Batch(**pair_rows(6))


def test_answers_log_probabilities_are_sums_over_their_tokens_in_packed_rows(rows):
    model = decoder()
    segments = [rows.chosen_segment, rows.rejected_segment]
    got, entropy, _ = jax.jit(lambda m, b: answer_logps(m, b, segments))(model, rows)
    logits = model(rows.tokens, rows.segment_ids, rows.positions)
    each, entropies = plain_logps([(logits, jnp.eye(logits.shape[-1]))], rows.targets)
    for side, found in zip(segments, got, strict=True):
        for r, p in np.ndindex(side.shape):
            at = (rows.segment_ids[r] == side[r, p]) & (rows.weights[r] > 0) & (side[r, p] > 0)
            want = np.asarray(each)[r][at].sum()
            np.testing.assert_allclose(found[r, p], want, rtol=1e-5, atol=1e-5)
            assert float(answer_lengths(rows, side)[r, p]) == max(at.sum(), 1)
    np.testing.assert_allclose(entropy, entropies * (rows.weights > 0), atol=1e-4)


def test_segment_sums_leave_out_what_is_padding_or_no_segment():
    x = jnp.arange(1.0, 7.0)[None]
    ids = jnp.array([[1, 1, 2, 3, 3, 0]])
    got = segment_sums(x, ids, jnp.array([[3, 0, 1, 4]]))
    np.testing.assert_array_equal(got, [[9.0, 0.0, 3.0, 0.0]])


# ---- the losses


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def numpy_losses(c, r, rc, rr, nc, nr, beta, e, gamma, delta):
    """Each loss as its paper has it; sums c and r of the policy, rc and rr of the reference."""
    up, down = beta * (c - rc), beta * (r - rr)
    z, mean_c, mean_r = up - down, c / nc, r / nr
    eps = e or 1e-3
    odds = np.log(np.exp(mean_c) / (1 - np.exp(mean_c)))
    odds -= np.log(np.exp(mean_r) / (1 - np.exp(mean_r)))
    likely, wrong = sigmoid(z), sigmoid(-z)
    better = beta * (mean_c - mean_r) - gamma
    return {
        "sigmoid": -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z),
        "robust": (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e),
        "hinge": np.maximum(0, 1 - z),
        "ipo": ((c - rc) / nc - (r - rr) / nr - 1 / (2 * beta)) ** 2,
        "exo": likely * np.log(likely / (1 - eps)) + wrong * np.log(wrong / eps),
        "nca": -log_sigmoid(up) - 0.5 * log_sigmoid(-up) - 0.5 * log_sigmoid(-down),
        "sppo": (up / beta - 0.5 / beta) ** 2 + (down / beta + 0.5 / beta) ** 2,
        "bco": -log_sigmoid(up - delta) - log_sigmoid(-(down - delta)),
        "apo_zero": 1 - sigmoid(up) + sigmoid(down),
        "apo_down": sigmoid(up) + 1 - sigmoid(z),
        "sft": -mean_c,
        "orpo": -mean_c - beta * log_sigmoid(odds),
        "simpo": -(1 - e) * log_sigmoid(better) - e * log_sigmoid(-better),
    }


def random_answers(pairs=64, seed=0):
    """Ragged: lengths from 1 to 40, log-probabilities as long answers have them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 41, (2, pairs)).astype(np.float64)
    policy = -lengths * rng.uniform(0.05, 4, lengths.shape)
    reference = policy + rng.normal(0, 4, lengths.shape)
    return [np.float32(x) for x in (*policy, *reference, *lengths)]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_equals_numpy(name, smoothing):
    values, beta, gamma, delta = random_answers(), 0.3, 0.8, 0.15
    wide = [np.float64(x) for x in values]
    want = numpy_losses(*wide, beta, smoothing, gamma, delta)[name]
    got = LOSSES[name](Answers(*values, delta), Options(beta, smoothing, gamma))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-6)
    # float32 holds sums of 100 nats to 1e-5: in float64 it is the formula itself
    with jax.enable_x64(True):
        got = LOSSES[name](Answers(*wide, delta), Options(beta, smoothing, gamma))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_where_answers_are_certain_or_hopeless(name):
    c, r = jnp.array([0.0, -1e-9, -4000.0, -1.0]), jnp.array([-4000.0, -1.0, -1e-9, 0.0])
    ones = jnp.full(4, 20.0)

    def total(c, r):
        return jnp.sum(LOSSES[name](Answers(c, r, c * 0 - 1, r * 0 - 2, ones, ones), Options()))

    for x in (total(c, r), *jax.grad(total, (0, 1))(c, r)):
        assert np.isfinite(x).all()


def test_dpo_begins_at_ln_2_and_its_rewards_at_0(rows):
    model = decoder()
    loss, pairs, metrics = jax.jit(lambda m, b: dpo_loss(m, b, None, m))(model, rows)
    assert float(pairs) == (rows.chosen_segment > 0).sum() == 9
    assert float(loss / pairs) == pytest.approx(np.log(2), abs=1e-6)
    for name in ("accuracy", "margin", "reward_chosen", "reward_rejected"):
        assert float(metrics[name][0]) == pytest.approx(0, abs=1e-5), name


@pytest.mark.parametrize("normalized", [False, True])
def test_losses_are_weighed_added_and_averaged_over_pairs(rows, normalized):
    model, other = decoder(), decoder()
    other.embed.embedding[...] = other.embed.embedding[...] * 2
    segments = [rows.chosen_segment, rows.rejected_segment]
    here = rows.chosen_segment > 0
    sums = [np.float64(x)[here] for m in (model, other) for x in answer_logps(m, rows, segments)[0]]
    lengths = [np.float64(answer_lengths(rows, s))[here] for s in segments]
    c, r, rc, rr = sums
    if normalized:
        c, r, rc, rr = (x / n for x, n in zip(sums, lengths * 2, strict=True))
        lengths = [np.ones_like(n) for n in lengths]
    every = numpy_losses(c, r, rc, rr, *lengths, 0.1, 0.0, 1.0, 0.0)
    mix = (("sigmoid", 1.0), ("sft", 0.5), ("ipo", 2.0))
    loss, pairs, metrics = dpo_loss(
        model, rows, None, other, losses=mix, length_normalized=normalized
    )
    want = sum(weight * every[name].sum() for name, weight in mix)
    np.testing.assert_allclose(float(loss), want, rtol=1e-5)
    assert float(pairs) == here.sum()
    np.testing.assert_allclose(float(metrics["accuracy"][0]), ((c - rc) > (r - rr)).sum())
    np.testing.assert_allclose(float(metrics["logp_chosen"][0]), c.sum(), rtol=1e-5)
    total, count = dpo_baseline(model, other, rows, beta=0.1, length_normalized=normalized)
    np.testing.assert_allclose(float(total), 0.1 * (c - rc + r - rr).sum(), rtol=1e-4)
    assert float(count) == 2 * here.sum()


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_losses_without_a_reference_read_none(rows, name):
    model = decoder()
    loss, _, _ = dpo_loss(model, rows, None, None, losses=((name, 1.0),))
    also, _, _ = dpo_loss(model, rows, None, model, losses=((name, 1.0),))
    assert float(loss) == float(also) != 0.0
