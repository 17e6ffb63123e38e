# SPDX-License-Identifier: Apache-2.0
"""One row per training verb: what it reads and what it assumes where the user says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_CHAT = ("data.template", "data.template_kwargs", "data.user_template", "data.system")
_CHAT += ("data.date", "data.reasoning", "data.roles", "data.drop_columns")
# Early stopping and the best checkpoint, which need evaluations.
JUDGING = ("eval.metric", "eval.greater", "eval.patience", "eval.min_delta", "save.load_best")
_ANSWERS = (*_CHAT, *JUDGING, "data.packing", "data.too_long")
_COMPARED = ("align.beta", "align.reference")
_ONLINE = ("align.beta", "rl.rewards", "rl.reward_weights", "rl.group_size", "rl.max_new_tokens")
_ONLINE += ("rl.temperature", "rl.top_k", "rl.top_p", "rl.min_p", "rl.minibatches")
_ONLINE += ("rl.iterations", "rl.clip", "rl.clip_high", "rl.kl", "rl.missing_eos_penalty")


@dataclass(frozen=True)
class Verb:
    """A training verb, which is also the objective of the run."""

    about: str
    """one line of help"""
    data: Literal["text", "chat", "pairs", "judged", "prompts"]
    """what a training example is"""
    reads: tuple[str, ...] = ()
    """the keys it reads that not every verb reads"""
    rate: float = 1.0
    """multiplies the PEFT method's default learning rate"""
    beta: float | None = None
    """default of align.beta"""
    head: Literal["vocab", "score"] = "vocab"
    """what the model predicts: the next token, or a score (a reward model)"""
    critic: bool = False
    """also trains a value head"""
    rl: Mapping[str, Any] = field(default_factory=dict)
    """defaults of the rl section"""

    @property
    def online(self) -> bool:
        """True if the model generates what it learns from."""
        return self.data == "prompts"


VERBS: dict[str, Verb] = {
    "pretrain": Verb(
        "train on text, from random weights or from a model",
        "text",
        (*JUDGING, "data.segment", "model.z_loss"),
    ),
    "sft": Verb(
        "fine-tune on conversations",
        "chat",
        (*_ANSWERS, "data.learn", "data.train_on_prompt", "model.z_loss"),
    ),
    "reward": Verb(
        "train a reward model on pairs of answers",
        "pairs",
        (*_ANSWERS, "align.centering"),
        rate=0.1,
        head="score",
    ),
    "dpo": Verb(
        "train on preference pairs with DPO and its variants",
        "pairs",
        (*_ANSWERS, *_COMPARED, "align.loss", "align.loss_weights", "align.label_smoothing")
        + ("align.length_normalized", "align.gamma"),
        rate=0.01,
        beta=0.1,
    ),
    "kto": Verb(
        "train on answers labelled good or bad with KTO",
        "judged",
        (*_ANSWERS, *_COMPARED, "align.desirable_weight", "align.undesirable_weight"),
        rate=0.01,
        beta=0.1,
    ),
    "orpo": Verb(
        "fine-tune on preference pairs without a reference model: ORPO",
        "pairs",
        (*_ANSWERS, "align.beta"),
        rate=0.1,
        beta=0.1,
    ),
    "simpo": Verb(
        "train on preference pairs without a reference model: SimPO",
        "pairs",
        (*_ANSWERS, "align.beta", "align.gamma", "align.label_smoothing"),
        rate=0.01,
        beta=2.0,
    ),
    "ppo": Verb(
        "train online against rewards, with a critic: PPO",
        "prompts",
        (*_CHAT, *_ONLINE, "rl.kl_target", "rl.discount", "rl.gae_lambda", "rl.clip_value")
        + ("rl.value_weight", "rl.critic"),
        rate=0.01,
        beta=0.05,
        critic=True,
        rl={"group_size": 1, "iterations": 4, "kl": "k1"},
    ),
    "grpo": Verb(
        "train online against rewards, relative to a group of completions: GRPO",
        "prompts",
        (*_CHAT, *_ONLINE, "rl.scale_rewards", "rl.normalizer", "rl.mask_truncated"),
        rate=0.01,
        beta=0.0,
        rl={"group_size": 8, "iterations": 1, "kl": "k3"},
    ),
}
_SPECIFIC = frozenset(key for verb in VERBS.values() for key in verb.reads)


def unread(objective: str) -> list[str]:
    """Keys that other verbs read and this one does not."""
    return sorted(_SPECIFIC - set(VERBS[objective].reads))
