# SPDX-License-Identifier: Apache-2.0
"""A run as one frozen value: typed fields, each with its default, unit and meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


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
    """what the backward pass recomputes: nothing, each layer, all but dots, all but named tensors"""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """attention kernel; auto picks the fastest that supports the model on this backend"""
    scan_unroll: int = 1
    """layers per iteration of the scan over layers (more = longer compile)"""
    loss_chunk: int = 512
    """tokens whose logits exist at one time in the loss"""
    z_loss: float = 0.0
    """coefficient of the squared log-partition"""


@dataclass(frozen=True)
class Source:
    """One source of examples."""

    path: str
    """file, glob, directory, hub id, `tfds:NAME`; suffix tells the format"""
    weight: float = 1.0
    """share of the mixture, relative to the other sources; an epoch is one pass over the largest"""
    split: str = "train"
    """split of a dataset that has several"""
    columns: dict[str, str] = field(default_factory=dict)
    """{name expected here: column in the file}, e.g. {text: content, prompt: question}"""


@dataclass(frozen=True)
class DataSection:
    """What is read and how it becomes rows."""

    train: tuple[Source, ...] = ()
    """sources to train on: a path, a list of paths, or a list of {path, weight, split, columns}"""
    eval: tuple[Source, ...] = ()
    """held-out sources; each is evaluated whole"""
    eval_fraction: float = 0.0
    """share of the training examples held out (the last ones of a seeded shuffle) when `eval` is empty"""
    max_length: int = 1024
    """tokens in a row (the chapter's block size)"""
    packing: bool = True
    """SFT: several examples share a row as separate segments"""
    segment: bool = True
    """pretraining: attention and positions restart at each document"""
    too_long: Literal["truncate", "drop"] = "truncate"
    """SFT: what happens to examples over max_length"""
    learn: Literal["all", "last"] = "all"
    """SFT: which assistant turns are learned"""
    train_on_prompt: bool = False
    """SFT: learn the other turns too"""
    template: str | None = None
    """SFT: chat template: a file, or a built-in name (seed-qwen, chatml); default: the tokenizer's own"""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """SFT: extra variables for the chat template"""
    user_template: str | None = None
    """SFT: rewrites the last user turn from columns: a format string, or a built-in name (rag)"""
    workers: int = 0
    """processes that tokenize; 0 = one per core"""
    cache_dir: str | None = None
    """where tokenized data is kept; default: ~/.cache/jaxllm"""


@dataclass(frozen=True)
class OptimSection:
    """Optimizer and learning-rate schedule."""

    name: str = "adamw"
    """adamw, or another optimizer of the table in optim.py"""
    learning_rate: float = 1e-4
    """peak learning rate"""
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "warmup_log"] = "cosine"
    """shape after the warm-up; warmup_log is DeepSpeed's WarmupLR with warmup_type log"""
    warmup: float = 0.0
    """warm-up: steps, or a share of all steps when below 1"""
    decay: float = 0.2
    """wsd: the final decay, steps or share of all steps"""
    final: float = 0.0
    """learning rate at the end, as a share of the peak"""
    weight_decay: float = 0.0
    """decoupled decay of matrices (never norms and biases)"""
    b1: float = 0.9
    """decay of the first moment"""
    b2: float = 0.999
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    clip: float = 1.0
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

    every: int = 10
    """steps between lines of metrics.jsonl"""
    report_to: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """trackers besides metrics.jsonl"""
    samples: tuple[str, ...] = ()
    """prompts continued at each evaluation and written to samples.jsonl"""
    sample_tokens: int = 64
    """new tokens per sample"""
    progress: bool = True
    """progress bar on the terminal"""


@dataclass(frozen=True)
class SaveSection:
    """Checkpoints."""

    every: int = 500
    """steps between checkpoints (one is always written at the end)"""
    keep: int = 3
    """last checkpoints kept; 0 = all"""
    keep_best: bool = True
    """also keep the one with the lowest eval loss"""
    final: bool = True
    """write final/ as a HF directory when done"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of the weights in final/; default: the master weights'"""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    objective: Literal["pretrain", "sft"] = "pretrain"
    """set by the verb"""
    output_dir: str = "run"
    """the run folder"""
    overwrite: bool = False
    """delete what is in output_dir first"""
    resume: bool = True
    """go on from the newest good checkpoint in output_dir when there is one"""
    seed: int = 0
    """of weights, data order and everything else"""
    epochs: float = 1.0
    """passes over the data, unless steps is given"""
    steps: int = 0
    """updates; 0 = epochs decide"""
    batch_size: int = 32
    """rows in an update, over all devices: what defines the run"""
    micro_batch_size: int = 0
    """rows per device at a time, a memory knob; 0 = as many as batch_size gives each device"""
    eval_every: int = 0
    """steps between evaluations; 0 = only at the end"""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    log: LogSection = field(default_factory=LogSection)
    save: SaveSection = field(default_factory=SaveSection)
