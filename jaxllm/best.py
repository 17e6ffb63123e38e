# SPDX-License-Identifier: Apache-2.0
"""The best evaluation of a run, for early stopping, its checkpoint and its report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxllm.config import EvalSection
from jaxllm.errors import UserError

LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "brier_score")  # suffixes of metric names


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far; saved in its checkpoints."""

    step: int | None = None
    """None before the first evaluation"""
    value: float | None = None
    """eval.metric at that step"""
    waited: int = 0
    """evaluations since the last improvement of more than eval.min_delta"""
    loss: float | None = None
    """the loss at that step, also if eval.metric is another metric"""

    def after_evals(
        self, step: int, evals: dict[str, dict[str, float]], section: EvalSection
    ) -> Best:
        """The best after the evaluations {set: {metric: value}} at `step`, by eval.metric."""
        losses = [metrics["loss"] for metrics in evals.values() if "loss" in metrics]
        if not losses and section.metric == EvalSection().metric:
            return self  # nothing is evaluated, or only tasks of lm-eval
        best = self.after(step, metric_value(evals, section), section)
        if best.step != step:
            return best
        return replace(best, loss=sum(losses) / len(losses) if losses else None)

    def after(self, step: int, value: float, section: EvalSection) -> Best:
        """The best after an evaluation at `step`: a tie keeps the earlier one, and a value that is
        not finite is never better."""
        greater = section.greater
        if greater is None:
            names = section.metric, section.metric.rpartition(",")[0]  # without a filter's name
            greater = not any(name.endswith(LOWER_IS_BETTER) for name in names)
        gain = math.inf
        if self.value is not None:
            gain = value - self.value if greater else self.value - value
        if not (math.isfinite(value) and gain > 0):
            return replace(self, waited=self.waited + 1)
        return Best(step, value, 0 if gain > section.min_delta else self.waited + 1)

    def is_over(self, section: EvalSection) -> bool:
        """True after eval.patience evaluations without an improvement; patience 0 never stops."""
        return 0 < section.patience <= self.waited


def metric_value(evals: dict[str, dict[str, float]], section: EvalSection) -> float:
    """The value of eval.metric in evaluations {set: {metric: value}}.

    METRIC is the mean over the sets that have it, NAME/METRIC or NAME_METRIC that of one set;
    transformers' prefix eval_ may precede either. Raises UserError that lists the metrics if it is
    not there.
    """
    for metric in (section.metric, section.metric.removeprefix("eval_")):
        values = [metrics[metric] for metrics in evals.values() if metric in metrics]
        if values:
            return sum(values) / len(values)
        for name, metrics in evals.items():
            inner = metric.removeprefix(name)
            if inner[:1] in ("/", "_") and inner != metric and inner[1:] in metrics:
                return metrics[inner[1:]]
    names = sorted({metric for metrics in evals.values() for metric in metrics})
    raise UserError(
        f"eval.metric {section.metric!r} is not logged by evaluations; choose from "
        f"{', '.join(names)}, or NAME/METRIC with NAME one of {', '.join(evals)}"
    )
