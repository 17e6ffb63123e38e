# SPDX-License-Identifier: Apache-2.0
"""Reads FP8 and MXFP4 checkpoints, dequantized slice by slice; rejects other quantized formats.

    quantization_config                      scale of X.weight    its shape
    fp8, weight_block_size [m, n]            X.weight_scale_inv   [⌈O/m⌉, ⌈I/n⌉]
    fp8, weight_block_size null              X.weight_scale_inv   one number
    fp8, activation_scheme alone (AutoFP8)   X.weight_scale       one number
    compressed-tensors, 8-bit float          X.weight_scale       tensor: one number, channel:
                                                                  [O, 1], block: as above
    mxfp4                                    X_scales             of X_blocks (jaxllm/mxfp4.py)
A weight [O, I] is its F8_E4M3 value times its scale, in float32. Scales of activations are ignored,
because only weights are read. A layout that the config does not state is an error, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import mxfp4
from jaxllm.errors import UserError
from jaxllm.files import STORED_DTYPES, BucketTensor, header, open_tensors
from jaxllm.paths import is_bucket

# Keys of config.json that describe a quantization; the second is of older compressed-tensors.
CONFIG_KEYS = ("quantization_config", "compression_config")
STORED = "F8_E4M3"
SCALE_DTYPES = [name for name in STORED_DTYPES if name not in ("F64", "U8")]
ACTIVATION_SCALES = ("input_scale", "output_scale", "activation_scale", "k_scale", "v_scale")
# Suffixes of tensor names that occur in quantized checkpoints only.
QUANTISED_SUFFIXES = (
    *("weight_scale_inv", "weight_scale", "weight_packed", "qweight", "qzeros", ".scales", "SCB"),
    *("absmax", "_blocks", "_scales", *ACTIVATION_SCALES),
)
FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors
# quant_method -> how transformers dequantizes: (argument of from_pretrained, call after it).
RECIPES = {
    "fp8": (", quantization_config=t.FineGrainedFP8Config(dequantize=True)", ""),
    "compressed-tensors": (", quantization_config=t.CompressedTensorsConfig(dequantize=True)", ""),
    "bitsandbytes": ("", ".dequantize()"),
}


@dataclass(frozen=True)
class Fp8:
    """How a checkpoint stores the scales of its FP8 weights."""

    suffix: str
    """the scale of `X.weight` is the tensor `X.weight` + suffix"""
    block: tuple[int, int]
    """[rows, columns] of the weight that share a scale; 0 = all of that dim"""

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a weight of `shape`."""
        return tuple(-(-n // m) if m else 1 for n, m in zip(shape, self.block, strict=True))


MXFP4 = Fp8(mxfp4.SCALES, (1, mxfp4.GROUP))


def split_quantization(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Fp8 | None]:
    """(config without its quantization, how quantized weights are stored; None = not quantized).

    Raises UserError for any other format and says how to dequantize it.
    """
    stated = next((config[key] for key in CONFIG_KEYS if config.get(key)), None)
    rest = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    if stated is None:
        return rest, None
    stated = stated if isinstance(stated, dict) else {}
    default = "compressed-tensors" if "config_groups" in stated else "no quant_method"
    method = str(stated.get("quant_method") or default)
    readers: dict[str, Callable[[Any], Fp8 | None]] = {
        "fp8": _fine_grained,
        "compressed-tensors": _compressed,
        "mxfp4": lambda _: MXFP4,
    }
    if scheme := readers.get(method, lambda _: None)(stated):
        return rest, scheme
    what = f"{folder}/config.json: the weights are quantized ({method})"
    if method == "fp8":
        what += ", and no weight_block_size says how many share a scale (null: all of a weight)"
    raise UserError(f"{what}; {_help(method, folder)}; if they are not, remove {CONFIG_KEYS[0]}")


def _fine_grained(stated: dict[str, Any]) -> Fp8 | None:
    if "weight_block_size" not in stated:
        return Fp8("_scale", (0, 0)) if stated.get("activation_scheme") else None
    block = stated["weight_block_size"]
    return Fp8("_scale_inv", (0, 0)) if block is None else _blocks("_scale_inv", block)


def _blocks(suffix: str, block: Any) -> Fp8 | None:
    sizes = isinstance(block, list) and all(type(n) is int and n > 0 for n in block)
    return Fp8(suffix, (block[0], block[1])) if sizes and len(block) == 2 else None


def _compressed(stated: dict[str, Any]) -> Fp8 | None:
    """None unless every group of modules is 8-bit float, all in the same layout."""
    groups = stated.get("config_groups")
    layouts = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None  # a list: a preset
        if not isinstance(weights, dict):
            return None
        is_fp8 = (weights.get("type"), weights.get("num_bits")) == ("float", 8)
        known = (group.get("format") or stated.get("format")) in FORMATS
        if not (is_fp8 and known and weights.get("symmetric", True)):
            return None
        named: dict[Any, Any] = {"tensor": Fp8("_scale", (0, 0)), "channel": Fp8("_scale", (1, 0))}
        strategy = weights.get("strategy")
        blocks = _blocks("_scale", weights.get("block_structure")) if strategy == "block" else None
        layouts.add(named.get(strategy, blocks) if isinstance(strategy, str) else None)
    sparsity = stated.get("sparsity_config") or {"format": "dense"}
    sparse = not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"
    if sparse or stated.get("transform_config") or len(layouts) != 1:
        return None
    return layouts.pop()


def _help(method: str, folder: Path) -> str:
    if method not in RECIPES:
        return "transformers cannot dequantize that: load the model that was quantized"
    option, call = RECIPES[method]
    return (
        'dequantize them: python -c "import transformers as t; '
        f"t.AutoModelForCausalLM.from_pretrained('{folder}'{option}){call}"
        f".save_pretrained('{folder}-dequantized', save_original_format=False)\""
    )


def without_scales(names: set[str], scheme: Fp8 | None) -> set[str]:
    """The tensor names of a checkpoint that are not those of scales."""
    if scheme is None:
        return names
    scales = {name + scheme.suffix for name in names}
    return {n for n in names - scales if not n.endswith(ACTIVATION_SCALES)}


class Dequantised:
    """An FP8 weight with the interface of safe_open's slices; `part[rows, columns]` is float32."""

    def __init__(self, weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]):
        self.weight, self.scale = weight, scale
        self.block = tuple(m or n for m, n in zip(block, weight.shape, strict=True))

    def get_shape(self) -> list[int]:
        return list(self.weight.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        value = self.weight[index].astype(np.float32)
        rows, columns = (
            np.arange(n)[part] // m
            for n, part, m in zip(self.weight.shape, index, self.block, strict=True)
        )
        # A few rows at a time: expanding all scales would take as much memory as the weight.
        for start in range(0, len(value), 128):
            value[start : start + 128] *= self.scale[rows[start : start + 128]][:, columns]
        return value


class Swapped:
    """A tensor with its last two dims swapped, with the interface of safe_open's slices."""

    def __init__(self, part: Any):
        self.part, self.get_dtype = part, part.get_dtype

    def get_shape(self) -> list[int]:
        *lead, rows, columns = self.part.get_shape()
        return [*lead, columns, rows]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        *lead, rows, columns = index
        return self.part[*lead, columns, rows].swapaxes(-1, -2)


Locations = Mapping[str, tuple[Path, str]]  # {tensor: (file, its name in the file)}


def located(files: Mapping[str, Path], scheme: Fp8 | None) -> dict[str, tuple[Path, str]]:
    """The Locations of the tensors of a checkpoint; MXFP4 weights by their own names."""
    suffix = mxfp4.BLOCKS if scheme is MXFP4 else ""
    return {name.removesuffix(suffix): (file, name) for name, file in files.items()}


@contextmanager
def opened(locations: Locations, scheme: Fp8 | None) -> Iterator[Callable[[str], Any]]:
    """Yields `tensor(name)`: the tensor, to be read by slices, quantized ones dequantized.

    `tensor` raises UserError for a quantized weight without a scale of the right shape.
    """
    with ExitStack() as stack:
        paths = sorted({file for file, _ in locations.values()})
        files = {path: stack.enter_context(open_tensors(path)) for path in paths}
        yield partial(_tensor, files, locations, scheme)


def _tensor(files: dict[Path, Any], locations: Locations, scheme: Fp8 | None, name: str) -> Any:
    file, stored = locations[name]
    part = files[file].get_slice(stored)
    scale = locations.get(name + scheme.suffix) if scheme else None
    if stored == name + mxfp4.BLOCKS:
        return _mxfp4(file, stored, scale)
    if part.get_dtype() != STORED:
        if scale:
            raise UserError(
                f"{file}: {name} is stored as {part.get_dtype()}, not {STORED}, and has a scale"
            )
        return part
    if scheme is None or scale is None:
        lacks = f"the checkpoint has no {name}{scheme.suffix}" if scheme else f"no {CONFIG_KEYS[0]}"
        raise UserError(f"{file}: {name} is stored as {STORED}, quantized, but {lacks}")
    weight = _mapped(file, stored, [STORED])
    values = np.asarray(_mapped(*scale, SCALE_DTYPES)[...], np.float32)
    want = scheme.grid(weight.shape) if weight.ndim == 2 else None
    if want is None or (values.shape != want and not values.size == int(np.prod(want)) == 1):
        raise UserError(
            f"{scale[0]}: {scale[1]} has shape {values.shape}; by {CONFIG_KEYS[0]} a weight of "
            f"{weight.shape} has scales {want}"
        )
    return Dequantised(weight, values.reshape(want), scheme.block)


def _mxfp4(file: Path, stored: str, scale: tuple[Path, str] | None) -> mxfp4.Mxfp4:
    if scale is None:
        wanted = stored.removesuffix(mxfp4.BLOCKS) + mxfp4.SCALES
        raise UserError(f"{file}: {stored} is quantized, but the checkpoint has no {wanted}")
    blocks, scales = _mapped(file, stored, [mxfp4.STORED]), _mapped(*scale, [mxfp4.STORED])
    if blocks.ndim != 4 or blocks.shape[3] != mxfp4.GROUP // 2 or scales.shape != blocks.shape[:3]:
        raise UserError(
            f"{file}: {stored} has shape {blocks.shape} and its scales {scales.shape}; MXFP4 has "
            "[experts, outputs, groups, 16] and [experts, outputs, groups]"
        )
    return mxfp4.Mxfp4(blocks, scales)


def _mapped(file: Path, name: str, dtypes: Sequence[str]) -> Any:
    """A memory-mapped tensor, or one in a bucket. safe_open cannot return FP8, which NumPy does not
    have. Raises UserError unless it has one of the dtypes."""
    start, tensors = header(file)
    entry = tensors[name]
    if entry["dtype"] not in dtypes:
        known = " or ".join(dtypes)
        raise UserError(f"{file}: {name} is stored as {entry['dtype']}, not {known}")
    if is_bucket(file):
        return BucketTensor(file, start, entry)
    first, end = entry["data_offsets"]
    data = np.memmap(file, np.uint8, "r", start + first, (end - first,))
    return data.view(STORED_DTYPES[entry["dtype"]]).reshape(entry["shape"])
