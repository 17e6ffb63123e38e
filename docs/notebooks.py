# SPDX-License-Identifier: Apache-2.0
"""Notebooks of the site: a hook of mkdocs that shows each as a page, and a command that runs them.

python docs/notebooks.py [NAME ...]    # run docs/notebooks/NAME.ipynb and store what they print

Building the site shows the stored outputs. With EXECUTE_NOTEBOOKS=1, as in CI, it first runs the
notebooks, so that an error in one of them ends the build.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

FOLDER = Path(__file__).with_name("notebooks")


def executed(path: Path) -> Any:
    """The notebook with new outputs; it runs in a temporary directory."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONWARNINGS"] = "ignore"  # tqdm misses the widgets of a browser
    with TemporaryDirectory() as folder:
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        where = {"metadata": {"path": folder}}
        options: Any = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
        NotebookClient(notebook, kernel, resources=where, **options).execute()
    notebook.metadata.language_info = {"name": "python"}  # and not the version of this Python
    return notebook


def on_files(files: Any, config: Any) -> None:
    """Adds a page for each notebook."""
    from mkdocs.structure.files import File

    run = os.environ.get("EXECUTE_NOTEBOOKS") == "1"
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = Path(file.abs_src_path)
        notebook = executed(path) if run else nbformat.read(path, as_version=4)
        page, _ = MarkdownExporter().from_notebook_node(notebook)
        files.append(File.generated(config, file.src_uri[: -len("ipynb")] + "md", content=page))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to a notebook lead to its page."""
    return markdown.replace(".ipynb)", ".md)")


if __name__ == "__main__":
    for file in sorted(FOLDER.glob("*.ipynb")):
        if file.stem in sys.argv[1:] or not sys.argv[1:]:
            nbformat.write(executed(file), file)
