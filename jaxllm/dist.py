# SPDX-License-Identifier: Apache-2.0
"""Processes of a run: which one writes, barriers, and values that all agree on.

Every write, stop and device-to-host copy of a sharded array goes through this file, so that only it
and the loader need to change for several processes. With one process each function is one line.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxllm.errors import UserError


def count() -> int:
    """Number of processes."""
    return jax.process_count()


def is_main() -> bool:
    """True in the process that writes files and prints."""
    return jax.process_index() == 0


def check_supported() -> None:
    """Raises UserError under several processes: stopping and saving together is not built yet."""
    if count() > 1:
        raise UserError(
            f"this is one of {count()} processes, but a run uses a single process for now; start "
            "it without jax.distributed, and it uses all devices of its host"
        )


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier of this name."""
    assert count() == 1, f"barrier {name} is not built for several processes"


def agree(value: Any) -> Any:
    """The value of the main process, in every process."""
    assert count() == 1, "agree is not built for several processes"
    return value


def any_process(flag: bool) -> bool:
    """True if the flag is set in any process."""
    assert count() == 1, "any_process is not built for several processes"
    return flag


def gather(tree: Any) -> Any:
    """A pytree of (sharded) jax.Arrays as complete NumPy arrays on the host."""
    assert count() == 1, "gather is not built for several processes"
    return jax.device_get(tree)
