# SPDX-License-Identifier: Apache-2.0
"""The one error that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can fix, raised by jaxllm and by nothing else.

    The message names the file and line or the key, what was seen and what to do; the command line
    prints it as one line and exits with status 2. Any other exception is a bug and keeps its
    traceback.
    """
