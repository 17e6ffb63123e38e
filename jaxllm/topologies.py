# SPDX-License-Identifier: Apache-2.0
"""Accelerators as numbers, and the devices that `--topology` names, which need not be attached."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxllm.errors import UserError


@dataclass(frozen=True)
class Chip:
    """The figures of one JAX device; bytes/s are in one direction. None: not known here."""

    flops: float
    """peak FLOP/s of dense bfloat16 products, without sparsity"""
    hbm: float | None = None
    """GiB of memory"""
    bandwidth: float | None = None
    """bytes/s of its memory"""
    link: float | None = None
    """bytes/s of one ICI link of a TPU, or of a GPU's NVLink"""
    network: float | None = None
    """bytes/s to other slices or nodes: a device's share of its host's network"""


# TPUs: Google Cloud's pages "TPU v4" to "TPU7x (Ironwood)" give FLOP/s, memory, its bandwidth and
# the bandwidth of all ICI links of a chip, which is divided here by its links (4 in a 2D torus, 6
# in a 3D one) and by 2 directions; `hbm` is what libtpu 0.0.52 lets a program use. Networks: the
# table of "How to Scale Your Model" (jax-ml.github.io/scaling-book). A TPU v2, v3 or 7x chip is two
# devices, which share its links.
V4 = Chip(275e12, 30.75, 1.228e12, 50e9, 6.25e9)
V5E = Chip(197e12, 15.75, 0.819e12, 50e9, 3.125e9)
V5P = Chip(459e12, 95.73, 2.765e12, 100e9, 6.25e9)
V6E = Chip(918e12, 31.24, 1.638e12, 100e9, 12.5e9)
TPU7X = Chip(1153.5e12, 94.74, 3.69e12, 50e9, 6.25e9)
# GPUs: NVIDIA's data sheets of the SXM modules and of GB200 NVL72; `hbm` as nvidia-smi shows it;
# networks: one adapter per GPU, as in DGX A100 (200 Gb/s), H100, H200, B200 and GB200 (400 Gb/s).
A100 = Chip(312e12, 80.0, 2.039e12, 300e9, 25e9)
H100 = Chip(989e12, 79.6, 3.35e12, 450e9, 50e9)
H200 = Chip(989e12, 140.4, 4.8e12, 450e9, 50e9)
B200 = Chip(2250e12, 179.0, 7.7e12, 900e9, 50e9)
GB200 = Chip(2500e12, 185.0, 8e12, 900e9, 50e9)
# No data sheet: an assumption of the right order, so that a plan for a CPU can rank settings.
CPU = Chip(200e9, None, 20e9, 10e9, 1e9)

# By device_kind: the longest name that occurs in it counts.
CHIPS = {
    "TPU v2": Chip(22.5e12),
    "TPU v3": Chip(61.5e12),
    "TPU v4": V4,
    "TPU v4 lite": Chip(138e12),
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "TPU7x": TPU7X,
    "A100": A100,
    "H100": H100,
    "H100 PCIe": Chip(756e12),
    "H100 NVL": Chip(835e12),
    "H200": H200,
    "H200 NVL": Chip(835e12),
    "GH200": Chip(989e12),
    "B200": B200,
    "GB200": GB200,
    "L4": Chip(121e12),
    "L40S": Chip(362e12),
    "A10": Chip(125e12),
    "A10G": Chip(70e12),
    "RTX 4090": Chip(165e12),
    "RTX 5090": Chip(209e12),
}
# Names in --topology: TPUs -> (chip, libtpu's name, its configuration of a chip, dims of a slice).
TPUS = {
    "v4": (V4, "v4", "megacore", 3),
    "v5e": (V5E, "v5e", "default", 2),
    "v5p": (V5P, "v5", "megacore", 3),
    "v6e": (V6E, "v6e", "default", 2),
    "tpu7x": (TPU7X, "tpu7x", "default", 3),
}
GPUS = {"a100": A100, "h100": H100, "h200": H200, "b200": B200, "gb200": GB200}
EXAMPLES = "v5p:4x4x4, v6e:16x16, h100:8x4 (GPUs of a node x nodes), cpu:8 or local"
# Set before libtpu is loaded: it must not look for a TPU, nor for another process that uses one.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def chip_of(device_kind: str) -> Chip | None:
    """The row of CHIPS of a device; None if it is unknown, as of a CPU."""
    names = [name for name in CHIPS if re.search(rf"\b{re.escape(name)}\b", device_kind)]
    return CHIPS[max(names, key=len)] if names else None


@dataclass(frozen=True)
class Topology:
    """The devices of a plan, and how they are connected."""

    name: str
    chip: Chip
    devices: Sequence[Any]
    """JAX devices, of which `device.id` counts from 0 within the topology"""
    size: tuple[int, ...]
    """chips of a slice along each dim of its torus; (GPUs of a node,); () if all are one host"""
    wrap: tuple[bool, ...] = ()
    """True for a dim whose links close a ring"""
    estimate: str = ""
    """why figures are estimates; empty if the chip's own compiler gives its memory"""

    @property
    def imitated(self) -> bool:
        """True if host devices stand in for GPUs."""
        return self.chip is not CPU and self.devices[0].platform == "cpu"

    @cached_property
    def hbm_gib(self) -> float:
        """GiB of memory of a device; on a CPU its share of the machine's."""
        if self.chip.hbm is not None:
            return self.chip.hbm
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / len(self.devices)

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of a device for products in `dtype`: of float32, a GPU has half."""
        is_gpu = not self.wrap and self.chip is not CPU
        return self.chip.flops / (2 if dtype == "float32" and is_gpu else 1)

    def place(self, device: Any) -> tuple[int, tuple[int, ...]]:
        """(slice or node, coordinates within it)."""
        if self.wrap:
            return getattr(device, "slice_index", 0) or 0, tuple(device.coords)
        node = device.id // self.size[0] if self.size else 0
        return node, (device.id,)

    def speed(self, group: Sequence[Any]) -> float:
        """bytes/s at which each device of a group of devices takes part in a ring over them.

        All links along the dims of the torus that the group spans are used, in both directions of a
        closed ring. Several slices or nodes: the slower of the inner links and of the network of
        the group's devices in one of them.
        """
        places = [self.place(device) for device in group]
        nodes = {node for node, _ in places}
        inner = [at for node, at in places if node == places[0][0]]
        link, network = self.chip.link or math.inf, self.chip.network or math.inf
        if self.wrap:
            spans = [len({at[dim] for at in inner}) for dim in range(len(self.wrap))]
            rings = [
                wrap and span == n
                for wrap, span, n in zip(self.wrap, spans, self.size, strict=True)
            ]
            link *= (
                sum(1 + ring for ring, span in zip(rings, spans, strict=True) if span > 1)
                or math.inf
            )
        elif len(inner) == 1:
            link = math.inf
        return min(link, network * len(inner)) if len(nodes) > 1 else link


def topology(text: str, slices: int = 1) -> Topology:
    """The topology that `--topology` names. Raises UserError if there is none, or no libtpu."""
    name, _, sizes = text.lower().partition(":")
    if text == "local":
        return _local()
    known = [*TPUS, *GPUS, "cpu", "local"]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"--topology {text}: unknown chip {name!r}; {hint}")
    dims = TPUS[name][3] if name in TPUS else 2 if "x" in sizes and name != "cpu" else 1
    if not re.fullmatch("x".join([r"[1-9]\d*"] * dims), sizes):
        count = {1: "one number", 2: "two numbers", 3: "three numbers"}[dims]
        raise UserError(f"--topology {text}: {name} takes {count}; write {EXAMPLES}")
    size = tuple(map(int, sizes.split("x")))
    if slices > 1 and name not in TPUS:
        raise UserError(f"--slices {slices} is for TPUs; {text} has no slices, remove it")
    if name in TPUS:
        return _tpu(text, size, slices)
    devices = _cpu_devices(text, math.prod(size))
    if name == "cpu":
        return Topology(text, CPU, devices, ())
    why = f"no compiler for {name} can run here; XLA's CPU compiler made this program for as many"
    return Topology(text, GPUS[name], devices, (size[0],), estimate=f"{why} devices")


def _local() -> Topology:
    import jax

    devices = jax.devices()
    kind, known = devices[0].device_kind, chip_of(devices[0].device_kind)
    chip, limit = known or CPU, (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit:  # what this process may use
        chip = replace(chip, hbm=limit / 2**30)
    estimate = "" if known else f"no figures of {kind} are known; its times are guessed"
    if devices[0].platform == "tpu":
        at = [tuple(device.coords) for device in devices]
        size = tuple(1 + max(dim) - min(dim) for dim in zip(*at, strict=True))
        return Topology(f"local {kind}", chip, devices, size, _wraps(size), estimate)
    return Topology(f"local {kind}", chip, devices, (jax.local_device_count(),), (), estimate)


def _wraps(size: tuple[int, ...]) -> tuple[bool, ...]:
    """True for each dim of a slice whose links wrap around: in 3D all if every dim is a multiple of
    4, in 2D a dim of 16."""
    if len(size) == 3 and size[2] > 1:
        return (all(n % 4 == 0 for n in size),) * 3
    return tuple(n == 16 for n in size)


def _tpu(text: str, size: tuple[int, ...], slices: int) -> Topology:
    chip, name, config, dims = TPUS[text.lower().partition(":")[0]]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {text} needs the TPU compiler; pip install 'jaxllm[plan]'")
    import jax
    from jax.experimental import topologies

    os.environ.update({key: value for key, value in LIBTPU.items() if key not in os.environ})
    jax.config.update("jax_platforms", "cpu")  # this machine's accelerators are not touched
    wrap = (*_wraps(size), *[False] * (3 - dims))
    bounds = tuple(min(2, n) for n in size[:2]) + (1,)
    try:
        devices = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{name}:{'x'.join(map(str, size))}",
            chip_config_name=config,
            chips_per_host_bounds=bounds,
            num_slices=slices,
            wrap=wrap,
        ).devices
    except Exception as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--topology {text}: libtpu has no such slice ({first})") from error
    shown = f"{slices} x {text}" if slices > 1 else text
    return Topology(shown, chip, devices, (*size, 1)[:3], wrap)


def _cpu_devices(text: str, count: int) -> Sequence[Any]:
    """`count` host devices. Raises UserError if this process has started with fewer."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # jax has been used in this process
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology {text}: this process has started with {len(devices)} host devices; use a "
            f"new one, or set XLA_FLAGS=--xla_force_host_platform_device_count={count} before it"
        )
    return devices[:count]
