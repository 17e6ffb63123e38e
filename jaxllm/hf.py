# SPDX-License-Identifier: Apache-2.0
"""HuggingFace directories in and out, streamed: safetensors <-> sharded arrays.

Each device's shard of a weight is read from the files by its own slices, and each tensor is written
as soon as it is gathered: host memory holds one shard, or one tensor of one layer, never the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxllm import dist, fp8
from jaxllm.config import MeshSection
from jaxllm.errors import UserError
from jaxllm.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    DTYPES,
    INDEX,
    SINGLE,
    Tensor,
    check_dtype,
    header,
    local_dir,
    make_sharded,
    new_folder,
    open_tensors,
    tensor_files,
    write_file,
    write_json,
)
from jaxllm.hf_config import source_config, updated_configs
from jaxllm.mesh import axes_of, make_mesh, param_sharding
from jaxllm.model.adapter import NO_ADAPTER, Adapter
from jaxllm.model.config import ModelConfig
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import EMBED, HEAD, TOKEN_IDS, Key, from_hf, key_table, to_hf
from jaxllm.ops.quantized import quantize
from jaxllm.peft import files as adapter_files
from jaxllm.tokenizer import save_tokenizer

# Buffers that old files carry and nobody reads.
HARMLESS = ("rotary_emb.inv_freq",)
SCORE = "score.weight"


def weights_hash(files: Iterable[Path]) -> str:
    """A hash that identifies safetensors files: tensor names and offsets, and 4 KiB at the start
    and in the middle of each tensor."""
    hasher = xxhash.xxh3_64()
    for file in sorted(set(files)):
        start, tensors = header(file)
        with file.open("rb") as data:
            hasher.update(data.read(start)[8:])
            for first, end in (tensor["data_offsets"] for tensor in tensors.values()):
                for offset in (first, (first + end) // 2):
                    data.seek(start + offset)
                    hasher.update(data.read(min(4096, end - offset)))
    return hasher.hexdigest()


# ---- reading


def _names(key: Key, cfg: ModelConfig) -> list[str]:
    """The HF tensors a weight is made of: one for each layer of a stack."""
    return [key.name.format(i=i) for i in range(cfg.num_layers if key.stacked else 1)]


def _check_names(folder: Path, cfg: ModelConfig, found: set[str], scheme: fp8.Fp8 | None) -> None:
    wanted = {name for key in key_table(cfg) for name in _names(key, cfg)}
    missing = sorted(wanted - found)
    spare = sorted(n for n in fp8.unexpected(found, wanted, scheme) if not n.endswith(HARMLESS))
    if (cfg.tie_embeddings or cfg.scores) and HEAD in spare:
        spare.remove(HEAD)  # a second copy of the embedding; of no use to a score
    if cfg.scores and SCORE in missing:
        missing.remove(SCORE)  # of a model that has not been one: it is drawn
    if missing or spare:

        def listed(names: list[str]) -> str:
            return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")

        hint = ""
        if any(name.endswith(fp8.QUANTISED_SUFFIXES) for name in spare):
            hint = f"; they are of quantised weights, and {fp8.CONFIG_KEYS[0]} in config.json "
            hint += "is missing: restore it" if scheme is None else "describes others"
        what = [f"lacks {len(missing)} tensors ({listed(missing)})"] if missing else []
        what += [f"has {len(spare)} unexpected ones ({listed(spare)})"] if spare else []
        raise UserError(f"{folder}: by its config the checkpoint {' and '.join(what)}{hint}")


def _check_tensor(part: Any, name: str, key: Key, shape: tuple[int, ...], fused: int) -> None:
    """`part` must hold floats of our `shape`, or of `fused` rows where ours are some of them."""
    want = shape[::-1] if key.transpose else shape
    want = (fused, *want[1:]) if key.rows else want
    if tuple(part.get_shape()) != want:
        raise UserError(f"{name} has shape {tuple(part.get_shape())}; the config asks for {want}")
    if part.get_dtype() not in (*DTYPES.values(), "F64"):
        raise UserError(
            f"{name} is stored as {part.get_dtype()}, quantised, which is not read here"
        )


def _read(part: Any, key: Key, index: tuple[slice, ...]) -> np.ndarray:
    """Our [in, out] (or [out]) slice of one HF tensor, read from disk as that slice alone."""
    index = index[::-1] if key.transpose else index
    if key.rows is not None:
        start, stop, _ = index[0].indices(key.rows[1] - key.rows[0])
        index = (slice(key.rows[0] + start, key.rows[0] + stop), *index[1:])
    value = part[index]
    return value.T if key.transpose else value


def _abstract(cfg: ModelConfig, mesh: Mesh, **options: Any) -> tuple[Any, Any]:
    """(graph, state) of a decoder whose weights are ShapeDtypeStructs with their shardings."""

    def lay(variable: Any) -> Any:
        value = variable.get_value()
        sharding = param_sharding(mesh, axes_of(variable), value.shape)
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), **options)))
    return graph, jax.tree.map(lay, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def load_hf(
    path: str,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    adapter: str | Mapping[str, str] | None = None,
    compute_dtype: str | None = None,
    remat: str = "none",
    scan_unroll: int = 1,
    attention: str = "auto",
    overrides: dict[str, Any] | None = None,
    peft: Adapter = NO_ADAPTER,
    quantize_base: str = "none",
    scores: bool = False,
    seed: int = 0,
) -> Decoder:
    """Loads a HF directory or hub id as a Decoder.

    Args:
      path: the model, or an adapter in peft's format that names its base model.
      dtype: of the weights. compute_dtype: of activations; default: `dtype`.
      mesh: what the weights are sharded over; default: all devices along fsdp.
      adapter: a directory in peft's format, or {name: directory} of several. The first one is
        active (see jaxllm.choose).
      remat, scan_unroll, attention: as in Decoder.
      overrides: keys of the HF config to change. With tie_word_embeddings false, the head of a tied
        model is initialised from its token table.
      peft: what training adds to the model, with random weights drawn from `seed`; `adapter` gives
        the weights if both are given.
      quantize_base: none | int8 | nf4, the form in which the layers' frozen kernels are stored.
      scores: load a reward model; a missing score head is drawn from `seed`.

    Raises UserError for an unknown family, missing or unexpected tensors, shapes that disagree with
    the config, and pickled or quantised weights.
    """
    for name in (dtype, compute_dtype or dtype):
        check_dtype(name)
    path, named = adapter_files.with_base(path, adapter)
    folder, saved = local_dir(path), {n: adapter_files.find(one) for n, one in named.items()}
    scores = scores or adapter_files.is_reward(saved)
    config, scheme = source_config(str(folder), overrides or {}, scores=scores)
    cfg = from_hf(config)
    mesh = make_mesh(MeshSection()) if mesh is None else mesh
    if saved and not peft.frozen:
        peft = adapter_files.read_adapter(cfg, saved)
    options: dict[str, Any] = dict(compute_dtype=compute_dtype, remat=remat, peft=peft)
    options |= {"scan_unroll": scan_unroll, "attention": attention}
    graph, state = _abstract(cfg, mesh, dtype=dtype, **options)
    flat = dict(nnx.to_flat_state(state))
    weights = {name: v for name, v in flat.items() if isinstance(v, nnx.Param)}
    keys, found = key_table(cfg), tensor_files(folder)
    assert {tuple(k.path.split(".")) for k in keys} == set(weights)
    where = {name: (file, name) for name, file in found.items()}
    if cfg.tie_embeddings and EMBED not in where and HEAD in where:
        where[EMBED] = where.pop(HEAD)
    elif (overrides or {}).get("tie_word_embeddings") is False and EMBED in where:
        where.setdefault(HEAD, where[EMBED])  # lm_head is initialised from the embedding
    _check_names(folder, cfg, set(where), scheme)
    where |= adapter_files.saved_tensors(cfg, peft, saved)
    if cfg.scores and SCORE not in where:
        del weights["score", "kernel"]
    _read_weights(cfg, weights, where, scheme, partial(_stored, peft, quantize_base))
    added = {name: v for name, v in flat.items() if name not in weights}
    _draw(added, partial(Decoder, cfg, dtype=dtype, **options), seed)
    model = _merged(graph, nnx.from_flat_state(weights | added), config)
    model.base = path
    peft.begin(model)
    for which, one in enumerate(saved.values()):
        adapter_files.load_weights(model, one, which)
    return model


def _draw(variables: dict[Any, Any], make: Callable[..., Decoder], seed: int) -> None:
    """Gives variables (ShapeDtypeStructs) the random values that `make` begins with.

    The model's own weights and those that are added are drawn each as without the other.
    """
    if not variables:
        return

    def values() -> list[jax.Array]:
        made = dict(nnx.to_flat_state(nnx.state(make(rngs=nnx.Rngs(params=seed, peft=seed + 1)))))
        return [made[name].get_value() for name in variables]

    lay = [v.get_value().sharding for v in variables.values()]
    for variable, value in zip(
        variables.values(), jax.jit(values, out_shardings=lay)(), strict=True
    ):
        variable.set_value(value)


def _is_quantized(peft: Adapter, kind: str, path: tuple[Any, ...], variable: Any) -> bool:
    """True for the layers' frozen kernels, if the base model is to be quantised."""
    trained = peft.frozen and peft.trains(path, variable)
    return kind != "none" and path[0] == "layers" and path[-1] == "kernel" and not trained


def _stored(
    peft: Adapter, kind: str, path: tuple[Any, ...], variable: Any, value: jax.Array
) -> Any:
    """What the model stores: the array, or its quantised form."""
    if not _is_quantized(peft, kind, path, variable):
        return value
    axes, sharding = axes_of(variable), value.sharding
    assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
    mesh = sharding.mesh
    return quantize(value, kind, lambda x: jax.device_put(x, param_sharding(mesh, axes, x.shape)))


def _read_weights(
    cfg: ModelConfig,
    weights: dict[Any, Any],
    where: dict[str, tuple[Path, str]],
    scheme: fp8.Fp8 | None,
    stored: Callable[..., Any],
) -> None:
    """Fills `weights` (ShapeDtypeStructs). where: {HF tensor: (file, its name in the file)};
    stored: (path, variable, array) -> what the model stores, the array or its quantised form."""
    keys = key_table(cfg)
    fused = {k.name: k.rows[1] for k in keys if k.rows}  # the last part ends where the tensor does
    with ExitStack() as stack:
        files = {
            f: stack.enter_context(open_tensors(f)) for f in sorted({f for f, _ in where.values()})
        }
        for key in keys:
            variable = weights.get(tuple(key.path.split(".")))
            if variable is None:
                continue  # no file has it
            like = variable.get_value()
            parts = {n: fp8.tensor(files, where, n, scheme) for n in _names(key, cfg)}
            for name, part in parts.items():
                one = like.shape[1:] if key.stacked else like.shape
                _check_tensor(part, name, key, one, fused.get(key.name, 0))
            layers = list(parts.values())

            def read(index: Any, key=key, like=like, layers=layers) -> np.ndarray:
                if not key.stacked:
                    return _read(layers[0], key, index).astype(like.dtype)
                sizes = [len(range(*s.indices(n))) for s, n in zip(index, like.shape, strict=True)]
                out = np.empty(sizes, like.dtype)
                for place, part in enumerate(layers[index[0]]):
                    out[place] = _read(part, key, index[1:])
                return out

            value = make_sharded(like, read)
            path = tuple(key.path.split("."))
            variable.set_value(stored(path, variable, value))


def _merged(graph: Any, state: Any, config: dict[str, Any]) -> Decoder:
    model = nnx.merge(graph, state)
    model.hf_config = json.dumps(config)  # text, so that the model's graph stays hashable
    return model


def abstract_model(
    cfg: ModelConfig,
    mesh: Mesh,
    hf_config: dict[str, Any],
    *,
    base: str = "",
    quantize_base: str = "none",
    peft: Adapter = NO_ADAPTER,
    **options: Any,
) -> Decoder:
    """A model with ShapeDtypeStructs, which carry shardings, for weights. options: of Decoder."""
    graph, state = _abstract(cfg, mesh, peft=peft, **options)
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        if _is_quantized(peft, quantize_base, path, variable):
            value, axes = variable.get_value(), axes_of(variable)
            shapes = jax.eval_shape(partial(quantize, kind=quantize_base, place=lambda x: x), value)
            variable.set_value(
                jax.tree.map(
                    lambda x, axes=axes: jax.ShapeDtypeStruct(
                        x.shape, x.dtype, sharding=param_sharding(mesh, axes, x.shape)
                    ),
                    shapes,
                )
            )
    model = _merged(graph, nnx.from_flat_state(flat), hf_config)
    model.base = base
    return model


def random_model(
    cfg: ModelConfig,
    mesh: Mesh,
    hf_config: dict[str, Any],
    *,
    seed: int = 0,
    quantize_base: str = "none",
    peft: Adapter = NO_ADAPTER,
    **options: Any,
) -> Decoder:
    """A model with random weights, sharded over `mesh`. options: of Decoder."""
    graph, state = _abstract(cfg, mesh, peft=peft, **options)
    flat = dict(nnx.to_flat_state(state))
    _draw(flat, partial(Decoder, cfg, peft=peft, **options), seed)
    for path, variable in flat.items():
        value = variable.get_value()
        variable.set_value(_stored(peft, quantize_base, path, variable, value))
    model = _merged(graph, nnx.from_flat_state(flat), hf_config)
    peft.begin(model)
    return model


# ---- writing


def hf_tensors(model: Decoder, only: tuple[str, ...] | None = None) -> Iterator[Tensor]:
    """Every HF tensor of the model (of the weights `only`), layer by layer; nothing is gathered
    before `read()`."""
    cfg = model.cfg
    weights = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    groups: dict[str, list[Key]] = {}  # of keys whose weights share a tensor
    for key in key_table(cfg):
        if only is None or key.path in only:
            groups.setdefault(key.name, []).append(key)

    def tensor(parts: list[Key], layer: int) -> Tensor:
        arrays = [weights[tuple(k.path.split("."))].get_value() for k in parts]
        shapes = [a.shape[1:] if k.stacked else a.shape for k, a in zip(parts, arrays, strict=True)]
        shapes = [s[::-1] if k.transpose else s for k, s in zip(parts, shapes, strict=True)]

        def read() -> np.ndarray:
            values = [a[layer] if k.stacked else a for k, a in zip(parts, arrays, strict=True)]
            host = dist.gather(values)
            host = [v.T if k.transpose else v for k, v in zip(parts, host, strict=True)]
            return np.ascontiguousarray(host[0] if len(host) == 1 else np.concatenate(host))

        rows = sum(s[0] for s in shapes)
        return Tensor(parts[0].name.format(i=layer), (rows, *shapes[0][1:]), read)

    for layer in (None, *range(cfg.num_layers)):
        for parts in groups.values():
            if parts[0].stacked == (layer is not None):
                yield tensor(parts, layer or 0)


def _write_weights(model: Decoder, folder: Path, dtype: str, limit: int) -> None:
    """One file, or numbered ones of at most `limit` bytes (or one tensor) and their index."""
    width = jnp.dtype(dtype).itemsize
    files: list[list[Tensor]] = [[]]
    used = total = 0
    for t in hf_tensors(model):
        size = prod(t.shape) * width
        if files[-1] and used + size > limit:
            files.append([])
            used = 0
        files[-1].append(t)
        used, total = used + size, total + size
    if len(files) == 1:
        write_file(folder / SINGLE, files[0], dtype)
        return
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        write_file(folder / name, tensors, dtype)
    weight_map = {t.name: name for name, ts in zip(names, files, strict=True) for t in ts}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _configs(model: Decoder, dtype: str, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if model.hf_config:
        config = json.loads(model.hf_config)
    else:
        config = to_hf(model.cfg) | dict.fromkeys(TOKEN_IDS)
    return updated_configs(config, dtype, model.cfg.vocab_size, tokenizer)


def save_hf(
    model: Decoder,
    path: str,
    dtype: str | None = None,
    tokenizer: Any = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a HF directory that transformers and vLLM load: weights, configs, tokenizer.

    dtype: of the weights in the files (default: their own). tokenizer None: none is written.
    max_shard_bytes: the largest safetensors file. Tied weights are written once. The directory
    appears whole or not at all; one that holds nothing but a saved model is replaced, any other
    content is refused (ValueError).
    """
    kept = str(model.embed.embedding.get_value().dtype) if dtype is None else dtype
    check_dtype(kept)
    if model.peft.frozen:
        raise UserError("save_hf writes plain models; use save_adapter, or save merged(model)")
    if model.quantized:
        raise UserError("the weights are quantised; load the model without quantize_base to save")
    config, generation = _configs(model, kept, tokenizer)
    with new_folder(path) as part:
        _write_weights(model, part, kept, max_shard_bytes)
        if tokenizer is not None:
            save_tokenizer(tokenizer, part)
        write_json(part / "config.json", config)
        write_json(part / "generation_config.json", generation)


def save_adapter(model: Decoder, path: str, tokenizer: Any = None) -> None:
    """Writes a model's adapter, float32, as a directory that `peft` loads (bottlenecks: that
    jaxllm loads), and modules_to_save with it; the base is named by where it was loaded from.

    tokenizer None: none is written. The directory appears whole or not at all, as in `save_hf`.
    Raises ValueError for a model without an adapter or with several.
    """
    if not model.peft.frozen:
        raise UserError("the model has no adapter; save_hf writes it whole")
    adapter: Any = model.peft
    found = [Tensor(n, v.shape, lambda v=v: v) for n, v in adapter.tensors(model).items()]
    root = adapter.root
    for t in hf_tensors(model, adapter.saved):
        found.append(replace(t, name=root + t.name))
        if t.name == EMBED and model.cfg.tied_head:
            found.append(replace(t, name=root + HEAD))  # as peft has the tie
    with new_folder(path) as part:
        write_file(part / ADAPTER, found, "float32")
        write_json(part / ADAPTER_CONFIG, adapter.to_config(model))
        if tokenizer is not None:
            save_tokenizer(tokenizer, part)


def save_configs(model: Decoder, folder: Path, tokenizer: Any) -> None:
    """Writes config.json, generation_config.json and the tokenizer of a model into a directory."""
    config, generation = _configs(model, str(model.embed.embedding.get_value().dtype), tokenizer)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    save_tokenizer(tokenizer, folder)
