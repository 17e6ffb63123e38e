# SPDX-License-Identifier: Apache-2.0
"""The arguments of `jaxllm doctor`."""

from __future__ import annotations

from jaxllm.arguments import Parser, integer
from jaxllm.config.fields import home
from jaxllm.doctor.sections import examine


def run(parser: Parser, args: list[str]) -> int:
    """Reads the flags of the command and examines; returns the exit status."""
    about = "run folder to examine too"
    parser.flag("run", about, nargs="?", type=home, metavar="RUN")
    about = "seconds to wait for a section, for example for a device that does not answer"
    parser.flag("--limit", about, type=integer(1), default=60, metavar="SECONDS")
    options = parser.read(args)
    return examine(options.run, options.limit)
