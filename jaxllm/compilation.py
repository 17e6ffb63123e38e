# SPDX-License-Identifier: Apache-2.0
"""JAX's persistent compilation cache: programs that were compiled once are read from disk."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

DIRECTORY = "jax_compilation_cache_dir"
PLACE = "~/.cache/jaxllm/compiled"
SIZE = 2 << 30  # bytes; the least recently used programs go first
QUICK = 0.1  # seconds: what compiles faster is not worth a file


def use_cache(place: str | None = None) -> None:
    """Turns the cache on, in the directory `place` (default: PLACE), or with "off" leaves it off.

    To be called before the first program is compiled. A directory that JAX was told already, by
    JAX_COMPILATION_CACHE_DIR say, stays with its own bounds unless `place` is given. One that
    cannot be written to is a warning: then programs are compiled each time.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def use(folder: Path | None) -> None:
        value = None if folder is None else str(folder)
        if getattr(jax.config, DIRECTORY) != value:
            compilation_cache.reset_cache()  # another run of this process used another directory
            jax.config.update(DIRECTORY, value)

    if place is None and getattr(jax.config, DIRECTORY):
        return
    if place == "off":
        return use(None)
    folder = Path(place or PLACE).expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # its files are run: nobody else's
        (folder / ".lockfile").touch()
        _drop_torn(folder)
    except OSError as error:
        use(None)
        why = error.strerror or error
        print(f"jaxllm: warning: no compilation cache in {folder}: {why}", file=sys.stderr)
        return
    use(folder)
    for name, value in (
        ("jax_compilation_cache_max_size", SIZE),
        ("jax_persistent_cache_min_compile_time_secs", QUICK),
    ):
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _drop_torn(folder: Path) -> None:
    """Deletes programs that a killed process did not finish writing.

    JAX writes NAME-cache, then NAME-atime; one without the other it can neither read, replace nor
    evict. Those of the last minute may be on their way.
    """
    for file in folder.glob("*-cache"):
        whole = file.with_name(file.name.removesuffix("cache") + "atime").is_file()
        if not whole and file.stat().st_mtime < time.time() - 60:
            file.unlink(missing_ok=True)
