# SPDX-License-Identifier: Apache-2.0
"""Writes the table of every key into docs/config.md, from the fields' own docstrings.

python docs/reference.py
"""

from __future__ import annotations

from pathlib import Path

from jaxllm import aliases
from jaxllm.cli import kind_of
from jaxllm.config import SECTIONS, leaves

PAGE = Path(__file__).with_name("config.md")
MARK = "<!-- made by docs/reference.py: do not edit below -->\n"


def reference() -> str:
    """Markdown: a table a section of each key: type, default, meaning, transformers' name."""
    others: dict[str, list[str]] = {}
    for name, key in aliases.meanings().items():
        others.setdefault(key, []).append(f"`{name}`")
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
        also = f" (also {', '.join(others[leaf.key])})" if leaf.key in others else ""
        cells = (f"`{leaf.key}`", kind_of(leaf), default, leaf.doc + also)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def plain(value: object) -> str:
    """A default as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(head + MARK + reference(), encoding="utf-8")
