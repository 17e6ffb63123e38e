# SPDX-License-Identifier: Apache-2.0
"""A run as one frozen value: typed fields, each with its default, unit and meaning.

Types and ranges are the fields' own annotations, checked by pydantic; what several fields must
agree on stands in `check`. `load_config` reads a value from a YAML file, a DeepSpeed file and
`--section.key value`, and says where each of its fields came from.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from jaxllm import aliases
from jaxllm.aliases import Given

# Counts fit the int32 that steps and rows are counted in; a seed fits an int64.
Count = Annotated[int, Ge(0), Le(2**31 - 1)]
Size = Annotated[int, Ge(1), Le(2**31 - 1)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Amount = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]


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
    """the backward pass recomputes nothing, all, all but matrix products, or all but attention"""
    scan_unroll: Size = 1
    """layers per iteration of the scan over layers (more = longer compile and more memory)"""
    loss_chunk: Size = 512
    """tokens whose logits exist at one time in the loss"""
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


@dataclass(frozen=True)
class DataSection:
    """What is read and how it becomes rows."""

    train: tuple[Source, ...] = ()
    """sources to train on: a path, a list of paths, or a list of {path, weight, split, columns}"""
    eval: tuple[Source, ...] = ()
    """held-out sources; each is evaluated whole"""
    eval_fraction: Fraction = 0.0
    """share of the training examples held out, drawn by the seed; not together with `eval`"""
    max_length: Annotated[int, Ge(2)] = 1024
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
    """SFT: chat template: a file or built-in name (seed-qwen, chatml); default: the tokenizer's"""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """SFT: extra variables for the chat template"""
    user_template: str | None = None
    """SFT: rewrites the last user turn from columns: a format string, or a built-in name (rag)"""
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
    """peak learning rate; default: 1e-4, lora and adapter 5e-4, prefix and prompt 1e-2"""
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

    every: Size = 10
    """steps between lines of metrics.jsonl"""
    report_to: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """trackers besides metrics.jsonl"""
    samples: tuple[str, ...] = ()
    """prompts continued at each evaluation and written to samples.jsonl"""
    sample_tokens: Size = 64
    """new tokens per sample"""
    progress: bool = True
    """progress bar on the terminal"""


@dataclass(frozen=True)
class SaveSection:
    """Checkpoints."""

    every: Count = 500
    """steps between checkpoints (one is always written at the end); 0 = only at the end"""
    keep: Count = 3
    """last checkpoints kept; 0 = all"""
    keep_best: bool = True
    """also keep the one with the lowest eval loss"""
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
class TrainConfig:
    """A whole run."""

    __pydantic_config__ = {"allow_inf_nan": False}  # in the sections too

    objective: Literal["pretrain", "sft"] = "pretrain"
    """set by the verb"""
    output_dir: str = "run"
    """the run folder"""
    overwrite: bool = False
    """delete the run in output_dir, once all about the new one was checked"""
    resume: bool = True
    """go on from the newest good checkpoint in output_dir when there is one"""
    seed: Seed = 0
    """of weights, data order and everything else"""
    epochs: Annotated[float, Gt(0)] = 1.0
    """passes over the data, unless steps is given"""
    steps: Count = 0
    """updates; 0 = epochs decide"""
    batch_size: Count = 32
    """rows in an update, over all devices; 0 = micro_batch_size x accumulation x devices"""
    micro_batch_size: Count = 0
    """rows per device at a time, a memory knob; 0 = as many as batch_size gives each device"""
    accumulation: Count = 0
    """micro-batches in an update; 0 = what batch_size and micro_batch_size make of it"""
    eval_every: Count = 0
    """steps between evaluations; 0 = only at the end"""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    peft: PeftSection = field(default_factory=PeftSection)
    optim: OptimSection = field(default_factory=OptimSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    log: LogSection = field(default_factory=LogSection)
    save: SaveSection = field(default_factory=SaveSection)


SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "data": DataSection,
    "peft": PeftSection,
    "optim": OptimSection,
    "mesh": MeshSection,
    "log": LogSection,
    "save": SaveSection,
}
USUAL = {"model": "model.path", "data": "data.train"}  # what someone who writes --model means
CHATS = ("packing", "too_long", "learn", "train_on_prompt")
CHATS += ("template", "template_kwargs", "user_template")
UNREAD = {"pretrain": CHATS, "sft": ("segment",)}  # of data: what the objective does not read


# ---- the fields as a table


@dataclass(frozen=True)
class Leaf:
    """One dotted key: its type, default and docstring."""

    key: str
    type: Any
    default: Any
    doc: str


def _docs(kind: type) -> dict[str, str]:
    """{field: the string that follows it in the source}."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    return {
        ast.unparse(name.target): ast.literal_eval(doc.value)
        for name, doc in zip(node.body, node.body[1:], strict=False)
        if isinstance(name, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


def _leaves(kind: type, prefix: str = "") -> Iterator[Leaf]:
    types, docs = get_type_hints(kind, include_extras=True), _docs(kind)
    for f in fields(kind):
        if not prefix and f.name in SECTIONS:
            yield from _leaves(SECTIONS[f.name], f"{f.name}.")
        else:
            made = f.default_factory() if f.default_factory is not MISSING else f.default
            yield Leaf(prefix + f.name, types[f.name], made, docs[f.name])


@cache
def leaves() -> dict[str, Leaf]:
    """Every key of a run, in order."""
    return {leaf.key: leaf for leaf in _leaves(TrainConfig)}


def value_of(cfg: TrainConfig, key: str) -> Any:
    """The value of a dotted key."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(cfg, section) if section else cfg, name)


def leaf_of(key: str) -> Leaf | None:
    """The field that a dotted key sets: itself, or an entry of a dict such as model.overrides.X."""
    found = leaves().get(key)
    parent = leaves().get(key.rpartition(".")[0])
    return found or (parent if parent and isinstance(parent.default, dict) else None)


def _unknown(key: str, where: str = "") -> ValueError:
    """The error for a key that is none, naming the nearest one."""
    last = key.rpartition(".")[2]
    names = {name.rpartition(".")[2]: name for name in reversed(leaves())}
    names |= {name: name for name in (*leaves(), *aliases.meanings(), *SECTIONS)}
    near = [n for k in (key, last) for n in difflib.get_close_matches(k, names, 1)]
    flag = where.startswith("--")
    if flag:
        names |= USUAL
    hint = f"did you mean {'--' * flag}{names[near[0]]}?" if near else "--help lists all keys"
    if flag and key in SECTIONS:
        hint = hint if key in USUAL else "--help lists them"
        return ValueError(f"{where}: {key} has keys of its own; {hint}")
    shown = f"unknown flag {where}" if flag else f"{where}: unknown key {key}".removeprefix(": ")
    return ValueError(f"{shown}; {hint}")


# ---- checking


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(TrainConfig)


def validated(tree: dict[str, Any], where: Mapping[str, str]) -> TrainConfig:
    """The nested dict as a TrainConfig; raises ValueError for the first wrong value."""
    from pydantic import ValidationError

    flat = {k: v for k, v in tree.items() if k not in SECTIONS}
    for section in SECTIONS.keys() & tree.keys():
        if not isinstance(tree[section], dict):
            raise ValueError(f"{section} has keys of its own, seen {tree[section]!r}")
        flat |= {f"{section}.{k}": v for k, v in tree[section].items()}
    for key, value in flat.items():
        if (leaf := leaves().get(key)) is None:
            raise _unknown(key)
        if isinstance(value, bool) and not isinstance(leaf.default, bool):
            raise ValueError(f"{_at(key, where)} needs a value, seen {str(value).lower()}")
    try:
        return _adapter().validate_python(tree)
    except ValidationError as error:
        unexpected = "unexpected_keyword_argument"
        first = min(error.errors(), key=lambda one: one["type"] != unexpected)
    loc, seen = first["loc"], first["input"]
    key = ".".join(map(str, loc[:2])) if loc[0] in SECTIONS else str(loc[0])
    inside = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc[key.count(".") + 1 :]
    )
    at = _at(key, where) + inside
    if first["type"] == unexpected:
        known = ", ".join(f.name for f in fields(Source))
        raise ValueError(f"{at} is not known; a source has {known}") from None
    if first["type"] in ("missing", "missing_argument"):
        raise ValueError(f"{at} is missing; seen {seen!r}") from None
    wanted = first["msg"].removeprefix("Input ").removeprefix("Value ")
    raise ValueError(f"{at} is {seen!r}; it {wanted}") from None


def _at(key: str, where: Mapping[str, str]) -> str:
    at = where.get(key, "")
    return key if at.lstrip("-") in ("", key) else f"{at}: {key}"


def to_dict(cfg: TrainConfig) -> dict[str, Any]:
    """Nested plain values, as JSON would hold them."""
    return json.loads(json.dumps(asdict(cfg)))


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Inverse of `to_dict`. Raises ValueError: the key, what was seen, what is accepted."""
    return validated(values, {})


def json_schema() -> dict[str, Any]:
    """JSON schema of the YAML file, for editors: docstrings, ranges, HF spellings included."""
    schema = _adapter().json_schema()
    for kind in (TrainConfig, Source, *SECTIONS.values()):
        part = schema if kind is TrainConfig else schema["$defs"][kind.__name__]
        part |= {"additionalProperties": False, "description": inspect.getdoc(kind)}
        for key, doc in _docs(kind).items():
            part["properties"][key]["description"] = doc
    for key in SHORT_FORMS:
        section, _, name = key.partition(".")
        whole = schema["$defs"][SECTIONS[section].__name__]["properties"][name]
        one = [{"type": "string"}, whole.pop("items")]
        whole["anyOf"] = [*one, {"type": whole.pop("type"), "items": {"anyOf": one}}]
    top = schema["properties"]
    top["resume"]["type"] = ["boolean", "string"]  # aliases.resume_path
    top["optim"] = {"anyOf": [{"type": "string"}, top["optim"]]}  # transformers' optim
    others = {
        n: {"description": f"transformers' name of {m}"}
        for n, m in aliases.meanings().items()
        if "." not in n
    }
    others |= {n: {"description": "no meaning here"} for n in sorted(aliases.IGNORED)}
    others |= {n: {"enum": aliases.OFF, "description": why} for n, why in aliases.REFUSED.items()}
    schema["properties"] = others | top
    return schema


def tokenizer_path(cfg: TrainConfig) -> str:
    """Where a run's tokenizer comes from: its own key, else where the model comes from."""
    return cfg.model.tokenizer or cfg.model.path or str(cfg.model.config)


# ---- reading


def _typed(one: Given) -> Given:
    """A flag's texts as a value: as they stand for a text field, else YAML; True when bare."""
    name, texts = one.name, one.value
    if not texts:
        positive = name.removeprefix("no_")
        return (
            Given(name, True, one.where)
            if leaf_of(name)
            else Given(positive, positive == name, one.where)
        )
    key = aliases.RENAMED.get(name, name)
    leaf = leaves().get(key)
    many = leaf is not None and isinstance(leaf.default, tuple)
    textual = leaf is not None and (many or leaf.type in (str, str | None))

    def value(text: str) -> Any:
        if textual and not (many and text.startswith(("[", "{"))):
            return None if not many and text in ("null", "none") else text
        return aliases.parse(text)

    if len(texts) > 1 and leaf and not many:
        raise ValueError(f"{one.where} takes one value, seen {' '.join(texts)}")
    return Given(name, value(texts[0]) if len(texts) == 1 else [value(t) for t in texts], one.where)


# What a user may write for a list, beside the list itself.
SHORT_FORMS = {
    "data.train": aliases.sources,
    "data.eval": aliases.sources,
    "log.samples": aliases.listed,
    "log.report_to": aliases.trackers,
    "peft.target_modules": aliases.listed,
    "peft.exclude_modules": aliases.listed,
    "peft.modules_to_save": aliases.listed,
}
PATHS = ("output_dir", "model.path", "model.config", "model.tokenizer")
PATHS += ("data.template", "data.cache_dir", "peft.path")
READ = SHORT_FORMS | dict.fromkeys(PATHS, aliases.home)
READ["peft.layers_to_transform"] = aliases.listed
READ["peft.init_lora_weights"] = lambda value: "kaiming" if value is True else value  # peft's word


def read_sources(texts: Sequence[str], flag: str) -> tuple[Source, ...]:
    """Sources as the values of a flag; raises ValueError for what is none."""
    value = aliases.sources(_typed(Given("data.eval", list(texts), flag)).value)
    return validated({"data": {"eval": value}}, {"data.eval": flag}).data.eval


def load_config(
    objective: str, path: str | None = None, args: Sequence[str] = ()
) -> tuple[TrainConfig, dict[str, str]]:
    """A run from a YAML file and command-line arguments, HF spellings included in both.

    Later beats earlier: defaults, the file, the arguments; a DeepSpeed file fills what neither
    gives and may not contradict them. Also returns where each dotted key came from ("default", the
    file:line, the flag). What a flag or a DeepSpeed key asks for that has no meaning here is listed
    on stderr. Raises ValueError for an unknown key (naming the nearest), a wrong value or a
    contradiction, FileNotFoundError for a missing file.
    """
    given: dict[str, Given] = {}
    ignored: list[str] = []
    file = aliases.read_yaml(path, tuple(SECTIONS)) if path else []
    for layer in (file, [_typed(one) for one in aliases.read_args(args)]):
        for one in layer:
            if leaf_of(one.name) is None and one.name not in aliases.NAMES:
                raise _unknown(one.name, one.where)
        values, without_meaning = aliases.translate(layer)
        given = {k: v for k, v in given.items() if k.rpartition(".")[0] not in values} | values
        ignored += without_meaning
    if (deepspeed := given.pop("deepspeed", None)) is not None:
        asked, without_meaning = aliases.read_deepspeed(str(deepspeed.value), given)
        given |= asked
        ignored += without_meaning
    if ignored:
        print(f"jaxllm: ignored, no meaning here: {', '.join(ignored)}", file=sys.stderr)
    verb = given.setdefault("objective", Given("objective", objective, "the verb"))
    if verb.value != objective:
        raise ValueError(f"{verb.where}: objective is {verb.value!r}; run `jaxllm {verb.value}`")
    given = {
        k: replace(one, value=READ[k](one.value)) if k in READ else one for k, one in given.items()
    }
    given = aliases.resume_path(given)

    tree: dict[str, Any] = {}
    for key, one in sorted(given.items()):
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{one.where}: {parent} is {node!r}, which has no entries")
        node[name] = one.value
    origin = {leaf.key: one.where for key, one in given.items() if (leaf := leaf_of(key))}
    return validated(tree, origin), {key: origin.get(key, "default") for key in leaves()}
