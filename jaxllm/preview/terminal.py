# SPDX-License-Identifier: Apache-2.0
"""A preview as lines for the terminal, or for a pipe: then without colours, and not wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxllm.preview.reading import LEARNED, SPECIAL
from jaxllm.rows import printable

HEAD, TAIL = 96, 48  # tokens of a long segment that are shown, at its beginning and its end
SEGMENTS = 4  # of a row
BAR, CELLS, PATH = 40, 48, 32  # width of the histogram, of the bar of a row, and of a path
BORDERED = 12  # segments of a row up to which the bar has their borders
SIGNS = {LEARNED: "█", 0: "░", None: "·"}
# Neighbouring tokens have two shades.
SHADES = {
    0: ("", "dim"),
    LEARNED: ("black on #9be3b4", "black on #7fd39d"),
    SPECIAL: ("magenta", "magenta"),
    LEARNED + SPECIAL: ("magenta on #9be3b4", "magenta on #7fd39d"),
}


def show(found: dict[str, Any], rows: int, console: Console | None = None) -> None:
    """Prints a preview with the first `rows` rows of its update; 0 = all."""
    if console is None:
        console = Console() if Console().is_terminal else Console(width=120)
    for part in _lines(found, rows or len(found["rows"]), console.is_terminal):
        # A pipe gets each line whole.
        console.print(part, highlight=False, soft_wrap=not console.is_terminal, markup=False)


def _lines(found: dict[str, Any], rows: int, colour: bool) -> Iterator[RenderableType]:
    yield from _about(found)
    yield ""
    yield from _counts(found)
    yield from _lengths(found["sets"][0])
    yield ""
    yield from _findings(found["findings"], colour)
    yield ""
    yield from _update(found, rows, colour)


def _title(text: str, more: str = "") -> Text:
    return Text.assemble((text, "bold"), more)


def percent(share: float) -> str:
    """A share as text, with one decimal below 10 %; 100% is all of it."""
    if 0.995 <= share < 1:
        return ">99%"
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


def _about(found: dict[str, Any]) -> Iterator[Text]:
    steps, epoch = found["steps"], found["epoch_steps"]
    if found["form"] == "prompts":
        of = plural(found["batch_size"], "completion")
    else:
        of = f"{plural(found['batch_size'], 'row')} of {found['row_length']:,} tokens"
    passes = f"; an epoch is {epoch:,.4g} steps" if epoch else ""
    yield _title(found["objective"], f": {plural(steps, 'step')}, each of {of}{passes}")
    template = found["template"]
    name = f", chat template: {template['name']}" if template else ""
    yield Text(f"tokenizer {found['tokenizer']}{name}, data.max_length {found['max_length']:,}")
    for note in found["notes"]:
        yield Text(f"note: {note}", style="yellow")


# ---- counts


def _counts(found: dict[str, Any]) -> Iterator[RenderableType]:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("set")
    table.add_column("source", overflow="fold")
    heads = ("examples", "tokens", "learned", "rows", "full", "dropped", "truncated")
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    notes = {}
    for one in found["sets"]:
        fill = "" if one["fill"] is None else percent(one["fill"])
        for source in one["sources"]:
            path = source["path"]
            path = path if len(path) <= PATH else f"…/{path.rpartition('/')[2]}"
            table.add_row(one["name"], Text(path), *source_cells(source, fill))
            for note, count in source.get("notes", {}).items():
                notes[f"{source['path']}: {note} ({count:,})"] = 1
    yield table
    unpacked, fill = found["sets"][0]["unpacked"], found["sets"][0]["fill"]
    if unpacked is not None:
        yield Text(f"Rows are {percent(fill)} full; without packing {percent(unpacked)}.")
    yield from (Text(note, style="yellow") for note in notes)


def source_cells(source: dict[str, Any], fill: str) -> list[str]:
    """The numbers of a source: examples, tokens, learned, rows, full, dropped and truncated."""
    if source["examples"] is None:
        return [f"{source['files']:,} files", "streamed", *[""] * 5]
    read = source["read"]
    dropped = sum(n for key, n in source.items() if key.startswith("dropped_"))
    learned = percent(source["learned_tokens"] / max(source["tokens"], 1))
    return [
        f"{source['examples']:,}",
        f"{source['tokens']:,}",
        learned if source["learned_tokens"] else "–",
        f"{source['rows']:,}" if fill else "–",
        fill or "–",
        _share(dropped, read),
        _share(source["truncated"], read),
    ]


def _share(count: int, of: int) -> str:
    return f"{count:,} ({percent(count / of)})" if count else "0"


def _lengths(one: dict[str, Any]) -> Iterator[Text]:
    lengths = one["lengths"]
    if lengths is None:
        return
    yield Text()
    shown = {key: f"{lengths[key]:,}" for key in ("min", "max", "median", "p95", "p99")}
    about = " of a training example: {min} to {max} tokens, median {median}, 95% at most {p95}, "
    yield _title("Length", (about + "99% at most {p99}").format(**shown))
    edges, counts = lengths["edges"], lengths["counts"]
    width = len(f"{edges[-1]:,}")
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(BAR * count / max(counts)) or "▏" * bool(count)
        label = f"{low:>{width},} – {high - 1:<{width},}" if high - 1 > low else f"{low:>{width},}"
        yield Text.assemble(f"  {label:<{2 * width + 3}} ", (bar, "cyan"), f" {count:,}")


# ---- findings


def _findings(findings: list[dict[str, Any]], colour: bool) -> Iterator[RenderableType]:
    if not findings:
        yield _title("Checks", ": streamed data are not checked")
        return
    sizes = {f["set"]: max(o["of"] for o in findings if o["set"] == f["set"]) for f in findings}
    less = {f["of"] for f in findings if 0 < f["of"] < sizes[f["set"]] // 2}
    more = f" (the slower ones on {max(less):,} examples; see --limit)" if less else ""
    yield _title("Checks", more)
    for one in findings:
        if one["note"] and not one["of"]:
            yield Text.assemble(("  ? ", "yellow"), f"{one['name']}: {one['note']}")
        if not one["count"]:
            continue
        share = f"{one['count']:,} of {one['of']:,} ({percent(one['count'] / one['of'])})"
        note = f", {one['note']}" if one["note"] else ""
        yield Text.assemble(
            ("  ! ", "bold yellow"), (one["name"], "bold"), f", {one['set']}: {share}{note}"
        )
        for example in one["examples"]:
            other = _other(example)
            text = printable(example["text"])
            line = Text.assemble(example["where"], other, (f"  {text}", "dim"))
            yield _indented(line, 6, colour)
    none = dict.fromkeys(o["name"] for o in findings if o["of"])
    some = {one["name"] for one in findings if one["count"]}
    if clean := [name for name in none if name not in some]:
        line = Text.assemble(("✓ ", "green"), f"none: {', '.join(clean)}")
        yield _indented(line, 2, colour)


def _indented(line: Text, by: int, colour: bool) -> RenderableType:
    """A line with all that is wrapped of it indented; a pipe gets it whole."""
    if colour:
        return Padding(line, (0, 0, 0, by))
    return Text(" " * by) + line if line else line


def _other(example: dict[str, Any]) -> str:
    """The place of the example that is repeated; its line alone, if it is in the same file."""
    if not example["other"]:
        return ""
    file, colon, line = example["other"].rpartition(":")
    same = colon and example["where"].startswith(f"{file}:")
    return f" = line {line}" if same else f" = {example['other']}"


# ---- rows


def _update(found: dict[str, Any], shown: int, colour: bool) -> Iterator[RenderableType]:
    rows = found["rows"]
    online = found["form"] == "prompts"
    total = sum(row["length"] for row in rows)
    tokens, learned = (sum(row[key] for row in rows) for key in ("tokens", "learned"))
    if online:
        what = f": {plural(len(rows), 'prompt')} of its rollout, {tokens:,} tokens"
    else:
        what = f": {plural(len(rows), 'row')}, {percent(tokens / total)} full, "
        what += f"{percent(learned / max(tokens, 1))} of the tokens are learned"
    yield _title(f"Update {found['step']}", what)
    mark = "on green" if colour else "in [[ ]]"
    if not online:
        yield Text(f"  █ learned ({mark} below)  ░ context  · padding  │ next segment", style="dim")
    for row in rows[:shown]:
        yield from _row(row, online, colour)
    if len(rows) > shown:
        more = plural(len(rows) - shown, "more prompt" if online else "more row")
        yield Text(f"… {more}: --rows 0 prints all, --html shows all")


def _row(row: dict[str, Any], online: bool, colour: bool) -> Iterator[RenderableType]:
    segments = row["segments"]
    yield Text()
    if not online:
        padding = row["length"] - row["tokens"]
        counts = f"{plural(row['tokens'], 'token')}, {row['learned']:,} learned, "
        counts += f"{padding:,} padding, {plural(len(segments), 'segment')}"
        yield Text.assemble((f"row {row['row']}", "bold"), f"  {bar(row)}  {counts}")
    for segment in segments[:SEGMENTS]:
        places = ", ".join(segment["sources"])
        label = f"{segment['label']}, " if segment["label"] else ""
        counts = f"{plural(segment['tokens'], 'token')}"
        if not online:
            weight = f", weight {segment['weight']:g}" * (segment["weight"] != segment["learned"])
            counts += f", {segment['learned']:,} learned{weight}"
        yield Text.assemble("  ", (f"{label}{places}", "cyan"), f": {counts}")
        for line in _text(segment, colour):
            yield _indented(line, 4, colour)
    if len(segments) > SEGMENTS:
        yield Text(f"  … {plural(len(segments) - SEGMENTS, 'more segment')}", style="dim")


def bar(row: dict[str, Any]) -> str:
    """A row as CELLS signs: what most of the tokens of each cell are, and where segments begin."""
    kinds: list[Any] = []
    begins = []
    for segment in row["segments"]:
        begins.append(len(kinds))
        for ids, mark in zip(segment["ids"], segment["marks"], strict=True):
            kinds += [mark & LEARNED] * len(ids)
    kinds = (kinds + [None] * row["length"])[: row["length"]]
    cells = []
    size = row["length"] / CELLS
    for i in range(CELLS):
        here = kinds[int(i * size) : max(int((i + 1) * size), int(i * size) + 1)]
        cells.append(SIGNS[max(dict.fromkeys(here), key=here.count)])
    if len(begins) <= BORDERED:
        for place in begins[1:]:
            cells[min(int(place / size), CELLS - 1)] = "│"
    return "".join(cells)


def _text(segment: dict[str, Any], colour: bool) -> list[Text]:
    """The lines of a segment's text, without the middle of a long one."""
    tokens = list(zip(segment["texts"], segment["marks"], strict=True))
    cut = len(tokens) - HEAD - TAIL
    if cut > HEAD:
        between = (f" … {cut:,} more tokens … ", None)
        tokens = [*tokens[:HEAD], between, *tokens[-TAIL:]]
    lines, is_learned = [Text()], False
    for number, (text, mark) in enumerate(tokens):
        learned = bool(mark and mark & LEARNED)
        if not colour and learned != is_learned:
            lines[-1].append("[[" if learned else "]]")
        is_learned = learned
        shades = ("italic yellow",) * 2 if mark is None else SHADES[mark]
        for place, piece in enumerate(printable(text).split("\n")):
            if place:
                lines.append(Text())
            lines[-1].append(piece, shades[number % 2] if colour else "")
    if is_learned and not colour:
        lines[-1].append("]]")
    return lines[:-1] if not lines[-1].plain else lines
