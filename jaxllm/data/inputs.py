# SPDX-License-Identifier: Apache-2.0
"""Checks that the files and directories a command reads are there.

Nothing heavy is imported, so a mistyped path is reported at once. Only one file is opened, the
config.json of a run that is resumed; neither buckets nor the hub are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.config import TrainConfig
from jaxllm.config.checks import recorded_config
from jaxllm.data.formats import check_source
from jaxllm.data.template import template_file
from jaxllm.errors import MissingFile, UserError, together
from jaxllm.paths import as_path, check_model, check_tokenizer, is_bucket

Check = Callable[[str], object]  # raises UserError if a path is not there


def check_inputs(cfg: TrainConfig, *, data: bool = True) -> None:
    """Raises UserError for all files and directories of a run that do not exist.

    data: also those of its data, tokenizer, template and rewards.
    """
    _check((*_models(cfg), *(_data(cfg) if data else ())))


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UserError for all files and directories of a command's options that do not exist."""
    found = []
    for name, value in options.items():
        for path in value if isinstance(value, list) else [value]:
            if name in _OPTIONS and path:
                found.append((_OPTIONS[name], str(path)))
    _check(found)


def _check(inputs: Iterable[tuple[Check, str | None]]) -> None:
    errors = []
    for check, path in inputs:
        try:
            if path and not is_bucket(path):
                check(path)
        except UserError as error:
            errors.append(error)
    if errors:
        raise together(errors)


def _models(cfg: TrainConfig) -> Iterator[tuple[Check, str | None]]:
    yield check_model, cfg.model.path
    config = cfg.model.config
    if config and not is_bucket(config) and not as_path(config).is_file():
        yield check_model, config
    if not is_bucket(cfg.output_dir) and not recorded_config(cfg):
        yield check_model, cfg.peft.path  # a resumed run has a copy of its config


def _data(cfg: TrainConfig) -> Iterator[tuple[Check, str | None]]:
    yield check_tokenizer, cfg.model.tokenizer
    for source in (*cfg.data.train, *cfg.data.eval):
        yield check_source, source.path
    yield template_file, cfg.data.template
    for reward in cfg.rl.rewards:
        module, colon, _ = reward.rpartition(":")
        if not colon:
            yield check_model, reward
        elif module.endswith(".py"):
            yield _check_file, module


def _check_file(path: str) -> None:
    if not Path(path).expanduser().is_file():
        raise MissingFile(f"there is no file {path}")


def _check_run(path: str) -> None:
    if not as_path(path).is_dir():
        raise MissingFile(f"{path}: no such directory")


def _check_adapter(text: str) -> None:
    check_model(text.rpartition("=")[2])  # NAME=DIR


_OPTIONS: dict[str, Check] = {
    "model": check_model,
    "reward": check_model,
    "adapter": _check_adapter,
    "template": template_file,
    "files": check_source,
    "run": _check_run,
}
