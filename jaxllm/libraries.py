# SPDX-License-Identifier: Apache-2.0
"""What other libraries do in a process that is a command's own."""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


class _NoTorch(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


def hide_torch() -> None:
    """Makes this process unable to import torch. transformers, datasets and tensorboardX import it
    where it is installed, which takes seconds and hundreds of MiB."""
    sys.meta_path[:] = [_NoTorch if f is PathFinder else f for f in sys.meta_path]


def log_once() -> None:
    """Lets huggingface_hub print its messages itself only: absl, which Orbax imports, gives the
    root logger a handler, which would print them again."""
    logging.getLogger("huggingface_hub").propagate = False
