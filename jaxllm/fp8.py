# SPDX-License-Identifier: Apache-2.0
"""FP8 checkpoints, dequantised slice by slice as they are read; other quantised ones are refused.

    quantization_config                      scale of X.weight    its shape
    fp8, weight_block_size [m, n]            X.weight_scale_inv   [⌈O/m⌉, ⌈I/n⌉]
    fp8, weight_block_size null              X.weight_scale_inv   one number
    fp8, activation_scheme alone (AutoFP8)   X.weight_scale       one number
    compressed-tensors, 8-bit float          X.weight_scale       tensor: one number, channel:
                                                                  [O, 1], block: as above
The weight [O, I] is its F8_E4M3 value times its scale, in float32. Scales of activations are left
out: weights are all that is read. A layout that the config does not state is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.errors import UserError
from jaxllm.files import header

# Under either name; the second is that of older compressed-tensors.
CONFIGS = ("quantization_config", "compression_config")
STORED = "F8_E4M3"
DTYPES = {
    STORED: jnp.float8_e4m3fn,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "BF16": jnp.bfloat16,
    "F16": jnp.float16,
    "F32": jnp.float32,
}
ACTIVATION_SCALES = ("input_scale", "output_scale", "activation_scale", "k_scale", "v_scale")
# Ends of names that only quantised checkpoints have.
MARKS = (
    *("weight_scale_inv", "weight_scale", "weight_packed", "qweight", "qzeros", ".scales", "SCB"),
    *("absmax", "_blocks", "_scales", *ACTIVATION_SCALES),
)
FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors
# How transformers dequantises, by quant_method: an option of from_pretrained, or a call after it.
RECIPES = {
    "fp8": (", quantization_config=t.FineGrainedFP8Config(dequantize=True)", ""),
    "mxfp4": (", quantization_config=t.Mxfp4Config(dequantize=True)", ""),
    "compressed-tensors": (", quantization_config=t.CompressedTensorsConfig(dequantize=True)", ""),
    "bitsandbytes": ("", ".dequantize()"),
}


@dataclass(frozen=True)
class Fp8:
    """Where a weight's scale lies: `X.weight` + suffix, one for each block [rows, columns] of the
    weight; 0 = the whole dim."""

    suffix: str
    block: tuple[int, int]

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a weight's scale."""
        return tuple(-(-n // m) if m else 1 for n, m in zip(shape, self.block, strict=True))


def scheme_of(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Fp8 | None]:
    """(a config.json without its quantization, how its weights are stored: None = not quantised).

    Raises ValueError for a format that is not read here, with what helps.
    """
    found = next((config[key] for key in CONFIGS if config.get(key)), None)
    rest = {key: value for key, value in config.items() if key not in CONFIGS}
    if found is None:
        return rest, None
    stated = found if isinstance(found, dict) else {}
    method = None if stated.get("quant_method") is None else str(stated["quant_method"])
    scheme = None
    if method == "fp8":
        scheme = _fine_grained(stated)
    elif method == "compressed-tensors" or (method is None and "config_groups" in stated):
        scheme = _compressed(stated)
    if scheme is None:
        what = f"{folder}/config.json: the weights are quantised ({method or 'no quant_method'})"
        if method == "fp8":
            what += ", and no weight_block_size says which of them share a scale (null: all of one)"
        raise UserError(f"{what}; {_help(method, folder)}; if they are not, remove {CONFIGS[0]}")
    return rest, scheme


def _fine_grained(found: dict[str, Any]) -> Fp8 | None:
    if "weight_block_size" not in found:
        return Fp8("_scale", (0, 0)) if found.get("activation_scheme") else None
    block = found["weight_block_size"]
    return Fp8("_scale_inv", (0, 0)) if block is None else _blocks("_scale_inv", block)


def _blocks(suffix: str, block: Any) -> Fp8 | None:
    sizes = isinstance(block, list) and all(type(n) is int and n > 0 for n in block)
    return Fp8(suffix, (block[0], block[1])) if sizes and len(block) == 2 else None


def _compressed(found: dict[str, Any]) -> Fp8 | None:
    """None unless all groups of modules are float of 8 bits in one layout, and nothing else."""
    groups = found.get("config_groups")
    layouts = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None  # a list: of a preset
        if not isinstance(weights, dict):
            return None
        if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            return None
        if (group.get("format") or found.get("format")) not in FORMATS:
            return None
        if not weights.get("symmetric", True):
            return None
        whole: dict[Any, Any] = {"tensor": Fp8("_scale", (0, 0)), "channel": Fp8("_scale", (1, 0))}
        strategy = weights.get("strategy")
        blocks = _blocks("_scale", weights.get("block_structure")) if strategy == "block" else None
        layouts.add(whole.get(strategy, blocks) if isinstance(strategy, str) else None)
    sparsity = found.get("sparsity_config") or {"format": "dense"}
    sparse = not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"
    if sparse or found.get("transform_config") or len(layouts) != 1:
        return None
    return layouts.pop()


def _help(method: Any, folder: Path) -> str:
    if method not in RECIPES:
        return "transformers has no way to dequantise that: load the model it was made from"
    option, call = RECIPES[method]
    return (
        'dequantise them: python -c "import transformers as t; '
        f"t.AutoModelForCausalLM.from_pretrained('{folder}'{option}){call}"
        f".save_pretrained('{folder}-dequantised', save_original_format=False)\""
    )


def spare(names: set[str], wanted: set[str], scheme: Fp8 | None) -> set[str]:
    """Those of a checkpoint's `names` that are neither `wanted` nor their scales."""
    left = names - wanted
    if scheme is None:
        return left
    scales = {name + scheme.suffix for name in wanted if name.endswith(".weight")}
    return {n for n in left - scales if not n.endswith(ACTIVATION_SCALES)}


class Dequantised:
    """A FP8 weight read as safe_open's slices are: `part[rows, columns]` in float32."""

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
        for start in range(0, len(value), 128):  # the scales of a few rows at a time, never of all
            value[start : start + 128] *= self.scale[rows[start : start + 128]][:, columns]
        return value


def tensor(
    files: Mapping[Path, Any], where: Mapping[str, tuple[Path, str]], name: str, scheme: Fp8 | None
) -> Any:
    """The tensor `name` of opened `files`, to be read by slices.

    where: {name: (file, its name there)}. Raises ValueError for FP8 whose scale is not known.
    """
    file, stored = where[name]
    part = files[file].get_slice(stored)
    scale = where.get(name + scheme.suffix) if scheme else None
    if part.get_dtype() != STORED:
        if scale:
            raise UserError(
                f"{file}: {name} is stored as {part.get_dtype()}, not {STORED}, and has a scale"
            )
        return part
    if scheme is None or scale is None:
        lacks = (
            f"the checkpoint has no {name}{scheme.suffix}"
            if scheme
            else f"no {CONFIGS[0]} is there"
        )
        raise UserError(f"{file}: {name} is stored as {STORED}, quantised, but {lacks}")
    weight, values = _mapped(file, stored), np.asarray(_mapped(*scale), np.float32)
    want = scheme.grid(weight.shape) if weight.ndim == 2 else None
    if want is None or (values.shape != want and not values.size == int(np.prod(want)) == 1):
        raise UserError(
            f"{scale[0]}: {scale[1]} has shape {values.shape}; by {CONFIGS[0]} a weight of "
            f"{weight.shape} has scales {want}"
        )
    return Dequantised(weight, values.reshape(want), scheme.block)


def _mapped(file: Path, name: str) -> np.ndarray:
    """A tensor as it lies in the file, read where it is touched: numpy has no FP8 of its own, so
    safe_open cannot give it."""
    start, tensors = header(file)
    entry = tensors[name]
    if entry["dtype"] not in DTYPES:
        raise UserError(
            f"{file}: {name} is stored as {entry['dtype']}, which is no scale of {STORED}"
        )
    first, end = entry["data_offsets"]
    data = np.memmap(file, np.uint8, "r", start + first, (end - first,))
    return data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
