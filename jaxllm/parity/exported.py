# SPDX-License-Identifier: Apache-2.0
"""An exported directory in transformers, peft or vLLM: what `jaxllm export --check` compares with.

Like the rest of this package it imports torch, and only when a function of it is called.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.errors import UserError
from jaxllm.files import ADAPTER_CONFIG
from jaxllm.paths import first_line
from jaxllm.untrusted import read_json

VLLM_SECONDS = 3600


def check_installed(adapter: bool) -> None:
    """Raises UserError without the packages of the extra `parity` that are needed."""
    needed = ("torch", *(("peft",) if adapter else ()))
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(
            f"--check needs {' and '.join(missing)}, not installed; pip install 'jaxllm[parity]'"
        )


def token_values(
    folder: Path, prompts: Sequence[np.ndarray], *, scores: bool, wrapped: bool
) -> tuple[list[np.ndarray], dict[str, str]]:
    """(float32 [n - 1] for each prompt of n tokens: the log-probabilities of its tokens, or [1],
    its score; the versions of the packages), in float32 on the CPU.

    scores: the model is a reward model. wrapped: it is multimodal. Raises UserError if transformers
    or peft do not load the directory.
    """
    import torch

    adapter = (folder / ADAPTER_CONFIG).is_file()
    with _quiet():
        try:
            model = _load(folder, adapter, scores, wrapped)
        except Exception as error:  # of whichever package reads the files
            where = "peft" if adapter else "transformers"
            raise UserError(f"{where} does not load it: {first_line(error)}") from error
        found = []
        with torch.inference_mode():
            for prompt in prompts:
                tokens = torch.from_numpy(prompt.astype(np.int64))[None]
                logits = model(input_ids=tokens, use_cache=False).logits[0]
                if not scores:  # prompt tuning puts the logits of its tokens first
                    logps = logits[-len(prompt) : -1].float().log_softmax(-1)
                    logits = logps.gather(-1, tokens[0, 1:, None])
                found.append(logits.reshape(-1).float().numpy())
    names = ("transformers", "torch", *(("peft",) if adapter else ()))
    return found, {name: version(name) for name in names}


def _load(folder: Path, adapter: bool, scores: bool, wrapped: bool) -> Any:
    import torch
    import transformers

    kind = "SequenceClassification" if scores else "ImageTextToText" if wrapped else "CausalLM"
    path = read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"] if adapter else folder
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        path,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        **({"num_labels": 1} if scores else {}),
    )
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(folder))
    return model.eval()


def python_of_vllm() -> str | None:
    """The Python that has vLLM: this one, or that of the command `vllm`, which is often installed
    by itself, since it needs other versions of torch and transformers."""
    if (spec := find_spec("vllm")) and spec.origin:  # a folder of that name has none
        return sys.executable
    if not (command := shutil.which("vllm")):
        return None
    with open(command, "rb") as script:
        first = script.readline(4096).decode(errors="replace").strip()
    named = first.removeprefix("#!").strip()
    beside = str(Path(command).resolve().with_name("python"))
    return named if "python" in Path(named).name and Path(named).exists() else beside


def vllm_values(
    python: str, folder: Path, prompts: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], dict[str, str]]:
    """As `token_values` of log-probabilities, in vLLM, which runs in a process of its own.

    Raises UserError with the reason if vLLM does not load the directory.
    """
    program = Path(__file__).with_name("in_vllm.py")
    with tempfile.TemporaryDirectory(prefix="jaxllm-vllm-") as place:
        asked, answer = Path(place, "prompts.json"), Path(place, "values.json")
        asked.write_text(json.dumps([prompt.tolist() for prompt in prompts]))
        command = [python, "-P", str(program), str(folder), str(asked), str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=VLLM_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(first_line(error)) from error
        if not answer.exists():
            last = done.stderr.strip().splitlines()[-1:]
            raise UserError(*last or [f"{python} ended with status {done.returncode}"])
        found = read_json(answer)
    if error := found.get("error"):
        raise UserError(error)
    values = [np.asarray(some, np.float32) for some in found["values"]]
    return values, {"vllm": found["version"]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and progress bars of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
