# SPDX-License-Identifier: Apache-2.0
"""Names of transformers and TRL, translated to our keys.

Every name is translated, refused, or reported as ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.config.fields import home
from jaxllm.errors import UserError


@dataclass(frozen=True)
class Given:
    """A value with the name it was given by and its origin: file:line or the flag."""

    name: str
    value: Any
    where: str


RENAMED = {
    "model_name_or_path": "model.path",
    "config_name": "model.config",
    "tokenizer_name": "model.tokenizer",
    "train_file": "data.train",
    "train_files": "data.train",
    "dataset_name": "data.train",
    "validation_file": "data.eval",
    "validation_files": "data.eval",
    "block_size": "data.max_length",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "packing": "data.packing",
    "preprocessing_num_workers": "data.workers",
    "dataset_num_proc": "data.workers",
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
    "overwrite_output_dir": "overwrite",
    "resume_from_checkpoint": "resume",
    "logging_steps": "log.every",
    "eval_steps": "eval_every",
    "metric_for_best_model": "eval.metric",
    "greater_is_better": "eval.greater",
    "early_stopping_patience": "eval.patience",
    "early_stopping_threshold": "eval.min_delta",
    "load_best_model_at_end": "save.load_best",
    "save_steps": "save.every",
    "save_total_limit": "save.keep",
    "report_to": "log.report_to",
    "lora_r": "peft.r",
    "lora_alpha": "peft.lora_alpha",
    "peft.alpha": "peft.lora_alpha",
    "lora_dropout": "peft.lora_dropout",
    "peft.dropout": "peft.lora_dropout",
    "lora_target_modules": "peft.target_modules",
    "lora_modules_to_save": "peft.modules_to_save",
    "use_rslora": "peft.use_rslora",
    "use_dora": "peft.use_dora",
    "beta": "align.beta",
    "kl_coef": "align.beta",
    "loss_type": "align.loss",
    "loss_weights": "align.loss_weights",
    "label_smoothing": "align.label_smoothing",
    "simpo_gamma": "align.gamma",
    "desirable_weight": "align.desirable_weight",
    "undesirable_weight": "align.undesirable_weight",
    "center_rewards_coefficient": "align.centering",
    "reward_funcs": "rl.rewards",
    "reward_model_path": "rl.rewards",
    "reward_weights": "rl.reward_weights",
    "num_generations": "rl.group_size",
    "max_completion_length": "rl.max_new_tokens",
    "response_length": "rl.max_new_tokens",
    "temperature": "rl.temperature",
    "num_mini_batches": "rl.minibatches",
    "num_iterations": "rl.iterations",
    "num_ppo_epochs": "rl.iterations",
    "epsilon": "rl.clip",
    "epsilon_high": "rl.clip_high",
    "cliprange": "rl.clip",
    "cliprange_value": "rl.clip_value",
    "vf_coef": "rl.value_weight",
    "kl_estimator": "rl.kl",
    "gamma": "rl.discount",
    "lam": "rl.gae_lambda",
    "mask_truncated_completions": "rl.mask_truncated",
    "missing_eos_penalty": "rl.missing_eos_penalty",
}
SCHEDULES = {name: name for name in ("cosine", "linear", "constant", "inverse_sqrt")}
SCHEDULES |= {"constant_with_warmup": "constant", "warmup_stable_decay": "wsd"}
OPTIMIZERS = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw")
OPTIMIZERS |= {"adafactor": "adafactor", "lion_32bit": "lion", "sgd": "sgd"}
OPTIMIZERS |= {name: name for name in OPTIMIZERS.values()}  # ours
# fmt: off
IGNORED = frozenset({
    "accelerator_config", "activation_checkpointing_kwargs", "attn_implementation",
    "auto_find_batch_size", "average_tokens_across_devices", "batch_eval_metrics",
    "bf16_full_eval", "data_seed", "dataloader_drop_last", "dataloader_in_order",
    "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
    "ddp_static_graph", "ddp_timeout", "debug", "do_eval", "do_predict", "do_train",
    "enable_jit_checkpoint", "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches",
    "eval_on_start", "eval_use_gather_object", "fp16_full_eval", "fsdp", "fsdp_config",
    "full_determinism", "gradient_checkpointing_kwargs", "group_by_length", "hub_always_push",
    "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token",
    "include_for_metrics", "include_num_input_tokens_seen", "include_tokens_per_second",
    "keep_linebreaks", "label_names", "length_column_name", "liger_kernel_config", "local_rank",
    "log_level", "log_level_replica", "log_on_each_node", "logging_dir", "logging_first_step",
    "logging_nan_inf_filter", "low_cpu_mem_usage", "overwrite_cache", "parallelism_config",
    "per_device_eval_batch_size", "prediction_loss_only", "project", "push_to_hub",
    "remove_unused_columns", "restore_callback_states_from_checkpoint", "run_name",
    "save_on_each_node", "save_only_model", "save_safetensors", "skip_memory_metrics", "tf32",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps",
    "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "trust_remote_code",
    "use_cache", "use_cpu", "use_fast_tokenizer", "use_liger_kernel",
})
# fmt: on
# Not supported, and ignoring them would change the result: refused unless switched off.
REFUSED = {
    "ignore_data_skip": "a resumed run continues at its position in the data; remove it",
    "label_smoothing_factor": "label smoothing is not supported for language modeling; remove it",
    "lr_scheduler_kwargs": "use optim.decay and optim.final",
    "neftune_noise_alpha": "NEFTune is not supported; remove it",
    "optim_args": "use optim.options",
    "optim_target_modules": "all weights are optimized the same way; remove it",
}
OFF = (None, False, 0, "", [], {})

Flags = dict[str, Given]  # all names of the same file or command line
# Returns our keys and values for the value of a name.
Rule = Callable[[Any, Flags], dict[str, Any]]


def _choose(value: Any, table: Mapping[Any, Any]) -> Any:
    """Returns table[value]. Raises UserError, which lists the names that the table has."""
    if value is False and value not in table:
        value = "no"  # YAML reads no as false
    if not isinstance(value, str | bool) or value not in table:
        known = ", ".join(name for name in table if isinstance(name, str))
        if not known:
            raise UserError(f"seen {value!r}; must be true or false")
        raise UserError(f"{value!r} is not known; known: {known}")
    return table[value]


def _choice(table: Mapping[Any, dict[str, Any]], about: str) -> tuple[Rule, str]:
    return lambda value, _: _choose(value, table), about


def _switch(key: str, on: Any, off: Any = None) -> tuple[Rule, str]:
    """Rule and help of a boolean name; without `off`, false sets nothing."""
    table = {True: {key: on}, False: {} if off is None else {key: off}}
    return _choice(table, f"{key} {str(on).lower()}")


def _dtype(value: Any, flags: Flags) -> dict[str, Any]:
    known = {"float32": "float32", "bfloat16": "bfloat16", "auto": None}
    dtype = _choose(str(value).removeprefix("torch."), known)
    keys = ("model.weight_dtype", "model.compute_dtype")
    return dict.fromkeys(keys[:1] if "bf16" in flags else keys, dtype) if dtype else {}


def _fp16(value: Any, flags: Flags) -> dict[str, Any]:
    if value is True:
        raise UserError("float16 is not supported, since it needs loss scaling; use --bf16")
    return _choose(value, {False: {}})


def _schedule(value: Any, flags: Flags) -> dict[str, Any]:
    warmup = [flags[name].value for name in ("warmup_steps", "warmup_ratio") if name in flags]
    if value == "constant" and any(warmup):
        raise UserError("constant has no warmup; use constant_with_warmup, or remove the warmup")
    return {"optim.schedule": _choose(value, SCHEDULES)}


def _percent(value: Any, flags: Flags) -> dict[str, Any]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"seen {value!r}; must be a number below 100")
    return {"data.eval_fraction": value / 100}


def _deepspeed(value: Any, flags: Flags) -> dict[str, Any]:
    if not isinstance(value, str):
        raise UserError("give the path of a DeepSpeed JSON file")
    return {"deepspeed": home(value)}


def _per_device(value: Any, flags: Flags) -> dict[str, Any]:
    return {"micro_batch_size": value} | ({} if "batch_size" in flags else {"batch_size": 0})


def _eval_strategy(value: Any, flags: Flags) -> dict[str, Any]:
    if value == "steps" and "eval_steps" not in flags:
        return {"eval_every": flags["logging_steps"].value if "logging_steps" in flags else 500}
    known = {"steps": {}, "epoch": {"eval_every": "epoch"}, "no": {"eval_every": 0}}
    return _choose(value, known)


_SAVE = {"steps": {}, "epoch": {"save.every": "epoch"}, "no": {"save.every": 0}}
_SAVE |= {"best": {"save.every": 0, "save.keep_best": True}}
# name -> (its rule, help)
TRANSLATED: dict[str, tuple[Rule, str]] = {
    "bf16": _switch("model.compute_dtype", "bfloat16", "float32"),
    "torch_dtype": (_dtype, "model.weight_dtype and model.compute_dtype"),
    "dtype": (_dtype, "model.weight_dtype and model.compute_dtype"),
    "fp16": (_fp16, "refused: use bf16"),
    "gradient_checkpointing": _switch("model.remat", "full", "none"),
    "activation_checkpointing": _switch("model.remat", "full", "none"),
    "per_device_train_batch_size": (_per_device, "micro_batch_size"),
    "max_steps": (lambda value, _: {"steps": 0 if value == -1 else value}, "steps"),
    "lr_scheduler_type": (_schedule, "optim.schedule"),
    "optim": (lambda value, _: {"optim.name": _choose(value, OPTIMIZERS)}, "optim.name"),
    "eval_strategy": (_eval_strategy, "eval_every"),
    "evaluation_strategy": (_eval_strategy, "eval_every"),
    "save_strategy": _choice(_SAVE, "save.every"),
    "logging_strategy": _choice({"steps": {}, "epoch": {"log.every": "epoch"}}, "log.every"),
    "validation_split_percentage": (_percent, "data.eval_fraction x 100"),
    "train_sampling_strategy": _choice({"random": {}}, "random: the only order"),
    "disable_tqdm": _switch("log.progress", False, True),
    "deepspeed": (_deepspeed, "a DeepSpeed JSON file"),
    "use_peft": _switch("peft.method", "lora"),
    "precompute_ref_log_probs": _switch("align.reference", "precomputed", "model"),
    "load_in_4bit": _switch("peft.quantize_base", "nf4"),
    "load_in_8bit": _switch("peft.quantize_base", "int8"),
}
# Strategy -> its number of steps, which the Trainer reads only for strategy `steps`.
STEPS = {f"{name}_strategy": f"{name}_steps" for name in ("eval", "save", "logging")}
STEPS |= {"evaluation_strategy": "eval_steps"}
NAMES = frozenset(RENAMED) | set(TRANSLATED) | IGNORED | set(REFUSED)


def meanings() -> dict[str, str]:
    """{transformers name: what it sets}."""
    return RENAMED | {name: meaning for name, (_, meaning) in TRANSLATED.items()}


def spellings() -> dict[str, list[str]]:
    """{key or keys that are set: transformers names}, the inverse of `meanings`."""
    names: dict[str, list[str]] = {}
    for name, meaning in meanings().items():
        names.setdefault(meaning, []).append(name)
    return names


def translate(layer: Sequence[Given]) -> tuple[dict[str, Given], list[str]]:
    """Translate the names of one file or command line; returns (our keys, ignored names).

    Raises UserError for a refused name and for two names that set one key differently.
    """
    flags: Flags = {one.name: one for one in layer}
    overwrite, resume = flags.get("overwrite_output_dir"), flags.get("resume_from_checkpoint")
    if overwrite and resume and overwrite.value and resume.value:
        raise UserError(
            "--overwrite_output_dir deletes what --resume_from_checkpoint resumes from; keep one"
        )
    ignored = IGNORED | {STEPS[n] for n in STEPS.keys() & flags if flags[n].value != "steps"}
    out: dict[str, Given] = {}
    for name, one in flags.items():
        if name in ignored or (name in REFUSED and one.value in OFF):
            continue
        values = {RENAMED.get(name, name): one.value}
        try:
            if name in REFUSED:
                raise UserError(REFUSED[name])
            if name in TRANSLATED:
                values = TRANSLATED[name][0](one.value, flags)
        except UserError as error:
            at = one.where if one.where.startswith("--") else f"{one.where}: {name}"
            raise UserError(f"{at}: {error}") from None
        for key, value in values.items():
            before = out.get(key)
            if before and before.value != value:
                raise UserError(
                    f"{key} is given twice: {before.value!r} by {before.where}, {value!r} by "
                    f"{one.where}; keep one"
                )
            out[key] = Given(key, value, one.where)
    return out, [one.where for one in flags.values() if one.name in ignored]
