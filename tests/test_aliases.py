# SPDX-License-Identifier: Apache-2.0
"""The names of transformers and DeepSpeed: each is translated, refused or listed."""

import json
import re
from dataclasses import fields
from itertools import combinations
from pathlib import Path

import pytest

from jaxllm.config import (
    OptimSection,
    Source,
    aliases,
    leaves,
    load_config,
    value_of,
)
from jaxllm.config.checks import check, resolve
from jaxllm.config.names import IGNORED, REFUSED


def load(*args, path=None, objective="pretrain"):
    return load_config(objective, path, args)[0]


def refused(*args, path=None):
    with pytest.raises(ValueError) as error:
        load(*args, path=path)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def deepspeed(tmp_path):
    def write(**block):
        (tmp_path / "ds.json").write_text(json.dumps(block))
        return "--deepspeed", str(tmp_path / "ds.json")

    return write


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


# ---- names of transformers


ALIASES = [
    ("model_name_or_path", "m", {"model.path": "m"}),
    ("model_name_or_path", "2024", {"model.path": "2024"}),
    ("config_name", "c", {"model.config": "c"}),
    ("tokenizer_name", "t", {"model.tokenizer": "t"}),
    ("train_file", "a", {"data.train": (Source("a"),)}),
    ("train_files", "a", {"data.train": (Source("a"),)}),
    ("dataset_name", "o/d", {"data.train": (Source("o/d"),)}),
    ("validation_file", "a", {"data.eval": (Source("a"),)}),
    ("validation_files", "a", {"data.eval": (Source("a"),)}),
    ("validation_split_percentage", "5", {"data.eval_fraction": 0.05}),
    ("block_size", "64", {"data.max_length": 64}),
    ("max_length", "64", {"data.max_length": 64}),
    ("max_seq_length", "64", {"data.max_length": 64}),
    ("packing", "False", {"data.packing": False}),
    ("preprocessing_num_workers", "3", {"data.workers": 3}),
    ("dataset_num_proc", "3", {"data.workers": 3}),
    ("per_device_train_batch_size", "4", {"micro_batch_size": 4, "batch_size": 0}),
    ("gradient_accumulation_steps", "4", {"accumulation": 4, "batch_size": 32}),
    ("learning_rate", "1e-5", {"optim.learning_rate": 1e-5}),
    ("lr_scheduler_type", "cosine", {"optim.schedule": "cosine"}),
    ("lr_scheduler_type", "linear", {"optim.schedule": "linear"}),
    ("lr_scheduler_type", "constant", {"optim.schedule": "constant"}),
    ("lr_scheduler_type", "constant_with_warmup", {"optim.schedule": "constant"}),
    ("lr_scheduler_type", "warmup_stable_decay", {"optim.schedule": "wsd"}),
    ("lr_scheduler_type", "inverse_sqrt", {"optim.schedule": "inverse_sqrt"}),
    ("optim", "adamw_torch", {"optim.name": "adamw"}),
    ("warmup_steps", "20", {"optim.warmup": 20.0}),
    ("warmup_ratio", "0.03", {"optim.warmup": 0.03}),
    ("weight_decay", "0.1", {"optim.weight_decay": 0.1}),
    ("adam_beta1", "0.8", {"optim.b1": 0.8}),
    ("adam_beta2", "0.95", {"optim.b2": 0.95}),
    ("adam_epsilon", "1e-6", {"optim.eps": 1e-6}),
    ("max_grad_norm", "0.5", {"optim.clip": 0.5}),
    ("num_train_epochs", "3", {"epochs": 3.0}),
    ("max_steps", "10", {"steps": 10}),
    ("max_steps", "-1", {"steps": 0}),
    ("seed", "7", {"seed": 7}),
    ("output_dir", "o", {"output_dir": "o"}),
    ("overwrite_output_dir", None, {"overwrite": True}),
    ("resume_from_checkpoint", "False", {"resume": False}),
    ("logging_steps", "5", {"log.every": 5}),
    ("eval_steps", "5", {"eval_every": 5}),
    ("eval_strategy", "no", {"eval_every": 0}),
    ("eval_strategy", "epoch", {"eval_every": "epoch"}),
    ("eval_strategy", "steps", {"eval_every": 500}),
    ("evaluation_strategy", "no", {"eval_every": 0}),
    ("save_steps", "5", {"save.every": 5}),
    ("save_strategy", "no", {"save.every": 0}),
    ("save_strategy", "epoch", {"save.every": "epoch"}),
    ("save_strategy", "best", {"save.every": 0, "save.keep_best": True}),
    ("logging_strategy", "epoch", {"log.every": "epoch"}),
    ("logging_strategy", "steps", {"log.every": 10}),
    ("load_best_model_at_end", None, {"save.load_best": True}),
    ("metric_for_best_model", "eval_accuracy", {"eval.metric": "eval_accuracy"}),
    ("greater_is_better", "False", {"eval.greater": False}),
    ("early_stopping_patience", "3", {"eval.patience": 3}),
    ("early_stopping_threshold", "0.01", {"eval.min_delta": 0.01}),
    ("save_total_limit", "2", {"save.keep": 2}),
    ("report_to", "none", {"log.report_to": ()}),
    ("report_to", "wandb", {"log.report_to": ("wandb",)}),
    ("report_to", "tensorboard,wandb", {"log.report_to": ("tensorboard", "wandb")}),
    ("report_to", "swanlab,mlflow", {"log.report_to": ("swanlab", "mlflow")}),
    ("disable_tqdm", "True", {"log.progress": False}),
    ("bf16", None, {"model.compute_dtype": "bfloat16", "model.weight_dtype": "float32"}),
    ("fp16", "False", {"model.compute_dtype": "float32"}),
    (
        "torch_dtype",
        "bfloat16",
        {"model.compute_dtype": "bfloat16", "model.weight_dtype": "bfloat16"},
    ),
    ("dtype", "torch.float32", {"model.compute_dtype": "float32", "model.weight_dtype": "float32"}),
    ("torch_dtype", "auto", {"model.weight_dtype": "float32"}),
    ("gradient_checkpointing", None, {"model.remat": "full"}),
    ("gradient_checkpointing", "False", {"model.remat": "none"}),
    ("activation_checkpointing", "False", {"model.remat": "none"}),
    ("train_sampling_strategy", "random", {}),
    ("use_peft", None, {"peft.method": "lora"}),
    ("use_peft", "False", {"peft.method": "none"}),
    ("lora_r", "16", {"peft.r": 16}),
    ("lora_alpha", "32", {"peft.lora_alpha": 32.0}),
    ("peft.alpha", "32", {"peft.lora_alpha": 32.0}),
    ("lora_dropout", "0.05", {"peft.lora_dropout": 0.05}),
    ("peft.dropout", "0.05", {"peft.lora_dropout": 0.05}),
    ("lora_target_modules", "q_proj", {"peft.target_modules": ("q_proj",)}),
    ("lora_target_parameters", "down_proj", {"peft.target_parameters": ("down_proj",)}),
    ("router_aux_loss_coef", "0.01", {"model.balance_loss": 0.01}),
    ("moe_aux_loss_coef", "0.01", {"model.balance_loss": 0.01}),
    ("lora_modules_to_save", "lm_head", {"peft.modules_to_save": ("lm_head",)}),
    ("use_rslora", None, {"peft.use_rslora": True}),
    ("use_dora", None, {"peft.use_dora": True}),
    ("load_in_4bit", None, {"peft.quantize_base": "nf4"}),
    ("load_in_8bit", None, {"peft.quantize_base": "int8"}),
    ("beta", "0.2", {"align.beta": 0.2}),
    ("kl_coef", "0.2", {"align.beta": 0.2}),
    ("dpo: loss_type", "ipo", {"align.loss": ("ipo",)}),
    ("loss_weights", "[0.5]", {"align.loss_weights": (0.5,)}),
    ("label_smoothing", "0.1", {"align.label_smoothing": 0.1}),
    ("simpo_gamma", "0.5", {"align.gamma": 0.5}),
    ("desirable_weight", "2", {"align.desirable_weight": 2.0}),
    ("undesirable_weight", "2", {"align.undesirable_weight": 2.0}),
    ("center_rewards_coefficient", "0.01", {"align.centering": 0.01}),
    ("precompute_ref_log_probs", None, {"align.reference": "precomputed"}),
    ("reward_funcs", "m:f", {"rl.rewards": ("m:f",)}),
    ("reward_model_path", "rm", {"rl.rewards": ("rm",)}),
    ("reward_weights", "2", {"rl.reward_weights": (2.0,)}),
    ("num_generations", "4", {"rl.group_size": 4}),
    ("grpo: max_prompt_length", "32", {"data.max_length": 32}),
    ("exp_name", "n", {"log.run_name": "n"}),
    ("grpo: max_completion_length", "32", {"rl.max_new_tokens": 32}),
    ("response_length", "32", {"rl.max_new_tokens": 32}),
    ("temperature", "0.7", {"rl.temperature": 0.7}),
    ("num_mini_batches", "2", {"rl.minibatches": 2}),
    ("num_iterations", "2", {"rl.iterations": 2}),
    ("num_ppo_epochs", "2", {"rl.iterations": 2}),
    ("epsilon", "0.1", {"rl.clip": 0.1}),
    ("epsilon_high", "0.28", {"rl.clip_high": 0.28}),
    ("cliprange", "0.1", {"rl.clip": 0.1}),
    ("cliprange_value", "0.1", {"rl.clip_value": 0.1}),
    ("vf_coef", "0.5", {"rl.value_weight": 0.5}),
    ("kl_estimator", "k3", {"rl.kl": "k3"}),
    ("gamma", "0.99", {"rl.discount": 0.99}),
    ("lam", "0.9", {"rl.gae_lambda": 0.9}),
    ("mask_truncated_completions", None, {"rl.mask_truncated": True}),
    ("missing_eos_penalty", "1", {"rl.missing_eos_penalty": 1.0}),
    ("max_grad_norm", "null", {"optim.clip": 0.0}),
    ("save_total_limit", "null", {"save.keep": 0}),
    ("run_name", "n", {"log.run_name": "n"}),
    ("project", "p", {"log.project": "p"}),
    (
        "lr_scheduler_type",
        "polynomial --learning_rate 1e-3",
        {"optim.schedule": "polynomial", "optim.final": pytest.approx(1e-4)},
    ),
    (
        "lr_scheduler_kwargs",
        "{lr_end: 2e-4, power: 2} --lr_scheduler_type polynomial --learning_rate 1e-3",
        {"optim.schedule": "polynomial", "optim.final": 0.2, "optim.power": 2.0},
    ),
    (
        "lr_scheduler_type",
        "cosine_with_min_lr --lr_scheduler_kwargs {min_lr: 1e-5} --learning_rate 1e-4",
        {"optim.schedule": "cosine", "optim.final": 0.1},
    ),
    (
        "lr_scheduler_type",
        "warmup_stable_decay --lr_scheduler_kwargs {num_decay_steps: 9, min_lr_ratio: 0.2}",
        {"optim.schedule": "wsd", "optim.decay": 9.0, "optim.final": 0.2},
    ),
    ("optim", "paged_adamw_32bit", {"optim.name": "adamw"}),
    ("optim", "adamw_8bit", {"optim.name": "adamw"}),
    ("optim", "paged_lion_8bit", {"optim.name": "lion"}),
    ("push_to_hub", None, {"save.hub": "run"}),
    ("push_to_hub", "true --output_dir a/b", {"save.hub": "b"}),
    ("hub_model_id", "o/n --push_to_hub", {"save.hub": "o/n"}),
    ("hub_model_id", "o/n", {"save.hub": None}),
    ("hub_private_repo", "true --push_to_hub", {"save.hub_private": True}),
    # TRL
    ("dataset_name", "o/d --dataset_config en", {"data.train": (Source("o/d:en"),)}),
    ("dataset_config", "en --dataset_name o/d", {"data.train": (Source("o/d:en"),)}),
    (
        "dataset_train_split",
        "dev --dataset_name o/d",
        {"data.train": (Source("o/d", split="dev"),), "data.eval": ()},
    ),
    (
        "dataset_test_split",
        "held --dataset_name o/d --eval_strategy steps",
        {"data.train": (Source("o/d"),), "data.eval": (Source("o/d", split="held"),)},
    ),
    ("dataset_streaming", "true --dataset_name d", {"data.train": (Source("d", streaming=True),)}),
    (
        "datasets",
        "[{path: o/d, name: en, split: dev}, {path: json, data_files: [a.json, b.json]}]",
        {"data.train": (Source("o/d:en", split="dev"), Source("a.json"), Source("b.json"))},
    ),
    ("streaming", "false", {}),
    ("test_split_size", "0.1", {"data.eval_fraction": 0.1}),
    ("chat_template_path", "t.jinja", {"data.template": "t.jinja"}),
    ("chat_template_kwargs", "{a: 1}", {"data.template_kwargs": {"a": 1}}),
    ("completion_only_loss", "True", {"data.train_on_prompt": False}),
    ("completion_only_loss", "False", {"data.train_on_prompt": True}),
    ("assistant_only_loss", "False", {"data.train_on_prompt": True}),
    ("assistant_only_loss", "False --completion_only_loss", {"data.train_on_prompt": False}),
    ("activation_offloading", "True --gradient_checkpointing", {"model.remat": "offload"}),
    ("disable_dropout", None, {"peft.lora_dropout": 0.0}),
    ("loss_type", "nll", {"align.loss": ("sigmoid",)}),
    ("dpo: loss_type", "[exo_pair, nca_pair]", {"align.loss": ("exo", "nca")}),
    ("kto: loss_type", "kto", {}),
    ("simpo: loss_type", "simpo", {}),
    ("grpo: loss_type", "dr_grpo", {"rl.normalizer": "constant"}),
    ("grpo: loss_type", "grpo", {"rl.normalizer": "sequence"}),
    (
        "grpo: steps_per_generation",
        "8 --gradient_accumulation_steps 4",
        {"rl.minibatches": 2, "accumulation": 4},
    ),
    ("grpo: scale_rewards", "group", {"rl.scale_rewards": True}),
    ("grpo: scale_rewards", "none", {"rl.scale_rewards": False}),
    ("grpo: use_bias_correction_kl", "False --beta 0.1", {"align.beta": 0.1}),
    ("grpo: top_p", "0.9", {"rl.top_p": 0.9}),
    ("grpo: top_k", "5", {"rl.top_k": 5}),
    ("grpo: min_p", "0.1", {"rl.min_p": 0.1}),
    # LLaMA-Factory
    ("stage", "sft", {"objective": "sft"}),
    ("reward: stage", "rm", {"objective": "reward"}),
    ("finetuning_type", "lora", {"peft.method": "lora"}),
    ("finetuning_type", "full", {"peft.method": "none"}),
    ("train_from_scratch", "true --model_name_or_path m", {"model.config": "m"}),
    ("pure_bf16", None, {"model.weight_dtype": "bfloat16", "model.compute_dtype": "bfloat16"}),
    ("disable_gradient_checkpointing", None, {"model.remat": "none"}),
    ("adapter_name_or_path", "a", {"peft.path": "a", "peft.method": "lora"}),
    ("lora_rank", "4", {"peft.r": 4, "peft.lora_alpha": 8.0}),
    ("lora_rank", "4 --lora_alpha 32", {"peft.r": 4, "peft.lora_alpha": 32.0}),
    ("lora_target", "all", {"peft.target_modules": ("all-linear",)}),
    ("lora_target", "q_proj,v_proj", {"peft.target_modules": ("q_proj", "v_proj")}),
    ("additional_target", "embed_tokens", {"peft.modules_to_save": ("embed_tokens",)}),
    ("loraplus_lr_ratio", "16", {"peft.loraplus_lr_ratio": 16.0}),
    ("pissa_init", None, {"peft.init_lora_weights": "pissa"}),
    ("quantization_bit", "4", {"peft.quantize_base": "nf4"}),
    ("quantization_bit", "8", {"peft.quantize_base": "int8"}),
    ("cutoff_len", "64", {"data.max_length": 64}),
    ("train_on_prompt", None, {"data.train_on_prompt": True}),
    ("default_system", "Be brief.", {"data.system": "Be brief."}),
    ("template", "t.jinja", {"data.template": "t.jinja"}),
    ("template", "llama3", {"data.template": None}),
    ("mask_history", None, {"data.learn": "last"}),
    ("neat_packing", None, {"data.packing": True}),
    ("enable_thinking", "false", {"data.template_kwargs": {"enable_thinking": False}}),
    ("val_size", "0.1", {"data.eval_fraction": 0.1}),
    ("dataset", "o/d,o/e", {"data.train": (Source("o/d"), Source("o/e"))}),
    ("eval_dataset", "o/d", {"data.eval": (Source("o/d"),)}),
    ("max_samples", "9 --dataset o/d", {"data.train": (Source("o/d", max_samples=9),)}),
    (
        "interleave_probs",
        "0.7,0.3 --dataset o/d,o/e --mix_strategy interleave_over",
        {"data.train": (Source("o/d", 0.7), Source("o/e", 0.3))},
    ),
    (
        "mix_strategy",
        "interleave_over --dataset o/d,o/e --streaming",
        {"data.train": (Source("o/d", 1.0, streaming=True), Source("o/e", 1.0, streaming=True))},
    ),
    ("early_stopping_steps", "3", {"eval.patience": 3}),
    ("use_muon", None, {"optim.name": "muon"}),
    ("pref_beta", "0.2", {"align.beta": 0.2}),
    ("dpo: pref_loss", "hinge", {"align.loss": ("hinge",)}),
    ("orpo: pref_loss", "orpo", {}),
    ("dpo: pref_ftx", "0.0 --pref_loss ipo", {"align.loss": ("ipo",)}),
    ("dpo: pref_ftx", "0.5", {"align.loss": ("sigmoid", "sft"), "align.loss_weights": (1.0, 0.5)}),
    ("dpo_label_smoothing", "0.1", {"align.label_smoothing": 0.1}),
    ("kto_chosen_weight", "2", {"align.desirable_weight": 2.0}),
    ("kto_rejected_weight", "2", {"align.undesirable_weight": 2.0}),
    ("reward_model", "rm", {"rl.rewards": ("rm",)}),
    ("max_new_tokens", "32", {"rl.max_new_tokens": 32}),
    ("ppo_epochs", "2", {"rl.iterations": 2}),
    ("ppo_buffer_size", "2", {"rl.minibatches": 2}),
    ("ppo_target", "6", {"rl.kl_target": 6.0}),
    ("use_swanlab", "false --report_to none", {"log.report_to": ()}),
    ("swanlab_project", "p", {"log.project": "p"}),
    ("swanlab_run_name", "n", {"log.run_name": "n"}),
]


@pytest.mark.parametrize(("name", "text", "values"), ALIASES)
def test_names_of_other_libraries(name, text, values, monkeypatch, tmp_path):
    """name: that of the command before it, if not sft; text: its value, and further flags."""
    monkeypatch.chdir(tmp_path)
    verb, _, name = name.rpartition(": ")
    flags = [part.partition(" ") for part in f"{name} {text or ''}".strip().split(" --")]
    args = [word for flag, _, value in flags for word in (f"--{flag}", value) if word]
    cfg, provenance = load_config(verb or "sft", None, args)
    assert {key: value_of(cfg, key) for key in values} == values
    for key, value in values.items():
        if value != leaves()[key].default and key != "objective":
            assert provenance[key] in args


def test_every_name_that_is_translated_is_tested():
    tested = {name.rpartition(": ")[2] for name, _, _ in ALIASES} | {"deepspeed"}
    assert set(aliases.meanings()) == tested - {"output_dir", "seed"}  # these two are ours too


def test_bf16_with_torch_dtype_sets_only_the_compute_dtype():
    model = load("--torch_dtype", "float32", "--bf16").model
    assert (model.weight_dtype, model.compute_dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("file", "flags", "wanted"),
    [
        (
            "hub_model_id: mine/x\nhub_private_repo: true\n",
            ["--push_to_hub"],
            {"save.hub": "mine/x", "save.hub_private": True},
        ),
        (
            "push_to_hub: true\noutput_dir: saves/x\n",
            ["--hub_private_repo"],
            {"save.hub": "x", "save.hub_private": True},
        ),
        (
            "finetuning_type: lora\nlora_rank: 8\nlora_alpha: 32\n",
            ["--lora_rank", "64"],
            {"peft.r": 64, "peft.lora_alpha": 32},
        ),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\n"
            "learning_rate: 1e-4\n",
            ["--learning_rate", "1e-3"],
            {"optim.final": 0.01},
        ),
        ("warmup_steps: 0\nwarmup_ratio: 0.1\n", [], {"optim.warmup": 0.1}),
        ("warmup_steps: null\nwarmup_ratio: 0.1\n", [], {"optim.warmup": 0.1}),
        ("eval_strategy: steps\neval_steps: null\n", [], {"eval_every": 500}),
        ("run_name: null\nswanlab_run_name: a\n", [], {"log.run_name": "a"}),
        ("datasets: [{path: o/d}]\nstreaming: true\n", [], {"data.train.0.streaming": True}),
    ],
)
def test_a_name_is_read_with_those_of_the_file_and_the_flags(yaml, file, flags, wanted):
    cfg = load(*flags, path=yaml(file))
    for key, value in wanted.items():
        found = cfg
        for part in key.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        assert found == value, key


def test_pref_loss_is_of_the_stage_dpo_alone(capsys):
    with pytest.raises(ValueError, match="--pref_loss: simpo is another command: `jaxllm simpo`"):
        load("--pref_loss", "simpo", objective="dpo")
    load("--pref_loss", "sigmoid", objective="sft")
    assert "ignored, no effect here: --pref_loss" in capsys.readouterr().err


def test_a_batch_size_that_is_given_survives_a_per_device_one(yaml):
    args = ("--batch_size", "64", "--per_device_train_batch_size", "4")
    assert load(*args).batch_size == 64
    path = yaml("batch_size: 64\n")
    assert load("--per_device_train_batch_size", "4", path=path).batch_size == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lora_r", "0"], "--lora_r: peft.r is 0; it should be greater than 0"),
        (["--fp16"], "--fp16: float16 is not supported, since it needs loss scaling; use --bf16"),
        (
            ["--torch_dtype", "float16"],
            "--torch_dtype: 'float16' is not known; known: float32, bfloat16",
        ),
        (["--bf16", "maybe"], "--bf16: seen 'maybe'; must be true or false"),
        (["--lr_scheduler_type", "greedy"], "known: cosine, linear, constant"),
        (["--lr_scheduler_type", "polynomial"], "lr_end 1e-07 is a learning rate; give"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_kwargs: {min_lr_rate: 0.1}"),
        (
            ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", "{num_cycles: 2}"],
            "num_cycles is 2; it is 0.5 here",
        ),
        (["--lr_scheduler_type", "constant", "--warmup_steps", "5"], "use constant_with_warmup"),
        (["--eval_strategy", "best"], "--eval_strategy: 'best' is not known; known: steps, epoch"),
        (
            ["--logging_strategy", "no"],
            "--logging_strategy: 'no' is not known; known: steps, epoch",
        ),
        (
            ["--eval_every", "often"],
            "eval_every is 'often'; it should be a number of steps, or epoch",
        ),
        (["--save.every", "-1"], "save.every is -1; it should be a number of steps, or epoch"),
        (
            ["--report_to", "comet_ml"],
            "log.report_to[0] is 'comet_ml'; it should be 'wandb', 'tensorboard', 'swanlab', ",
        ),
        (
            ["--max_length", "8", "--block_size", "9"],
            "given twice: 8 by --max_length, 9 by --block_size",
        ),
        (["--lr_scheduler_type", "[a]"], "--lr_scheduler_type: ['a'] is not known; known: cosine"),
        (["--optim", "[a]"], "--optim: ['a'] is not known; known: adamw_torch"),
        (["--eval_strategy", "{a: 1}"], "--eval_strategy: {'a': 1} is not known; known: steps"),
        (
            ["--validation_split_percentage", "abc"],
            "--validation_split_percentage: seen 'abc'; must be a number below 100",
        ),
        (["--validation_split_percentage"], "seen True; must be a number below 100"),
        (["--deepspeed"], "--deepspeed: give the path of a DeepSpeed JSON file"),
        (["--train_sampling_strategy", "sequential"], "'sequential' is not known; known: random"),
        (
            ["--label_smoothing_factor", "0.1"],
            "--label_smoothing_factor: label smoothing is not supported",
        ),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha: NEFTune is not supported"),
        (["--lr_scheduler_kwargs", "{a: 1}"], "it needs lr_scheduler_type, which is not given"),
        (
            ["--lr_scheduler_type", "linear", "--lr_scheduler_kwargs", "{a: 1}"],
            "lr_scheduler_kwargs.a is not known; linear takes none",
        ),
        (["--max_length", "null"], "--max_length: rows have a length: give a number of tokens"),
        (["--loss_type", "dft"], "--loss_type: 'dft' is not known; known: nll"),
        (["--max_completion_length", "9"], "data.max_length is the limit of a prompt with its"),
        (["--lora_rank", "{}"], "--lora_rank: peft.r is {}; it should be"),
        (["--lr_scheduler_type", "polynomial", "--learning_rate", "0"], "give learning_rate"),
        (["--stage", "dpo"], "--stage: dpo is another command: `jaxllm dpo`"),
        (["--stage", "bco"], "--stage: 'bco' is not known; known: pt, sft, rm, dpo, kto, ppo"),
        (["--finetuning_type", "freeze"], "freeze is not supported; use lora or full"),
        (["--adapter_name_or_path", "a,b"], "seen 2 adapters; merge all but one"),
        (["--val_size", "100"], "seen 100; give the fraction of the examples"),
        (["--mix_strategy", "interleave_under", "--dataset", "o/d"], "use interleave_over"),
        (["--max_samples", "9"], "not given; or write data.train: {path: …, max_samples"),
        (["--dataset", "identity"], "data/dataset_info.json: no such file; give its file as"),
        (["--datasets", "[{path: o/d, fraction: 0.5}]"], "fraction of o/d: write sources of"),
        (["--use_bias_correction_kl", "--beta", "0.1"], "not multiplied by the ratio; set it to"),
        (["--packing_strategy", "wrapped"], "--packing_strategy: examples are packed whole"),
        (["--hub_token", "x"], "--hub_token: a token would be stored with the run; set HF_TOKEN"),
        (["--overwrite_output_dir", "--resume_from_checkpoint", "True"], "keep one"),
        (
            ["--resume_from_checkpoint", "other/checkpoint-9"],
            "other/checkpoint-9 is not in output_dir run",
        ),
    ],
)
def test_unsupported_arguments_of_transformers_are_refused(args, message):
    assert message in refused(*args)


@pytest.mark.parametrize(
    ("strategy", "steps", "key"),
    [
        ("eval_strategy", "eval_steps", "eval_every"),
        ("evaluation_strategy", "eval_steps", "eval_every"),
        ("save_strategy", "save_steps", "save.every"),
        ("logging_strategy", "logging_steps", "log.every"),
    ],
)
@pytest.mark.parametrize("value", ["no", "epoch", "best", "steps"])
def test_steps_are_ignored_unless_the_strategy_is_steps(strategy, steps, key, value):
    known = ["epoch", "steps"] + ["no"] * (key != "log.every") + ["best"] * (key == "save.every")
    if value not in known:
        return
    given = [aliases.Given(strategy, value, f"--{strategy}"), aliases.Given(steps, 7, f"--{steps}")]
    for layer in (given, given[::-1]):
        found = aliases.translate(layer)
        want = {"no": 0, "best": 0, "epoch": "epoch", "steps": 7}[value]
        assert found.given[key].value == want
        assert found.ignored == ([] if value == "steps" else [f"--{steps}"])


def test_a_checkpoint_inside_output_dir_means_resume():
    assert load("--output_dir", "o", "--resume_from_checkpoint", "o/checkpoints/9").resume is True


def test_unsupported_arguments_may_be_switched_off(capsys):
    off = ("--use_peft", "False", "--label_smoothing_factor", "0.0", "--neftune_noise_alpha")
    assert load(*off, "null") == load()
    assert capsys.readouterr().err == ""


def test_every_field_of_training_arguments_is_translated_ignored_or_refused():
    transformers = pytest.importorskip("transformers")
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text()
    if f"\ntransformers=={transformers.__version__} " not in pins:
        pytest.skip(f"the fields of transformers {transformers.__version__} may be others")
    theirs = {f.name for f in fields(transformers.Seq2SeqTrainingArguments)}
    read = set(aliases.meanings()) | set(leaves())
    assert not theirs - read - IGNORED - REFUSED.keys()
    for one, other in combinations((read, IGNORED, REFUSED.keys()), 2):
        assert not one & other


def test_ignored_names_are_listed(capsys):
    load("--do_train", "--tf32", "True", "--logging_dir", "logs")
    assert capsys.readouterr().err == (
        "jaxllm: ignored, no effect here: --do_train, --tf32, --logging_dir\n"
    )


# ---- DeepSpeed


LAUNCH_LINE = """--config_name models/qwen-1.5b --tokenizer_name models/qwen-1.5b
    --train_files data/corpus.jsonl --per_device_train_batch_size 16
    --gradient_accumulation_steps 4 --do_train --output_dir output/pretrain
    --evaluation_strategy no --learning_rate 1e-4 --num_train_epochs 1 --warmup_steps 200
    --logging_dir output/pretrain/logs --logging_strategy steps --logging_steps 5
    --save_strategy steps --save_steps 100 --preprocessing_num_workers 10 --save_total_limit 1
    --seed 12 --block_size 2048 --bf16 --gradient_checkpointing --report_to wandb""".split()
AUTO = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_scatter": True},
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 10,
}


def test_the_chapters_launch_line(deepspeed, capsys):
    flag, path = deepspeed(**AUTO)
    cfg = load(*LAUNCH_LINE, flag, path)
    check(cfg)
    cfg = resolve(cfg, 8)
    assert (cfg.batch_size, cfg.micro_batch_size, cfg.epochs, cfg.seed) == (512, 16, 1.0, 12)
    assert cfg.model.compute_dtype == "bfloat16" and cfg.model.remat == "full"
    assert cfg.mesh.zero == 2 and cfg.log.report_to == ("wandb",) and cfg.data.max_length == 2048
    assert capsys.readouterr().err == (
        "jaxllm: ignored, no effect here: --do_train, --logging_dir, "
        f"{path}: zero_optimization.overlap_comm, zero_optimization.reduce_scatter, "
        "steps_per_print\n"
    )


def test_deepspeed_values_are_carried_over(deepspeed):
    flags = deepspeed(
        bf16={"enabled": True},
        zero_optimization={"stage": 1},
        gradient_clipping=0.3,
        train_batch_size=64,
        train_micro_batch_size_per_gpu=2,
        optimizer={
            "type": "AdamW",
            "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1},
        },
        scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 3e-4, "warmup_num_steps": 30}},
    )
    cfg, provenance = load_config("pretrain", None, flags)
    assert cfg.optim == OptimSection(
        learning_rate=3e-4,
        b2=0.95,
        eps=1e-7,
        weight_decay=0.1,
        clip=0.3,
        schedule="warmup_log",
        warmup=30.0,
    )
    assert (cfg.batch_size, cfg.micro_batch_size, cfg.mesh.zero) == (64, 2, 1)
    assert cfg.model.compute_dtype == "bfloat16"
    assert provenance["optim.b2"] == f"{flags[1]}: optimizer.params.betas"


STEPS = {"warmup_num_steps": 5}


@pytest.mark.parametrize(
    ("kind", "params", "wanted"),
    [
        ("WarmupLR", {}, ("warmup_log", 1000.0, 0.0)),
        ("WarmupLR", STEPS | {"warmup_type": "linear"}, ("constant", 5.0, 0.0)),
        ("WarmupDecayLR", STEPS | {"total_num_steps": "auto"}, ("linear", 5.0, 0.0)),
        ("WarmupCosineLR", STEPS | {"cos_min_ratio": 0.1}, ("cosine", 5.0, 0.1)),
        ("WarmupCosineLR", {"warmup_num_steps": "auto"}, ("cosine", 0.0, 1e-4)),
    ],
)
def test_deepspeed_schedules(deepspeed, kind, params, wanted, capsys):
    optim = load(*deepspeed(scheduler={"type": kind, "params": params})).optim
    assert (optim.schedule, optim.warmup, optim.final) == wanted
    log = "warmup_type log (the warmup is linear)" in capsys.readouterr().err
    assert log == (kind != "WarmupLR")


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        ({"type": "Adam"}, "adamw"),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, "adam"),
        ({"type": "SGD"}, "sgd"),
    ],
)
def test_deepspeed_optimizers(deepspeed, optimizer, name):
    assert load(*deepspeed(optimizer=optimizer)).optim.name == name


def test_deepspeed_auto_takes_the_flags(deepspeed):
    flags = deepspeed(
        gradient_clipping="auto",
        optimizer={
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"},
        },
        scheduler={
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
            },
        },
    )
    args = ("--learning_rate", "1e-3", "--weight_decay", "0.2", "--warmup_steps", "9")
    optim = load(*args, "--lr_scheduler_type", "constant_with_warmup", *flags).optim
    assert (optim.learning_rate, optim.weight_decay, optim.warmup) == (1e-3, 0.2, 9.0)
    assert (optim.clip, optim.b1, optim.schedule) == (1.0, 0.9, "warmup_log")


@pytest.mark.parametrize(
    ("block", "args", "message"),
    [
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            ["--learning_rate", "1e-4"],
            "optimizer.params.lr is 0.001 but --learning_rate sets optim.learning_rate to 0.0001",
        ),
        (
            {"zero_optimization": {"stage": 2}},
            ["--mesh.zero", "3"],
            "stage is 2 but --mesh.zero sets",
        ),
        ({"gradient_clipping": 1.0}, ["--max_grad_norm", "0.5"], "gradient_clipping is 1.0"),
        ({"train_micro_batch_size_per_gpu": 8}, ["--per_device_train_batch_size", "4"], "is 8 but"),
        ({"train_batch_size": 8}, ["--batch_size", "4"], "train_batch_size is 8"),
        ({"bf16": {"enabled": False}}, ["--bf16"], "bf16.enabled is 'float32' but --bf16"),
        (
            {"scheduler": {"type": "WarmupLR"}},
            ["--lr_scheduler_type", "cosine"],
            "scheduler.type is",
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}},
            ["--max_steps", "8"],
            "total_num_steps is 9 but --max_steps sets steps to 8",
        ),
        (
            {
                "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4}},
            },
            [],
            "make them agree",
        ),
        (
            {"fp16": {"enabled": True}},
            [],
            "fp16 is not supported, since it needs loss scaling; enable bf16",
        ),
        (
            {"optimizer": {"type": "OneBitAdam"}},
            [],
            "'OneBitAdam' is not known; known: Adam, AdamW",
        ),
        ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, [], "must be two numbers"),
        ({"scheduler": {"type": "OneCycle"}}, [], "'OneCycle' is not known; known: WarmupLR"),
        (
            {"zero_optimization": {"stage": 7}},
            [],
            "stage: mesh.zero is 7; it should be 0, 1, 2 or 3",
        ),
    ],
)
def test_contradictions_with_a_deepspeed_file_are_refused(deepspeed, block, args, message):
    assert message in refused(*args, *deepspeed(**block))


def test_a_deepspeed_file_may_not_contradict_the_yaml_file(deepspeed, yaml):
    flags = deepspeed(zero_optimization={"stage": 2})
    assert "run.yaml:2 sets mesh.zero to 3" in refused(*flags, path=yaml("mesh:\n  zero: 3\n"))


def test_deepspeed_offload_of_the_optimizer_to_the_cpu_is_taken(deepspeed, capsys):
    offload = {"device": "cpu", "pin_memory": True}
    cfg = load(*deepspeed(zero_optimization={"stage": 2, "offload_optimizer": offload}))
    assert cfg.optim.offload and capsys.readouterr().err == ""


def test_deepspeed_offload_to_a_disk_is_listed_unless_it_is_none(deepspeed, capsys):
    offload = {"device": "nvme", "pin_memory": True}
    assert not load(
        *deepspeed(zero_optimization={"stage": 2, "offload_optimizer": offload})
    ).optim.offload
    assert "zero_optimization.offload_optimizer.device" in capsys.readouterr().err
    load(*deepspeed(zero_optimization={"stage": 2, "offload_optimizer": {"device": "none"}}))
    load(*deepspeed(fp16={"enabled": "auto", "loss_scale": 0}, zero_optimization={"stage": 0}))
    assert capsys.readouterr().err == ""


def test_a_deepspeed_micro_batch_alone_makes_the_batch(deepspeed):
    cfg = load(*deepspeed(train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=2))
    assert resolve(cfg, 8).batch_size == 64


def test_a_deepspeed_batch_that_contradicts_the_flags_is_refused(deepspeed):
    cfg = load("--per_device_train_batch_size", "4", *deepspeed(train_batch_size=64))
    with pytest.raises(ValueError, match=r"do not divide|is not micro_batch_size|does not divide"):
        resolve(load("--gradient_accumulation_steps", "3", *deepspeed(train_batch_size=64)), 8)
    assert resolve(cfg, 8).batch_size == 64


def test_an_invalid_deepspeed_file_names_the_line(tmp_path):
    (tmp_path / "ds.json").write_text('{"a": 1,\n]')
    assert re.search(
        r"ds\.json:2: malformed JSON", refused("--deepspeed", str(tmp_path / "ds.json"))
    )
    (tmp_path / "ds.json").write_bytes(b'{"a": "caf\xe9"}')
    assert "ds.json: not UTF-8 text" in refused("--deepspeed", str(tmp_path / "ds.json"))
    (tmp_path / "ds.json").write_text("[1]")
    assert "the DeepSpeed file must be a JSON object" in refused(
        "--deepspeed", str(tmp_path / "ds.json")
    )
