# SPDX-License-Identifier: Apache-2.0
"""Model directories of safetensors and JSON: locate, read by slices, write tensor by tensor."""

from __future__ import annotations

import glob
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import __version__, dist
from jaxllm.errors import UserError, seen
from jaxllm.paths import (
    absolute,
    as_path,
    check_bucket,
    check_model,
    delete,
    entries,
    file_size,
    is_bucket,
    naming,
    read_bytes,
    version,
)
from jaxllm.untrusted import MAX_FILE, parse_json, read_json, rust

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The dtypes in which weights may be saved -> their names in a safetensors header.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
READABLE = (*DTYPES.values(), "F64")  # those that weights may be stored in without scales
STORED_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "U8": np.uint8,
}
MARKER = ".jaxllm.json"  # in a directory that jaxllm wrote, which it may replace
CARD = "README.md"  # a model card, which is the user's
# Files of a saved model or adapter. A directory that holds any other file is never replaced.
PROCESSOR = (  # of images and video; and older processors' template
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "chat_template.json",
)
MODEL_FILES = (
    "config.json generation_config.json model*.safetensors model.safetensors.index.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json vocab.txt merges.txt tokenizer.model chat_template.jinja "
    f"{' '.join(PROCESSOR)} "
    f"{ADAPTER} {ADAPTER_CONFIG} {CARD} {MARKER}"
).split()
PART, PARTS = 1 << 25, 8  # bytes of a request to a bucket; requests at a time
TEMPLATES = "additional_chat_templates"  # a directory in that of a model


def local_dir(path: str) -> Path:
    """The local directory of a model: `path` itself, or the hub's cache (downloads a hub id).

    Raises UserError if `path` is neither a directory nor a hub id that can be downloaded.
    """
    folder = as_path(path)
    if folder.is_dir():
        return folder
    if is_bucket(path):
        raise UserError(f"{path} does not exist")
    check_model(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["*.json", "model*.safetensors", ADAPTER, "*.jinja", "tokenizer*", "*.txt"]
    try:
        return Path(snapshot_download(path, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is no directory, nor could the hub be reached: {reason}") from None


def check_no_checkpoint(folder: Path) -> None:
    """Raises UserError for a checkpoint of a run, which is no model."""
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        raise UserError(
            f"{folder} is a checkpoint of a run; `jaxllm export {folder} OUT` makes a model of it"
        )


def strict(value: Any) -> Any:
    """A value for json.dumps; NaN and infinities, which JSON does not have, become the strings
    "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX scalars and arrays
        return strict(value.tolist())
    return str(value)


def strict_json(value: Any) -> str:
    """One line of JSON, by `strict`."""
    return json.dumps(strict(value), ensure_ascii=False, allow_nan=False)


def tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor name: file that holds it}, by the rules of transformers: one file, or an index.

    Raises UserError if the directory has no safetensors.
    """
    if (folder / SINGLE).is_file():
        with open_tensors(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if (folder / INDEX).is_file():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict):
            raise UserError(f"{folder / INDEX} has no weight_map, so it is not an index of tensors")
        for file in mapping.values():
            if not isinstance(file, str) or not file or {"..", "/"} & {*Path(file).parts}:
                raise UserError(f"{folder / INDEX} names {seen(file)}, not a file in its folder")
        files = {name: folder / file for name, file in mapping.items()}
        if missing := sorted({str(f) for f in files.values() if not f.is_file()}):
            raise UserError(f"{folder / INDEX} names {missing[0]}, which is not there")
        tensors = {file: header(file)[1] for file in {*files.values()}}
        for name, file in files.items():
            if name not in tensors[file]:
                raise UserError(f"{folder / INDEX} says that {file.name} has {seen(name)}")
        return files
    pickles = sorted(p.name for p in entries(folder) if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise UserError(
            f"{folder / pickles[0]} is a pickle, which can run code and is not read. Convert it "
            'where you trust it: python -c "from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise UserError(f"{folder} has no {SINGLE} (nor {INDEX})")


def open_tensors(file: Path) -> Any:
    """Opens a safetensors file for reading by slices; use it as a context manager.

    Raises UserError unless its header describes the bytes of the file.
    """
    from safetensors import SafetensorError, safe_open

    header(file)
    if is_bucket(file):
        return BucketTensors(file)
    try:
        with rust(str(file)):
            return safe_open(file, framework="np")
    except SafetensorError as error:
        raise UserError(f"{file} is not a complete safetensors file: {error}") from None


def header(file: Path) -> tuple[int, dict[str, Any]]:
    """(offset of the data, {tensor: its dtype, shape and data_offsets}) of a safetensors file.

    Raises UserError unless the tensors fill the file, each with the bytes of its dtype and shape.
    """
    return _header(file, version(file))


@lru_cache(maxsize=64)
def _header(file: Path, _: str) -> tuple[int, dict[str, Any]]:
    broken = f"{file} is not a complete safetensors file: "
    if not is_bucket(file) and not file.is_file():
        raise UserError(f"{broken}it is not a file")
    size = file_size(file)
    length = int.from_bytes(read_bytes(file, [(0, 8)])[0], "little") if size >= 8 else size
    if 8 + length > size or length > MAX_FILE:
        raise UserError(f"{broken}it has {size:,} bytes and a header of {length:,}")
    try:
        text = read_bytes(file, [(8, 8 + length)])[0].decode()
    except UnicodeDecodeError:
        raise UserError(f"{broken}its header is not text") from None
    tensors = parse_json(text, str(file), "it is not a complete safetensors file")
    if not isinstance(tensors, dict):
        raise UserError(f"{broken}its header is {seen(tensors)}")
    tensors = {name: t for name, t in tensors.items() if name != "__metadata__"}
    end = 0
    for name, t in tensors.items():
        if not _is_entry(t):
            raise UserError(f"{broken}it says that {seen(name)} is {seen(t)}")
        end = max(end, t["data_offsets"][1])
    if 8 + length + end != size:
        raise UserError(f"{broken}it has {size:,} of {8 + length + end:,} bytes")
    return 8 + length, tensors


def _is_entry(tensor: Any) -> bool:
    """True for a tensor in a header whose bytes are those of its shape and, if known, its dtype."""
    if not isinstance(tensor, dict) or not {"dtype", "shape", "data_offsets"} <= tensor.keys():
        return False
    dtype, shape, offsets = (tensor[key] for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        return False
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        return False
    count, width = offsets[1] - offsets[0], STORED_DTYPES.get(dtype)
    return count >= 0 if width is None else count == prod(shape) * np.dtype(width).itemsize


class BucketTensors:
    """A safetensors file in a bucket, with the interface of safe_open."""

    def __init__(self, file: Path):
        self.file = file
        self.start, self.tensors = header(file)

    def __enter__(self) -> BucketTensors:
        return self

    def __exit__(self, *_: Any) -> None:
        _kept_rows.cache_clear()

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_slice(self, name: str) -> BucketTensor:
        return BucketTensor(self.file, self.start, self.tensors[name])

    def get_tensor(self, name: str) -> np.ndarray:
        return self.get_slice(name)[...]


class BucketTensor:
    """A tensor in a bucket with the interface of safe_open's slices.

    `tensor[rows, :]` reads the rows alone. A slice of the columns reads its rows completely and
    keeps them, because the next shard usually is another slice of the same rows.
    """

    def __init__(self, file: Path, start: int, entry: dict[str, Any]):
        self.file, self.entry = file, entry
        self.shape, self.ndim = tuple(entry["shape"]), len(entry["shape"])
        self.first = start + entry["data_offsets"][0]
        self.end = start + entry["data_offsets"][1]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.entry["dtype"]

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        if index == (...,) or not self.shape:
            return self._rows(0, self.shape[0] if self.shape else 1)
        start, stop, step = index[0].indices(self.shape[0])
        assert step == 1
        sizes = zip(index[1:], self.shape[1:], strict=False)
        if all(part.indices(n) == (0, n, 1) for part, n in sizes):
            return self._rows(start, stop)
        return np.ascontiguousarray(_kept_rows(self, start, stop)[:, *index[1:]])

    def _rows(self, start: int, stop: int) -> np.ndarray:
        width = (self.end - self.first) // (self.shape[0] if self.shape else 1)
        data = read_array(self.file, self.first + start * width, self.first + stop * width)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return data.view(STORED_DTYPES[self.entry["dtype"]]).reshape(shape)


def read_array(file: Path, start: int, end: int) -> np.ndarray:
    """The bytes from `start` to `end` as uint8. Holds them and PARTS requests of PART bytes."""
    out = np.empty(end - start, np.uint8)
    for group in range(start, end, PART * PARTS):
        stop = min(end, group + PART * PARTS)
        ranges = [(i, min(i + PART, stop)) for i in range(group, stop, PART)]
        for (first, last), part in zip(ranges, read_bytes(file, ranges), strict=True):
            out[first - start : last - start] = np.frombuffer(part, np.uint8)
    return out


@lru_cache(maxsize=1)
def _kept_rows(tensor: BucketTensor, start: int, stop: int) -> np.ndarray:
    return tensor._rows(start, stop)


def make_sharded(
    like: jax.ShapeDtypeStruct, read: Callable[[list], list[np.ndarray]], *, together: bool = False
) -> jax.Array:
    """Creates an array of the shape and sharding of `like`, one shard at a time.

    `read([index, …])` returns the values of shards; replicas of a shard are read once. together:
    read all shards of this process in one call, which takes more host memory.
    """
    shards: dict[Any, tuple[Any, list[Any]]] = {}  # {key: (index, devices)}
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        assert index is not None
        key = tuple((s.start, s.stop) for s in index)
        shards.setdefault(key, (index, []))[1].append(device)
    parts: list[jax.Array] = []
    todo = list(shards.values())
    while todo:
        group, todo = (todo, []) if together else (todo[:1], todo[1:])
        values = read([index for index, _ in group])
        for value, (_, devices) in zip(values, group, strict=True):
            parts += [jax.device_put(value, device) for device in devices]
        jax.block_until_ready(parts)
        del value, values
        jax.device_put(0)  # jax frees the host copy at its next call; reading a file is not one
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)


def check_dtype(dtype: str) -> None:
    """Raises UserError unless weights can be saved in `dtype`."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Tensor:
    """An HF tensor to be written."""

    name: str
    shape: tuple[int, ...]
    read: Callable[..., Any]
    """process -> the tensor on its host, in the dtype of the weights; None in other processes"""
    stored: tuple[str, int] | None = None
    """(dtype in a header, bytes) of a tensor with another dtype, as `read` gives it"""

    def entry(self, dtype: str) -> tuple[str, int]:
        """Its dtype in a header and its bytes, if other tensors are written in `dtype`."""
        return self.stored or (DTYPES[dtype], prod(self.shape) * jnp.dtype(dtype).itemsize)


def write_file(file: Path, tensors: list[Tensor], dtype: str, process: int = 0) -> None:
    """Writes a safetensors file: length, JSON header, data. One tensor is in memory at a time.

    `process` writes it; every process must call this, since their devices hold the tensors.
    """
    # Wide numbers first, so that each tensor is aligned.
    tensors = sorted(tensors, key=lambda t: -t.entry(dtype)[1] // max(prod(t.shape), 1))
    if dist.index() != process:
        for t in tensors:
            t.read(process)
        return
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for t in tensors:
        (stored, size), start = t.entry(dtype), offset
        offset += size
        header[t.name] = {"dtype": stored, "shape": t.shape, "data_offsets": [start, offset]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    with naming(file), file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            value = t.read(process)
            value = value if t.stored else value.astype(dtype, copy=False)
            out.write(value.reshape(-1).view(np.uint8).data)
        if not is_bucket(file):
            out.flush()
            os.fsync(out.fileno())


def write_json(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_bytes(text.encode())


def _is_of_model(path: Path) -> bool:
    """True for a file of a saved model, and for the directory of its further chat templates."""
    if path.is_dir():
        return path.name == TEMPLATES and all(f.suffix == ".jinja" for f in entries(path))
    return any(map(path.match, MODEL_FILES))


def _check_target(out: Path) -> None:
    """Raises UserError unless `out` does not exist, is empty or holds only a model or adapter that
    jaxllm wrote, and a model card."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another directory")
    present = entries(out)
    others = [e.name for e in present if not _is_of_model(e)]
    if others or (present and not (out / MARKER).is_file()):
        what = f"holds {others[0]}" if others else "was not written by jaxllm"
        raise UserError(
            f"{out} {what}, so it is not replaced; choose another directory or empty it"
        )


def _place_beside(out: Path) -> str:
    """Creates a temporary directory beside `out` with a subdirectory "new"; both have MARKER."""
    out.parent.mkdir(parents=True, exist_ok=True)
    parent = tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent)
    for folder in (Path(parent), Path(parent, "new")):
        folder.mkdir(exist_ok=True)
        write_json(folder / MARKER, {"version": __version__})
    return parent


def _delete_place(parent: Path) -> None:
    """Deletes what `_place_beside` created. The marker is deleted last, so that the next export can
    finish an interrupted deletion."""
    for part in ("new", "old", "."):
        shutil.rmtree(parent / part, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name[:240]}."  # a file name has at most 255 bytes


def _clear_up(out: Path) -> None:
    """Deletes temporary directories that killed exports to `out` left beside it. Restores `out` if
    an export was killed after it had moved it."""
    for parent in out.parent.glob(f"{glob.escape(_prefix(out))}*"):
        if not re.fullmatch("[a-z0-9_]{8}", parent.name.removeprefix(_prefix(out))):  # by mkdtemp
            continue
        if (parent / "old" / MARKER).is_file() and not out.exists():
            (parent / "old").rename(out)
        if (parent / MARKER).is_file():
            _delete_place(parent)
        with suppress(OSError):  # of an export that was killed before it wrote the marker
            parent.rmdir()


@contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """Yields a temporary directory; renames it to `path` if the block ends without an exception.

    Replaces a model or adapter that jaxllm wrote to `path`, but keeps its model card unless there
    is a new one. Raises UserError for any other directory there. All processes of a run enter it,
    and may write. In a bucket, which cannot rename, `path` is emptied and yielded: write
    config.json or adapter_config.json last, readers need it.
    """
    out = absolute(as_path(path))
    if is_bucket(out):
        if dist.is_main():
            check_bucket(out)
            _check_target(out)
            card = (out / CARD).read_bytes() if (out / CARD).is_file() else None
            for name in ("config.json", ADAPTER_CONFIG):
                (out / name).unlink(missing_ok=True)
            delete(out)
            write_json(out / MARKER, {"version": __version__})
            if card is not None:
                (out / CARD).write_bytes(card)
        dist.barrier("folder")
        yield out
        dist.barrier("folder")
        return
    place = ""
    if dist.is_main():
        _clear_up(out)
        _check_target(out)
        place = _place_beside(out)
    parent = Path(dist.agree(place))
    part, old = parent / "new", parent / "old"
    if not dist.is_main():
        yield part
        dist.barrier("folder")
        return
    try:
        yield part
        dist.barrier("folder")
        if (out / CARD).is_file() and not (part / CARD).exists():
            shutil.copy2(out / CARD, part)
        if out.exists():
            out.rename(old)
        part.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        _delete_place(parent)
