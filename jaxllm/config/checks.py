# SPDX-License-Identifier: Apache-2.0
"""What several fields of a run must agree on, and those that follow from others."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
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
    size = resolve_align(cfg).rl.group_size
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


def check_groups(cfg: TrainConfig) -> None:
    """Raises ValueError for a batch that is no whole groups, once batch_size is resolved."""
    size, rl = cfg.rl.group_size or 1, cfg.rl
    if cfg.verb.online and cfg.batch_size * rl.minibatches % size:
        raise UserError(
            f"batch_size {cfg.batch_size} x rl.minibatches {rl.minibatches} completions are no "
            f"whole groups of rl.group_size {size}; change one"
        )


def resolve_align(cfg: TrainConfig) -> TrainConfig:
    """Fixes what align and rl left to the objective."""
    align = cfg.align
    if align.beta is None:
        align = replace(align, beta=cfg.verb.beta)
    given = {k: v for k, v in asdict(cfg.rl).items() if v is not None}
    rl = replace(cfg.rl, **{**cfg.verb.rl, **given})
    return replace(cfg, align=align, rl=rl)


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


def resolve_rate(cfg: TrainConfig) -> TrainConfig:
    """Fixes optim.learning_rate where it was left out: by what is trained, and for what."""
    usual = PEFT_METHODS[cfg.peft.method].learning_rate * cfg.verb.rate
    rate = cfg.optim.learning_rate or usual
    return replace(cfg, optim=replace(cfg.optim, learning_rate=rate))


def resolve_batch(cfg: TrainConfig, data_devices: int) -> TrainConfig:
    """Fixes batch_size and micro_batch_size for the devices that share the rows (data x fsdp).

    With batch_size 0 it is micro_batch_size x accumulation x devices, once: a run that is resumed
    on other devices keeps the batch_size of its config.json and changes its accumulation. Raises
    ValueError when the batch does not divide.
    """
    batch, micro, count = cfg.batch_size, cfg.micro_batch_size, cfg.accumulation
    if not batch and (recorded := _recorded(cfg).get("batch_size")):
        batch, count = recorded, 0
    batch = batch or micro * (count or 1) * data_devices
    if batch % data_devices:
        down = batch // data_devices * data_devices
        near = f"{down} or {down + data_devices}" if down else f"{data_devices}"
        raise UserError(
            f"batch_size {batch} does not divide over {data_devices} devices (data x fsdp); "
            f"use {near}"
        )
    rows = batch // data_devices
    if count and micro and micro * count != rows:
        raise UserError(
            f"batch_size {batch} is not micro_batch_size {micro} x accumulation {count} x "
            f"{data_devices} devices = {micro * count * data_devices}; leave one of them out"
        )
    if count and rows % count:
        raise UserError(
            f"{rows} rows per device do not divide into accumulation {count}; change one"
        )
    micro = min(micro or rows // (count or 1), rows)
    if rows % micro:
        fits = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise UserError(
            f"micro_batch_size {micro} does not divide the {rows} rows of each device; "
            f"use one of {fits}"
        )
    return replace(cfg, batch_size=batch, micro_batch_size=micro, accumulation=0)


def resolve_date(cfg: TrainConfig) -> TrainConfig:
    """Fixes data.date where it is read and was left out: what the run that goes on has recorded,
    else today."""
    if "data.date" in unread(cfg.objective):
        return cfg
    date = cfg.data.date or _recorded(cfg).get("data", {}).get("date")
    date = date or datetime.date.today().isoformat()
    return replace(cfg, data=replace(cfg.data, date=date))


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _recorded(cfg: TrainConfig) -> dict[str, Any]:
    """config.json of the run in output_dir whose results this one goes on with; {} when none."""
    run = Path(cfg.output_dir)
    file, metrics = run / "config.json", run / "metrics.jsonl"
    begun = any(run.glob("checkpoints/[0-9]*")) or (metrics.is_file() and metrics.stat().st_size)
    try:
        found = json.loads(file.read_text()) if begun and not cfg.overwrite else {}
    except (OSError, ValueError):  # checkpoint.guard names it
        return {}
    return found if isinstance(found, dict) else {}
