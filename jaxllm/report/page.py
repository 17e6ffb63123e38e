# SPDX-License-Identifier: Apache-2.0
"""The page: its files and the runs' values in one HTML file, and a picture of it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError
from jaxllm.paths import as_path, is_bucket, write_text
from jaxllm.report.reading import FEW, POINTS, read_run

FILE = "report.html"  # in a run folder
PARTS = Path(__file__).parent
# Of every page: the chart library, charts, and what frames the sections. Then the report's own.
SHARED = [PARTS / n for n in ("uPlot.min.css", "page.css", "uPlot.iife.min.js", "charts.js")]
SHARED.append(PARTS / "frame.js")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH = 1100  # of a picture, in CSS pixels


def write_report(runs: Sequence[str], out: str | Path | None = None) -> Path:
    """Writes a page of some runs, by default into the folder of one run, or report.html here for
    several; returns its path. Raises UserError if a folder is not a run's."""
    found = [read_run(run, points=max(POINTS // len(runs), FEW)) for run in runs]
    default = as_path(runs[0]) / FILE if len(runs) == 1 else Path(FILE)
    file = as_path(out) if out is not None else default
    write_text(file, page(found))
    return file


def page(runs: Sequence[dict[str, Any]], every: float | None = None) -> str:
    """The HTML of a page of runs, as `read_run` gives them. every: seconds until it is written
    again."""
    data: dict[str, Any] = {"written": time.time(), "every": every}
    data["runs"] = _named_apart(runs)
    return assemble(
        "report", ", ".join(run["name"] for run in data["runs"]), data, [*SHARED, PARTS / "page.js"]
    )


def assemble(kind: str, title: str, data: dict[str, Any], parts: Sequence[Path]) -> str:
    """The HTML of a page that shows `data` by its style sheets and scripts, the `parts`, in their
    order, and loads nothing. kind: report or preview."""
    data = json.loads(json.dumps(data), parse_constant=lambda _: None)  # 1e999 is infinite
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    style, script = (
        "\n".join(part.read_text(encoding="utf-8") for part in parts if part.suffix == suffix)
        for suffix in (".css", ".js")
    )
    # The page may run and style itself by these two texts alone, and load nothing.
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
    policy += "base-uri 'none'; form-action 'none'"
    values = {
        "policy": html.escape(policy),
        "kind": kind,
        "title": html.escape(title),
        "style": style,
        "script": script,
        # In a script element, text ends at </script> and <!-- changes how it is read.
        "data": text.replace("<", "\\u003c"),
    }
    frame = (PARTS / "page.html").read_text(encoding="utf-8")
    made = re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], frame)
    return made.encode(errors="replace").decode()  # half of a surrogate pair becomes ?


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _named_apart(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs; those of the same name are named by their folders."""
    names = [run["name"] for run in runs]
    return [
        run | {"name": run["folder"] if names.count(run["name"]) > 1 else run["name"]}
        for run in runs
    ]


def publish(
    runs: Sequence[str], out: str | None, png: str | None, *, show: bool = False
) -> Iterator[Path]:
    """`jaxllm report`: writes the page, its picture, and opens the browser; yields the files."""
    for flag, file in (("--out", out), ("--png", png)):
        if file is not None:
            check_file(flag, as_path(file))
    report = write_report(runs, out)
    yield report
    if png is not None:
        yield picture(report, Path(png))
    if show and (is_bucket(report) or not webbrowser.open(report.absolute().as_uri())):
        raise UserError(f"--open: there is no browser; open {report} in one")


def check_file(flag: str, file: Path) -> None:
    """Raises UserError if a file cannot be made at this path."""
    if is_bucket(file):
        return
    if file.is_dir():
        raise UserError(f"{flag}: {file} is a directory; give a file in it")
    if not file.parent.is_dir():
        raise UserError(f"{flag}: there is no directory {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{flag}: nothing can be written in {file.parent}")


# ---- a picture


def picture(report: Path, out: Path) -> Path:
    """Writes a PNG of a page's headline and curves; returns its path. Raises UserError without
    Chromium or Chrome."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(
            "--png needs Chromium or Chrome, which is not installed (such as apt install chromium);"
            f" or open {report} in a browser and print it"
        )
    if is_bucket(report):
        raise UserError(f"--png: {report} is in a bucket; add --out FILE")
    with tempfile.TemporaryDirectory(prefix="jaxllm-") as folder:
        # A root user has no sandbox; the page runs no text but ours.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [browser, "--headless", *sandbox, "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}", "--virtual-time-budget=4000"]
        address = f"{report.resolve().as_uri()}#picture"
        size = f"--window-size={WIDTH},800"
        made = _browse([*command, size, "--dump-dom", address])
        height = re.search(r'data-height="(\d+)"', made)
        size = f"--window-size={WIDTH},{height[1] if height else 2400}"
        file = Path(folder) / "picture.png"
        options = [size, "--force-device-scale-factor=2", f"--screenshot={file}"]
        said = _browse([*command, *options, address])
        if not file.is_file():
            raise UserError(f"--png: {browser} made no picture: {said.strip()[-200:]}")
        shutil.copyfile(file, out)
    return out


def _browse(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise UserError(f"--png: {command[0]} did not answer within 120 s") from None
    return done.stdout or done.stderr
