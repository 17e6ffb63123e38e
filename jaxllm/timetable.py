# SPDX-License-Identifier: Apache-2.0
"""The steps of a run, and after which of them it logs, evaluates, saves and stops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from jaxllm.config import OptimSection, TrainConfig
from jaxllm.config.optimizers import DECAYS
from jaxllm.data.stream import ENDLESS
from jaxllm.optim import make_schedule


@dataclass(frozen=True)
class Events:
    """What happens after a step."""

    log: bool
    evaluate: bool
    save: bool
    postpone_evaluation: bool
    """an evaluation is due, but the run stops here: the resumed run does it first, as it writes
    `final/` after the last step"""


class Timetable:
    """Steps of a run over `rows` rows, and what happens after each.

    A run saves and stops every `stride` steps only: online, after all updates of a rollout.
    """

    def __init__(self, cfg: TrainConfig, rows: int):
        # Every row is learned: the last update of an epoch continues into the next one.
        self.stride, epoch = 1, Fraction(rows, cfg.batch_size)
        if cfg.verb.online:
            self.stride = cfg.rl.updates
            epoch *= (cfg.rl.group_size or 1) * (cfg.rl.iterations or 1)
        self.epoch = epoch if rows < ENDLESS else None  # steps in an epoch, if that is known
        steps = cfg.steps or Fraction(str(cfg.epochs)) * epoch
        self.steps = math.ceil(Fraction(steps, self.stride)) * self.stride
        self.optim = cfg.optim
        every = (cfg.log.every, cfg.eval_every, cfg.save.every)
        self.log, self.evaluate, self.save = (epoch if n == "epoch" else int(n) for n in every)

    def jump(self, saved: dict[str, Any], start: int) -> Iterator[str]:
        """A line if the learning rate of the run that resumes after `start` is not what it would
        have been. saved: the checkpoint's meta, which has the run's steps and config until then."""
        if "steps" not in saved or start >= self.steps:
            return
        config = saved["identity"]["config"].items()
        named = {k.removeprefix("optim."): v for k, v in config if k.startswith("optim.")}
        known = {field.name for field in fields(OptimSection)} & named.keys()
        before: Any = make_schedule(OptimSection(**{k: named[k] for k in known}), saved["steps"])
        after: Any = make_schedule(self.optim, self.steps)
        old, new = float(before(start)), float(after(start))
        if math.isclose(old, new, rel_tol=1e-3, abs_tol=1e-12):
            return
        yield (
            f"the schedule changes: the learning rate was {float(before(start - 1)):.3g} at step "
            f"{start} of {saved['steps']} and is {new:.3g} at step {start + 1} of {self.steps}"
        )
        if self.optim.schedule in DECAYS and new > old:
            yield (
                "to train on at one rate instead: --optim.schedule constant "
                "--optim.learning_rate RATE --resume_changed optim.schedule optim.learning_rate"
            )

    def may_stop(self, step: int) -> bool:
        """True if a run that stops after `step` can resume."""
        return step % self.stride == 0

    def after(self, step: int, stop: bool) -> Events:
        """What happens after `step`, and after the last step of a run that stops there."""
        end = step == self.steps
        evaluate = end or due(self.evaluate, step, self.stride)
        postpone = evaluate and stop
        save = due(self.save, step, self.stride) or end or stop
        return Events(due(self.log, step) or end or stop, evaluate and not postpone, save, postpone)


def due(every: int | Fraction, step: int, stride: int = 1) -> bool:
    """True if a multiple of `every` falls in the last `stride` steps up to `step`; 0: never."""
    return bool(every) and step % stride == 0 and step // every > (step - stride) // every
