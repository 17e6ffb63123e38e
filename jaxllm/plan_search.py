# SPDX-License-Identifier: Apache-2.0
"""`jaxllm plan`, and its `--search`: which settings of a run fit the memory and are the fastest.

One key after another: each value of a key is compiled with the best values of the keys before it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from jaxllm.config import TrainConfig, to_dict
from jaxllm.config.schema import from_dict, value_of
from jaxllm.errors import UserError
from jaxllm.plan import plan, prepared, quiet, text
from jaxllm.topologies import Topology, topology

MICRO, TENSOR = (1, 2, 4, 8), (1, 2, 4, 8)
REMAT = ("full", "names", "dots", "none", "offload")


def _micro(cfg: TrainConfig, found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = found["micro_batches"] * found["micro_batch_size"]
    sizes = [n for n in MICRO if rows % n == 0]
    return [{"micro_batch_size": n, "accumulation": 0} for n in sizes]


def _axes(cfg: TrainConfig, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Tensor axes that divide the devices, with all others along fsdp, and the run's own mesh."""
    n, taken = found["devices"], cfg.mesh.context * cfg.mesh.expert
    # {tensor: devices that share the rows}
    rows = {t: n // (t * cfg.mesh.context) for t in TENSOR if n % (t * taken) == 0}
    names = ("mesh.data", "mesh.fsdp", "mesh.tensor")
    sizes = [(1, -1, t) for t, split in rows.items() if cfg.batch_size % split == 0]
    return [dict(zip(names, size, strict=True)) for size in sizes]


# The settings to try, each {key: value}, of a config and its plan.
Values = Callable[[TrainConfig, dict[str, Any]], list[dict[str, Any]]]
CANDIDATES: tuple[Values, ...] = (
    _axes,
    lambda cfg, found: [{"mesh.zero": stage} for stage in (3, 2, 1)],
    lambda cfg, found: [{"model.remat": name} for name in REMAT],
    _micro,
    lambda cfg, found: [{"model.loss_blocks": n} for n in (1, 4, 8)],
    lambda cfg, found: [{"model.mlp_blocks": n} for n in (1, 4, 7, 8)],
)


def run(cfg: TrainConfig, options: Any) -> str:
    """What `jaxllm plan` prints. options: the command's flags."""
    ready = prepared(cfg, options.length)
    with quiet():
        where = topology(options.topology, options.slices)
        found = None if options.search else plan(ready, where)
    if found is not None:
        return json.dumps(found) if options.json else text(found)
    changes, found, table = search(ready, where)
    if options.length is not None:
        changes["data.max_length"] = ready.data.max_length
    Path(options.output).write_text(as_yaml(changed(cfg, changes)), encoding="utf-8")
    if options.json:
        return json.dumps(found | {"settings": changes, "config": options.output})
    return "\n\n".join([table, text(found), f"wrote {options.output}"])


def search(cfg: TrainConfig, where: Topology) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(the best settings {key: value}, their plan, a table of all that were tried).

    The best is the fastest by its bound of those that fit, or else the one that needs least memory.
    All have the global batch of the first one that is valid.
    """
    given = cfg.batch_size
    tried: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def attempt(changes: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal cfg
        name = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in changes.items())
        if name not in tried:
            print(f"plan: {name or 'as given'}", file=sys.stderr, flush=True)
            try:
                with quiet():
                    tried[name] = changes, plan(changed(cfg, changes), where)
            except UserError as error:
                print(f"plan: {name}: {error}", file=sys.stderr, flush=True)
                return None
        found = tried[name][1]
        if not cfg.batch_size:
            cfg = replace(cfg, batch_size=found["batch_size"], accumulation=0)
        return found

    best: dict[str, Any] = {}
    found = attempt(best)
    # What the candidates read, for a config that is not valid on the topology as it is given.
    unknown = {"devices": len(where.devices), "micro_batches": 1, "micro_batch_size": 1}
    for values in [*CANDIDATES, *CANDIDATES]:  # twice: a later key may make room for an earlier one
        options = values(changed(cfg, best), found or unknown)
        for change in options:
            if _is_set(changed(cfg, best), change):
                continue
            here = attempt(best | change)
            if here is not None and (found is None or rank(here) < rank(found)):
                best, found = best | change, here
    if found is None:
        raise UserError(f"{where.name}: no setting that was tried is valid; see the lines above")
    batch = {} if given else {"batch_size": cfg.batch_size, "accumulation": 0}
    return batch | best, found, _ranked(tried)


def rank(found: dict[str, Any]) -> tuple[float, ...]:
    """The order of plans, the best one first: what fits by its bound, then by the time without any
    overlap; the rest by memory."""
    if not found["fits"]:
        return True, found["peak_gib"]
    return False, found["seconds_bound"], sum(found["seconds"].values()), found["peak_gib"]


def _ranked(tried: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> str:
    rows = sorted(tried.items(), key=lambda item: rank(item[1][1]))
    width = max(len(name) for name in (*tried, "as given"))
    lines = [
        f"{'settings':<{width}}  {'peak GiB':>9}  {'fits':<4}  {'bound ms':>9}  {'by':<7}  MFU"
    ]
    for name, (_, found) in rows:
        lines.append(
            f"{name or 'as given':<{width}}  {found['peak_gib']:9.3f}  "
            f"{'yes' if found['fits'] else 'no':<4}  {1000 * found['seconds_bound']:9.1f}  "
            f"{found['bound']:<7}  {found['mfu']:.0%}"
        )
    return "\n".join(lines)


# ---- configs


def changed(cfg: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """The config with {dotted key: value}. Raises UserError for an invalid value."""
    values = to_dict(cfg)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return from_dict(values)


def _is_set(cfg: TrainConfig, changes: dict[str, Any]) -> bool:
    return all(value_of(cfg, key) == value for key, value in changes.items())


def as_yaml(cfg: TrainConfig) -> str:
    """A config file with the keys whose values are not the defaults."""
    values, default = to_dict(cfg), to_dict(TrainConfig())
    given: dict[str, Any] = {"objective": cfg.objective}
    for key, value in values.items():
        if isinstance(default[key], dict):
            value = {k: v for k, v in value.items() if v != default[key][k]}
            if value:
                given[key] = value
        elif value != default[key]:
            given[key] = value
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
