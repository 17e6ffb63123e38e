# SPDX-License-Identifier: Apache-2.0
"""Builds a corpus from the Python standard library: text from its source, chats from docstrings.

    python demo/stdlib.py OUT [--every K]

writes:

    OUT/text/{train,heldout}/MODULE.txt     source code of each module
    OUT/chat/{train,heldout}.jsonl          conversations: what a function does, how to call it
    OUT/chat/{pairs,heldout-pairs}.jsonl    a question, its answer, the same words reversed

Modules are split by their position in the sorted list and functions by a hash of their names, so
the same Python version gives the same files. Sources are parsed, never imported.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import itertools
import json
import shutil
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

# Excluded: tests, bundled wheels, generated tables and third-party packages.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "ensurepip", "encodings", "lib2to3"}
EACH, SIZE = 15, range(4_000, 20_000)  # one in 15 of the modules of this length is held out
SHARE = 0.04  # fraction of functions held out


def modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of every pure-Python module of the standard library, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts) and not any("-" in part for part in parts):
            name = ".".join(parts).removesuffix(".__init__")
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few old files use another encoding


def functions(module: str, source: str) -> Iterator[tuple[str, str, str]]:
    """(dotted name, signature, first paragraph of the docstring) of each public function."""
    if any(part.startswith("_") for part in module.split(".")):
        return

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str, str]]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, name)
            elif paragraph := first_paragraph(ast.get_docstring(node) or ""):
                yield name, f"{node.name}({ast.unparse(node.args)})", paragraph

    yield from visit(ast.parse(source).body, module)


def first_paragraph(docstring: str) -> str:
    """The docstring up to its first blank line, on one line; "" if that is not a sentence."""
    text = " ".join(docstring.strip().split("\n\n")[0].split())
    return text if 20 <= len(text) <= 400 and " " in text else ""


def chat(name: str, call: str, paragraph: str) -> dict[str, object]:
    """A conversation with two questions, answered by the docstring and the signature."""
    return {
        "messages": [
            {"role": "user", "content": f"What does {name} do?"},
            {"role": "assistant", "content": paragraph},
            {"role": "user", "content": "How is it called?"},
            {"role": "assistant", "content": textwrap.shorten(call, 200, placeholder=" …")},
        ]
    }


def pair(name: str, paragraph: str) -> dict[str, str]:
    """A preference pair: the docstring, and the same words in reverse order."""
    backwards = " ".join(reversed(paragraph.split()))
    return {"question": f"What does {name} do?", "chosen": paragraph, "rejected": backwards}


def build(out: Path, every: int = 1) -> dict[str, int]:
    """Writes the corpus of every `every`-th module to `out` and returns counts of its contents."""
    counts = {"modules": 0, "characters": 0, "chats": 0, "held-out modules": 0, "held-out chats": 0}
    seen: set[str] = set()
    shutil.rmtree(out / "text", ignore_errors=True)
    for part in ("train", "heldout"):
        (out / "text" / part).mkdir(parents=True)
    (out / "chat").mkdir(exist_ok=True)
    names = ("train", "heldout", "pairs", "heldout-pairs")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((out / "chat" / f"{n}.jsonl").open("w")) for n in names]
        taken = itertools.islice(modules(), 0, None, every)
        middling = itertools.count(EACH // 2)
        for module, source in taken:
            held = len(source) in SIZE and next(middling) % EACH == 0
            part = "heldout" if held else "train"
            (out / "text" / part / f"{module}.txt").write_text(source, encoding="utf-8")
            counts["held-out modules" if part == "heldout" else "modules"] += 1
            counts["characters"] += len(source) if part == "train" else 0
            for name, call, paragraph in functions(module, source):
                if paragraph in seen:  # keep the same text out of both sides of the split
                    continue
                seen.add(paragraph)
                aside = zlib.crc32(name.encode()) < SHARE * 2**32
                counts["held-out chats" if aside else "chats"] += 1
                chats, pairs = files[aside::2]
                chats.write(json.dumps(chat(name, call, paragraph)) + "\n")
                pairs.write(json.dumps(pair(name, paragraph)) + "\n")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="output directory")
    parser.add_argument(
        "--every", type=int, default=1, metavar="K", help="use only every K-th module"
    )
    args = parser.parse_args()
    counts = build(args.out, args.every)
    print(f"{args.out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
