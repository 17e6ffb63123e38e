# SPDX-License-Identifier: Apache-2.0
"""Eight host devices and no network: set before anything imports jax.

LLVM is told not to optimise what it compiles: the tests run hundreds of programs once each, and
compiling took most of their time. What jax and XLA do to a program before stays as it is.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
)
