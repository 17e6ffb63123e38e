# SPDX-License-Identifier: Apache-2.0
"""Data as TRL and LLaMA-Factory name it, as sources of `data.train` and `data.eval`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.config.fields import home
from jaxllm.errors import MissingFile, UserError
from jaxllm.paths import hub_id
from jaxllm.untrusted import read_json

INFO = "dataset_info.json"
# A column of dataset_info.json -> its name here; the columns of the same name need no entry.
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
COLUMNS |= dict.fromkeys(
    ("history", "system", "tools", "chosen", "rejected", "kto_tag", "messages")
)
# A tag of dataset_info.json -> the role of the messages that have it, for other names than these.
ROLES = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool"}
ROLES |= {"system_tag": "system"}
KNOWN_ROLES = ("human", "user", "gpt", "assistant", "observation", "tool", "system")
MESSAGE_KEYS = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}


def separated(value: Any) -> list[str]:
    """The items of a list, or of text with commas."""
    items = value if isinstance(value, list) else str(value).split(",")
    return [str(item).strip() for item in items if str(item).strip()]


def hub_source(path: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's dataset_name with its subset, splits and streaming; the test split is evaluated if
    eval_strategy asks for evaluations."""
    if options.get("dataset_config"):
        path = f"{path}:{options['dataset_config']}"
    split = options.get("dataset_train_split")
    train = {"path": path} | ({"split": split} if split not in (None, "train") else {})
    if options.get("dataset_streaming") is True:
        train["streaming"] = True
    keys: dict[str, Any] = {"data.train": [train]}
    strategy = options.get("eval_strategy", options.get("evaluation_strategy", "no"))
    if strategy not in ("no", False) and not {"data.eval", "test_split_size"} & options.keys():
        split = options.get("dataset_test_split") or "test"
        keys["data.eval"] = [{"path": path, "split": split}]
    return keys


def mixture(value: Any, *, streaming: bool = False) -> dict[str, Any]:
    """TRL's `datasets`: a list of {path, name, split, data_files}; streaming: of all of them."""
    found = []
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, dict) or "path" not in entry:
            raise UserError(f"seen {entry!r}; must be a mapping with a path")
        given = {key: one for key, one in entry.items() if one is not None}
        path, files = given.pop("path"), given.pop("data_files", None)
        source: dict[str, Any] = {"streaming": True} if streaming else {}
        source |= {"split": given.pop("split")} if "split" in given else {}
        if isinstance(files, dict):
            raise UserError(f"data_files of {path} has splits; write sources of data.train instead")
        if name := given.pop("name", None):
            path = f"{path}:{name}"
        if given:
            unread = ", ".join(map(str, given))
            raise UserError(f"{unread} of {path}: write sources of data.train instead")
        for file in [path] if files is None else separated(files):
            found.append({"path": file} | source)
    return {"data.train": found}


def factory_sources(
    key: str, names: Any, options: Mapping[str, Any], *, text: bool
) -> dict[str, Any]:
    """LLaMA-Factory's `dataset` or `eval_dataset`: names in dataset_dir/dataset_info.json, files
    there, or hub ids. text: records are documents, not conversations."""
    folder = home(str(options.get("dataset_dir") or "data"))
    info = _read_info(folder)
    sources, roles = [], {}
    for name in separated(names):
        entry = info.get(name)
        if entry is None:
            entry = {"file_name": name} if (Path(folder) / name).exists() else {"hf_hub_url": name}
            if "file_name" not in entry and not hub_id(name):
                place = f"no entry {name}" if info else "no such file"
                raise UserError(f"{folder}/{INFO}: {place}; give its file as data.train")
        source, named = _described(name, entry, folder, text)
        sources.append(source)
        roles |= named
    _options_of(sources, options, mixed=key == "data.train")
    return {key: sources} | ({"data.roles": roles} if roles else {})


def _read_info(folder: str) -> dict[str, Any]:
    file = Path(folder) / INFO
    try:
        info = read_json(file, INFO)
    except MissingFile:
        return {}
    if not all(isinstance(one, dict) for one in info.values()):
        raise UserError(f"{file}: must be an object of objects")
    return info


def _names(name: str, entry: dict[str, Any], key: str) -> dict[str, str]:
    """`columns` or `tags` of an entry."""
    found = entry.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise UserError(f"{name}: {key} must be an object of strings, seen {found!r}")
    return found


def _described(
    name: str, entry: dict[str, Any], folder: str, text: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """(source, data.roles) of an entry of dataset_info.json."""
    if entry.get("hf_hub_url"):
        path = f"{entry['hf_hub_url']}" + (f":{entry['subset']}" if entry.get("subset") else "")
    elif entry.get("file_name"):
        path = str(Path(folder) / str(entry["file_name"]))
    else:
        raise UserError(f"{name}: only file_name and hf_hub_url are read; give data.train")
    source: dict[str, Any] = {"path": path}
    source |= {"split": entry["split"]} if entry.get("split", "train") != "train" else {}
    source |= {"max_samples": entry["num_samples"]} if entry.get("num_samples") else {}
    columns = {}
    for theirs, column in _names(name, entry, "columns").items():
        if theirs not in COLUMNS:
            raise UserError(f"{name}: the column {theirs} is not read; remove it for text alone")
        ours = "text" if text and theirs == "prompt" else COLUMNS[theirs] or theirs
        known = (ours, "conversations") if ours == "messages" else (ours,)
        columns |= {} if column in known else {ours: column}
    tags = _names(name, entry, "tags")
    for tag, keys in MESSAGE_KEYS.items():
        if tags.get(tag, keys[0]) not in keys:
            raise UserError(f"{name}: {tag} is {tags[tag]}; rename that key to {keys[1]}")
    roles = {
        tags[tag]: role for tag, role in ROLES.items() if tags.get(tag, "user") not in KNOWN_ROLES
    }
    return source | ({"columns": columns} if columns else {}), roles


def _options_of(sources: list[dict[str, Any]], options: Mapping[str, Any], mixed: bool) -> None:
    """Add max_samples, streaming and weights to the sources."""
    probabilities = options.get("interleave_probs")
    weights = [1.0] * len(sources) if options.get("mix_strategy") == "interleave_over" else []
    if probabilities is not None:
        try:
            weights = [float(one) for one in separated(probabilities)]
        except ValueError:
            raise UserError(f"interleave_probs is {probabilities!r}; must be numbers") from None
        if len(weights) != len(sources):
            raise UserError(
                f"interleave_probs has {len(weights)} numbers for {len(sources)} datasets"
            )
    for i, source in enumerate(sources):
        if options.get("max_samples") is not None:
            source["max_samples"] = options["max_samples"]
        if mixed and options.get("streaming") is True:
            source["streaming"] = True
        if mixed and weights:
            source["weight"] = weights[i]
