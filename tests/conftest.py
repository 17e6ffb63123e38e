# SPDX-License-Identifier: Apache-2.0
"""Eight host devices and no network: set before anything imports jax."""

import os

from runs import DEVICES, project  # noqa: F401, a fixture of every test

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}8"


def pytest_collection_modifyitems(items):
    """The pages' commands come first: they take longest, and no other process can share them."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")
