# SPDX-License-Identifier: Apache-2.0
"""The run folder: whether a run may use it, its files, and the model that the run started from.

config.json     the resolved config       checkpoints/STEP/   training state
data.json       the data manifest         model/              configs and tokenizer at the start
metrics.jsonl   metrics                   final/              the trained model or adapter
rows.bin        hashes of the rows        starts.jsonl        when the run was started or resumed
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import jax
import xxhash
from flax import nnx

from jaxllm import dist
from jaxllm.checkpoint import Checkpoints, changed_file, list_files
from jaxllm.config import PeftSection, TrainConfig, to_dict
from jaxllm.config.checks import has_results
from jaxllm.config.schema import flat
from jaxllm.errors import UserError
from jaxllm.files import ADAPTER_CONFIG, local_dir
from jaxllm.hf import save_configs
from jaxllm.hub import create_repo
from jaxllm.identity import check_processes_read_the_same, check_same_run, fixed
from jaxllm.lock import LOCK, Lock
from jaxllm.model.decoder import Decoder
from jaxllm.paths import (
    absolute,
    as_path,
    check_bucket,
    delete,
    entries,
    files_in,
    first_line,
    is_bucket,
    make_folder,
    matching,
    naming,
    rename_folder,
    unfinished,
    write_text,
)
from jaxllm.run_folder import is_run_config
from jaxllm.watch import STARTS

START = "model"  # in a run folder: the configs and tokenizer that the run started from
# Packages that must have one version in all processes: what computes, tokenizes and orders rows.
VERSIONS = re.compile(
    "jax|jaxlib|libtpu|(jax-cuda|nvidia-).*|flax|optax|orbax-checkpoint|grain|datasets|numpy|"
    "tokenizers|transformers|jinja2"
)
# Those of them that a report shows; `VERSIONS` also names the many packages of CUDA.
REPORTED = ("jaxllm", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")
REPORTED += ("datasets", "numpy", "tokenizers", "transformers")
NFS_SECONDS = 60.0  # after which a new file on NFS is seen by all hosts (acdirmax)
CLOCK_SKEW = 30.0  # seconds by which the clocks of two processes may differ
SIGNS = {LOCK, STARTS}  # one of them is in the folder of a run that began


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


class RunFolder:
    """The folder of a run.

    Creates it if it does not exist; changes nothing else before `claim`. Raises UserError if it
    has results of another config, naming the keys, or if it is no run folder, and if `overwrite`
    would delete what the run reads. origins: where the values of the config come from, if known.
    """

    def __init__(self, cfg: TrainConfig, origins: Mapping[str, str] | None = None):
        check_processes(cfg)
        self.cfg, self.path, self.origins = cfg, as_path(cfg.output_dir), origins
        check_bucket(self.path)
        if dist.is_main() and not is_bucket(self.path):
            read_config(self.path, cfg.overwrite)  # raises for a folder that is not a run's
            _check_writable(self.path)
            self._lock = Lock.of(self.path)
            for folder in (self.path, *self.path.glob("checkpoints/*")) if self._lock else ():
                for left in unfinished(folder):  # by a run that was killed
                    left.unlink(missing_ok=True)
        config = dist.agree(read_config(self.path, cfg.overwrite) if dist.is_main() else None)
        self.changed: dict[str, Any] = {}  # of the identity; see `latest`
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

    def latest(self, identity: dict[str, Any]) -> int | None:
        """The step of the checkpoint that this run resumes from, None if it starts from step 0.

        Raises UserError if the `identity` of the run is not that of the checkpoint, except for what
        resume_changed names, which becomes `changed`.
        """
        resumes = self.cfg.resume and not self.replaces
        step = dist.agree(self.checkpoints.latest()) if resumes else None
        check_processes_read_the_same(self.cfg, identity, resumed=step is not None)
        if step is not None:
            saved = self.checkpoints.meta(step).get("identity", {})
            accepted = self.cfg.resume_changed
            self.changed = check_same_run(self.path, saved, identity, accepted)
            lines = [f"resume_changed: {name} changed" for name in self.changed]
            if missing := ", ".join(name for name in identity if name not in saved):
                lines.append(
                    f"checkpoint {step} has no record of {missing}; a change since is not noticed"
                )
            dist.say(*lines)
        return step

    def claim(self, state: Any = None) -> None:
        """Writes config.json, and deletes an old run first if this one replaces it.

        Call it after the new run's config, model and data are validated. Raises UserError if a
        process cannot use the folder, if there is no space for a checkpoint of `state`, a pytree of
        arrays or of ShapeDtypeStructs, or if the hub refuses the repository of save.hub.
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
            dist.check_all(_hub_problem(self.cfg) if dist.is_main() else None)

    def note(self, program: Any, step: int, steps: int, tasks: Any) -> dict[str, Any] | None:
        """What STARTS says of this start, after `step` of `steps` steps: the program's devices and
        size, versions, what the run's tasks say of eval.metric, the origins of the config's values,
        and what changed of the run's identity. None if the run is complete."""
        if step >= steps:
            return None
        devices, mesh = program.mesh.devices, program.mesh.shape
        weights = jax.tree.leaves(nnx.state(program.policy))
        found = {
            "step": step,
            "steps": steps,
            "devices": f"{devices.size} x {devices.flat[0].device_kind}",
            "processes": dist.count(),
            "mesh": {axis: size for axis, size in mesh.items() if size > 1},
            "parameters": sum(x.size for x in weights),
            "trainable": sum(x.size for x in jax.tree.leaves(program.state.trainable)),
            "versions": versions(),
        }
        if tasks is not None and tasks.greater is not None:
            found["greater"] = tasks.greater
        if self.origins is not None:
            found["origins"] = {k: o for k, o in self.origins.items() if o != "default"}
        return found | ({"changed": self.changed} if self.changed else {})

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

    def save_start(self, model: Decoder, tokenizer: Any, *, resumed: bool = False) -> None:
        """Writes the configs and the tokenizer, and the config of the adapter that the run starts
        from, so that checkpoints can be exported when those are gone. A resumed run writes them if
        they are damaged or gone."""
        folder = self.path / START
        if not dist.is_main() or (resumed and folder.is_dir() and not changed_file(folder)):
            return
        made = folder if is_bucket(folder) else folder.with_name(f"{START}.new")
        delete(made)
        make_folder(made)
        with naming(made):
            save_configs(model, made, tokenizer)
            if self.cfg.peft.path:
                config = local_dir(self.cfg.peft.path) / ADAPTER_CONFIG
                (made / ADAPTER_CONFIG).write_bytes(config.read_bytes())
        list_files(made, files_in(made), {})
        if made != folder:
            delete(folder)
            rename_folder(made, folder)

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
        if has_results(self.path):
            now = {"config": fixed(to_dict(self.cfg))}
            saved = {"config": fixed(config)}
            check_same_run(self.path, saved, now, self.cfg.resume_changed)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute, tokenize and order rows."""
    found = {"python": platform.python_version()}
    for name in REPORTED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _check_writable(folder: Path) -> None:
    """Raises UserError if nothing can be written to a folder, which may not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(
            f"output_dir {folder} is not writable ({existing}); choose another directory"
        )


def _hub_problem(cfg: TrainConfig) -> str | None:
    """Why final/ cannot be uploaded to save.hub, if it cannot; creates the repository."""
    try:
        if cfg.save.hub:
            create_repo(cfg.save.hub, cfg.save.hub_private)
    except UserError as error:
        return f"save.hub {cfg.save.hub}: {error}"
    return None


def read_config(folder: Path, overwrite: bool = False) -> dict[str, Any] | None:
    """config.json of a run folder; None if no run has begun there. {} if the run has results and
    the file is gone, or is damaged and the run is to be replaced.

    Raises UserError for a file, for a folder with other files, and for a damaged config.json.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; choose another directory")
    names = {entry.name for entry in entries(folder)}
    if names <= {LOCK}:
        return None
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        if is_run_config(config):
            return config
        problem = "it is not the config of a run"  # a HF directory has a config.json too
    except (OSError, ValueError, AttributeError) as error:
        problem = first_line(error)
    if not names & SIGNS:
        raise UserError(
            f"output_dir {folder} has files that are not from a run; choose another directory"
        )
    if not has_results(folder):  # it ended before its first step, as on a full disk
        return None
    if file.exists() and not overwrite:
        raise UserError(
            f"{file} is damaged ({problem}); delete it to resume with the config and the data.date "
            "of before, or start over with --overwrite true"
        )
    return {}


# ---- the model that a run started from


def started_from(cfg: TrainConfig) -> PeftSection:
    """The run's peft section; path is the run's copy of the adapter's config, if there is one."""
    copy = as_path(cfg.output_dir) / START
    saved = cfg.peft.path and not cfg.overwrite and (copy / ADAPTER_CONFIG).is_file()
    if saved and not changed_file(copy):
        return replace(cfg.peft, path=str(copy))
    return cfg.peft
