# SPDX-License-Identifier: Apache-2.0
"""A run folder in place of a model: how it is recognized, and which model it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import UserError
from jaxllm.paths import as_path, entries, hub_id
from jaxllm.untrusted import read_json


def is_run_config(config: Mapping[str, Any]) -> bool:
    """True for the config.json of a run; that of a HuggingFace directory has the same name."""
    return {"objective", "optim", "data"} <= config.keys()


def is_run(folder: Path) -> bool:
    """True for a run folder, also if its config.json is lost or damaged; False for no directory."""
    if not folder.is_dir():
        return False
    names = [entry.name for entry in entries(folder)]
    try:
        if "config.json" in names:
            return is_run_config(read_json(folder / "config.json"))
    except UserError:
        pass
    is_model = any(name.endswith(".safetensors") for name in names)
    return bool({"checkpoints", "final"} & {*names}) and not is_model


def checkpoint_step(folder: Path) -> int | None:
    """The step of RUN/checkpoints/STEP; None for another directory."""
    is_one = folder.parent.name == "checkpoints" and folder.name.isdigit()
    return int(folder.name) if is_one else None


def final_model(path: str) -> str:
    """The final model of a run folder; any other path as it is."""
    if hub_id(path):
        return path
    final = as_path(path) / "final"
    return str(final) if is_run(final.parent) and final.is_dir() else path


def check_is_model(folder: Path) -> None:
    """Raises UserError for a run folder or a checkpoint of a run, which are no models."""
    if checkpoint_step(folder) is not None:
        raise UserError(
            f"{folder} is a checkpoint of a run; `jaxllm export {folder} OUT` makes a model of it"
        )
    if is_run(folder):
        raise not_a_model(folder)


def not_a_model(folder: Path) -> UserError:
    """The error of a run folder in place of a model."""
    final = folder / "final"
    if final.is_dir():
        return UserError(f"{folder} is a run folder; its model is {final}")
    return UserError(
        f"{folder} is a run folder without a final model; `jaxllm export {folder} OUT` makes a "
        "model of a checkpoint"
    )
