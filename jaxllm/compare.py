# SPDX-License-Identifier: Apache-2.0
"""Full, LoRA, adapter and prefix tuning side by side, measured: the same run once for each method.

Each run is a process of its own, so that its peak memory is that method's alone. What is trained
and what the optimizer keeps for it follow from shapes; the rest is read from the run folders.
"""

from __future__ import annotations

import difflib
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jaxllm.config import (
    PEFT_METHODS,
    SECTIONS,
    MeshSection,
    PeftSection,
    TrainConfig,
    aliases,
    load_config,
    to_dict,
)
from jaxllm.config.checks import check, has_results, resolve
from jaxllm.errors import UserError

# The methods by the chapter's names -> peft.method.
METHODS = {"full" if name == "none" else name: name for name in PEFT_METHODS}
DEFAULT = ("full", "lora", "adapter", "prefix")
TABLE, OBJECTS = "compare.md", "compare.json"  # in output_dir, beside the runs
HELP = f"""\
usage: jaxllm compare [CONFIG.yaml] [--methods METHOD ...] [--section.key value ...]

Runs the same config once for each method, one after another, and prints a table of what is trained,
the optimizer's and a checkpoint's bytes, peak memory, speed and eval loss. The runs lie in
output_dir/METHOD, the table in output_dir/{TABLE} and output_dir/{OBJECTS}.

  --methods METHOD ... [{" ".join(DEFAULT)}]
      which, in this order: {", ".join(METHODS)}
  --objective pretrain|sft [pretrain]
      what each run is; also `objective:` in the file
  --overwrite
      delete the runs of an earlier comparison

Every other key is that of a run (`jaxllm sft --help`). Keys of the peft section go to the methods
that read them. data.eval or data.eval_fraction must be there. A learning rate, when given, is every
method's; else each has its own default."""


@dataclass(frozen=True)
class Row:
    """One method's line; a figure that the run's metrics do not hold is None.

    trainable: numbers trained; share: of the model's own weights. checkpoint_bytes: files of one
    checkpoint. memory_gib: the peak of the fullest device, of the process on a CPU.
    tokens_per_second: median of the metrics' lines after the first, in which memory is first
    touched. wall_seconds: of the process, from its start to its end.
    """

    method: str
    trainable: int
    share: float
    optimizer_bytes: int
    checkpoint_bytes: int
    memory_gib: float
    tokens_per_second: float | None
    eval_loss: float | None
    wall_seconds: float
    learning_rate: float
    steps: int


def _bytes(count: int) -> str:
    power = next(p for p in (3, 2, 1) if count >= 1024**p or p == 1)
    return f"{count / 1024**power:,.2f} {' KMG'[power]}iB"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("method", lambda row: row.method),
    ("trainable", lambda row: f"{row.trainable:,} ({100 * row.share:.3g}%)"),
    ("optimizer", lambda row: _bytes(row.optimizer_bytes)),
    ("checkpoint", lambda row: _bytes(row.checkpoint_bytes)),
    ("peak GiB", lambda row: f"{row.memory_gib:.2f}"),
    ("tokens/s", lambda row: _number(row.tokens_per_second, ",.0f")),
    ("eval loss", lambda row: _number(row.eval_loss, ".4f")),
    ("wall", lambda row: str(timedelta(seconds=round(row.wall_seconds)))),
)


# ---- from a config to one for each method


def _read(args: list[str]) -> tuple[TrainConfig, dict[str, str], list[str]]:
    """The config that the methods share, where its keys came from, and the methods."""
    path = args[0] if args and not args[0].startswith("-") else None
    given = aliases.read_args(args[1:] if path else args)
    named = [one.value for one in given if one.name == "methods"]
    if len(named) > 1:
        raise UserError("--methods is given twice; give all of them after one --methods")
    methods = _known(named[0] if named else DEFAULT)
    rest: list[str] = []
    for one in given:
        if one.name != "methods":
            first = [f"{one.where}={one.value[0]}"] if one.value else [one.where]
            rest += first + one.value[1:]
    file = aliases.read_yaml(path, tuple(SECTIONS)) if path else []
    said: list[Any] = [one.value for one in file if one.name == "objective"]
    said += [one.value[0] if one.value else True for one in given if one.name == "objective"]
    cfg, where = load_config(said[-1] if said else "pretrain", path, rest)
    return cfg, where, methods


def _known(methods: Sequence[str]) -> list[str]:
    """`methods` as they are. Raises ValueError for one that is not known, one twice, and none."""
    known = ", ".join(METHODS)
    if not methods:
        raise UserError(f"--methods names none; there are {known}")
    for method in methods:
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {known}"
            raise UserError(f"--methods: unknown method {method}; {hint}")
        if methods.count(method) > 1:
            raise UserError(f"--methods: {method} is given twice")
    return list(methods)


def _reads(method: str) -> tuple[str, ...]:
    """The names of the peft section that a method reads."""
    kind = METHODS[method]
    return () if kind == "none" else (*PEFT_METHODS[kind].keys, "quantize_base")


def _config_of(cfg: TrainConfig, method: str) -> TrainConfig:
    own = {name: getattr(cfg.peft, name) for name in _reads(method)}
    peft = PeftSection(method=METHODS[method], **own)  # type: ignore[arg-type]
    return replace(cfg, output_dir=str(Path(cfg.output_dir) / method), peft=peft)


def _check(cfg: TrainConfig, where: dict[str, str], methods: list[str]) -> None:
    """Raises ValueError for what makes no comparison, before the first run is begun."""
    if cfg.objective not in ("pretrain", "sft"):
        raise UserError(f"objective is {cfg.objective!r}; compared are runs of pretrain and of sft")
    if not cfg.data.eval and not cfg.data.eval_fraction:
        raise UserError("nothing held out to compare by; give data.eval or data.eval_fraction")
    if cfg.peft.path:
        raise UserError("peft.path starts one method ahead of the others; leave it out")
    read = {f"peft.{name}" for method in methods for name in _reads(method)}
    for key, at in where.items():
        if key.startswith("peft.") and at.startswith("--") and key not in read:
            raise UserError(f"{at} is read by none of {', '.join(methods)}; leave it out")
    for method in methods:
        folder = Path(cfg.output_dir) / method
        if has_results(folder) and not cfg.overwrite:
            raise UserError(
                f"{folder} has the results of a run; change output_dir or say --overwrite"
            )


def _program(cfg: TrainConfig) -> Any:
    """A run's program on one CPU device. Raises UserError if the model does not fit the method."""
    import jax

    from jaxllm.mesh import make_mesh
    from jaxllm.peft.virtual_tokens import context_length
    from jaxllm.program import build

    program = build(resolve(cfg), make_mesh(MeshSection(), jax.devices("cpu")[:1]))
    context_length(program.shape, program.adapter, cfg.data.max_length)
    return program


# ---- the runs


def _run(cfg: TrainConfig) -> int:
    """Exit status of a run in a process of its own; minus the signal that killed it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        file.write_text(json.dumps(to_dict(cfg), ensure_ascii=False), encoding="utf-8")
        command = [sys.executable, "-m", "jaxllm", cfg.objective, str(file)]
        # In a session of its own the run gets Ctrl-C from this process alone, and saves once.
        process = subprocess.Popen(command, start_new_session=True)
        names = (signal.SIGTERM, signal.SIGINT)
        before = {name: signal.signal(name, lambda *_: process.terminate()) for name in names}
        try:
            return process.wait()
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def _row(method: str, program: Any, seconds: float) -> Row:
    """The line of a run that has ended."""
    run = Path(program.cfg.output_dir)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    held_out = [line for line in lines if line["kind"] == "eval"]
    losses = [float(line["loss"]) for line in held_out if line["step"] == held_out[-1]["step"]]
    speeds = [line["tokens_per_second"] for line in trained[1:]]
    saved = max((run / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name.partition(".")[0]))
    trainable, total, optimizer_bytes = _sizes(program)
    rate = program.cfg.optim.learning_rate
    assert rate is not None
    return Row(
        method=method,
        trainable=trainable,
        share=trainable / total,
        optimizer_bytes=optimizer_bytes,
        checkpoint_bytes=sum(p.stat().st_size for p in saved.rglob("*") if p.is_file()),
        memory_gib=max(line["memory_gib"] for line in trained),
        tokens_per_second=median(speeds) if speeds else None,
        eval_loss=fmean(losses) if losses else None,
        wall_seconds=seconds,
        learning_rate=rate,
        steps=trained[-1]["step"],
    )


def _sizes(program: Any) -> tuple[int, int, int]:
    """(trained parameters, parameters of the base model, bytes of the optimizer state)."""
    import jax
    from flax import nnx

    base = nnx.to_flat_state(nnx.state(program.policy, nnx.Param))
    optimizer = jax.tree.leaves(program.state.opt_state)
    return (
        program.adapter.count(program.policy),
        sum(math.prod(v.get_value().shape) for _, v in base),
        sum(x.size * x.dtype.itemsize for x in optimizer),
    )


# ---- the table


def _notes(cfg: TrainConfig, where: dict[str, str], rows: list[Row]) -> list[str]:
    """What must be known to read the table, a line each."""
    rate, at = cfg.optim.learning_rate, where["optim.learning_rate"]
    each = ", ".join(f"{row.method} {row.learning_rate:g}" for row in rows)
    notes = [
        f"{rows[0].steps} steps of {cfg.objective}; tokens/s is the median after the first line of "
        "metrics, eval loss that after the last step, % of the model's own weights.",
        f"The learning rate {rate:g} ({at}) is shared by all methods, which need different ones."
        if rate
        else f"Learning rates, each method's default: {each}.",
    ]
    if any(row.tokens_per_second is None for row in rows):
        notes.append("No tokens/s: the metrics have one line; lower log.every.")
    return notes


def _markdown(rows: list[Row], notes: list[str]) -> str:
    lines = [
        [heading for heading, _ in COLUMNS],
        ["---", *["---:"] * (len(COLUMNS) - 1)],
        *([cell(row) for _, cell in COLUMNS] for row in rows),
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *notes]) + "\n"


def _show(rows: list[Row], notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for place, (heading, _) in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if place else "left")
    for row in rows:
        table.add_row(*(cell(row) for _, cell in COLUMNS))
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)


# ---- the verb


def compare(args: list[str]) -> int:
    """`jaxllm compare ARGS`: the exit status, that of the first run that fails.

    The table is then of the runs before it. Raises ValueError for a user's mistake, nearly all of
    them before the first run.
    """
    cfg, where, methods = _read(args)
    _check(cfg, where, methods)
    date = resolve(cfg).data.date  # the same for all runs, even if one starts after midnight
    cfg = replace(cfg, data=replace(cfg.data, date=date))
    configs = {method: _config_of(cfg, method) for method in methods}
    for one in configs.values():
        check(one)  # all of them before the seconds that _plan's imports take

    import jax

    jax.config.update("jax_platforms", "cpu")  # the accelerator is the runs'
    programs = {method: _program(one) for method, one in configs.items()}
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    ended: dict[str, float] = {}
    status = 0
    for place, method in enumerate(methods, 1):
        print(f"compare: {method}, {place} of {len(methods)}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        status = _run(configs[method])
        if status:
            end = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            print(f"compare: {method} {end}", file=sys.stderr, flush=True)
            break
        ended[method] = time.perf_counter() - began
    if ended:
        rows = [_row(method, programs[method], s) for method, s in ended.items()]
        notes = _notes(cfg, where, rows)
        (out / OBJECTS).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        (out / TABLE).write_text(_markdown(rows, notes), encoding="utf-8")
        _show(rows, notes)
        print(out / TABLE)
    return status if status >= 0 else 128 - status
