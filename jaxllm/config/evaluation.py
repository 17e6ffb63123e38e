# SPDX-License-Identifier: Apache-2.0
"""The section `eval` of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Unit

from jaxllm.config.fields import Amount, Count, Path, Read, Size, names


@dataclass(frozen=True)
class EvalSection:
    """lm-eval tasks, best checkpoint and early stopping."""

    metric: str = "loss"
    """evaluation metric that selects the best checkpoint: its mean over the evaluation sets, or
    NAME/METRIC for one set or task, such as hellaswag/acc_norm"""
    greater: bool | None = None
    """true if a greater value is better; default: what the task of the metric says, else false for
    a loss, a perplexity, bits_per_byte and brier_score, and true for the others"""
    patience: Annotated[Count, Unit("evaluations")] = 0
    """stop after this many evaluations in a row without improvement; 0 = never"""
    min_delta: Amount = 0.0
    """smallest change of the metric that counts as an improvement for eval.patience"""
    tasks: Annotated[tuple[str, ...], Read(names)] = ()
    """tasks, groups or tags of lm-eval to run at each evaluation: pip install 'jaxllm[eval]'"""
    tasks_limit: Annotated[Size, Unit("documents")] | None = None
    """evaluate only the first documents of each task; default: all of them"""
    tasks_path: Path | None = None
    """directory with YAML files of your own tasks"""
