# SPDX-License-Identifier: Apache-2.0
"""The process that runs the reward functions of one module, so that they cannot end the run.

rewards.py starts this file as a program. It answers each message, a JSON object, with another one:

    {"path": sys.path, "module": name or file}                     {}
    {"function": name}, which must exist                           {}
    {"function", "prompts", "completions", "columns", "places"}    {"rewards": [number or null, …]}

or with {"error": text}. places: the location of each prompt, for that text. It imports the standard
library only, so that it starts at once.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LARGEST = (2 - 2**-23) * 2.0**127  # of float32
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the run handles them


def serve(connection: Connection) -> None:
    """Answers messages until the run ends."""
    _isolate(connection)
    runner = asyncio.Runner()  # one loop, in which async functions may keep connections
    module: Any = None
    folder: Path | None = None  # of the module
    with suppress(EOFError, OSError):  # the run has ended, or a function closed the connection
        while True:
            message = json.loads(connection.recv_bytes())
            answer: dict[str, Any] = {}
            try:
                if "module" in message:
                    sys.path[:] = message["path"]
                    folder = _folder(message["module"])
                    module = _import(message["module"])
                else:
                    function = getattr(module, message["function"])
                    if not callable(function):
                        raise TypeError(f"{message['function']} is not a function")
                    if "prompts" in message:
                        answer = _call(function, runner, message, folder)
            except BaseException as error:  # SystemExit and a library's panic are failures too
                answer = {"error": _described(error, folder)}
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):  # a function may have closed it
                    stream.flush()
            connection.send_bytes(json.dumps(answer).encode())


def _isolate(connection: Connection) -> None:
    """Ends with the run and not before; what the functions start does not inherit that."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, for a run that is killed
    os.set_inheritable(connection.fileno(), False)
    for name in SIGNALS:
        signal.signal(name, lambda *_: None)  # SIG_IGN would be inherited by other programs

    def forked() -> None:
        connection.close()
        for name in SIGNALS:
            signal.signal(name, signal.SIG_DFL)

    os.register_at_fork(after_in_child=forked)


def _import(name: str) -> Any:
    """The module of a dotted name or a .py file.

    Processes that a function starts import it by its name again, and so do dataclasses and pickle.
    """
    if not name.endswith(".py"):
        sys.path.insert(0, os.getcwd())  # as `python -m` does
        return importlib.import_module(name)
    file = Path(name).expanduser().resolve()
    sys.path.insert(0, str(file.parent))  # as for a script
    taken = file.stem in sys.modules or file.stem in sys.stdlib_module_names
    name = f"reward_{file.stem}" if taken else file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folder(name: str) -> Path:
    """The folder whose lines an error names."""
    return Path(name).expanduser().resolve().parent if name.endswith(".py") else Path.cwd()


def _call(
    function: Callable[..., Any], runner: asyncio.Runner, message: Any, folder: Path | None
) -> dict[str, Any]:
    """{"rewards"} of the function, or {"error"} that names the prompt."""
    places, by_name = message["places"], _takes_names(function, message["columns"])

    def run(start: int, stop: int) -> list[Any]:
        prompts, completions = (message[k][start:stop] for k in ("prompts", "completions"))
        columns = {name: column[start:stop] for name, column in message["columns"].items()}
        if by_name:
            found = function(prompts=prompts, completions=completions, **columns)
        else:
            found = function(prompts, completions, **columns)
        return runner.run(found) if inspect.iscoroutine(found) else found

    def raises(index: int) -> bool:
        try:
            run(index, index + 1)
        except BaseException:  # the error of the batch is the one to report
            return True
        return False

    try:
        found = run(0, len(places))
    except BaseException as error:
        text = _described(error, folder)
        culprit = next(filter(raises, range(len(places))), 0)
        return {"error": f"failed at {places[culprit]}: {text}"}
    try:
        rewards = None if isinstance(found, str | bytes | dict | set) else list(found)
    except TypeError:
        rewards = None
    if rewards is None or len(rewards) != len(places):
        seen = _shown(found) if rewards is None else f"{len(rewards)} rewards"
        return {
            "error": f"returned {seen} for {len(places)} completions, starting at {places[0]}; "
            "return a list with one number (or None) for each"
        }
    numbers = [*map(_number, rewards)]
    if math.nan in numbers:  # the same object
        index = numbers.index(math.nan)
        return {
            "error": f"returned {_shown(rewards[index])} at {places[index]}; a reward is a finite "
            "number, or None for no score"
        }
    return {"rewards": numbers}


def _takes_names(function: Callable[..., Any], columns: Any) -> bool:
    """True if the function's arguments have the names of TRL's, in any order."""
    try:
        signature = inspect.signature(function)
        signature.bind(prompts=[], completions=[], **columns)
    except (TypeError, ValueError):
        return False
    return "completions" in signature.parameters


def _number(value: Any) -> float | None:
    """The value as a float, math.nan if it is no finite number.

    A number of any library is one: NumPy's bool, and arrays of jax and torch without dims.
    """
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes) or len(getattr(value, "shape", ())):
            return math.nan
        number = float(value)
    except Exception:  # what has no __float__, or one that raises
        return math.nan
    return number if abs(number) <= LARGEST else math.nan


def _described(error: BaseException, folder: Path | None) -> str:
    """The error and the line that raised it, in the module's folder if there is one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    frames = [frame for frame in frames if not frame.filename.startswith("<")]  # of importlib
    files = [Path(frame.filename) for frame in frames]
    own = [
        frame
        for frame, file in zip(frames, files, strict=True)
        if folder and file.is_relative_to(folder) and "site-packages" not in file.parts
    ]
    where = [f" ({frame.filename}:{frame.lineno})" for frame in own or frames]
    return f"{type(error).__name__}: {error}{where[-1] if where else ''}"


def _shown(value: Any) -> str:
    return repr(value)[:200]


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
