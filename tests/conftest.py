# SPDX-License-Identifier: Apache-2.0
"""Eight host devices and no network: set before anything imports jax."""

import os

from runs import DEVICES, project  # noqa: F401, a fixture of every test

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}8"


# runs.py has named a folder for compiled programs. The workers, and the commands that tests start,
# inherit it: what one process compiled, no other compiles again.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_collection_modifyitems(items):
    """Files with whole runs come first: they take longest, and a file stays in one process."""
    long = {item.path for item in items if {"project", "workspace"} & set(item.fixturenames)}
    items.sort(key=lambda item: item.path not in long)
