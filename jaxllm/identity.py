# SPDX-License-Identifier: Apache-2.0
"""The identity of a run: what a resumed run must share with the run that it resumes.

{name: value or {part: value}}. The names are those of IDENTITY, and `config`, which has the keys of
the config that are not in FREE. Files are represented by hashes. Each checkpoint saves the identity
that it was trained with.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import xxhash

from jaxllm import dist
from jaxllm.config import TrainConfig, to_dict
from jaxllm.config.checks import IDENTITY
from jaxllm.config.schema import flat
from jaxllm.data.cache import Cache
from jaxllm.data.sources import content_hash
from jaxllm.errors import UserError
from jaxllm.files import local_dir, tensor_files
from jaxllm.hf import weights_hash
from jaxllm.hf_config import GENERATION
from jaxllm.paths import as_path, files_in
from jaxllm.peft.files import find, is_adapter, with_base

# Keys that a resumed run may change: data, model and optimizer stay the same. A change of epochs or
# steps changes the rest of the schedule.
FREE = {"output_dir", "overwrite", "resume", "resume_changed", "epochs", "steps"}
FREE |= {"micro_batch_size", "eval_every", "model.attention", "model.remat", "model.scan_unroll"}
FREE |= {"model.loss_chunk", "model.loss_blocks", "model.mlp_blocks", "optim.offload"}
FREE |= {"data.workers", "data.cache_dir", "eval.patience", "eval.min_delta"}
FREE |= {"eval.tasks", "eval.tasks_limit", "eval.tasks_path"}
FREE |= {"mesh", "cluster", "log", "save"}  # sections
# Their values are shown in an error, since they are not hashes.
SHOWN = ("config", "model_config", "generation_config", "own_objective")


def fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a config that a resumed run must share."""
    return {k: v for k, v in flat(config).items() if not {k, k.partition(".")[0]} & FREE}


def identity(
    cfg: TrainConfig,
    tokenizer: Any,
    manifest: dict[str, Any],
    hf_config: dict[str, Any],
    weights: dict[str, Any],
    own_objective: str | None = None,
) -> dict[str, Any]:
    """The identity of a run, the same after a round trip through JSON.

    manifest: of its data (`Data`). weights: `base_weights`, {} if a checkpoint has all weights.
    own_objective: the name of the function that replaces the loss, if one does.
    """
    config = dict(hf_config)
    generation = config.pop(GENERATION, {})
    chat = cfg.verb.data != "text"
    sources = (source for one in manifest["eval"].values() for source in one["sources"])
    found = {
        "config": fixed(to_dict(cfg)),
        "data": _data(manifest["train"]["sources"]),
        "eval": _data(sources),
        "tokenizer": manifest["tokenizer"],
        "template": _hash(tokenizer.chat_template) if chat else None,
        "model_config": config,
        "generation_config": generation,
        "weights": weights,
        "own_objective": own_objective,
        "rewards": {name: _reward(name, cfg) for name in cfg.rl.rewards},
    }
    return json.loads(json.dumps(found))


def _hash(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _data(sources: Iterable[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for source in sources:  # a path may be there twice
        values = [source[key] for key in ("content", "examples", "tokens")]
        found.setdefault(source["path"], []).append(values)
    return found


def base_weights(cfg: TrainConfig, *, adapter: bool = False) -> dict[str, Any]:
    """Hashes of the weights that a run starts from: all bytes of the files, which are read once
    (`Cache.hash_of`), or the seed of random ones. adapter: include peft.path.

    All processes call it, and each reads some of the files.
    """
    if not cfg.model.path:
        return {"model.config": f"random, seed {cfg.seed}"}
    files = {"model.path": list(tensor_files(local_dir(cfg.model.path)).values())}
    if adapter and cfg.peft.path:
        files["peft.path"] = [find(cfg.peft.path).weights]
    return {name: _weights(some, cfg) for name, some in files.items()}


def _weights(files: Iterable[Path], cfg: TrainConfig) -> str:
    cache, files = Cache(cfg.data.cache_dir), sorted(set(files))
    mine = files[dist.index() :: dist.count()]
    parts = dist.everyone({file.name: cache.hash_of(file) for file in mine})
    return _hash({name: digest for part in parts for name, digest in part.items()})


def _reward(name: str, cfg: TrainConfig) -> str | None:
    """A hash of a reward: of a model's files and its base's, or of a function's file and the
    modules next to it that it imports. None if there is no such file."""
    module, colon, _ = name.rpartition(":")
    if not colon or as_path(name).is_dir():
        parts = []
        for folder in [name, with_base(name, None)[0]] if is_adapter(name) else [name]:
            files = files_in(local_dir(folder))
            texts = content_hash(f for f in files if f.suffix in (".json", ".jinja", ".txt"))
            weights = (file for file in files if file.suffix == ".safetensors")
            parts.append([texts, _weights(weights, cfg)])
        return _hash(parts)
    files = _function_files(module)
    return content_hash(files) if files else None


def _with_imports(file: Path, root: Path) -> list[Path]:
    """A Python file and the modules under `root` that it imports, directly or not. Nothing is
    run; a file that is missing or no Python has no imports, and is reported when it is imported."""
    found: set[Path] = set()
    todo = [file]
    while todo:
        path = todo.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        with suppress(SyntaxError, ValueError):
            for node in ast.walk(ast.parse(path.read_bytes())):
                for folder, name in _imported(node, path, root):
                    place = folder.joinpath(*name.split("."))
                    todo += [place.with_name(f"{place.name}.py"), place / "__init__.py"]
    return sorted(found)


def _imported(node: ast.AST, file: Path, root: Path) -> Iterator[tuple[Path, str]]:
    """(folder, dotted name) of each module that an import statement of `file` may name."""
    if isinstance(node, ast.Import):
        names, folder = [alias.name for alias in node.names], root
    elif isinstance(node, ast.ImportFrom):
        folder = file.parents[node.level - 1] if node.level else root
        parts = [[node.module, alias.name] for alias in node.names]
        names = [".".join(filter(None, part)) for part in parts] + [node.module or ""]
    else:
        return
    for name in filter(None, names):
        parents = name.split(".")
        yield from ((folder, ".".join(parents[: n + 1])) for n in range(len(parents)))


def _function_files(module: str) -> list[Path]:
    """The files that a reward function's source is in; none if there is no such module."""
    if module.endswith(".py"):
        file = Path(module).expanduser()
        return _with_imports(file, file.parent)
    path: Any = [os.getcwd(), *sys.path]
    for name in module.split("."):
        spec = PathFinder.find_spec(name, path)  # does not import it
        if spec is None:
            return []
        path = spec.submodule_search_locations or []
    if not spec.origin:
        return []
    file = Path(spec.origin)
    if "site-packages" in file.parts:  # of an installed package
        return [file]
    depth = module.count(".") + (file.name == "__init__.py")
    return _with_imports(file, file.parents[depth])


# ---- comparing


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """{"NAME PART" or "NAME": value}; a key of the config is its own name."""
    values: dict[str, Any] = {}
    for name, value in found.items():
        start = "" if name == "config" else f"{name} "
        parts = {start + part: v for part, v in value.items()} if isinstance(value, dict) else None
        values |= {name: value} if parts is None else parts
    return values


def check_same_run(
    folder: Path,
    saved: dict[str, Any],
    now: dict[str, Any],
    accepted: Iterable[str] = (),
    *,
    resumes: bool = True,
) -> dict[str, Any]:
    """{name: [before, now]} of what differs between two identities and is `accepted`.

    Names that only one of them has are not compared. Raises UserError if something differs that is
    not accepted. resumes: the error says how to resume all the same.
    """
    both = [name for name in now if name in saved]
    old, new = (_flat({name: one[name] for name in both}) for one in (saved, now))
    names = dict.fromkeys([*new, *old])
    of_config = saved.get("config", {}).keys() & now.get("config", {}).keys()  # versions add keys
    names = [n for n in names if n in of_config or n.partition(" ")[0] in IDENTITY]
    changed = {n: [old.get(n), new.get(n)] for n in names if old.get(n) != new.get(n)}
    refused = [n for n in changed if not {n, n.partition(" ")[0]} & {*accepted}]
    if not refused:
        return changed
    shown = {*of_config, *(n for n in refused if n.partition(" ")[0] in SHOWN)}
    texts = [
        f"{n} was {changed[n][0]!r}, is {changed[n][1]!r}" if n in shown else f"{n} changed since"
        for n in refused
    ]
    more = f"; and {len(texts) - 3} more" if len(texts) > 3 else ""
    accept = " ".join(dict.fromkeys(n.partition(" ")[0] for n in refused))
    ways = f", change output_dir, say --overwrite true, or resume with --resume_changed {accept}"
    raise UserError(
        f"{folder} belongs to another run ({'; '.join(texts[:3])}{more}); restore what it had"
        f"{ways if resumes else ''}"
    )


def check_processes_read_the_same(
    cfg: TrainConfig, found: dict[str, Any], *, resumed: bool = False
) -> None:
    """Raises UserError if the identity of the run (`found`), or samples of the weights that they
    read, differ between the processes."""
    if dist.count() == 1:
        return
    named = [name for name in cfg.rl.rewards if as_path(name).is_dir()]
    if not resumed or cfg.peft.method != "none":  # else the weights are in the checkpoint
        named += filter(None, [cfg.model.path, None if resumed else cfg.peft.path])
    samples = {}
    for path in named:
        weights = [f for f in files_in(local_dir(path)) if f.suffix == ".safetensors"]
        samples[path] = weights_hash(weights)
    dist.check_same(_flat(found) | samples)
