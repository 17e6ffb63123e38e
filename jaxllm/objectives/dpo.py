# SPDX-License-Identifier: Apache-2.0
"""Preference optimization on pairs: DPO and its variants as rows of one table.

Notation: c and r are log π(answer | prompt) of the chosen and the rejected answer, summed over the
answer's tokens; c' and r' are the same under the reference model; Δc = c - c', Δr = r - r' and
h = Δc - Δr. A bar (c̄) is the mean over the answer's tokens. ε is the label smoothing.

Dims: B rows, T tokens, P pairs per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.data.batch import Batch
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.lm import Loss, Metrics, logps, segment_sums

log_sigmoid, sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid


@dataclass(frozen=True)
class Options:
    """Hyperparameters of the losses: β, ε and γ."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0


@dataclass
class Answers:
    """Log-probabilities of pairs of answers, summed over their tokens; float32 [...] each.

    chosen_tokens, rejected_tokens: the numbers of tokens (1 if length_normalized, which makes the
    sums means). baseline: mean of β Δ over all answers of the update (BCO). Derived: Δc, Δr, h, c̄
    and r̄.
    """

    chosen: Any
    rejected: Any
    reference_chosen: Any
    reference_rejected: Any
    chosen_tokens: Any
    rejected_tokens: Any
    baseline: Any = 0.0

    def __post_init__(self) -> None:
        self.delta_chosen = self.chosen - self.reference_chosen
        self.delta_rejected = self.rejected - self.reference_rejected
        self.h = self.delta_chosen - self.delta_rejected
        self.chosen_mean = self.chosen / self.chosen_tokens
        self.rejected_mean = self.rejected / self.rejected_tokens


def dpo(a: Answers, o: Options) -> Any:
    """-(1 - ε) log σ(β h) - ε log σ(-β h): arXiv:2305.18290, eq. 7; ε > 0 is conservative DPO."""
    z, e = o.beta * a.h, o.label_smoothing
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def robust(a: Answers, o: Options) -> Any:
    """(-(1 - ε) log σ(β h) + ε log σ(-β h)) / (1 - 2ε): labels flipped with chance ε
    (arXiv:2403.00409, eq. 12)."""
    z, e = o.beta * a.h, o.label_smoothing
    return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


def hinge(a: Answers, o: Options) -> Any:
    """max(0, 1 - β h): SLiC's hinge (arXiv:2305.10425) on the log-ratios (arXiv:2309.06657)."""
    return jax.nn.relu(1 - o.beta * a.h)


def ipo(a: Answers, o: Options) -> Any:
    """(Δc / |c| - Δr / |r| - 1 / 2β)²: arXiv:2310.12036, eq. 17, with means over the tokens, as in
    the authors' experiments, since sums would depend on the length."""
    h = a.delta_chosen / a.chosen_tokens - a.delta_rejected / a.rejected_tokens
    return jnp.square(h - 1 / (2 * o.beta))


def exo(a: Answers, o: Options) -> Any:
    """KL(σ(±β h) ‖ (1 - ε, ε)), the reverse KL: arXiv:2402.00856, eq. 16; ε = 0 becomes 0.001."""
    z, e = o.beta * a.h, o.label_smoothing or 1e-3
    chosen = sigmoid(z) * (log_sigmoid(z) - math.log(1 - e))
    return chosen + sigmoid(-z) * (log_sigmoid(-z) - math.log(e))


def nca(a: Answers, o: Options) -> Any:
    """-log σ(β Δc) - (log σ(-β Δc) + log σ(-β Δr)) / 2: arXiv:2402.05369, for pairs."""
    c, r = o.beta * a.delta_chosen, o.beta * a.delta_rejected
    return -log_sigmoid(c) - 0.5 * (log_sigmoid(-c) + log_sigmoid(-r))


def sppo(a: Answers, o: Options) -> Any:
    """(Δc - 1 / 2β)² + (Δr + 1 / 2β)²: arXiv:2405.00675, eq. 4.7 with hard labels, η = 1 / β."""
    half = 0.5 / o.beta
    return jnp.square(a.delta_chosen - half) + jnp.square(a.delta_rejected + half)


def bco(a: Answers, o: Options) -> Any:
    """-log σ(β Δc - δ) - log σ(δ - β Δr): arXiv:2404.04656, eq. 7; δ is the baseline."""
    c, r = o.beta * a.delta_chosen, o.beta * a.delta_rejected
    return -log_sigmoid(c - a.baseline) - log_sigmoid(a.baseline - r)


def apo_zero(a: Answers, o: Options) -> Any:
    """1 - σ(β Δc) + σ(β Δr): arXiv:2408.06266, eq. 9, for chosen answers that are better than
    the model's."""
    return 1 - sigmoid(o.beta * a.delta_chosen) + sigmoid(o.beta * a.delta_rejected)


def apo_down(a: Answers, o: Options) -> Any:
    """σ(β Δc) + 1 - σ(β h): arXiv:2408.06266, eq. 10, for chosen answers that are worse."""
    return sigmoid(o.beta * a.delta_chosen) + 1 - sigmoid(o.beta * a.h)


def sft(a: Answers, o: Options) -> Any:
    """-c̄: negative log-likelihood of the chosen answer, to add to another loss."""
    return -a.chosen_mean


def odds(a: Answers, o: Options) -> Any:
    """-β log σ(log odds(c̄) - log odds(r̄)), odds(p) = p / (1 - p): arXiv:2403.07691, eq. 7."""

    def log_odds(mean: Any) -> Any:
        return mean - jnp.log1p(-jnp.exp(jnp.minimum(mean, -1e-7)))

    return -o.beta * log_sigmoid(log_odds(a.chosen_mean) - log_odds(a.rejected_mean))


def orpo(a: Answers, o: Options) -> Any:
    """sft + odds: arXiv:2403.07691, eq. 6, λ = β."""
    return sft(a, o) + odds(a, o)


def simpo(a: Answers, o: Options) -> Any:
    """-log σ(β (c̄ - r̄) - γ): arXiv:2405.14734, eq. 6; ε smooths the labels as in DPO."""
    z, e = o.beta * (a.chosen_mean - a.rejected_mean) - o.gamma, o.label_smoothing
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


_NAMED = (robust, hinge, ipo, exo, nca, sppo, bco, apo_zero, apo_down, sft, orpo, simpo)
LOSSES: dict[str, Callable[[Answers, Options], Any]] = {
    "sigmoid": dpo,
    **{loss.__name__: loss for loss in _NAMED},
}
REFERENCE_FREE = ("sft", "orpo", "simpo")


def answer_logps(
    model: Decoder | None, batch: Batch, segments: Sequence[Any], rng: Any = None, chunk: int = 0
) -> tuple[jax.Array, jax.Array, Metrics]:
    """Log-probabilities of answers; all zeros without a model.

    segments: N arrays of segment ids [B, P]. Returns (Σ log p, float32 [N, B, P]; entropy [B, T];
    the routers' metrics).
    """
    segments_NBP = jnp.stack(segments)
    if model is None:
        return jnp.zeros(segments_NBP.shape), jnp.zeros(batch.tokens.shape), {}
    logps_BT, entropy_BT, out = logps(model, batch, rng, chunk=chunk)
    return segment_sums(logps_BT, batch.segment_ids, segments_NBP), entropy_BT, out.aux


def answer_lengths(batch: Batch, segments: Any) -> jax.Array:
    """Number of tokens of each answer, at least 1; float32, in the shape of `segments`."""
    learned = jnp.float32(batch.weights > 0)
    return jnp.maximum(segment_sums(learned, batch.segment_ids, segments), 1.0)


def pair_logps(
    model: Decoder, reference: Decoder | None, batch: Batch, rng: Any = None, chunk: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Metrics]:
    """Log-probabilities and lengths of the chosen and the rejected answers.

    Returns (the policy's, the reference's, numbers of tokens, float32 [2, B, P] each; entropy
    [B, T]; the metrics of the policy's routers). The reference's are read from the batch if it has
    them, and are 0 without a reference.
    """
    segments = [batch.chosen_segment, batch.rejected_segment]
    sums, entropy_BT, aux = answer_logps(model, batch, segments, rng, chunk)
    if batch.chosen_logps is None:
        reference_sums, *_ = answer_logps(reference, batch, segments, chunk=chunk)
        reference_sums = jax.lax.stop_gradient(reference_sums)
    else:
        reference_sums = jnp.stack([batch.chosen_logps, batch.rejected_logps])
    return sums, reference_sums, answer_lengths(batch, jnp.stack(segments)), entropy_BT, aux


def dpo_loss(
    model: Decoder,
    batch: Batch,
    rng: Any,
    reference: Decoder | None = None,
    *,
    losses: Sequence[tuple[str, float]] = (("sigmoid", 1.0),),
    length_normalized: bool = False,
    chunk: int = 0,
    **options: float,
) -> Loss:
    """Returns (Σ over pairs of the weighted losses, number of pairs, metrics).

    losses: (name in LOSSES, weight); options: fields of `Options`. length_normalized: divide the
    log-probabilities of policy and reference by the answers' tokens. Metrics: rewards are β Δ; in
    the accuracy a tie counts as wrong.
    """
    o = Options(**options)
    uses_reference = any(name not in REFERENCE_FREE for name, _ in losses)
    reference = reference if uses_reference else None
    sums, reference_sums, lengths, entropy_BT, aux = pair_logps(model, reference, batch, rng, chunk)
    tokens: Any = lengths
    if length_normalized:
        sums, reference_sums, tokens = sums / lengths, reference_sums / lengths, (1.0, 1.0)
    baseline = 0.0 if batch.baseline is None else batch.baseline
    a = Answers(*sums, *reference_sums, *tokens, baseline)  # type: ignore[call-issue]
    mask_BP, learned_BT = batch.chosen_segment > 0, batch.weights > 0
    pairs = jnp.sum(mask_BP, dtype=jnp.float32)
    total = partial(jnp.sum, where=mask_BP, dtype=jnp.float32)
    with jax.named_scope("loss"):
        loss = total(sum(weight * LOSSES[name](a, o) for name, weight in losses))
    preference = a.h if uses_reference else a.chosen_mean - a.rejected_mean
    metrics: Metrics = {
        "accuracy": (total(preference > 0), pairs),
        "margin": (total(o.beta * a.h), pairs),
        "reward_chosen": (total(o.beta * a.delta_chosen), pairs),
        "reward_rejected": (total(o.beta * a.delta_rejected), pairs),
        "logp_chosen": (total(a.chosen), pairs),
        "logp_rejected": (total(a.rejected), pairs),
        "nll_chosen": (total(-a.chosen_mean * lengths[0]), total(lengths[0])),
        "entropy": (jnp.sum(entropy_BT * learned_BT), jnp.sum(learned_BT, dtype=jnp.float32)),
    }
    return loss, pairs, jax.lax.stop_gradient(metrics) | aux


def dpo_baseline(
    model: Decoder, reference: Any, batch: Batch, *, beta, length_normalized=False, chunk=0
) -> tuple[jax.Array, jax.Array]:
    """Returns (Σ β Δ, count) over all answers; their ratio is BCO's δ."""
    sums, reference_sums, lengths, *_ = pair_logps(model, reference, batch, chunk=chunk)
    deltas = sums - reference_sums
    if length_normalized:
        deltas = deltas / lengths
    mask_BP = batch.chosen_segment > 0
    return beta * jnp.sum(deltas, where=mask_BP), 2.0 * jnp.sum(mask_BP)
