# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix."""


class UserError(ValueError):
    """A mistake of the user's.

    The message names the file and line or the key, what was seen and what to do. The command line
    prints it as one line and exits with status 2. Any other exception is a bug and keeps its
    traceback.
    """


class MissingFile(UserError, FileNotFoundError):
    """A file or directory that the user named does not exist."""
