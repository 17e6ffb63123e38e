# SPDX-License-Identifier: Apache-2.0
"""TrainConfig: its fields as a table of dotted keys, validation, and conversion from and to dicts.

pydantic checks types and ranges, from the annotations; `checks` tests what several fields must
agree on.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from jaxllm.config import aliases
from jaxllm.config.sections import (
    AlignSection,
    ClusterSection,
    Count,
    DataSection,
    EvalSection,
    Interval,
    LogSection,
    MeshSection,
    ModelSection,
    OptimSection,
    Path,
    PeftSection,
    Positive,
    Read,
    RlSection,
    SaveSection,
    Seed,
    Source,
    Unit,
    listed,
)
from jaxllm.config.verbs import VERBS, Verb
from jaxllm.errors import UserError

if TYPE_CHECKING:  # a type checker accepts no computed Literal
    Objective = str
else:
    Objective = Literal[tuple(VERBS)]


@dataclass(frozen=True)
class TrainConfig:
    """The config of a training run."""

    __pydantic_config__ = {"allow_inf_nan": False}  # also applies to the sections

    objective: Objective = "pretrain"
    """training objective; set by the verb"""
    output_dir: Path = "run"
    """run folder"""
    overwrite: bool = False
    """delete an earlier run in output_dir, after the new config, model and data are validated"""
    resume: bool = True
    """resume from the latest valid checkpoint in output_dir, if there is one"""
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


SECTIONS: dict[str, Any] = {
    f.name: f.default_factory for f in fields(TrainConfig) if f.default_factory is not MISSING
}
# The key that a user who writes --model or --data probably means.
USUAL = {"model": "model.path", "data": "data.train"}


# ---- the fields as a table


@dataclass(frozen=True)
class Leaf:
    """One dotted key with its annotation, default and documentation."""

    key: str
    annotation: Any
    default: Any
    doc: str

    @property
    def types(self) -> set[Any]:
        """The types of the union, without None; a Literal stands for itself."""
        return set(members(self.annotation))

    @property
    def unit(self) -> str:
        """Unit of the number, or ""."""
        return next((mark.name for mark in _marks(self.annotation) if isinstance(mark, Unit)), "")

    @property
    def is_path(self) -> bool:
        """True if ~ is expanded."""
        return any(mark in get_args(Path) for mark in _marks(self.annotation))

    @property
    def read(self) -> Callable[[Any], Any]:
        """Converts what a user may write to the field's type; a list may be one item."""
        marks = (mark.convert for mark in _marks(self.annotation) if isinstance(mark, Read))
        return next(marks, listed if isinstance(self.default, tuple) else lambda value: value)


def members(kind: Any) -> Iterator[Any]:
    """The alternatives of a union of annotated types."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from members(inner[0])
    elif inner and origin not in (Literal, tuple, dict):
        for one in inner:
            yield from members(one)
    elif kind is not type(None):
        yield kind


def _marks(kind: Any) -> Iterator[Any]:
    """The metadata of an annotation and of the alternatives of its union."""
    yield from getattr(kind, "__metadata__", ())
    if get_origin(kind) not in (Literal, tuple, dict):
        for one in get_args(kind):
            yield from _marks(one)


def field_docs(kind: type) -> dict[str, str]:
    """{field: the string that follows it in the source}."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    return {
        ast.unparse(name.target): " ".join(ast.literal_eval(doc.value).split())
        for name, doc in zip(node.body, node.body[1:], strict=False)
        if isinstance(name, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


def _leaves(kind: type, prefix: str = "") -> Iterator[Leaf]:
    annotations, docs = get_type_hints(kind, include_extras=True), field_docs(kind)
    for f in fields(kind):
        if not prefix and f.name in SECTIONS:
            yield from _leaves(SECTIONS[f.name], f"{f.name}.")
        else:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            yield Leaf(prefix + f.name, annotations[f.name], default, docs[f.name])


@cache
def leaves() -> dict[str, Leaf]:
    """All keys of a config, in order."""
    return {leaf.key: leaf for leaf in _leaves(TrainConfig)}


def value_of(cfg: TrainConfig, key: str) -> Any:
    """The value of a dotted key."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(cfg, section) if section else cfg, name)


def leaf_of(key: str) -> Leaf | None:
    """The field that a dotted key sets: itself, or a dict for an entry like model.overrides.X."""
    leaf = leaves().get(key)
    parent = leaves().get(key.rpartition(".")[0])
    return leaf or (parent if parent and isinstance(parent.default, dict) else None)


def unknown_key(key: str, where: str = "") -> UserError:
    """The error for an unknown key, which names the nearest known one."""
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
        return UserError(f"{where}: {key} is a section with keys; {hint}")
    shown = f"unknown flag {where}" if flag else f"{where}: unknown key {key}".removeprefix(": ")
    return UserError(f"{shown}; {hint}")


# ---- validation


@cache
def type_adapter() -> Any:
    """pydantic's validator of TrainConfig, built once because it takes long."""
    from pydantic import TypeAdapter

    return TypeAdapter(TrainConfig)


def validated(tree: dict[str, Any], where: Mapping[str, str]) -> TrainConfig:
    """Convert a nested dict to a TrainConfig.

    where: origins of dotted keys, for messages. Raises UserError for the first invalid value.
    """
    from pydantic import ValidationError

    flat = {k: v for k, v in tree.items() if k not in SECTIONS}
    for section in SECTIONS.keys() & tree.keys():
        if not isinstance(tree[section], dict):
            raise UserError(f"{section} must be a mapping, seen {tree[section]!r}")
        flat |= {f"{section}.{k}": v for k, v in tree[section].items()}
    for key, value in flat.items():
        if (leaf := leaves().get(key)) is None:
            raise unknown_key(key)
        if isinstance(value, bool) and bool not in leaf.types:
            raise UserError(f"{_at(key, where)} needs a value, seen {str(value).lower()}")
    try:
        return type_adapter().validate_python(tree)
    except ValidationError as error:
        unexpected = "unexpected_keyword_argument"
        first = min(error.errors(), key=lambda one: one["type"] != unexpected)
    loc, seen = first["loc"], first["input"]
    key = ".".join(map(str, loc[:2])) if loc[0] in SECTIONS else str(loc[0])
    parts = loc[key.count(".") + 1 :]
    inside = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    if Literal["epoch"] in leaves()[key].types:  # pydantic reports each member of the union
        raise UserError(f"{_at(key, where)} is {seen!r}; it should be a number of steps, or epoch")
    shown = _at(key, where) + inside
    if first["type"] == unexpected:
        known = ", ".join(f.name for f in fields(Source))
        raise UserError(f"{shown} is not known; a source has {known}") from None
    if first["type"] in ("missing", "missing_argument"):
        raise UserError(f"{shown} is missing; seen {seen!r}") from None
    wanted = first["msg"].removeprefix("Input ").removeprefix("Value ")
    raise UserError(f"{shown} is {seen!r}; it {wanted}") from None


def _at(key: str, where: Mapping[str, str]) -> str:
    """The key with its origin, unless that is the flag of the same name."""
    origin = where.get(key, "")
    return key if origin.lstrip("-") in ("", key) else f"{origin}: {key}"


def to_dict(cfg: TrainConfig) -> dict[str, Any]:
    """Convert to nested JSON values."""
    return json.loads(json.dumps(asdict(cfg)))


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Inverse of `to_dict`. Raises UserError for the first invalid value."""
    return validated(values, {})


def tokenizer_path(cfg: TrainConfig) -> str:
    """Path of the tokenizer: model.tokenizer, else model.path, else model.config."""
    return cfg.model.tokenizer or cfg.model.path or str(cfg.model.config)
