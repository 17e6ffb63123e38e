# SPDX-License-Identifier: Apache-2.0
"""Loads and saves HuggingFace directories: safetensors <-> sharded arrays.

Each device's shard of a weight is read from the files by its own slices, and each tensor is written
as soon as it is gathered: host memory holds one shard, or one tensor of one layer, never the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from flax import nnx
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import Mesh, NamedSharding

from jaxllm import dist, fp8, passthrough
from jaxllm.config import MeshSection
from jaxllm.errors import UserError
from jaxllm.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    INDEX,
    READABLE,
    Tensor,
    check_dtype,
    header,
    local_dir,
    make_sharded,
    new_folder,
    write_file,
    write_json,
)
from jaxllm.hf_config import source_config, text_tensors, updated_configs
from jaxllm.mesh import axes_of, device_memory, make_mesh, param_sharding
from jaxllm.model.adapter import NO_ADAPTER, Adapter
from jaxllm.model.config import ModelConfig
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import TOKEN_IDS, from_hf, to_hf, with_mtp
from jaxllm.model.families.tensors import Key, embed_name, key_table, keys_in, tensor_names
from jaxllm.model.families.wrappers import head_bias_of, head_of
from jaxllm.ops.quantized import quantize
from jaxllm.paths import is_bucket, read_bytes
from jaxllm.peft import files as adapter_files
from jaxllm.tokenizer import save_tokenizer

# Suffixes of buffers in old files, which no model reads: frequencies, and masks of gpt_neox.
UNUSED = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
SCORE = "score.weight"


def weights_hash(files: Iterable[Path]) -> str:
    """A hash that identifies safetensors files: tensor names and offsets, and 4 KiB at the start
    and in the middle of each tensor."""
    hasher = xxhash.xxh3_64()
    for file in sorted(set(files)):
        start, tensors = header(file)
        ranges = [(8, start)]
        for first, end in (tensor["data_offsets"] for tensor in tensors.values()):
            for offset in (first, (first + end) // 2) if first < end else ():
                ranges.append((start + offset, start + min(offset + 4096, end)))
        for part in read_bytes(file, ranges):
            hasher.update(part)
    return hasher.hexdigest()


# ---- reading


def _check_names(folder: Path, cfg: ModelConfig, found: set[str], scheme: fp8.Fp8 | None) -> None:
    """Raises UserError for missing and for unexpected tensors."""
    wanted = {name for key in keys_in(cfg, found) for name in tensor_names(cfg, key.name)}
    missing = sorted(wanted - found - {SCORE})  # a missing score head is drawn
    spare = sorted(n for n in fp8.without_scales(found, scheme) - wanted if not n.endswith(UNUSED))
    if cfg.tie_embeddings or cfg.scores:  # a second copy of the table, or a causal model's head
        heads = head_of(cfg.wrapper), head_bias_of(cfg.wrapper) if cfg.head_bias else ""
        spare = [name for name in spare if name not in heads]
    problems = [
        f"{verb} ({', '.join(names[:3])}{' …' if len(names) > 3 else ''})"
        for verb, names in (
            (f"lacks {len(missing)} tensors", missing),
            (f"has {len(spare)} unexpected ones", spare),
        )
        if names
    ]
    if not problems:
        return
    hint = ""
    if any(name.endswith(fp8.QUANTISED_SUFFIXES) for name in spare):
        hint = f"; they are of quantized weights, and {fp8.CONFIG_KEYS[0]} in config.json "
        hint += "is missing: restore it" if scheme is None else "describes others"
    raise UserError(f"{folder} does not fit its config: it {' and '.join(problems)}{hint}")


def _swapped(dims: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*dims[:-2], dims[-1], dims[-2])


def _fitting(part: Any, name: str, key: Key, shape: tuple[int, ...], fused: int) -> Any:
    """`part`, as it is to be read. Raises UserError unless it holds floats of our `shape`, or of
    `fused` outputs if ours are some of them."""
    want = list(_swapped(shape) if key.transpose else key.with_unit(shape, 1))
    if key.part:
        want[key.out_dim] = fused
    if key.either and want[-1] == want[-2]:
        raise UserError(f"{name} is square, so its shape does not say which dim counts outputs")
    if key.either and tuple(part.get_shape()) == _swapped(tuple(want)):
        part = fp8.Swapped(part)
    if list(part.get_shape()) != want:
        seen = tuple(part.get_shape())
        raise UserError(f"{name} has shape {seen}; the config asks for {tuple(want)}")
    if part.get_dtype() not in READABLE:
        raise UserError(f"{name} is stored as {part.get_dtype()}, quantized and not supported")
    return part


def _read(part: Any, key: Key, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of one layer's weight, [in, out] or [out]. Reads no more than it, and the outputs of
    other weights that are between its own in a tensor fused by heads."""
    index = key.within(_swapped(index) if key.transpose else index)
    if key.part is not None and isinstance(outputs := index[key.out_dim], np.ndarray):
        around = slice(outputs[0], outputs[-1] + 1)
        value = part[key.at_outputs(index, around)].take(outputs - outputs[0], key.out_dim)
    else:
        value = part[key.with_unit(index, 0)]
    return value.swapaxes(-1, -2) if key.transpose else value


def _read_shards(
    parts: list[Any], key: Key, like: Any, indices: list[tuple[slice, ...]]
) -> list[np.ndarray]:
    """Slices of a weight, in the dtype of `like`. parts: its tensors, in order.

    All slices of one tensor are read before the next one is; those of experts one by one.
    """
    stack = np.arange(len(parts)).reshape(like.shape[: key.stacked])
    outs, reads = [], []
    for index in indices:
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, like.shape, strict=True)]
        outs.append(np.empty(sizes, like.dtype))
        wanted = stack[*index[: key.stacked], ...]
        reads += [(i, len(outs) - 1, at) for at, i in np.ndenumerate(wanted)]
    for i, which, at in sorted(reads):
        inner = indices[which][key.stacked :]
        if len(inner) < 3:
            outs[which][at] = _read(parts[i], key, inner)
            continue
        first, *rest = inner
        for n, expert in enumerate(range(*first.indices(like.shape[key.stacked]))):
            outs[which][at][n] = _read(parts[i], key, (slice(expert, expert + 1), *rest))[0]
    return outs


def _read_weights(
    model: Decoder,
    locations: fp8.Locations,
    scheme: fp8.Fp8 | None,
    quantize_base: str,
    shared: Mapping[tuple[str, ...], jax.Array],
) -> None:
    """Reads the weights of an abstract model, except for a score head that no file has, and for
    those of the base model that are `shared`."""
    keys = {tuple(key.path.split(".")): key for key in keys_in(model.cfg, locations)}
    weights = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert keys.keys() == weights.keys()
    fused: dict[str, int] = {}  # outputs of each fused tensor
    for key in keys.values():
        fused[key.name] = fused.get(key.name, 0) + len(key.part or ())
    with fp8.opened(locations, scheme) as tensor:
        parts = {}
        for path, key in keys.items():  # all of them, before the first is allocated
            names = tensor_names(model.cfg, key.name)
            if names[0] not in locations:
                continue
            if path in shared and key.path not in model.peft.saved:
                weights[path].set_value(shared[path])
                continue
            facts = key, weights[path].get_value().shape[key.stacked :], fused[key.name]
            parts[path] = [_fitting(tensor(name), name, *facts) for name in names]
        for path, layers in parts.items():
            key, like = keys[path], weights[path].get_value()
            names = tensor_names(model.cfg, key.name)
            read = partial(_read_shards, layers, key, like)
            value = make_sharded(like, read, together=is_bucket(locations[names[0]][0]))
            _set_quantized(model, quantize_base, path, weights[path], value)


def load_hf(
    path: str,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    adapter: str | Mapping[str, str] | None = None,
    overrides: dict[str, Any] | None = None,
    peft: Adapter = NO_ADAPTER,
    quantize_base: str = "none",
    scores: bool = False,
    seed: int = 0,
    compute_dtype: str | None = None,
    mtp: bool = False,
    shared: Mapping[tuple[str, ...], jax.Array] | None = None,
    **options: Any,
) -> Decoder:
    """Loads a HF directory or hub id as a Decoder.

    Args:
      path: the model, or an adapter in peft's format that names its base model.
      dtype: of the weights. compute_dtype: of activations; default: `dtype`.
      mesh: what the weights are sharded over; default: all devices along fsdp.
      adapter: a directory in peft's format, or {name: directory} of several. The first one is
        active (see jaxllm.choose).
      overrides: keys of the HF config to change. With tie_word_embeddings false, the head of a tied
        model is initialized from its token table.
      peft: what training adds to the model; its weights are `adapter`'s, or else drawn from `seed`.
      quantize_base: none | int8 | nf4, the form in which the layers' frozen kernels are stored.
      scores: load a reward model; a missing score head is drawn from `seed`.
      mtp: load the modules of multi-token prediction too, to train them.
      shared: arrays of another model of `path` to use, by the path of the weight; others are read.
      options: remat, scan_unroll, attention, loss_blocks, mlp_blocks, as in Decoder.

    Raises UserError for an unknown family, missing or unexpected tensors, shapes that disagree with
    the config, and pickled or quantized weights.
    """
    for name in (dtype, compute_dtype or dtype):
        check_dtype(name)
    path, named = adapter_files.with_base(path, adapter)
    folder, saved = local_dir(path), {n: adapter_files.find(one) for n, one in named.items()}
    scores, overrides = scores or adapter_files.is_reward(saved), overrides or {}
    config, scheme = source_config(str(folder), overrides, scores=scores)
    if scheme is not None:
        dist.say(f"{path}: quantized weights are read as {dtype} and saved without quantization")
    cfg = with_mtp(from_hf(config), config) if mtp else from_hf(config)
    if saved and not peft.frozen:
        peft = adapter_files.read_adapter(cfg, saved)
    mesh = make_mesh(MeshSection()) if mesh is None else mesh
    options |= {"dtype": dtype, "compute_dtype": compute_dtype}
    model = abstract_model(cfg, mesh, config, base=path, peft=peft, **options)
    locations = text_tensors(folder, cfg.family, cfg.wrapper, scheme)
    embed, head = embed_name(cfg.family, cfg.wrapper), head_of(cfg.wrapper)
    if cfg.tie_embeddings and embed not in locations and head in locations:
        locations[embed] = locations.pop(head)
    elif overrides.get("tie_word_embeddings") is False and embed in locations:
        locations.setdefault(head, locations[embed])
    kept = passthrough.kept_names(folder, locations, cfg, config)
    unread = kept | passthrough.unread_names(locations, cfg)
    _check_names(folder, cfg, set(locations) - unread, scheme)
    passthrough.check_unused(folder, cfg, config, scheme, kept)
    locations |= adapter_files.saved_tensors(cfg, peft, saved)
    for which, files in enumerate(saved.values()):
        adapter_files.check_weights(model, files, which)
    _read_weights(model, locations, scheme, quantize_base, shared or {})
    _draw(model, seed)
    peft.begin(model)
    for which, files in enumerate(saved.values()):
        adapter_files.load_weights(model, files, which)
    return model


# ---- abstract and random models


def _is_quantized(model: Decoder, kind: str, path: tuple[Any, ...], variable: Any) -> bool:
    """True for the layers' frozen kernels, if the base model is to be quantized."""
    trained = model.peft.frozen and model.peft.trains(path, variable)
    stacked = path[0] in model.cfg.stacks
    return kind != "none" and stacked and path[-1] == "kernel" and not trained


def _set_quantized(
    model: Decoder, kind: str, path: tuple[Any, ...], variable: Any, value: Any
) -> None:
    """Sets a variable to a jax.Array, or to its quantized form."""
    if _is_quantized(model, kind, path, variable):
        axes, sharding = axes_of(variable), value.sharding
        assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
        place = partial(param_sharding, sharding.mesh, axes)
        value = quantize(value, kind, lambda x: jax.device_put(x, place(x.shape)))
    variable.set_value(value)


def _draw(model: Decoder, seed: int) -> None:
    """Gives the variables that are still ShapeDtypeStructs the values of a random model.

    Base model and adapter have streams of their own, so neither changes the other's values.
    """
    abstract = {
        path: variable
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct)
    }
    dtype = model.embed.embedding.get_value().dtype

    def values() -> list[jax.Array]:
        rngs = nnx.Rngs(params=seed, peft=seed + 1)
        drawn = nnx.state(Decoder(model.cfg, rngs=rngs, dtype=dtype, peft=model.peft))
        flat = dict(nnx.to_flat_state(drawn))
        return [flat[path].get_value() for path in abstract]

    if abstract:
        shardings = [variable.get_value().sharding for variable in abstract.values()]
        drawn = jax.jit(values, out_shardings=shardings)()
        for variable, value in zip(abstract.values(), drawn, strict=True):
            variable.set_value(value)


def abstract_model(
    cfg: ModelConfig,
    mesh: Mesh,
    hf_config: dict[str, Any],
    *,
    base: str = "",
    quantize_base: str = "none",
    **options: Any,
) -> Decoder:
    """A model with ShapeDtypeStructs, which carry shardings, for weights. options: of Decoder."""
    model = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), **options))
    model.hf_config = json.dumps(hf_config)  # text, so that the model's graph stays hashable
    model.base = base
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value, axes = variable.get_value(), axes_of(variable)
        if _is_quantized(model, quantize_base, path, variable):
            value = jax.eval_shape(partial(quantize, kind=quantize_base, place=lambda x: x), value)

        def with_sharding(x: Any, axes=axes) -> jax.ShapeDtypeStruct:
            return x.update(sharding=param_sharding(mesh, axes, x.shape))

        variable.set_value(jax.tree.map(with_sharding, value))
    return model


def random_model(
    cfg: ModelConfig,
    mesh: Mesh,
    hf_config: dict[str, Any],
    *,
    seed: int = 0,
    quantize_base: str = "none",
    **options: Any,
) -> Decoder:
    """A model with random weights, sharded over `mesh`. options: of Decoder."""
    model = abstract_model(cfg, mesh, hf_config, **options)
    weights: list[Any] = jax.tree.leaves(nnx.state(model))
    need = sum(prod(w.sharding.shard_shape(w.shape)) * w.dtype.itemsize for w in weights)
    if need > (room := device_memory(mesh.local_devices[0])):
        raise UserError(
            f"the weights of the config take {need / 2**30:,.1f} GiB of each device, which has "
            f"{room / 2**30:,.1f}; use a smaller model or more devices"
        )
    _draw(model, seed)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        _set_quantized(model, quantize_base, path, variable, variable.get_value())
    model.peft.begin(model)
    return model


# ---- writing


def hf_tensors(model: Decoder, only: tuple[str, ...] | None = None) -> Iterator[Tensor]:
    """Yields the model's HF tensors layer by layer; each is gathered when it is read.

    only: paths of the weights to yield; default: all.
    """
    weights = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    fused: dict[str, list[Key]] = {}  # {HF tensor: its parts}
    for key in key_table(model.cfg):
        if only is None or key.path in only:
            fused.setdefault(key.name, []).append(key)

    def tensor(parts: list[Key], name: str, at: tuple[int, ...]) -> Tensor:
        key = parts[0]  # the parts of a tensor are stacked and transposed alike
        arrays = [weights[tuple(k.path.split("."))].get_value() for k in parts]
        shapes = [a.shape[key.stacked :] for a in arrays]
        shapes = [_swapped(s) if key.transpose else key.with_unit(s, 1) for s in shapes]
        shape = list(shapes[0])
        if len(parts) > 1:
            shape[key.out_dim] = sum(s[key.out_dim] for s in shapes)

        def read(process: int = 0) -> np.ndarray | None:
            host = dist.gather([a[at] for a in arrays] if at else arrays, process)
            if host is None:
                return None
            host = [x.swapaxes(-1, -2) for x in host] if key.transpose else host
            host = [x if key.unit is None else np.expand_dims(x, key.unit) for x in host]
            if len(host) == 1:
                return np.ascontiguousarray(host[0])
            whole, everything = np.empty(shape, host[0].dtype), (slice(None),) * len(shape)
            for part, x in zip(parts, host, strict=True):
                whole[part.within(everything)] = x
            return whole

        exact = ("F32", 4 * prod(shape)) if key.exact else None
        return Tensor(name, tuple(shape), read, exact)

    tensors = []
    for parts in fused.values():
        names = tensor_names(model.cfg, parts[0].name)
        path = tuple(parts[0].path.split("."))
        grid = np.ndindex(weights[path].get_value().shape[: parts[0].stacked])
        layers = model.cfg.stacks.get(path[0])
        for name, at in zip(names, grid, strict=True):
            tensors.append((layers[at[0]] if layers else -1, tensor(parts, name, at)))
    yield from (one for _, one in sorted(tensors, key=lambda pair: pair[0]))  # layer by layer


def _write_weights(tensors: dict[str, Tensor], folder: Path, dtype: str, limit: int) -> None:
    """Writes one file, or numbered ones of at most `limit` bytes (or one tensor) and an index."""
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda t: t.entry(dtype)[1],
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    for i, (name, parts) in enumerate(split.filename_to_tensors.items()):
        write_file(folder / name, [tensors[p] for p in parts], dtype, i % dist.count())
    dist.barrier("files")
    if split.is_sharded and dist.is_main():
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)


def save_configs(model: Decoder, folder: Path, tokenizer: Any, dtype: str | None = None) -> None:
    """Writes config.json, generation_config.json and the tokenizer, if any, into a directory; for
    a multimodal model also the processor.

    dtype: that config.json names; default: that of the weights.
    """
    config = json.loads(model.hf_config or "{}") or to_hf(model.cfg) | dict.fromkeys(TOKEN_IDS)
    dtype = dtype or str(model.embed.embedding.get_value().dtype)
    config, generation = updated_configs(config, dtype, model.cfg.vocab_size, tokenizer)
    write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    if model.cfg.wrapper and model.base:
        passthrough.copy_processor(model.base, folder)
    write_json(folder / "config.json", config)  # last, see `new_folder`


def save_hf(
    model: Decoder,
    path: str,
    dtype: str | None = None,
    tokenizer: Any = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
    card: str = "",
) -> None:
    """Writes a HF directory that transformers and vLLM load: weights, configs, tokenizer.

    The tensors that the decoder does not use, such as a vision tower, are copied from where it was
    loaded. dtype: of the weights in the files (default: their own). tokenizer None: none is
    written. max_shard_bytes: the largest safetensors file. card: a model card (`new_folder`). Tied
    weights are written once. The directory appears complete or not at all. It replaces a saved
    model; any other content is refused (UserError).
    """
    dtype = dtype or str(model.embed.embedding.get_value().dtype)
    check_dtype(dtype)
    if model.peft.frozen:
        raise UserError("save_hf writes plain models; use save_adapter, or save merged(model)")
    if model.quantized:
        raise UserError("the weights are quantized; load the model without quantize_base to save")
    tensors = passthrough.with_unused(model, {t.name: t for t in hf_tensors(model)}, path)
    with new_folder(path, card) as part:
        _write_weights(tensors, part, dtype, max_shard_bytes)
        if dist.is_main():
            save_configs(model, part, tokenizer, dtype)


def save_adapter(model: Decoder, path: str, tokenizer: Any = None, *, card: str = "") -> None:
    """Writes a model's adapter and modules_to_save, float32, as a directory that `peft` loads
    (bottlenecks: that jaxllm loads). Its config names the base by where that was loaded from.

    tokenizer, card: as in `save_hf`. Raises UserError for a model without one adapter.
    """
    if not model.peft.frozen:
        raise UserError("the model has no adapter; save it with save_hf")
    adapter: Any = model.peft
    tensors = [Tensor(n, v.shape, lambda _, v=v: v) for n, v in adapter.tensors(model).items()]
    for t in hf_tensors(model, adapter.saved):
        tensors.append(replace(t, name=adapter.root + t.name))
        if t.name == embed_name(model.cfg.family, model.cfg.wrapper) and model.cfg.tied_head:
            tensors.append(
                replace(t, name=adapter.root + head_of(model.cfg.wrapper))
            )  # peft saves the tied copy as well
    with new_folder(path, card) as part:
        write_file(part / ADAPTER, tensors, "float32")
        if dist.is_main():
            if tokenizer is not None:
                save_tokenizer(tokenizer, part)
            write_json(part / ADAPTER_CONFIG, adapter.to_config(model))
