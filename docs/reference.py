# SPDX-License-Identifier: Apache-2.0
"""Generates the key reference at the end of docs/config.md from the config dataclasses.

python docs/reference.py
"""

from __future__ import annotations

from pathlib import Path

from jaxllm.config import SECTIONS, aliases, leaves
from jaxllm.config.describe import kind_of, plain

PAGE = Path(__file__).with_name("config.md")
MARK = "<!-- made by docs/reference.py: do not edit below -->\n"


def reference() -> str:
    """Returns Markdown with one table per section: key, type, default, meaning, HF aliases."""
    others = aliases.spellings()
    lines: list[str] = []
    section = None
    for leaf in leaves().values():
        prefix = leaf.key.rpartition(".")[0]
        if prefix != section:
            section = prefix
            title = f"`{section}`" if section else "The run"
            about = (SECTIONS[section].__doc__ or "") if section else ""
            lines += ["", f"### {title}", "", *([about, ""] if about else [])]
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        default = "" if leaf.default in (None, (), {}) else f"`{plain(leaf.default)}`"
        names = ", ".join(f"`{name}`" for name in others.get(leaf.key, ()))
        also = f" (also {names})" if names else ""
        cells = (f"`{leaf.key}`", kind_of(leaf), default, leaf.doc + also)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(head + MARK + reference(), encoding="utf-8")
