# SPDX-License-Identifier: Apache-2.0
"""The arguments of commands that are not keys of a config."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import TrainConfig, load_config
from jaxllm.config.fields import home
from jaxllm.config.loading import find_objective, parse, read_args
from jaxllm.data.inputs import check_options
from jaxllm.errors import UserError
from jaxllm.run_folder import final_model


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError."""

    def __init__(self, command: str, about: str):
        about = f"{about[0].upper()}{about[1:]}."
        super().__init__(prog=f"jaxllm {command}", description=about, allow_abbrev=False)

    def flag(self, name: str, about: str, **keys: Any) -> None:
        default = "" if keys.get("default") in (None, []) else f" [{keys['default']}]"
        self.add_argument(name, help=about + default, **keys)

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (`{self.prog} --help` shows the flags)")

    def read(self, args: list[str]) -> argparse.Namespace:
        """Parse the arguments; in --model a run folder stands for its final model.

        Raises UserError for a list given twice and for missing files.
        """
        flags = [arg.partition("=")[0] for arg in args]
        lists = [flag for one in self._actions if one.nargs == "+" for flag in one.option_strings]
        for flag in lists:
            if flags.count(flag) > 1:
                raise UserError(f"{flag} is given twice; give all its values after one {flag}")
        options = self.parse_args(args)
        check_options(vars(options))
        if given := vars(options).get("model"):
            options.model = final_model(given)
        return options


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Type of a flag: an integer from low to high."""

    def number(text: str) -> int:
        value = parse(text)
        if type(value) is int and low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"seen {text}; must be an integer from {low} to {high}")

    return number


def run_config(args: Sequence[str]) -> TrainConfig:
    """The config of [CONFIG.yaml] and flags of a run, one of which names the objective."""
    path = args[0] if args and not args[0].startswith("-") else None
    flags = args if path is None else args[1:]
    return load_config(find_objective(path, read_args(flags)), path, flags)[0]


# ---- the flags of a model


def model_options(parser: Parser, **use: Any) -> None:
    """Adds the flags of a model, its adapters and its tokenizer."""
    flag = parser.flag
    about = "HF directory or hub id of a model or an adapter, or run folder"
    flag("--model", about, required=True, type=home, metavar="DIR")
    about = "adapters in peft's format to load; the first one is active"
    flag("--adapter", about, nargs="+", default=[], metavar="[NAME=]DIR")
    about = "active adapter: a name, none, or a weighted sum NAME:0.7,NAME:0.3"
    flag("--use", about, metavar="NAME", **use)
    flag("--dtype", "compute dtype", default="float32", choices=("float32", "bfloat16"))
    about = "chat template: a file or a built-in name; default: the tokenizer's"
    flag("--template", about, type=home)


def adapters(options: argparse.Namespace) -> dict[str, str]:
    """{name: directory} of --adapter; the default name is the directory's, or `default` for one."""
    named: dict[str, str] = {}
    for text in options.adapter:
        name, equals, path = text.rpartition("=")
        if not equals:
            name = "default" if len(options.adapter) == 1 else Path(path).name
        if name in named:
            raise UserError(f"--adapter: two adapters are named {name}; write NAME=DIR")
        named[name] = home(path)
    return named


def uses(texts: Sequence[str]) -> list[Any]:
    """The choices among adapters of --use."""
    from jaxllm.peft.combine import parse_choice

    return [parse_choice(text) for text in texts]
