# SPDX-License-Identifier: Apache-2.0
"""The training loop, whole: every objective runs this function from top to bottom.

Dims: A micro-batches of an update, B rows, T tokens.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import hf, reference
from jaxllm.checkpoint import Checkpoints, claim, guard, same_base, same_data
from jaxllm.compilation import use_cache
from jaxllm.config import TrainConfig, to_dict, tokenizer_path
from jaxllm.config.checks import check, recorded_config, resolve, warnings
from jaxllm.data.batch import Batch
from jaxllm.data.chat import prompt_tokens
from jaxllm.data.loader import Rows, load_data, make_loader, summarize
from jaxllm.data.template import apply_user_template, with_settings
from jaxllm.evaluate import Best, Eval, evaluate, judged, make_eval, metric_names
from jaxllm.mesh import data_parallel, make_mesh, put
from jaxllm.monitor.flops import memory_gib, peak_flops, run_flops
from jaxllm.monitor.metrics import Meter, Metrics, Progress
from jaxllm.objectives.table import OBJECTIVES
from jaxllm.ops import attention
from jaxllm.optim import eval_params, make_optimizer, make_schedule
from jaxllm.peft.interop import plan_of, room
from jaxllm.rl import online as align
from jaxllm.rl.rewards import load_reward
from jaxllm.sampling import Sampling, check_prompts, generate
from jaxllm.step import TrainState, alone, make_step, state_shardings, weight_shardings
from jaxllm.tokenizer import check_vocabulary, load_tokenizer, padded, stop_ids


@dataclass(frozen=True)
class Result:
    """How a run ended: updates done, the last evaluations, and where the model lies."""

    step: int
    stopped: bool
    """by a signal: the run is to go on"""
    early: bool
    """for lack of a better evaluation: the run is done"""
    best: Best
    evals: dict[str, dict[str, float]]
    final: str | None


def sample_prompts(cfg: TrainConfig, tokenizer: Any) -> list[list[int]]:
    """Tokens of `log.samples`: texts to continue, or of what chats, questions to answer."""
    if cfg.verb.data == "text":
        return [tokenizer(text).input_ids for text in cfg.log.samples]
    chats = [[{"role": "user", "content": text}] for text in cfg.log.samples]
    date = cfg.data.date
    return [
        prompt_tokens(tokenizer, apply_user_template(tokenizer, m), date=date).tolist()
        for m in chats
    ]


def say(*lines: str) -> None:
    """Tells the user something, a line each."""
    for line in lines:
        print(line, file=sys.stderr)


class LoadedBatches:
    """The batches of a run on data, in their order: `(step, weights) -> (batch [A, B, T], {})`."""

    def __init__(self, cfg: TrainConfig, mesh: Mesh, rows: Rows, count: int, start: int):
        sizes = {"batch_size": cfg.batch_size, "micro_batches": count}
        self.batches = make_loader(rows, **sizes, seed=cfg.seed, start_step=start)
        self.mesh = mesh

    def __call__(self, step: int, trainable: Any) -> tuple[Batch, dict[str, Any]]:
        return Batch(**put(self.mesh, next(self.batches))), {}

    def state(self) -> dict[str, Any]:
        """Nothing: where the data goes on follows from the step."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint was."""


def updates(cfg: TrainConfig, rows: int) -> tuple[int, int]:
    """(updates of a run over so many rows, how many of them at a time: it is saved and stopped
    between these only). Every row is learned: the last update goes on into the next epoch."""
    if cfg.verb.online:
        return align.online_steps(cfg, rows), align.updates_per_rollout(cfg)
    return cfg.steps or math.ceil(Fraction(str(cfg.epochs)) * rows / cfg.batch_size), 1


def interval(cfg: TrainConfig, every: int | str, rows: int) -> int | Fraction:
    """Steps between two events: `every` itself, or of an epoch over so many rows, which may end
    within a step."""
    if every != "epoch":
        return int(every)
    if cfg.verb.online:
        made = Fraction(rows * (cfg.rl.group_size or 1), cfg.batch_size * cfg.rl.minibatches)
        return made * align.updates_per_rollout(cfg)
    return Fraction(rows, cfg.batch_size)


def due(every: int | Fraction, step: int, each: int = 1) -> bool:
    """True if a multiple of `every` falls in the last `each` steps up to `step`; 0: never."""
    return bool(every) and step % each == 0 and step // every > (step - each) // every


def check_metric(
    cfg: TrainConfig, eval_fn: Eval, trainable: Any, frozen: Any, evals: dict[str, Rows]
) -> None:
    """Raises ValueError when evaluations will not log eval.metric, before anything is computed."""
    if evals and cfg.eval.metric not in ("loss", "eval_loss"):
        names = {
            name: dict.fromkeys(metric_names(eval_fn, trainable, frozen, rows, 1), 0.0)
            for name, rows in evals.items()
        }
        judged(names, cfg.eval)


def begin(optimizer: Any, params: Any, lay: Any, saves: Checkpoints, at: int | None) -> TrainState:
    """The state of update 0 with these weights, which are donated, or that of checkpoint `at`."""

    def fresh(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    if at is None:
        params = jax.device_put(params, lay.trainable)
        return jax.jit(fresh, out_shardings=lay, donate_argnums=0)(params)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(fresh, params),
        lay,
    )
    return saves.restore(at, like)


def best_kept(saves: Checkpoints, best: Best, cfg: TrainConfig) -> Best:
    """`best` of the run that goes on, whose checkpoint may be gone: then the next is the best."""
    if best.step is None or not cfg.save.keep_best or saves.is_good(best.step):
        return best
    last = ", or else the last weights" if cfg.save.load_best else ""
    say(
        f"warning: checkpoint {best.step}, of the best evaluation so far, is not there or broken; "
        f"the best is now that of the evaluations to come{last}"
    )
    return Best(waited=best.waited)


def compiled(step_fn: Any, bar: Progress, *arguments: Any) -> Any:
    """The jitted step as a program for arguments of these shapes; says how long that took."""
    bar.compiling()
    began = time.perf_counter()
    program = step_fn.lower(*arguments).compile()
    bar.compiled(time.perf_counter() - began)
    return program


def shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@contextmanager
def stop_signal():
    """Yields a threading.Event that SIGTERM and SIGINT set, so that the loop ends at a step."""
    event = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    names = (signal.SIGTERM, signal.SIGINT) if main else ()
    before = {name: signal.signal(name, lambda *_: event.set()) for name in names}
    try:
        yield event
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def train(cfg: TrainConfig) -> Result:
    """Runs `cfg` to its end or a signal, from the newest good checkpoint if there is one.

    Raises ValueError for a user's mistake before anything compiles, and when a loss or a gradient
    is not finite.
    """
    # ---- validate the run folder, devices, tokenizer and data
    check(cfg)
    mesh = make_mesh(cfg.mesh)
    cfg = resolve(cfg, data_parallel(mesh), recorded_config(cfg))
    model_cfg = hf.model_config(cfg)[0]
    peft = plan_of(model_cfg, hf.started_from(cfg))
    tokenizer = with_settings(load_tokenizer(tokenizer_path(cfg)), cfg.data)
    tokenizer = padded(tokenizer) if model_cfg.scores else tokenizer
    check_vocabulary(tokenizer, model_cfg.vocab_size)
    online = cfg.verb.online
    positions = room(model_cfg, peft, cfg.data.max_length, online * cfg.rl.max_new_tokens)
    sampling = Sampling(cfg.log.sample_tokens, stop_ids=stop_ids(tokenizer))
    prompts = sample_prompts(cfg, tokenizer)
    if prompts:
        check_prompts(positions, prompts, sampling)
    replaces = guard(cfg)
    use_cache(cfg.log.compile_cache)
    data = load_data(cfg, tokenizer)
    assert data.train is not None  # check() has seen data.train
    kernel = attention.notes(
        mesh,
        cfg.model.attention,
        dtype=cfg.model.compute_dtype,
        softcap=model_cfg.attention_softcap,
    )
    say(*summarize(data.manifest), *warnings(cfg), *kernel)
    count = cfg.batch_size // (cfg.micro_batch_size * data_parallel(mesh))
    objective = OBJECTIVES[cfg.objective](cfg)
    rows = len(data.train)
    steps, each = updates(cfg, rows)
    schedule = make_schedule(cfg.optim, steps)
    optimizer = make_optimizer(cfg.optim, schedule, {"b": cfg.peft.loraplus_lr_ratio})

    # ---- the model: sharded arrays, or their shapes alone where a checkpoint will fill them
    run = Path(cfg.output_dir)
    open_run = partial(Checkpoints, run / "checkpoints", cfg.save.keep)
    saves = None if replaces else open_run()
    at = saves.latest() if saves and cfg.resume else None
    loaded = peft.frozen or objective.compares  # what training leaves as it is comes from the files
    base = (hf.beginning if objective.compares else hf.identity)(cfg) if loaded else None
    if saves and at is not None:
        same_data(run, data.manifest)
        same_base(saves, at, base)
    resumed = at is not None and not objective.compares
    load = partial(
        hf.load_model if at is None or loaded else hf.blank_model,
        replace(cfg, peft=replace(cfg.peft, path=None)) if resumed else cfg,
        mesh,
        peft=peft,
        compute_dtype=cfg.model.compute_dtype,
        remat=cfg.model.remat,
        scan_unroll=cfg.model.scan_unroll,
    )
    model = load()
    rewards = [load_reward(name, mesh, cfg.model.compute_dtype) for name in cfg.rl.rewards]

    # ---- optimizer, state, the step
    say(*peft.summary(model))
    if cfg.verb.critic:
        align.add_critic(model, cfg, load)
    graph, weights, rest = nnx.split(model, align.trained_by(peft), ...)
    frozen_lay = weight_shardings(rest, mesh, whole=cfg.mesh.zero < 3)
    params, frozen = nnx.to_pure_dict(weights), jax.device_put(nnx.to_pure_dict(rest), frozen_lay)
    param_lay, grad_lay, opt_lay = state_shardings(weights, optimizer, mesh, cfg.mesh.zero)
    lay: Any = TrainState(NamedSharding(mesh, P()), param_lay, opt_lay)  # type: ignore[arg-type]
    models = alone(graph)
    if objective.compares:
        copied = weight_shardings(weights, mesh, whole=False)
        models, frozen = reference.beside(cfg, model, graph, params, frozen, copied)
    if objective.compares and cfg.align.reference == "precomputed":
        data = reference.precomputed(cfg, data, models, params, frozen, mesh)
        models, frozen = alone(graph), frozen["weights"]
    step_fn = jax.jit(
        make_step(
            models,
            objective.loss,
            optimizer,
            schedule,
            baseline=objective.baseline,
            max_norm=cfg.optim.clip,
            seed=cfg.seed,
            gradient_shardings=grad_lay if mesh.size > 1 else None,
        ),
        donate_argnums=0,
        out_shardings=(lay, None),
    )
    eval_fn = make_eval(models, objective.loss, objective.baseline)
    check_metric(cfg, eval_fn, params, frozen, data.evals)

    # ---- the run folder, and what is in it of this run
    claim(cfg, empty=replaces)  # an old run goes now that nothing can be wrong with the new one
    saves = saves or open_run()
    if at is None:
        hf.save_start(model, run / hf.START, tokenizer, cfg.peft.path)
    meta: dict[str, Any] = {"sums": {}, "seconds": 0.0, "feed": {}, "best_eval": {}}
    with jax.set_mesh(mesh):
        state = begin(optimizer, params, lay, saves, at)
    meta |= {} if at is None else saves.meta(at)
    eval_pending = meta.get("eval_pending", False)  # by the signal that stopped the run
    del model, weights, params, rest  # the state owns the buffers: they are donated
    start = at or 0
    metrics = Metrics(run, cfg.log.report_to, to_dict(cfg), start, eval_pending)
    metrics.manifest(data.manifest)
    peak = peak_flops(jax.devices()[0], cfg.model.compute_dtype)

    against = {"compares": objective.compares, "baseline": objective.baseline is not None}
    update_flops = partial(run_flops, cfg, model_cfg, frozen=peft.frozen, **against)

    # ---- what happens every so many steps
    def run_evals(step: int, state: TrainState, best: Best) -> Best:
        weights = eval_params(state.opt_state, state.trainable)
        size = cfg.batch_size // count
        for name, held_out in data.evals.items():
            sets = [held_out]
            evals[name] = evaluate(eval_fn, weights, frozen, sets, mesh=mesh, batch_size=size)
            metrics.write("eval", step, name=name, **evals[name])
            bar.say(f"step {step}  {name}: loss {evals[name]['loss']:.4f}")
        if prompts:
            made = generate(models(weights, frozen)[0], prompts, sampling)
            for prompt, tokens in zip(cfg.log.samples, made, strict=True):
                metrics.sample(step, prompt=prompt, text=tokenizer.decode(tokens))
        return best.after_evals(step, evals, cfg.eval)

    def log(step: int) -> None:
        line, memory = meter.line(), memory_gib()
        metrics.write("train", step, **line, memory_gib=memory)
        shown = {k: line[k] for k in ("loss", "tokens_per_second", "mfu")}
        bar.update(step, **shown, memory=memory)

    # ---- the loop
    named = (cfg.log.every, cfg.eval_every, cfg.save.every)
    log_every, eval_every, save_every = (interval(cfg, x, rows) for x in named)
    evals: dict[str, dict[str, float]] = {}
    bar = Progress(steps, start, enabled=cfg.log.progress)
    source: Any = align.Rollouts if online else LoadedBatches
    feed = source(cfg, mesh, data.train, count, start)
    if online:
        feed.begin(models, frozen, rewards, tokenizer, metrics.sample)
    feed.restore(meta["feed"])
    best = best_kept(saves, Best(**meta["best_eval"]), cfg)
    step, logged, stop = start, False, False
    meter = Meter(meta["sums"], meta["seconds"], peak and peak * mesh.size)
    # Whatever ends the loop, the checkpoint on its way is written out.
    with closing(saves), closing(metrics), jax.set_mesh(mesh), stop_signal() as halting, bar, meter:
        if eval_pending:
            with meter.paused():
                best = run_evals(step, state, best)
            known = {"best_eval": asdict(best), "eval_pending": False}
            saves.amend(step, known, best.step if cfg.save.keep_best else None)
        while step < steps and not stop and not best.is_over(cfg.eval):
            step += 1
            batch, seen = feed(step - 1, state.trainable)
            if step == start + 1:
                with meter.paused():
                    step_fn = compiled(step_fn, bar, state, frozen, batch)
                meter.flops = update_flops(batch.shape[-1])
            state, step_metrics = step_fn(state, frozen, batch)
            if logged:
                log(step - 1)  # with this step under way, so that the device need not wait
            meter.add(step, step_metrics | seen)
            whole = step % each == 0
            # Read once: a signal during the step waits for the next.
            stop = whole and halting.is_set()
            last = step == steps or stop
            logged = due(log_every, step) or last
            wanted = step == steps or due(eval_every, step, each)
            eval_pending = wanted and stop and step < steps
            evaluated = wanted and not eval_pending
            saved = due(save_every, step, each) or last
            if not (evaluated or saved):
                continue
            log(step) if logged else meter.read()
            with meter.paused():
                best = run_evals(step, state, best) if evaluated else best
                over = best.is_over(cfg.eval)
                if over and not logged:
                    log(step)
                if saved or over or (cfg.save.keep_best and best.step == step):
                    kept = {"sums": meter.sums, "seconds": meter.seconds, "feed": feed.state()}
                    kept |= {"best_eval": asdict(best), "eval_pending": eval_pending, "base": base}
                    saves.save(step, state, kept, best.step if cfg.save.keep_best else None)
            logged = False
        stopped = stop and step < steps
        if cfg.save.load_best and cfg.save.final and not stopped and best.step not in (None, step):
            like = jax.tree.map(shape_of, state)
            del state  # the best one takes its place in memory
            state = saves.restore(best.step, like)
    final = None
    if cfg.save.final and not stopped:
        final = str(run / "final")
        model = models(eval_params(state.opt_state, state.trainable), frozen)[0]
        if peft.frozen:
            hf.save_adapter(model, final, tokenizer)
        else:
            hf.save_hf(model, final, dtype=cfg.save.dtype, tokenizer=tokenizer)
    return Result(step, stopped, step < steps and not stopped, best, evals, final)
