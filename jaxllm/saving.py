# SPDX-License-Identifier: Apache-2.0
"""What a run saves: checkpoints, with what it needs besides the weights, and the trained model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm import dist, hf, hub
from jaxllm.card import Origin, model_card
from jaxllm.checkpoint import Checkpoints
from jaxllm.errors import UserError
from jaxllm.finite import check_finite
from jaxllm.monitor.meter import LOWER_RATE
from jaxllm.optim import eval_params
from jaxllm.paths import as_path
from jaxllm.program import Program
from jaxllm.rl.rewards import RewardError
from jaxllm.step import TrainState


@dataclass
class Save:
    """Saves checkpoints."""

    program: Program
    checkpoints: Checkpoints
    log: Any
    evals: Any
    batches: Any
    """log, evals, batches: those of `train`"""
    identity: dict[str, Any]
    """of the run (identity.py)"""
    steps: int
    """of the whole run"""
    last: int
    """the step of the last checkpoint"""

    def __call__(self, step: int, state: TrainState, pending: bool = False) -> None:
        """Starts to save `state`. pending: the resumed run evaluates it first. Raises UserError if
        its weights are not finite, and as `Checkpoints.save` does."""
        log, evals = self.log, self.evals
        kept = "the last good checkpoint is kept" if self.last else "no checkpoint was saved"
        remedy = f"{kept}. {LOWER_RATE}"
        check_finite(state.trainable, self.program.shape, f"step {step}", remedy)
        with log.saving(step):
            meta = {"sums": log.meter.sums, "seconds": log.meter.seconds, "steps": self.steps}
            meta |= {"identity": self.identity}
            meta |= log.watch.meta() | evals.meta(pending) | {"feed": self.batches.state()}
            self.checkpoints.save(step, state, meta, evals.kept)
        self.last = step

    @contextmanager
    def on_reward_error(self, step: int, state: TrainState, unlogged: bool) -> Iterator[None]:
        """Saves `state`, which is that after `step`, if a reward fails in the block. The error is
        raised in all processes. unlogged: the step's line of metrics is still to be written."""
        try:
            yield
        except RewardError as error:
            if step > self.last:
                self.log(step) if unlogged else self.log.meter.read()
                self(step, state)
            if not step:
                raise
            resumes = f"checkpoint {step} is saved, and the same command resumes from it"
            raise RewardError(f"{error}; {resumes}") from error


def write_final(
    program: Program, state: TrainState, frozen: Any, tokenizer: Any, folder: Path
) -> str | None:
    """Writes the trained model, or its adapter, unless save.final is false, and uploads it to
    save.hub; returns the directory. folder: has the run's metrics.jsonl and data.json."""
    if not program.cfg.save.final:
        return None
    path = str(as_path(program.cfg.output_dir) / "final")
    dist.say(f"writing {path}")
    weights = eval_params(state.opt_state, state.trainable)
    dtype = None if program.adapter.frozen else program.cfg.save.dtype
    remedy = f"{path} is not written; export an earlier checkpoint, or set another save.dtype"
    check_finite(weights, program.shape, "the trained weights", remedy, dtype)
    model = program.models(weights, frozen)[0]
    origin = Origin(program.cfg, int(dist.gather(state.step)), folder)
    card = model_card(model, origin, dtype) if dist.is_main() else ""
    if program.adapter.frozen:
        hf.save_adapter(model, path, tokenizer, card=card)
    else:
        hf.save_hf(model, path, dtype=dtype, tokenizer=tokenizer, card=card)
    if (repo := program.cfg.save.hub) and dist.is_main():
        dist.say(f"uploading to {repo}")
        try:
            dist.say(hub.upload(path, repo, program.cfg.save.hub_private))
        except UserError as error:  # nothing is lost
            dist.say(f"warning: not uploaded: {error}", f"to upload it: hf upload {repo} {path}")
    dist.barrier("upload")  # the others wait; a process that ends early would end the run
    return path
