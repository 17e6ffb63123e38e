# SPDX-License-Identifier: Apache-2.0
"""Checks of fields against each other, and defaults that depend on other fields."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxllm.config.fields import installed
from jaxllm.config.optimizers import optimizer_mistakes, schedule_mistakes
from jaxllm.config.schema import from_dict, leaves, to_dict, value_of
from jaxllm.config.sections import TrainConfig
from jaxllm.config.verbs import JUDGING, PEFT_METHODS, unread
from jaxllm.errors import UserError, nearest, together
from jaxllm.paths import as_path, file_size, is_bucket

RANKS = range(4, 65)  # usual ranks; others are often a mistake
# What a run must share with the one that it resumes, besides the keys of the config (identity.py).
IDENTITY = ("data", "eval", "tokenizer", "template", "model_config", "generation_config")
IDENTITY += ("weights", "rewards", "own_objective")


def check(cfg: TrainConfig) -> None:
    """Raise UserError for an invalid value, or for fields that contradict each other."""
    valid = from_dict(to_dict(cfg))
    for key in leaves():
        if (ours := value_of(cfg, key)) != (right := value_of(valid, key)):
            raise UserError(f"{key} is {ours!r}; write {right!r}")
    if messages := list(dict.fromkeys(_contradictions(cfg))):
        raise together([UserError(message) for message in messages])


def check_run(cfg: TrainConfig) -> None:
    """`check` for a run that starts here: its trackers are installed, its folder is writable."""
    check(cfg)
    out = as_path(cfg.output_dir)
    parents = () if is_bucket(cfg.output_dir) else (out, *out.parents)
    there = next((folder for folder in parents if folder.exists()), None)
    if there and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {cfg.output_dir}: {there} is not a writable folder")
    missing = [name for name in cfg.log.report_to if not installed(name)]
    if missing:
        names, extras = " and ".join(missing), ",".join(missing)
        raise UserError(
            f"log.report_to: not installed: {names}; pip install 'jaxllm[{extras}]' or remove it"
        )


def warnings(cfg: TrainConfig, steps: int) -> Iterator[str]:
    """One line for each setting that is valid but unusual in a run of `steps` steps."""
    if cfg.optim.warmup > max(steps, 1):
        is_log = cfg.optim.schedule == "warmup_log"
        done = (steps - 1) / cfg.optim.warmup
        end = math.log(max(steps, 1)) / math.log(cfg.optim.warmup) if is_log else done
        yield (
            f"warning: optim.warmup is {cfg.optim.warmup:g} steps and the run has {steps}, so the "
            f"learning rate ends at {end:.0%} of its peak"
        )
    if cfg.peft.method != "none" and cfg.model.config:
        yield "warning: the adapter is trained on random base weights; `export --merge` saves both"
    ranks = {cfg.peft.r, *cfg.peft.rank_pattern.values()}
    for r in sorted(ranks) if cfg.peft.method == "lora" and not cfg.peft.path else ():
        if r not in RANKS:
            yield f"warning: peft: rank {r} is outside the usual {RANKS[0]} to {RANKS[-1]}"


def _changed(cfg: TrainConfig) -> list[str]:
    return [key for key, leaf in leaves().items() if value_of(cfg, key) != leaf.default]


def _peft_contradictions(cfg: TrainConfig) -> Iterator[str]:
    peft, method = cfg.peft, PEFT_METHODS[cfg.peft.method]
    for key in _changed(cfg):
        name = key.removeprefix("peft.")
        if name == key or name == "method":
            continue
        if peft.method == "none":
            yield f"peft.{name} requires a peft.method: lora, or another one"
        elif name not in (*method.keys, "path", "quantize_base"):
            yield f"peft.{name} is not used by {peft.method}; remove it"
        elif peft.path and name in method.shape:
            yield f"peft.{name} is given by the adapter in peft.path; remove it"
    if peft.path and cfg.model.config:
        yield "peft.path requires model.path, the model that the adapter was trained on"
    if cfg.model.mtp_loss and peft.method != "none":
        yield "model.mtp_loss: an adapter's base is not trained; set it to 0"
    if peft.loraplus_lr_ratio != 1 and cfg.optim.name == "schedule_free_adamw":
        yield "peft.loraplus_lr_ratio is not supported with schedule_free_adamw"


def _align_contradictions(cfg: TrainConfig) -> Iterator[str]:
    align, rl = cfg.align, cfg.rl
    for key, weights, what, weighted in (
        ("align.loss_weights", align.loss_weights, "losses", align.loss),
        ("rl.reward_weights", rl.reward_weights, "rewards", rl.rewards),
    ):
        if weights and weighted and len(weights) != len(weighted):
            yield f"{key} has {len(weights)} weights for {len(weighted)} {what}; give one each"
    smoothed = ("sigmoid", "robust", "exo", "simpo")
    readers = (("align.gamma", ("simpo",)), ("align.label_smoothing", smoothed))
    for key, names in readers if "align.loss" in cfg.verb.reads else ():
        if key in _changed(cfg) and not set(names) & set(align.loss):
            yield f"{key} is used only by the losses {', '.join(names)}; remove it"
    if rl.kl_target and align.beta == 0:
        yield "rl.kl_target scales align.beta, which is 0; set align.beta to another initial value"
    if not align.loss:
        yield "align.loss is empty; give sigmoid, or another loss"
    if not cfg.verb.online:
        return
    if not rl.rewards:
        yield "no reward: give rl.rewards (directory of a reward model, or module:function)"
    if len(set(rl.rewards)) < len(rl.rewards):
        yield "rl.rewards names a reward twice; use rl.reward_weights instead"
    size = resolve(cfg).rl.group_size or 1
    if size < cfg.verb.min_group:
        yield (
            f"rl.group_size is {size}; {cfg.objective} compares the completions of a prompt, so it "
            f"needs {cfg.verb.min_group} or more"
        )


def _eval_contradictions(cfg: TrainConfig) -> Iterator[str]:
    held_out = bool(cfg.data.eval or cfg.data.eval_fraction)
    if cfg.eval_every and not (held_out or cfg.log.samples or cfg.eval.tasks):
        yield "eval_every requires data.eval, data.eval_fraction, eval.tasks or log.samples"
    for key in () if held_out or cfg.eval.tasks else JUDGING:
        if key in _changed(cfg):
            yield f"{key} requires data.eval, data.eval_fraction or eval.tasks"
    for key in () if cfg.eval.tasks else ("eval.tasks_limit", "eval.tasks_path"):
        if key in _changed(cfg):
            yield f"{key} requires eval.tasks"
    if cfg.eval.tasks and find_spec("lm_eval") is None:
        yield "eval.tasks needs lm_eval: pip install 'jaxllm[eval]'"
    if cfg.eval.patience and not cfg.eval_every:
        yield "eval.patience requires eval_every: a number of steps, or epoch"
    if cfg.eval.min_delta and not cfg.eval.patience:
        yield "eval.min_delta requires eval.patience"
    if cfg.save.load_best and not cfg.save.keep_best:
        yield "save.load_best requires save.keep_best"


def _stream_contradictions(cfg: TrainConfig) -> Iterator[str]:
    data = cfg.data
    for source in (s for s in data.train if s.streaming):
        if data.eval_fraction:
            yield f"{source.path}: eval_fraction cannot split a streamed source; use data.eval"
        if not cfg.steps:
            yield f"{source.path}: a streamed source has no known length; set steps"
        for key in ("eval_every", "save.every", "log.every"):
            if value_of(cfg, key) == "epoch":
                yield f"{key} is epoch, but a streamed source has no known length; use steps"
        if source.max_samples:
            yield f"{source.path}: max_samples is not supported with streaming; give fewer files"
        if len(data.train) > 1 and source.weight is None:
            yield f"{source.path}: streamed with other sources; give each source a weight"


def _contradictions(cfg: TrainConfig) -> Iterator[str]:
    yield from _peft_contradictions(cfg)
    model, data, optim = cfg.model, cfg.data, cfg.optim
    if not model.path and not model.config:
        yield "no model: give model.path (its weights) or model.config (random weights)"
    if model.path and model.config:
        yield "model.path and model.config are both given; keep one"
    if model.overrides and not model.config:
        yield "model.overrides requires model.config, since pretrained weights fix the shape"
    if (model.config or "").endswith(".json") and not model.tokenizer:
        yield "model.config is a file without a tokenizer; set model.tokenizer"

    if cfg.output_dir.startswith("~"):  # from Python; load_config expands it
        yield f"output_dir is {cfg.output_dir}; ~ is not expanded here, write the full path"
    if not data.train:
        yield "no data: give data.train"
    yield from _stream_contradictions(cfg)
    if data.date is not None and not _is_date(data.date):
        yield f"data.date is {data.date!r}; write it as YYYY-MM-DD"
    if data.eval and data.eval_fraction:
        yield "data.eval and data.eval_fraction are both given; keep one"
    for key in unread(cfg.objective):
        if key in _changed(cfg):
            yield f"{key} is not used by {cfg.objective}; remove it"
    yield from _eval_contradictions(cfg)
    yield from _align_contradictions(cfg)

    for name in cfg.resume_changed:
        if name not in (names := (*IDENTITY, *leaves())):
            near = nearest(name, names)
            hint = f"did you mean {near}?" if near else f"use {', '.join(IDENTITY)} or a key"
            yield f"resume_changed: {name} is unknown; {hint}"
    if not cfg.batch_size and not cfg.micro_batch_size:
        yield "batch_size is 0, which requires micro_batch_size"
    options = ("zero", "reduce_dtype")
    sizes = {axis: size for axis, size in asdict(cfg.mesh).items() if axis not in options}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            yield f"mesh.{axis} is {size}; it must be 1 or more, or -1 for the remaining devices"
    if list(sizes.values()).count(-1) > 1:
        yield "mesh: only one axis can be -1"

    if optim.schedule == "wsd" and 0 < cfg.steps < optim.decay:
        yield f"optim.decay is {optim.decay:g} steps, more than the run's {cfg.steps}; lower it"
    yield from optimizer_mistakes(optim)
    yield from schedule_mistakes(optim)
    if cfg.save.hub and not cfg.save.final:
        yield "save.hub requires save.final"
    if cfg.save.hub and is_bucket(cfg.output_dir):
        yield "save.hub requires an output_dir on the local disk"
    if cfg.save.hub_private and not cfg.save.hub:
        yield "save.hub_private requires save.hub"


def resolve(
    cfg: TrainConfig, data_parallel: int | None = None, recorded: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Fill in the defaults that depend on other fields: learning rate, beta, rl, date and batch.

    data_parallel: devices that share the rows (mesh axes data x fsdp x expert); None leaves the
    batch unchanged. recorded: `config.json` of the run that is resumed, whose date and batch size
    are kept: a run resumed on other devices changes its accumulation. Resolving twice changes
    nothing. Raises UserError if the batch does not divide.
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
        near = f"{down} or {down + data_parallel}" if down else data_parallel
        raise UserError(
            f"batch_size {batch} does not divide over {data_parallel} devices "
            f"(data x fsdp x expert); use {near}"
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
    rl = cfg.rl
    if cfg.verb.online and rl.group_size and batch * rl.minibatches % rl.group_size:
        raise UserError(
            f"batch_size {batch} x rl.minibatches {rl.minibatches} completions do not divide into "
            f"groups of rl.group_size {rl.group_size}; change one"
        )
    return replace(cfg, batch_size=batch, micro_batch_size=micro, accumulation=0)


def recorded_config(cfg: TrainConfig) -> dict[str, Any]:
    """`config.json` of the run that `cfg` resumes; {} if it resumes none."""
    folder = as_path(cfg.output_dir)
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
    return saved or (metrics.is_file() and file_size(metrics) > 0)


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
