# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix, and the exit statuses of a run."""

import difflib
import errno
from collections.abc import Iterable, Sequence

DONE, BUG, MISTAKE, INTERRUPTED = 0, 1, 2, 130
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
    return next(iter(difflib.get_close_matches(word, [*known], 1, cutoff=0.7)), None)


# Errors of a path that a user can fix.
PATH_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
PATH_ERRORS += (PermissionError,)
# Modules whose errors come from a bucket: missing credentials, access that is denied, no network.
BUCKET_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google.auth")


def mistake(error: BaseException) -> str | None:
    """The line to print if the user can fix `error`, else None: it is a bug.

    The user can fix a UserError, a path or bucket that is missing or not accessible, and a disk
    that is full or read-only.
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
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return f"{_one_line(error)}; write to another directory"
    return _one_line(error) if isinstance(error, PATH_ERRORS) else None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
