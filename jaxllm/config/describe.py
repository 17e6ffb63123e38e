# SPDX-License-Identifier: Apache-2.0
"""The fields of a config as text: --help, --explain and --schema."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from itertools import chain
from typing import Any, Literal, get_args, get_origin

from jaxllm.config import aliases
from jaxllm.config.fields import home
from jaxllm.config.names import IGNORED, REFUSED, harmless
from jaxllm.config.schema import SECTIONS, Leaf, field_docs, leaves, members, type_adapter, value_of
from jaxllm.config.sections import Source, TrainConfig
from jaxllm.config.verbs import VERBS, unread

TOKENIZE_HELP = """\
usage: jaxllm tokenize [CONFIG.yaml] --objective VERB [--section.key value ...]

Tokenizes the data of a training run into data.cache_dir, and prints its counts. Reads no weights
and uses no accelerator. Several processes share the work; after a kill, the same command continues.

  --objective VERB
      the training command of the run; also `objective:` in the file, or the config.json of a run

All other keys are those of the run (`jaxllm sft --help`)."""


def training_help(verb: str) -> str:
    """The text of `jaxllm COMMAND --help`: every key that the command reads with type, unit,
    default and other names, first those that matter most."""
    row, skipped = VERBS[verb], {*unread(verb), "objective"}
    read = {key: leaf for key, leaf in leaves().items() if key not in skipped}
    names = {meaning: [f"--{n}" for n in ns] for meaning, ns in aliases.spellings().items()}
    lines = [
        f"usage: jaxllm {verb} [CONFIG.yaml] [--section.key value ...]",
        "",
        f"{row.about[0].upper()}{row.about[1:]}.",
        "",
        f"  jaxllm {verb} {row.example} --output_dir run/{verb}",
        "",
        "The keys that matter most:",
        *chain(*(_described(read.pop(key), names) for key in row.first)),
        "",
        "Each key can be set in the YAML file or by a flag; flags take precedence. A list takes",
        "several values; a dict takes YAML ({a: 1}) or --section.key.a 1; --key sets true and",
        "--no-key false.",
        "",
        "  --explain   print the config and the origin of each value, then exit",
        "  --schema    print the JSON schema of the YAML file (for editors), then exit",
    ]
    section = None
    for leaf in read.values():
        prefix = leaf.key.rpartition(".")[0]
        if prefix != section:
            lines += ["", SECTIONS.get(prefix, TrainConfig).__doc__ or ""]
            section = prefix
        lines += _described(leaf, names)
    lines += ["", "Other names of transformers, TRL and LLaMA-Factory, and what they set:"]
    for text, flags in names.items():
        if parts := [
            part for part in text.split("; ") if not skipped & {*re.findall(r"[\w.]+", part)}
        ]:
            lines.append(f"  {', '.join(flags)}: {'; '.join(parts)}")
    return "\n".join(lines)


def _described(leaf: Leaf, names: dict[str, list[str]]) -> list[str]:
    """A key's lines of help; takes its other names out of `names`."""
    also = f" (also {', '.join(names.pop(leaf.key))})" if leaf.key in names else ""
    indent = " " * 6
    text = textwrap.wrap(leaf.doc + also, 92, initial_indent=indent, subsequent_indent=indent)
    return [f"  --{leaf.key} {kind_of(leaf)} [{plain(leaf.default)}]", *text]


def kind_of(leaf: Leaf) -> str:
    """Type and unit of a key as help shows them, e.g. `INT|epoch (steps)`."""
    if isinstance(leaf.default, dict):
        return "{KEY: VALUE}"
    names = {bool: "true|false", int: "INT", float: "FLOAT"}
    names[str] = "PATH" if leaf.read is home else "TEXT"

    def word(kind: Any) -> str:
        if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
        if get_origin(kind) is tuple:
            return f"{words(get_args(kind)[0])} ..."
        return names.get(kind, "TEXT")

    def words(annotation: Any) -> str:
        return "|".join(word(kind) for kind, _ in members(annotation))

    return words(leaf.annotation) + (f" ({leaf.unit})" if leaf.unit else "")


def plain(value: Any) -> str:
    """A value in YAML syntax."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, default=vars, ensure_ascii=False)


def explanation(cfg: TrainConfig, origins: dict[str, str]) -> str:
    """Key, value and origin of every field, in columns."""
    rows = [(key, plain(value_of(cfg, key)), origins[key]) for key in leaves()]
    left = max(len(key) for key, _, _ in rows)
    middle = min(max(len(value) for _, value, _ in rows), 40)
    return "\n".join(f"{key:<{left}}  {value:<{middle}}  {origin}" for key, value, origin in rows)


def json_schema() -> dict[str, Any]:
    """JSON schema of the YAML file, for editors: documentation, ranges and HF names."""
    schema = type_adapter().json_schema()
    kinds = SECTIONS | {"": TrainConfig, "source": Source}
    parts = {name: schema["$defs"].get(kind.__name__, schema) for name, kind in kinds.items()}
    for name, kind in kinds.items():
        part = parts[name]
        part |= {"additionalProperties": False, "description": inspect.getdoc(kind)}
        for key, doc in field_docs(kind).items():
            part["properties"][key]["description"] = doc
    for leaf in leaves().values():
        if isinstance(leaf.default, tuple):
            section, _, name = leaf.key.rpartition(".")
            _allow_one_item(parts[section]["properties"][name])
    keys = schema["properties"]
    keys["resume"]["type"] = ["boolean", "string"]  # a checkpoint's path, as in transformers
    keys["optim"] = {"anyOf": [{"type": "string"}, keys["optim"]]}  # optim: NAME in transformers
    names: dict[str, Any] = {
        n: {"description": f"of another library: {m}"}
        for n, m in aliases.meanings().items()
        if "." not in n
    }
    names |= {n: {"description": "ignored: no effect here"} for n in sorted(IGNORED)}
    refused = {n: {"enum": harmless(n), "description": why} for n, (why, *_) in REFUSED.items()}
    names |= refused
    schema["properties"] = names | keys
    return schema


def _allow_one_item(array: dict[str, Any]) -> None:
    """Change the schema of a list so that it also accepts a single item; text has short forms."""
    item = array.pop("items")
    text = [] if item.get("type") in ("number", "integer") else [{"type": "string"}]
    one = text + [item] * (item not in text)
    array["anyOf"] = [*one, {"type": array.pop("type"), "items": {"anyOf": one}}]
