# SPDX-License-Identifier: Apache-2.0
"""TrainConfig and its sections: typed fields with default, range, unit and documentation.

A field's annotation (`fields`) gives its type, range and `Unit`, and how to `Read` the short forms
that a user may write. The string after a field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, Unit

from jaxllm.config.evaluation import EvalSection
from jaxllm.config.fields import (
    TRACKER_PACKAGES,
    Amount,
    Count,
    DpoLoss,
    Fraction,
    Interval,
    LoraInit,
    Path,
    Positive,
    Rank,
    Read,
    Role,
    Schedule,
    Seed,
    Share,
    Size,
    StepsOrFraction,
    Tokens,
    cache_dir,
    sources,
    trackers,
)
from jaxllm.config.optimizers import OPTIMIZERS
from jaxllm.config.source import Source
from jaxllm.config.verbs import PEFT_METHODS, VERBS, Verb
from jaxllm.errors import UserError

if TYPE_CHECKING:  # a type checker accepts no computed Literal
    Method = Objective = Optimizer = Tracker = str
else:
    Method, Objective = Literal[tuple(PEFT_METHODS)], Literal[tuple(VERBS)]
    Optimizer, Tracker = Literal[tuple(OPTIMIZERS)], Literal[tuple(TRACKER_PACKAGES)]


@dataclass(frozen=True)
class ModelSection:
    """The model, its dtypes and memory."""

    path: Path | None = None
    """HF directory or hub id to load the initial weights from"""
    config: Path | None = None
    """HF directory, hub id or config.json; training starts from random weights"""
    overrides: dict[str, Any] = field(default_factory=dict)
    """keys of the HF config to change; requires model.config"""
    tokenizer: Path | None = None
    """HF directory or hub id of the tokenizer; default: model.path, or model.config"""
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the master weights"""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of activations and matrix products, which accumulate in float32"""
    remat: Literal["none", "full", "dots", "names", "offload"] = "full"
    """activations recomputed in the backward pass: none; full = all; dots = all but matrix products
    and attention; names = all but attention; offload = all, with the layers' inputs in the host's
    memory (not on CPU)"""
    attention: Literal["auto", "xla", "splash", "mosaic", "triton"] = "auto"
    """attention kernel; auto = the fastest one on this platform; splash needs a TPU, mosaic and
    triton an NVIDIA GPU and tokamax"""
    scan_unroll: Annotated[Size, Unit("layers")] = 1
    """layers (or periods of unlike layers) per iteration of the scan over them; more take longer to
    compile and more memory"""
    loss_chunk: Annotated[Count, Unit("tokens")] = 0
    """tokens per chunk of the cross-entropy, which limits the memory for logits; 0 = 512 on CPU,
    4,096 on accelerators"""
    loss_blocks: Annotated[Count, Unit("blocks")] = 0
    """blocks of the vocabulary in the cross-entropy. The head is gathered block by block, which
    limits its memory, but logits are computed twice. 0 = 8 on accelerators where fsdp splits the
    head, else 1"""
    mlp_blocks: Annotated[Size, Unit("blocks")] = 1
    """blocks of the MLP's hidden features, computed one after another. The weights are gathered
    block by block, which limits their memory and, with model.remat full, that of a layer's
    activations"""
    z_loss: Amount = 0.0
    """coefficient of the squared log-partition function added to the loss"""
    balance_loss: Amount | None = None
    """mixtures of experts: coefficient of the routers' load-balance loss, computed for each text;
    default: the config's router_aux_loss_coef if its output_router_logits is true, else 0"""
    router_z_loss: Amount = 0.0
    """mixtures of experts: coefficient of the routers' squared log-partition functions"""
    router_bias_rate: Amount = 0.0
    """mixtures of experts with a router bias: how much each step raises the bias of experts with
    less than the mean load, and lowers that of the others"""
    mtp_loss: Amount = 0.0
    """coefficient of the loss of multi-token prediction; 0 = its weights are not trained"""


if TYPE_CHECKING:
    Sources = Any  # what `DataSection.__post_init__` makes a tuple of Source
else:
    Sources = Annotated[tuple[Source, ...], Read(sources)]


DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class DataSection:
    """The data and its tokenization."""

    train: Sources = ()
    """training data: a path, paths, or a list of {path, weight, split, columns, …}"""
    eval: Sources = ()
    """evaluation data; each source is evaluated in full and reported separately"""
    eval_fraction: Fraction = 0.0
    """fraction of training examples held out for evaluation, drawn by seed; excludes data.eval"""
    max_length: Annotated[int, Ge(2), Unit("tokens")] | None = None
    """context length of a row; for preference data: of a prompt with one answer; for ppo and grpo:
    of a prompt; default: 1,024, or the model's limit if that is less"""
    packing: bool = True
    """SFT and preference data: pack several examples into a row as separate segments"""
    segment: bool = True
    """pretraining: restart attention and positions at each document"""
    too_long: Literal["truncate", "drop"] = "truncate"
    """SFT and preference data: truncate or drop examples longer than data.max_length"""
    learn: Literal["all", "last", "each"] = "all"
    """SFT: assistant turns to train on; each = every turn is a separate example"""
    train_on_prompt: bool = False
    """SFT: also train on the turns of system, user and tool"""
    template: Path | None = None
    """chats: chat template: a file or a built-in name (seed-qwen, chatml); default: the
    tokenizer's"""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """chats: extra variables for the chat template"""
    date: str | None = None
    """chats: date for templates that print one, YYYY-MM-DD; default: the day the run starts"""
    system: str | None = None
    """chats: system message for conversations that have none"""
    reasoning: Literal["learn", "drop"] = "learn"
    """chats: train on reasoning_content of messages, or drop it"""
    user_template: str | None = None
    """chats: rewrite the last user turn from columns: a format string, or a built-in name (rag)"""
    roles: dict[str, Role] = field(default_factory=dict)
    """chats: {role in the file: system, developer, user, assistant or tool} for unknown roles"""
    drop_columns: tuple[str, ...] = ()
    """chats: columns of records and keys of messages to ignore"""
    workers: Annotated[Count, Unit("processes")] = 0
    """processes that tokenize; 0 = one per core, with at least 2,000 records each"""
    cache_dir: Path | None = None
    """directory for tokenized data, or a bucket to share it; default: ~/.cache/jaxllm"""

    def __post_init__(self) -> None:
        for name, given in (("train", self.train), ("eval", self.eval)):
            several = given if isinstance(given, list | tuple) else (given,)
            sources = tuple(s if isinstance(s, Source) else Source(s) for s in several)
            object.__setattr__(self, name, sources)

    @property
    def length(self) -> int:
        """max_length, or its default for a model without a limit."""
        return self.max_length or DEFAULT_LENGTH


@dataclass(frozen=True)
class OptimSection:
    """Optimizer and learning-rate schedule."""

    name: Optimizer = "adamw"
    """optimizer"""
    learning_rate: Positive | None = None
    """peak learning rate; default: 1e-4, lora and adapter 5e-4, prefix and prompt 1e-2; reward and
    orpo use a tenth of it, dpo, kto, simpo, ppo and grpo a hundredth"""
    schedule: Schedule = "cosine"
    """schedule after the warmup; wsd = warmup, stable, decay; warmup_log = DeepSpeed's WarmupLR
    with warmup_type log"""
    warmup: StepsOrFraction = 0.0
    """linear warmup from 0; a value below 1 is a fraction of all steps; if it is longer than the
    run, the learning rate stays below its peak"""
    decay: StepsOrFraction = 0.2
    """wsd: length of the final decay; a value below 1 is a fraction of all steps"""
    final: Share = 0.0
    """final learning rate as a fraction of the peak"""
    power: Positive = 1.0
    """polynomial: exponent of the decay; 1 = linear"""
    weight_decay: Amount = 0.0
    """decoupled weight decay of matrices; norms and biases are never decayed"""
    b1: Fraction = 0.9
    """decay rate of the first moment (β₁)"""
    b2: Fraction = 0.999
    """decay rate of the second moment (β₂)"""
    eps: Amount = 1e-8
    """ε added to the square root of the second moment"""
    clip: Amount = 1.0
    """maximum global gradient norm; larger gradients are scaled down; 0 = no clipping"""
    offload: bool = False
    """keep the optimizer state in the host's memory; a step copies it to the device and back"""
    options: dict[str, Any] = field(default_factory=dict)
    """further keyword arguments of the optax optimizer"""


@dataclass(frozen=True)
class MeshSection:
    """Sizes of the device mesh; -1 takes the remaining devices (one axis only)."""

    data: Annotated[int, Unit("devices")] = 1
    """data-parallel replicas"""
    fsdp: Annotated[int, Unit("devices")] = -1
    """shards of batch, weights, gradients and optimizer state"""
    expert: Annotated[int, Unit("devices")] = 1
    """mixtures of experts: shards of the experts, and of the batch"""
    context: Annotated[int, Unit("devices")] = 1
    """shards of each row along its tokens"""
    tensor: Annotated[int, Unit("devices")] = 1
    """shards within each layer"""
    zero: Literal[0, 1, 2, 3] = 3
    """ZeRO stage: shard along fsdp 0 = nothing, 1 = optimizer state, 2 = also gradients, 3 = also
    weights"""
    reduce_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype in which gradients are summed over devices; auto: bfloat16 on accelerators, float32 on
    CPU"""


@dataclass(frozen=True)
class ClusterSection:
    """Runs of several processes. The launchers set these by environment variables."""

    coordinator: str | None = None
    """HOST:PORT of process 0 (JAX_COORDINATOR_ADDRESS)"""
    processes: Annotated[Count, Unit("processes")] | None = None
    """number of processes (JAX_NUM_PROCESSES)"""
    process: Count | None = None
    """index of this process, from 0 (JAX_PROCESS_ID)"""
    timeout: Annotated[Positive, Unit("seconds")] = 300.0
    """time to wait for a process that does not connect or respond, before the others end"""
    hang_exit: Annotated[Positive, Unit("seconds")] = 1800.0
    """time after which a hanging step ends the run"""


@dataclass(frozen=True)
class LogSection:
    """Metrics, samples and progress."""

    every: Annotated[Size, Unit("steps")] | Literal["epoch"] = 10
    """interval between lines of metrics.jsonl, in steps or epoch; without a terminal, at
    most one of them per 10 s is also printed"""
    report_to: Annotated[tuple[Tracker, ...], Read(trackers)] = ()
    """trackers to log to besides metrics.jsonl, or all installed: pip install 'jaxllm[wandb]'"""
    run_name: str | None = None
    """name of the run in the trackers; default: that of output_dir"""
    project: str | None = None
    """project of the run in the trackers; default: WANDB_PROJECT, or else jaxllm"""
    samples: tuple[str, ...] = ()
    """prompts to complete at each evaluation; the completions go to samples.jsonl"""
    sample_tokens: Tokens = 64
    """maximum length of a sample's completion"""
    progress: bool = True
    """show a progress bar in a terminal"""
    compile_cache: Annotated[str, Read(cache_dir)] | None = None
    """directory of XLA's compilation cache, or off; default: ~/.cache/jaxllm/compiled (2 GiB)"""
    profile: bool = False
    """trace steps 10 to 15 with jax.profiler, and print their time by named scope"""


@dataclass(frozen=True)
class SaveSection:
    """Checkpoints and the final model."""

    every: Interval = 500
    """interval between checkpoints, in steps or epoch; the last step is always saved; 0 = only the
    last step"""
    keep: Annotated[Count, Unit("checkpoints")] = 3
    """latest checkpoints to keep; 0 = all"""
    keep_best: bool = True
    """also keep the checkpoint with the best evaluation (eval.metric)"""
    load_best: bool = False
    """export the best checkpoint to final/ instead of the last one"""
    final: bool = True
    """export a HF directory to final/ at the end, or an adapter if one was trained"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of an exported model; default: model.weight_dtype"""
    hub: str | None = None
    """repository on huggingface.co, OWNER/NAME, to which final/ is uploaded at the end; default:
    nothing is uploaded"""
    hub_private: bool = False
    """create the repository of save.hub as a private one"""


@dataclass(frozen=True)
class PeftSection:
    """Parameter-efficient fine-tuning; LoRA's keys are those of `peft`."""

    method: Method = "none"
    """none = train all weights; lora; adapter = bottleneck layers; prefix = keys and values before
    each text; prompt = embeddings before each text"""
    path: Path | None = None
    """adapter in peft's format to start from: a directory or hub id; its config sets every key but
    lora_dropout and loraplus_lr_ratio"""
    r: Rank = 8
    """LoRA: rank"""
    lora_alpha: Positive = 16.0
    """LoRA: the update is scaled by lora_alpha / r"""
    lora_dropout: Fraction = 0.0
    """LoRA: dropout probability of the adapter's input"""
    target_modules: tuple[str, ...] = ("all-linear",)
    """LoRA: HF module names to adapt (suffixes, or regular expressions of full names), or
    all-linear"""
    target_parameters: tuple[str, ...] = ()
    """LoRA: parameters of experts and routers to adapt, by the end of their name in transformers 5
    (mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight); default: all of them with
    all-linear, except in gpt_oss, qwen3_vl_moe, llama4 and gemma4"""
    exclude_modules: tuple[str, ...] = ()
    """LoRA: modules to exclude from target_modules"""
    layers_to_transform: tuple[Count, ...] = ()
    """LoRA: indices of the layers to adapt; default: all"""
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    """LoRA: ranks other than r, {suffix of a module name: rank}"""
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)
    """LoRA: alphas other than lora_alpha, {suffix of a module name: alpha}"""
    modules_to_save: tuple[str, ...] = ()
    """LoRA: modules to train in full and save with the adapter"""
    init_lora_weights: LoraInit = "kaiming"
    """LoRA: initialization of A, with B = 0; pissa initializes both from the largest singular
    values of the weight"""
    use_rslora: bool = False
    """LoRA: scale by lora_alpha / sqrt(r) (rsLoRA)"""
    use_dora: bool = False
    """LoRA: also train the norm of each weight column (DoRA)"""
    loraplus_lr_ratio: Positive = 1.0
    """LoRA+: ratio of B's learning rate to A's"""
    bottleneck: Size = 64
    """adapter: width of the bottleneck"""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """adapter: houlsby = after attention and after MLP; pfeiffer = after MLP only"""
    num_virtual_tokens: Tokens = 20
    """prefix, prompt: number of virtual tokens"""
    quantize_base: Literal["none", "int8", "nf4"] = "none"
    """quantization of the frozen layer weights"""


@dataclass(frozen=True)
class AlignSection:
    """Losses of reward models and preference optimization."""

    beta: Amount | None = None
    """DPO, KTO, PPO, GRPO: strength of the KL penalty toward the reference model (β); default: dpo
    and kto 0.1, ppo 0.05, grpo 0; ORPO: weight of the odds-ratio loss, 0.1; SimPO: scale of the
    reward, 2"""
    loss: tuple[DpoLoss, ...] = ("sigmoid",)
    """DPO: losses, which are summed"""
    loss_weights: tuple[Amount, ...] = ()
    """DPO: weights of the losses; default: 1 each"""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """DPO, SimPO: probability that a preference label is wrong (ε)"""
    length_normalized: bool = False
    """DPO: average an answer's log-probabilities over its tokens instead of summing them"""
    gamma: Amount = 1.0
    """SimPO: target margin between the rewards of chosen and rejected answers (γ)"""
    reference: Literal["model", "precomputed"] = "model"
    """DPO, KTO: keep the reference model in memory, or compute its log-probabilities once and cache
    them with the data"""
    desirable_weight: Amount = 1.0
    """KTO: weight of good answers"""
    undesirable_weight: Amount = 1.0
    """KTO: weight of bad answers"""
    centering: Amount = 0.0
    """reward: coefficient of (r_chosen + r_rejected)², which centers the rewards at 0"""


@dataclass(frozen=True)
class RlSection:
    """PPO and GRPO: rollouts, rewards and updates."""

    rewards: tuple[str, ...] = ()
    """rewards to sum: directories of reward models, or module:function(prompts, completions,
    **columns)"""
    reward_weights: tuple[float, ...] = ()
    """weights of the rewards; default: 1 each"""
    group_size: Annotated[Size, Unit("completions")] | None = None
    """completions sampled per prompt; default: grpo 8, ppo 1"""
    max_new_tokens: Tokens = 128
    """maximum length of a completion"""
    temperature: Positive = 1.0
    """sampling temperature, also applied to the log-probabilities in the loss"""
    top_k: Annotated[Count, Unit("tokens")] = 0
    """sample from the k most likely tokens; 0 = all"""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """sample from the most likely tokens whose probabilities sum to top_p"""
    min_p: Share = 0.0
    """exclude tokens less likely than min_p times the most likely one"""
    minibatches: Annotated[Size, Unit("updates")] = 1
    """updates per pass over a rollout, of batch_size completions each"""
    iterations: Annotated[Size, Unit("passes")] | None = None
    """passes over each rollout; default: ppo 4, grpo 1"""
    clip: Amount = 0.2
    """the probability ratio is clipped to [1 - clip, 1 + clip] (ε)"""
    clip_high: Amount | None = None
    """other upper bound of the ratio, 1 + clip_high (clip-higher); default: clip"""
    kl: Literal["k1", "k3"] | None = None
    """estimator of the KL to the reference; default: ppo k1, in the reward; grpo k3, in the loss"""
    kl_target: Annotated[Amount, Unit("nats")] = 0.0
    """PPO: adapt align.beta so that the KL per completion approaches this value; 0 = constant
    beta"""
    scale_rewards: bool = True
    """GRPO: divide advantages by the standard deviation of the group's rewards"""
    normalizer: Literal["tokens", "sequence", "constant"] = "tokens"
    """GRPO: average the loss over all tokens, over the sequences' means, or divide it by
    rl.max_new_tokens x completions"""
    mask_truncated: bool = False
    """GRPO: exclude truncated completions from the loss"""
    missing_eos_penalty: Amount = 0.0
    """subtracted from the reward of truncated completions"""
    discount: Share = 1.0
    """PPO: discount factor per token (γ)"""
    gae_lambda: Share = 0.95
    """PPO: λ of generalized advantage estimation"""
    clip_value: Amount = 0.2
    """PPO: maximum change of a value from its value before the update"""
    value_weight: Amount = 0.1
    """PPO: coefficient of the value loss"""
    critic: Literal["shared", "separate"] = "shared"
    """PPO: compute values from the policy's hidden states, or with a separate model"""

    @property
    def updates(self) -> int:
        """Updates that learn from one rollout. A run stops, saves and resumes only between
        rollouts."""
        return self.minibatches * (self.iterations or 1)


@dataclass(frozen=True)
class TrainConfig:
    """The config of a training run."""

    __pydantic_config__ = {"allow_inf_nan": False}  # also applies to the sections

    objective: Objective = "pretrain"
    """training objective; set by the command"""
    output_dir: Path = "run"
    """run folder"""
    overwrite: bool = False
    """delete an earlier run in output_dir, after the new config, model and data are validated"""
    resume: bool = True
    """resume from the latest valid checkpoint in output_dir, if there is one"""
    resume_changed: tuple[str, ...] = ()
    """what may differ from the run that is resumed: keys of the config, or data, eval,
    tokenizer, template, model_config, generation_config, weights, rewards, own_objective"""
    seed: Seed = 0
    """seed of initialization, data order, dropout and sampling"""
    epochs: Annotated[Positive, Unit("epochs")] = 1.0
    """passes over the training data; ignored if steps is set"""
    steps: Annotated[Count, Unit("steps")] = 0
    """optimizer steps; 0 = given by epochs"""
    batch_size: Annotated[Count, Unit("rows")] = 32
    """global batch size, in rows per update over all devices; 0 = micro_batch_size x accumulation x
    devices"""
    micro_batch_size: Annotated[Count, Unit("rows")] = 0
    """rows per device and micro-batch; smaller values save memory; 0 = batch_size / accumulation /
    devices"""
    accumulation: Annotated[Count, Unit("micro-batches")] = 0
    """gradient accumulation: micro-batches per update; 0 = given by batch_size and
    micro_batch_size"""
    eval_every: Interval = 0
    """interval between evaluations, in steps or epoch; 0 = only at the end"""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    peft: PeftSection = field(default_factory=PeftSection)
    optim: OptimSection = field(default_factory=OptimSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    log: LogSection = field(default_factory=LogSection)
    eval: EvalSection = field(default_factory=EvalSection)
    save: SaveSection = field(default_factory=SaveSection)
    align: AlignSection = field(default_factory=AlignSection)
    rl: RlSection = field(default_factory=RlSection)

    @property
    def verb(self) -> Verb:
        """The row of this objective in `VERBS`. Raises UserError if there is none."""
        if self.objective not in VERBS:
            known = ", ".join(VERBS)
            raise UserError(f"objective {self.objective!r} is not known; known: {known}")
        return VERBS[self.objective]
