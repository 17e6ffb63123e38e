# SPDX-License-Identifier: Apache-2.0
"""`jaxllm launch`: starts a run on several processes with one of the files in launchers/.

Those files set the environment of a process and decide when a run restarts; nothing else. This
module fills them in and submits them with the scheduler's own client (sbatch, kubectl, gcloud).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config import VERBS, TrainConfig, load_config
from jaxllm.config.loading import read_yaml
from jaxllm.config.schema import value_of
from jaxllm.errors import UnknownFlag, UserError
from jaxllm.paths import PACKAGES, hub_id

FILES = Path(__file__).parent / "launchers"
PLACES = ("local", "slurm", "gke", "tpu-vm")
USAGE = (
    "jaxllm launch [COMMAND] CONFIG.yaml [--section.key value ...] --on WHERE ...\n"
    "       jaxllm launch eval --model DIR ... --on WHERE ...\n\n"
    "All arguments except the following belong to the run. COMMAND (sft, dpo, ...) is needed if\n"
    "the config does not state its `objective`."
)
CLIENTS = {  # and one of their options
    "slurm": "sbatch go into --options='--partition=gpu'",
    "gke": "kubectl go into --options='--namespace=team'",
    "tpu-vm": "gcloud go into --options='--zone=ZONE'",
}
CONFIG = "/etc/jaxllm/config.yaml"  # in a container
TPU = "google.com/tpu"


@dataclass(frozen=True)
class Launch:
    """Where a run is launched: the flags of `jaxllm launch`."""

    on: str
    nodes: int | None = None
    """processes of the run, one per node; None: 1, on a TPU VM its workers"""
    name: str | None = None
    """name of the job, or of the TPU VM; None: that of the config file"""
    options: str = ""
    """options of sbatch, kubectl or gcloud, as one text"""
    dry_run: bool = False
    image: str | None = None
    resource: str | None = None
    """NAME=COUNT: the accelerators of a node of a GKE cluster"""
    select: tuple[str, ...] = ()
    """KEY=VALUE: labels of the nodes of a GKE cluster"""
    volume: str | None = None
    """CLAIM:/PATH: a persistent volume claim of a GKE cluster that all containers mount"""
    slices: int = 1
    """TPU slices that the nodes of a GKE cluster belong to"""


def launch(words: list[str], to: Launch) -> None:
    """Starts, or with `dry_run` prints, the run of `words`: [COMMAND] CONFIG [--key value …], or
    eval [--flag value …].

    A run on this machine replaces this process. Raises UserError for a mistake in the config,
    before anything is submitted, and if the scheduler's client is missing or fails. The flags of an
    evaluation are read where it runs, which has its files.
    """
    path, cfg = None, None
    if words[:1] != ["eval"]:
        path, cfg, words = _training(words, to)
    name = to.name or re.sub("[^a-z0-9]+", "-", Path(path or "eval").stem.lower()).strip("-")
    here = [sys.executable, "-P", "-m", "jaxllm", *words]
    options = shlex.split(to.options)
    manifest = None
    if to.on == "local":
        commands = [["bash", str(FILES / "local.sh"), str(to.nodes or 1), *here]]
    elif to.on == "slurm":
        flags = [f"--nodes={to.nodes or 1}", f"--job-name={name}", *options]
        commands = [["sbatch", *flags, str(FILES / "slurm.sbatch"), *here]]
    elif to.on == "tpu-vm":
        commands = _tpu_vm(to, options, path, words)
    else:
        commands = [["kubectl", "apply", *options, "-f", "-"]]
        manifest = _manifest(to, name, cfg, path, words)
    if to.on in ("gke", "tpu-vm") and cfg and (relative := _relative_paths(cfg)):
        warning = f"warning: {', '.join(relative)}: relative paths, which the workers do not have; "
        print(f"jaxllm: {warning}use gs://… or a path that is mounted on all", file=sys.stderr)
    if to.dry_run:
        print(manifest or "\n".join(map(shlex.join, commands)))
        return
    for command in commands:
        _call(command, manifest)


def _training(words: list[str], to: Launch) -> tuple[str, TrainConfig, list[str]]:
    """(config file, config, words with the command first) of a run; a config may state its
    `objective`."""
    verb, rest = (words[0], words[1:]) if words[:1] and words[0] in VERBS else (None, words)
    if not rest or rest[0].startswith("-"):
        raise UserError("no config; write `jaxllm launch [COMMAND] CONFIG.yaml --on WHERE`")
    path, *args = rest
    stated = {one.name: one.value for one in read_yaml(path)}
    verb = verb or stated.get("objective")
    if verb is None:
        raise UserError(
            f"{path} does not state its objective; write the command of the run before it, "
            f"`jaxllm launch sft {path} …`"
        )
    try:
        cfg, _ = load_config(verb, path, args)
    except UnknownFlag as error:
        more = f"; options of {CLIENTS[to.on]}" if to.on in CLIENTS else ""
        raise UserError(f"{error}{more}") from None
    if to.on != "local" and (cfg.overwrite or not cfg.resume):
        raise UserError(
            "--overwrite and --no-resume would act again at each restart; delete "
            f"{cfg.output_dir} yourself, or choose another output_dir"
        )
    return path, cfg, [verb, path, *args]


def _relative_paths(cfg: TrainConfig) -> list[str]:
    """`KEY PATH` of each path of a run that is relative and no hub id."""
    keys = ("model.path", "model.config", "model.tokenizer", "peft.path")
    named = [(key, value_of(cfg, key)) for key in keys]
    named += [("data.train", one.path) for one in cfg.data.train]
    named += [("data.eval", one.path) for one in cfg.data.eval]
    named = [(key, path) for key, path in named if path and not hub_id(path.partition(":")[0])]
    named += [("output_dir", cfg.output_dir), ("data.cache_dir", cfg.data.cache_dir or "/")]
    fixed = ("/", "tfds:", *(f"{scheme}://" for scheme in PACKAGES))
    return [f"{key} {path}" for key, path in named if not path.startswith(fixed)]


def _call(command: list[str], text: str | None) -> None:
    program = command[0]
    if shutil.which(program) is None:
        raise UserError(
            f"{program} is not on PATH, so nothing was submitted; run the same command where it is "
            "installed, or add --dry-run to print what it would be given"
        )
    if text is None and program == "bash":
        sys.stdout.flush()
        os.execvp(program, command)  # signals reach it, and its status is this one's
    done = subprocess.run(command, input=text, text=True, check=False)
    if done.returncode:
        raise UserError(f"{program} failed with status {done.returncode}; its message is above")


def _tpu_vm(to: Launch, options: list[str], path: str | None, words: list[str]) -> list[list[str]]:
    """Copies the config, if any, and the script to all workers, and starts it there in the
    background."""
    if to.name is None:
        raise UserError("--on tpu-vm needs --name, the name of the TPU VM")
    if to.nodes is not None:
        raise UserError(
            "--nodes is not used with --on tpu-vm, which runs on all workers; remove it"
        )
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    everywhere = ["--worker=all", *options]
    script = FILES / "tpu-vm.sh"
    words = [words[0], Path(path).name, *words[2:]] if path else words
    run = shlex.join(["bash", script.name, "python3", "-m", "jaxllm", *words])
    start = f"nohup {run} >>jaxllm.log 2>&1 </dev/null &"
    return [
        [*gcloud, "scp", str(script), *([path] if path else []), f"{to.name}:", *everywhere],
        [*gcloud, "ssh", to.name, *everywhere, "--command", start],
    ]


def _manifest(
    to: Launch, name: str, cfg: TrainConfig | None, path: str | None, words: list[str]
) -> str:
    """The filled launchers/gke-jobset.yaml."""
    import yaml

    nodes = to.nodes or 1
    if to.image is None:
        raise UserError("--on gke needs --image, a container image with jaxllm")
    if nodes % to.slices:
        raise UserError(f"--nodes {nodes} is not a multiple of --slices {to.slices}")
    if not re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(f"--name: {name!r}; must be up to 40 of a-z, 0-9 and -, from a letter on")
    claim, _, mount = (to.volume or "").partition(":")
    if to.volume and not (claim and mount.startswith("/")):
        raise UserError(f"--volume: {to.volume!r}; must be CLAIM:/PATH")
    out = Path(cfg.output_dir) if cfg and "://" not in cfg.output_dir else None
    if out and not (mount and out.is_relative_to(mount)):
        raise UserError(
            f"output_dir {out} would be lost with its container; put it in a bucket, or "
            "on a volume: --volume CLAIM:/PATH --output_dir /PATH/…"
        )
    limits = dict([_pair("--resource", to.resource)]) if to.resource else {}
    settings, jobset = yaml.safe_load_all((FILES / "gke-jobset.yaml").read_text())
    settings["metadata"]["name"] = jobset["metadata"]["name"] = name
    settings["data"]["config.yaml"] = Path(path).read_text() if path else ""
    if TPU not in limits:
        del jobset["metadata"]["annotations"]
    (group,) = jobset["spec"]["replicatedJobs"]
    group["replicas"] = to.slices
    job = group["template"]["spec"]
    job["parallelism"] = job["completions"] = nodes // to.slices
    pod = job["template"]["spec"]
    pod["nodeSelector"] = dict(_pair("--select", text) for text in to.select)
    pod["volumes"][0]["configMap"]["name"] = name
    (container,) = pod["containers"]
    container["image"] = to.image
    container["args"] = ["jaxllm", *([words[0], CONFIG, *words[2:]] if path else words)]
    container["resources"]["limits"] = limits
    first = f"{name}-{group['name']}-0-0.{name}"  # host name of the first container
    values: dict[str, Any] = {one["name"]: one for one in container["env"]}
    values["JAX_COORDINATOR_ADDRESS"]["value"] = f"{first}:8476"
    values["JAX_NUM_PROCESSES"]["value"] = str(nodes)
    values["SLICE_NODES"]["value"] = str(nodes // to.slices)
    if to.volume:
        container["volumeMounts"].append({"name": "data", "mountPath": mount})
        pod["volumes"].append({"name": "data", "persistentVolumeClaim": {"claimName": claim}})
    return _yaml([settings, jobset])


def _yaml(documents: list[Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else None  # the lines of the config stay lines
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)

    Dumper.add_representer(str, text)
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=100)


def _pair(flag: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise UserError(f"{flag}: {text!r}; must be NAME=VALUE")
    return key, value
