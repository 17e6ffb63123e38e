# SPDX-License-Identifier: Apache-2.0
"""`train`: the training loop of every objective. Its helpers follow in the order of their use.

Dims: A micro-batches of an update, B rows, T tokens.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from fractions import Fraction
from typing import Any

import jax

from jaxllm import dist, hf, reference
from jaxllm.checkpoint import Checkpoints
from jaxllm.compilation import use_cache
from jaxllm.config import OptimSection, TrainConfig, to_dict
from jaxllm.config.checks import check, recorded_config, resolve, warnings
from jaxllm.data.batch import Batch
from jaxllm.data.chat import prompt_tokens, run_tokenizer, stop_ids
from jaxllm.data.dataset import Data, load_data, summarize
from jaxllm.data.loader import make_loader, unstacked
from jaxllm.data.rows import Rows
from jaxllm.data.template import apply_user_template
from jaxllm.errors import UserError
from jaxllm.evaluate import Best, evaluate, metric_names, metric_value
from jaxllm.finite import check_finite
from jaxllm.mesh import data_parallel, local_rows, make_mesh, put
from jaxllm.monitor.flops import memory_gib, peak_flops, run_flops
from jaxllm.monitor.meter import Meter
from jaxllm.monitor.metrics import Metrics
from jaxllm.monitor.progress import Progress
from jaxllm.optim import eval_params, make_schedule
from jaxllm.paths import as_path
from jaxllm.peft.virtual_tokens import context_length
from jaxllm.plan import planned_for
from jaxllm.program import Program, build
from jaxllm.rl import online
from jaxllm.rl.rewards import load_rewards
from jaxllm.rows import RowLog
from jaxllm.run import RunFolder
from jaxllm.sampling import Sampling, check_prompts, generate
from jaxllm.saving import Save
from jaxllm.signals import spare_the_save, stop_signal
from jaxllm.step import TrainState
from jaxllm.watch import Watch, current, watched


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
def train(cfg: TrainConfig) -> Result:
    """Trains `cfg` to its end or until a signal; resumes from the latest valid checkpoint.

    Raises UserError for a user's mistake, before anything compiles where possible, and for a loss
    or a gradient that is not finite.
    """
    # ---- validate the config, devices, model, tokenizer, run folder and data
    check(cfg)
    mesh, watch = make_mesh(cfg.mesh), current()
    cfg = resolve(cfg, data_parallel(mesh), recorded_config(cfg))  # defaults that depend on others
    given, program = cfg, build(cfg, mesh)
    cfg = program.cfg
    tokenizer = run_tokenizer(cfg, program.shape.vocab_size)
    samples = Samples(program, tokenizer)
    run = RunFolder(cfg)
    use_cache(cfg.log.compile_cache)
    data = load_data(cfg, tokenizer)
    assert data.train is not None
    check_metric(program, data)
    timetable = Timetable(cfg, len(data.train))
    say(*summarize(data.manifest), *notes(given, program, timetable.steps))

    # ---- load what the run starts from: the first of these that exists
    #   1. a checkpoint in the run folder   2. the adapter in peft.path
    #   3. the HF weights in model.path     4. random weights of model.config's shape
    identity = program.identity(tokenizer, data.manifest)
    resumed = run.latest(identity)
    watch.enter("load", resumed or 0)
    begins = f"loading {cfg.model.path}" if cfg.model.path else "initializing random weights"
    say(begins if resumed is None else f"resuming from step {resumed}")
    trainable, frozen = program.load(resumed)
    rewards = load_rewards(cfg, mesh, frozen)
    say(*(reward.about for reward in rewards if reward.about))
    if program.precomputes_reference:
        assert program.reference is not None
        key = [identity["weights"], program.policy.hf_config]
        data = reference.precomputed(cfg, data, program.reference(trainable, frozen), key, mesh)
    frozen = program.with_reference(trainable, frozen)
    run.claim(program.state)  # deletes the run that this one replaces; config and data are valid
    checkpoints = run.checkpoints
    with jax.set_mesh(mesh):
        run.save_start(program.policy, tokenizer, resumed is not None)
        if resumed is None:
            state, saved = program.begin(trainable), {}  # donates `trainable`
            del trainable
        else:
            del trainable  # before the checkpoint's weights take its place in memory
            gc.collect()  # nnx.merge and nnx.to_pure_dict leave cycles that refer to weights
            state, saved = checkpoints.restore(resumed, program.state), checkpoints.meta(resumed)

    # ---- batches, metrics and progress, continued from the checkpoint
    step = start = resumed or 0
    watch.restore(saved, complete=start >= timetable.steps, changed=run.changed)
    say(*timetable.jump(saved, start))
    eval_pending = saved.get("eval_pending", False)  # postponed by the signal that stopped the run
    metrics = Metrics(run.path, cfg.log.report_to, to_dict(cfg), start, eval_pending)
    metrics.manifest(data.manifest)
    record = RowLog(cfg, metrics.run, start)
    assert data.train is not None
    if cfg.verb.online:
        sampler = program.models, frozen, rewards, tokenizer, metrics.sample, record
        batches: Any = online.Rollouts(cfg, mesh, data.train, *sampler, state=saved.get("feed", {}))
    else:
        batches = LoadedBatches(program, data.train, start, record)
    peak = peak_flops(mesh.devices.flat[0], cfg.model.compute_dtype)
    meter = Meter(saved.get("sums", {}), saved.get("seconds", 0.0), peak and peak * mesh.size)
    bar = Progress(timetable.steps, start, enabled=cfg.log.progress)
    log = Log(metrics, record, meter, watch, bar)
    best = valid_best(checkpoints, Best(**saved.get("best_eval", {})), cfg)
    evals = Evaluations(program, data.evals, frozen, samples, log, best)
    save = Save(program, checkpoints, log, evals, batches, identity, timetable.steps, step)
    step_fn, stop, unlogged = None, False, False

    # ---- the loop. However it ends, closing() completes the checkpoint that is being written.
    with stop_signal(watch), closing(checkpoints), log.opened(), jax.set_mesh(mesh):
        if eval_pending:
            evals(step, state)
            checkpoints.amend(step, evals.meta(False), evals.kept)
        watch.begin(step + timetable.stride)
        while step < timetable.steps and not stop and not evals.over:
            step += 1
            watch.enter(batches.phase, step)
            with save.on_reward_error(step - 1, state, unlogged):
                batch, rollout_metrics = batches(step - 1, state.trainable)
            watch.enter("train", step)
            if step_fn is None:  # the first batch has the shapes
                step_fn = compiled(program, timetable.steps, log, state, frozen, batch)
            state, step_metrics = step_fn(state, frozen, batch)
            if unlogged:  # the line is written while this step runs on the device
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
                save(step, state, events.postpone_evaluation)
        if step > start:  # not for a run that was complete
            log.ledger(step)
        best = evals.best
        if not stop and cfg.save.load_best and cfg.save.final and best.step not in (None, step):
            del state  # before the best checkpoint takes its place in memory
            gc.collect()
            state = checkpoints.restore(best.step, program.state)

    # ---- write the trained model or adapter
    watch.enter("export", step)
    final = None if stop else write_final(program, state, frozen, tokenizer)
    early = step < timetable.steps and not stop
    return Result(step, stop, early, best, evals.latest, evals.step, final)


def say(*lines: str) -> None:
    """Prints lines for the user on stderr, once for all processes."""
    for line in lines if dist.is_main() else ():
        print(line, file=sys.stderr, flush=True)


def write_final(program: Program, state: TrainState, frozen: Any, tokenizer: Any) -> str | None:
    """Writes the trained model, or its adapter, unless save.final is false, and uploads it to
    save.hub; returns the directory."""
    if not program.cfg.save.final:
        return None
    path = str(as_path(program.cfg.output_dir) / "final")
    say(f"writing {path}")
    weights = eval_params(state.opt_state, state.trainable)
    dtype = None if program.adapter.frozen else program.cfg.save.dtype
    remedy = f"{path} is not written; export an earlier checkpoint, or set another save.dtype"
    check_finite(weights, program.shape, "the trained weights", remedy, dtype)
    model = program.models(weights, frozen)[0]
    if program.adapter.frozen:
        hf.save_adapter(model, path, tokenizer)
    else:
        hf.save_hf(model, path, dtype=dtype, tokenizer=tokenizer)
    if (hub := program.cfg.save.hub) and dist.is_main():
        say(f"uploading to {hub}")
        try:
            say(hf.upload(path, hub))
        except UserError as error:  # nothing is lost
            say(f"warning: not uploaded: {error}", f"to upload it: hf upload {hub} {path}")
    dist.barrier("upload")  # the others wait; a process that ends early would end the run
    return path


# ---- before the loop


def notes(given: TrainConfig, program: Program, steps: int) -> list[str]:
    """Lines on what the user should know before a run of `steps` steps; given: the config without
    defaults that depend on the model."""
    unusual = warnings(program.cfg, steps)
    return [*length_note(given, program), *unusual, *program.summary()]


def length_note(given: TrainConfig, program: Program) -> list[str]:
    """A line on data.length if it is the default."""
    if given.data.max_length is not None:
        return []
    length, limit = program.cfg.data.length, program.shape.max_positions
    return [f"data.max_length is {length:,}, the default; the model has {limit:,} positions"]


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
            self.stride = online.updates_per_rollout(cfg)
            epoch *= (cfg.rl.group_size or 1) * (cfg.rl.iterations or 1)
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
        before = make_schedule(OptimSection(**named), saved["steps"])
        old, new = float(before(start)), float(make_schedule(self.optim, self.steps)(start))
        if math.isclose(old, new, rel_tol=1e-3, abs_tol=1e-12):
            return
        yield (
            f"the schedule changes: the learning rate was {float(before(start - 1)):.3g} at step "
            f"{start} of {saved['steps']} and is {new:.3g} at step {start + 1} of {self.steps}"
        )
        if self.optim.schedule in ("cosine", "linear", "wsd") and new > old:
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


# ---- in the loop


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
    rows: RowLog
    meter: Meter
    watch: Watch
    bar: Progress

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Shows the bar and starts the clock; closes the files at the end."""
        with closing(self.metrics), self.rows, self.bar, self.meter:
            yield

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

    def __call__(self, step: int) -> None:
        line, memory = self.meter.line(), memory_gib()
        self.watch.progress(step)
        self.metrics.write("train", step, **line, memory_gib=memory)
        shown = {key: line[key] for key in ("loss", "tokens_per_second", "mfu")}
        self.bar.update(step, **shown, memory=memory)

    def ledger(self, step: int) -> None:
        """Writes and shows where the time of the run went, over all restarts."""
        ledger = self.watch.finish()
        self.metrics.write("goodput", step, **ledger)
        seconds = {k.removesuffix("_seconds"): v for k, v in ledger.items() if "_seconds" in k}
        total = sum(seconds.values())
        shown = sorted(seconds.items(), key=lambda item: -item[1])
        text = ", ".join(f"{p} {value / total:.0%}" for p, value in shown if value >= total / 100)
        restarts = int(ledger["restarts"])
        more = f"; {restarts} restart{'s' * (restarts > 1)}" if restarts else ""
        self.bar.say(f"{timedelta(seconds=round(total))}: {text}{more}")
        if (planned := self.meter.planned) is not None:
            memory, most = planned
            text = f"memory: planned {memory:.2f} GiB a device, used {memory_gib():.2f} GiB"
            mfu = self.meter.mfu
            known = most is not None and mfu is not None
            self.bar.say(text + (f"; MFU: at most {most:.0%}, reached {mfu:.0%}" if known else ""))


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
        outputs = generate(model, self.prompts, self.sampling)
        for prompt, tokens in zip(self.texts, outputs, strict=True):
            metrics.sample(step, prompt=prompt, text=self.tokenizer.decode(tokens))


@dataclass
class Evaluations:
    """Evaluates every held-out set, writes samples, and records the run's best evaluation."""

    program: Program
    sets: dict[str, Rows]
    frozen: Any
    samples: Samples
    log: Log
    best: Best
    latest: dict[str, dict[str, float]] = field(default_factory=dict)
    """{set: {metric: value}}"""
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
        """The state that a checkpoint saves. pending: the resumed run evaluates its step first."""
        return {"best_eval": asdict(self.best), "eval_pending": pending}
