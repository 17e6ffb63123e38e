# SPDX-License-Identifier: Apache-2.0
"""A run as one frozen value: typed fields, each with its default, unit and meaning."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
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
    scan_unroll: int = 1
    """layers per iteration of the scan over layers (more = longer compile)"""
    loss_chunk: int = 512
    """tokens whose logits exist at one time in the loss"""
    z_loss: float = 0.0
    """coefficient of the squared log-partition"""


@dataclass(frozen=True)
class Source:
    """One source of examples."""

    __pydantic_config__ = {"extra": "forbid"}

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
    per_device_batch_size: int = 0
    """rows per device and micro-batch, HF's way: with accumulation and devices it makes batch_size"""
    accumulation: int = 1
    """micro-batches in an update when per_device_batch_size is given"""
    eval_every: int = 0
    """steps between evaluations; 0 = only at the end"""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    log: LogSection = field(default_factory=LogSection)
    save: SaveSection = field(default_factory=SaveSection)


def to_dict(cfg: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON-able values."""
    return asdict(cfg)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Checked types: raises ValueError naming the key, what was seen and what is accepted."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{key}: {first['msg']}, seen {first['input']!r}") from None


def json_schema() -> dict[str, Any]:
    """JSON schema of a run's YAML, for editors."""
    from pydantic import TypeAdapter

    return TypeAdapter(TrainConfig).json_schema()


def keys(kind: Any = None, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a config and its dataclass field."""
    found: dict[str, Any] = {}
    for f in fields(kind or TrainConfig):
        section = SECTIONS.get(f.name) if not prefix else None
        found |= keys(section, f"{f.name}.") if section else {prefix + f.name: f}
    return found


SECTIONS = {
    "model": ModelSection,
    "data": DataSection,
    "optim": OptimSection,
    "mesh": MeshSection,
    "log": LogSection,
    "save": SaveSection,
}


def nearest(key: str, known: Any) -> str:
    """The error for an unknown key."""
    close = difflib.get_close_matches(key, list(known), 1, 0.4)
    tail = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    guess = (tail or close or [""])[0]
    return f"unknown key {key}" + (f"; did you mean {guess}?" if guess else "")


def _flatten(values: dict[str, Any], where: str, known: dict[str, Any]) -> dict[str, Any]:
    """{section: {key: value}} -> {dotted key: value}; raises ValueError at an unknown key."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in SECTIONS and isinstance(value, dict):
            flat |= {f"{name}.{k}": v for k, v in value.items()}
        elif name in SECTIONS:
            raise ValueError(f"{where}: {name} is a section with keys of its own, seen {value!r}")
        else:
            flat[name] = value
    for key in flat:
        if key not in known:
            raise ValueError(f"{where}: {nearest(key, known)}")
    return flat


def _read_yaml(path: str, known: dict[str, Any]) -> dict[str, Any]:
    import yaml

    try:
        text = Path(path).read_text()
        values = yaml.safe_load(text) or {}
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise ValueError(f"{path}:{line}: {error.problem}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected sections and keys, seen {type(values).__name__}")
    try:
        return _flatten(values, path, known)
    except ValueError as error:
        key = str(error).split("unknown key ")[-1].split(";")[0].split(".")[-1]
        line = next((n for n, t in enumerate(text.splitlines(), 1) if t.strip().startswith(key + ":")), 0)
        message = str(error).removeprefix(path + ": ")
        raise ValueError(f"{path}:{line}: {message}" if line else str(error)) from None


def _arguments(args: list[str]) -> list[tuple[str, str | None]]:
    """--key value, --key=value and bare --key, in order."""
    pairs: list[tuple[str, str | None]] = []
    for arg in args:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            pairs.append((key, value if equals else None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], arg)
        elif pairs and pairs[-1][0] in LISTS:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]},{arg}")
        else:
            raise ValueError(f"{arg!r} follows no --key")
    return pairs


LISTS = ("train_files", "validation_files", "data.train", "data.eval", "report_to", "log.samples")


def _sources(value: Any) -> Any:
    """A path, or a list of paths and dicts, as a list of dicts."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part]
    if isinstance(value, dict):
        value = [value]
    return [{"path": v} if isinstance(v, str) else v for v in value]


def load_config(
    objective: str, path: str | None = None, args: list[str] | None = None
) -> tuple[TrainConfig, dict[str, str]]:
    """A run from a YAML file and `--section.key value` arguments, HF spellings among them.

    Later beats earlier: defaults, the file, a DeepSpeed file, the arguments. Also returns where
    each dotted key that is not a default came from. Raises ValueError for an unknown key (naming
    the nearest), a wrong type, or a contradiction.
    """
    import yaml

    from jaxllm import aliases

    known = keys()
    values: dict[str, Any] = {"objective": objective}
    source: dict[str, str] = {"objective": "the verb"}
    if path:
        file = _read_yaml(path, known)
        values |= file
        source |= dict.fromkeys(file, path)
    own: dict[str, Any] = {}
    hf: dict[str, Any] = {}
    for key, text in _arguments(args or []):
        plain = key.replace("-", "_")
        if plain in aliases.LATER:
            raise ValueError(f"--{key} belongs to {aliases.LATER[plain]}, which is not available yet")
        value = True if text is None else yaml.safe_load(text)
        if plain in aliases.ALIASES or plain in aliases.SPECIAL:
            hf[plain] = value
        elif plain in known:
            own[plain] = value
        else:
            raise ValueError(nearest(f"--{key}", [f"--{k}" for k in (*known, *aliases.ALIASES, *aliases.SPECIAL)]))
    translated, origin = aliases.translate(hf)
    values |= translated | own
    source |= origin | {key: f"--{key}" for key in own}
    for key in ("data.train", "data.eval"):
        if key in values:
            values[key] = _sources(values[key])
    for key in ("log.report_to", "log.samples"):
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return from_dict(nested), source


def resolve_batch(cfg: TrainConfig, data_devices: int) -> TrainConfig:
    """Fixes the global batch, and the rows per device at a time, for `data_devices` devices.

    `per_device_batch_size` x accumulation x devices makes a global batch once; a resumed run on
    another mesh keeps the batch. Raises ValueError where the batch does not divide.
    """
    size = cfg.batch_size
    micro = cfg.micro_batch_size or cfg.per_device_batch_size
    if cfg.per_device_batch_size:
        size = cfg.per_device_batch_size * cfg.accumulation * data_devices
    if size % data_devices:
        raise ValueError(f"batch_size {size} does not divide over {data_devices} devices; change one of them")
    share = size // data_devices
    micro = micro or share // cfg.accumulation or 1
    if share % micro:
        raise ValueError(
            f"batch_size {size} gives each of {data_devices} devices {share} rows, which do not divide "
            f"into micro-batches of {micro}"
        )
    return replace(cfg, batch_size=size, micro_batch_size=micro, per_device_batch_size=0, accumulation=1)


def check(cfg: TrainConfig) -> None:
    """Raises ValueError where fields contradict each other or are out of range."""
    if not cfg.model.path and not cfg.model.config:
        raise ValueError(
            "no model: give model.path (weights to start from) or model.config (random weights)"
        )
    if cfg.model.path and cfg.model.config:
        raise ValueError("model.path and model.config are both given; keep one")
    if cfg.model.overrides and not cfg.model.config:
        raise ValueError("model.overrides go with model.config (random weights) only")
    if not cfg.data.train:
        raise ValueError("no data: give data.train")
    if not 0 <= cfg.data.eval_fraction < 1:
        raise ValueError(f"data.eval_fraction is {cfg.data.eval_fraction}; it must lie in [0, 1)")
    positive = {
        "batch_size": cfg.batch_size,
        "data.max_length": cfg.data.max_length - 1,
        "log.every": cfg.log.every,
        "save.every": cfg.save.every,
        "model.loss_chunk": cfg.model.loss_chunk,
        "model.scan_unroll": cfg.model.scan_unroll,
        "accumulation": cfg.accumulation,
        "steps or epochs": cfg.steps or cfg.epochs,
    }
    for key, value in positive.items():
        if value <= 0:
            raise ValueError(f"{key} is too small; it must be positive (data.max_length at least 2)")
    if cfg.mesh.expert != 1 or cfg.mesh.context != 1:
        raise ValueError("mesh.expert and mesh.context are names for now; leave them at 1")
