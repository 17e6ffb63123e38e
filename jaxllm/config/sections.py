# SPDX-License-Identifier: Apache-2.0
"""The sections of a run: typed fields, each with its default, unit and meaning.

Types and ranges are the fields' own annotations; the string after a field is its documentation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

# Counts fit the int32 that steps and rows are counted in; a seed fits an int64.
Count = Annotated[int, Ge(0), Le(2**31 - 1)]
Size = Annotated[int, Ge(1), Le(2**31 - 1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Amount = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Role = Literal["system", "developer", "user", "assistant", "tool"]
# Steps between two events, or once an epoch, at its last step.
Interval = Count | Literal["epoch"]
# fmt: off
DpoLoss = Literal[
    "sigmoid", "robust", "hinge", "ipo", "exo", "nca", "sppo", "bco", "apo_zero", "apo_down", "sft",
    "orpo", "simpo",
]
# fmt: on


@dataclass(frozen=True)
class ModelSection:
    """Where the model comes from and how it computes."""

    path: str | None = None
    """HF directory or hub id whose weights training starts from"""
    config: str | None = None
    """HF directory or config.json to start from random weights of that shape instead of `path`"""
    overrides: dict[str, Any] = field(default_factory=dict)
    """keys of the HF config to change when starting from `config`"""
    tokenizer: str | None = None
    """HF directory or hub id of the tokenizer; default: where the model comes from"""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the master weights"""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of activations and matrix products (accumulation stays float32)"""
    remat: Literal["none", "full", "dots", "names"] = "full"
    """the backward pass recomputes nothing, all, all but dots and attention, all but attention"""
    attention: Literal["auto", "xla", "mosaic", "triton"] = "auto"
    """attention kernel; auto: the fastest one measured on this platform; mosaic and triton need an
    NVIDIA GPU and tokamax"""
    scan_unroll: Size = 1
    """layers per iteration of the scan over layers (more = longer compile and more memory)"""
    loss_chunk: Count = 0
    """tokens whose logits exist at one time in the loss; 0 = 512, on accelerators 4,096"""
    z_loss: Amount = 0.0
    """coefficient of the squared log-partition"""


@dataclass(frozen=True)
class Source:
    """One source of examples."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    path: str
    """file, glob, directory, hub id, `tfds:NAME`; suffix tells the format"""
    weight: Annotated[float, Gt(0)] | None = None
    """share of the mixture, relative to the others; left out everywhere, sources are joined"""
    split: str | None = None
    """split of a dataset that has several; default: train, but a source of data.eval names it"""
    columns: dict[str, str] = field(default_factory=dict)
    """{name expected here: column in the file}, e.g. {text: content, prompt: question}"""
    max_samples: Size | None = None
    """read only the first N records; default: all"""
    streaming: bool = False
    """pretraining: tokenize one file at a time, as it is needed, and keep only a few on disk"""


@dataclass(frozen=True)
class DataSection:
    """What is read and how it becomes rows."""

    train: tuple[Source, ...] = ()
    """sources to train on: a path, paths, or a list of {path, weight, split, columns, …}"""
    eval: tuple[Source, ...] = ()
    """held-out sources; each is evaluated whole"""
    eval_fraction: Fraction = 0.0
    """share of the training examples held out, drawn by the seed; not together with `eval`"""
    max_length: Annotated[int, Ge(2)] = 1024
    """tokens in a row (block size); preferences: of answer and prompt; online: of a prompt"""
    packing: bool = True
    """SFT and preferences: several examples share a row as separate segments"""
    segment: bool = True
    """pretraining: attention and positions restart at each document"""
    too_long: Literal["truncate", "drop"] = "truncate"
    """SFT and preferences: what happens to examples over max_length"""
    learn: Literal["all", "last", "each"] = "all"
    """SFT: the assistant turns learned; each makes every one an example of its own"""
    train_on_prompt: bool = False
    """SFT: learn the other turns too"""
    template: str | None = None
    """chats: template: a file or built-in name (seed-qwen, chatml); default: the tokenizer's"""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """chats: extra variables for the template"""
    date: str | None = None
    """chats: today's date for templates that ask, YYYY-MM-DD; default: the day the run starts"""
    system: str | None = None
    """chats: system message of those that have none"""
    reasoning: Literal["learn", "drop"] = "learn"
    """chats: drop leaves out the reasoning_content of messages"""
    user_template: str | None = None
    """chats: rewrites the last user turn from columns: a format string, or a built-in name (rag)"""
    roles: dict[str, Role] = field(default_factory=dict)
    """chats: {role in the file: system, developer, user, assistant or tool}, for unknown roles"""
    drop_columns: tuple[str, ...] = ()
    """chats: columns of records, and keys of messages, that are not read"""
    workers: Count = 0
    """processes that tokenize; 0 = one per core, and 2,000 records or more each"""
    cache_dir: str | None = None
    """where tokenized data is kept; default: ~/.cache/jaxllm"""


@dataclass(frozen=True)
class OptimSection:
    """Optimizer and learning-rate schedule."""

    name: str = "adamw"
    """adamw, or another optimizer of the table in optim.py"""
    learning_rate: Annotated[float, Gt(0)] | None = None
    """peak learning rate; default: 1e-4, lora and adapter 5e-4, prefix and prompt 1e-2; a tenth of
    it for reward and orpo, a hundredth for dpo, kto, simpo, ppo and grpo"""
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "warmup_log"] = (
        "cosine"
    )
    """shape after the warm-up; warmup_log is DeepSpeed's WarmupLR with warmup_type log"""
    warmup: Amount = 0.0
    """warm-up from 0: steps, or a share of all steps when below 1"""
    decay: Amount = 0.2
    """wsd: the final decay, steps or share of all steps"""
    final: Share = 0.0
    """learning rate at the end, as a share of the peak"""
    weight_decay: Amount = 0.0
    """decoupled decay of matrices (never norms and biases)"""
    b1: Fraction = 0.9
    """decay of the first moment"""
    b2: Fraction = 0.999
    """decay of the second moment"""
    eps: Amount = 1e-8
    """added to the root of the second moment"""
    clip: Amount = 1.0
    """global gradient norm above which gradients are scaled down; 0 = off"""
    options: dict[str, Any] = field(default_factory=dict)
    """further keyword arguments of the optax optimizer"""


@dataclass(frozen=True)
class MeshSection:
    """How devices are arranged; -1 takes what is left (one axis only)."""

    data: int = 1
    """replicas"""
    fsdp: int = -1
    """shards of weights, gradients, optimizer state and batch"""
    expert: int = 1
    """shards of experts"""
    context: int = 1
    """shards of the sequence"""
    tensor: int = 1
    """shards inside each layer"""
    zero: Literal[0, 1, 2, 3] = 3
    """what is sharded along fsdp: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too"""


@dataclass(frozen=True)
class LogSection:
    """What is recorded while training."""

    every: Size | Literal["epoch"] = 10
    """steps between lines of metrics.jsonl, or epoch"""
    report_to: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """trackers besides metrics.jsonl"""
    samples: tuple[str, ...] = ()
    """prompts continued at each evaluation and written to samples.jsonl"""
    sample_tokens: Size = 64
    """new tokens per sample"""
    progress: bool = True
    """progress bar on the terminal"""
    compile_cache: str | None = None
    """directory of compiled programs, or off; default: ~/.cache/jaxllm/compiled, at most 2 GiB"""


@dataclass(frozen=True)
class EvalSection:
    """Best checkpoint and early stopping."""

    metric: str = "loss"
    """a metric that evaluations log: the mean over held-out sets, or NAME_METRIC of one of them"""
    greater: bool | None = None
    """whether higher is better; default: false for loss and perplexity, true for the others"""
    patience: Count = 0
    """evaluations in a row without an improvement after which the run ends; 0 = off"""
    min_delta: Amount = 0.0
    """smallest change that counts as an improvement, for patience"""


@dataclass(frozen=True)
class SaveSection:
    """Checkpoints."""

    every: Interval = 500
    """steps between checkpoints, or epoch; one is always written at the end, 0 = only then"""
    keep: Count = 3
    """last checkpoints kept; 0 = all"""
    keep_best: bool = True
    """also keep the one with the best evaluation (eval.metric)"""
    load_best: bool = False
    """write the best checkpoint to final/, not the last"""
    final: bool = True
    """write final/ when done: a HF directory, or an adapter where that is what was trained"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of a model in final/ or merged; default: the master weights'"""


@dataclass(frozen=True)
class PeftSection:
    """What is trained instead of the model's own weights; keys of LoRA are those of `peft`."""

    method: Literal["none", "lora", "adapter", "prefix", "prompt"] = "none"
    """none trains every weight; adapter: bottlenecks; prefix, prompt: tokens before each text"""
    path: str | None = None
    """adapter to start from: a directory or hub id in peft's format; says all but dropout"""
    r: Annotated[int, Gt(0)] = 8
    """LoRA: rank"""
    lora_alpha: Annotated[float, Gt(0)] = 16.0
    """LoRA: the branch is scaled by lora_alpha / r"""
    lora_dropout: Fraction = 0.0
    """LoRA: share of the branch's inputs set to 0 while training"""
    target_modules: tuple[str, ...] = ("all-linear",)
    """LoRA: HF's names of modules (ends of names, or patterns of whole ones), or all-linear"""
    exclude_modules: tuple[str, ...] = ()
    """LoRA: modules left out of these"""
    layers_to_transform: tuple[Count, ...] = ()
    """LoRA: only in these layers, from 0; default: in all"""
    rank_pattern: dict[str, Annotated[int, Gt(0)]] = field(default_factory=dict)
    """LoRA: other ranks, {end of a module's name: r}"""
    alpha_pattern: dict[str, Annotated[float, Gt(0)]] = field(default_factory=dict)
    """LoRA: other alphas, {end of a module's name: lora_alpha}"""
    modules_to_save: tuple[str, ...] = ()
    """LoRA: modules trained whole beside it"""
    init_lora_weights: Literal["kaiming", "gaussian", "pissa"] = "kaiming"
    """LoRA: how A starts (B at 0); pissa: both from the weight's largest singular values"""
    use_rslora: bool = False
    """LoRA: scale by lora_alpha / sqrt(r)"""
    use_dora: bool = False
    """LoRA: train each column's length beside it"""
    loraplus_lr_ratio: Annotated[float, Gt(0)] = 1.0
    """LoRA+: B's learning rate as a multiple of A's"""
    bottleneck: Size = 64
    """adapter: width"""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """adapter: after attention and MLP, or after the MLP alone"""
    num_virtual_tokens: Size = 20
    """prefix, prompt: length"""
    quantize_base: Literal["none", "int8", "nf4"] = "none"
    """how the frozen weights of the layers are held"""


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
        ("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform")
        + ("rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights")
        + ("use_rslora", "use_dora"),
        ("lora_dropout", "loraplus_lr_ratio"),
    ),
    "adapter": PeftMethod("bottleneck.BottleneckAdapter", 5e-4, ("bottleneck", "placement")),
    "prefix": PeftMethod("virtual_tokens.PrefixAdapter", 1e-2, ("num_virtual_tokens",)),
    "prompt": PeftMethod("virtual_tokens.PromptAdapter", 1e-2, ("num_virtual_tokens",)),
}


@dataclass(frozen=True)
class AlignSection:
    """Reward models and preferences: what is minimised."""

    beta: Amount | None = None
    """hold on the reference; default: 0.1, simpo 2, and as weight of the KL ppo 0.05 and grpo 0"""
    loss: tuple[DpoLoss, ...] = ("sigmoid",)
    """DPO: the losses that are added"""
    loss_weights: tuple[Amount, ...] = ()
    """DPO: their weights; default: 1 each"""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """DPO, SimPO: chance that a preference is the wrong way round"""
    length_normalized: bool = False
    """DPO: log-probabilities are means over an answer's tokens, not sums"""
    gamma: Amount = 1.0
    """SimPO: margin by which the chosen answer's reward is to be higher"""
    reference: Literal["model", "precomputed"] = "model"
    """DPO, KTO: held in memory, or its log-probabilities computed once and kept with the data"""
    desirable_weight: Amount = 1.0
    """KTO: weight of good answers"""
    undesirable_weight: Amount = 1.0
    """KTO: weight of bad answers"""
    centering: Amount = 0.0
    """reward: weight of the squared sum of a pair's rewards, which keeps them around 0"""


@dataclass(frozen=True)
class RlSection:
    """PPO and GRPO: how completions are made, judged and learned from."""

    rewards: tuple[str, ...] = ()
    """a reward model's directory, or module:function(prompts, completions, **columns)"""
    reward_weights: tuple[float, ...] = ()
    """their weights in the sum; default: 1 each"""
    group_size: Size | None = None
    """completions of each prompt; default: grpo 8, ppo 1"""
    max_new_tokens: Size = 128
    """tokens of a completion at most"""
    temperature: Annotated[float, Gt(0)] = 1.0
    """of the draws, and of the probabilities that are learned"""
    top_k: Count = 0
    """draw from this many likeliest tokens; 0 = all"""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """draw from the likeliest tokens of this mass"""
    min_p: Share = 0.0
    """leave out tokens below this share of the likeliest"""
    minibatches: Size = 1
    """updates, of batch_size completions each, that one rollout is divided into"""
    iterations: Size | None = None
    """passes over each rollout; default: ppo 4, grpo 1"""
    clip: Amount = 0.2
    """the ratio of new to old probability counts within 1 - clip and 1 + clip"""
    clip_high: Amount | None = None
    """its upper end, 1 + clip_high; default: clip"""
    kl: Literal["k1", "k3"] | None = None
    """estimate of the KL to the reference; default: ppo k1, in the reward; grpo k3, in the loss"""
    kl_target: Amount = 0.0
    """PPO: align.beta follows the KL of a completion to this many nats; 0 = fixed"""
    scale_rewards: bool = True
    """GRPO: advantages are divided by the standard deviation of their group's rewards"""
    normalizer: Literal["tokens", "sequence", "constant"] = "tokens"
    """GRPO: the loss is a mean over all tokens, over sequences' means, or over max_new_tokens"""
    mask_truncated: bool = False
    """GRPO: learn nothing from completions that did not end"""
    missing_eos_penalty: Amount = 0.0
    """taken from the reward of completions that did not end"""
    discount: Share = 1.0
    """PPO: γ, what a reward is worth a token later"""
    gae_lambda: Share = 0.95
    """PPO: λ of the generalised advantage estimate"""
    clip_value: Amount = 0.2
    """PPO: how far a value counts from the one before the update"""
    value_weight: Amount = 0.1
    """PPO: weight of the value's loss"""
    critic: Literal["shared", "separate"] = "shared"
    """PPO: the value is read from the policy's hidden states, or from a model of its own"""
