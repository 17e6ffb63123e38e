# SPDX-License-Identifier: Apache-2.0
"""The spellings of transformers, TRL and DeepSpeed, translated into our keys."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# HF flag -> our key.
ALIASES = {
    "model_name_or_path": "model.path",
    "config_name": "model.config",
    "tokenizer_name": "model.tokenizer",
    "train_files": "data.train",
    "validation_files": "data.eval",
    "block_size": "data.max_length",
    "max_length": "data.max_length",
    "packing": "data.packing",
    "per_device_train_batch_size": "per_device_batch_size",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "optim.learning_rate",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "output_dir": "output_dir",
    "overwrite_output_dir": "overwrite",
    "logging_steps": "log.every",
    "eval_steps": "eval_every",
    "save_steps": "save.every",
    "save_total_limit": "save.keep",
    "seed": "seed",
}
# HF flags whose value is translated too.
SPECIAL = (
    "torch_dtype",
    "bf16",
    "gradient_checkpointing",
    "lr_scheduler_type",
    "report_to",
    "resume_from_checkpoint",
    "do_train",
    "do_eval",
    "deepspeed",
)
LATER = dict.fromkeys(("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), "PEFT")
LATER["beta"] = "preference training"

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "inverse_sqrt": "inverse_sqrt",
}


def _choice(flag: str, value: Any, table: dict[str, Any]) -> Any:
    if value not in table:
        raise ValueError(f"--{flag} {value}: not known; known: {', '.join(table)}")
    return table[value]


def _special(flag: str, value: Any) -> dict[str, Any]:
    if flag == "torch_dtype":
        known = {"float32": "float32", "bfloat16": "bfloat16", "auto": "float32"}
        kind = _choice(flag, value, known)
        return {"model.weight_dtype": kind, "model.compute_dtype": kind}
    if flag == "bf16":
        return {"model.compute_dtype": "bfloat16" if value else "float32"}
    if flag == "gradient_checkpointing":
        return {"model.remat": "full" if value else "none"}
    if flag == "lr_scheduler_type":
        return {"optim.schedule": _choice(flag, value, SCHEDULES)}
    if flag == "report_to":
        names = [n for n in str(value).split(",") if n != "none"] if value != "all" else ["wandb", "tensorboard"]
        return {"log.report_to": names}
    if flag == "resume_from_checkpoint":
        if isinstance(value, str):
            raise ValueError(
                f"--resume_from_checkpoint {value}: a run goes on in its own output_dir; set --output_dir to it"
            )
        return {"resume": bool(value)}
    return {}


def translate(flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """HF flags -> ({our key: value}, {our key: where from}). Raises ValueError for a contradiction."""
    values: dict[str, Any] = {}
    source: dict[str, str] = {}

    def put(new: dict[str, Any], where: str) -> None:
        values.update(new)
        source.update(dict.fromkeys(new, where))

    for flag, value in flags.items():
        if flag in ALIASES:
            put({ALIASES[flag]: value}, f"--{flag}")
        elif flag != "deepspeed":
            put(_special(flag, value), f"--{flag}")
    if "deepspeed" in flags:
        file = str(flags["deepspeed"])
        for key, value in deepspeed(file).items():
            if key in values and values[key] != value:
                raise ValueError(
                    f"{file} asks for {key} = {value!r}, {source[key]} for {values[key]!r}; keep one (or \"auto\")"
                )
            put({key: value}, file)
    return values, source


# DeepSpeed key -> ours, where the value carries over.
DEEPSPEED = {
    "gradient_clipping": "optim.clip",
    "gradient_accumulation_steps": "accumulation",
    "train_micro_batch_size_per_gpu": "per_device_batch_size",
    "steps_per_print": "log.every",
    "optimizer.params.lr": "optim.learning_rate",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "optimizer.params.eps": "optim.eps",
    "scheduler.params.warmup_max_lr": "optim.learning_rate",
    "scheduler.params.warmup_num_steps": "optim.warmup",
    "scheduler.params.total_num_steps": "steps",
}
NAMES = {"adamw": "adamw", "adam": "adamw", "lion": "lion", "lamb": "lamb", "sgd": "sgd", "muon": "muon"}


def _flat(block: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in block.items():
        deeper = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if deeper else {prefix + key: value}
    return flat


def deepspeed(file: str) -> dict[str, Any]:
    """What a DeepSpeed JSON asks for, in our keys; "auto" leaves a key to the flags.

    What has no meaning here is listed on stderr. Raises ValueError for fp16, an unknown optimizer
    or scheduler, and a file that is no JSON.
    """
    try:
        flat = _flat(json.loads(Path(file).read_text()))
    except FileNotFoundError:
        raise ValueError(f"--deepspeed {file} is not there") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: {error.msg}") from None
    values: dict[str, Any] = {}
    ignored = []
    for key, value in flat.items():
        if value == "auto":
            continue
        if key in DEEPSPEED:
            values[DEEPSPEED[key]] = value
        elif key == "zero_optimization.stage":
            values["mesh.zero"] = value
        elif key == "bf16.enabled":
            values["model.compute_dtype"] = "bfloat16" if value else "float32"
        elif key == "fp16.enabled":
            if value is True:
                raise ValueError(f"{file}: fp16 needs loss scaling, which is not done here; use bf16")
        elif key == "optimizer.type":
            values["optim.name"] = _choice("deepspeed optimizer.type", str(value).lower(), NAMES)
        elif key == "optimizer.params.betas":
            values["optim.b1"], values["optim.b2"] = value
        elif key == "scheduler.type":
            log = flat.get("scheduler.params.warmup_type", "log") == "log"
            known = {
                "WarmupLR": "warmup_log" if log else "constant",
                "WarmupDecayLR": "linear",
                "WarmupCosineLR": "cosine",
            }
            values["optim.schedule"] = _choice("deepspeed scheduler.type", value, known)
        elif key != "scheduler.params.warmup_type" and key != "train_batch_size":
            ignored.append(key)
    if isinstance(flat.get("train_batch_size"), int) and "per_device_batch_size" not in values:
        values["batch_size"] = flat["train_batch_size"]
    if ignored:
        print(f"jaxllm: {file}: no meaning here, left out: {', '.join(ignored)}", file=sys.stderr)
    return values
