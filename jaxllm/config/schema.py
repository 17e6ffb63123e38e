# SPDX-License-Identifier: Apache-2.0
"""A run as one frozen value, its sections those of sections.py.

Types and ranges are checked by pydantic; what several fields must agree on stands in `check`.
`load_config` reads a value from a YAML file, a DeepSpeed file and
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
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Gt

from jaxllm.config import aliases
from jaxllm.config.aliases import Given
from jaxllm.config.deepspeed import read_deepspeed
from jaxllm.config.sections import (
    AlignSection,
    Count,
    DataSection,
    EvalSection,
    Interval,
    LogSection,
    MeshSection,
    ModelSection,
    OptimSection,
    PeftSection,
    RlSection,
    SaveSection,
    Seed,
    Source,
)
from jaxllm.config.verbs import VERBS, Verb
from jaxllm.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    __pydantic_config__ = {"allow_inf_nan": False}  # in the sections too

    objective: Literal[
        "pretrain", "sft", "reward", "dpo", "kto", "orpo", "simpo", "ppo", "grpo"
    ] = "pretrain"
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
    eval_every: Interval = 0
    """steps between evaluations, or epoch; 0 = only at the end"""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    peft: PeftSection = field(default_factory=PeftSection)
    optim: OptimSection = field(default_factory=OptimSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    log: LogSection = field(default_factory=LogSection)
    eval: EvalSection = field(default_factory=EvalSection)
    save: SaveSection = field(default_factory=SaveSection)
    align: AlignSection = field(default_factory=AlignSection)
    rl: RlSection = field(default_factory=RlSection)

    @property
    def verb(self) -> Verb:
        """The row of `verbs.VERBS` of this run."""
        return VERBS[self.objective]


SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "data": DataSection,
    "peft": PeftSection,
    "optim": OptimSection,
    "mesh": MeshSection,
    "log": LogSection,
    "eval": EvalSection,
    "save": SaveSection,
    "align": AlignSection,
    "rl": RlSection,
}
USUAL = {"model": "model.path", "data": "data.train"}  # what someone who writes --model means


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
        ast.unparse(name.target): " ".join(ast.literal_eval(doc.value).split())
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
        return UserError(f"{where}: {key} has keys of its own; {hint}")
    shown = f"unknown flag {where}" if flag else f"{where}: unknown key {key}".removeprefix(": ")
    return UserError(f"{shown}; {hint}")


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
            raise UserError(f"{section} has keys of its own, seen {tree[section]!r}")
        flat |= {f"{section}.{k}": v for k, v in tree[section].items()}
    for key, value in flat.items():
        if (leaf := leaves().get(key)) is None:
            raise _unknown(key)
        if isinstance(value, bool) and bool not in (leaf.type, *get_args(leaf.type)):
            raise UserError(f"{_at(key, where)} needs a value, seen {str(value).lower()}")
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
    if Literal["epoch"] in get_args(leaves()[key].type):  # else each member of the union complains
        raise UserError(f"{_at(key, where)} is {seen!r}; it should be a number of steps, or epoch")
    at = _at(key, where) + inside
    if first["type"] == unexpected:
        known = ", ".join(f.name for f in fields(Source))
        raise UserError(f"{at} is not known; a source has {known}") from None
    if first["type"] in ("missing", "missing_argument"):
        raise UserError(f"{at} is missing; seen {seen!r}") from None
    wanted = first["msg"].removeprefix("Input ").removeprefix("Value ")
    raise UserError(f"{at} is {seen!r}; it {wanted}") from None


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
        raise UserError(f"{one.where} takes one value, seen {' '.join(texts)}")
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
    "align.loss": aliases.listed,
    "rl.rewards": aliases.listed,
}
PATHS = ("output_dir", "model.path", "model.config", "model.tokenizer")
PATHS += ("data.template", "data.cache_dir", "peft.path")
READ = SHORT_FORMS | dict.fromkeys(PATHS, aliases.home)
READ |= dict.fromkeys(("align.loss_weights", "rl.reward_weights"), aliases.listed)
READ["log.compile_cache"] = lambda value: "off" if value is False else aliases.home(value)  # YAML's
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
        asked, without_meaning = read_deepspeed(str(deepspeed.value), given)
        given |= asked
        ignored += without_meaning
    if ignored:
        print(f"jaxllm: ignored, no meaning here: {', '.join(ignored)}", file=sys.stderr)
    verb = given.setdefault("objective", Given("objective", objective, "the verb"))
    if verb.value != objective:
        raise UserError(f"{verb.where}: objective is {verb.value!r}; run `jaxllm {verb.value}`")
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
                raise UserError(f"{one.where}: {parent} is {node!r}, which has no entries")
        node[name] = one.value
    origin = {leaf.key: one.where for key, one in given.items() if (leaf := leaf_of(key))}
    return validated(tree, origin), {key: origin.get(key, "default") for key in leaves()}
