# SPDX-License-Identifier: Apache-2.0
"""HuggingFace directories in and out, streamed: safetensors <-> sharded arrays.

Each device's shard of a weight is read from the files by its own slices, and each tensor is written
as soon as it is gathered: host memory holds one shard, or one tensor of one layer, never the model.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.config import MeshSection, OptimSection, TrainConfig
from jaxllm.mesh import axes_of, make_mesh, param_sharding
from jaxllm.model.config import ModelConfig
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import Key, from_hf, key_table, normalised, to_hf
from jaxllm.optim import eval_params, make_optimizer, opt_state_shardings
from jaxllm.tokenizer import hub_id, load_tokenizer, save_tokenizer, stop_ids

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Inside a model's hf_config: what generation_config.json said.
GENERATION = "generation_config"
# safetensors' names of the dtypes that weights may be stored in.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# In a run folder: what the run is of, beside its weights (see save_start).
START = "model"
# Buffers that old files carry and nobody reads.
HARMLESS = ("rotary_emb.inv_freq",)
# What save_hf may write; a directory with anything else in it is not replaced.
OWN_FILES = (
    "config.json generation_config.json model*.safetensors model.safetensors.index.json "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json vocab.txt merges.txt tokenizer.model chat_template.jinja chat_template.json"
).split()


# ---- a directory and its config


def resolve(path: str) -> Path:
    """A directory as it is; anything else is a hub id, fetched or found in the hub's cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not hub_id(path):
        why = f"; {folder.parent} is one, so the hub is not asked" if folder.parent.is_dir() else ""
        raise ValueError(f"{path} is not a directory (nor a hub id like owner/name){why}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["*.json", "model*.safetensors", "*.jinja", "tokenizer*", "*.txt"]
    try:
        return Path(snapshot_download(path, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is no directory, nor could the hub be asked: {reason}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error.reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__}; a JSON object is expected")
    return value


def read_config(path: str) -> dict[str, Any]:
    """The config.json of a directory or hub id, or the JSON file itself."""
    file = Path(path).expanduser()
    if not file.is_file():
        file = resolve(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file.parent} has no config.json; it is no HuggingFace model directory")
    config = _read_json(file)
    if {"objective", "optim", "data"} <= config.keys():
        raise ValueError(f"{file.parent} is a run folder; its model is {file.parent / 'final'}")
    return config


def _changed(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`config` with `overrides`. Raises ValueError for a key that such a model does not have."""
    merged = config | overrides
    kind = normalised(merged)["model_type"]
    # As files before transformers 5 do; it takes them in, and writes others.
    spelled = ("rope_theta", "rope_scaling", "torch_dtype", "rope_local_base_freq")
    spelled += ("sliding_window_pattern", "partial_rotary_factor")
    known = {*config, *normalised({"model_type": kind}), *spelled}
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"model.overrides.{key} is no key of a {kind} config{hint}")
    return merged


def model_config(cfg: TrainConfig) -> tuple[ModelConfig, dict[str, Any]]:
    """The shape of a run's model and the HF config it is read from."""
    source = cfg.model.path or str(cfg.model.config)
    config = _changed(read_config(source), cfg.model.overrides)
    shape = from_hf(config)
    if cfg.model.path and (file := resolve(source) / "generation_config.json").is_file():
        config[GENERATION] = _read_json(file)
    return shape, config


# ---- reading


def _tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor name: its file}, found as transformers does. Raises ValueError if there is none."""
    if (folder / SINGLE).is_file():
        with _opened(folder / SINGLE) as opened:
            return dict.fromkeys(opened.keys(), folder / SINGLE)
    if (folder / INDEX).is_file():
        mapping = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict):
            raise ValueError(f"{folder / INDEX} has no weight_map; it is no index of tensors")
        files = {name: folder / file for name, file in mapping.items()}
        if missing := sorted({str(f) for f in files.values() if not f.is_file()}):
            raise ValueError(f"{folder / INDEX} names {missing[0]}, which is not there")
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]} is a pickle, which can run code and is not read. Convert it "
            'where you trust it: python -c "from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise ValueError(f"{folder} has no {SINGLE} (nor {INDEX})")


def _opened(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def _names(key: Key, cfg: ModelConfig) -> list[str]:
    """The HF tensors a weight is made of: one for each layer of a stack."""
    return [key.name.format(i=i) for i in range(cfg.num_layers if key.stacked else 1)]


def _check_names(folder: Path, cfg: ModelConfig, found: dict[str, Path]) -> None:
    wanted = {name for key in key_table(cfg) for name in _names(key, cfg)}
    missing = sorted(wanted - set(found))
    spare = sorted(n for n in set(found) - wanted if not n.endswith(HARMLESS))
    if cfg.tie_embeddings and "lm_head.weight" in spare:
        spare.remove("lm_head.weight")  # a second copy of the embedding
    if missing or spare:

        def listed(names: list[str]) -> str:
            return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")

        what = [f"lacks {len(missing)} tensors ({listed(missing)})"] if missing else []
        what += [f"has {len(spare)} unexpected ones ({listed(spare)})"] if spare else []
        raise ValueError(f"{folder}: by its config the checkpoint {' and '.join(what)}")


def _check_tensor(part: Any, name: str, key: Key, shape: tuple[int, ...], fused: int) -> None:
    """`part` must hold floats of our `shape`, or of `fused` rows where ours are some of them."""
    want = shape[::-1] if key.transpose else shape
    want = (fused, *want[1:]) if key.rows else want
    if tuple(part.get_shape()) != want:
        raise ValueError(f"{name} has shape {tuple(part.get_shape())}; the config asks for {want}")
    if part.get_dtype() not in (*DTYPES.values(), "F64"):
        raise ValueError(f"{name} is stored as {part.get_dtype()}, quantised; dequantise it first")


def _read(part: Any, key: Key, index: tuple[slice, ...]) -> np.ndarray:
    """Our [in, out] (or [out]) slice of one HF tensor, read from disk as that slice alone."""
    index = index[::-1] if key.transpose else index
    if key.rows is not None:
        start, stop, _ = index[0].indices(key.rows[1] - key.rows[0])
        index = (slice(key.rows[0] + start, key.rows[0] + stop), *index[1:])
    value = part[index]
    return value.T if key.transpose else value


def _place(like: jax.ShapeDtypeStruct, read: Callable[[Any], np.ndarray]) -> jax.Array:
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


def _blank(cfg: ModelConfig, mesh: Mesh, **options: Any) -> tuple[Any, Any]:
    """(graph, state) of a decoder whose weights are ShapeDtypeStructs with their shardings."""

    def lay(variable: Any) -> Any:
        value = variable.get_value()
        sharding = param_sharding(mesh, axes_of(variable), value.shape)
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), **options)))
    return graph, jax.tree.map(lay, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; known: {', '.join(DTYPES)}")


def load_hf(
    path: str,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    compute_dtype: str | None = None,
    remat: str = "none",
    scan_unroll: int = 1,
    overrides: dict[str, Any] | None = None,
) -> Decoder:
    """A HF directory (or hub id) as a Decoder, its weights cast to `dtype` and laid over `mesh`.

    mesh None = all devices along fsdp when there are several. compute_dtype (default `dtype`) is
    that of activations. overrides: keys of its config to change (another RoPE scaling, say).
    Raises ValueError for an unknown family, missing or unexpected tensors, shapes that disagree
    with the config, and pickled or quantised weights.
    """
    for name in (dtype, compute_dtype or dtype):
        _check_dtype(name)
    folder = resolve(path)
    config = _changed(read_config(str(folder)), overrides or {})
    cfg = from_hf(config)
    mesh = make_mesh(MeshSection()) if mesh is None else mesh
    options = dict(compute_dtype=compute_dtype, remat=remat, scan_unroll=scan_unroll)
    graph, state = _blank(cfg, mesh, dtype=dtype, **options)
    weights = dict(nnx.to_flat_state(state))
    keys, found = key_table(cfg), _tensor_files(folder)
    assert {tuple(k.path.split(".")) for k in keys} == set(weights)
    _check_names(folder, cfg, found)
    fused = {k.name: k.rows[1] for k in keys if k.rows}  # the last part ends where the tensor does

    with ExitStack() as stack:
        opened = {f: stack.enter_context(_opened(f)) for f in sorted(set(found.values()))}
        for key in keys:
            variable = weights[tuple(key.path.split("."))]
            like = variable.get_value()
            parts = {name: opened[found[name]].get_slice(name) for name in _names(key, cfg)}
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

            variable.set_value(_place(like, read))
    if (folder / "generation_config.json").is_file():
        config[GENERATION] = _read_json(folder / "generation_config.json")
    return _merged(graph, nnx.from_flat_state(weights), config)


def _merged(graph: Any, state: Any, config: dict[str, Any]) -> Decoder:
    model = nnx.merge(graph, state)
    model.hf_config = json.dumps(config)  # text, so that the model's graph stays hashable
    return model


def blank_model(cfg: TrainConfig, mesh: Mesh, **options: Any) -> Decoder:
    """A run's model with shapes and shardings (ShapeDtypeStruct) in place of weights."""
    shape, config = model_config(cfg)
    graph, state = _blank(shape, mesh, dtype=cfg.model.weight_dtype, **options)
    return _merged(graph, state, config)


def load_model(cfg: TrainConfig, mesh: Mesh, **options: Any) -> Decoder:
    """The model a run starts from: that of `model.path`, or a random one of `model.config`."""
    options |= {"dtype": cfg.model.weight_dtype}
    if cfg.model.path:
        return load_hf(cfg.model.path, mesh=mesh, overrides=cfg.model.overrides, **options)
    shape, config = model_config(cfg)
    graph, state = _blank(shape, mesh, **options)

    def make() -> Any:
        return nnx.to_pure_dict(nnx.state(Decoder(shape, rngs=nnx.Rngs(cfg.seed), **options)))

    lay = jax.tree.map(lambda like: like.sharding, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, jax.jit(make, out_shardings=lay)())
    return _merged(graph, state, config)


# ---- writing


@dataclass(frozen=True)
class Tensor:
    """One HF tensor of a model; `read` gathers it to the host, in the weights' own dtype."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def hf_tensors(model: Decoder) -> Iterator[Tensor]:
    """Every HF tensor of the model, layer by layer; nothing is gathered before `read()`."""
    cfg = model.cfg
    weights = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    groups: dict[str, list[Key]] = {}  # of keys whose weights share a tensor
    for key in key_table(cfg):
        groups.setdefault(key.name, []).append(key)

    def tensor(parts: list[Key], layer: int) -> Tensor:
        arrays = [weights[tuple(k.path.split("."))].get_value() for k in parts]
        shapes = [a.shape[1:] if k.stacked else a.shape for k, a in zip(parts, arrays, strict=True)]
        shapes = [s[::-1] if k.transpose else s for k, s in zip(parts, shapes, strict=True)]

        def read() -> np.ndarray:
            values = [a[layer] if k.stacked else a for k, a in zip(parts, arrays, strict=True)]
            host = jax.device_get(values)
            host = [v.T if k.transpose else v for k, v in zip(parts, host, strict=True)]
            return np.ascontiguousarray(host[0] if len(host) == 1 else np.concatenate(host))

        rows = sum(s[0] for s in shapes)
        return Tensor(parts[0].name.format(i=layer), (rows, *shapes[0][1:]), read)

    for layer in (None, *range(cfg.num_layers)):
        for parts in groups.values():
            if parts[0].stacked == (layer is not None):
                yield tensor(parts, layer or 0)


def _write_file(file: Path, tensors: list[Tensor], dtype: str) -> None:
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
        _write_file(folder / SINGLE, files[0], dtype)
        return
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for name, tensors in zip(names, files, strict=True):
        _write_file(folder / name, tensors, dtype)
    weight_map = {t.name: name for name, ts in zip(names, files, strict=True) for t in ts}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else set(value) if isinstance(value, list) else {value}


def _configs(model: Decoder, dtype: str, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, generation_config.json): the source's, with what changed since.

    The tokenizer decides bos, eos and pad. Every id that ends a text (the config's, the source's
    for generation, the end of a turn) is in the generation config, unless the tokenizer's eos is
    new to the model: then the old ids mean something else.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    config = json.loads(model.hf_config) if model.hf_config else to_hf(model.cfg)
    generation = config.pop(GENERATION, {})
    for key in ("auto_map", "_name_or_path"):  # code that is not copied; a place on this machine
        config.pop(key, None)
    config["architectures"] = [CLASSES[model.cfg.family]]
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype

    # Explicit, since a class default may lie outside a small vocabulary.
    filled, names = normalised(config), ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {k: filled.get(k) for k in names} if model.hf_config else dict.fromkeys(names)
    ends = _ids(ids["eos_token_id"]) | _ids(generation.get("eos_token_id"))
    if tokenizer is not None:
        if tokenizer.eos_token_id not in ends:
            ends = set()
        if tokenizer.eos_token_id not in _ids(ids["eos_token_id"]):
            ids["eos_token_id"] = tokenizer.eos_token_id
        ends |= set(stop_ids(tokenizer))
        ids |= {k: v for k in names[::2] if (v := getattr(tokenizer, k)) is not None}
    size = model.cfg.vocab_size
    ids = {k: v if all(i < size for i in _ids(v)) else None for k, v in ids.items()}
    ends = sorted(i for i in ends if i < size)
    given = {k: v for k, v in ids.items() if v is not None}
    generation |= given | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})
    return config | ids, generation


def _check_target(out: Path) -> None:
    """Raises ValueError unless `out` is new, empty, or holds nothing but a saved model."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; choose another place")
    entries = sorted(out.iterdir())
    strange = [e.name for e in entries if e.is_dir() or not any(map(e.match, OWN_FILES))]
    if strange or (entries and not (out / "config.json").is_file()):
        what = f"holds {strange[0]}" if strange else "is not empty"
        raise ValueError(f"{out} {what}, so it is not replaced; choose another place or empty it")


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
    out = Path(path).expanduser().resolve()
    kept = str(model.embed.embedding[...].dtype) if dtype is None else dtype
    _check_dtype(kept)
    _check_target(out)
    config, generation = _configs(model, kept, tokenizer)
    part, old = (out.with_name(f"{out.name}.{suffix}") for suffix in ("partial", "replaced"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write_weights(model, part, kept, max_shard_bytes)
        if tokenizer is not None:
            save_tokenizer(tokenizer, part)
        _write_json(part / "config.json", config)
        _write_json(part / "generation_config.json", generation)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(part, ignore_errors=True)


def _trained(saves: Any, step: int, like: Any, optim: OptimSection) -> Any:
    """The weights of a checkpoint that are evaluated and exported (see `eval_params`)."""
    if optim.name != "schedule_free_adamw":
        return saves.restore_part(step, {"trainable": like})["trainable"]
    opt_state = jax.eval_shape(make_optimizer(optim, lambda _: 0.0).init, like)
    lay = opt_state_shardings(opt_state, like, jax.tree.map(lambda x: x.sharding, like))
    opt_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), opt_state, lay
    )
    state = saves.restore_part(step, {"trainable": like, "opt_state": opt_state})
    return eval_params(state["opt_state"], state["trainable"])


def save_start(model: Decoder, folder: Path, tokenizer: Any) -> None:
    """Writes what a run is of beside its weights: a HF directory of configs and tokenizer.

    So its checkpoints can be exported when what it started from is gone.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config, generation = _configs(model, str(model.embed.embedding[...].dtype), tokenizer)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    save_tokenizer(tokenizer, folder)


def export(run: str, out: str, dtype: str | None = None, step: int | None = None) -> str:
    """A run as a HF directory, its path returned.

    run: a run folder (its checkpoint `step`, or the newest good one), one checkpoint of it
    (RUN/checkpoints/STEP), or a HF directory (to change the dtype). dtype default: the run's
    `save.dtype`, else the weights' own.
    """
    from jaxllm.checkpoint import Checkpoints
    from jaxllm.config import from_dict, tokenizer_path
    from jaxllm.data.chat import chat_tokenizer

    folder = Path(run).expanduser()
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{run} is no run folder (nor a HF directory): it has no config.json")
    config = _read_json(folder / "config.json")
    if "model_type" in config:
        if step is not None:
            raise ValueError(f"{run} is a HF directory; it has no checkpoint {step}")
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        model = load_hf(str(folder), stored if stored in DTYPES else "float32")
        save_hf(model, out, dtype, load_tokenizer(str(folder)))
        return out
    cfg = from_dict(config)
    if (folder / START).is_dir():
        start = replace(cfg.model, path=str(folder / START), config=None, tokenizer=None)
        cfg = replace(
            cfg, model=replace(start, overrides={}), data=replace(cfg.data, template=None)
        )
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"{run} has no checkpoints/")
    saves = Checkpoints(folder / "checkpoints")
    known = saves.manager.all_steps()
    if step is not None and step not in known:
        there = ", ".join(map(str, known)) or "none"
        raise ValueError(f"{run} has no checkpoint {step}; it has {there}")
    step = saves.latest() if step is None else step
    if step is None:
        raise ValueError(f"{run} has no good checkpoint yet")
    graph, state = nnx.split(blank_model(cfg, make_mesh(MeshSection())))
    nnx.replace_by_pure_dict(state, _trained(saves, step, nnx.to_pure_dict(state), cfg.optim))
    saves.close()
    tokenizer = chat_tokenizer(tokenizer_path(cfg), cfg.data.template)
    save_hf(nnx.merge(graph, state), out, dtype or cfg.save.dtype, tokenizer)
    return out
