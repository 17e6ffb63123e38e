# SPDX-License-Identifier: Apache-2.0
"""What a section of `jaxllm doctor` reports, one after another."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = "docs/troubleshooting.md"
# A remedy: an extra is installed from the checkout, as in docs/install.md.
INSTALL = "in the checkout of jaxllm: pip install -e '.[{}]' -c constraints.txt"


@dataclass(frozen=True)
class Problem:
    """Something that is wrong."""

    entry: str
    """its heading in PAGE, as the anchor of a link"""
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.seen}\n     {self.remedy}\n     {PAGE}#{self.entry}"


@dataclass(frozen=True)
class Fact:
    """A line to print: a name and a value."""

    name: str
    value: str


@dataclass(frozen=True)
class Doing:
    """What the section does next, and the seconds that it may take."""

    what: str
    seconds: float


@dataclass(frozen=True)
class Next:
    """A command that the user may type now, and what it does."""

    what: str
    command: str


@dataclass(frozen=True)
class Mistake:
    """The user's mistake: the message of a UserError."""

    message: str


Finding = Problem | Fact | Doing | Next | Mistake
KINDS: dict[str, type] = {kind.__name__: kind for kind in (Problem, Fact, Doing, Next, Mistake)}


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB below a tenth."""
    return f"{size / 2**30:,.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:,.1f} MiB"
