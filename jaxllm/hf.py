# SPDX-License-Identifier: Apache-2.0
"""HuggingFace directories in and out, streamed: safetensors <-> sharded arrays.

Each device's shard is read from the file by its own slices, so host memory holds one shard of one
weight at a time, never the model.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.config import MeshSection, TrainConfig
from jaxllm.mesh import axes_of, make_mesh, param_sharding
from jaxllm.model.config import ModelConfig
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import Key, from_hf, key_table

INDEX = "model.safetensors.index.json"
HARMLESS = ("rotary_emb.inv_freq", "masked_bias")  # buffers that old files carry


def resolve(path: str) -> Path:
    """A directory as it is; anything else is a hub id and is fetched (or found in the hub's cache)."""
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ValueError(f"{path} is not a directory (nor a hub id like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    files = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt"]
    try:
        return Path(snapshot_download(path, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a directory here, nor could the hub be asked: {reason}") from None


def read_config(path: str) -> dict[str, Any]:
    """The config.json of a directory, hub id, or the JSON file itself."""
    file = Path(path) if Path(path).is_file() else resolve(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file.parent} has no config.json; it is no HuggingFace model directory")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: {error.msg}") from None


def _tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor name: its file}. Raises ValueError where there is no safetensors file."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        mapping = json.loads((folder / INDEX).read_text())["weight_map"]
        files = {name: folder / file for name, file in mapping.items()}
        if missing := sorted({str(f) for f in files.values() if not f.is_file()}):
            raise ValueError(f"{folder / INDEX} names {missing[0]}, which is not there")
        return files
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            files |= {name: file for name in opened.keys()}
    if files:
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]} is a pickle, which can run code and is not read. Convert it where "
            "you trust it: python -c \"from transformers import AutoModelForCausalLM as A; "
            f"A.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise ValueError(f"{folder} has no *.safetensors file")


def _check_names(folder: Path, keys: list[Key], layers: int, found: dict[str, Path], tied: bool) -> None:
    wanted = {k.name.format(i=i) for k in keys for i in range(layers if "{i}" in k.name else 1)}
    missing = sorted(wanted - set(found))
    spare = {n for n in set(found) - wanted if not n.endswith(HARMLESS)}
    spare -= {"lm_head.weight"} if tied else set()
    if missing or spare:
        what = [f"lacks {len(missing)} tensors ({', '.join(missing[:3])} …)"] if missing else []
        what += [f"has {len(spare)} not known ({', '.join(sorted(spare)[:3])} …)"] if spare else []
        raise ValueError(f"{folder}: for its config the checkpoint {' and '.join(what)}")


def _read(opened: dict[Path, Any], file: Path, key: Key, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Our [in, out] (or [out]) slice of one HF tensor, read from disk as that slice alone."""
    part = opened[file].get_slice(name)
    index = index[::-1] if key.transpose else index
    if key.rows is not None:
        start, stop, _ = index[0].indices(key.rows[1] - key.rows[0])
        index = (slice(key.rows[0] + start, key.rows[0] + stop), *index[1:])
    value = part[index]
    return value.T if key.transpose else value


def load_hf(
    path: str,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    compute_dtype: str | None = None,
    remat: str = "none",
    scan_unroll: int = 1,
) -> Decoder:
    """A HF directory (or hub id) as a Decoder, its weights cast to `dtype` and laid over `mesh`.

    mesh None = all devices along fsdp when there are several. compute_dtype (default `dtype`) is
    that of activations. Raises ValueError for an unknown family, missing or unknown tensors,
    shapes that disagree with the config, and pickled weights.
    """
    from safetensors import safe_open

    folder = resolve(path)
    config = read_config(path)
    cfg = from_hf(config)
    mesh = make_mesh(MeshSection()) if mesh is None else mesh
    options = dict(dtype=dtype, compute_dtype=compute_dtype, remat=remat, scan_unroll=scan_unroll)
    abstract = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), **options))
    graph, state = nnx.split(abstract)
    weights = dict(nnx.to_flat_state(state))
    found, keys = _tensor_files(folder), key_table(cfg)
    _check_names(folder, keys, cfg.num_layers, found, cfg.tie_embeddings)

    with ExitStack() as stack:
        opened = {f: stack.enter_context(safe_open(f, framework="np")) for f in set(found.values())}
        for key in keys:
            variable = weights[tuple(key.path.split("."))]
            shape = variable.get_value().shape
            stacked = key.path.startswith("layers.")
            _check_shape(opened[found[key.name.format(i=0)]], key, shape[1:] if stacked else shape)

            def read(index, key=key, shape=shape, stacked=stacked) -> np.ndarray:
                if not stacked:
                    return _read(opened, found[key.name], key, key.name, index).astype(dtype)
                sizes = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
                out = np.empty(sizes, jnp.dtype(dtype))
                for place, i in enumerate(range(*index[0].indices(shape[0]))):
                    name = key.name.format(i=i)
                    out[place] = _read(opened, found[name], key, name, index[1:])
                return out

            sharding = param_sharding(mesh, axes_of(variable), shape)
            variable.set_value(jax.make_array_from_callback(shape, sharding, read))
    model = nnx.merge(graph, nnx.from_flat_state(weights))
    model.hf_config = nnx.static(config)
    return model


def _check_shape(opened: Any, key: Key, shape: tuple[int, ...]) -> None:
    name = key.name.format(i=0)
    seen = tuple(opened.get_slice(name).get_shape())
    want = shape[::-1] if key.transpose else shape
    if seen[1:] != want[1:] or (key.rows is None and seen != want) or (key.rows and seen[0] < key.rows[1]):
        raise ValueError(f"{name} has shape {seen}; the config asks for {want}")


def load_model(cfg: TrainConfig, mesh: Mesh, **options: Any) -> Decoder:
    """The model a run starts from: `model.path`'s weights, or random ones of `model.config`'s shape."""
    dtype = cfg.model.weight_dtype
    if cfg.model.path:
        return load_hf(cfg.model.path, dtype, mesh, **options)
    assert cfg.model.config is not None
    config = read_config(cfg.model.config) | cfg.model.overrides
    shape = from_hf(config)

    def make() -> Decoder:
        return Decoder(shape, rngs=nnx.Rngs(cfg.seed), dtype=dtype, **options)

    graph, abstract = nnx.split(nnx.eval_shape(make))
    lay = jax.tree.map(
        lambda v: v.replace(param_sharding(mesh, axes_of(v), v.get_value().shape)),
        abstract,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    arrays = jax.jit(lambda: nnx.to_pure_dict(nnx.state(make())), out_shardings=nnx.to_pure_dict(lay))()
    nnx.replace_by_pure_dict(abstract, arrays)
    model = nnx.merge(graph, abstract)
    model.hf_config = nnx.static(config)
    return model


def save_hf(
    model: Decoder,
    path: str,
    dtype: str | None = None,
    tokenizer: Any = None,
    *,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Writes a HF directory that transformers and vLLM load: weights, configs, tokenizer.

    `dtype` default: the weights' own. Tied weights are written once. The directory appears whole or
    not at all; one that already holds a model is replaced, any other content refused (ValueError).
    """
    out = Path(path)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").exists())):
        raise ValueError(f"{out} exists and is no model directory; choose another place")
    part = out.with_name(out.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        kept = str(model.embed.embedding[...].dtype) if dtype is None else dtype
        _write_tensors(model, part, jnp.dtype(kept), max_shard_bytes)
        config = dict(model.hf_config) | {"dtype": kept}
        config.pop("torch_dtype", None)
        config.setdefault("architectures", [architecture(config["model_type"])])
        generation = {}
        if tokenizer is not None:
            from jaxllm.tokenizer import stop_ids

            tokenizer.save_pretrained(part)
            ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
            config |= ids | {"eos_token_id": tokenizer.eos_token_id}
            generation = ids | {"eos_token_id": sorted(stop_ids(tokenizer))}
            generation = {k: v for k, v in generation.items() if v not in (None, [])}
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (part / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def architecture(model_type: str) -> str:
    """The transformers class that loads a family as a language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return NAMES[model_type]


def _tensors(model: Decoder, dtype: Any):
    """(name, how to get it, bytes) of every HF tensor, a layer at a time, nothing gathered yet."""
    cfg: ModelConfig = model.cfg
    weights = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))

    def host(key: Key, i: int) -> np.ndarray:
        value = weights[tuple(key.path.split("."))].get_value()
        value = value[i] if key.path.startswith("layers.") else value
        array = np.asarray(jax.device_get(value)).astype(dtype)
        return array.T if key.transpose else array

    keys = key_table(cfg)
    for layer in (None, *range(cfg.num_layers)):
        group = [k for k in keys if ("{i}" in k.name) == (layer is not None)]
        group.sort(key=lambda k: (k.name, k.rows or (0, 0)))
        for name, parts in groupby(group, key=lambda k: k.name):
            whole = list(parts)
            size = sum(_elements(weights, k) for k in whole) * jnp.dtype(dtype).itemsize
            yield name.format(i=layer), [(k, layer or 0) for k in whole], host, size


def _elements(weights: dict[Any, Any], key: Key) -> int:
    shape = weights[tuple(key.path.split("."))].get_value().shape
    return int(np.prod(shape[1:] if key.path.startswith("layers.") else shape))


def _write_tensors(model: Decoder, folder: Path, dtype: Any, limit: int) -> None:
    from safetensors.numpy import save_file

    shards: list[list[Any]] = [[]]
    used = total = 0
    for item in _tensors(model, dtype):
        if shards[-1] and used + item[3] > limit:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used, total = used + item[3], total + item[3]
    mapping: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: np.ascontiguousarray(np.concatenate([host(k, i) for k, i in parts], 0))
            for name, parts, host, _ in shard
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        mapping |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": mapping}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def export(run: str, out: str, dtype: str | None = None, step: int | None = None) -> str:
    """A run folder's model as a HF directory: of checkpoint `step`, or the newest good one."""
    from jaxllm.checkpoint import Checkpoints
    from jaxllm.config import from_dict
    from jaxllm.tokenizer import load_tokenizer

    folder = Path(run)
    if not (folder / "config.json").is_file() or not (folder / "checkpoints").is_dir():
        raise ValueError(f"{run} is no run folder (it has no config.json and checkpoints/)")
    cfg = from_dict(json.loads((folder / "config.json").read_text()))
    saves = Checkpoints(folder / "checkpoints")
    step = saves.latest() if step is None else step
    if step is None:
        raise ValueError(f"{run} has no good checkpoint yet")
    mesh = make_mesh(MeshSection())
    config = read_config(cfg.model.path or str(cfg.model.config)) | cfg.model.overrides
    shape = from_hf(config)
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0), dtype=cfg.model.weight_dtype))
    )
    like = jax.tree.map(
        lambda v: v.replace(
            jax.ShapeDtypeStruct(
                v.get_value().shape,
                v.get_value().dtype,
                sharding=param_sharding(mesh, axes_of(v), v.get_value().shape),
            )
        ),
        abstract,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    arrays = saves.restore_weights(step, nnx.to_pure_dict(like))
    saves.close()
    nnx.replace_by_pure_dict(abstract, arrays)
    model = nnx.merge(graph, abstract)
    model.hf_config = nnx.static(config)
    source = cfg.model.tokenizer or cfg.model.path or str(cfg.model.config)
    save_hf(model, out, dtype or cfg.save.dtype, load_tokenizer(source))
    return out
