# SPDX-License-Identifier: Apache-2.0
"""`jaxllm parity`: cut the model and the data, run both sides, and print how they compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxllm.arguments import Parser, integer
from jaxllm.config import (
    ClusterSection,
    EvalSection,
    LogSection,
    SaveSection,
    Source,
    TrainConfig,
    aliases,
    load_config,
)
from jaxllm.config.checks import check, resolve
from jaxllm.config.fields import home
from jaxllm.data.inputs import check_options
from jaxllm.errors import DIFFERENT, DONE, UserError
from jaxllm.parity.reading import Theirs, read_theirs
from jaxllm.paths import check_model

VERBS = ("sft", "dpo", "reward")
NEEDED = ("torch", "trl", "peft")  # of the extra `parity`
PACKED = 16  # records read for each row of a run that packs
MAX_RECORDS = 8192


@dataclass(frozen=True)
class Options:
    """The flags of the command."""

    theirs: str
    data: str
    objective: str | None
    model: str | None
    steps: int
    layers: int


USAGE = (
    "jaxllm parity THEIRS --data FILE [--model DIR] [--objective VERB] [--key value ...]\n\n"
    "Trains a few steps with TRL and with jaxllm, with few layers and the first records, on CPU,\n"
    "and explains why the losses differ. All flags except the following belong to jaxllm's run\n"
    "(`jaxllm sft --help`). Needs the extra `parity`: pip install 'jaxllm[parity]'"
)


def run(parser: Parser, args: list[str]) -> int:
    """`jaxllm parity ARGS`: returns DONE, or DIFFERENT if the losses differ.

    Raises UserError for a user's mistake.
    """
    parser.usage = USAGE
    flag = parser.flag
    about = "your run: a YAML or JSON file of TRL or LLaMA-Factory, a DeepSpeed file, or a Python "
    about += "script, which is parsed and not run"
    flag("theirs", about, type=home, metavar="THEIRS")
    flag("--data", "the data of your run; its first records are used", required=True, type=home)
    flag("--model", "HF directory or hub id; default: from THEIRS", type=home, metavar="DIR")
    flag("--objective", "sft, dpo or reward; default: from THEIRS", metavar="VERB")
    flag("--steps", "steps of both runs", type=integer(1, 1000), default=20, metavar="N")
    flag("--layers", "layers of the model in both runs", type=integer(1), default=2, metavar="N")
    flag("--json", "print one JSON object", action="store_true")
    options, words = parser.parse_known_args(args)
    as_json = vars(options).pop("json")
    found, text = parity(Options(**vars(options)), words)
    print(json.dumps(found) if as_json else text)
    return DONE if found["agree"] else DIFFERENT


def parity(options: Options, words: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Run both sides; returns the comparison as JSON values, and as text.

    words: flags of our run. Raises UserError for a user's mistake, also one that TRL reports.
    """
    theirs = read_theirs(options.theirs)
    cfg = our_config(options, theirs, words)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} not installed; pip install 'jaxllm[parity]'")
    with tempfile.TemporaryDirectory(prefix="jaxllm-parity-") as temporary:
        return compare(cfg, theirs, options, Path(temporary))


def our_config(options: Options, theirs: Theirs, words: Sequence[str]) -> TrainConfig:
    """Our config as the user's run translates, without evaluations, trackers and saving."""
    objective = options.objective or theirs.objective
    if objective not in VERBS:
        seen = f"seen {objective}" if objective else f"{options.theirs} does not say which"
        raise UserError(f"the run is one of {', '.join(VERBS)}: give --objective; {seen}")
    model = options.model or theirs.model
    if not isinstance(model, str):
        raise UserError(f"{options.theirs} names no model; give --model DIR")
    check_model(model)
    check_options({"files": [options.data]})
    names = [
        one for one in theirs.names if one.name not in ("model_name_or_path", "tokenizer_name")
    ]
    flags = ["--model.path", model, "--data.train", options.data]
    cfg, _ = load_config(objective, names, [*flags, *words])
    cfg = replace(
        cfg,
        eval_every=0,
        eval=EvalSection(),
        log=LogSection(),
        save=SaveSection(),
        cluster=ClusterSection(),
        data=replace(cfg.data, eval=(), eval_fraction=0.0),
        align=replace(cfg.align, reference="model"),
    )
    check(cfg)
    return cfg


def compare(
    cfg: TrainConfig, theirs: Theirs, options: Options, folder: Path
) -> tuple[dict[str, Any], str]:
    from jaxllm.compilation import use_cache
    from jaxllm.data.chat import chat_tokenizer
    from jaxllm.data.template import check_limits
    from jaxllm.parity.causes import State, explain, first_difference, our_dropout, run_ours, start

    count, converted = cut_data(cfg, theirs, options, folder / "data.jsonl")
    spec = specification(cfg, theirs, options, folder)
    spec["dropout"] = our_dropout(cfg)
    if cfg.verb.data != "text":  # TRL has Jinja's sandbox and no limits
        for template in {None, cfg.data.template}:
            check_limits(chat_tokenizer(spec["tokenizer"], template))
    say(f"your run: {options.steps} steps on {count:,} records …")
    again = cache_switches(partial(run_theirs, spec))
    recorded = again(())

    import jax

    jax.config.update("jax_platforms", "cpu")
    use_cache()
    say("our run …")
    cfg = on_the_cut(cfg, folder)
    state = start(State(cfg, recorded))
    ours = run_ours(state)
    from jaxllm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / "model")
    at = first_difference(recorded, ours)
    if at is not None:
        say("trying the causes …")
    causes, last, end = explain(state, ours, tokenizer, again)
    notes = [*theirs.notes, *setting_notes(cfg, theirs, recorded, converted)]
    agree = at is None
    explained = first_difference(end.theirs, last) is None
    found = {
        "agree": agree,
        "first_difference": None if agree else at + 1,
        "explained": explained,
        "steps": [
            {"step": i, "theirs": {k: v for k, v in a.items() if k != "micro"}, "ours": asdict(b)}
            for i, (a, b) in enumerate(zip(recorded["steps"], ours, strict=True), 1)
        ],
        "causes": [asdict(cause) for cause in causes],
        "notes": notes,
        "versions": recorded["versions"],
    }
    return found, text_of(found, recorded, cfg)


def say(text: str) -> None:
    print(f"parity: {text}", file=sys.stderr, flush=True)


# ---- the cut


def on_the_cut(cfg: TrainConfig, folder: Path) -> TrainConfig:
    """Our config, resolved, on the cut model and data, in float32 on one device."""
    model = replace(
        cfg.model,
        path=str(folder / "model"),
        tokenizer=None,
        weight_dtype="float32",
        compute_dtype="float32",
        remat="none",
    )
    data = replace(
        cfg.data,
        train=(Source(str(folder / "data.jsonl")),),
        cache_dir=str(folder / "cache"),
        workers=1,
    )
    cfg = replace(cfg, model=model, data=data, output_dir=str(folder / "ours"))
    return resolve(cfg, 1)


def cut_data(cfg: TrainConfig, theirs: Theirs, options: Options, file: Path) -> tuple[int, bool]:
    """Write the first records, as many as the user's steps take; those of another layout than
    TRL's are converted. Returns their number, and whether they were."""
    from jaxllm.data.sources import locate, read, records

    args = theirs.arguments
    each = args.get("per_device_train_batch_size", 8) * args.get("gradient_accumulation_steps", 1)
    wanted = options.steps * each * (PACKED if args.get("packing") else 1)
    (source,) = cfg.data.train
    with tempfile.TemporaryDirectory() as temporary:
        wanted = min(wanted, MAX_RECORDS)
        table = read(locate(source), Path(temporary), wanted)
        pairs = list(records(table[:wanted], range(min(wanted, len(table))), source.path))
    converted = [as_trl(cfg, source, record, location) for location, record in pairs]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in converted]
    file.write_text("".join(lines), encoding="utf-8")
    return len(lines), any(a is not b[1] for a, b in zip(converted, pairs, strict=True))


def as_trl(cfg: TrainConfig, source: Source, record: dict[str, Any], location: str) -> Any:
    """The record, if TRL reads its layout, else its messages."""
    from jaxllm.data.conversations import parse_conversation, parse_pair

    def is_said(value: Any) -> bool:
        listed = isinstance(value, list) and all(isinstance(m, dict) and "role" in m for m in value)
        return isinstance(value, str) or listed

    if cfg.verb.data == "chat":
        if "messages" in record or {"prompt", "completion"} <= record.keys():
            return record
        messages = parse_conversation(record, source, cfg.data, location)["messages"]
        return {"prompt": messages[:-1], "completion": messages[-1:]}
    said = [record.get(name) for name in ("chosen", "rejected")]
    if all(map(is_said, [*said, record.get("prompt", "")])) and "conversations" not in record:
        return record
    pair = parse_pair(record, source, cfg.data, location)
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


# ---- the user's run


def specification(
    cfg: TrainConfig, theirs: Theirs, options: Options, folder: Path
) -> dict[str, Any]:
    """What `theirs.run` needs."""
    tokenizer = theirs.tokenizer if options.model is None else None
    return {
        "verb": cfg.objective,
        "model": cfg.model.path,
        "tokenizer": tokenizer or cfg.model.path,
        "layers": options.layers,
        "steps": options.steps,
        "seed": cfg.seed,
        "data": str(folder / "data.jsonl"),
        "arguments": theirs.arguments,
        "lora": theirs.lora,
        "deepspeed": theirs.deepspeed,
        "folder": str(folder),
    }


def run_theirs(spec: dict[str, Any], switches: Sequence[str]) -> dict[str, Any]:
    """What `theirs.run` records, in a process of its own. Raises UserError for what it reports."""
    folder = Path(spec["folder"])
    file, result, log = (folder / name for name in ("spec.json", "result.json", "log.txt"))
    result.unlink(missing_ok=True)
    full = spec | {"switches": [*switches], "result": str(result)}
    file.write_text(json.dumps(full), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "jaxllm.parity.theirs", str(file)]
    quiet = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            command,
            env=os.environ | quiet,
            stdin=subprocess.DEVNULL,  # what asks for input there is not seen
            stdout=stream,
            stderr=stream,
        )
    if not result.is_file():
        last = (log.read_text(encoding="utf-8", errors="replace").splitlines() or [""])[-1]
        raise UserError(f"your run ended with status {done.returncode}: {last}")
    recorded = json.loads(result.read_text(encoding="utf-8"))
    if "error" in recorded:
        raise UserError(f"your run, not ours, fails on this cut: {recorded['error']}")
    return recorded


def cache_switches(run: Callable[[tuple[str, ...]], dict[str, Any]]) -> Any:
    """The user's run with the switches so far and one more; each set of switches runs once."""
    so_far: list[str] = []
    once = cache(run)

    def again(switches: Sequence[str]) -> dict[str, Any]:
        so_far.extend(one for one in switches if one not in so_far)
        return once(tuple(so_far))

    return again


# ---- the result as text


def setting_notes(
    cfg: TrainConfig, theirs: Theirs, recorded: dict[str, Any], converted: bool
) -> list[str]:
    """Lines on what both runs do alike, whatever the arguments say."""
    alike = "in both runs: one CPU device, float32, no remat, the records in the order of the file"
    if recorded["dropout"] and recorded["dropout"].get("lora_dropout") == cfg.peft.lora_dropout:
        alike += ", no dropout (its draws cannot be equal)"
    notes = [alike]
    if converted:
        notes.append("the records were converted to TRL's layout: prompt, and completion or pair")
    asked = [n for n in ("bf16", "dtype", "pure_bf16") if any(n == g.name for g in theirs.names)]
    if asked:
        notes.append(f"{', '.join(asked)}: bfloat16 is not compared, both runs are in float32")
    if unknown := [name for name in recorded["unknown"] if name not in aliases.IGNORED]:
        names = ", ".join(unknown)
        notes.append(f"no arguments of {recorded['trainer']}, so left out of your run: {names}")
    return notes


def text_of(found: dict[str, Any], recorded: dict[str, Any], cfg: TrainConfig) -> str:
    """The table, the verdict, the causes and the notes."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"your run: {recorded['trainer']} ({versions}); ours: jaxllm {cfg.objective}",
        f"model: {recorded['parameters']:,} parameters with random weights, "
        f"{' of '.join(map(str, recorded['layers']))} layers",
        "",
        f"{'':>6}{'loss':>21}{'':>11}{'gradient norm':>20}{'learning rate':>22}",
        f"{'step':>6}{'yours':>11}{'ours':>10}{'difference':>12}{'yours':>10}{'ours':>9}"
        f"{'yours':>12}{'ours':>10}",
    ]
    for row in found["steps"]:
        a, b = row["theirs"], row["ours"]
        mark = " <" if row["step"] == found["first_difference"] else ""
        lines.append(
            f"{row['step']:>6}{a['loss']:>11.5f}{b['loss']:>10.5f}"
            f"{b['loss'] - a['loss']:>12.1e}{a['grad_norm']:>10.4f}{b['grad_norm']:>9.4f}"
            f"{a['learning_rate']:>12.3g}{b['learning_rate']:>10.3g}{mark}"
        )
    lines += ["", *verdict(found)]
    lines += [f"note: {note}" for note in found["notes"]]
    return "\n".join(lines)


def verdict(found: dict[str, Any]) -> list[str]:
    """What agrees; else the causes in the order in which they were tried, and what to set."""
    from jaxllm.parity.causes import TOLERANCE

    pairs = [(row["theirs"]["loss"], row["ours"]["loss"]) for row in found["steps"]]
    largest = max(abs(a - b) for a, b in pairs)
    causes = found["causes"]
    within = f"within {TOLERANCE:g}, relative above 1"
    if found["agree"]:
        lines = [f"all {len(pairs)} losses agree {within} (largest difference {largest:.1e})"]
        lines += [f"also different: {one['name']}: {one['about']}" for one in causes]
    else:
        step = found["first_difference"]
        lines = [f"the losses differ from step {step} on; they agree {within}. The causes:"]
        for number, one in enumerate(causes, 1):
            lines.append(f"{number}. {one['name']}: {one['about']}")
            lines.append(f"   {one['then']}")
        if not found["explained"]:
            lines.append(
                "these do not explain all. A small difference late in the run may be rounding "
                "that grew; please report any other"
            )
    flags = {key: value for one in causes for key, value in one["flags"].items()}
    if flags:
        lines.append(f"to train as your run does: {' '.join(as_flags(flags))}")
    return lines


def as_flags(flags: dict[str, Any]) -> list[str]:
    """{key: value} as the flags of a command line."""

    def shown(value: Any) -> str:
        if isinstance(value, list | tuple):
            return " ".join(map(shown, value))
        return str(value).lower() if isinstance(value, bool) else f"{value}"

    return [f"--{key} {shown(value)}" for key, value in flags.items()]
