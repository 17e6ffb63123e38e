# SPDX-License-Identifier: Apache-2.0
"""Keys of a DeepSpeed JSON file: each is translated, refused, or reported as ignored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.config.fields import Given
from jaxllm.errors import UserError
from jaxllm.untrusted import read_json

CARRIED = {
    "zero_optimization.stage": "mesh.zero",
    "gradient_clipping": "optim.clip",
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "accumulation",
    "optimizer.params.lr": "optim.learning_rate",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "scheduler.params.warmup_max_lr": "optim.learning_rate",
    "scheduler.params.warmup_num_steps": "optim.warmup",
    "scheduler.params.cos_min_ratio": "optim.final",
}
DEEPSPEED_OPTIMIZERS = {"Adam": "adamw", "AdamW": "adamw", "Lion": "lion", "SGD": "sgd"}
DEEPSPEED_SCHEDULES = {
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
# WarmupLR is `constant` in transformers; the DeepSpeed file decides the shape of the warmup.
AGREE = (("optim.schedule", "constant", "warmup_log"),)
UNSET = (None, False, "auto", "none")


def _flat(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_deepspeed(path: str, given: dict[str, Given]) -> tuple[dict[str, Given], list[str]]:
    """Translate a DeepSpeed JSON file; returns (our keys, ignored keys).

    given: the keys that the config file and flags set; "auto" leaves a key to them. Raises
    UserError if the file contradicts `given`, enables fp16, or names an unknown optimizer or
    schedule.
    """
    block = read_json(Path(path), "DeepSpeed file")
    rest = dict(_flat(block))
    if "zero_optimization" in block:
        rest.setdefault("zero_optimization.stage", 0)
    asked: dict[str, tuple[str, Any]] = {}  # our key -> (theirs, value)
    try:
        for key, theirs, value in _translated(rest, given):
            if value in (None, "auto"):
                continue
            other, before = asked.setdefault(key, (theirs, value))
            if before != value:
                raise UserError(f"{other} is {before!r} but {theirs} is {value!r}; make them agree")
        if "micro_batch_size" in asked and "batch_size" not in given:
            asked.setdefault("batch_size", (asked["micro_batch_size"][0], 0))
        for key in (key for key in asked if key in given):
            _check_agreement(key, *asked[key], given[key])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for part in ("fp16", "zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        if part == "fp16" or rest.get(f"{part}.device") in UNSET:
            rest = {key: value for key, value in rest.items() if not key.startswith(f"{part}.")}
    ignored = [key for key, value in rest.items() if value not in UNSET]
    ours = {k: Given(k, value, f"{path}: {theirs}") for k, (theirs, value) in asked.items()}
    return ours, [f"{path}: {', '.join(ignored)}"] if ignored else []


def _check_agreement(key: str, theirs: str, value: Any, given: Given) -> None:
    agree = given.value == value or (key, given.value, value) in AGREE
    if agree or (key == "batch_size" and 0 in (given.value, value)):  # given by the micro-batches
        return
    raise UserError(
        f"{theirs} is {value!r} but {given.where} sets {key} to {given.value!r}; make them agree, "
        'or write "auto" in the file'
    )


def _translated(rest: dict[str, Any], given: dict[str, Given]) -> Iterator[tuple[str, str, Any]]:
    """(our key, theirs, value) of each key with a meaning here, which is removed from `rest`."""
    if rest.get("fp16.enabled") is True:
        raise UserError("fp16 is not supported, since it needs loss scaling; enable bf16")
    if (bf16 := rest.pop("bf16.enabled", "auto")) != "auto":
        yield "model.compute_dtype", "bf16.enabled", "bfloat16" if bf16 else "float32"
    if (kind := rest.pop("optimizer.type", None)) is not None:
        name = _choose("optimizer.type", kind, DEEPSPEED_OPTIMIZERS)
        if rest.pop("optimizer.params.adam_w_mode", True) is False and name == "adamw":
            name = "adam"  # weight decay is added to the gradient
        yield "optim.name", "optimizer.type", name
        betas = rest.pop("optimizer.params.betas", "auto")
        if betas != "auto":
            if not isinstance(betas, list) or len(betas) != 2:
                raise UserError(f"optimizer.params.betas is {betas!r}; must be two numbers")
            yield "optim.b1", "optimizer.params.betas", betas[0]
            yield "optim.b2", "optimizer.params.betas", betas[1]
    if (kind := rest.pop("scheduler.type", None)) is not None:
        schedule = _choose("scheduler.type", kind, DEEPSPEED_SCHEDULES)
        yield "optim.schedule", "scheduler.type", _scheduler(schedule, rest, given)
    if rest.get("zero_optimization.offload_optimizer.device") == "cpu":
        del rest["zero_optimization.offload_optimizer.device"]
        rest.pop("zero_optimization.offload_optimizer.pin_memory", None)
        yield "optim.offload", "zero_optimization.offload_optimizer.device", True
    for theirs, ours in CARRIED.items():
        yield ours, theirs, rest.pop(theirs, None)


def _scheduler(schedule: str, rest: dict[str, Any], given: dict[str, Given]) -> str:
    """Set DeepSpeed's defaults in `rest`; returns our name of the schedule."""
    params = "scheduler.params."
    warmup = rest.pop(f"{params}warmup_type", "log")
    if warmup == "log" and schedule == "constant":
        schedule = "warmup_log"
    elif warmup == "log":
        rest[f"{params}warmup_type log (the warmup is linear)"] = True
    if "optim.warmup" not in given:
        rest.setdefault(f"{params}warmup_num_steps", 1000)
    if schedule == "cosine":
        rest.setdefault(f"{params}cos_min_ratio", 1e-4)
    for start in ("warmup_min_lr", "warmup_min_ratio"):
        if rest.get(params + start) == 0:
            del rest[params + start]
    total, steps = rest.get(f"{params}total_num_steps"), given.get("steps")
    if steps and total == steps.value:
        del rest[f"{params}total_num_steps"]
    elif steps and steps.value and isinstance(total, int):
        _check_agreement("steps", f"{params}total_num_steps", total, steps)
    return schedule


def _choose(key: str, value: Any, table: dict[str, str]) -> str:
    names = {name.lower(): ours for name, ours in table.items()}
    if str(value).lower() not in names:
        raise UserError(f"{key} {value!r} is not known; known: {', '.join(table)}")
    return names[str(value).lower()]
