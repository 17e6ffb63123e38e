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
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import align, hf, reference
from jaxllm.checkpoint import Checkpoints, claim, guard, same_base, same_data
from jaxllm.checks import check, check_groups, resolve_align, resolve_batch, resolve_rate, warnings
from jaxllm.config import ONLINE, TrainConfig, to_dict, tokenizer_path
from jaxllm.data.batch import Batch
from jaxllm.data.chat import prompt_tokens
from jaxllm.data.loader import Rows, load_data, make_loader, summarize
from jaxllm.data.template import asked, with_settings
from jaxllm.evaluate import evaluate, make_eval
from jaxllm.mesh import data_parallel, make_mesh, put
from jaxllm.model import kernels
from jaxllm.monitor.flops import flops_per_token, memory_gib, peak_flops
from jaxllm.monitor.metrics import Metrics, Progress
from jaxllm.objectives.table import OBJECTIVES
from jaxllm.optim import eval_params, make_optimizer, make_schedule
from jaxllm.peft.interop import plan_of, room
from jaxllm.rollout import Sampling, check_prompts, generate
from jaxllm.scoring import load_reward
from jaxllm.step import TrainState, alone, make_step, state_shardings, weight_shardings
from jaxllm.tokenizer import check_vocabulary, load_tokenizer, padded, stop_ids


@dataclass(frozen=True)
class Result:
    """How a run ended: updates done, the last evaluations, and where the model lies."""

    step: int
    stopped: bool
    evals: dict[str, dict[str, float]]
    final: str | None


def total(steps: list[tuple[int, Any]], sums: dict[str, list[float]]) -> dict[str, list[float]]:
    """Adds the metrics of `steps` (read from the device here) to `sums`, in float64.

    Raises ValueError at the first step whose loss or gradient is not finite.
    """
    sums = {name: list(pair) for name, pair in sums.items()}
    for step, metrics in zip(
        [s for s, _ in steps], jax.device_get([m for _, m in steps]), strict=True
    ):
        for name, (value, weight) in metrics.items():
            if name in ("loss", "grad_norm") and not np.isfinite(value):
                raise ValueError(
                    f"step {step}: {name} is {value}; the last good checkpoint is kept. A lower "
                    "optim.learning_rate, a longer optim.warmup or optim.clip may help"
                )
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0] += float(value)
            pair[1] += float(weight)
    return sums


def averages(sums: dict[str, list[float]], seconds: float) -> dict[str, float]:
    """One line of metrics.jsonl from sums over updates, without what there was none of; loss is
    token-weighted."""
    steps = sums["grad_norm"][1]
    values = {k: a / w for k, (a, w) in sums.items() if w}
    values |= {k: sums[k][0] for k in ("tokens", "loss") if k not in values}
    return values | {
        "tokens_per_second": values["tokens"] / max(seconds, 1e-9),
        "step_seconds": seconds / steps,
    }


def sample_prompts(cfg: TrainConfig, tokenizer: Any) -> list[list[int]]:
    """Tokens of `log.samples`: texts to continue, or of what chats, questions to answer."""
    if cfg.objective == "pretrain":
        return [tokenizer(text).input_ids for text in cfg.log.samples]
    chats = [[{"role": "user", "content": text}] for text in cfg.log.samples]
    date = cfg.data.date
    return [prompt_tokens(tokenizer, asked(tokenizer, m), date=date).tolist() for m in chats]


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
    if cfg.objective in ONLINE:
        return align.online_steps(cfg, rows), align.updates_per_rollout(cfg)
    return cfg.steps or math.ceil(Fraction(str(cfg.epochs)) * rows / cfg.batch_size), 1


def due(every: int, step: int, each: int) -> bool:
    """Whether what happens every so many steps does after this one, the last of `each`."""
    return bool(every) and step % each == 0 and step // every > (step - each) // every


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
    # ---- what a mistake can be in: the run folder, devices, tokenizer, data
    check(cfg)
    mesh = make_mesh(cfg.mesh)
    cfg = resolve_align(resolve_rate(resolve_batch(cfg, data_parallel(mesh))))
    check_groups(cfg)
    model_cfg = hf.model_config(cfg)[0]
    peft = plan_of(model_cfg, hf.started_from(cfg))
    tokenizer = with_settings(load_tokenizer(tokenizer_path(cfg)), cfg.data)
    tokenizer = padded(tokenizer) if model_cfg.scores else tokenizer
    check_vocabulary(tokenizer, model_cfg.vocab_size)
    online = cfg.objective in ONLINE
    positions = room(model_cfg, peft, cfg.data.max_length, online * cfg.rl.max_new_tokens)
    sampling = Sampling(cfg.log.sample_tokens, stop_ids=stop_ids(tokenizer))
    prompts = sample_prompts(cfg, tokenizer)
    if prompts:
        check_prompts(positions, prompts, sampling)
    replaces = guard(cfg)
    data = load_data(cfg, tokenizer)
    assert data.train is not None  # check() has seen data.train
    say(*summarize(data.manifest), *warnings(cfg), *kernels.notes(mesh.size))
    count = cfg.batch_size // (cfg.micro_batch_size * data_parallel(mesh))
    objective = OBJECTIVES[cfg.objective](cfg)
    steps, each = updates(cfg, len(data.train))
    schedule = make_schedule(cfg.optim, steps)
    optimizer = make_optimizer(cfg.optim, schedule, {"b": cfg.peft.loraplus_lr_ratio})

    # ---- the model: sharded arrays, or their shapes alone where a checkpoint will fill them
    run = Path(cfg.output_dir)
    keep = {"keep": cfg.save.keep, "keep_best": cfg.save.keep_best}
    open_run = partial(Checkpoints, run / "checkpoints", **keep)
    saves = None if replaces else open_run()
    at = saves.latest() if saves and cfg.resume else None
    loaded = peft.frozen or objective.compares  # what training leaves as it is comes from the files
    base = (hf.beginning if objective.compares else hf.identity)(cfg) if loaded else None
    if saves and at is not None:
        same_data(run, data.manifest)
        same_base(saves, at, base)
    load = partial(
        hf.load_model if at is None or loaded else hf.blank_model,
        cfg
        if at is None or objective.compares
        else replace(cfg, peft=replace(cfg.peft, path=None)),
        mesh,
        peft=peft,
        compute_dtype=cfg.model.compute_dtype,
        remat=cfg.model.remat,
        scan_unroll=cfg.model.scan_unroll,
    )
    model = load()
    rewards = [load_reward(name, mesh, cfg.model.compute_dtype) for name in cfg.rl.rewards]

    claim(cfg, empty=replaces)  # an old run goes now that nothing can be wrong with the new one
    saves = saves or open_run()
    if at is None:
        hf.save_start(model, run / hf.START, tokenizer, cfg.peft.path)

    # ---- optimizer, state, the step
    say(*peft.summary(model))
    if cfg.objective == "ppo":
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

    def begin(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    meta: dict[str, Any] = {"sums": {}, "best": float("inf"), "seconds": 0.0, "feed": {}}
    with jax.set_mesh(mesh):
        if at is None:
            params = jax.device_put(params, param_lay)
            state = jax.jit(begin, out_shardings=lay, donate_argnums=0)(params)
        else:
            like = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                jax.eval_shape(begin, params),
                lay,
            )
            state, meta = saves.restore(at, like), meta | saves.meta(at)
    sums, best = meta["sums"], meta["best"]
    del model, weights, params, rest  # the state owns the buffers: they are donated
    start = at or 0
    metrics = Metrics(run, report_to=cfg.log.report_to, config=to_dict(cfg), resume_step=start)
    metrics.manifest(data.manifest)
    peak = peak_flops(jax.devices()[0], cfg.model.compute_dtype)
    per_token = flops_per_token(model_cfg, cfg.data.max_length, frozen=peft.frozen)

    # ---- what happens every so many steps
    evals: dict[str, dict[str, float]] = {}
    window: list[tuple[int, Any]] = []  # steps whose metrics are still on the device
    clock = time.perf_counter() - meta["seconds"]

    def read() -> None:
        """Waits for the steps so far. Raises when one is not finite, so that none such is saved."""
        nonlocal sums, window
        sums, window = total(window, sums), []

    def log(step: int) -> None:
        nonlocal sums, clock
        read()
        now = time.perf_counter()
        line = averages(sums, now - clock)
        sums, clock = {}, now
        rate = line["tokens_per_second"]
        mfu = rate * per_token / (peak * mesh.size) if peak else None
        memory = memory_gib()
        metrics.write("train", step, **line, mfu=mfu, memory_gib=memory)
        bar.update(step, loss=line["loss"], tokens_per_second=rate, mfu=mfu, memory=memory)

    def run_evals(step: int) -> float | None:
        trained = eval_params(state.opt_state, state.trainable)
        for name, held_out in data.evals.items():
            evals[name] = evaluate(
                eval_fn, trained, frozen, [held_out], mesh=mesh, batch_size=cfg.batch_size // count
            )
            metrics.write("eval", step, name=name, **evals[name])
            bar.say(f"step {step}  {name}: loss {evals[name]['loss']:.4f}")
        if prompts:
            made = generate(models(trained, frozen)[0], prompts, sampling)
            for prompt, tokens in zip(cfg.log.samples, made, strict=True):
                metrics.sample(step, prompt=prompt, text=tokenizer.decode(tokens))
        losses = [e["loss"] for e in evals.values()]
        return sum(losses) / len(losses) if losses else None

    # ---- the loop
    bar = Progress(steps, start, enabled=cfg.log.progress)
    source: Any = align.Rollouts if online else LoadedBatches
    feed = source(cfg, mesh, data.train, count, start)
    if online:
        feed.begin(models, frozen, rewards, tokenizer, metrics.sample)
    feed.restore(meta["feed"])
    step, logged = start, False
    # Whatever ends the loop, the checkpoint on its way is written out.
    with closing(saves), closing(metrics), jax.set_mesh(mesh), stop_signal() as stopping, bar:
        for step in range(start + 1, steps + 1):
            batch, seen = feed(step - 1, state.trainable)
            state, step_metrics = step_fn(state, frozen, batch)
            if logged:
                log(step - 1)  # with this step under way, so that the device need not wait
            window.append((step, step_metrics | seen))
            whole = step % each == 0
            # Read once: a signal during the step waits for the next.
            stop = whole and stopping.is_set()
            last = step == steps or stop
            logged = step % cfg.log.every == 0 or last
            evaluated = due(cfg.eval_every, step, each) or step == steps
            saved = due(cfg.save.every, step, each) or last
            if not (evaluated or saved):
                continue
            log(step) if logged else read()
            logged, pause = False, time.perf_counter()
            eval_loss = run_evals(step) if evaluated and (not stop or step == steps) else None
            better = eval_loss is not None and eval_loss < best
            best = best if eval_loss is None else min(best, eval_loss)
            if saved or (cfg.save.keep_best and better):
                kept = {"sums": sums, "seconds": pause - clock, "best": best, "base": base}
                kept["feed"] = feed.state()
                saves.save(step, state, meta=kept, eval_loss=eval_loss)
            clock += time.perf_counter() - pause  # tokens/s is of training alone
            if stop:
                break
    stopped, final = step < steps, None
    if cfg.save.final and not stopped:
        final = str(run / "final")
        whole = models(eval_params(state.opt_state, state.trainable), frozen)[0]
        if peft.frozen:
            hf.save_adapter(whole, final, tokenizer)
        else:
            hf.save_hf(whole, final, dtype=cfg.save.dtype, tokenizer=tokenizer)
    return Result(step, stopped, evals, final)
