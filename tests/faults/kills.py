# SPDX-License-Identifier: Apache-2.0
"""Kills runs inside saves and exports and at random, and damages their files.

    make faults

A run that is killed is resumed by the same command until it ends. A damaged one is resumed too, and
where it is refused, it must name the file and the remedy, which is then applied. In the end the
weights, metrics, rows and samples must be those of an undisturbed run, bit for bit. Exits with
status 1 if they are not, or if there is a traceback or a hang.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[n]) for n in (1, 2)]
from runs import CORPUS, DEVICES, ENV, MODEL, arguments  # noqa: E402, found by the line above

SECONDS = 240  # a run takes a few
SAVE, UNFINISHED, EXPORT = "checkpoints", ".orbax-checkpoint-tmp", ".final."
STEPS, EVERY = 6, 2  # of a run, and between its saves
KILLS, LONG = 20, 24  # kills at random moments, and steps of their runs
MOMENTS = ("first save", "first save", "later save", "export", "export")
LORA = ("--peft.method", "lora", "--peft.r", "4", "--peft.target_modules", "all-linear")
SAMPLES = ("--log.samples", "def load(", "--log.sample_tokens", "8")
EVAL = ("--data.eval", "{project}/eval.jsonl", "--eval_every", "3", *SAMPLES)
ONLINE = ("--data.max_length", "48", "--rl.max_new_tokens", "8")
ONLINE += ("--rl.rewards", "{project}/judge.py:length")
# name -> (command, data, whether it starts from the base model, arguments)
OBJECTIVES: dict[str, tuple[str, str, bool, tuple[str, ...]]] = {
    "pretrain": ("pretrain", "text.txt", False, ()),
    "sft": ("sft", "chats.jsonl", False, SAMPLES),
    "sft, LoRA": ("sft", "chats.jsonl", True, LORA),
    "reward": ("reward", "pairs.jsonl", True, ()),
    "dpo": ("dpo", "pairs.jsonl", True, (*LORA, *EVAL, "--align.reference", "precomputed")),
    "kto": ("kto", "judged.jsonl", True, ()),
    "ppo": ("ppo", "sums.jsonl", True, (*ONLINE, "--rl.iterations", "2")),
    "grpo": ("grpo", "sums.jsonl", True, (*ONLINE, "--rl.group_size", "4")),
}


def make_project(folder: Path) -> None:
    """A tokenizer, a model config, data of all kinds and a reward function."""
    from jaxllm.data.tokenizer_training import train_tokenizer

    folder.mkdir(parents=True)
    text = "\n".join(p.read_text() for p in sorted(CORPUS.parent.glob("*.py")))
    (folder / "text.txt").write_text(text)
    train_tokenizer([folder / "text.txt"], folder / "tokenizer", vocab_size=500)
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "judge.py").write_text(
        "def length(prompts, completions, **_):\n    return [len(c) / 10 for c in completions]\n"
    )
    lines = [line.strip()[:40] for line in text.splitlines() if len(line.strip()) > 20]
    asked = [*zip(lines[::2], lines[1::2], strict=False)][:64]
    user, said = ({"role": role} for role in ("user", "assistant"))
    pairs = [{"prompt": q, "chosen": f"yes {a}", "rejected": f"no {a[::-1]}"} for q, a in asked]
    records = {
        "chats": [{"messages": [user | {"content": q}, said | {"content": a}]} for q, a in asked],
        "pairs": pairs[:48],
        "eval": pairs[48:],
        "judged": [
            {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"]}
            | {"label": bool(i % 2)}
            for i, p in enumerate(pairs)
        ],
        "sums": [{"prompt": f"{a} + {b} = "} for a in range(8) for b in range(8)],
    }
    for name, some in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))


def command(
    project: Path,
    name: str,
    run: Path,
    cache: Path | None = None,
    steps: int = STEPS,
    rows: int = 8,
) -> list[str]:
    """The arguments of a run of an objective. rows: per device."""
    verb, data, has_base, more = OBJECTIVES[name]
    more = tuple(word.format(project=project) for word in more)
    args = arguments(project, verb, str(run), "--data.train", str(project / data), *more)
    if has_base:
        at = args.index("--model.config")
        args[at : at + 4] = ["--model.path", str(project / "pretrain" / "final")]
    args += ["--batch_size", "8", "--micro_batch_size", str(rows), "--steps", str(steps)]
    args += ["--save.every", str(EVERY), "--log.progress", "false"]
    return [*args, "--data.cache_dir", str(cache)] if cache else args


# ---- processes, forked from one that has imported everything


def serve(pipe: Any, log: str, before: Callable[[], None] | None) -> None:
    """Runs commands one after another, and answers each with its exit status or its traceback.

    before: is called once, to inject a fault."""
    from jaxllm.cli import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if before:
        before()
    while True:
        try:
            args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(main(args))
        except BaseException:
            pipe.send(traceback.format_exc())


class Worker:
    """A process that runs commands. log: of what it prints. before: as for `serve`."""

    def __init__(self, log: Path, before: Callable[[], None] | None = None):
        context = multiprocessing.get_context("forkserver")
        self.log = log
        self.pipe, theirs = context.Pipe()
        run = {"target": serve, "args": (theirs, str(log), before), "daemon": True}
        self.process = context.Process(**run)
        self.process.start()
        theirs.close()

    def start(self, args: list[str]) -> None:
        self.log.write_bytes(b"")
        self.pipe.send(args)

    def result(self) -> int | str:
        """The exit status of the command, or what else became of it."""
        try:
            if self.pipe.poll(SECONDS):
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return f"died with status {self.process.exitcode}"
        self.kill()
        return f"hung for {SECONDS} s"

    def run(self, args: list[str]) -> int | str:
        self.start(args)
        return self.result()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


# ---- comparing


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def numbers(file: Path) -> list[str]:
    """The lines of a JSONL file of a run without what two runs need not share."""
    from jaxllm.verify_resume import TIMES

    found = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            values = json.loads(line)
            if values.get("kind") not in ("goodput", "error", "plan"):
                kept = {k: v for k, v in values.items() if k not in TIMES}
                found.append(json.dumps(kept, sort_keys=True))
        except (ValueError, AttributeError):
            found.append(line)
    return found


def difference(want: Path, run: Path, damaged: str = "", intact: Sequence[str] = ()) -> str:
    """What of a run is not as in the run `want`; "" if nothing is.

    damaged: a file whose content was damaged; what a resumed run wrote to it must be there, and the
    `intact` lines of before.
    """
    for name in ("final", "model"):
        here, there = contents(run / name), contents(want / name)
        for file in sorted({*here, *there}):
            if here.get(file) != there.get(file):
                return f"{name}/{file} differs"
    for name in ("metrics.jsonl", "samples.jsonl"):
        here, there = numbers(run / name), numbers(want / name)
        if name == damaged:
            kept = [*intact, *(x for x in there if json.loads(x)["step"] > STEPS - EVERY)]
            here, there = [x for x in here if x in there], [x for x in there if x in kept]
        if here != there:
            return f"{name} differs: {sorted({*here} ^ {*there})[:1]}"
    here, there = (one / "rows.bin" for one in (run, want))
    size = there.stat().st_size // STEPS * EVERY if damaged == "rows.bin" else 0
    if here.read_bytes()[-size:] != there.read_bytes()[-size:]:
        return "rows.bin differs"
    return ""


# ---- kills


@dataclass
class Row:
    """Counts of one row of a table, and what was lost."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


def partial_folders(run: Path) -> set[tuple[str, int, int]]:
    """The folders of saves and exports that have not ended."""
    found = set()
    for folder, mark in ((run, EXPORT), (run / SAVE, UNFINISHED)):
        try:
            names = [name for name in os.listdir(folder) if mark in name]
        except FileNotFoundError:
            continue
        for name in names:
            try:
                stat = os.stat(folder / name)
            except FileNotFoundError:
                continue
            found.add((name, stat.st_ino, stat.st_ctime_ns))
    return found


def is_at(moment: str, folders: set[tuple[str, int, int]]) -> bool:
    """Whether a save or export has begun; any save is the first one of a process."""
    if moment == "export":
        return any(name.startswith(EXPORT) for name, *_ in folders)
    steps = [int(name.partition(".")[0]) for name, *_ in folders if not name.startswith(EXPORT)]
    return any(moment == "first save" or step > EVERY for step in steps)


def durations(worker: Worker, run: Path) -> dict[str, float]:
    """Seconds that the first save, the later saves and the export of an undisturbed run take."""
    seconds, before = dict.fromkeys(MOMENTS, 0.0), time.monotonic()
    until = before + SECONDS
    while not worker.pipe.poll(0.0005) and before < until:
        now, folders = time.monotonic(), partial_folders(run)
        for moment in seconds:
            seconds[moment] += (now - before) * is_at(moment, folders)
        before = now
    seconds["later save"] /= max(STEPS // EVERY - 1, 1)
    return seconds


def kill_at(worker: Worker, run: Path, moment: str, delay: float) -> str | None:
    """Kills a run `delay` seconds after a moment: where that was; None if the run ended before."""
    old, until = partial_folders(run), time.monotonic() + SECONDS
    while not worker.pipe.poll(0.0005) and time.monotonic() < until:
        if is_at(moment, partial_folders(run) - old):
            time.sleep(delay)
            if worker.pipe.poll():
                break
            worker.kill()
            inside = {name.startswith(EXPORT) for name, *_ in partial_folders(run) - old}
            return "in an export" if True in inside else "in a save" if inside else "elsewhere"
    return None


class Killed:
    """An objective's run, which is killed and resumed, and what came of it.

    It goes on as the undisturbed run in `project` did. folder: of the run and of its log.
    """

    def __init__(self, name: str, project: Path, folder: Path):
        self.name, self.row, self.kills = name, Row(), 0
        self.straight, self.run = project / name.replace(", ", "-"), folder / name
        self.log, self.args = folder / f"{name}.log", command(project, name, self.run)
        worker = Worker(self.log)
        worker.start(command(project, name, self.straight))
        self.seconds = durations(worker, self.straight)
        self.ended("the undisturbed run", worker.result(), worker)

    def ended(self, what: str, status: int | str, worker: Worker) -> None:
        """A start of the run has ended, by itself (status 0) or by a kill (-9)."""
        worker.kill()
        if status not in (0, -9) or " is damaged" in worker.said():
            self.row.lost.append(f"{what}: {status}\n{worker.said()[-3000:]}")
        if (self.run / "final").exists():
            if contents(self.run / "final") != contents(self.straight / "final"):
                self.row.lost.append(f"{what}: final/ differs, or is not complete")

    def kill(self, moment: str, chance: random.Random) -> bool:
        """Starts the run and kills it some time after the moment; False if it ended before."""
        worker = Worker(self.log)
        worker.start(self.args)
        where = kill_at(worker, self.run, moment, chance.uniform(0, self.seconds[moment]))
        if where:
            self.kills += 1
            self.row.counts.update(["kills", where])
        self.ended(f"{moment}, {where}", -9 if where else worker.result(), worker)
        return bool(where)

    def finish(self) -> None:
        """Resumes the run until it ends, and compares it."""
        worker, lost = Worker(self.log), len(self.row.lost)
        self.ended("the last start", worker.run(self.args), worker)
        if len(self.row.lost) == lost and (found := difference(self.straight, self.run)):
            self.row.lost.append(found)
        left = [name for name, *_ in partial_folders(self.run) if name.startswith(EXPORT)]
        self.row.lost += [f"{one} is left" for one in left]
        self.row.counts["bit-equal"] += self.kills if len(self.row.lost) == lost else 0
        self.kills = 0


def kills(name: str, project: Path, folder: Path, seed: int) -> Row:
    """Kills an objective's run at each of MOMENTS. One that ends before is started over."""
    chance, killed = random.Random(f"{seed} {name}"), Killed(name, project, folder)
    moments, tries = [*MOMENTS], 0
    while moments and tries < 3 * len(MOMENTS) and not killed.row.lost:
        tries += 1
        if killed.kill(moments[0], chance):
            moments.pop(0)
        elif not killed.row.lost:
            killed.finish()
            shutil.rmtree(killed.run)
    if not killed.row.lost and killed.kills:
        killed.finish()
    return killed.row


# ---- kills at random moments, of one or several processes


class Group:
    """Processes that run one command together, each on a device."""

    def __init__(self, logs: Path, count: int):
        self.workers = [Worker(logs.with_suffix(f".{i}.log")) for i in range(count)]

    def start(self, args: list[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        place = ["--cluster.coordinator", address, "--cluster.timeout", "20"]
        place += ["--cluster.processes", str(len(self.workers)), "--cluster.process"]
        for i, worker in enumerate(self.workers):
            worker.start([*args, *place, str(i)] if len(self.workers) > 1 else args)

    def ended(self, until: float) -> bool:
        """True if all have ended by this time."""
        while time.monotonic() < until:
            if all(worker.pipe.poll() for worker in self.workers):
                return True
            time.sleep(0.002)
        return False

    def results(self) -> list[int | str]:
        """What became of each that was not killed."""
        return [w.result() for w in self.workers if not w.pipe.closed]

    def said(self) -> str:
        return "\n".join(worker.said() for worker in self.workers)

    def kill(self) -> None:
        for worker in self.workers:
            if not worker.pipe.closed:
                worker.kill()


LEFT = (75, "died with status 75")  # how a process ends that has lost another
ALONE = "did not arrive within cluster.timeout"  # or, if it was lost before they met, with status 2


def random_kills(name: str, processes: int, project: Path, folder: Path, seed: int) -> Row:
    """Kills a run KILLS times at any moment from its start to its end, and resumes it each time. Of
    several processes one or all are killed. A run that ends is compared and started over."""
    chance, row = random.Random(f"{seed} {name} {processes}"), Row()
    label = f"{name.replace(', ', '-')}-{processes}"
    straight, run, logs = project / f"{label}-long", folder / f"{label}-long", folder / label
    build = partial(command, project, name, steps=LONG, rows=8 // processes)
    kills = 0  # of the run at hand

    def to_the_end(place: Path) -> float:
        """Runs to the end; returns the seconds that took."""
        group, began = Group(logs, processes), time.monotonic()
        group.start(build(place))
        results = group.results()
        group.kill()
        if results != [0] * processes or " is damaged" in group.said():
            row.lost.append(f"{place.name}: {results}\n{group.said()[-3000:]}")
        return time.monotonic() - began

    def compare() -> None:
        nonlocal kills
        if not row.lost and (found := difference(straight, run)):
            row.lost.append(found)
        row.counts["bit-equal"] += 0 if row.lost else kills
        row.counts["runs"] += 1
        kills = 0
        shutil.rmtree(run)

    seconds = to_the_end(straight)
    while row.counts["kills"] < KILLS and not row.lost:
        group = Group(logs, processes)
        group.start(build(run))
        if group.ended(time.monotonic() + chance.uniform(0, seconds)):
            results = group.results()
            if results != [0] * processes:
                row.lost.append(f"{results}\n{group.said()[-3000:]}")
            group.kill()
            if not row.lost:
                compare()
            continue
        victims = group.workers if chance.random() < 0.5 else [chance.choice(group.workers)]
        for worker in victims:
            worker.kill()
        kills += 1
        row.counts["kills"] += 1
        left = group.results()
        row.counts["one of two"] += bool(left)
        ends = (*LEFT, 0, *[2] * (ALONE in group.said()))
        in_line = all(one in ends for one in left) and "Traceback" not in group.said()
        row.counts["told"] += bool(left) and in_line
        group.kill()
    if not row.lost and kills:
        to_the_end(run)
        compare()
    return row


# ---- damage


def flipped(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "bit flip": flipped,
    "truncation": lambda data, chance: data[: chance.randrange(1, len(data))],
    "emptying": lambda data, chance: b"",
    "removal": lambda data, chance: None,
    "another JSON type": lambda data, chance: chance.choice([b"[]", b"3", b'"a"', b"null", b"[1]"]),
}
IS_JSON = re.compile(r"json$|METADATA$|_sharding$|array_metadatas|meta/metadata$|hashes")
NEWEST = f"{SAVE}/{STEPS}/"
UNUSED = (f"{NEWEST}_CHECKPOINT_METADATA", f"{NEWEST}commit_success.txt")  # by a resumed run
STATE = ("_METADATA", "_sharding", "array_metadatas/*", "commit_success.txt", "manifest.ocdbt")
STATE += ("d/*", "ocdbt.process_0/manifest.ocdbt", "ocdbt.process_0/d/*")
# Patterns of files in the run folder, or in the cache.
KINDS = [f"{NEWEST}state/{name}" for name in STATE]
KINDS += [f"{NEWEST}meta/{name}" for name in ("metadata", "commit_success.txt")]
KINDS += [f"{NEWEST}files.json", f"{NEWEST}amended.json", *UNUSED]
KINDS += ["config.json", "data.json", "metrics.jsonl", "samples.jsonl", "starts.jsonl", "rows.bin"]
KINDS += [".lock", "final/adapter_config.json", "final/adapter_model.safetensors"]
KINDS += ["final/.jaxllm.json", "model/config.json", "model/generation_config.json"]
KINDS += ["model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja"]
KINDS += ["model/files.json", "cache/*/*/data-*.arrow", "cache/*/*/dataset_info.json"]
KINDS += ["cache/*/*/state.json", "cache/*/*/sums.json", "cache/hashes/*", "cache/reference-*.npz"]
OBJECTIVE = "dpo"  # its runs have all these files


def cases() -> Iterator[tuple[str, str]]:
    """(pattern of a kind of file, damage)."""
    for pattern in KINDS:
        for how in DAMAGES:
            is_empty = pattern.endswith("commit_success.txt") and how != "removal"
            if not is_empty and (how != "another JSON type" or IS_JSON.search(pattern)):
                yield pattern, how


class Damaged:
    """Damaged copies of a run, each resumed in the same process as the one before.

    straight: the undisturbed run. folder: of the copies, and of the cache of their data.
    """

    def __init__(self, project: Path, straight: Path, folder: Path, seed: int):
        self.project, self.straight, self.folder, self.seed = project, straight, folder, seed
        folder.mkdir(parents=True)
        self.number, self.worker = 0, Worker(folder / "log")

    def run(self, place: Path, more: Sequence[str] = ()) -> int | str:
        """Runs the command again, with further arguments."""
        args = command(self.project, OBJECTIVE, place, self.folder / "cache")
        status = self.worker.run([*args, *more])
        if not isinstance(status, int):
            self.worker.kill()
            said, self.worker = self.worker.said(), Worker(self.folder / "log")
            self.worker.log.write_text(said)
        return status

    def copy(self, *, newest: bool, final: bool) -> Path:
        """A copy of the run: with its newest checkpoint, so that nothing is left to be trained, or
        without; with its final model or without."""
        self.number += 1
        place = self.folder / f"run-{self.number}"
        shutil.copytree(self.straight, place)
        for name, kept in ((NEWEST, newest), ("final", final)):
            if not kept:
                shutil.rmtree(place / name)
        return place

    def __call__(self, pattern: str, how: str) -> tuple[str, str]:
        """("bit-equal", "refused" or "lost", what was seen)."""
        chance = random.Random(f"{self.seed} {pattern} {how}")
        place = self.copy(newest=NEWEST in pattern, final=pattern.startswith("final"))
        if not (self.folder / "cache").exists():
            shutil.copytree(self.straight, self.folder / "first")
            shutil.rmtree(self.folder / "first" / "final")
            if (status := self.run(self.folder / "first")) != 0:
                return "lost", f"the run that fills the cache: {status}\n{self.worker.said()}"
        root = self.folder if pattern.startswith("cache") else place
        file = chance.choice(sorted(root.glob(pattern)))
        data = DAMAGES[how](file.read_bytes(), chance)
        file.unlink() if data is None else file.write_bytes(data)
        intact = numbers(file) if file.suffix == ".jsonl" else ()
        status, said = self.run(place), self.worker.said()
        outcome = "bit-equal"
        if status == 2:
            line = [x for x in said.splitlines() if x.startswith("jaxllm: error: ")]
            more = self.remedy(file, place, line[0]) if len(line) == 1 else None
            if more is None:
                return "lost", f"no remedy is known for: {said[-1500:]}"
            status, outcome = self.run(place, more), "refused"
            said = f"{line[0]}\n{self.worker.said()}"
        if status != 0:
            return "lost", f"{status}\n{said[-3000:]}"
        # Without its amendment, a checkpoint is that of before: what is due is evaluated again.
        is_before = pattern.endswith("amended.json") and how == "removal"
        if NEWEST in pattern and pattern not in UNUSED and not is_before:
            named = f"checkpoint {STEPS} is damaged, skipped"
            if named not in said or f"resuming from step {STEPS - EVERY}" not in said:
                return "lost", f"the damage is not named: {said[-1500:]}"
        if problem := difference(self.straight, place, pattern, intact):
            return "lost", f"{problem}\n{said[-1500:]}"
        shutil.rmtree(place)
        return outcome, said

    def remedy(self, file: Path, place: Path, line: str) -> list[str] | None:
        """Does what the error says, and returns the arguments that it asks for; None if it does not
        name the file, or says nothing to do."""
        names = line.partition(" --resume_changed ")[2].split()
        if str(file) in line and "delete it" in line:
            file.unlink()
        elif str(file.parent) in line and "choose another directory or empty it" in line:
            shutil.rmtree(file.parent)
        elif not (names and str(place) in line):  # config.json has other values, which are named
            return None
        return ["--resume_changed", *names] if names else []


# ---- the tables


def table(title: str, columns: tuple[str, ...], rows: dict[str, Row]) -> int:
    """Prints rows of counts and their sum; returns how much was lost."""
    print(f"\n{title:<48}" + "".join(f"{name:>14}" for name in (*columns, "lost")))
    total: Counter[str] = Counter()
    for name, row in rows.items():
        counts = row.counts | Counter(lost=len(row.lost))
        total += counts
        print(f"{name:<48}" + "".join(f"{counts[c]:>14}" for c in (*columns, "lost")))
    print(f"{'all':<48}" + "".join(f"{total[c]:>14}" for c in (*columns, "lost")), flush=True)
    for name, row in rows.items():
        print(*(f"\n{name}: {one}" for one in row.lost), sep="", end="\n" * bool(row.lost))
    return total["lost"]


def all_damages(project: Path, folder: Path, seed: int, chosen: Any) -> dict[str, Row]:
    """Tries the cases whose kind is `chosen`."""
    from jaxllm.checkpoint import Checkpoints

    straight = project / OBJECTIVE
    saves = Checkpoints(straight / SAVE)
    saves.amend(STEPS, {"eval_pending": False}, saves.best())  # as after a postponed evaluation
    saves.close()
    todo = [case for case in cases() if chosen(case[0])]
    rows = {kind: Row() for kind, _ in todo}

    def some(number: int) -> list[tuple[str, str, str, str]]:
        damaged = Damaged(project, straight, folder / str(number), seed)
        try:
            return [(*case, *damaged(*case)) for case in todo[number::2]]
        finally:
            damaged.worker.kill()

    with ThreadPoolExecutor(2) as pool:
        for kind, how, outcome, said in sum(pool.map(some, range(2)), []):
            row = rows[kind]
            row.counts.update(["tried"] + [outcome] * (outcome != "lost"))
            row.lost += [f"{how}: {said}"] * (outcome == "lost")
    return rows


@contextmanager
def prepared(base: bool = True) -> Iterator[tuple[Path, Path]]:
    """(a project, an empty folder). base: with the base model of most objectives."""
    # The trackers of semaphores warn of those of processes that were killed.
    os.environ |= ENV | {"XLA_FLAGS": f"{DEVICES}1", "PYTHONWARNINGS": "ignore:resource_tracker"}
    context = multiprocessing.get_context("forkserver")
    names = ("jaxllm.training", "transformers.models.auto.configuration_auto", "grain", "datasets")
    context.set_forkserver_preload([*names])
    with tempfile.TemporaryDirectory() as temporary:
        project, folder = Path(temporary, "project"), Path(temporary, "folder")
        make_project(project)
        folder.mkdir()
        if base:
            worker = Worker(folder / "base.log")
            assert worker.run(command(project, "pretrain", project / "pretrain")) == 0, (
                worker.said()
            )
            worker.kill()
        yield project, folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objective", action="append", help="kill only these; repeatable")
    parser.add_argument("--kind", default="", help="damage only files whose pattern contains this")
    parser.add_argument("--part", choices=("saves", "random", "damage"), help="only this table")
    parser.add_argument("--processes", type=int, action="append", help="of random kills; 1 and 2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damages")
    options = parser.parse_args()
    wanted = options.objective or [*OBJECTIVES]
    parts, lost, few = [options.part] if options.part else ["saves", "random", "damage"], 0, False
    with prepared(base="saves" not in parts) as (project, folder), ThreadPoolExecutor(2) as pool:
        if "saves" in parts:
            kill = partial(kills, project=project, folder=folder, seed=options.seed)
            names = [n for n in OBJECTIVES if n in (*wanted, "pretrain", OBJECTIVE)]
            rows = {names[0]: kill(names[0])}  # the base of the others
            rows |= dict(zip(names[1:], pool.map(kill, names[1:]), strict=True))
            columns = ("kills", "in a save", "in an export", "elsewhere", "bit-equal")
            lost += table("killed by SIGKILL while it saves", columns, rows)
            few |= sum(row.counts["kills"] for row in rows.values()) < 4 * len(rows)
        if "random" in parts:
            todo = [(name, n) for n in options.processes or (1, 2) for name in wanted]
            label = {1: "one process", 2: "two processes"}
            done = pool.map(lambda one: random_kills(*one, project, folder, options.seed), todo)
            found = {f"{name}, {label[n]}": row for (name, n), row in zip(todo, done, strict=True)}
            columns = ("kills", "one of two", "told", "runs", "bit-equal")
            lost += table("killed by SIGKILL at random", columns, found)
            few |= any(row.counts["kills"] < KILLS for row in found.values())
        if "damage" in parts:
            if not (project / OBJECTIVE / "final").exists():
                worker = Worker(folder / "straight.log")
                worker.run(command(project, OBJECTIVE, project / OBJECTIVE))
                worker.kill()
            chosen = lambda kind: options.kind in kind  # noqa: E731
            damaged = all_damages(project, folder / "damaged", options.seed, chosen)
            lost += table("damaged", ("tried", "bit-equal", "refused"), damaged)
    if few:
        print("\nfewer runs were killed than asked for")
    return 1 if lost or few else 0


if __name__ == "__main__":
    sys.exit(main())
