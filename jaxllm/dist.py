# SPDX-License-Identifier: Apache-2.0
"""Processes of a run: how they are connected, who writes, where they meet and what they agree on.

Every write, stop and device-to-host copy of a sharded array goes through here. Small values travel
through jax's coordinator, not through device collectives, so a dead process blocks no device. With
one process each function is a line.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import Counter
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.config import ClusterSection
from jaxllm.errors import UserError
from jaxllm.rendezvous import meet

FOREVER = 7 * 24 * 3600 * 1000  # ms; a process that is gone ends the wait (watch.py)
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

_used: Counter[str] = Counter()  # how often each name of a barrier or a value was used


def start(section: ClusterSection) -> None:
    """Connects this process to the others of its run; does nothing if it is the only one.

    Call it before anything touches a device. The coordinator's address, the number of processes and
    the index of this one are those of `section`, else those of the environment variables VARIABLES,
    else what jax finds out from Slurm, Open MPI or a TPU pod.

    Raises UserError if one of the three is missing, and for the problems of `rendezvous.meet`, and
    JaxRuntimeError if a process is lost while jax connects them.
    """
    if jax.distributed.is_initialized():
        return
    address, processes, index, local_devices = place(section)
    if processes <= 1:
        return
    meet(address, processes, index, section.timeout)
    # It catches SIGTERM, which stops a run here (watch.py).
    jax.config.update("jax_enable_preemption_service", False)
    patience = int(2 * section.timeout) + 60  # watch.py ends a process before jax aborts it
    jax.distributed.initialize(
        address,
        processes,
        index,
        local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(section.timeout), 60),  # all of them have met
        heartbeat_timeout_seconds=patience,
        shutdown_timeout_seconds=30,
    )


def place(section: ClusterSection) -> tuple[str, int, int, Any]:
    """(the coordinator's address, number of processes, index of this one, ids of its devices or
    None for all)."""
    given = (section.coordinator, section.processes, section.process)
    values: list[Any] = [
        os.environ.get(name) if v is None else v for name, v in zip(VARIABLES, given, strict=True)
    ]
    if all(value is None for value in values):
        return _detected(section)
    keys = ("cluster.coordinator", "cluster.processes", "cluster.process")
    named = [f"{key} ({name})" for key, name in zip(keys, VARIABLES, strict=True)]
    if missing := [name for name, value in zip(named, values, strict=True) if value is None]:
        raise UserError(f"a run of several processes needs {' and '.join(missing)} too")
    try:
        processes, index = int(values[1]), int(values[2])
    except ValueError as error:
        raise UserError(f"{' and '.join(named[1:])} must be integers: {error}") from error
    if not 0 <= index < processes:
        raise UserError(f"{named[2]} is {index}; it must be from 0 to {processes - 1}")
    return str(values[0]), processes, index, None


def _detected(section: ClusterSection) -> tuple[str, int, int, Any]:
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() asks

    kinds = [env for env in ClusterEnv._cluster_types if not env.opt_in_only_method]
    if not any(env.is_env_present() for env in kinds):
        return "", 1, 0, None
    detect = ClusterEnv.auto_detect_unset_distributed_params
    address, processes, index, devices = detect(None, None, None, None, None, int(section.timeout))
    return address or "", processes or 1, index or 0, devices


def count() -> int:
    """Number of processes. Like `index`, it touches no device if there is one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Index of this process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_main() -> bool:
    """True in the process that writes files and prints."""
    return index() == 0


def say(*lines: str) -> None:
    """Prints lines for the user on stderr, once for all processes."""
    for line in lines if is_main() else ():
        print(line, file=sys.stderr, flush=True)


def client() -> Any:
    """jax's client of the coordinator: a key-value store and barriers."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def coordinator_answers() -> bool:
    """True if something listens at the coordinator's address."""
    from jax._src.distributed import global_state

    host, _, port = str(global_state.coordinator_address).rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _key(name: str) -> str:
    _used[name] += 1
    return f"jaxllm/{name}/{_used[name]}"


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of this name."""
    if count() > 1:
        client().wait_at_barrier(_key(name), FOREVER)


def agree(value: Any) -> Any:
    """The value of the main process, which JSON can hold, in every process."""
    if count() == 1:
        return value
    store, key = client(), _key("agree")
    if is_main():
        store.key_value_set(key, json.dumps(value))
    return json.loads(store.blocking_key_value_get(key, FOREVER))


def everyone(value: Any, name: str = "value", to: int | None = None) -> list[Any]:
    """The values of all processes, which JSON can hold, in the order of their index.

    All processes must call it in the same order; a `name` has an order of its own. to: the process
    that gets the values; the others get []. Default: every process gets them.
    """
    if count() == 1:
        return [value]
    store, key = client(), _key(name)
    store.key_value_set(f"{key}/{index()}", json.dumps(value))
    store.wait_at_barrier(f"{key}/barrier", FOREVER)
    if _used[name] > 1:  # every process has read the values of the call before
        store.key_value_delete(f"jaxllm/{name}/{_used[name] - 1}/{index()}")
    if to not in (None, index()):
        return []
    found = {int(k.rpartition("/")[2]): v for k, v in store.key_value_dir_get(f"{key}/")}
    return [json.loads(found[process]) for process in range(count())]


def check_same(facts: dict[str, Any]) -> None:
    """Raises UserError in every process if a fact differs between them, naming the odd ones.

    A fact is odd if it is not the most frequent value (of two processes: not that of process 0).
    """
    hosts = everyone((socket.gethostname(), facts))
    problems = []
    for name in facts:
        seen = [json.dumps(theirs.get(name), sort_keys=True) for _, theirs in hosts]
        usual = Counter(seen).most_common(1)[0][0]
        odd = [i for i, value in enumerate(seen) if value != usual]
        problems += [
            f"process {i} ({hosts[i][0]}) has {name} {seen[i]}, the others {usual}" for i in odd[:3]
        ]
    if problems:
        raise UserError(f"the processes differ: {'; '.join(problems)}; make them the same")


def check_all(problem: str | None) -> None:
    """Raises UserError in every process if one of them has a problem."""
    found = everyone((socket.gethostname(), problem))
    lines = [f"process {i} ({host}): {text}" for i, (host, text) in enumerate(found) if text]
    if lines:
        raise UserError(lines[0] if count() > 1 else problem)


def gather(tree: Any, to: int | None = None) -> Any:
    """A pytree of (sharded) jax.Arrays as complete NumPy arrays on the host.

    Every process must call it. to: the process that gets the arrays; the others get None, which
    saves their copy to the host. Default: every process gets them.
    """
    if count() == 1:
        return jax.device_get(tree)
    arrays = jax.tree.map(_replicated, tree)
    return None if to not in (None, index()) else jax.tree.map(np.asarray, arrays)


def _replicated(x: Any) -> Any:
    """The array, or its copy on this process's devices if parts of it are elsewhere."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if not x.is_fully_replicated:
        assert isinstance(x.sharding, NamedSharding)
        x = _replicate(x.sharding.mesh)(x)
    return x.addressable_data(0)


@cache
def _replicate(mesh: Any) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
