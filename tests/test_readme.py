# SPDX-License-Identifier: Apache-2.0
"""Every command of README.md and docs/ runs, in one folder, on little text and for a few steps.

A ```bash block is run by bash and a ```python block by python, in the order of the page, each
command in a process of its own; a ```text block is not. JAXLLM_PYTHON is the Python that runs them,
for `make pages` that of an environment with the core alone. What is changed for speed: the corpus
is a twelfth, runs end after two steps (SMALL). `make`, `pip install` and the making of a virtual
environment are not run but looked up.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from runs import FAST

import jaxllm
from jaxllm.config import load_config

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("JAXLLM_PYTHON") or sys.executable).absolute()
PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if "```" in p.read_text()]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STEPS = "--steps 2 --eval_every 0 --batch_size 4"
# (what a command begins with, what it must not say, what is put behind it)
SMALL = (
    ("python demo/stdlib.py", "--every", "--every 12"),
    ("jaxllm pretrain", "--steps|--schema|--per_device|--explain", STEPS),
    ("jaxllm pretrain", "--steps|--schema|--explain", "--steps 2"),
    ("jaxllm sft", "--steps", STEPS),
    ("jaxllm reward", "--steps", STEPS),
    ("jaxllm dpo", "--steps", STEPS),
    ("jaxllm compare", "--batch_size", "--batch_size 4"),
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of a page, in order."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(code: str) -> list[str]:
    """The commands of a bash block, a here-document with its command."""
    joined = code.replace("\\\n", " ")
    found: list[str] = []
    end = None
    for line in joined.splitlines():
        if end is not None:
            found[-1] += f"\n{line}"
            end = None if line == end else end
        elif line.strip():
            found.append(line)
            mark = re.search(r"<<'?(\w+)'?", line)
            end = mark[1] if mark else None
    assert end is None, f"<<{end} is not closed"
    return found


def small(command: str) -> str:
    for begin, unless, options in SMALL:
        if begin in command and not re.search(unless, command):
            return f"{command} {options}"
    return command


def look_up(command: str) -> bool:
    """True for a command that is not run, once what it names has been found."""
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
        return True
    if words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\.\[([\w,]+)\]", command):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys()
        for file in re.findall(r"-c (\S+)", command):
            assert (ROOT / file).is_file()
        return True
    return words[1:3] == ["-m", "venv"] or words[0] == "."


class Workspace:
    """A folder like a checkout, in which `python` and `jaxllm` are this environment's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("configs", "demo", "launch"):
            (folder / name).symlink_to(ROOT / name)
        programs = folder / "bin"
        programs.mkdir()
        for name, run in (("python", ""), ("jaxllm", " -m jaxllm")):
            (programs / name).write_text(f'#!/bin/sh\nexec "{PYTHON}"{run} "$@"\n')
            (programs / name).chmod(0o755)
        self.env = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),  # the cache of tokenized text
            "XLA_FLAGS": FAST,
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{command[-1]}\n{said[-4000:]}"
        return said

    def run_page(self, page: Path) -> int:
        """Runs a page's blocks; returns how many commands there were."""
        count = 0
        for language, code in blocks(page):
            if language == "python":
                self.run("python", "-c", code)
                count += 1
            elif language == "bash":
                for command in commands(code):
                    if not look_up(command):
                        self.run("bash", "-euo", "pipefail", "-c", small(command))
                    count += 1
        return count


pages = pytest.mark.pages  # minutes long: `make pages` and .ci/run run them


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    """A folder in which README.md's commands have been run; the other pages go on from there."""
    made = Workspace(tmp_path_factory.mktemp("checkout"))
    assert made.run_page(ROOT / "README.md") >= 10
    return made


@pages
def test_the_readme_makes_what_it_says(workspace):
    for model in ("pretrain/final", "sft/final", "model", "copy"):
        folder = workspace.folder / "run" / "stdlib" / model
        assert (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()


@pages
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_commands_of_a_page_run(workspace, page):
    workspace.run_page(page)


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LAST_MODEL = {"pipeline": "run/pipeline/dpo/final", "records": "run/notebook/saved"}


def cells_of(notebook: Path) -> list[dict]:
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


@pages
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_in_one_process(workspace, notebook):
    code = "\n\n".join("".join(cell["source"]) for cell in cells_of(notebook))
    workspace.run("python", "-c", code)
    made = workspace.folder / LAST_MODEL[notebook.stem]
    assert (made / "model.safetensors").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_shows_what_its_cells_printed(notebook):
    cells = cells_of(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not any(output["output_type"] == "error" for output in outputs)
    assert notebook.stat().st_size < 50_000


def test_every_public_name_is_in_the_api_reference():
    page = (ROOT / "docs" / "api.md").read_text()
    shown = set(re.findall(r"^::: jaxllm\.(\w+)$", page, re.MULTILINE))
    assert shown <= {*jaxllm.__all__, "training"}
    for name in jaxllm.__all__:
        assert name in shown or f"`{name}`" in page, f"docs/api.md lacks {name}"
        assert getattr(jaxllm, name).__doc__, name


def test_the_site_has_every_page_once_and_small_pictures():
    site = (ROOT / "mkdocs.yml").read_text()
    notebooks = [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]
    for name in [*(path.name for path in (ROOT / "docs").glob("*.md")), *notebooks]:
        assert len(re.findall(rf": {name}$", site, re.MULTILINE)) == 1, f"mkdocs.yml: {name}"
    pictures = list((ROOT / "docs" / "pictures").iterdir())
    assert pictures and all(path.stat().st_size < 150_000 for path in pictures)


def test_blocks_are_of_a_language_that_is_run_or_shown():
    for page in (ROOT / "README.md", *PAGES):
        marks = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        assert set(marks) <= {"", "bash", "python", "text", "yaml"}, page
        assert marks.count("") * 2 == len(marks), f"{page}: a block opens without its language"


def test_yaml_that_is_shown_loads(tmp_path, monkeypatch):
    """A file of LLaMA-Factory names datasets of a dataset_info.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    named = {name: {"file_name": f"{name}.json"} for name in ("identity", "alpaca_en_demo")}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(named))
    shown = [code for page in PAGES for language, code in blocks(page) if language == "yaml"]
    assert shown
    for code in shown:
        (tmp_path / "run.yaml").write_text(code)
        load_config("sft" if "stage: sft" in code else "pretrain", str(tmp_path / "run.yaml"))


def test_the_table_of_keys_is_up_to_date():
    page = ROOT / "docs" / "config.md"
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    assert page.read_text().endswith(made["MARK"] + made["reference"]()), (
        "run `python docs/reference.py`"
    )


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).is_file(), f"{page}: {target}"


def test_files_that_pages_name_are_there():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(
            r"`((?:configs|tests|jaxllm|demo|docs)/[\w./-]+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page}: {name}"


@pages
def test_the_demo_goes_all_the_way(workspace):
    said = workspace.run("python", "demo/demo.py", "--quick")
    table = said.partition("What was made")[2]
    made = (
        "tokenizer",
        "base model",
        "chat model",
        "evaluation after",
        "LoRA adapter",
        "an answer",
    )
    for what in made:
        assert what in table
    assert (workspace.folder / "run/stdlib/model/model.safetensors").is_file()
    assert (workspace.folder / "run/stdlib/lora-merged/model.safetensors").is_file()
