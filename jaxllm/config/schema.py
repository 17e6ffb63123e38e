# SPDX-License-Identifier: Apache-2.0
"""The fields of TrainConfig as a table of dotted keys, validation, conversion to and from dicts.

pydantic checks types and ranges, from the annotations; `checks` tests what several fields must
agree on.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from jaxllm.config import aliases
from jaxllm.config.fields import Read, listed
from jaxllm.config.sections import Source, TrainConfig, Unit
from jaxllm.errors import UnknownFlag, UserError, nearest, together

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
        """The types of the union, without None; a Literal is kept as one type."""
        return {kind for kind, _ in members(self.annotation)}

    @property
    def unit(self) -> str:
        """Unit of the number, or ""."""
        return next((mark.unit for mark in self._marks() if isinstance(mark, Unit)), "")

    @property
    def read(self) -> Callable[[Any], Any]:
        """Converts what a user may write to the field's type; a list may be one item."""
        readers = (mark.convert for mark in self._marks() if isinstance(mark, Read))
        return next(readers, listed if isinstance(self.default, tuple) else lambda value: value)

    def _marks(self) -> Iterator[Any]:
        return (mark for _, marks in members(self.annotation) for mark in marks)


def members(kind: Any, marks: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(type, metadata) of each alternative of a union of annotated types, without None."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from members(inner[0], (*marks, *inner[1:]))
    elif inner and origin not in (Literal, tuple, dict):
        for one in inner:
            yield from members(one, marks)
    elif kind is not type(None):
        yield kind, marks


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
    return attrgetter(key)(cfg)


def leaf_of(key: str) -> Leaf | None:
    """The field that a dotted key sets: itself, or a dict for an entry like model.overrides.X."""
    leaf = leaves().get(key)
    parent = leaves().get(key.rpartition(".")[0])
    return leaf or (parent if parent and isinstance(parent.default, dict) else None)


def unknown_key(key: str, where: str = "") -> UserError:
    """The error for an unknown key, which names the nearest known one, if one is near."""
    is_flag = where.startswith("--")
    if is_flag and key in SECTIONS:
        hint = f"did you mean --{USUAL[key]}?" if key in USUAL else "--help lists them"
        return UserError(f"{where}: {key} is a section with keys; {hint}")
    section, _, name = key.rpartition(".")
    near = _nearest_key(key)
    near = USUAL.get(near or "", near) if is_flag else near
    hint = f"did you mean {'--' * is_flag}{near}?" if near else "--help lists all keys"
    if section in ("data", "data.train", "data.eval") and name in field_docs(Source):
        owner = "data.eval" if section == "data.eval" else "data.train"
        hint = f"it belongs to a source of {owner}: {{path: PATH, {name}: …}}"
    if is_flag:
        return UnknownFlag(f"unknown flag {where}; {hint}")
    return UserError(f"{where}: unknown key {key}; {hint}".removeprefix(": "))


def _nearest_key(key: str) -> str | None:
    """The key that a user who writes `key` probably means: the one of this name, of these initials
    (lr: learning_rate) or of a similar name. A key with a section is one of that section."""
    section, _, name = key.rpartition(".")
    section = nearest(section, SECTIONS) if section else ""
    if section is None:
        return None
    keys = [one for one in leaves() if not section or one.startswith(f"{section}.")]
    for spelled in (str, _initials):
        same = [one for one in keys if spelled(one.rpartition(".")[2]) == name]
        if same and (spelled is str or len(same) == 1):
            return same[0]
    names = {one.rpartition(".")[2]: one for one in reversed(keys)}
    if not section:  # short names of sections, such as peft.r, are similar to everything
        names = {short: one for short, one in names.items() if len(short) > 3}
        names |= {one: one for one in (*leaves(), *aliases.meanings(), *SECTIONS)}
    near = nearest(name, names)
    return names[near] if near else None


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.split("_")) if "_" in name else ""


# ---- validation


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """The values of nested sections by dotted key."""
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        is_section = key in SECTIONS and isinstance(value, dict)
        dotted |= {f"{key}.{k}": v for k, v in value.items()} if is_section else {key: value}
    return dotted


@cache
def type_adapter() -> Any:
    """pydantic's validator of TrainConfig, built once because it takes long."""
    from pydantic import TypeAdapter

    return TypeAdapter(TrainConfig)


def from_dict(values: dict[str, Any], origins: Mapping[str, str] | None = None) -> TrainConfig:
    """Convert a nested dict to a TrainConfig, the inverse of `to_dict`.

    origins: origins of dotted keys, for messages. Raises UserError for invalid values.
    """
    from pydantic import ValidationError

    def shown(key: str) -> str:
        """The key with its origin, unless that is the flag of the same name."""
        origin = (origins or {}).get(key, "")
        return key if origin.lstrip("-") in ("", key) else f"{origin}: {key}"

    errors: dict[str, UserError] = {}
    for key, value in flat(values).items():
        if key in SECTIONS:
            raise UserError(f"{key} must be a mapping, seen {value!r}")
        if key not in leaves():
            errors[key] = unknown_key(key)
        elif isinstance(value, bool) and bool not in leaves()[key].types:
            errors[key] = UserError(f"{shown(key)} needs a value, seen {str(value).lower()}")
    if errors:
        raise together([*errors.values()])
    try:
        return type_adapter().validate_python(values)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda one: one["type"] != "unexpected_keyword_argument")
    for one in found:
        depth = 1 + (one["loc"][0] in SECTIONS)
        key = ".".join(map(str, one["loc"][:depth]))
        inside = "".join(f"[{n}]" if isinstance(n, int) else f".{n}" for n in one["loc"][depth:])
        errors.setdefault(key, UserError(_problem(shown(key), leaves()[key], inside, one)))
    raise together([*errors.values()])


def _problem(shown: str, leaf: Leaf, inside: str, error: Any) -> str:
    """What is wrong with a value, from pydantic's error. shown: the key with its origin."""
    seen, wanted = error["input"], error["msg"].removeprefix("Input ").removeprefix("Value ")
    if Literal["epoch"] in leaf.types:  # pydantic reports each member of the union
        return f"{shown} is {seen!r}; it should be a number of steps, or epoch"
    problem = f"is {seen!r}; it {wanted}"
    if error["type"] == "unexpected_keyword_argument":
        problem = f"is not known; a source has {', '.join(f.name for f in fields(Source))}"
    elif error["type"] in ("missing", "missing_argument"):
        problem = f"is missing; seen {seen!r}"
    return f"{shown}{inside} {problem}"


def to_dict(cfg: TrainConfig) -> dict[str, Any]:
    """Convert to nested JSON values."""
    return json.loads(json.dumps(asdict(cfg)))


def tokenizer_path(cfg: TrainConfig) -> str:
    """Path of the tokenizer: model.tokenizer, else model.path, else model.config."""
    return cfg.model.tokenizer or cfg.model.path or str(cfg.model.config)
