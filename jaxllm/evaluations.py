# SPDX-License-Identifier: Apache-2.0
"""The evaluations of a run: held-out sets, tasks of lm-eval, samples, and which one is the best."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from jaxllm.best import Best, metric_value
from jaxllm.chat import TextModel
from jaxllm.data.chat import prompt_tokens, stop_ids
from jaxllm.data.dataset import Data
from jaxllm.data.rows import Rows
from jaxllm.data.template import apply_user_template
from jaxllm.errors import UserError
from jaxllm.evaluate import evaluate, metric_names
from jaxllm.monitor.metrics import Metrics
from jaxllm.optim import eval_params
from jaxllm.peft.virtual_tokens import context_length
from jaxllm.program import Program
from jaxllm.sampling import Sampling, check_prompts, generate
from jaxllm.step import TrainState


class RunTasks:
    """eval.tasks: `(trainable, frozen) -> {task: {metric: value}}`. Their data is read here."""

    def __init__(self, program: Program, tokenizer: Any):
        from jaxllm.tasks.loading import Tasks, harness

        section, text = program.cfg.eval, TextModel.of(program.policy, tokenizer)
        self.greater: bool | None = None
        """whether the tasks say that a greater value of eval.metric is better"""
        rows = program.cfg.batch_size // program.micro_batches
        # The memory of a run is planned for rows of training. One of all positions of a model with
        # a long context would be many times as large.
        window = program.row_length
        self.model = harness(program.models, text, program.mesh, rows, window=window)
        self.model.progress = False  # the run has a bar of its own, or none
        options = {"include_path": section.tasks_path, "limit": section.tasks_limit}
        self.tasks = Tasks(section.tasks, **options)

    def __call__(self, trainable: Any, frozen: Any) -> dict[str, dict[str, float]]:
        return self.tasks.metrics(self.model, trainable, frozen)


def run_tasks(program: Program, tokenizer: Any, data: Data) -> RunTasks | None:
    """The tasks of a run; None without eval.tasks. Raises UserError if neither they nor the sets of
    `data` have the metric eval.metric, and if one of each has the same name."""
    tasks = RunTasks(program, tokenizer) if program.cfg.eval.tasks else None
    if both := sorted({*data.evals} & {*tasks.tasks.names()}) if tasks else []:
        raise UserError(f"data.eval and eval.tasks both have {both[0]}; rename the file of the set")
    greater = _greater(program, data, tasks)
    if tasks:
        tasks.greater = greater
    return tasks


def _greater(program: Program, data: Data, tasks: RunTasks | None) -> bool | None:
    """Whether the tasks that have eval.metric say that a greater value is better; None if none
    does, or if they differ. Raises UserError if evaluations will not log it."""
    section = program.cfg.eval
    if section.metric in ("loss", "eval_loss") and (data.evals or not section.patience):
        return None
    args = program.evaluate, program.state.trainable, program.frozen
    found = tasks.tasks.names() if tasks else {}
    for name, rows in data.evals.items():
        found[name] = dict.fromkeys(metric_names(*args, rows, 1), math.nan)
    mean = metric_value(found, section) if found else math.nan
    return {1.0: True, 0.0: False}.get(mean)


class Samples:
    """log.samples: texts to continue or, for a chat model, user messages to answer."""

    def __init__(self, program: Program, tokenizer: Any):
        cfg, self.tokenizer, self.texts = program.cfg, tokenizer, program.cfg.log.samples
        new = cfg.rl.max_new_tokens if cfg.verb.online else 0
        context = context_length(program.shape, program.adapter, cfg.data.length, new)
        self.sampling = Sampling(cfg.log.sample_tokens, stop_ids=stop_ids(tokenizer))
        if cfg.verb.data == "text":
            self.prompts = [tokenizer(text).input_ids for text in self.texts]
        else:
            chats = [[{"role": "user", "content": text}] for text in self.texts]
            chats = [apply_user_template(tokenizer, chat) for chat in chats]
            self.prompts = [prompt_tokens(tokenizer, c, date=cfg.data.date).tolist() for c in chats]
        if self.prompts:
            check_prompts(context, self.prompts, self.sampling)

    def write(self, step: int, model: Any, metrics: Metrics) -> None:
        """Generates from each prompt and writes samples.jsonl."""
        texts = map(self.tokenizer.decode, generate(model, self.prompts, self.sampling))
        rows = [{"prompt": p, "text": text} for p, text in zip(self.texts, texts, strict=True)]
        metrics.samples(step, rows)


@dataclass
class Evaluations:
    """Evaluates every held-out set and task, writes samples, and records the best evaluation."""

    program: Program
    sets: dict[str, Rows]
    frozen: Any
    samples: Samples
    tasks: RunTasks | None
    log: Any
    best: Best
    latest: dict[str, dict[str, float]] = field(default_factory=dict)
    """{set or task: {metric: value}}"""
    step: int | None = None
    """of `latest`"""

    def __call__(self, step: int, state: TrainState) -> None:
        program, log = self.program, self.log
        self.step = step
        options: Any = {"mesh": program.mesh}
        options["batch_size"] = program.cfg.batch_size // program.micro_batches
        with log.phase("eval", step):
            weights = eval_params(state.opt_state, state.trainable)
            for name, rows in self.sets.items():
                values = evaluate(program.evaluate, weights, self.frozen, [rows], **options)
                self.latest[name] = values
                log.write("eval", step, name=name, **values)
                log.bar.say(f"step {step}  {name}: loss {values['loss']:.4f}")
            for name, values in self.of_tasks(step, weights).items():
                self.latest[name] = values
                log.write("eval", step, name=name, **values)
                log.bar.say(f"step {step}  {name}: {shown(values)}")
            if self.samples.prompts:
                self.samples.write(step, program.models(weights, self.frozen)[0], log.metrics)
        section = program.cfg.eval
        if section.greater is None and self.tasks is not None:
            section = replace(section, greater=self.tasks.greater)
        self.best = self.best.after_evals(step, self.latest, section)

    def of_tasks(self, step: int, weights: Any) -> dict[str, dict[str, float]]:
        """{task: {metric: value}}. Each batch begins the phase anew, so that it is no hang."""
        if self.tasks is None:
            return {}
        self.tasks.model.alive = partial(self.log.watch.enter, "eval", step)
        return self.tasks(weights, self.frozen)

    @property
    def over(self) -> bool:
        """True if early stopping ends the run."""
        return self.best.is_over(self.program.cfg.eval)

    @property
    def kept(self) -> int | None:
        """The step of the best checkpoint, which is not deleted; None without save.keep_best."""
        return self.best.step if self.program.cfg.save.keep_best else None

    def meta(self, pending: bool) -> dict[str, Any]:
        """The state that a checkpoint saves. pending: the resumed run evaluates its step first."""
        return {"best_eval": asdict(self.best), "eval_pending": pending}


def shown(values: dict[str, float]) -> str:
    """The metrics of a task, for the terminal."""
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())
