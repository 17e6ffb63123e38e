# SPDX-License-Identifier: Apache-2.0
"""Read a training config from a YAML file, flags and a DeepSpeed file.

`load_config` translates each source to our keys, merges them by precedence, validates the result
and returns it with the origin of every value.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from jaxllm.config import aliases
from jaxllm.config.deepspeed import read_deepspeed
from jaxllm.config.fields import Given, sources
from jaxllm.config.rules import TRANSLATED
from jaxllm.config.schema import SECTIONS, Leaf, from_dict, leaf_of, leaves, unknown_key
from jaxllm.config.sections import Source, TrainConfig
from jaxllm.errors import UserError, seen, together
from jaxllm.paths import absolute, as_path, local_path
from jaxllm.untrusted import MAX_DEPTH, ODD, check_extent, read_text

# ---- YAML and flags

MAX_BYTES = 1 << 20  # of a config: PyYAML takes seconds for it


@cache
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's SafeLoader (YAML 1.1), except that 1e-4 is a number and a date is a string."""

        def fetch_flow_collection_start(self, token: Any) -> None:
            if self.flow_level > MAX_DEPTH:  # PyYAML takes the square of the depth
                raise RecursionError
            super().fetch_flow_collection_start(token)

    other = ("timestamp", "binary", "set", "omap", "pairs")  # not representable in JSON
    tags = tuple(f"tag:yaml.org,2002:{kind}" for kind in other)
    Loader.yaml_constructors = {t: f for t, f in Loader.yaml_constructors.items() if t not in tags}
    Loader.yaml_implicit_resolvers = {
        first: [one for one in resolvers if one[0] not in tags]
        for first, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    number = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def parse(text: str) -> Any:
    """Parse a flag's text as YAML; text that is not valid YAML stays a string."""
    import yaml

    try:
        value = yaml.load(text, _yaml_loader())
        check_extent(value)
    except (yaml.YAMLError, *ODD):  # malformed numbers, such as 0x_, or unhashable keys
        return text
    return value


def read_yaml(path: str) -> list[Given]:
    """The keys of a YAML (or JSON) file in dotted form, each with its file:line.

    Raises MissingFile, or UserError for invalid YAML, a section that is no mapping and a key given
    twice.
    """
    import yaml

    file = local_path(path)
    names: set[str] = set()

    def line(node: Any) -> str:
        return f"{path}:{node.start_mark.line + 1}"

    def value_of(node: Any) -> Any:
        try:
            value = loader.construct_object(node, deep=True)
            check_extent(value)
        except RecursionError:
            raise UserError(f"{line(node)}: nested or repeated too often") from None
        except ODD:
            shown = seen(node.value) if isinstance(node, yaml.ScalarNode) else "this"
            raise UserError(f"{line(node)}: {shown} is not a YAML value") from None
        return value

    def walk(node: Any, prefix: str) -> Iterator[Given]:
        if not isinstance(node, yaml.MappingNode):
            name = prefix.rstrip(".") or "a config"
            raise UserError(f"{line(node)}: {name} must be a mapping, seen {seen(value_of(node))}")
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{line(key)}: a key must be text")
            name = f"{prefix}{key.value}"
            if name in names:
                raise UserError(f"{line(key)}: {name} is given twice; keep one")
            names.add(name)
            is_scalar = isinstance(value, yaml.ScalarNode)
            if name in SECTIONS and not (is_scalar and name in TRANSLATED):
                yield from walk(value, f"{name}.")
            else:
                yield Given(name, value_of(value), line(key))

    try:
        loader = _yaml_loader()(read_text(file, "config file", MAX_BYTES))
        node = loader.get_single_node()
        return list(walk(node, "")) if node else []
    except yaml.MarkedYAMLError as error:
        at = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{at}: not YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError:
        raise UserError(f"{path}: not text; a config file is YAML") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None


def read_args(args: Sequence[str]) -> list[Given]:
    """Split `--key value …`, `--key=value` and bare `--key`; each value is a list of strings.

    Raises UserError for a list or dict given twice, where the second would replace the first. Of
    other flags the last one counts.
    """
    given: list[Given] = []
    for arg in args:
        if arg.startswith("--"):
            flag, equals, text = arg.partition("=")
            name = flag[2:].replace("-", "_")
            leaf, repeated = _flag_leaf(name), any(one.name == name for one in given)
            if repeated and leaf and isinstance(leaf.default, tuple | dict):
                raise UserError(f"{flag} is given twice; give all its values after one {flag}")
            given.append(Given(name, [text] if equals else [], flag))
        elif given:
            given[-1].value.append(arg)
        else:
            raise UserError(
                f"unexpected argument {arg!r}; write [CONFIG.yaml] first, then --section.key value"
            )
    return given


def _flag_leaf(name: str) -> Leaf | None:
    """The field that a flag sets, by our name or that of another library."""
    return leaves().get(aliases.meanings().get(name, name))


def _parsed(flag: Given) -> Given:
    """Convert a flag's strings to a value: strings for a string field, else YAML; bare = True."""
    name, texts = flag.name, flag.value
    if not texts:
        positive = name.removeprefix("no_")
        if leaf_of(name):
            return replace(flag, value=True)
        return Given(positive, positive == name, flag.where)
    leaf = _flag_leaf(name)
    is_list = leaf is not None and isinstance(leaf.default, tuple)
    is_text = leaf is not None and (is_list or leaf.types == {str})

    def value(text: str) -> Any:
        if not is_text or (is_list and text.startswith(("[", "{"))):
            return parse(text)
        return None if not is_list and text in ("null", "none") else text

    if len(texts) > 1 and leaf and not is_list:
        raise UserError(f"{flag.where} takes one value, seen {' '.join(texts)}")
    return replace(flag, value=value(texts[0]) if len(texts) == 1 else [value(t) for t in texts])


def read_sources(texts: Sequence[str], flag: str) -> tuple[Source, ...]:
    """Parse data sources given as the values of `flag`. Raises UserError if one is invalid."""
    value = sources(_parsed(Given("data.eval", list(texts), flag)).value)
    return from_dict({"data": {"eval": value}}, {"data.eval": flag}).data.eval


# ---- the config


def find_objective(path: str | None, flags: Sequence[Given], default: Any = None) -> Any:
    """The objective that the flags or else the file name, for a verb that trains nothing itself.

    Raises UserError if there is none and no default.
    """
    named = [one.value for one in (read_yaml(path) if path else ()) if one.name == "objective"]
    named += [(flag.value or [True])[0] for flag in flags if flag.name == "objective"]
    if not named and default is None:
        raise UserError("no objective: give --objective sft, or the verb of another training run")
    return named[-1] if named else default


def load_config(
    objective: str, path: str | Sequence[Given] | None = None, args: Sequence[str] = ()
) -> tuple[TrainConfig, dict[str, str]]:
    """Load a config from a YAML file (or its keys) and command-line arguments, with HF names in
    both.

    Precedence: arguments over the file over defaults. A DeepSpeed file sets keys that neither
    gives and must not contradict them. Flags and DeepSpeed keys that have no effect here are listed
    on stderr. null stands for the default. Also returns the origin of each dotted key: "default",
    file:line or the flag.

    Raises UserError for unknown keys (naming the nearest ones), invalid values, contradictions and
    missing files; all unknown and refused names are in one error.
    """
    given: dict[str, Given] = {}
    ignored: list[str] = []
    notes: list[str] = []
    errors: list[UserError] = []
    file = read_yaml(path) if isinstance(path, str) else [*(path or ())]
    layers = [file, [_parsed(flag) for flag in read_args(args)]]
    layers = [[one for one in layer if aliases.is_given(one)] for layer in layers]
    names = {one.name: one for layer in layers for one in layer}
    for layer in layers:
        known = [one for one in layer if leaf_of(one.name) or one.name in aliases.NAMES]
        errors += [unknown_key(one.name, one.where) for one in layer if one not in known]
        found = aliases.translate(known, objective, names)
        values, errors = found.given, errors + found.errors
        given = {k: v for k, v in given.items() if k.rpartition(".")[0] not in values} | values
        ignored, notes = ignored + found.ignored, notes + found.notes
    if errors:
        raise together(errors)
    if (deepspeed := given.pop("deepspeed", None)) is not None:
        values, without_effect = read_deepspeed(str(deepspeed.value), given)
        given |= values
        ignored += without_effect
    for note in notes:
        print(f"jaxllm: {note}", file=sys.stderr)
    if ignored:
        print(f"jaxllm: ignored, no effect here: {', '.join(ignored)}", file=sys.stderr)
    verb = given.setdefault("objective", Given("objective", objective, "the command"))
    if verb.value != objective:
        raise UserError(f"{verb.where}: objective is {verb.value!r}; run `jaxllm {verb.value}`")
    for key, one in given.items():
        if leaf := leaves().get(key):
            given[key] = replace(one, value=leaf.read(one.value))
    defaults = {key: leaf.default for key, leaf in leaves().items()}
    given = {k: v for k, v in given.items() if v.value is not None or defaults.get(k) is None}
    given = _resume_flag(given)
    origins = {leaf.key: one.where for key, one in given.items() if (leaf := leaf_of(key))}
    cfg = from_dict(_tree(given), origins)
    return cfg, {key: origins.get(key, "default") for key in leaves()}


def _tree(given: dict[str, Given]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, one in sorted(given.items()):
        *parents, name = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{one.where}: {parent} is {node!r}, which has no entries")
        node[name] = one.value
    return tree


def _resume_flag(given: dict[str, Given]) -> dict[str, Given]:
    """transformers' checkpoint path -> `resume: true`; UserError if it is outside output_dir."""
    one = given.get("resume")
    if one is None or not isinstance(one.value, str):
        return given
    run = absolute(as_path(str(given["output_dir"].value) if "output_dir" in given else "run"))
    checkpoint = absolute(as_path(one.value))
    if run not in (checkpoint, *checkpoint.parents):
        raise UserError(
            f"{one.where}: {one.value} is not in output_dir {run.name}; a run resumes from the "
            "latest checkpoint of its own output_dir"
        )
    return given | {"resume": replace(one, value=True)}
