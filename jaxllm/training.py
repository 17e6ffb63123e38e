# SPDX-License-Identifier: Apache-2.0
"""`train`: the training loop of every objective. Its helpers follow in the order of their use.

Dims: A micro-batches of an update, B rows, T tokens.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from typing import Any

import jax

from jaxllm import dist, reference
from jaxllm.best import Best
from jaxllm.checkpoint import Checkpoints
from jaxllm.compilation import use_cache
from jaxllm.config import TrainConfig, to_dict
from jaxllm.config.checks import check_run, recorded_config, resolve, warnings
from jaxllm.data.batch import Batch
from jaxllm.data.chat import run_tokenizer
from jaxllm.data.dataset import load_data, summarize
from jaxllm.data.loader import make_loader, unstacked
from jaxllm.data.rows import Rows
from jaxllm.evaluations import Evaluations, Samples, run_tasks
from jaxllm.mesh import data_parallel, local_rows, make_mesh, put
from jaxllm.monitor.flops import memory_gib, peak_flops, run_flops
from jaxllm.monitor.meter import Meter
from jaxllm.monitor.metrics import Metrics
from jaxllm.monitor.profile import Profile
from jaxllm.monitor.progress import Progress
from jaxllm.paths import first_line
from jaxllm.plan import planned_for
from jaxllm.program import Program, build
from jaxllm.report.live import reported
from jaxllm.rl import online
from jaxllm.rl.rewards import load_rewards
from jaxllm.rows import RowLog, first_example
from jaxllm.run import RunFolder
from jaxllm.saving import Save, write_final
from jaxllm.signals import spare_the_save, stop_signal
from jaxllm.step import TrainState
from jaxllm.timetable import Timetable
from jaxllm.watch import Watch, current, watched

# A pure function (model, batch [B, T], row keys [B], reference or None) -> (Σ loss, weight,
# {metric: (Σ, weight)}), scalars. It is traced once, so it must depend on its arguments alone.
Objective = Callable[[Any, Any, Any, Any], tuple[Any, Any, dict[str, tuple[Any, Any]]]]
# (step, metrics as in metrics.jsonl) -> ignored
Observer = Callable[[int, dict[str, Any]], Any]


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
    evaluated: int | None
    """its step; None if there was none"""
    final: str | None
    """directory of the trained model or adapter"""


@watched
def train(
    cfg: TrainConfig,
    *,
    objective: Objective | None = None,
    on_step: Observer | None = None,
    origins: Mapping[str, str] | None = None,
) -> Result:
    """Trains `cfg` to its end or until a signal; resumes from the latest valid checkpoint.

    objective: replaces the loss of `cfg.objective`, whose batches it gets. on_step: is called with
    the step and the metrics of each "train" line of metrics.jsonl, in the main process. origins: of
    the values of `cfg`, as `load_config` returns them.

    Raises UserError for a user's mistake, and for a loss or a gradient that is not finite.
    """
    # ---- validate the config, devices, model, tokenizer, run folder and data
    check_run(cfg)
    mesh, watch = make_mesh(cfg.mesh), current()
    cfg = resolve(cfg, data_parallel(mesh), recorded_config(cfg))  # defaults that depend on others
    given, program = cfg, build(cfg, mesh, objective)
    cfg = program.cfg
    tokenizer = run_tokenizer(cfg, program.shape.vocab_size)
    samples = Samples(program, tokenizer)
    run = RunFolder(cfg, origins)
    use_cache(cfg.log.compile_cache)
    data = load_data(cfg, tokenizer)
    assert data.train is not None
    tasks = run_tasks(program, tokenizer, data)
    timetable = Timetable(cfg, len(data.train))
    dist.say(*summarize(data.manifest), *notes(given, program, timetable.steps))

    # ---- load what the run starts from: the first of these that exists
    #   1. a checkpoint in the run folder   2. the adapter in peft.path
    #   3. the HF weights in model.path     4. random weights of model.config's shape
    identity = program.identity(tokenizer, data.manifest)
    resumed = run.latest(identity)
    watch.enter("load", resumed or 0)
    dist.say(*beginning(cfg, resumed, data.train, tokenizer))
    trainable, frozen = program.load(resumed)
    rewards = load_rewards(cfg, mesh, frozen)
    dist.say(*(reward.about for reward in rewards if reward.about))
    if program.precomputes_reference:
        assert program.reference is not None
        key = [identity["weights"], program.policy.hf_config]
        data = reference.precomputed(cfg, data, program.reference(trainable, frozen), key, mesh)
    frozen = program.with_reference(trainable, frozen)
    run.claim(program.state)  # deletes the run that this one replaces; config and data are valid
    checkpoints = run.checkpoints
    with jax.set_mesh(mesh):
        run.save_start(program.policy, tokenizer, resumed=resumed is not None)
        if resumed is None:
            state, saved = program.begin(trainable), {}  # donates `trainable`
            del trainable
        else:
            del trainable  # before the checkpoint's weights take its place in memory
            gc.collect()  # nnx.merge and nnx.to_pure_dict leave cycles that refer to weights
            state, saved = checkpoints.restore(resumed, program.state), checkpoints.meta(resumed)

    # ---- batches, metrics and progress, continued from the checkpoint
    step = start = resumed or 0
    watch.restore(saved, run.note(program, start, timetable.steps, tasks))
    dist.say(*timetable.jump(saved, start))
    log = make_log(program, watch, timetable, start, saved, on_step)
    log.metrics.manifest(data.manifest)
    sampler = program.models, frozen, rewards, tokenizer, log.metrics.samples
    batches = make_batches(program, data.train, start, log.rows, sampler, saved.get("feed", {}))
    best = valid_best(checkpoints, Best(**saved.get("best_eval", {})), cfg)
    evals = Evaluations(program, data.evals, frozen, samples, tasks, log, best)
    save = Save(program, checkpoints, log, evals, batches, identity, timetable.steps, step)
    step_fn, stop, unlogged = None, False, False

    # ---- the loop
    with log.opened(), in_loop(log, checkpoints, mesh) as loop:
        if saved.get("eval_pending", False):  # postponed by the signal that stopped the run
            evals(step, state)
            checkpoints.amend(step, evals.meta(False), evals.kept)
        watch.begin(step + timetable.stride)
        while step < timetable.steps and not stop and not evals.over:
            step += 1
            log.profile(step, state)
            watch.enter(batches.phase, step)
            with save.on_reward_error(step - 1, state, unlogged):
                batch, rollout_metrics = batches(step - 1, state.trainable)
            watch.enter("train", step)
            if step_fn is None:  # the first batch has the shapes
                step_fn = compiled(program, timetable.steps, log, state, frozen, batch)
            state, step_metrics = step_fn(state, frozen, batch)
            if unlogged:  # the line is written while this step runs on the device
                log(step - 1)
            log.add(step, step_metrics | rollout_metrics)

            # Read once: a signal that arrives later in this iteration stops the run after the next.
            stop = timetable.may_stop(step) and watch.should_stop(step, step + timetable.stride)
            events = timetable.after(step, stop)
            unlogged = events.log
            if not (events.evaluate or events.save):
                continue
            # Either raises if a loss or gradient is not finite.
            log(step) if events.log else log.meter.read()
            unlogged = False
            if events.evaluate:
                evals(step, state)
            if evals.over and not events.log:
                log(step)
            if events.save or evals.over or evals.kept == step:
                save(step, state, events.postpone_evaluation)
        if step > start:  # not for a run that was complete
            log.ledger(step, "stopped" if stop else "early" if step < timetable.steps else "done")
        best = evals.best
        if not stop and cfg.save.load_best and cfg.save.final and best.step not in (None, step):
            del state  # before the best checkpoint takes its place in memory
            gc.collect()
            state = checkpoints.restore(best.step, program.state)
        loop.close()

        # ---- write the trained model or adapter
        watch.enter("export", step)
        final = None if stop else write_final(program, state, frozen, tokenizer, log.metrics.run)
    early = step < timetable.steps and not stop
    return Result(step, stop, early, best, evals.latest, evals.step, final)


# ---- before the loop


def notes(given: TrainConfig, program: Program, steps: int) -> list[str]:
    """Lines on what the user should know before a run of `steps` steps; given: the config without
    defaults that depend on the model."""
    return [*length_note(given, program), *warnings(program.cfg, steps), *program.summary()]


def length_note(given: TrainConfig, program: Program) -> list[str]:
    """A line on data.length if it is the default."""
    if given.data.max_length is not None:
        return []
    length, limit = program.cfg.data.length, program.shape.max_positions
    return [f"data.max_length is {length:,}, the default; the model has {limit:,} positions"]


def beginning(cfg: TrainConfig, resumed: int | None, rows: Rows, tokenizer: Any) -> list[str]:
    """Lines that say what the run starts from, and show the first example that it trains on."""
    begins = f"loading {cfg.model.path}" if cfg.model.path else "initializing random weights"
    begins = begins if resumed is None else f"resuming from step {resumed}"
    colour = sys.stderr.isatty()
    return [begins, *first_example(cfg, rows, tokenizer, resumed or 0, colour=colour)]


def valid_best(checkpoints: Checkpoints, best: Best, cfg: TrainConfig) -> Best:
    """The best evaluation of the resumed run; none if its checkpoint is missing or damaged."""
    if best.step is None or not cfg.save.keep_best or checkpoints.is_good(best.step):
        return best
    last = ", or else the last weights" if cfg.save.load_best else ""
    dist.say(
        f"warning: checkpoint {best.step}, the best so far, is missing or damaged; the best will "
        f"be one of the evaluations from here on{last}"
    )
    return Best(waited=best.waited)


def make_log(
    program: Program,
    watch: Watch,
    timetable: Timetable,
    start: int,
    saved: dict[str, Any],
    on_step: Observer | None,
) -> Log:
    """The log of a run that continues after step `start` from a checkpoint with the meta `saved`,
    {} for a new one."""
    cfg, mesh = program.cfg, program.mesh
    names = {"name": cfg.log.run_name, "project": cfg.log.project}
    pending = saved.get("eval_pending", False)
    metrics = Metrics(watch.folder, cfg.log.report_to, to_dict(cfg), start, pending, **names)
    peak = peak_flops(mesh.devices.flat[0], cfg.model.compute_dtype)
    meter = Meter(saved.get("sums", {}), saved.get("seconds", 0.0), peak and peak * mesh.size)
    bar = Progress(timetable.steps, start, enabled=cfg.log.progress)
    record = RowLog(cfg, metrics.run, start)
    traces = metrics.run / "profile", start, timetable.stride, meter, cfg.log.profile
    return Log(metrics, record, meter, Profile(*traces), watch, bar, timetable.epoch, on_step)


# ---- in the loop


@contextmanager
def in_loop(log: Log, checkpoints: Checkpoints, mesh: Any) -> Iterator[ExitStack]:
    """What the loop needs. However it ends, a checkpoint that is being written is completed."""
    with ExitStack() as loop:
        within = log.rows, log.bar, log.meter, log.profile
        for one in (stop_signal(log.watch), closing(checkpoints), *within):
            loop.enter_context(one)
        loop.enter_context(jax.set_mesh(mesh))
        yield loop


def make_batches(
    program: Program, rows: Any, start: int, record: RowLog, sampler: Any, feed: Any
) -> Any:
    """`(step, weights) -> (batch [A, B, T], metrics)`, from the data or from rollouts.

    sampler: what `online.Rollouts` takes besides; feed: its state in the last checkpoint.
    """
    if program.cfg.verb.online:
        options = {"on_policy": program.objective.on_policy, "record": record, "state": feed}
        return online.Rollouts(program.cfg, program.mesh, rows, *sampler, **options)
    return LoadedBatches(program, rows, start, record)


class LoadedBatches:
    """The batches of a run on data: `(step, weights) -> (batch [A, B, T], {})`."""

    phase = "data"

    def __init__(self, program: Program, rows: Rows, start: int, record: RowLog):
        cfg, self.mesh, self.record = program.cfg, program.mesh, record
        sizes = {"batch_size": cfg.batch_size, "micro_batches": program.micro_batches}
        self.size = cfg.batch_size // program.micro_batches
        local = local_rows(self.mesh, self.size)
        self.places = [first + i for first in range(0, cfg.batch_size, self.size) for i in local]
        self.loader = make_loader(rows, **sizes, local=local, seed=cfg.seed, start_step=start)

    def __call__(self, step: int, trainable: Any) -> tuple[Batch, dict[str, Any]]:
        batch = next(self.loader)
        self.record(step + 1, unstacked(batch), self.places)
        return Batch(**put(self.mesh, batch, self.size)), {}

    def state(self) -> dict[str, Any]:
        """Nothing to save: the batch is a function of the seed and the step."""
        return {}


def compiled(
    program: Program, steps: int, log: Log, state: TrainState, frozen: Any, batch: Batch
) -> Any:
    """The step, compiled for these arguments; the terminal shows how long that took."""
    with log.phase("compile", log.watch.step):
        log.bar.compiling()
        began = time.perf_counter()
        step = program.step(steps).lower(state, frozen, batch).compile()
        log.bar.compiled(time.perf_counter() - began)
        log.meter.planned = planned_for(program, step)
        if log.meter.planned is not None:
            memory, mfu = log.meter.planned
            log.metrics.write("plan", log.watch.step, memory_gib=memory, mfu=mfu)
    log.meter.flops = run_flops(
        program.cfg,
        program.shape,
        batch.shape[-1],
        frozen=program.adapter.frozen,
        compares=program.reference is not None,
        baseline=program.objective.baseline is not None,
        on_policy=program.objective.on_policy,
    )
    return step


@dataclass(frozen=True)
class Log:
    """Writes a line of metrics for the steps since the last one, and shows it on the terminal."""

    metrics: Metrics
    rows: RowLog
    meter: Meter
    profile: Profile
    watch: Watch
    bar: Progress
    epoch: Fraction | None
    """steps in an epoch"""
    on_step: Observer | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keeps the report and the metrics, which have the error that ends the block, if any."""
        report = reported(self.watch.folder, self.metrics.run, enabled=dist.is_main())
        with report, closing(self.metrics):
            try:
                yield
            except Exception as error:
                with suppress(OSError):  # the disk may be full
                    self.metrics.write("error", self.watch.step, message=first_line(error))
                raise

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Time that is not training time."""
        self.watch.enter(name, step)
        with self.meter.paused():
            yield
        self.watch.enter("train", step)

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """The phase in which a checkpoint is saved; a bucket has what was logged before it."""
        spare_the_save(self.watch)
        with self.phase("save", step):
            self.rows.flush()
            self.metrics.flush()
            yield

    def add(self, step: int, metrics: Any) -> None:
        """Adds the metrics of an update, and shows that the update before it has ended."""
        self.meter.add(step, metrics)
        self.bar.advance(step - 1)

    def __call__(self, step: int) -> None:
        line, memory = self.meter.line(), memory_gib()
        self.watch.progress(step)
        written = self.write("train", step, **line, memory_gib=memory)
        if self.on_step is not None and dist.is_main():
            self.on_step(step, written)
        shown = {key: line.get(key) for key in ("loss", "tokens_per_second", "mfu", "reward")}
        self.bar.update(step, **shown, memory=memory)

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Writes a line of metrics with the amount of data that the run has trained on."""
        epoch = float(step / self.epoch) if self.epoch else None
        line = {"epoch": epoch, "tokens_seen": self.meter.tokens_seen} | values
        self.metrics.write(kind, step, **line)
        return line

    def ledger(self, step: int, ended: str) -> None:
        """Writes and shows where the time of the run went, over all restarts, and how it ended."""
        ledger = self.watch.finish()
        self.metrics.write("goodput", step, **ledger, ended=ended)
        seconds = {k.removesuffix("_seconds"): v for k, v in ledger.items() if "_seconds" in k}
        total = sum(seconds.values())
        shown = sorted(seconds.items(), key=lambda item: -item[1])
        text = ", ".join(f"{p} {value / total:.0%}" for p, value in shown if value >= total / 100)
        restarts = int(ledger["restarts"])
        more = f"; {restarts} restart{'s' * (restarts > 1)}" if restarts else ""
        self.bar.say(f"{timedelta(seconds=round(total))}: {text}{more}")
        if (planned := self.meter.planned) is not None:
            memory, most, mfu = *planned, self.meter.mfu
            text = f"memory: planned {memory:.2f} GiB a device, used {memory_gib():.2f} GiB"
            known = most is not None and mfu is not None
            self.bar.say(text + (f"; MFU: at most {most:.0%}, reached {mfu:.0%}" if known else ""))
