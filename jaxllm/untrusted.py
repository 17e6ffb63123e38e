# SPDX-License-Identifier: Apache-2.0
"""Read files that may hold anything: JSON of a bounded size and depth, work of a bounded time.

A model directory, an adapter, a data file or a template is often somebody else's. Whatever it
holds, reading it raises UserError or succeeds, soon and within bounded memory.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from jaxllm.errors import MissingFile, UserError, is_panic, seen
from jaxllm.paths import file_size, is_bucket


class Exceeded(UserError):
    """A template or a pattern takes too long or too much memory."""


class TooManyValues(RecursionError):
    """A value has more than MAX_VALUES parts."""


MAX_FILE = 1 << 26  # bytes of a file that is read whole
# What code raises for values of another type or range than it expects.
ODD = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)
MAX_DEPTH, MAX_VALUES = 100, 1 << 22  # of a JSON or YAML value, repeated aliases counted
MAX_TEXT = 1 << 24  # characters of a conversation, which is tokenized in one piece
SECONDS, GROWTH = 10, 1 << 29  # what a template or a pattern may take; GROWTH in bytes
# JSON's escape of a UTF-16 surrogate. A pair is one character; a lone surrogate is not text.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(file: Path, what: str = "file", limit: int = MAX_FILE) -> str:
    """The text of a file of at most `limit` bytes. Raises UserError unless it is UTF-8.

    what: the name of such a file, for messages.
    """
    if not file.is_file():
        if file.exists():
            raise UserError(f"{file}: a {what} must be a regular file")
        raise MissingFile(f"{file}: no such {what}")
    if (size := file_size(file)) > limit:
        raise UserError(f"{file}: a {what} has at most {limit:,} bytes, seen {size:,}")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error.reason}; a {what} is text") from None


def read_json(file: Path, what: str = "file") -> dict[str, Any]:
    """Reads a JSON object. Raises UserError for anything else, with the line of a syntax error.

    what: as in `read_text`.
    """
    value = parse_json(read_text(file, what), str(file), by_line=True)
    if not isinstance(value, dict):
        raise UserError(f"{file}: the {what} must be a JSON object, seen {seen(value)}")
    return value


def parse_json(
    text: str, location: str, problem: str = "malformed JSON", *, by_line: bool = False
) -> Any:
    """Parse JSON. Raises UserError for malformed JSON and for text with a lone surrogate.

    A value is nested at most MAX_DEPTH deep. by_line: `location` is a file, to which the line of an
    error is added.
    """
    shown = text
    try:
        value = json.loads(text)
        check_extent(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        why = f"{error.msg} at column {error.colno}"
        if by_line:
            location = f"{location}:{error.lineno}"
            shown = text[error.pos : error.pos + 60] or "the end of the file"
    except UnicodeEncodeError as error:
        why = f"{error.object[error.start]!a} is a lone surrogate, which is not a character"
    except (ValueError, RecursionError) as error:
        why = exceeded_limit(error)
    raise UserError(f"{location}: {problem}: {why}; saw {seen(shown)}")


def check_extent(value: Any) -> None:
    """Raises RecursionError if a value is nested too deeply, or TooManyValues if aliases repeat its
    parts too often, for what copies, prints and compares it."""
    level, depth, count = [value], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if count > MAX_VALUES:
            raise TooManyValues
        if depth > MAX_DEPTH:
            raise RecursionError
        containers = [one for one in level if isinstance(one, dict | list)]
        parts = (one.values() if isinstance(one, dict) else one for one in containers)
        level = list(chain.from_iterable(parts))


def exceeded_limit(error: ValueError | RecursionError) -> str:
    """The limit of Python's parser that a JSON text exceeds. The error has no position."""
    if isinstance(error, TooManyValues):
        return f"it has more than {MAX_VALUES:,} values"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"an integer has more than {sys.get_int_max_str_digits()} digits"


def check_regular(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Raises UserError if a file in a directory, by its suffix, is a pipe, a device or a link to
    nothing, which a library would wait for or fail at."""
    for entry in () if is_bucket(folder) else sorted(folder.iterdir()):
        if entry.suffix in suffixes and not entry.is_file():
            raise UserError(f"{entry} is not a regular file; replace or delete it")


@contextmanager
def odd_values(what: str, *also: type[Exception]) -> Iterator[None]:
    """Raises UserError, from the error, if the block fails at values that a file gives.

    also: further classes of errors.
    """
    try:
        yield
    except UserError:
        raise
    except (*ODD, *also) as error:
        reason = str(error).strip()
        if not isinstance(error, (ValueError, *also)):  # of a KeyError only the key
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{what}: {reason}") from error


@contextmanager
def bounded(what: str, *, strict: bool = False) -> Iterator[None]:
    """Raises Exceeded if the block takes more than SECONDS, or memory grows by more than GROWTH.

    Looks at both from half a second on, between two steps of Python, and only in the main thread,
    where Python handles signals and where templates and patterns are evaluated. strict: the kernel
    also refuses more memory, so that no single step takes it. That holds for all threads of the
    process: use it where nothing else runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    too_large = f"{what} takes more than {GROWTH >> 20} MiB of memory"
    began, before = time.monotonic(), _pages()[1]

    def look(*_: Any) -> None:
        if _pages()[1] - before > GROWTH:
            raise Exceeded(too_large)
        if time.monotonic() - began > SECONDS:
            raise Exceeded(f"{what} takes more than {SECONDS} seconds, so it may never end")

    handler = signal.signal(signal.SIGALRM, look)
    timer = signal.setitimer(signal.ITIMER_REAL, 0.5, 0.25)
    try:
        with _address_space(GROWTH) if strict else nullcontext():
            yield
    except MemoryError:
        raise Exceeded(too_large) from None
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # the caller's


def _pages() -> tuple[int, int]:
    """Bytes of this process's address space and of its resident memory; outside Linux (0, the peak
    of the resident memory)."""
    file = Path("/proc/self/statm")
    if not file.is_file():
        unit = 1 if sys.platform == "darwin" else 1024
        return 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    size, resident = (int(n) * resource.getpagesize() for n in file.read_text().split()[:2])
    return size, resident


@contextmanager
def _address_space(growth: int) -> Iterator[None]:
    """Lets the address space of this process grow by at most `growth` bytes; on Linux only."""
    size = _pages()[0]
    if not size:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [n for n in (size + growth, soft, hard) if n != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def rust(what: str) -> Iterator[None]:
    """Raises UserError for an error of Rust code: tokenizers raises bare Exceptions, and a panic is
    a BaseException, which ends a worker process without a message."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error) and type(error) is not Exception:
            raise
        raise UserError(f"{what}: {error}") from error
