# SPDX-License-Identifier: Apache-2.0
"""The machine without its devices: memory, versions, disks and the processes of a run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from jaxllm.compilation import BOUNDS, DEFAULT_FOLDER
from jaxllm.doctor.findings import INSTALL, Doing, Fact, Finding, Problem, gib

LOW = 1 << 30  # bytes of a disk or of memory, below which a run is likely to fail
CGROUP = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
# Files of a control group, in version 2 and 1.
LIMITS = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
KILLS = ("memory.events", "memory.oom_control")
SHOWN = ("jax", "jaxlib", "libtpu", "tokamax", "flax", "optax", "orbax-checkpoint", "grain")
SHOWN += ("datasets", "numpy", "transformers", "tokenizers")
# The variables by which launchers tell a process its place, and what each group belongs to.
PLACES = {
    "jaxllm": ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    "Slurm": ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NODELIST"),
    "GKE": ("JOBSET_NAME", "JOB_COMPLETION_INDEX"),
    "TPU": ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "torchrun": ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
}


# ---- memory


def machine() -> Iterator[Finding]:
    yield Fact("host", f"{socket.gethostname()}, {platform.system()} {platform.release()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Fact("processor", f"{_processor()}, {cores} cores")
    total, free = memory()
    yield Fact("memory", f"{gib(total)}, {gib(free)} available")
    if free < LOW:
        yield Problem(
            "out-of-memory",
            f"the machine has {gib(free)} of memory left",
            "end other processes, or use a machine with more memory",
        )
    yield Fact("python", f"{platform.python_version()} in {sys.prefix}")


def _processor() -> str:
    name = None
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def memory() -> tuple[int, int]:
    """(total, available) bytes of memory, within the limit of a container."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = total
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        free = int(found[1]) << 10 if found else total
    for folder in groups():
        for limited, used in LIMITS.items():
            with suppress(OSError, ValueError):  # `max`: there is no limit
                limit = int((folder / limited).read_text())
                free = min(free, limit - _used(folder, used))
                total = min(total, limit)
    return total, max(free, 0)


def _used(folder: Path, file: str) -> int:
    """Bytes that a control group uses, without page cache that the kernel takes back first: data
    that was read or written once stays in it, so it would seem full after every large file."""
    cached = 0
    with suppress(OSError):  # `total_` is that of the groups below, which version 2 always counts
        text = (folder / "memory.stat").read_text()
        found = re.findall(r"^(?:total_)?inactive_file (\d+)", text, re.M)
        cached = max(map(int, found), default=0)
    return max(int((folder / file).read_text()) - cached, 0)


def groups() -> Iterator[Path]:
    """The control groups of this process that may limit its memory, the innermost first: those of a
    container, a Slurm job or a service. Some may not be visible from within a container."""
    with suppress(OSError):
        for line in OWN.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = CGROUP / "memory" if controllers else CGROUP
            folder = root / path.strip("/")
            while folder != root:
                yield folder
                folder = folder.parent
            yield root


def memory_kills() -> int:
    """How many processes the kernel has ended because memory was full, in the innermost control
    group that had any: a run and the command that examines it may be steps of one job."""
    for folder in groups():
        for file in KILLS:
            with suppress(OSError):
                found = re.search(r"^oom_kill (\d+)", (folder / file).read_text(), re.M)
                if found and int(found[1]):
                    return int(found[1])
    return 0


# ---- versions


def _version(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def versions() -> Iterator[Finding]:
    plugins = [
        name
        for dist in metadata.distributions()
        if (name := (dist.name or "").lower()) and re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", name)
    ]
    yield Fact("jaxllm", f"{_version('jaxllm')} in {Path(__file__).parents[1]}")
    named = {name: _version(name) for name in dict.fromkeys((*SHOWN, *sorted(plugins)))}
    yield Fact("packages", ", ".join(f"{name} {v}" for name, v in named.items() if v))
    for name in plugins:
        if named[name] != named["jaxlib"]:
            yield Problem(
                "versions-do-not-fit",
                f"{name} is {named[name]} and jaxlib {named['jaxlib']}, so JAX does not use GPUs",
                INSTALL.format("cuda"),
            )
    yield Doing("importing transformers", 0)
    from transformers.utils.versions import require_version

    needs = _requirements("jaxllm")
    required = [re.sub(r"\[[^]]*\]", "", line) for line in needs.pop("")]
    for requirement in required:
        try:
            require_version(requirement)
        except (ImportError, ValueError) as error:  # ValueError: the package's files are damaged
            yield Problem(
                "versions-do-not-fit",
                f"jaxllm needs {requirement}: {str(error).splitlines()[0]}",
                f"pip install '{requirement}'",
            )
    of_jax = _requirements("jax")
    is_here = {}
    for extra, lines in sorted(needs.items()):
        asked = re.findall(r"\bjax\[(\w+)\]", " ".join(lines))
        lines = [*lines, *(line for one in asked for line in of_jax.get(one, ()))]
        is_here[extra] = all(_version(re.split(r"[^\w.-]", line)[0]) for line in lines)
    for what, wanted in (("extras", True), ("not installed", False)):
        names = ", ".join(extra for extra, here in is_here.items() if here is wanted)
        yield Fact(what, names or "none")


def _requirements(package: str) -> dict[str, list[str]]:
    """The requirements of an installed package by extra; those of the package itself under ""."""
    found: dict[str, list[str]] = {"": []}
    for line in metadata.requires(package) or ():
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
        found.setdefault(extra[1] if extra else "", []).append(requirement.strip())
    return found


# ---- disks


def disks() -> Iterator[Finding]:
    yield Doing("importing huggingface_hub", 0)
    from huggingface_hub import constants, get_token

    own = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    compiled = Path(own or DEFAULT_FOLDER).expanduser()
    places = {
        "this directory": Path.cwd(),
        "temporary files": Path(tempfile.gettempdir()),
        "tokenized data": Path("~/.cache/jaxllm").expanduser(),
        "compiled programs": compiled,
        "models of the hub": Path(constants.HF_HUB_CACHE),
    }
    full: set[int] = set()  # devices that were reported
    for name, folder in places.items():
        yield Doing(f"looking at the disk of {folder}", 0)
        most = f"limited to {gib(BOUNDS['jax_compilation_cache_max_size'])}, "
        yield from disk(name, folder, full, most if folder == compiled and not own else "")
    yield Doing(f"looking at {compiled}", 0)
    if compiled.is_dir():
        info = compiled.stat()
        if info.st_mode & stat.S_IWOTH or info.st_uid not in (0, os.getuid()):
            yield Problem(
                "others-can-write-compiled-programs",
                f"others can write to {compiled}, whose programs are executed",
                f"chmod 700 {compiled}, or set JAX_COMPILATION_CACHE_DIR to a directory of yours",
            )
    endpoint = re.sub(r"//[^/]*@", "//", constants.ENDPOINT)  # without a user and password
    offline = "offline" if constants.HF_HUB_OFFLINE else f"at {endpoint}"
    yield Fact("hub", f"{offline}, {'with' if get_token() else 'without'} a token")


def disk(name: str, folder: Path, full: set[int], more: str = "") -> Iterator[Finding]:
    """The space of the disk that a folder is on, and whether files can be written there.

    full: device numbers of disks that are not reported again; this one is added if it is full.
    more: what else to say of the folder.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    space = shutil.disk_usage(there)
    shown = f"{gib(space.free)} free" if space.total else "unknown space"
    yield Fact(name, f"{folder}, {more}{shown}")
    try:
        with tempfile.TemporaryFile(dir=there) as file:  # a quota is seen by writing alone
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Problem(
            "a-directory-cannot-be-written",
            f"nothing can be written to {there} ({name}): {error.strerror}",
            "free some space or change its permissions, or use another directory",
        )
        return
    device = there.stat().st_dev
    if space.total and space.free < LOW and device not in full:
        full.add(device)
        yield Problem(
            "the-disk-is-full",
            f"{there} ({name}) has {gib(space.free)} left",
            "free some space, or use another directory",
        )


# ---- processes


def processes() -> Iterator[Finding]:
    for launcher, names in PLACES.items():
        if values := [f"{name}={os.environ[name]}" for name in names if name in os.environ]:
            yield Fact(launcher, " ".join(values))
    yield Doing("finding this process's place among those of the run", 0)
    from jaxllm import dist
    from jaxllm.config import ClusterSection
    from jaxllm.errors import UserError

    try:
        address, count, index, _ = dist.place(ClusterSection())
    except UserError as error:
        yield Problem(
            "the-processes-of-a-run-do-not-meet",
            str(error),
            "set all three variables or none of them; `jaxllm launch` and launch/*.sh set them",
        )
        return
    if count <= 1:
        yield Fact("place", "one process, which uses all devices of this machine")
        size = os.environ.get("WORLD_SIZE", "1")
        if size.isdigit() and int(size) > 1:
            yield Problem(
                "started-by-torchrun",
                f"WORLD_SIZE is {size}, which jaxllm does not read: each process would train alone",
                "start one process per machine by `jaxllm launch`, or set "
                + ", ".join(PLACES["jaxllm"]),
            )
        return
    yield Fact("place", f"process {index} of {count}; process 0 is at {address}")
    host = address.rpartition(":")[0].strip("[]")
    yield Doing(f"looking up {host}", 0)
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        yield Problem(
            "the-processes-of-a-run-do-not-meet",
            f"the coordinator's host {host} is unknown here: {error.strerror}",
            "set JAX_COORDINATOR_ADDRESS to a name or address that all machines reach",
        )
