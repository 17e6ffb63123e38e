# SPDX-License-Identifier: Apache-2.0
"""What several fields of a run must agree on, and those that follow from others."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jaxllm.config.schema import (
    TrainConfig,
    leaves,
    to_dict,
    validated,
    value_of,
)
from jaxllm.config.sections import PEFT_METHODS
from jaxllm.config.verbs import JUDGING, unread
from jaxllm.errors import UserError

RANKS = range(4, 65)  # in use; outside them is a slip more often than a wish


def check(cfg: TrainConfig) -> None:
    """Raises ValueError for a value of a wrong type or range, and where fields contradict."""
    valid = validated(to_dict(cfg), {})
    for key in leaves():
        if (ours := value_of(cfg, key)) != (right := value_of(valid, key)):
            raise UserError(f"{key} is {ours!r}; write {right!r}")
    for message in _contradictions(cfg):
        raise UserError(message)


def warnings(cfg: TrainConfig) -> Iterator[str]:
    """What is allowed and yet unusual, one line each."""
    if cfg.peft.method != "none" and cfg.model.config:
        yield "warning: the adapter is trained over random weights; `export --merge` keeps both"
    ranks = {cfg.peft.r, *cfg.peft.rank_pattern.values()}
    for r in sorted(ranks) if cfg.peft.method == "lora" and not cfg.peft.path else ():
        if r not in RANKS:
            yield f"warning: peft: rank {r} is outside the usual {RANKS[0]} to {RANKS[-1]}"


def _peft_contradictions(cfg: TrainConfig) -> Iterator[str]:
    peft, method = cfg.peft, PEFT_METHODS[cfg.peft.method]
    given = [
        key.removeprefix("peft.")
        for key, leaf in leaves().items()
        if key.startswith("peft.") and value_of(cfg, key) != leaf.default
    ]
    for name in given:
        if name == "method":
            continue
        if peft.method == "none":
            yield f"peft.{name} has no meaning without peft.method; say lora, or another"
        elif name not in (*method.keys, "path", "quantize_base"):
            yield f"peft.{name} has no meaning for {peft.method}; leave it out"
        elif peft.path and name in method.shape:
            yield f"peft.{name} is what the adapter of peft.path was made with; leave it out"
    if peft.path and cfg.model.config:
        yield "peft.path is an adapter of some model; give that by model.path"
    if peft.loraplus_lr_ratio != 1 and cfg.optim.name == "schedule_free_adamw":
        yield "peft.loraplus_lr_ratio does not go with schedule_free_adamw"


def _align_contradictions(cfg: TrainConfig) -> Iterator[str]:
    align, rl = cfg.align, cfg.rl
    if align.loss_weights and len(align.loss_weights) != len(align.loss):
        count = len(align.loss_weights)
        yield f"align.loss_weights has {count} weights for {len(align.loss)} losses; give one each"
    smoothed = ("sigmoid", "robust", "exo", "simpo")
    readers = (("align.gamma", ("simpo",)), ("align.label_smoothing", smoothed))
    for key, names in readers if cfg.objective == "dpo" else ():
        if value_of(cfg, key) != leaves()[key].default and not set(names) & set(align.loss):
            yield f"{key} is read by the losses {', '.join(names)} alone; leave it out"
    if cfg.rl.kl_target and align.beta == 0:
        yield "rl.kl_target with align.beta 0: a weight of 0 stays 0; give another to begin with"
    if not align.loss:
        yield "align.loss names no loss; give sigmoid, or another"
    if cfg.verb.head == "score" and cfg.log.samples:
        yield "log.samples has no meaning for reward, which writes nothing; leave it out"
    if not cfg.verb.online:
        return
    size = resolve(cfg).rl.group_size
    if not rl.rewards:
        yield "no reward: give rl.rewards (a reward model's directory, or module:function)"
    if len(set(rl.rewards)) < len(rl.rewards):
        yield "rl.rewards names a reward twice; give it a weight instead"
    if rl.reward_weights and len(rl.reward_weights) != len(rl.rewards):
        count = len(rl.reward_weights)
        yield f"rl.reward_weights has {count} weights for {len(rl.rewards)} rewards; give one each"
    if cfg.objective == "grpo" and size == 1:
        yield "rl.group_size is 1; grpo compares completions of one prompt, so give 2 or more"
    if cfg.data.eval or cfg.data.eval_fraction:
        yield f"data.eval is not read by {cfg.objective}; its rewards are logged as it trains"


def _eval_contradictions(cfg: TrainConfig) -> Iterator[str]:
    held_out = bool(cfg.data.eval or cfg.data.eval_fraction)
    if cfg.eval_every and not (held_out or cfg.log.samples):
        yield "eval_every without data.eval, data.eval_fraction or log.samples; give one of them"
    for key in JUDGING:
        if value_of(cfg, key) != leaves()[key].default and not held_out:
            yield f"{key} without data.eval or data.eval_fraction; give one of them"
    if cfg.eval.patience and not cfg.eval_every:
        yield "eval.patience needs eval_every: a number of steps, or epoch"
    if cfg.eval.min_delta and not cfg.eval.patience:
        yield "eval.min_delta goes with eval.patience; give that too"
    if cfg.save.load_best and not cfg.save.keep_best:
        yield "save.load_best needs save.keep_best"


def _stream_contradictions(cfg: TrainConfig) -> Iterator[str]:
    data = cfg.data
    for source in (s for s in data.train if s.streaming):
        if data.eval_fraction:
            yield f"{source.path}: eval_fraction needs data that is read whole; give data.eval"
        if not cfg.steps:
            yield f"{source.path}: a streamed source has no known length; give steps"
        for key in ("eval_every", "save.every", "log.every"):
            if value_of(cfg, key) == "epoch":
                yield f"{key} epoch: a streamed source has no known epoch; give a number of steps"
        if source.max_samples:
            yield f"{source.path}: max_samples does not go with streaming; name fewer files"
        if len(data.train) > 1 and source.weight is None:
            yield f"{source.path}: a streamed source beside others needs a weight; give all one"


def _contradictions(cfg: TrainConfig) -> Iterator[str]:
    yield from _peft_contradictions(cfg)
    model, data, optim = cfg.model, cfg.data, cfg.optim
    if not model.path and not model.config:
        yield "no model: give model.path (its weights) or model.config (random weights)"
    if model.path and model.config:
        yield "model.path and model.config are both given; keep one"
    if model.overrides and not model.config:
        yield "model.overrides change the shape of random weights; they go with model.config"
    if (model.config or "").endswith(".json") and not model.tokenizer:
        yield "model.config is a file, so model.tokenizer must say where the tokenizer lies"

    if cfg.output_dir.startswith("~"):  # from Python; load_config knows what ~ means
        yield f"output_dir is {cfg.output_dir}; write the home folder out"
    if not data.train:
        yield "no data: give data.train"
    yield from _stream_contradictions(cfg)
    if data.date is not None and not _is_date(data.date):
        yield f"data.date is {data.date!r}; write it as YYYY-MM-DD"
    if data.eval and data.eval_fraction:
        yield "data.eval and data.eval_fraction are both given; keep one"
    for key in unread(cfg.objective):
        if value_of(cfg, key) != leaves()[key].default:
            yield f"{key} has no meaning for {cfg.objective}; leave it out"
    yield from _eval_contradictions(cfg)
    yield from _align_contradictions(cfg)

    if not cfg.batch_size and not cfg.micro_batch_size:
        yield "batch_size is 0, so micro_batch_size must be given"
    sizes = asdict(cfg.mesh)
    sizes.pop("zero")
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            yield f"mesh.{axis} is {size}; it is 1 or more, or -1 for what is left"
        if size != 1 and axis in ("expert", "context"):
            yield f"mesh.{axis} is {size}; nothing is split along it yet, leave it at 1"
    if list(sizes.values()).count(-1) > 1:
        yield "mesh: only one axis may be -1"

    steps = cfg.steps
    if steps and optim.warmup > max(steps, 1):
        yield f"optim.warmup is {optim.warmup:g} steps, longer than the run's {steps}; lower it"
    if steps and optim.schedule == "wsd" and optim.decay >= 1 and optim.decay > steps:
        yield f"optim.decay is {optim.decay:g} steps, longer than the run's {steps}; lower it"


def resolve(
    cfg: TrainConfig, data_parallel: int | None = None, recorded: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Fill in the defaults that depend on other fields: learning rate, beta, rl, date and batch.

    data_parallel: devices that share the rows (mesh axes data x fsdp); None leaves the batch as it
    is. recorded: `config.json` of the run that is resumed, whose date and batch size are kept: a
    run resumed on other devices changes its accumulation. Resolving twice changes nothing. Raises
    UserError if the batch does not divide.
    """
    recorded, verb = recorded or {}, cfg.verb
    rate = cfg.optim.learning_rate or PEFT_METHODS[cfg.peft.method].learning_rate * verb.rate
    beta = verb.beta if cfg.align.beta is None else cfg.align.beta
    rl = {name: value for name, value in verb.rl.items() if getattr(cfg.rl, name) is None}
    date = cfg.data.date
    if date is None and "data.date" not in unread(cfg.objective):
        date = recorded.get("data", {}).get("date") or datetime.date.today().isoformat()
    cfg = replace(
        cfg,
        optim=replace(cfg.optim, learning_rate=rate),
        align=replace(cfg.align, beta=beta),
        rl=replace(cfg.rl, **rl),
        data=replace(cfg.data, date=date),
    )
    return cfg if data_parallel is None else _with_batch(cfg, data_parallel, recorded)


def _with_batch(cfg: TrainConfig, data_parallel: int, recorded: Mapping[str, Any]) -> TrainConfig:
    """Set batch_size and micro_batch_size, so that accumulation follows from them."""
    batch, micro, accumulation = cfg.batch_size, cfg.micro_batch_size, cfg.accumulation
    if not batch and recorded.get("batch_size"):
        batch, accumulation = recorded["batch_size"], 0
    batch = batch or micro * (accumulation or 1) * data_parallel
    if batch % data_parallel:
        down = batch // data_parallel * data_parallel
        near = f"{down} or {down + data_parallel}" if down else f"{data_parallel}"
        raise UserError(
            f"batch_size {batch} does not divide over {data_parallel} devices (data x fsdp); "
            f"use {near}"
        )
    rows = batch // data_parallel
    if accumulation and micro and micro * accumulation != rows:
        raise UserError(
            f"batch_size {batch} is not micro_batch_size {micro} x accumulation {accumulation} x "
            f"{data_parallel} devices = {micro * accumulation * data_parallel}; leave one of them "
            "out"
        )
    if accumulation and rows % accumulation:
        raise UserError(
            f"{rows} rows per device do not divide into accumulation {accumulation}; change one"
        )
    micro = min(micro or rows // (accumulation or 1), rows)
    if rows % micro:
        divisors = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise UserError(
            f"micro_batch_size {micro} does not divide the {rows} rows of each device; "
            f"use one of {divisors}"
        )
    size, rl = cfg.rl.group_size or 1, cfg.rl
    if cfg.verb.online and batch * rl.minibatches % size:
        raise UserError(
            f"batch_size {batch} x rl.minibatches {rl.minibatches} completions do not divide into "
            f"groups of rl.group_size {size}; change one"
        )
    return replace(cfg, batch_size=batch, micro_batch_size=micro, accumulation=0)


def recorded_config(cfg: TrainConfig) -> dict[str, Any]:
    """`config.json` of the run that `cfg` resumes; {} if it resumes none."""
    folder = Path(cfg.output_dir)
    if cfg.overwrite or not has_results(folder):
        return {}
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):  # reported when the run folder is checked
        return {}
    return values if isinstance(values, dict) else {}


def has_results(folder: Path) -> bool:
    """True if a run folder has a checkpoint or a line of metrics."""
    metrics = folder / "metrics.jsonl"
    saved = any((folder / "checkpoints").glob("[0-9]*"))
    return saved or (metrics.is_file() and metrics.stat().st_size > 0)


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
