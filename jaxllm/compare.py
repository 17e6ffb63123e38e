# SPDX-License-Identifier: Apache-2.0
"""`jaxllm compare`: measures full, LoRA, adapter and prefix tuning on the same run.

Each method runs in its own process, so that its peak memory can be measured. The numbers of trained
parameters and optimizer bytes follow from shapes; the rest is read from the run folders.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jaxllm.config import (
    PEFT_METHODS,
    VERBS,
    MeshSection,
    PeftSection,
    TrainConfig,
    load_config,
    loading,
    to_dict,
)
from jaxllm.config.checks import check_run, recorded_config, resolve
from jaxllm.data.inputs import check_inputs
from jaxllm.errors import DONE, STOPPED, UserError, nearest
from jaxllm.paths import local_path, write_text

# Name of a method -> peft.method.
METHODS = {"full" if name == "none" else name: name for name in PEFT_METHODS}
DEFAULT = ("full", "lora", "adapter", "prefix")
# The objectives that have a loss on held-out data.
OBJECTIVES = [name for name, verb in VERBS.items() if not verb.online]
TABLE, OBJECTS = "compare.md", "compare.json"  # in output_dir, next to the runs
HELP = f"""\
usage: jaxllm compare [CONFIG.yaml] [--methods METHOD ...] [--section.key value ...]

Runs the same config once for each method, one after another, and prints a table of the trained
parameters, the size of the optimizer state and of a checkpoint, peak memory, speed and eval loss.
The runs are in output_dir/METHOD, the table in output_dir/{TABLE} and output_dir/{OBJECTS}.
After Ctrl-C or SIGTERM, the same command resumes.

  --methods METHOD ... [{" ".join(DEFAULT)}]
      the methods, in this order: {", ".join(METHODS)}
  --objective NAME [pretrain]
      the objective of each run, also `objective:` in the file; one of
      {", ".join(OBJECTIVES)}
  --overwrite
      delete the runs of an earlier comparison

All other keys are those of a run (`jaxllm sft --help`). A key of the peft section applies to the
methods that read it. data.eval or data.eval_fraction is required. optim.learning_rate applies to
every method; without it, each method uses its own default."""


@dataclass(frozen=True)
class Row:
    """The results of a method; None where its metrics have no value.

    trainable: number of trained parameters; share: relative to the base model's. checkpoint_bytes:
    files of one checkpoint. memory_gib: peak of the device that uses most, of the process on a CPU.
    tokens_per_second: median over the metrics' lines but the first, which is slower. wall_seconds:
    of the process, from its start to its end; of a resumed run, of all its processes.
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


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row.method,
    "trainable": lambda row: f"{row.trainable:,} ({100 * row.share:.3g}%)",
    "optimizer": lambda row: _bytes(row.optimizer_bytes),
    "checkpoint": lambda row: _bytes(row.checkpoint_bytes),
    "peak GiB": lambda row: f"{row.memory_gib:.2f}",
    "tokens/s": lambda row: _number(row.tokens_per_second, ",.0f"),
    "eval loss": lambda row: _number(row.eval_loss, ".4f"),
    "wall": lambda row: str(timedelta(seconds=round(row.wall_seconds))),
}


# ---- from a config to one for each method


def _read(args: list[str]) -> tuple[TrainConfig, dict[str, str], list[str]]:
    """The config that the methods share, the origins of its keys, and the methods."""
    path = args[0] if args and not args[0].startswith("-") else None
    flags = loading.read_args(args[1:] if path else args)
    named = [flag.value for flag in flags if flag.name == "methods"]
    if len(named) > 1:
        raise UserError("--methods is given twice; give all of them after one --methods")
    methods: list[str] = named[0] if named else [*DEFAULT]
    _check_methods(methods)
    objective = loading.find_objective(path, flags, "pretrain")
    rest: list[str] = []
    for flag in flags:
        first, *others = flag.value or [True]
        if flag.name != "methods":
            rest += [f"{flag.where}={first}" if flag.value else flag.where, *others]
    return *load_config(objective, path, rest), methods


def _check_methods(methods: list[str]) -> None:
    known = ", ".join(METHODS)
    if not methods:
        raise UserError(f"--methods names none; there are {known}")
    for method in methods:
        if method not in METHODS:
            near = nearest(method, METHODS)
            hint = f"did you mean {near}?" if near else f"there are {known}"
            raise UserError(f"--methods: unknown method {method}; {hint}")
        if methods.count(method) > 1:
            raise UserError(f"--methods: {method} is given twice")


def _peft_keys(method: str) -> tuple[str, ...]:
    """The keys of the peft section that a method reads."""
    kind = METHODS[method]
    return () if kind == "none" else (*PEFT_METHODS[kind].keys, "quantize_base")


def _config_of(cfg: TrainConfig, method: str) -> TrainConfig:
    keys = {name: getattr(cfg.peft, name) for name in _peft_keys(method)}
    peft = PeftSection(method=METHODS[method], **keys)  # type: ignore[arg-type]
    return replace(cfg, output_dir=str(Path(cfg.output_dir) / method), peft=peft)


def _check(cfg: TrainConfig, origins: dict[str, str], methods: list[str]) -> None:
    """Raises UserError for a config that cannot be compared."""
    if cfg.objective not in OBJECTIVES:
        raise UserError(
            f"objective is {cfg.objective!r}, whose runs have no loss on held-out data to compare; "
            f"use one of {', '.join(OBJECTIVES)}"
        )
    if not cfg.data.eval and not cfg.data.eval_fraction:
        raise UserError("no held-out data to compare on; give data.eval or data.eval_fraction")
    if cfg.save.hub:
        raise UserError("save.hub names one repository for all methods; leave it out")
    if cfg.peft.path:
        raise UserError("peft.path starts one method ahead of the others; leave it out")
    read = {f"peft.{name}" for method in methods for name in _peft_keys(method)}
    for key, origin in origins.items():
        if key.startswith("peft.") and origin.startswith("--") and key not in read:
            raise UserError(f"{origin} is read by none of {', '.join(methods)}; leave it out")
    local_path(cfg.output_dir)  # raises for a bucket


def _program(cfg: TrainConfig) -> Any:
    """A run's program on one CPU device. Raises UserError if the model does not fit the method."""
    import jax

    from jaxllm.mesh import make_mesh
    from jaxllm.peft.virtual_tokens import context_length
    from jaxllm.program import build

    program = build(resolve(cfg), make_mesh(MeshSection(), jax.devices("cpu")[:1]))
    context_length(program.shape, program.adapter, program.cfg.data.length)
    return program


# ---- the runs


def _run(cfg: TrainConfig) -> int:
    """Exit status of a run in its own process; minus the signal that killed it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.json"
        file.write_text(json.dumps(to_dict(cfg), ensure_ascii=False), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "jaxllm", cfg.objective, str(file)]
        # In its own session the run gets no signal from the terminal. This process passes on Ctrl-C
        # and the hangup of a closed terminal as SIGTERM, on which the run saves a checkpoint.
        process = subprocess.Popen(command, start_new_session=True)
        stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {name: signal.getsignal(name) for name in stops}
        for name in stops:
            if before[name] is not signal.SIG_IGN:  # as nohup sets for SIGHUP
                signal.signal(name, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def _check_resume(cfg: TrainConfig) -> None:
    """Raises UserError if the run's folder has results of another config."""
    from jaxllm.identity import check_same_run, fixed

    old, new = fixed(recorded_config(cfg)), fixed(to_dict(cfg))
    for config in (old, new):  # the batch size may be given per device; the run compares it
        for key in ("batch_size", "accumulation"):
            config.pop(key, None)
    folder = Path(cfg.output_dir)
    check_same_run(folder, {"config": old}, {"config": new}, cfg.resume_changed)


def _row(method: str, program: Any, seconds: float) -> Row:
    """The results of a run that has ended."""
    import jax
    from flax import nnx

    from jaxllm.report.columns import parsed

    run = Path(program.cfg.output_dir)
    lines = [*parsed((run / "metrics.jsonl").read_bytes().splitlines())]
    trained = [line for line in lines if line["kind"] == "train"]
    evals = [line for line in lines if line["kind"] == "eval"]
    ledgers = [line for line in lines if line["kind"] == "goodput"]  # of the run and its restarts
    spent = [sum(v for k, v in line.items() if k.endswith("_seconds")) for line in ledgers]
    last = [line for line in evals if line["step"] == evals[-1]["step"]]
    losses = [float(line["loss"]) for line in last if "loss" in line]  # a task of lm-eval has none
    speeds = [line["tokens_per_second"] for line in trained[1:]]
    latest = max((run / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name.partition(".")[0]))
    trainable = program.adapter.count(program.policy)
    weights = nnx.to_flat_state(nnx.state(program.policy, nnx.Param))
    return Row(
        method=method,
        trainable=trainable,
        share=trainable / sum(math.prod(v.get_value().shape) for _, v in weights),
        optimizer_bytes=sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state.opt_state)
        ),
        checkpoint_bytes=sum(p.stat().st_size for p in latest.rglob("*") if p.is_file()),
        memory_gib=max(line["memory_gib"] for line in trained),
        tokens_per_second=median(speeds) if speeds else None,
        eval_loss=fmean(losses) if losses else None,
        wall_seconds=max([seconds, *spent[-1:]]),
        learning_rate=program.cfg.optim.learning_rate,
        steps=trained[-1]["step"],
    )


# ---- the table


def _notes(cfg: TrainConfig, origins: dict[str, str], rows: list[Row]) -> list[str]:
    """Lines below the table."""
    rate = cfg.optim.learning_rate
    defaults = ", ".join(f"{row.method} {row.learning_rate:g}" for row in rows)
    notes = [
        f"{rows[0].steps} steps of {cfg.objective}. tokens/s: median after the first line of "
        "metrics; eval loss: after the last step; %: of the base model's parameters.",
        f"The learning rate {rate:g} ({origins['optim.learning_rate']}) is shared by all methods, "
        "which need different ones."
        if rate
        else f"Learning rates, each method's default: {defaults}.",
    ]
    if any(row.tokens_per_second is None for row in rows):
        notes.append("No tokens/s: the metrics have one line; lower log.every.")
    return notes


def _markdown(cells: list[list[str]], notes: list[str]) -> str:
    lines = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *notes]) + "\n"


def _show(cells: list[list[str]], notes: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for line in cells:
        table.add_row(*line)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)


# ---- the command


def compare(args: list[str]) -> int:
    """`jaxllm compare ARGS`: returns 0, or the exit status of the first run that fails.

    The table then has the runs before it. The same command resumes: runs that are complete end at
    once, and the one that was stopped resumes. Raises UserError for a user's mistake, nearly always
    before the first run.
    """
    if {"-h", "--help"} & set(args):
        print(HELP)
        return DONE
    cfg, origins, methods = _read(args)
    _check(cfg, origins, methods)
    recorded = [recorded_config(_config_of(cfg, method)) for method in methods]
    # All runs have the same date, even after midnight.
    cfg = replace(cfg, data=resolve(cfg, None, next(filter(None, recorded), {})).data)
    configs = {method: _config_of(cfg, method) for method in methods}
    for config in configs.values():
        check_run(config)  # before the imports of `_program`, which take seconds
    check_inputs(cfg)

    import jax

    jax.config.update("jax_platforms", "cpu")  # the runs use the accelerator
    programs = {method: _program(config) for method, config in configs.items()}
    shortest = min(program.cfg.data.length for program in programs.values())
    for method, program in programs.items():  # the default length depends on the virtual tokens
        data = replace(program.cfg.data, max_length=shortest)
        programs[method] = replace(program, cfg=replace(program.cfg, data=data))
    for program in programs.values():
        _check_resume(program.cfg)
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []
    status = 0
    for number, (method, program) in enumerate(programs.items(), 1):
        print(f"compare: {method}, {number} of {len(methods)}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        status = _run(program.cfg)
        if status:
            break
        rows.append(_row(method, program, time.perf_counter() - start))
    if rows:
        notes = _notes(cfg, origins, rows)
        cells = [[cell(row) for cell in COLUMNS.values()] for row in rows]
        write_text(out / OBJECTS, json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        write_text(out / TABLE, _markdown(cells, notes))
    if status:  # printed once the files are written: the terminal may be closed
        end = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        again = "; run the same command to resume" if status == STOPPED else ""
        print(f"compare: {method} {end}{again}", file=sys.stderr, flush=True)
    if rows:
        _show(cells, notes)
        print(out / TABLE)
    return status if status >= 0 else 128 - status
