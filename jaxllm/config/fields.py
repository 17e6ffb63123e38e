# SPDX-License-Identifier: Apache-2.0
"""Types of config fields: their ranges and units, and the short forms that a user may write."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, Unit


@dataclass(frozen=True)
class Given:
    """A value with the name it was given by and its origin: file:line or the flag."""

    name: str
    value: Any
    where: str


@dataclass(frozen=True)
class Read:
    """Converts what a user wrote to a value of the field's type; other values pass through."""

    convert: Callable[[Any], Any]


def home(value: Any) -> Any:
    """Expand ~, which a shell does in `--key ~/x` but not in `--key=~/x` or in YAML."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """A string or number -> a list of one."""
    return [value] if isinstance(value, str | int | float) else value


def sources(value: Any) -> Any:
    """A path, a source, or a list of them -> a list of sources."""
    several = [value] if isinstance(value, str | dict) else value
    if not isinstance(several, list):
        return value
    return [{"path": v} if isinstance(v, str) else v for v in several]


# Trackers and the packages that they need.
TRACKER_PACKAGES = {
    "wandb": "wandb",
    "tensorboard": "tensorboardX",
    "swanlab": "swanlab",
    "trackio": "trackio",
    "mlflow": "mlflow",
}


def installed(tracker: str) -> bool:
    """True if the package of a tracker is installed; it is not imported."""
    spec = find_spec(TRACKER_PACKAGES[tracker])
    return spec is not None and spec.origin is not None  # None: a folder of this name, as of runs


def trackers(value: Any) -> Any:
    """none, all (that are installed), a name, comma-separated names, or a list of these -> a list
    of names, each once."""
    if value in (None, False, "none"):
        return []
    if value == "all":
        return list(filter(installed, TRACKER_PACKAGES))
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return value
    return list(dict.fromkeys(name for one in value for name in trackers(one)))


def names(value: Any) -> Any:
    """A name, comma-separated names, or a list of these -> a list of names, each once."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(one, str) for one in several):
        return value
    found = (name.strip() for text in several for name in text.split(","))
    return list(dict.fromkeys(filter(None, found)))


def cache_dir(value: Any) -> Any:
    """A directory, or off, which YAML reads as false."""
    return "off" if value is False else home(value)


def lora_init(value: Any) -> Any:
    """peft calls kaiming True."""
    return "kaiming" if value is True else value


# Steps and rows are int32, so counts must fit it; a seed must fit an int64.
Count = Annotated[int, Ge(0), Le(2**31 - 1)]
Size = Annotated[int, Ge(1), Le(2**31 - 1)]
Rank = Annotated[int, Gt(0), Le(2**16)]  # tables have a column for each
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Amount = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Tokens = Annotated[Size, Unit("tokens")]
Path = Annotated[str, Read(home)]
# Steps between two events, or once per epoch.
Interval = Annotated[Count, Unit("steps")] | Literal["epoch"]
# A number of steps, or a fraction of all steps if below 1.
StepsOrFraction = Annotated[float, Ge(0), Unit("steps, or fraction of all steps")]
Schedule = Literal[
    "cosine", "linear", "polynomial", "constant", "wsd", "inverse_sqrt", "warmup_log"
]
LoraInit = Annotated[Literal["kaiming", "gaussian", "pissa"], Read(lora_init)]
Role = Literal["system", "developer", "user", "assistant", "tool"]
# fmt: off
DpoLoss = Literal[
    "sigmoid", "robust", "hinge", "ipo", "exo", "nca", "sppo", "bco", "apo_zero", "apo_down", "sft",
    "orpo", "simpo",
]
# fmt: on
