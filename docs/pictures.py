# SPDX-License-Identifier: Apache-2.0
"""Makes the pictures of the start page, docs/pictures/, from real runs.

    python docs/pictures.py terminal    # fine-tune and generate in a terminal, a minute long
    python docs/pictures.py report      # the page of a run, in light and dark

Needs the runs of README.md in run/stdlib, and Chromium for the report.
"""

from __future__ import annotations

import base64
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

OUT = Path(__file__).with_name("pictures")
COLUMNS, ROWS = 108, 60
COMMANDS = (
    "jaxllm sft configs/sft/stdlib-tiny.yaml --output_dir run/stdlib/picture --overwrite",
    'jaxllm generate --model run/stdlib/picture/final --chat --prompt "What does os.getcwd do?"',
)
# rich's, without its web font: a page of the site loads nothing from elsewhere.
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
REPORT = "run/stdlib/pretrain/report.html"


def run(command: str, screen: pyte.Screen) -> None:
    """Runs a command in a terminal of its own and draws what it writes on the screen."""
    stream = pyte.Stream(screen)
    stream.feed(f"\x1b[1m$ {command}\x1b[0m\r\n")
    words = command.removeprefix("jaxllm ")
    main, sub = pty.openpty()
    ioctl(sub, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    shell = f'exec "{sys.executable}" -m jaxllm {words}'
    child = subprocess.Popen(["sh", "-c", shell], stdin=sub, stdout=sub, stderr=sub)
    os.close(sub)
    while True:
        try:
            written = os.read(main, 4096)
        except OSError:  # the other end is closed
            break
        stream.feed(written.decode(errors="replace"))
    os.close(main)
    if child.wait():
        sys.exit(f"{command} failed:\n" + "\n".join(screen.display))


def colour_of(name: str) -> str | None:
    """rich's name of a colour of pyte, which is a name or six hexadecimal digits."""
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return name.replace("brown", "yellow").replace("bright", "bright_")


def line_of(screen: pyte.Screen, row: int) -> Text:
    """A row of the screen with its colours."""
    text = Text()
    for column in range(screen.columns):
        char = screen.buffer[row][column]
        text.append(char.data, Style(color=colour_of(char.fg), bold=char.bold))
    text.rstrip()
    return text


def terminal() -> None:
    screen = pyte.Screen(COLUMNS, ROWS)
    for command in COMMANDS:
        run(command, screen)
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)
    for row in range(screen.cursor.y):
        console.print(line_of(screen, row), soft_wrap=True)
    OUT.joinpath("terminal.svg").write_text(console.export_svg(title="", code_format=SVG))


def report() -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for scheme in ("light", "dark"):
            options: Any = {"color_scheme": scheme, "viewport": {"width": 1100, "height": 1010}}
            page = browser.new_page(**options)
            page.goto(Path(REPORT).absolute().as_uri())
            page.wait_for_timeout(1000)
            devtools = page.context.new_cdp_session(page)
            shot = devtools.send("Page.captureScreenshot", {"format": "webp", "quality": 80})
            OUT.joinpath(f"report-{scheme}.webp").write_bytes(base64.b64decode(shot["data"]))
        browser.close()


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ("terminal", "report"):
        {"terminal": terminal, "report": report}[name]()
