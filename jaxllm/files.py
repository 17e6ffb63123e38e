# SPDX-License-Identifier: Apache-2.0
"""Directories of safetensors and JSON: found, read by slices, written tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# safetensors' names of the dtypes that weights may be stored in.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# What is written to a model's or an adapter's folder; one with anything else in it is not replaced.
OWN_FILES = (
    "config.json generation_config.json model*.safetensors model.safetensors.index.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json vocab.txt merges.txt tokenizer.model chat_template.jinja chat_template.json "
    f"{ADAPTER} {ADAPTER_CONFIG} README.md"
).split()


def hub_id(path: str) -> bool:
    """Whether a path that is not there can name something on the hub: OWNER/NAME, and no typo in
    the name of something in a directory that is there."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and not Path(path).parent.is_dir()


def resolve(path: str) -> Path:
    """A directory as it is; anything else is a hub id, fetched or found in the hub's cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not hub_id(path):
        why = f"; {folder.parent} is one, so the hub is not asked" if folder.parent.is_dir() else ""
        raise UserError(f"{path} is not a directory (nor a hub id like owner/name){why}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["*.json", "model*.safetensors", ADAPTER, "*.jinja", "tokenizer*", "*.txt"]
    try:
        return Path(snapshot_download(path, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is no directory, nor could the hub be asked: {reason}") from None


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text: {error.reason}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {type(value).__name__}; a JSON object is expected")
    return value


def tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor name: its file}, found as transformers does. Raises ValueError if there is none."""
    if (folder / SINGLE).is_file():
        with opened(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if (folder / INDEX).is_file():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict):
            raise UserError(f"{folder / INDEX} has no weight_map; it is no index of tensors")
        files = {name: folder / file for name, file in mapping.items()}
        if missing := sorted({str(f) for f in files.values() if not f.is_file()}):
            raise UserError(f"{folder / INDEX} names {missing[0]}, which is not there")
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise UserError(
            f"{folder / pickles[0]} is a pickle, which can run code and is not read. Convert it "
            'where you trust it: python -c "from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise UserError(f"{folder} has no {SINGLE} (nor {INDEX})")


def opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from None


def header(file: Path) -> tuple[int, dict[str, Any]]:
    """Of a safetensors file: where the data begins, {name: dtype, shape and data_offsets}."""
    stat = file.stat()
    return _header(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _header(file: Path, *_: int) -> tuple[int, dict[str, Any]]:
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        tensors = json.loads(data.read(length))
    return 8 + length, {name: t for name, t in tensors.items() if name != "__metadata__"}


def place(like: jax.ShapeDtypeStruct, read: Callable[[Any], np.ndarray]) -> jax.Array:
    """An array laid out as `like`, shard by shard: `read(index)` once for each distinct one."""
    same: dict[Any, tuple[Any, list[Any]]] = {}
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        assert index is not None
        key = tuple((s.start, s.stop) for s in index)
        same.setdefault(key, (index, []))[1].append(device)
    parts: list[jax.Array] = []
    for index, devices in same.values():
        value = read(index)
        parts += [jax.device_put(value, device) for device in devices]
        jax.block_until_ready(parts)
        del value
        jax.device_put(0)  # jax lets go of the host's copy at its next call, and a read is none
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Tensor:
    """One HF tensor of a model; `read` gathers it to the host, in the weights' own dtype."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write_file(file: Path, tensors: list[Tensor], dtype: str) -> None:
    """A safetensors file (length, JSON header, data), written tensor by tensor."""
    width, place = jnp.dtype(dtype).itemsize, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for t in tensors:
        end = place + prod(t.shape) * width
        header[t.name] = {"dtype": DTYPES[dtype], "shape": t.shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            out.write(t.read().astype(dtype, copy=False).reshape(-1).view(np.uint8).data)
        out.flush()
        os.fsync(out.fileno())


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_target(out: Path) -> None:
    """Raises ValueError unless `out` is new, empty, or holds nothing but a model or an adapter."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another place")
    entries = sorted(out.iterdir())
    strange = [e.name for e in entries if e.is_dir() or not any(map(e.match, OWN_FILES))]
    ours = any((out / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    if strange or (entries and not ours):
        what = f"holds {strange[0]}" if strange else "is not empty"
        raise UserError(f"{out} {what}, so it is not replaced; choose another place or empty it")


@contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """Yields a folder to fill, which takes the name `path` when it is whole, or not at all.

    A saved model or adapter of that name is replaced; anything else is refused (ValueError).
    """
    out = Path(path).expanduser().resolve()
    _check_target(out)
    part, old = (out.with_name(f"{out.name}.{suffix}") for suffix in ("partial", "replaced"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(part, ignore_errors=True)
