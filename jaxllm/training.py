# SPDX-License-Identifier: Apache-2.0
"""`train`: the training loop of every objective. Its helpers follow in the order of their use.

Dims: A micro-batches of an update, B rows, T tokens.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import jax

from jaxllm import dist, hf, reference
from jaxllm.checkpoint import Checkpoints
from jaxllm.compilation import use_cache
from jaxllm.config import TrainConfig, to_dict, tokenizer_path
from jaxllm.config.checks import check, recorded_config, resolve, warnings
from jaxllm.data.batch import Batch
from jaxllm.data.chat import padded, prompt_tokens, stop_ids
from jaxllm.data.dataset import Data, load_data, summarize
from jaxllm.data.loader import make_loader
from jaxllm.data.rows import Rows
from jaxllm.data.template import apply_user_template, with_settings
from jaxllm.evaluate import Best, evaluate, metric_names, metric_value
from jaxllm.mesh import data_parallel, make_mesh, put
from jaxllm.monitor.flops import memory_gib, peak_flops, run_flops
from jaxllm.monitor.meter import Meter
from jaxllm.monitor.metrics import Metrics
from jaxllm.monitor.progress import Progress
from jaxllm.optim import eval_params
from jaxllm.paths import as_path
from jaxllm.peft.virtual_tokens import context_length
from jaxllm.program import Program, build
from jaxllm.rl import online
from jaxllm.rl.rewards import load_reward
from jaxllm.run import (
    RunFolder,
    check_processes,
    check_processes_read_the_same,
    check_same_data,
    check_same_origin,
)
from jaxllm.sampling import Sampling, check_prompts, generate
from jaxllm.step import TrainState
from jaxllm.tokenizer import check_vocabulary, load_tokenizer
from jaxllm.watch import Watch


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    """updates done"""
    stopped: bool
    """stopped by a signal; the same command resumes it"""
    early: bool
    """ended by early stopping"""
    best: Best
    evals: dict[str, dict[str, float]]
    """the last evaluation: {set: {metric: value}}"""
    final: str | None
    """directory of the trained model or adapter"""


def train(cfg: TrainConfig) -> Result:
    """Trains `cfg` to its end or until a signal; resumes from the latest valid checkpoint.

    Raises UserError for a user's mistake, before anything compiles where possible, and for a loss
    or a gradient that is not finite.
    """
    check(cfg)
    dist.start(cfg.cluster)
    with Watch(cfg.cluster, as_path(cfg.output_dir)) as watch:
        return _train(cfg, watch)


def _train(cfg: TrainConfig, watch: Watch) -> Result:
    # ---- validate the config, devices, model, tokenizer, run folder and data
    mesh = make_mesh(cfg.mesh)
    cfg = resolve(cfg, data_parallel(mesh), recorded_config(cfg))  # defaults that depend on others
    check_processes(cfg)
    program = build(cfg, mesh)
    tokenizer = load_run_tokenizer(program)
    samples = Samples(program, tokenizer)
    run = RunFolder(cfg)
    use_cache(cfg.log.compile_cache)
    data = load_data(cfg, tokenizer)
    assert data.train is not None
    check_metric(program, data)
    check_processes_read_the_same(data.manifest)
    timetable = Timetable(cfg, len(data.train))
    say(*summarize(data.manifest), *warnings(cfg), *program.summary())

    # ---- load what the run starts from: the first of these that exists
    #   1. a checkpoint in the run folder   2. the adapter in peft.path
    #   3. the HF weights in model.path     4. random weights of model.config's shape
    resumed = run.latest()
    origin = program.origin()  # identifies the weights that checkpoints depend on
    if resumed is not None:
        check_same_data(run.path, data.manifest)
        check_same_origin(run.checkpoints, resumed, origin)
        say(f"resuming from step {resumed}")
    say(f"loading {cfg.model.path}" if cfg.model.path else "initializing random weights")
    trainable, frozen = program.load(resumed)
    rewards = [load_reward(name, mesh, cfg.model.compute_dtype) for name in cfg.rl.rewards]
    if program.precomputes_reference:
        assert program.reference is not None
        key = [origin, program.policy.hf_config]
        data = reference.precomputed(cfg, data, program.reference(trainable, frozen), key, mesh)
    frozen = program.with_reference(trainable, frozen)
    run.claim()  # deletes the run that this one replaces; the config and data are valid by now
    checkpoints = run.checkpoints
    with jax.set_mesh(mesh):
        if resumed is None:
            run.save_start(program.policy, tokenizer)
            state, saved = program.begin(trainable), {}  # donates `trainable`
            del trainable
        else:
            del trainable  # before the checkpoint's weights take its place in memory
            state, saved = checkpoints.restore(resumed, program.state), checkpoints.meta(resumed)

    # ---- batches, metrics and progress, continued from the checkpoint
    step = start = resumed or 0
    eval_pending = saved.get("eval_pending", False)  # postponed by the signal that stopped the run
    metrics = Metrics(run.path, cfg.log.report_to, to_dict(cfg), start, eval_pending)
    metrics.manifest(data.manifest)
    if cfg.verb.online:
        sampler = program.models, frozen, rewards, tokenizer, metrics.sample
        batches: Any = online.Rollouts(cfg, mesh, data.train, *sampler, state=saved.get("feed", {}))
    else:
        batches = LoadedBatches(program, data.train, start)
    peak = peak_flops(mesh.devices.flat[0], cfg.model.compute_dtype)
    meter = Meter(saved.get("sums", {}), saved.get("seconds", 0.0), peak and peak * mesh.size)
    log = Log(metrics, meter, Progress(timetable.steps, start, enabled=cfg.log.progress))
    best = valid_best(checkpoints, Best(**saved.get("best_eval", {})), cfg)
    evals = Evaluations(program, data.evals, frozen, samples, log, best)
    step_fn, stop = None, False
    unlogged = False  # a log line is due; it is written while the next step runs on the device

    # ---- the loop. However it ends, closing() completes the checkpoint that is being written.
    with closing(checkpoints), log.opened(), jax.set_mesh(mesh), stop_signal(watch):
        if eval_pending:
            evals(step, state)
            checkpoints.amend(step, evals.meta(False), evals.kept)
        watch.begin(step + timetable.stride)
        while step < timetable.steps and not stop and not evals.over:
            step += 1
            watch.enter("step", step)
            batch, rollout_metrics = batches(step - 1, state.trainable)
            if step_fn is None:  # the first batch has the shapes
                step_fn = compiled(program, timetable.steps, log, state, frozen, batch)
            state, step_metrics = step_fn(state, frozen, batch)
            if unlogged:
                log(step - 1)
            meter.add(step, step_metrics | rollout_metrics)

            # Read once: a signal that arrives later in this iteration stops the run after the next.
            stop = timetable.may_stop(step) and watch.should_stop(step, step + timetable.stride)
            events = timetable.after(step, stop)
            unlogged = events.log
            if not (events.evaluate or events.save):
                continue
            log(step) if events.log else meter.read()  # raises if a loss or gradient is not finite
            unlogged = False
            if events.evaluate:
                evals(step, state)
            if evals.over and not events.log:
                log(step)
            if events.save or evals.over or evals.kept == step:
                with meter.paused():
                    metrics.flush()
                    meta = {"sums": meter.sums, "seconds": meter.seconds, "base": origin}
                    meta |= {"feed": batches.state()} | evals.meta(events.postpone_evaluation)
                    checkpoints.save(step, state, meta, evals.kept)
        stopped = stop and step < timetable.steps
        best = evals.best
        if not stopped and cfg.save.load_best and cfg.save.final and best.step not in (None, step):
            del state  # before the best checkpoint takes its place in memory
            state = checkpoints.restore(best.step, program.state)

    # ---- write the trained model or adapter
    final = None
    if cfg.save.final and not stopped:
        final = str(run.path / "final")
        say(f"writing {final}")
        model = program.models(eval_params(state.opt_state, state.trainable), frozen)[0]
        if program.adapter.frozen:
            hf.save_adapter(model, final, tokenizer)
        else:
            hf.save_hf(model, final, dtype=cfg.save.dtype, tokenizer=tokenizer)
    early = step < timetable.steps and not stopped
    return Result(step, stopped, early, best, evals.latest, final)


def say(*lines: str) -> None:
    """Prints lines for the user on stderr, once for all processes."""
    for line in lines if dist.is_main() else ():
        print(line, file=sys.stderr, flush=True)


# ---- before the loop


def load_run_tokenizer(program: Program) -> Any:
    """The tokenizer of a run, with the chat template's settings of the config.

    Raises UserError if it does not fit the model.
    """
    cfg = program.cfg
    tokenizer = with_settings(load_tokenizer(tokenizer_path(cfg)), cfg.data)
    tokenizer = padded(tokenizer) if program.shape.scores else tokenizer
    check_vocabulary(tokenizer, program.shape.vocab_size)
    return tokenizer


def check_metric(program: Program, data: Data) -> None:
    """Raises UserError if evaluations will not log eval.metric."""
    section = program.cfg.eval
    if not data.evals or section.metric in ("loss", "eval_loss"):
        return
    args = program.evaluate, program.state.trainable, program.frozen
    names = {name: metric_names(*args, rows, 1) for name, rows in data.evals.items()}
    metric_value({name: dict.fromkeys(metrics, 0.0) for name, metrics in names.items()}, section)


def valid_best(checkpoints: Checkpoints, best: Best, cfg: TrainConfig) -> Best:
    """The best evaluation of the resumed run; none if its checkpoint is missing or broken."""
    if best.step is None or not cfg.save.keep_best or checkpoints.is_good(best.step):
        return best
    last = ", or else the last weights" if cfg.save.load_best else ""
    say(
        f"warning: checkpoint {best.step}, the best so far, is missing or broken; the best will be "
        f"one of the evaluations from here on{last}"
    )
    return Best(waited=best.waited)


# ---- when things happen


@dataclass(frozen=True)
class Events:
    """What happens after a step."""

    log: bool
    evaluate: bool
    save: bool
    postpone_evaluation: bool
    """an evaluation is due, but the run stops here: the resumed run does it first"""


class Timetable:
    """Steps of a run over `rows` rows, and what happens after each.

    A run saves and stops every `stride` steps only: online, after all updates of a rollout.
    """

    def __init__(self, cfg: TrainConfig, rows: int):
        # Every row is learned: the last update of an epoch continues into the next one.
        self.stride, epoch = 1, Fraction(rows, cfg.batch_size)
        if cfg.verb.online:
            self.stride = online.updates_per_rollout(cfg)
            epoch *= (cfg.rl.group_size or 1) * (cfg.rl.iterations or 1)
        steps = cfg.steps or Fraction(str(cfg.epochs)) * epoch
        self.steps = math.ceil(Fraction(steps, self.stride)) * self.stride
        every = (cfg.log.every, cfg.eval_every, cfg.save.every)
        self.log, self.evaluate, self.save = (epoch if n == "epoch" else int(n) for n in every)

    def may_stop(self, step: int) -> bool:
        """True if a run that stops after `step` can resume."""
        return step % self.stride == 0

    def after(self, step: int, stop: bool) -> Events:
        """What happens after `step`, and after the last step of a run that stops there."""
        end = step == self.steps
        evaluate = end or due(self.evaluate, step, self.stride)
        postpone = evaluate and stop and not end
        save = due(self.save, step, self.stride) or end or stop
        return Events(due(self.log, step) or end or stop, evaluate and not postpone, save, postpone)


def due(every: int | Fraction, step: int, stride: int = 1) -> bool:
    """True if a multiple of `every` falls in the last `stride` steps up to `step`; 0: never."""
    return bool(every) and step % stride == 0 and step // every > (step - stride) // every


@contextmanager
def stop_signal(watch: Watch) -> Iterator[None]:
    """SIGTERM or SIGINT at any process ends the loop of all of them after a step.

    The second signal ends the process at once, without another checkpoint.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    names = (signal.SIGTERM, signal.SIGINT) if in_main_thread else ()

    def handle(*_: Any) -> None:
        watch.request_stop()
        for name in names:
            signal.signal(name, signal.SIG_DFL)
        # print() is not safe in a signal handler: the interrupted code may hold the stream's lock.
        with suppress(OSError):  # the terminal is closed
            os.write(2, b"\nstopping after this step; a second signal ends the run at once\n")

    before = {name: signal.signal(name, handle) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


# ---- in the loop


class LoadedBatches:
    """The batches of a run on data: `(step, weights) -> (batch [A, B, T], {})`."""

    def __init__(self, program: Program, rows: Rows, start: int):
        cfg, self.mesh = program.cfg, program.mesh
        sizes = {"batch_size": cfg.batch_size, "micro_batches": program.micro_batches}
        self.loader = make_loader(rows, **sizes, seed=cfg.seed, start_step=start)

    def __call__(self, step: int, trainable: Any) -> tuple[Batch, dict[str, Any]]:
        return Batch(**put(self.mesh, next(self.loader))), {}

    def state(self) -> dict[str, Any]:
        """Nothing to save: the batch is a function of the seed and the step."""
        return {}


def compiled(
    program: Program, steps: int, log: Log, state: TrainState, frozen: Any, batch: Batch
) -> Any:
    """The step, compiled for these arguments; the terminal shows how long that took."""
    with log.meter.paused():
        log.bar.compiling()
        began = time.perf_counter()
        step = program.step(steps).lower(state, frozen, batch).compile()
        log.bar.compiled(time.perf_counter() - began)
    log.meter.flops = run_flops(
        program.cfg,
        program.shape,
        batch.shape[-1],
        frozen=program.adapter.frozen,
        compares=program.reference is not None,
        baseline=program.objective.baseline is not None,
    )
    return step


@dataclass(frozen=True)
class Log:
    """Writes a line of metrics for the steps since the last one, and shows it on the terminal."""

    metrics: Metrics
    meter: Meter
    bar: Progress

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Shows the bar and starts the clock; closes the files at the end."""
        with closing(self.metrics), self.bar, self.meter:
            yield

    def __call__(self, step: int) -> None:
        line, memory = self.meter.line(), memory_gib()
        self.metrics.write("train", step, **line, memory_gib=memory)
        shown = {key: line[key] for key in ("loss", "tokens_per_second", "mfu")}
        self.bar.update(step, **shown, memory=memory)


class Samples:
    """log.samples: texts to continue or, for a chat model, user messages to answer."""

    def __init__(self, program: Program, tokenizer: Any):
        cfg, self.tokenizer, self.texts = program.cfg, tokenizer, program.cfg.log.samples
        new = cfg.rl.max_new_tokens if cfg.verb.online else 0
        context = context_length(program.shape, program.adapter, cfg.data.max_length, new)
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
        outputs = generate(model, self.prompts, self.sampling)
        for prompt, tokens in zip(self.texts, outputs, strict=True):
            metrics.sample(step, prompt=prompt, text=self.tokenizer.decode(tokens))


@dataclass
class Evaluations:
    """Evaluates every held-out set, writes samples, and knows the best evaluation of the run."""

    program: Program
    sets: dict[str, Rows]
    frozen: Any
    samples: Samples
    log: Log
    best: Best
    latest: dict[str, dict[str, float]] = field(default_factory=dict)
    """{set: {metric: value}}"""

    def __call__(self, step: int, state: TrainState) -> None:
        program, log = self.program, self.log
        options: Any = {"mesh": program.mesh}
        options["batch_size"] = program.cfg.batch_size // program.micro_batches
        with log.meter.paused():
            weights = eval_params(state.opt_state, state.trainable)
            for name, rows in self.sets.items():
                values = evaluate(program.evaluate, weights, self.frozen, [rows], **options)
                self.latest[name] = values
                log.metrics.write("eval", step, name=name, **values)
                log.bar.say(f"step {step}  {name}: loss {values['loss']:.4f}")
            if self.samples.prompts:
                self.samples.write(step, program.models(weights, self.frozen)[0], log.metrics)
        self.best = self.best.after_evals(step, self.latest, program.cfg.eval)

    @property
    def over(self) -> bool:
        """True if early stopping ends the run."""
        return self.best.is_over(self.program.cfg.eval)

    @property
    def kept(self) -> int | None:
        """The step of the best checkpoint, which is not deleted; None without save.keep_best."""
        return self.best.step if self.program.cfg.save.keep_best else None

    def meta(self, pending: bool) -> dict[str, Any]:
        """What a checkpoint saves. pending: the resumed run evaluates its step first."""
        return {"best_eval": asdict(self.best), "eval_pending": pending}
