# SPDX-License-Identifier: Apache-2.0
"""JAX's persistent compilation cache: programs that were compiled once are read from disk."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

DIRECTORY = "jax_compilation_cache_dir"
PLACE = "~/.cache/jaxllm/compiled"
# Of the folder PLACE alone: bytes (the least recently used programs go first), and the seconds
# below which a program is not worth a file.
BOUNDS = {
    "jax_compilation_cache_max_size": 2 << 30,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}
_told: dict[str, Any] = {}  # jax.config as the user left it
_set: dict[str, Any] = {}  # jax.config as `use_cache` left it


def use_cache(place: str | None = None) -> None:
    """Turns the cache on, in the directory `place`, or with "off" leaves it off.

    To be called before the first program is compiled. Without `place` a directory already set in
    jax.config is kept unchanged, and PLACE is used where there is none. Our bounds are those of
    PLACE: any other directory is used as it is, and nothing in it is deleted. One that cannot be
    written to is a warning: then programs are compiled each time.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    global _told, _set
    found = {name: getattr(jax.config, name) for name in (DIRECTORY, *BOUNDS)}
    _told = _told if found == _set else found
    _set = dict(_told)
    ours = place is None and _told[DIRECTORY] is None
    if place == "off":
        _set[DIRECTORY] = None
    elif place or ours:
        _set[DIRECTORY] = _prepared(place or PLACE, ours)
    if ours:
        _set |= {k: value for k, value in BOUNDS.items() if k.upper() not in os.environ}
    if _set[DIRECTORY] != found[DIRECTORY]:
        compilation_cache.reset_cache()  # another run of this process used another directory
    for name, value in _set.items():
        jax.config.update(name, value)


def _prepared(place: str, ours: bool) -> str | None:
    """The path of a directory that is there and can be written to; None, and why, if it cannot."""
    folder = Path(place)
    try:
        folder = folder.expanduser().absolute()  # a RuntimeError where nobody has a home folder
        # cached programs are executed, so our folder is private
        folder.mkdir(mode=0o700 if ours else 0o777, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError("it cannot be written to")
        if ours:
            _drop_torn(folder)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        print(f"jaxllm: warning: no compilation cache in {folder}: {why}", file=sys.stderr)
        return None
    return str(folder)


def _drop_torn(folder: Path) -> None:
    """Deletes programs that a killed process did not finish writing.

    Where the size is bounded JAX writes NAME-cache, then NAME-atime; one without the other it can
    neither read, replace nor evict. Those of the last minute may be on their way.
    """
    for file in folder.glob("*-cache"):
        whole = file.with_name(file.name.removesuffix("cache") + "atime").is_file()
        if not whole and file.stat().st_mtime < time.time() - 60:
            file.unlink(missing_ok=True)
