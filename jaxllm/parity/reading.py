# SPDX-License-Identifier: Apache-2.0
"""Read the arguments of the user's run from YAML, JSON, a DeepSpeed file or a Python script.

A script is parsed and never run: only literal keyword arguments of known calls are read.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.config import aliases
from jaxllm.config.datasets import separated
from jaxllm.config.fields import Given
from jaxllm.config.loading import MAX_BYTES, read_yaml
from jaxllm.config.schema import leaf_of
from jaxllm.config.verbs import VERBS
from jaxllm.errors import UserError
from jaxllm.untrusted import read_json, read_text

CONFIGS = {"SFTConfig": "sft", "DPOConfig": "dpo", "RewardConfig": "reward"}
TRAINERS = {"SFTTrainer": "sft", "DPOTrainer": "dpo", "RewardTrainer": "reward"}
DEEPSPEED = ("zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size")
DEEPSPEED += ("gradient_clipping", "zero_allow_untested_optimizer")
# Names of data, evaluations, files and trackers, which have no part in the comparison.
APART = {
    *("dataset", "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"),
    *("dataset_streaming", "datasets", "dataset_dir", "eval_dataset", "train_file", "train_files"),
    *("validation_file", "validation_files", "max_samples", "mix_strategy", "interleave_probs"),
    *("streaming", "val_size", "test_split_size", "eval_strategy", "evaluation_strategy"),
    *("eval_steps", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("early_stopping_patience", "early_stopping_threshold", "early_stopping_steps", "max_steps"),
    *("num_train_epochs", "push_to_hub", "hub_model_id", "hub_private_repo", "report_to"),
    *("resume_from_checkpoint", "output_dir", "overwrite_output_dir", "run_name", "project"),
    *("save_strategy", "save_steps", "save_total_limit", "logging_strategy", "logging_steps"),
    *("use_swanlab", "swanlab_project", "swanlab_run_name", "stage", "objective", "deepspeed"),
    *("load_in_4bit", "load_in_8bit", "quantization_bit"),
}
# LLaMA-Factory's name -> that of TRL.
FACTORY = {"cutoff_len": "max_length", "pref_beta": "beta", "pref_loss": "loss_type"}
FACTORY |= {"neat_packing": "packing", "dpo_label_smoothing": "label_smoothing"}
MODEL = ("model_name_or_path", "tokenizer_name")
# Argument of TRL -> that of LoraConfig, and TRL's defaults.
LORA = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
LORA |= {"lora_target_modules": "target_modules", "lora_modules_to_save": "modules_to_save"}
LORA |= {"lora_target_parameters": "target_parameters", "use_rslora": "use_rslora"}
LORA |= {"use_dora": "use_dora"}
LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
FACTORY_LORA = {"lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
FACTORY_LORA |= {"lora_target": "target_modules", "additional_target": "modules_to_save"}
OPTIMIZERS = {"adam": "adamw_torch", "adamw": "adamw_torch", "sgd": "sgd"}  # DeepSpeed -> Trainer


@dataclass
class Theirs:
    """The user's run."""

    path: str
    names: list[Given] = field(default_factory=list)
    """what the file or script gives, by names that `load_config` knows"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of TRL's config"""
    lora: dict[str, Any] | None = None
    """keyword arguments of LoraConfig; None without an adapter"""
    deepspeed: dict[str, Any] | None = None
    """the DeepSpeed file"""
    objective: str | None = None
    model: str | None = None
    tokenizer: str | None = None
    notes: list[str] = field(default_factory=list)
    """lines on what was not read or is not compared"""


def read_theirs(path: str) -> Theirs:
    """Raises UserError for a file that is none of these, or is damaged."""
    suffix = Path(path).suffix.lower()
    if suffix == ".py":
        found = _script(path)
    elif suffix in (".yaml", ".yml", ".json"):
        found = _file(path)
    else:
        raise UserError(f"{path}: give a .yaml, .json or .py file of your run, or a DeepSpeed file")
    if found.deepspeed is not None:
        _with_deepspeed(found)
    return found


# ---- YAML and JSON


def _file(path: str) -> Theirs:
    given = read_yaml(path)
    values = {one.name: one.value for one in given if aliases.is_given(one)}
    if any(name in values for name in DEEPSPEED) or isinstance(values.get("optimizer"), dict):
        block = read_json(Path(path), "DeepSpeed file")
        return Theirs(path, deepspeed=block, names=[Given("deepspeed", path, path)])
    found = Theirs(path)
    for one in given:
        if leaf_of(one.name) and one.name not in (aliases.NAMES | APART | {"seed"}):
            raise UserError(
                f"{one.where}: {one.name} is a key of jaxllm; give the file of your TRL run, and "
                f"this one as a flag: --{one.name} VALUE"
            )
    found.names = [one for one in given if one.name not in APART]
    found.objective = _stage(values)
    found.model, found.tokenizer = (values.get(name) for name in MODEL)
    known = {FACTORY.get(name, name): value for name, value in values.items()}
    if ratio := known.pop("warmup_ratio", None):
        known.setdefault("warmup_steps", ratio)  # a fraction, in transformers 5
    if known.get("loss_type") == "sigmoid":
        known["loss_type"] = ["sigmoid"]
    apart = {*APART, *MODEL, *LORA, *FACTORY_LORA, "use_peft", "finetuning_type", "dtype"}
    apart |= {"torch_dtype", "template"}
    found.arguments = {name: value for name, value in known.items() if name not in apart}
    found.lora = _lora(values)
    if "finetuning_type" in values or "stage" in values:
        found.notes.append(f"{path} is of LLaMA-Factory: TRL runs with its arguments in its place")
    if name := values.get("deepspeed"):
        found.deepspeed = read_json(Path(str(name)), "DeepSpeed file")
        found.names.append(Given("deepspeed", str(name), path))
    return found


def _stage(values: dict[str, Any]) -> str | None:
    names = (name for name, verb in VERBS.items() if verb.stage == values.get("stage"))
    return next(names, None) if "stage" in values else None


def _lora(values: dict[str, Any]) -> dict[str, Any] | None:
    if values.get("finetuning_type") == "lora":
        lora = {FACTORY_LORA[name]: v for name, v in values.items() if name in FACTORY_LORA}
        rank = lora.setdefault("r", 8)
        if not isinstance(rank, int):
            raise UserError(f"lora_rank: seen {rank}; must be an integer")
        lora.setdefault("lora_alpha", 2 * rank)
        targets = separated(lora.get("target_modules", "all"))
        return lora | {"target_modules": "all-linear" if targets == ["all"] else targets}
    if values.get("use_peft") is True:
        lora = {LORA[name]: value for name, value in values.items() if name in LORA}
        if lora.get("target_modules") in (["all-linear"], "all-linear"):
            lora["target_modules"] = "all-linear"
        return LORA_DEFAULTS | lora
    return None


# ---- a script


def _script(path: str) -> Theirs:
    text = read_text(Path(path), "script", MAX_BYTES)
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"{path}{f':{line}' if line else ''}: not Python: {error}") from None
    found, constants = Theirs(path), _constants(module)
    calls = [(_name(node.func), node) for node in ast.walk(module) if isinstance(node, ast.Call)]
    configs = [(name, node) for name, node in calls if name in CONFIGS]
    if len(configs) != 1:
        lines = ", ".join(f"{name} in line {node.lineno}" for name, node in configs) or "none"
        raise UserError(
            f"{path}: a run has one SFTConfig, DPOConfig or RewardConfig; seen {lines}. Give its "
            "arguments as a YAML file"
        )
    found.objective = CONFIGS[configs[0][0]]
    for name, value, where in _literals(configs[0][1], constants, found):
        found.arguments[name] = value
        found.names.append(Given(name, value, where))
    for name, node in calls:
        if name == "LoraConfig":
            found.lora = {}
            found.names.append(Given("peft.method", "lora", f"{path}:{node.lineno}"))
            for key, value, where in _literals(node, constants, found):
                found.lora[key] = value
                if leaf_of(f"peft.{key}"):
                    found.names.append(Given(f"peft.{key}", value, where))
        elif name in TRAINERS or name == "from_pretrained":
            _model_of(node, constants, found)
    deepspeed = found.arguments.pop("deepspeed", None)
    if isinstance(deepspeed, dict):
        raise UserError(f"{path}: deepspeed= is a dict; save it as a JSON file and give its name")
    found.names = [one for one in found.names if one.name not in APART]
    found.arguments = {k: v for k, v in found.arguments.items() if k not in APART}
    if isinstance(deepspeed, str):
        found.deepspeed = read_json(Path(deepspeed), "DeepSpeed file")
        found.names.append(Given("deepspeed", deepspeed, path))
    return found


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _constants(module: ast.Module) -> dict[str, ast.expr]:
    """The names that the script binds exactly once, by an assignment, with what they are."""
    bound: Counter[str] = Counter()
    assigned: dict[str, ast.expr] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound[node.id] += 1
        elif isinstance(node, ast.arg):
            bound[node.arg] += 1
        elif isinstance(node, ast.Assign):
            names = (target.id for target in node.targets if isinstance(target, ast.Name))
            assigned |= dict.fromkeys(names, node.value)
    return {name: value for name, value in assigned.items() if bound[name] == 1}


def _literal(node: ast.expr, constants: dict[str, ast.expr]) -> Any:
    """The value of a literal, of a name of one, or of a dtype. Raises ValueError for others."""
    if isinstance(node, ast.Name) and node.id in constants:
        node = constants[node.id]
    if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
        return node.attr
    return ast.literal_eval(node)


def _literals(
    call: ast.Call, constants: dict[str, ast.expr], found: Theirs
) -> Iterator[tuple[str, Any, str]]:
    """(name, value, FILE:LINE) of the literal keyword arguments; the others are noted."""
    for keyword in call.keywords:
        where = f"{found.path}:{keyword.value.lineno}"
        shown = f"{keyword.arg}=" if keyword.arg else "**"
        try:
            if keyword.arg is None:
                raise ValueError
            yield keyword.arg, _literal(keyword.value, constants), where
        except (ValueError, TypeError, SyntaxError, RecursionError):
            text = ast.unparse(keyword.value)
            found.notes.append(
                f"{where}: {shown}{text[:60]} is no literal, so it was not read: your run has "
                "TRL's default"
            )


def _model_of(node: ast.Call, constants: dict[str, ast.expr], found: Theirs) -> None:
    """The path in `AutoModel….from_pretrained("…")` or `…Trainer(model="…")`."""
    arguments = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "model")]
    owner = ast.unparse(node.func)
    attribute = "tokenizer" if "Tokenizer" in owner else "model"
    for one in arguments:
        try:
            path = _literal(one, constants)
        except (ValueError, TypeError, SyntaxError, RecursionError):
            continue
        if isinstance(path, str):
            setattr(found, attribute, getattr(found, attribute) or path)
    for keyword in node.keywords if "Tokenizer" not in owner else ():
        if keyword.arg in ("dtype", "torch_dtype"):
            value = ast.unparse(keyword.value).strip("'\"").removeprefix("torch.")
            found.names.append(Given("dtype", value, f"{found.path}:{node.lineno}"))


# ---- DeepSpeed


def _with_deepspeed(found: Theirs) -> None:
    """The arguments of the Trainer that a DeepSpeed file sets."""
    block = found.deepspeed or {}

    def given(holder: Any, name: str, kind: Any = (int, float)) -> Any:
        value = holder.get(name) if isinstance(holder, dict) else None
        if value not in (None, "auto") and not isinstance(value, kind):
            raise UserError(f"{found.path}: {name} of the DeepSpeed file: seen {value!r}")
        return None if value == "auto" else value

    arguments: dict[str, Any] = {}
    arguments["max_grad_norm"] = given(block, "gradient_clipping")
    each = given(block, "gradient_accumulation_steps", int)
    size = given(block, "train_micro_batch_size_per_gpu", int)
    total = given(block, "train_batch_size", int)
    if size is None and total is not None:
        size = total // (each or 1)
    arguments |= {"gradient_accumulation_steps": each, "per_device_train_batch_size": size}
    if optimizer := given(block, "optimizer", dict):
        kind = str(given(optimizer, "type", str)).lower()
        if kind not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise UserError(f"{found.path}: optimizer.type {kind}: only {known} are compared")
        params = given(optimizer, "params", dict)
        betas = given(params, "betas", list) or (None, None)
        if len(betas) != 2:
            raise UserError(f"{found.path}: betas of the DeepSpeed file: seen {betas}")
        arguments |= {"optim": OPTIMIZERS[kind], "learning_rate": given(params, "lr")}
        arguments |= {"adam_beta1": betas[0], "adam_beta2": betas[1]}
        arguments["adam_epsilon"] = given(params, "eps")
        arguments["weight_decay"] = given(params, "weight_decay")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    found.arguments = found.arguments | arguments
    found.notes.append(
        "DeepSpeed itself is not run: the Trainer runs on one device with the file's batch, "
        "clipping, optimizer and schedule"
    )
