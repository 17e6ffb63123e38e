# SPDX-License-Identifier: Apache-2.0
"""The run folder: whether a run may use it, its files, and the model that the run started from.

config.json     the resolved config       checkpoints/STEP/   training state
data.json       the data manifest         model/              configs and tokenizer at the start
metrics.jsonl   metrics                   final/              the trained model or adapter
rows.bin        hashes of the rows        starts.jsonl        when the run was started or resumed
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from dataclasses import replace
from functools import cached_property
from importlib.metadata import distributions, version
from itertools import zip_longest
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import jax
import xxhash

from jaxllm import dist
from jaxllm.checkpoint import Checkpoints
from jaxllm.config import PeftSection, TrainConfig, to_dict
from jaxllm.config.checks import has_results
from jaxllm.config.schema import flat
from jaxllm.errors import UserError
from jaxllm.files import ADAPTER_CONFIG, local_dir, tensor_files
from jaxllm.hf import save_configs, weights_hash
from jaxllm.model.decoder import Decoder
from jaxllm.paths import (
    absolute,
    as_path,
    check_bucket,
    delete,
    entries,
    files_in,
    is_bucket,
    make_folder,
    matching,
    write_text,
)
from jaxllm.peft.files import find

LOCK = ".lock"  # in a run folder: locked by the process that trains in it
START = "model"  # in a run folder: the configs and tokenizer that the run started from
# Keys that a resumed run may change: data, model and optimizer stay the same. A change of epochs or
# steps changes the rest of the schedule.
FREE = {"output_dir", "overwrite", "resume", "epochs", "steps", "micro_batch_size", "eval_every"}
FREE |= {"model.attention", "model.remat", "model.scan_unroll"}
FREE |= {"model.loss_chunk", "model.loss_blocks", "model.mlp_blocks", "optim.offload"}
FREE |= {"data.workers", "data.cache_dir", "eval.patience", "eval.min_delta"}
FREE |= {"mesh", "cluster", "log", "save"}  # sections
# Packages that must have one version in all processes: what computes, tokenizes and orders rows.
VERSIONS = re.compile(
    "jax|jaxlib|libtpu|(jax-cuda|nvidia-).*|flax|optax|orbax-checkpoint|grain|datasets|numpy|"
    "tokenizers|transformers|jinja2"
)
NFS_SECONDS = 60.0  # after which a new file on NFS is seen by all hosts (acdirmax)
CLOCK_SKEW = 30.0  # seconds by which the clocks of two processes may differ
IDENTITY = ("content", "examples", "tokens")  # fields of a source that must not change on resume


def check_processes(cfg: TrainConfig) -> None:
    """Raises UserError, before anything is loaded, if the processes of the run differ in jaxllm's
    code, the versions of what computes, the devices, the config, or their clocks."""
    if dist.count() == 1:
        return
    code = xxhash.xxh3_64()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    facts: dict[str, Any] = {"jaxllm": f"{version('jaxllm')} ({code.hexdigest()[:8]})"}
    names = {d.name.lower() for d in distributions() if d.name}  # None: its files are damaged
    facts |= {name: version(name) for name in sorted(names) if VERSIONS.fullmatch(name)}
    devices = jax.local_devices()
    facts["devices"] = f"{len(devices)} x {devices[0].device_kind}"
    facts["platform"] = devices[0].client.platform_version  # of CUDA, or of libtpu's build
    config = flat(to_dict(cfg)).items()
    facts |= {key: value for key, value in config if not key.startswith("cluster.")}
    dist.check_same(facts)
    dist.barrier("clock")
    clocks = dist.everyone(time.time())
    slow, fast = (clocks.index(pick(clocks)) for pick in (min, max))
    if clocks[fast] - clocks[slow] > CLOCK_SKEW:
        raise UserError(
            f"the clock of process {slow} is {clocks[fast] - clocks[slow]:.0f} s behind that of "
            f"process {fast}; synchronise them"
        )


def check_processes_read_the_same(
    cfg: TrainConfig, manifest: dict[str, Any], *, resumed: bool = False
) -> None:
    """Raises UserError if the data, the tokenizer, the weights or the reward functions that the run
    reads differ between the processes."""
    if dist.count() == 1:
        return
    sets = [manifest["train"], *manifest["eval"].values()]
    sources = [source for one in sets for source in one["sources"]]
    facts: dict[str, Any] = {f"data {s['path']}": [s[key] for key in IDENTITY] for s in sources}
    facts["the tokenizer"] = manifest["tokenizer"]
    rewards = [Path(name.rpartition(":")[0]) for name in cfg.rl.rewards]
    files = [file for file in (*rewards, Path(cfg.data.template or "")) if file.is_file()]
    facts |= {str(file): xxhash.xxh3_64_hexdigest(file.read_bytes()) for file in files}
    named = [name for name in cfg.rl.rewards if as_path(name).is_dir()]
    if not resumed or cfg.peft.method != "none":  # else the weights are in the checkpoint
        named += filter(None, [cfg.model.path, None if resumed else cfg.peft.path])
    for path in named:
        weights = [f for f in files_in(local_dir(path)) if f.suffix == ".safetensors"]
        facts[path] = weights_hash(weights)
    dist.check_same(facts)


class Lock:
    """A run folder in which no other process can train, until the lock is deleted or the process
    ends, however it ends. All locks of one folder in one process are the same."""

    _held: WeakValueDictionary[Path, Lock] = WeakValueDictionary()

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / LOCK).open("a+")
        try:
            # Of this process alone: a child that outlives it would keep an flock.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read(200).strip() or "another process"
            raise UserError(
                f"{holder} is training in {folder}; wait until it ends, or change output_dir"
            ) from None
        except OSError:  # a file system without locks
            return
        self.file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=self.file, flush=True)

    @classmethod
    def of(cls, folder: Path) -> Lock | None:
        """The lock of a folder; None if nothing can be written there. Raises UserError if another
        process has it."""
        lock = cls._held.get(folder.absolute())
        if lock is None:
            try:
                lock = cls._held[folder.absolute()] = cls(folder)
            except OSError:
                return None
        return lock


class RunFolder:
    """The folder of a run.

    Creates it if it does not exist; changes nothing else before `claim`. Raises UserError if it
    has results of another config, naming the keys, or if it is no run folder, and if `overwrite`
    would delete what the run reads.
    """

    def __init__(self, cfg: TrainConfig):
        check_processes(cfg)
        self.cfg, self.path = cfg, as_path(cfg.output_dir)
        check_bucket(self.path)
        if dist.is_main() and not is_bucket(self.path):
            _read_config(self.path)  # raises for a folder that is not a run's
            self._lock = Lock.of(self.path)
        config = dist.agree(_read_config(self.path) if dist.is_main() else None)
        self.replaces = config is not None and cfg.overwrite  # `claim` deletes an old run
        if config is None:
            self.claim()
        elif self.replaces:
            self._check_overwrite()
        else:
            self._check_resume(config)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints. If the run replaces an old one, call `claim` first."""
        return Checkpoints(self.path / "checkpoints", self.cfg.save.keep)

    def latest(self, manifest: dict[str, Any], origin: dict[str, Any] | None) -> int | None:
        """The step of the checkpoint that this run resumes from, None if it starts from step 0.

        Raises UserError if the data (`manifest`) or `origin` are not those of the checkpoint.
        """
        resumes = self.cfg.resume and not self.replaces
        step = dist.agree(self.checkpoints.latest()) if resumes else None
        check_processes_read_the_same(self.cfg, manifest, resumed=step is not None)
        if step is not None:
            check_same_data(self.path, manifest)
            check_same_origin(self.checkpoints, step, origin)
        return step

    def claim(self, state: Any = None) -> None:
        """Writes config.json, and deletes an old run first if this one replaces it.

        Call it after the new run's config, model and data are validated. Raises UserError if a
        process cannot use the folder, or if there is no space for a checkpoint of `state`, a pytree
        of arrays or of ShapeDtypeStructs.
        """
        if dist.is_main():
            make_folder(self.path)
            # The folder itself stays: it may be a link or a mount.
            for path in entries(self.path) if self.replaces else ():
                if path.name == LOCK:
                    continue
                if is_bucket(path) or (path.is_dir() and not path.is_symlink()):
                    delete(path)
                else:
                    path.unlink()
            write_text(self.path / "config.json", json.dumps(to_dict(self.cfg), indent=2) + "\n")
        dist.barrier("run folder")
        dist.check_all(self._problem())
        if state is not None:
            dist.check_all(self.checkpoints.missing_space(state))

    def _problem(self) -> str | None:
        """Why this process cannot use the folder, if it cannot."""
        until = time.monotonic() + min(self.cfg.cluster.timeout, NFS_SECONDS)
        while not (self.path / "config.json").is_file():
            if time.monotonic() > until:
                return f"output_dir {self.path} is not the folder that process 0 sees; share it"
            time.sleep(1)
        if not is_bucket(self.path) and not os.access(self.path, os.W_OK):
            return f"output_dir {self.path} is not writable"
        return None

    def save_start(self, model: Decoder, tokenizer: Any) -> None:
        """Writes the configs and the tokenizer, and the config of the adapter that the run starts
        from, so that checkpoints can be exported when those are gone."""
        if not dist.is_main():
            return
        folder = self.path / START
        delete(folder)
        make_folder(folder)
        save_configs(model, folder, tokenizer)
        if self.cfg.peft.path:
            config = local_dir(self.cfg.peft.path) / ADAPTER_CONFIG
            (folder / ADAPTER_CONFIG).write_bytes(config.read_bytes())

    def _check_overwrite(self) -> None:
        cfg = self.cfg
        reads = [cfg.model.path, cfg.model.config, cfg.model.tokenizer, cfg.peft.path]
        reads += [cfg.data.template, cfg.data.cache_dir, cfg.log.compile_cache, *cfg.rl.rewards]
        reads += [source.path for source in (*cfg.data.train, *cfg.data.eval)]
        for path in filter(None, reads):
            file = as_path(path)
            files = [file] if file.exists() else matching(str(file))
            if any(absolute(one).is_relative_to(absolute(self.path)) for one in files):
                raise UserError(
                    f"overwrite would delete {path}, which this run reads; change output_dir"
                )

    def _check_resume(self, config: dict[str, Any]) -> None:
        if any((self.path / "checkpoints").glob("[0-9]*")) and not self.cfg.resume:
            raise UserError(f"{self.path} has checkpoints; resume them, or say --overwrite true")
        if not has_results(self.path):
            return
        old, new = _fixed(config), _fixed(to_dict(self.cfg))
        changed = [key for key in new if key in old and new[key] != old[key]]
        if changed:
            keys = "; ".join(f"{k} was {old[k]!r}, is {new[k]!r}" for k in changed[:3])
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{self.path} belongs to another run ({keys}{more}); "
                "change output_dir or say --overwrite true"
            )


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a config that a resumed run must share."""
    return {k: v for k, v in flat(config).items() if not {k, k.partition(".")[0]} & FREE}


def _read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a run folder; None if the folder is missing or empty.

    Raises UserError for a file, and for a folder with other files.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; choose another directory")
    if all(entry.name == LOCK for entry in entries(folder)):
        return None
    try:
        config = json.loads((folder / "config.json").read_text())
        if {"objective", "optim", "data"} <= config.keys():
            return config
    except (OSError, ValueError, AttributeError):
        pass  # a HF directory has a config.json too
    raise UserError(
        f"output_dir {folder} has files that are not from a run; choose another directory"
    )


# ---- the model that a run started from


def started_from(cfg: TrainConfig) -> PeftSection:
    """The run's peft section; path is the run's copy of the adapter's config, if there is one."""
    copy = as_path(cfg.output_dir) / START
    if cfg.peft.path and not cfg.overwrite and (copy / ADAPTER_CONFIG).is_file():
        return replace(cfg.peft, path=str(copy))
    return cfg.peft


def origin(cfg: TrainConfig, *, adapter: bool = False) -> dict[str, Any]:
    """What identifies the model that a run starts from: its path and a hash of its weights, or its
    config and seed. adapter: include the adapter that the run starts from."""
    if not cfg.model.path:
        return {"config": cfg.model.config, "seed": cfg.seed}
    weights = tensor_files(local_dir(cfg.model.path)).values()
    found = {"path": cfg.model.path, "hash": weights_hash(weights)}
    if adapter and cfg.peft.path:
        found["adapter"] = weights_hash([find(cfg.peft.path).weights])
    return found


def check_same_origin(checkpoints: Checkpoints, step: int, origin: dict[str, Any] | None) -> None:
    """Raises UserError if checkpoint `step` was trained from another model than `origin`."""
    saved, now = checkpoints.meta(step).get("base") or {}, origin or {}
    if {key: saved.get(key) for key in now} != now:
        raise UserError(
            f"{checkpoints.directory / str(step)} was trained from another model: {saved}, now "
            f"{now}; restore that model, or change output_dir"
        )


def check_same_data(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError if data.json of a run describes other data than `manifest`."""
    file = folder / "data.json"
    if not file.is_file():
        return
    saved = json.loads(file.read_text())
    before, now = _sources(saved), _sources(manifest)
    changed = []
    for name in before | now:
        for old, new in zip_longest(before.get(name, ()), now.get(name, ())):
            if not old or not new or any(old[key] != new[key] for key in IDENTITY):
                changed.append((new or old)["path"])
    if saved["tokenizer"] != manifest["tokenizer"]:
        changed.append("the tokenizer")
    if changed:
        raise UserError(
            f"{', '.join(dict.fromkeys(changed))} changed since {folder} was started, so resuming "
            "would not be exact; restore the data, or change output_dir"
        )


def _sources(manifest: dict[str, Any]) -> dict[str | None, list[dict[str, Any]]]:
    """The sources of the training data, under None, and of each evaluation set."""
    sets = {None: manifest["train"]} | manifest["eval"]
    return {name: one["sources"] for name, one in sets.items()}
