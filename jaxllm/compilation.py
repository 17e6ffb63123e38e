# SPDX-License-Identifier: Apache-2.0
"""JAX's persistent compilation cache: compiled programs are stored on disk and read again."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxllm.paths import local_path

DIRECTORY = "jax_compilation_cache_dir"
DEFAULT_FOLDER = "~/.cache/jaxllm/compiled"
# Bounds of DEFAULT_FOLDER only: its size in bytes, beyond which the least recently used programs
# are deleted, and the compile time in seconds below which a program is not stored.
BOUNDS = {
    "jax_compilation_cache_max_size": 2 << 30,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}
UNFINISHED_SECONDS = 60  # an incomplete file older than this has no writer any more
_user_settings: dict[str, Any] = {}  # jax.config before the first `use_cache`
_settings: dict[str, Any] = {}  # jax.config after the last `use_cache`


def use_cache(folder: str | None = None) -> None:
    """Enables the cache in `folder`; "off" disables it. Call it before anything compiles.

    Without `folder`, a directory that jax.config already has is kept, else DEFAULT_FOLDER is used.
    Any directory but DEFAULT_FOLDER keeps the user's bounds, and nothing in it is deleted. If the
    directory cannot be written to, a warning is printed and the cache is disabled.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    global _user_settings, _settings
    current = {name: getattr(jax.config, name) for name in (DIRECTORY, *BOUNDS)}
    _user_settings = _user_settings if current == _settings else current
    _settings = dict(_user_settings)
    is_default = folder is None and _user_settings[DIRECTORY] is None
    if folder == "off":
        _settings[DIRECTORY] = None
    elif folder or is_default:
        _settings[DIRECTORY] = _prepared(folder or DEFAULT_FOLDER, is_default)
    if is_default:
        _settings |= {k: value for k, value in BOUNDS.items() if k.upper() not in os.environ}
    if _settings[DIRECTORY] != current[DIRECTORY]:
        compilation_cache.reset_cache()  # an earlier run of this process used another directory
    for name, value in _settings.items():
        jax.config.update(name, value)


def _prepared(path: str, is_default: bool) -> str | None:
    """Absolute path of a writable directory; prints a warning and returns None if it is not."""
    folder = local_path(path)
    try:
        folder = folder.expanduser().absolute()  # RuntimeError without a home directory
        # Cached programs are executed, so the default folder is private.
        folder.mkdir(mode=0o700 if is_default else 0o777, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError("it cannot be written to")
        if is_default:
            _delete_unfinished(folder)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"jaxllm: warning: no compilation cache in {folder}: {reason}", file=sys.stderr)
        return None
    return str(folder)


def _delete_unfinished(folder: Path) -> None:
    """Deletes programs that a killed process did not finish writing.

    With a size bound, JAX writes NAME-cache, then NAME-atime. It can neither read, replace nor
    evict a NAME-cache without NAME-atime. Recent ones may still be in progress.
    """
    for file in folder.glob("*-cache"):
        finished = file.with_name(file.name.removesuffix("cache") + "atime").is_file()
        with suppress(FileNotFoundError):  # another process may delete it first
            if not finished and file.stat().st_mtime < time.time() - UNFINISHED_SECONDS:
                file.unlink()
