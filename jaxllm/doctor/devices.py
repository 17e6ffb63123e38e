# SPDX-License-Identifier: Apache-2.0
"""The devices, and the kernels that run on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from jaxllm.doctor.findings import INSTALL, Doing, Fact, Finding, Problem, gib

QUERY = "--query-gpu=index,memory.used,memory.total,driver_version"
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_ALLOCATOR")
BUSY = 0.5  # of a GPU's memory in use by others, above which a run is likely to fail


def devices() -> Iterator[Finding]:
    for name in VARIABLES:
        if value := os.environ.get(name):
            yield Fact(name, value)
    yield from _gpus()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a run may need the memory
    yield Doing("importing jax", 0)
    import jax
    from jax._src import hardware_utils as hardware  # what jax itself looks for

    asked = os.environ.get("JAX_PLATFORMS")
    yield Doing(f"starting JAX's backend{f' (JAX_PLATFORMS={asked})' if asked else ''}", 0)
    began = time.monotonic()
    try:
        found = jax.local_devices()  # those of other machines of a pod cannot be asked
    except RuntimeError as error:
        yield Problem(
            "jax-finds-no-device",
            f"JAX's backend does not start: {' '.join(str(error).split())[:300]}",
            "see whether another process uses the devices; correct JAX_PLATFORMS or unset it; "
            "install the extra of the accelerator: cuda or tpu",
        )
        return
    kinds = Counter((device.platform, device.device_kind) for device in found)
    for (platform, kind), count in kinds.items():
        memory = next(d for d in found if d.device_kind == kind).memory_stats() or {}
        size = f", {gib(memory['bytes_limit'])} each" if "bytes_limit" in memory else ""
        yield Fact(
            platform, f"{count} x {kind}{size}, ready after {time.monotonic() - began:.1f} s"
        )
    there = {
        "an NVIDIA GPU": ("cuda", hardware.has_visible_nvidia_gpu()),
        "a TPU": ("tpu", hardware.num_available_tpu_chips_and_device_id()[0] > 0),
    }
    for what, (extra, is_there) in there.items():
        if is_there and {platform for platform, _ in kinds} == {"cpu"} and asked != "cpu":
            yield Problem(
                "the-accelerator-is-not-used",
                f"this machine has {what}, but JAX runs on the CPU",
                INSTALL.format(extra),
            )
    yield from _kernels()


def _gpus() -> Iterator[Finding]:
    """The driver and the free memory of NVIDIA GPUs, before JAX takes any."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return
    yield Doing("asking nvidia-smi", 0)
    command = [program, QUERY, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        yield Problem(
            "jax-finds-no-device",
            f"nvidia-smi fails: {' '.join((done.stdout + done.stderr).split())[:200]}",
            "install the driver again, or start the container with the GPUs (docker --gpus all)",
        )
        return
    driver = ""
    for line in done.stdout.splitlines():
        with suppress(ValueError):  # [N/A]
            index, used, total, driver = (part.strip() for part in line.split(","))
            if float(used) > BUSY * float(total):
                yield Problem(
                    "another-process-uses-the-gpu",
                    f"GPU {index}: {gib(float(used) * 2**20)} of {gib(float(total) * 2**20)} are "
                    "in use",
                    "end the process that `nvidia-smi` shows, or choose others by "
                    "CUDA_VISIBLE_DEVICES",
                )
    yield Fact("driver", driver)


def _kernels() -> Iterator[Finding]:
    yield Doing("importing the kernels", 0)
    from jaxllm.config import MeshSection
    from jaxllm.mesh import make_mesh
    from jaxllm.ops.chosen import chosen

    for what, (kernel, why) in chosen(make_mesh(MeshSection())).items():
        yield Fact(what, kernel + (f" ({why})" if why else ""))
        if why.startswith("tokamax "):
            yield Problem(
                "attention-runs-a-slower-kernel",
                f"{what} runs {kernel}: {why}",
                INSTALL.format("cuda"),
            )
