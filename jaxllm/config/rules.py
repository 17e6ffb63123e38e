# SPDX-License-Identifier: Apache-2.0
"""Rules for the names of other libraries whose meaning depends on their value or on other names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.config.datasets import factory_sources, hub_source, mixture, separated
from jaxllm.config.fields import Given, home
from jaxllm.config.names import (
    DPO_LOSSES,
    HF_OPTIMIZERS,
    QUANTIZED,
    RATES,
    SCHEDULE_KEYS,
    SCHEDULE_VALUES,
    SCHEDULES,
)
from jaxllm.config.verbs import VERBS
from jaxllm.errors import UserError
from jaxllm.paths import absolute, as_path

# All names of the file and the command line; also `objective`, the command, and `layer`, the names
# that are given in the same place.
Flags = Mapping[str, Given]
# Returns our keys and values for the value of a name; None if it has no effect here. The key NOTE
# has a line for the user.
Rule = Callable[[Any, Flags], dict[str, Any] | None]
NOTE = "note"


def _choose(value: Any, table: Mapping[Any, Any]) -> Any:
    """Returns table[value]. Raises UserError, which lists the names that the table has."""
    if value is False and value not in table:
        value = "no"  # YAML reads no as false
    if not isinstance(value, str | bool | int) or value not in table:
        known = ", ".join(str(name) for name in table if not isinstance(name, bool))
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


def _value(flags: Flags, *names: str) -> Any:
    """The value of the first of the names that is given, else None."""
    return next((flags[name].value for name in names if name in flags), None)


def _verb(flags: Flags) -> Any:
    return VERBS[flags["objective"].value]


# ---- the model


def _model(value: Any, flags: Flags) -> dict[str, Any]:
    return {"model.config" if _value(flags, "train_from_scratch") is True else "model.path": value}


def _scratch(value: Any, flags: Flags) -> dict[str, Any]:
    if value is True and "model_name_or_path" not in flags:
        raise UserError("give model_name_or_path too, or model.config alone")
    return _choose(value, {True: {}, False: {}})


def _dtype(value: Any, flags: Flags) -> dict[str, Any]:
    known = {"float32": "float32", "bfloat16": "bfloat16", "auto": None}
    dtype = _choose(str(value).removeprefix("torch."), known)
    keys = ("model.weight_dtype", "model.compute_dtype")
    return dict.fromkeys(keys[:1] if "bf16" in flags else keys, dtype) if dtype else {}


def _pure(value: Any, flags: Flags) -> dict[str, Any]:
    keys = ("model.weight_dtype", "model.compute_dtype")
    return _choose(value, {True: dict.fromkeys(keys, "bfloat16"), False: {}})


def _fp16(value: Any, flags: Flags) -> dict[str, Any]:
    if value is True:
        raise UserError("float16 is not supported, since it needs loss scaling; use --bf16")
    return _choose(value, {False: {}})


def _remat(value: Any, flags: Flags) -> dict[str, Any]:
    remat = _choose(value, {True: "full", False: "none"})
    return {} if _value(flags, "activation_offloading") is True else {"model.remat": remat}


def _adapter(value: Any, flags: Flags) -> dict[str, Any]:
    paths = separated(value)
    if len(paths) != 1:
        raise UserError(f"seen {len(paths)} adapters; merge all but one into the model before")
    return {"peft.path": paths[0], "peft.method": "lora"}


def _rank(value: Any, flags: Flags) -> dict[str, Any]:
    """LLaMA-Factory's rank, with its default of alpha."""
    if {"lora_alpha", "peft.lora_alpha"} & flags.keys() or not isinstance(value, int):
        return {"peft.r": value}
    return {"peft.r": value, "peft.lora_alpha": 2 * value}


def _targets(value: Any, flags: Flags) -> dict[str, Any]:
    names = separated(value)
    return {"peft.target_modules": ["all-linear"] if names == ["all"] else names}


def _tuning(value: Any, flags: Flags) -> dict[str, Any]:
    if value in ("freeze", "oft"):
        raise UserError(f"{value} is not supported; use lora or full")
    return {"peft.method": _choose(value, {"lora": "lora", "full": "none"})}


# ---- the data


def _length(value: Any, flags: Flags) -> dict[str, Any]:
    if value is None:
        raise UserError("rows have a length: give a number of tokens, or leave it out for 1,024")
    return {"data.max_length": value}


def _percent(value: Any, flags: Flags) -> dict[str, Any]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"seen {value!r}; must be a number below 100")
    return {"data.eval_fraction": value / 100}


def _held_out(value: Any, flags: Flags) -> dict[str, Any]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"seen {value!r}; must be a number below 1")
    if value >= 1:
        raise UserError(f"seen {value}; give the fraction of the examples, such as 0.1")
    return {"data.eval_fraction": value}


def _factory(key: str) -> Rule:
    def rule(value: Any, flags: Flags) -> dict[str, Any]:
        options = {name: one.value for name, one in flags.items()}
        return factory_sources(key, value, options, text=_verb(flags).data == "text")

    return rule


def _hub(value: Any, flags: Flags) -> dict[str, Any]:
    return hub_source(value, {name: one.value for name, one in flags.items()})


def _with(*names: str, known: tuple[Any, ...] = (), other: str = "") -> Rule:
    """A name that the rule of one of `names` reads. other: what to write without them."""

    def rule(value: Any, flags: Flags) -> dict[str, Any] | None:
        if known and value not in known:
            _choose(value, dict.fromkeys(known))
        if not value or value in known[:1]:
            return {}
        if not {*names} & flags.keys():
            raise UserError(f"it needs {' or '.join(names)}, which is not given{other}")
        return {}

    return rule


def _mix(value: Any, flags: Flags) -> dict[str, Any] | None:
    if value == "interleave_under":
        raise UserError("an epoch is a pass over the largest source; use interleave_over")
    return _with("dataset", "eval_dataset", known=("concat", "interleave_over"))(value, flags)


def _template(value: Any, flags: Flags) -> dict[str, Any] | None:
    if _verb(flags).data == "text":
        return None
    if str(value).endswith(".jinja") or value in ("chatml", "seed-qwen"):
        return {"data.template": home(value)}
    note = "the tokenizer's own chat template is used; data.template gives another one"
    return {NOTE: f"{value}: {note}"}


def _learned(other: str) -> Rule:
    """completion_only_loss and assistant_only_loss: false learns the prompt too, unless the `other`
    is true."""

    def rule(value: Any, flags: Flags) -> dict[str, Any]:
        all_turns = value is False and _value(flags, other) is not True
        return _choose(
            value, {True: {}, False: {"data.train_on_prompt": True} if all_turns else {}}
        )

    return rule


def _part(key: str) -> Rule:
    """The length of the prompt or of the completion, which only rollouts limit separately."""

    def rule(value: Any, flags: Flags) -> dict[str, Any]:
        if not _verb(flags).online:
            raise UserError("data.max_length is the limit of a prompt with its answer; remove it")
        return {key: value}

    return rule


# ---- batches, steps and events


def _per_device(value: Any, flags: Flags) -> dict[str, Any]:
    total = {} if "batch_size" in flags["layer"].value else {"batch_size": 0}
    return {"micro_batch_size": value} | total


def _generation_steps(value: Any, flags: Flags) -> dict[str, Any]:
    """Micro-batches of a rollout -> updates of a rollout."""
    each = _value(flags, "gradient_accumulation_steps", "accumulation") or 1
    if not isinstance(value, int) or not isinstance(each, int) or value % each:
        raise UserError(f"seen {value!r}; must be a multiple of gradient_accumulation_steps {each}")
    return {"rl.minibatches": value // each}


def _eval_strategy(value: Any, flags: Flags) -> dict[str, Any]:
    if value == "steps" and _value(flags, "eval_steps") is None:
        return {"eval_every": _value(flags, "logging_steps") or 500}
    known = {"steps": {}, "epoch": {"eval_every": "epoch"}, "no": {"eval_every": 0}}
    return _choose(value, known)


def _stage(value: Any, flags: Flags) -> dict[str, Any]:
    verbs = [name for name, verb in VERBS.items() if verb.stage == value]
    if not verbs:
        _choose(value, dict.fromkeys(verb.stage for verb in VERBS.values()))
    if flags["objective"].value not in verbs:
        raise UserError(f"{value} is another command: `jaxllm {verbs[0]}`")
    return {}


def _deepspeed(value: Any, flags: Flags) -> dict[str, Any]:
    if not isinstance(value, str):
        raise UserError("give the path of a DeepSpeed JSON file")
    return {"deepspeed": home(value)}


# ---- the optimizer


def _warmup(value: Any, flags: Flags) -> dict[str, Any]:
    """warmup_steps: 0, the default of transformers, leaves it to warmup_ratio."""
    return {} if value == 0 and _value(flags, "warmup_ratio") else {"optim.warmup": value}


def _warmup_ratio(value: Any, flags: Flags) -> dict[str, Any]:
    return {} if _value(flags, "warmup_steps") else {"optim.warmup": value}


def _schedule(value: Any, flags: Flags) -> dict[str, Any]:
    """lr_scheduler_type with lr_scheduler_kwargs; a rate becomes a fraction of the peak."""
    if value == "constant" and (_value(flags, "warmup_steps") or _value(flags, "warmup_ratio")):
        raise UserError("constant has no warmup; use constant_with_warmup, or remove the warmup")
    schedule, takes = _choose(value, SCHEDULES)
    options = _value(flags, "lr_scheduler_kwargs") or {}
    if not isinstance(options, dict):
        raise UserError(f"lr_scheduler_kwargs is {options!r}; must be a mapping")
    options = {key: one for key, one in options.items() if one is not None}
    peak = _value(flags, "learning_rate", "optim.learning_rate")
    if value == "polynomial":
        options = {"lr_end": 1e-7} | options
    keys = {"optim.schedule": schedule}
    for key, one in options.items():
        if key not in takes:
            known = f"known: {', '.join(takes)}" if takes else f"{value} takes none"
            raise UserError(f"lr_scheduler_kwargs.{key} is not known; {known}")
        if key in RATES:
            if not (peak and isinstance(peak, int | float) and isinstance(one, int | float)):
                raise UserError(f"{key} {one} is a learning rate; give learning_rate beside it")
            keys["optim.final"] = one / peak
        elif key in SCHEDULE_KEYS:
            keys[SCHEDULE_KEYS[key]] = one
        elif one != SCHEDULE_VALUES[key]:
            raise UserError(
                f"lr_scheduler_kwargs.{key} is {one!r}; it is {SCHEDULE_VALUES[key]} here"
            )
    if value == "cosine_with_min_lr" and "optim.final" not in keys:
        raise UserError("give lr_scheduler_kwargs: {min_lr_rate: 0.1}")
    if value == "warmup_stable_decay" and "decay_type" not in options:
        keys[NOTE] = "the decay is linear; without decay_type, transformers' is a cosine"
    return keys


def _optimizer(value: Any, flags: Flags) -> dict[str, Any]:
    if isinstance(value, str) and value in QUANTIZED:
        name = QUANTIZED[value]
        less = "optim.options {mu_dtype: bfloat16} and optim.offload need less"
        note = f"{value} runs as {name} with float32 moments, which need more memory; {less}"
        return {"optim.name": name, NOTE: note}
    return {"optim.name": _choose(value, HF_OPTIMIZERS)}


# ---- objectives


def _loss(value: Any, flags: Flags) -> dict[str, Any]:
    """TRL's loss_type, which each of its trainers reads differently."""
    losses = _verb(flags).losses
    if losses is not None:
        return _choose(value, losses)
    names = value if isinstance(value, list) else [value]
    return {"align.loss": [DPO_LOSSES.get(str(name), name) for name in names]}


def _preference(value: Any, flags: Flags) -> dict[str, Any] | None:
    """LLaMA-Factory's pref_loss, which its stage dpo reads, with pref_ftx, the weight of an SFT
    loss."""
    if _verb(flags).stage != VERBS["dpo"].stage:
        return None
    verb = _choose(value, {loss: name for name, verb in VERBS.items() for loss in verb.preference})
    if verb != flags["objective"].value:
        raise UserError(f"{value} is another command: `jaxllm {verb}`")
    return _with_sft(value, _value(flags, "pref_ftx")) if VERBS[verb].losses is None else {}


def _ftx(value: Any, flags: Flags) -> dict[str, Any]:
    return _with_sft(_value(flags, "pref_loss") or "sigmoid", value) if value else {}


def _with_sft(loss: str, weight: Any) -> dict[str, Any]:
    if not weight:
        return {"align.loss": [loss]}
    return {"align.loss": [loss, "sft"], "align.loss_weights": [1.0, weight]}


def _unbiased(value: Any, flags: Flags) -> dict[str, Any]:
    if value is True and _value(flags, "beta", "align.beta"):
        raise UserError("the KL term is not multiplied by the ratio; set it to false")
    return _choose(value, {True: {}, False: {}})


# ---- trackers and the hub


def _trackers(value: Any, flags: Flags) -> dict[str, Any]:
    """report_to, which use_swanlab adds to."""
    if _value(flags, "use_swanlab") is not True:
        return {"log.report_to": value}
    names = value if isinstance(value, list) else separated(value or "none")
    return {"log.report_to": [*(n for n in names if n not in ("none", "swanlab")), "swanlab"]}


def _swanlab(value: Any, flags: Flags) -> dict[str, Any]:
    on = _trackers(_value(flags, "report_to"), flags)
    return _choose(value, {True: on, False: {}})


def _push(value: Any, flags: Flags) -> dict[str, Any]:
    folder = absolute(as_path(str(_value(flags, "output_dir") or "run")))
    name = _value(flags, "hub_model_id") or folder.name
    return _choose(value, {True: {"save.hub": name}, False: {}})


def _if_pushed(key: str) -> Rule:
    """A name without effect unless push_to_hub is true."""
    return lambda value, flags: {key: value} if _value(flags, "push_to_hub") is True else None


_SAVE = {"steps": {}, "epoch": {"save.every": "epoch"}, "no": {"save.every": 0}}
_SAVE |= {"best": {"save.every": 0, "save.keep_best": True}}
_SCALED = {"group": True, "none": False, True: True, False: False, "no": False}
_PISSA = {True: {"peft.init_lora_weights": "pissa"}, False: {}}
# name -> (its rule, help)
TRANSLATED: dict[str, tuple[Rule, str]] = {
    # ---- transformers
    "model_name_or_path": (_model, "model.path"),
    "bf16": _switch("model.compute_dtype", "bfloat16", "float32"),
    "torch_dtype": (_dtype, "model.weight_dtype and model.compute_dtype"),
    "dtype": (_dtype, "model.weight_dtype and model.compute_dtype"),
    "fp16": (_fp16, "not supported; use bf16"),
    "gradient_checkpointing": (_remat, "model.remat full"),
    "activation_checkpointing": (_remat, "model.remat full"),
    "max_length": (_length, "data.max_length"),
    "per_device_train_batch_size": (_per_device, "micro_batch_size"),
    "max_steps": (lambda value, _: {"steps": 0 if value == -1 else value}, "steps"),
    "max_grad_norm": (lambda value, _: {"optim.clip": value or 0}, "optim.clip"),
    "warmup_steps": (_warmup, "optim.warmup"),
    "warmup_ratio": (_warmup_ratio, "optim.warmup"),
    "lr_scheduler_type": (_schedule, "optim.schedule"),
    "lr_scheduler_kwargs": (_with("lr_scheduler_type"), "optim.final, optim.power and optim.decay"),
    "optim": (_optimizer, "optim.name"),
    "eval_strategy": (_eval_strategy, "eval_every"),
    "evaluation_strategy": (_eval_strategy, "eval_every"),
    "save_strategy": _choice(_SAVE, "save.every"),
    "save_total_limit": (lambda value, _: {"save.keep": value or 0}, "save.keep"),
    "logging_strategy": _choice({"steps": {}, "epoch": {"log.every": "epoch"}}, "log.every"),
    "validation_split_percentage": (_percent, "data.eval_fraction x 100"),
    "train_sampling_strategy": _choice({"random": {}}, "only random"),
    "disable_tqdm": _switch("log.progress", False, True),
    "deepspeed": (_deepspeed, "a DeepSpeed JSON file"),
    "report_to": (_trackers, "log.report_to"),
    "push_to_hub": (_push, "save.hub: hub_model_id, or the name of output_dir"),
    "hub_model_id": (_if_pushed("save.hub"), "save.hub, with push_to_hub"),
    "hub_private_repo": (_if_pushed("save.hub_private"), "save.hub_private"),
    # ---- TRL
    "dataset_name": (_hub, "data.train; data.eval too, if eval_strategy asks for evaluations"),
    "dataset_config": (_with("dataset_name"), "subset of dataset_name"),
    "dataset_train_split": (_with("dataset_name"), "split of data.train"),
    "dataset_test_split": (_with("dataset_name"), "split of data.eval"),
    "dataset_streaming": (_with("dataset_name"), "streaming of data.train"),
    "datasets": (
        lambda value, flags: mixture(value, streaming=_value(flags, "streaming") is True),
        "data.train",
    ),
    "streaming": (_with("dataset", "datasets"), "streaming of data.train"),
    "completion_only_loss": (_learned("assistant_only_loss"), "data.train_on_prompt, inverted"),
    "assistant_only_loss": (_learned("completion_only_loss"), "data.train_on_prompt, inverted"),
    "activation_offloading": _switch("model.remat", "offload"),
    "disable_dropout": _switch("peft.lora_dropout", 0.0),
    "use_peft": _switch("peft.method", "lora"),
    "load_in_4bit": _switch("peft.quantize_base", "nf4"),
    "load_in_8bit": _switch("peft.quantize_base", "int8"),
    "loss_type": (_loss, "align.loss; grpo: rl.normalizer"),
    "precompute_ref_log_probs": _switch("align.reference", "precomputed", "model"),
    "max_completion_length": (_part("rl.max_new_tokens"), "rl.max_new_tokens"),
    "max_prompt_length": (_part("data.max_length"), "data.max_length"),
    "steps_per_generation": (_generation_steps, "rl.minibatches"),
    "scale_rewards": (lambda v, _: {"rl.scale_rewards": _choose(v, _SCALED)}, "rl.scale_rewards"),
    "use_bias_correction_kl": (_unbiased, "only false"),
    # ---- LLaMA-Factory
    "stage": (_stage, "the command"),
    "finetuning_type": (_tuning, "peft.method"),
    "train_from_scratch": (_scratch, "model_name_or_path is model.config"),
    "pure_bf16": (_pure, "model.weight_dtype and model.compute_dtype bfloat16"),
    "disable_gradient_checkpointing": _switch("model.remat", "none"),
    "adapter_name_or_path": (_adapter, "peft.path"),
    "lora_rank": (_rank, "peft.r; peft.lora_alpha is twice as much by default"),
    "lora_target": (_targets, "peft.target_modules"),
    "additional_target": (
        lambda value, _: {"peft.modules_to_save": separated(value)},
        "peft.modules_to_save",
    ),
    "pissa_init": _choice(_PISSA, "peft.init_lora_weights pissa"),
    "quantization_bit": _choice(
        {4: {"peft.quantize_base": "nf4"}, 8: {"peft.quantize_base": "int8"}}, "peft.quantize_base"
    ),
    "dataset": (_factory("data.train"), "data.train, by dataset_dir/dataset_info.json"),
    "eval_dataset": (_factory("data.eval"), "data.eval, by dataset_dir/dataset_info.json"),
    "max_samples": (
        _with("dataset", "eval_dataset", other="; or write data.train: {path: …, max_samples: …}"),
        "max_samples of each source",
    ),
    "mix_strategy": (_mix, "weights of data.train"),
    "interleave_probs": (_with("dataset"), "weights of data.train"),
    "val_size": (_held_out, "data.eval_fraction"),
    "template": (_template, "data.template, for a file"),
    "mask_history": _switch("data.learn", "last"),
    "neat_packing": _switch("data.packing", True),
    "enable_thinking": (
        lambda value, _: {"data.template_kwargs": {"enable_thinking": value}},
        "data.template_kwargs {enable_thinking: …}",
    ),
    "use_muon": _switch("optim.name", "muon"),
    "pref_loss": (_preference, "align.loss"),
    "pref_ftx": (_ftx, "weight of the loss sft in align.loss"),
    "use_swanlab": (_swanlab, "log.report_to swanlab"),
}
# Names for which null has a meaning; for others it means that they are not given.
NULLS = frozenset({"max_length", "max_grad_norm", "save_total_limit", "report_to"})
# Strategy -> its number of steps, which the Trainer reads only for strategy `steps`.
STEPS = {f"{name}_strategy": f"{name}_steps" for name in ("eval", "save", "logging")}
STEPS |= {"evaluation_strategy": "eval_steps"}
