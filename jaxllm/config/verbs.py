# SPDX-License-Identifier: Apache-2.0
"""The training commands and the PEFT methods: one row each, with its keys and defaults.

Only this file and `objectives/table.py` name an objective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_CHAT = ("data.template", "data.template_kwargs", "data.user_template", "data.system")
_CHAT += ("data.date", "data.reasoning", "data.roles", "data.drop_columns")
# Keys of early stopping and the best checkpoint, which require evaluations.
JUDGING = ("eval.metric", "eval.greater", "eval.patience", "eval.min_delta", "save.load_best")
_HELD_OUT = (*JUDGING, "data.eval", "data.eval_fraction")
_SAMPLES = ("log.samples", "log.sample_tokens", "eval.tasks", "eval.tasks_limit")
_SAMPLES += ("eval.tasks_path",)
_ANSWERS = (*_CHAT, *_HELD_OUT, "data.packing", "data.too_long")
_COMPARED = (*_SAMPLES, "align.beta", "align.reference")
_ONLINE = (*_SAMPLES, "align.beta", "rl.rewards", "rl.reward_weights", "rl.group_size")
_ONLINE += ("rl.max_new_tokens",)
_ONLINE += ("rl.temperature", "rl.top_k", "rl.top_p", "rl.min_p", "rl.minibatches")
_ONLINE += ("rl.iterations", "rl.clip", "rl.clip_high", "rl.kl", "rl.missing_eos_penalty")
# Shown first by --help.
_RUN = ("output_dir", "epochs", "batch_size", "optim.learning_rate", "model.compute_dtype")
_TUNING = ("model.path", "data.train", "data.max_length", "peft.method", *_RUN)
_SAMPLING = ("model.path", "data.train", "rl.rewards", "rl.group_size", "rl.max_new_tokens")
_SAMPLING += ("align.beta", "peft.method", "output_dir", "batch_size", "optim.learning_rate")
_INSTRUCT = "--model.path Qwen/Qwen2.5-0.5B-Instruct --data.train"
_NLL: dict[str, dict[str, Any]] = {"nll": {}, "chunked_nll": {}}


@dataclass(frozen=True)
class Verb:
    """A training command, which is also the objective of the run."""

    about: str
    """one line of help"""
    data: Literal["text", "chat", "pairs", "judged", "prompts"]
    """form of a training example"""
    reads: tuple[str, ...] = ()
    """keys it reads that some other command does not"""
    rate: float = 1.0
    """multiplies the PEFT method's default learning rate"""
    beta: float | None = None
    """default of align.beta"""
    head: Literal["vocab", "score"] = "vocab"
    """output of the model: logits of the next token, or the score of a reward model"""
    critic: bool = False
    """true if it also trains a value head"""
    rl: Mapping[str, Any] = field(default_factory=dict)
    """defaults of the rl section"""
    min_group: int = 1
    """smallest rl.group_size"""
    stage: str = ""
    """LLaMA-Factory's name of the command"""
    preference: tuple[str, ...] = ()
    """LLaMA-Factory's values of pref_loss that mean this command"""
    losses: Mapping[str, Mapping[str, Any]] | None = None
    """{TRL's loss_type: our keys}; None if it is align.loss"""
    first: tuple[str, ...] = (*_TUNING, "align.beta")
    """the keys that --help shows first"""
    example: str = f"{_INSTRUCT} pairs.jsonl"
    """flags of the example that --help shows"""

    @property
    def online(self) -> bool:
        """True if it trains on completions sampled during training."""
        return self.data == "prompts"


VERBS: dict[str, Verb] = {
    "pretrain": Verb(
        "train on text, from random or pretrained weights",
        "text",
        (*_HELD_OUT, *_SAMPLES, "data.segment", "model.z_loss", "model.mtp_loss"),
        stage="pt",
        losses=_NLL,
        first=("model.path", "model.config", "model.tokenizer", "data.train", "data.max_length")
        + _RUN,
        example="--model.config model.json --model.tokenizer tokenizer --data.train texts.jsonl",
    ),
    "sft": Verb(
        "fine-tune on conversations",
        "chat",
        (*_ANSWERS, *_SAMPLES, "data.learn", "data.train_on_prompt", "model.z_loss")
        + ("model.mtp_loss",),
        stage="sft",
        losses=_NLL,
        first=(*_TUNING, "data.eval_fraction"),
        example=f"{_INSTRUCT} chats.jsonl",
    ),
    "reward": Verb(
        "train a reward model on pairs of answers",
        "pairs",
        (*_ANSWERS, "align.centering"),
        rate=0.1,
        head="score",
        stage="rm",
        first=(*_TUNING, "data.eval_fraction"),
    ),
    "dpo": Verb(
        "train on preference pairs with DPO and its variants",
        "pairs",
        (*_ANSWERS, *_COMPARED, "align.loss", "align.loss_weights", "align.label_smoothing")
        + ("align.length_normalized", "align.gamma"),
        rate=0.01,
        beta=0.1,
        stage="dpo",
        preference=("sigmoid", "hinge", "ipo"),
    ),
    "kto": Verb(
        "train on answers labelled good or bad with KTO",
        "judged",
        (*_ANSWERS, *_COMPARED, "align.desirable_weight", "align.undesirable_weight"),
        rate=0.01,
        beta=0.1,
        stage="kto",
        losses={"kto": {}},
        example=f"{_INSTRUCT} judged.jsonl",
    ),
    "orpo": Verb(
        "fine-tune on preference pairs with ORPO (no reference model)",
        "pairs",
        (*_ANSWERS, *_SAMPLES, "align.beta"),
        rate=0.1,
        beta=0.1,
        stage="dpo",
        preference=("orpo",),
        losses={"orpo": {}},
    ),
    "simpo": Verb(
        "train on preference pairs with SimPO (no reference model)",
        "pairs",
        (*_ANSWERS, *_SAMPLES, "align.beta", "align.gamma", "align.label_smoothing"),
        rate=0.01,
        beta=2.0,
        stage="dpo",
        preference=("simpo",),
        losses={"simpo": {}},
    ),
    "ppo": Verb(
        "train on sampled completions and their rewards with PPO (learned critic)",
        "prompts",
        (*_CHAT, *_ONLINE, "rl.kl_target", "rl.discount", "rl.gae_lambda", "rl.clip_value")
        + ("rl.value_weight", "rl.critic"),
        rate=0.01,
        beta=0.05,
        critic=True,
        rl={"group_size": 1, "iterations": 4, "kl": "k1"},
        stage="ppo",
        first=_SAMPLING,
        example=f"{_INSTRUCT} prompts.jsonl --rl.rewards run/reward/final",
    ),
    "grpo": Verb(
        "train on sampled completions and their rewards with GRPO (no critic)",
        "prompts",
        (*_CHAT, *_ONLINE, "rl.scale_rewards", "rl.normalizer", "rl.mask_truncated"),
        rate=0.01,
        beta=0.0,
        rl={"group_size": 8, "iterations": 1, "kl": "k3"},
        min_group=2,
        stage="grpo",
        losses={
            "dapo": {"rl.normalizer": "tokens"},
            "bnpo": {"rl.normalizer": "tokens"},
            "grpo": {"rl.normalizer": "sequence"},
            "dr_grpo": {"rl.normalizer": "constant"},
        },
        first=_SAMPLING,
        example=f"{_INSTRUCT} prompts.jsonl --rl.rewards rewards.py:score",
    ),
}
_SPECIFIC = frozenset(key for verb in VERBS.values() for key in verb.reads)


def unread(objective: str) -> list[str]:
    """Keys that other commands read but this one does not."""
    return sorted(_SPECIFIC - set(VERBS[objective].reads))


@dataclass(frozen=True)
class PeftMethod:
    """One value of peft.method."""

    adapter: str
    """its class: MODULE.CLASS in jaxllm.peft"""
    learning_rate: float
    """default peak learning rate"""
    shape: tuple[str, ...] = ()
    """keys that define the adapter; with peft.path the adapter's own config gives them"""
    training: tuple[str, ...] = ()
    """keys that change training only, so they are also read with peft.path"""

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of the peft section that only some methods read."""
        return self.shape + self.training


# An adapter has few parameters and starts from zero, so its learning rate is higher.
PEFT_METHODS: dict[str, PeftMethod] = {
    "none": PeftMethod("", 1e-4),
    "lora": PeftMethod(
        "lora.LoraAdapter",
        5e-4,
        ("r", "lora_alpha", "target_modules", "target_parameters", "exclude_modules")
        + ("layers_to_transform", "rank_pattern", "alpha_pattern", "modules_to_save")
        + ("init_lora_weights", "use_rslora", "use_dora"),
        ("lora_dropout", "loraplus_lr_ratio"),
    ),
    "adapter": PeftMethod("bottleneck.BottleneckAdapter", 5e-4, ("bottleneck", "placement")),
    "prefix": PeftMethod("virtual_tokens.PrefixAdapter", 1e-2, ("num_virtual_tokens",)),
    "prompt": PeftMethod("virtual_tokens.PromptAdapter", 1e-2, ("num_virtual_tokens",)),
}
