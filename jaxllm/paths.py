# SPDX-License-Identifier: Apache-2.0
"""Paths of local files and of objects in a bucket (gs://…, s3://…), by one interface: pathlib's.

`as_path` makes them: pathlib.Path for a local path, etils.epath.Path for a bucket, which reads and
writes by fsspec (gcsfs, s3fs). The functions below do what the two do differently. In a bucket an
object is written at once, directories need not be created, and none can be renamed.
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash

from jaxllm.errors import MissingFile, UserError

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> its client, the extra `gcs` or `s3`
PROBE = ".access-"  # prefix of the objects by which processes see whether they can write


def is_bucket(path: Any) -> bool:
    """True for gs://… and s3://…"""
    return str(path).partition("://")[0] in PACKAGES and "://" in str(path)


def hub_id(path: str) -> bool:
    """True if `path` may name a repository on the hub: it has the form OWNER/NAME, and OWNER is no
    local directory (then NAME is more likely a typo)."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and not Path(path).parent.is_dir()


def check_model(path: str) -> None:
    """Raises UserError if a model's path is neither a directory nor may be a hub id. A bucket is
    not asked."""
    folder = as_path(path)
    if not is_bucket(path) and not hub_id(path) and not folder.is_dir():
        is_local = folder.is_absolute() or (folder.parent != Path() and folder.parent.is_dir())
        hub = "" if is_local else ", and not a hub id (OWNER/NAME)"
        raise UserError(f"{path}: no such directory{hub}")


def check_tokenizer(path: str) -> None:
    """Raises MissingFile if a tokenizer's path neither exists nor may be a hub id."""
    if not as_path(path).exists() and not hub_id(path):
        raise MissingFile(
            f"{path}: no such directory, and not a hub id (OWNER/NAME); "
            "`jaxllm tokenizer train FILE … --out DIR` makes a tokenizer"
        )


def as_path(path: str | Path) -> Path:
    """The path of a local file or of an object; `~` is expanded.

    Raises UserError if the client of the bucket is not installed.
    """
    if not is_bucket(path):
        return local_path(path).expanduser()
    scheme = str(path).partition("://")[0]
    if find_spec(PACKAGES[scheme]) is None:
        extra = "gcs" if scheme == "gs" else scheme
        raise UserError(f"{path}: {PACKAGES[scheme]} is missing; pip install 'jaxllm[{extra}]'")
    from etils import epath
    from fsspec.config import conf

    os.environ.setdefault("EPATH_USE_TF", "false")  # it uses TensorFlow where that is installed
    # Listings are cached by default, but other processes and tensorstore write as well.
    for name in ("gcs" if scheme == "gs" else scheme, scheme):
        conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    bucket: Any = epath.Path(path)
    return bucket


def local_path(path: str | Path) -> Path:
    """The path of a local file. Raises UserError for one in a bucket."""
    if is_bucket(path):
        raise UserError(f"{path} is in a bucket, where this is not supported; use the local disk")
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} is not a path: it has a NUL character")
    return Path(path)


def filesystem(path: str | Path) -> Any:
    """fsspec's file system of a bucket."""
    from fsspec.core import url_to_fs

    as_path(path)
    return url_to_fs(str(path))[0]


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_bucket(path: Path) -> None:
    """Raises UserError if a folder in a bucket cannot be written; a local path is not checked."""
    if not is_bucket(path):
        return
    if "/" not in str(path).partition("://")[2].strip("/"):
        raise UserError(f"{path} is a bucket; give a folder in it, such as {path}/NAME")
    probe = path / f"{PROBE}{os.urandom(4).hex()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except Exception as error:  # each client has errors of its own
        raise UserError(f"{path} cannot be written: {first_line(error)}") from error


def absolute(path: Path) -> Path:
    """The absolute path; symbolic links are resolved."""
    return path if is_bucket(path) else path.resolve()


def files_in(folder: Path) -> list[Path]:
    """All files in a directory and its subdirectories, sorted."""
    if not is_bucket(folder):
        return sorted(p for p in folder.rglob("*") if p.is_file())
    fs = filesystem(folder)
    names = (fs.unstrip_protocol(n) for n in fs.find(str(folder)) if not n.endswith("/"))
    return sorted(map(as_path, names))


def matching(pattern: str) -> list[Path]:
    """The files that match a pattern with *, ? or **, sorted."""
    if not is_bucket(pattern):
        return sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    fs = filesystem(pattern)
    found = fs.glob(pattern, detail=True)
    names = (n for n, i in found.items() if i["type"] == "file" and not n.endswith("/"))
    return sorted(as_path(fs.unstrip_protocol(name)) for name in names)


def listed(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """{path: its size, checksum, …} of objects, from listings of their folders."""
    found = {}
    for folder in dict.fromkeys(file.parent for file in files):
        fs = filesystem(folder)
        inside = (info for info in fs.ls(str(folder), detail=True) if info["type"] == "file")
        found |= {fs.unstrip_protocol(info["name"]): info for info in inside}
    return {str(file): found[str(file)] for file in files}


def entries(folder: Path) -> list[Path]:
    """The files and directories in a directory, sorted."""
    # In a bucket, an empty object that some tools make for a folder is listed as the folder itself.
    found = (path for path in folder.iterdir() if path != folder)
    return sorted(path for path in found if not path.name.startswith(PROBE))


def make_folder(folder: Path) -> None:
    """Creates a directory and its parents, if it does not exist."""
    if not is_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def delete(folder: Path) -> None:
    """Deletes a directory, if it exists; in a bucket its objects, or the object of this name."""
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
    # fsspec deletes the bucket as well if all is in it, and takes names for patterns.
    elif names := [glob.escape(str(file)) for file in files_in(folder)]:
        filesystem(folder).rm(names)


def rename_folder(folder: Path, target: Path) -> None:
    """Renames a directory; in a bucket each of its objects, which copies them there."""
    if not is_bucket(folder):
        folder.rename(target)
        return
    fs = filesystem(folder)
    for file in files_in(folder):
        fs.cp_file(str(file), str(target / file.relative_to(folder)))
    delete(folder)


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Gives errors of the system the name of the file, which those of writing lack."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def write_bytes(file: Path, data: bytes) -> None:
    """Replaces a file by `data` at once: a reader sees the old file or the new one."""
    if is_bucket(file):
        file.write_bytes(data)
        return
    new = file.with_name(f"{file.name}.jaxllm-{secrets.token_hex(8)}.new")  # others may write it
    try:
        with naming(file), new.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        new.replace(file)
    except BaseException:  # Ctrl-C too
        new.unlink(missing_ok=True)
        raise


def unfinished(folder: Path) -> list[Path]:
    """The files in a local folder that `write_bytes` writes now, or did when it was killed."""
    return list(folder.glob(f"*.jaxllm-{16 * '[0-9a-f]'}.new"))


def write_text(file: Path, text: str) -> None:
    """Replaces a file by `text` at once, as `write_bytes` does."""
    write_bytes(file, text.encode())


def write_checked(file: Path, value: Any) -> None:
    """Replaces a file by a JSON value and a hash of it, which `read_checked` compares."""
    text = json.dumps(value)
    write_text(file, json.dumps({"xxh3": xxhash.xxh3_64_hexdigest(text.encode()), "value": value}))


def read_checked(file: Path) -> Any:
    """The value that `write_checked` wrote. Raises ValueError if the file is damaged."""
    try:
        saved = json.loads(file.read_bytes())
        if saved["xxh3"] == xxhash.xxh3_64_hexdigest(json.dumps(saved["value"]).encode()):
            return saved["value"]
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{file.name} is damaged")


def file_size(file: Path) -> int:
    """Bytes of a file."""
    stat: Any = file.stat()
    return stat.length if is_bucket(file) else stat.st_size


def modified(file: Path) -> float:
    """Time of the last write, in seconds since 1970."""
    if is_bucket(file):  # epath has no time for S3
        return filesystem(file).modified(str(file)).timestamp()
    return file.stat().st_mtime


def touch(file: Path) -> None:
    """Makes now the time of the last write."""
    if is_bucket(file):
        file.write_bytes(file.read_bytes())
    else:
        os.utime(file)


def version(file: Path) -> str:
    """Text that changes when a file is replaced: its size and time; in a bucket also its ETag or
    generation."""
    if is_bucket(file):
        return filesystem(file).ukey(str(file))
    stat = file.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def copy(source: Path, target: Path) -> None:
    """Copies a file between local disk and bucket. The target appears complete."""
    if is_bucket(source):
        filesystem(source).get_file(str(source), str(target))
    elif is_bucket(target):
        filesystem(target).put_file(str(source), str(target))
    else:
        shutil.copy(source, target)


def local_copy(file: Path, folder: Path) -> Path:
    """`file` if it is local, else a copy of it in the local `folder`."""
    if not is_bucket(file):
        return file
    copy(file, folder / file.name)
    return folder / file.name


def read_bytes(file: Path, ranges: list[tuple[int, int]]) -> list[bytes]:
    """The bytes of a file in each of the ranges (start, end); only these bytes are requested."""
    if is_bucket(file):
        starts, ends = zip(*ranges, strict=True)
        names = [str(file)] * len(ranges)
        return filesystem(file).cat_ranges(names, starts, ends, on_error="raise")
    with file.open("rb") as data:

        def read(start: int, end: int) -> bytes:
            data.seek(start)
            return data.read(end - start)

        return [read(*one) for one in ranges]
