# SPDX-License-Identifier: Apache-2.0
"""Which metrics share a chart.

A metric is drawn in the first chart whose pattern matches its whole name. A metric that matches
no pattern has its own chart, in the section `Other`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chart:
    """A chart of metrics that have one unit."""

    section: str
    title: str
    unit: str
    """percent: the values are fractions"""
    metrics: str
    """regular expression of their names"""
    exact: bool = False
    """true if smoothing would only blur it"""


CHARTS = (
    Chart("Training", "Loss", "", "loss"),
    Chart("Training", "Perplexity", "", "perplexity"),
    Chart("Training", "Negative log-likelihood", "nats per token", "nll"),
    Chart("Training", "Loss terms", "", "(policy|value)_loss"),
    Chart("Training", "Learning rate", "", "learning_rate", exact=True),
    Chart("Training", "Gradient norm", "", "grad_norm"),
    Chart("Training", "MTP loss", "nats per token", "mtp_loss"),
    Chart("Training", "MTP accuracy", "percent", "mtp_accuracy"),
    Chart("Rewards", "Reward", "", "reward|reward_mean"),
    Chart("Rewards", "Reward by function", "", "reward/.*"),
    Chart("Rewards", "Reward standard deviation", "", "reward(_group)?_std"),
    Chart("Rewards", "Reward standard deviation by function", "", "reward_std/.*"),
    Chart("Rewards", "Groups with zero variance", "percent", "zero_variance_groups"),
    Chart("Rewards", "Reward minimum and maximum", "", "reward_m(in|ax)"),
    Chart("Rewards", "Mean square", "", "reward_square"),
    Chart("Preferences", "Accuracy", "percent", "accuracy"),
    Chart("Preferences", "Margin", "", "margin"),
    Chart("Preferences", "Rewards of the answers", "", "reward_(chosen|rejected)"),
    Chart("Preferences", "Log-probability", "nats", "logp_(chosen|rejected)"),
    Chart("Preferences", "Loss of the answers", "nats per token", "nll_(chosen|rejected)"),
    Chart("Policy", "KL to the reference", "nats", "kl|kl_k3"),
    Chart("Policy", "KL of an update", "nats per token", "update_kl"),
    Chart("Policy", "Entropy", "nats per token", "(sampling_)?entropy"),
    Chart("Policy", "Clipped tokens", "percent", "(value_)?clip_fraction"),
    Chart("Policy", "Sampler/trainer log-probability gap", "nats", "sampler_gap(_max)?"),
    Chart("Policy", "Value", "", "value_mean"),
    Chart("Policy", "Explained variance", "", "explained_variance"),
    Chart("Policy", "β", "", "beta", exact=True),
    Chart("Completions", "Length", "tokens", "completion_length"),
    Chart("Completions", "Truncated", "percent", "truncated"),
    Chart("Experts", "Largest load", "times the mean", "max_expert_load"),
    Chart("Experts", "Router losses", "", "balance_loss|router_z_loss"),
    Chart("Experts", "Router entropy", "nats", "router_entropy"),
    Chart("Speed", "Throughput", "tokens/s", "tokens_per_second"),
    Chart("Speed", "Model FLOPs utilization", "percent", "mfu"),
    Chart("Speed", "Time of a step", "s", "step_seconds"),
    Chart("Speed", "Time of a rollout", "s", "(rollout|sampling)_seconds"),
    Chart("Speed", "Peak memory", "GiB", "memory_gib", exact=True),
)
# Not drawn: what another chart or the headline shows already.
HIDDEN = {"tokens", "learned", "epoch", "tokens_seen", "examples", "learned_tokens"}
SECTIONS = (*dict.fromkeys(chart.section for chart in CHARTS), "Other")
# What differs by the form of the training data: {forms: {title: changes}}.
DIFFERENT = {
    ("text", "chat"): {
        "Loss": {"unit": "nats per token"},
        "Accuracy": {"section": "Training", "title": "Accuracy of tokens"},
        "Entropy": {"section": "Training"},
    },
    ("pairs", "judged"): {
        "Entropy": {"section": "Preferences"},
        "KL to the reference": {"section": "Preferences"},
    },
}


def charts_of(metrics: Iterable[str], form: str) -> list[dict[str, Any]]:
    """The charts that show these metrics, by section. form: of the training data (`Verb.data`);
    online the rewards come first, as the loss says little."""
    waiting = sorted(set(metrics) - HIDDEN)
    made = []
    for chart in CHARTS:
        pattern = re.compile(chart.metrics)
        names = [name for name in waiting if pattern.fullmatch(name)]
        waiting = [name for name in waiting if name not in names]
        if names:
            made.append(vars(chart) | {"metrics": names})
    for name in waiting:
        title = name.replace("_", " ")
        own = Chart("Other", title[:1].upper() + title[1:], "", name)
        made.append(vars(own) | {"metrics": [name]})
    changes = next((c for forms, c in DIFFERENT.items() if form in forms), {})
    made = [chart | changes.get(chart["title"], {}) for chart in made]
    first = "Rewards" if form == "prompts" else "Training"
    return sorted(
        made, key=lambda chart: (chart["section"] != first, SECTIONS.index(chart["section"]))
    )
