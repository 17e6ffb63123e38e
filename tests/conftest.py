# SPDX-License-Identifier: Apache-2.0
"""Eight host devices and no network: set before anything imports jax."""

import os

from runs import ENV, project  # noqa: F401, a fixture of every test

os.environ.update(ENV)


def pytest_collection_modifyitems(items):
    """Files with whole runs come first: they take longest, and a file stays in one process."""
    long = {item.path for item in items if {"project", "workspace"} & set(item.fixturenames)}
    items.sort(key=lambda item: item.path not in long)
