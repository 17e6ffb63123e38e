# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix, and the exit statuses of a run."""

import difflib
import errno
import re
from collections.abc import Iterable, Sequence
from typing import Any

DONE, BUG, MISTAKE, INTERRUPTED = 0, 1, 2, 130
DIFFERENT = 1  # `jaxllm parity`: the losses differ
STOPPED = 75  # the same command, started again, resumes


class UserError(ValueError):
    """A mistake of the user's.

    The message names the file and line or the key, what was seen and what to do. The command line
    prints it as one line and exits with status 2. Any other exception is a bug and keeps its
    traceback.
    """


class UnknownFlag(UserError):
    """A flag that is not a key of a config."""


class MissingFile(UserError, FileNotFoundError):
    """A file or directory that the user named does not exist."""


def together(errors: Sequence[UserError]) -> UserError:
    """One error that reports all of them, so that they can be fixed at once."""
    if len(errors) == 1:
        return errors[0]
    kind = next((type(error) for error in errors if isinstance(error, UnknownFlag)), UserError)
    listed = "; ".join(f"({i}) {error}" for i, error in enumerate(errors, 1))
    return kind(f"{len(errors)} mistakes: {listed}")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` is a likely misspelling of; None if there is none."""
    if len(word) > LONGEST:  # difflib takes the square of its length
        return None
    return next(iter(difflib.get_close_matches(word, [*known], 1, cutoff=0.7)), None)


LONGEST = 200  # characters of a value in a message
_PART = re.compile(r"(?<!\w)'[^']*'|\S+")  # a quoted value, or a word


def seen(value: Any) -> str:
    """The repr of a value for a message, truncated to LONGEST characters; its closing quote or
    bracket stays."""
    text = repr(value[: LONGEST + 1] if isinstance(value, str) else value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 2]}…{text[-1]}"


def is_panic(error: BaseException | None) -> bool:
    """True for a panic of Rust code; its class, a BaseException, cannot be imported."""
    return type(error).__name__ == "PanicException"


# Modules whose errors come from a bucket: missing credentials, access that is denied, no network.
BUCKET_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google.auth")


def mistake(error: BaseException) -> str | None:
    """The line to print if the user can fix `error`, else None: it is a bug.

    The user can fix a UserError, a path or bucket that is missing or not accessible, a disk that is
    full or read-only, memory that is too small, and what makes the tokenizer panic.
    """
    cause: BaseException | None = error
    while cause is not None:  # libraries wrap the OSError of a full disk
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(cause):
            return (
                f"the disk is full ({_one_line(cause)}); free some space and start again, earlier "
                "checkpoints are kept"
            )
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, UserError):
        return _one_line(error)
    if any(type(e).__module__.startswith(BUCKET_CLIENTS) for e in (error, error.__cause__)):
        return f"the bucket cannot be accessed: {_one_line(error)}"
    if is_panic(error):
        return f"the tokenizer cannot handle its input: {_one_line(error)}"
    if isinstance(error, MemoryError):
        line = _one_line(error)
        return f"the host is out of memory{f' ({line})' if line else ''}; use smaller files"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{_one_line(error)}; write to another directory"
    # A path that is missing, too long, a loop of links, not accessible or on a failing disk.
    is_of_path = isinstance(error, OSError) and error.filename is not None
    return _one_line(error) if is_of_path or isinstance(error, FileNotFoundError) else None


def _one_line(error: BaseException) -> str:
    """The message on one line, in which long values are cut."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error)
    text = _without_long_lists(" ".join(text.split()))
    text = _PART.sub(lambda found: _shortened(found[0]), text)
    return text if len(text) <= 20_000 else f"{text[:15_000]} … {text[-4_000:]}"


def _shortened(part: str) -> str:
    """A part of a message without its middle, if it is long: a path keeps its end."""
    half = LONGEST // 2
    return part if len(part) <= LONGEST else f"{part[:half]}…{part[1 - half :]}"


def _without_long_lists(text: str) -> str:
    """The text with the first LONGEST characters of each list or dict in it."""
    parts, kept, depth, first = [], 0, 0, 0
    for found in re.finditer(r"[\[\]{}]", text):
        if found[0] in "[{":
            first, depth = first if depth else found.start(), depth + 1
        elif depth:
            depth -= 1
            if not depth and found.end() - first > LONGEST:
                parts.append(f"{text[kept : first + LONGEST]}…")
                kept = found.end()
    return "".join(parts) + text[kept:]
