# SPDX-License-Identifier: Apache-2.0
"""Runs on full and read-only disks, with changed inputs, NaN, wrong clocks and trackers that hang.

    make faults

Each case ends a run or disturbs it, then takes the trouble away and starts the same command again.
A run that is refused must say so in one line. In the end weights, metrics, rows and samples must be
those of an undisturbed run, bit for bit. Exits with status 1 if they are not, or if there is a
traceback or a hang. Full and read-only disks are small file systems in memory, which only root can
mount.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from kills import (
    NEWEST,
    OBJECTIVES,
    SAVE,
    STEPS,
    Row,
    Worker,
    command,
    contents,
    difference,
    prepared,
    table,
)

READ_ONLY = "[Rr]ead-only|not a writable folder"
# What Orbax's threads print if several arrays of a checkpoint cannot be written. It is counted.
THREADS = re.compile(
    r"Traceback \(most recent call last\):\n(?:[ ].*\n)+RuntimeError: Event loop is closed\n"
)
Before = Callable[[], None] | None


class Lost(Exception):
    """A case did not end as it must."""


class Bench:
    """Runs of one case: its copy of the project, and a log."""

    def __init__(self, project: Path, folder: Path, name: str):
        self.folder, self.name = folder, name
        folder.mkdir(parents=True)
        self.project = folder / "project"
        shutil.copytree(project, self.project)
        base = self.project / "pretrain" / "config.json"
        base.unlink(missing_ok=True)  # its paths are those of the copied project
        self.cache, self.row = folder / "cache", Row()
        self.straight = folder / "straight"

    def run(
        self, place: Path, more: Sequence[str] = (), before: Before = None, steps: int = STEPS
    ) -> tuple[int | str, str]:
        """(exit status, what was printed) of the objective's command."""
        args = command(self.project, self.name, place, self.cache, steps)
        return self.verb([*args, *more], before)

    def verb(self, args: Sequence[str], before: Before = None) -> tuple[int | str, str]:
        worker = Worker(self.folder / "log", before)
        status = worker.run([*args])
        worker.kill()
        said = worker.said()
        told = THREADS.sub("", said)
        self.row.counts["with tracebacks"] += told != said
        if "Traceback" in told or not isinstance(status, int):
            raise Lost(f"{status}\n{said[-3000:]}")
        return status, told

    def done(self, place: Path, more: Sequence[str] = (), before: Before = None) -> None:
        """Runs to the end."""
        status, said = self.run(place, more, before)
        if status != 0:
            raise Lost(f"{status}\n{said[-3000:]}")

    def refused(self, outcome: tuple[int | str, str], *words: str) -> None:
        """The outcome is that of a command that was refused in one line, with the words."""
        status, said = outcome
        lines = [x for x in said.splitlines() if x.startswith("jaxllm: error: ")]
        if status != 2 or len(lines) != 1:
            raise Lost(f"not refused in one line: {status}\n{said[-3000:]}")
        for word in words:
            if not re.search(word, lines[0]):
                raise Lost(f"{word!r} is not in: {lines[0]}")
        self.row.counts["refused"] += 1

    def whole(self, place: Path) -> None:
        """The run equals the undisturbed one."""
        if found := difference(self.straight, place):
            raise Lost(found)
        self.row.counts["bit-equal"] += 1

    def undisturbed(self) -> Path:
        if not self.straight.exists():
            self.done(self.straight)
        return self.straight

    def partial(self, name: str = "run") -> Path:
        """A copy of the run without its newest checkpoint and its model: to be resumed."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.undisturbed(), place)
        for part in (NEWEST, "final"):
            shutil.rmtree(place / part)
        return place

    @contextmanager
    def case(self) -> Iterator[None]:
        """Counts a try, and what is lost in it."""
        self.row.counts["tried"] += 1
        try:
            yield
        except Lost as lost:
            self.row.lost.append(str(lost))
        except Exception:
            self.row.lost.append(traceback.format_exc()[-3000:])


# ---- disks


@contextmanager
def disk(place: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system of so many bytes; yields what mounts it again with other options."""

    def again(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)

    place.mkdir(exist_ok=True)
    options = f"size={max(size, 8192)},mode=755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield again
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def used(folder: Path) -> int:
    return sum(p.stat().st_blocks * 512 + 4096 for p in folder.rglob("*") if p.is_file())


def full_run_folder(bench: Bench, sizes: int) -> None:
    """The run folder's disk fills at one file after another."""
    most = used(bench.undisturbed()) * 1.1
    for number in range(sizes):
        with bench.case(), disk(bench.folder / "disk", int(most * (number + 0.5) / sizes)) as again:
            place = bench.folder / "disk" / "run"
            outcome = bench.run(place)
            if outcome[0] != 0:
                bench.refused(outcome, "full")
            again("size=1g")
            bench.done(place)
            bench.whole(place)


def full_cache(bench: Bench, sizes: int) -> None:
    """The disk of the cache fills."""
    bench.undisturbed()
    most, own = used(bench.cache), bench.cache
    for number in range(sizes):
        with bench.case(), disk(bench.folder / "disk", int(most * (number + 0.5) / sizes)) as again:
            place, bench.cache = bench.folder / f"run-{number}", bench.folder / "disk" / "cache"
            outcome = bench.run(place)
            if outcome[0] != 0:
                bench.refused(outcome, "full")
            again("size=1g")
            bench.done(place)
            bench.cache = own
            bench.whole(place)


def full_verbs(bench: Bench, sizes: int) -> None:
    """The disk fills while other commands write to it."""
    straight = bench.undisturbed()
    text = str(bench.project / "text.txt")
    verbs = {
        "export": lambda out: ["export", str(straight), str(out)],
        "report": lambda out: ["report", str(straight), "--out", str(out)],
        "tokenizer": lambda out: ["tokenizer", "train", text, "--vocab_size", "400", "--out", out],
    }
    for name, args in verbs.items():
        whole = bench.folder / f"whole-{name}"
        status, said = bench.verb([*map(str, args(whole))])
        assert status == 0, said
        most = used(whole) if whole.is_dir() else whole.stat().st_size
        for number in range(sizes):
            size = int(most * (number + 0.5) / sizes)
            with bench.case(), disk(bench.folder / "disk", size) as again:
                out = bench.folder / "disk" / "out"
                outcome = bench.verb([*map(str, args(out))])
                if outcome[0] != 0:
                    bench.refused(outcome, "full")
                again("size=1g")
                status, said = bench.verb([*map(str, args(out))])
                if status != 0:
                    raise Lost(said)
                if out.is_dir() and contents(out) != contents(whole):
                    raise Lost(f"{name} differs")
                bench.row.counts["bit-equal"] += 1


def read_only(bench: Bench, _: int) -> None:
    """The run folder, the cache and the place of an export cannot be written to."""
    straight = bench.undisturbed()
    with bench.case(), disk(bench.folder / "disk", 1 << 30) as again:
        place = bench.folder / "disk" / "run"
        shutil.copytree(bench.partial(), place)
        again("ro")
        bench.refused(bench.run(place), READ_ONLY)
        bench.refused(bench.verb(["export", str(straight), str(place.parent / "out")]), READ_ONLY)
        again("rw")
        bench.done(place)
        bench.whole(place)
    with bench.case(), disk(bench.folder / "disk", 1 << 30) as again:
        again("ro")
        own, bench.cache = bench.cache, bench.folder / "disk" / "cache"
        place = bench.folder / "no-cache"
        bench.refused(bench.run(place), READ_ONLY)
        again("rw")
        bench.done(place)
        bench.cache = own
        bench.whole(place)


# ---- the clock


def clock_back() -> None:
    """Every look at the clock gives an earlier time, a day ago at first."""
    now = [time.time() - 86_400.0]

    def earlier() -> float:
        now[0] -= 1.0
        return now[0]

    time.time = earlier


def clock(bench: Bench, _: int) -> None:
    """The clock goes backwards during a run, before it is resumed, and files are of the future."""
    with bench.case():
        bench.undisturbed()
        bench.done(bench.folder / "whole", before=clock_back)
        bench.whole(bench.folder / "whole")
    with bench.case():
        place = bench.partial()
        bench.done(place, before=clock_back)
        bench.whole(place)
    with bench.case():
        place = bench.partial()
        for root in (place, bench.cache):
            for file in root.rglob("*"):
                os.utime(file, (time.time() + 1e6, time.time() + 1e6))
        bench.done(place)
        bench.whole(place)


# ---- what a run depends on


def append(file: Path) -> None:
    lines = file.read_bytes()
    file.write_bytes(lines + lines.splitlines(keepends=True)[0])


def flip_weights(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return edit


# (objective, file in the project, edit, the name of what changed)
CHANGES: tuple[tuple[str, str, Callable[[Path], None], str], ...] = (
    ("pretrain", "text.txt", append, "data"),
    ("dpo", "eval.jsonl", append, "eval"),
    ("sft", "chats.jsonl", append, "data"),
    ("sft", "tokenizer/chat_template.jinja", replaced("<|im_start|>", "<|im_start|> "), "template"),
    ("dpo", "pretrain/final/model.safetensors", flip_weights, "weights"),
    ("sft, LoRA", "pretrain/final/model.safetensors", flip_weights, "weights"),
    ("grpo", "judge.py", replaced("/ 10", "/ 11"), "rewards"),
    ("ppo", "judge.py", replaced("/ 10", "/ 11"), "rewards"),
    ("grpo", "sums.jsonl", append, "data"),
    ("kto", "judged.jsonl", append, "data"),
)


def changed(bench: Bench, _: int) -> None:
    """Data, template, base or reward changed: refused, accepted by name, and as before again."""
    for name, path, edit, what in CHANGES:
        if name == bench.name:
            with bench.case():
                place, file = bench.partial(), bench.project / path
                before = file.read_bytes()
                edit(file)
                bench.refused(bench.run(place), *what.split(), "--resume_changed")
                accepted = bench.folder / "accepted"
                shutil.copytree(place, accepted)
                place.rename(bench.folder / "kept")
                accepted.rename(place)  # a run folder records its path
                bench.done(place, ["--resume_changed", *what.split()])
                shutil.rmtree(place)
                (bench.folder / "kept").rename(place)
                file.write_bytes(before)
                bench.done(place)
                bench.whole(place)


# ---- two runs, NaN, trackers


def two_runs(bench: Bench, _: int) -> None:
    """A second run starts in the folder of one that trains."""
    bench.undisturbed()
    for _ in range(3):
        with bench.case():
            place = bench.folder / "run"
            shutil.rmtree(place, ignore_errors=True)
            first = Worker(bench.folder / "first.log")
            first.start(command(bench.project, bench.name, place, bench.cache))
            while not (place / SAVE).exists() and not first.pipe.poll(0.002):
                pass
            second = bench.run(place)
            status = first.result()
            first.kill()
            if status != 0:
                raise Lost(f"the first run: {status}\n{first.said()[-3000:]}")
            if second[0] != 0:  # 0: the first one was over
                bench.refused(second, "is training in")
            bench.whole(place)


def not_finite(bench: Bench, _: int) -> None:
    """Losses, base weights, rewards and data that are NaN."""
    rate = "optim.learning_rate"
    with bench.case():  # a rate at which the loss overflows; what was saved before stays
        place = bench.partial()
        saved = contents(place / SAVE)
        more = [f"--{rate}", "1e38", "--optim.clip", "0", "--resume_changed", rate, "optim.clip"]
        bench.refused(bench.run(place, more))
        if contents(place / SAVE) != saved or (place / "final").exists():
            raise Lost("a checkpoint was changed, or a model was written")
        bench.done(place, ["--resume_changed", rate, "optim.clip"])
        bench.whole(place)
    if OBJECTIVES[bench.name][2]:
        with bench.case():
            nan_weights(bench)
    edits = {
        "dpo": ("pairs.jsonl", replaced('{"prompt"', '{"margin": NaN, "prompt"')),
        "reward": ("pairs.jsonl", replaced('{"prompt"', '{"margin": NaN, "prompt"')),
        "kto": ("judged.jsonl", replaced("true", "NaN")),
        "ppo": ("judge.py", replaced("len(c) / 10", "float('nan')")),
        "grpo": ("judge.py", replaced("len(c) / 10", "float('nan')")),
    }
    if bench.name in edits:
        with bench.case():
            path, edit = edits[bench.name]
            file, place = bench.project / path, bench.folder / "nan"
            before = file.read_bytes()
            edit(file)
            bench.refused(bench.run(place))
            file.write_bytes(before)
            bench.done(place)
            bench.whole(place)


def nan_weights(bench: Bench) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    bench.undisturbed()
    file, place = bench.project / "pretrain" / "final" / "model.safetensors", bench.folder / "hurt"
    before = file.read_bytes()
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "mlp" in name)
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    bench.refused(bench.run(place))
    if (place / "final").exists() or any((place / SAVE).glob("[0-9]*")):
        raise Lost("NaN was saved")
    file.write_bytes(before)
    bench.done(place)
    bench.whole(place)


class Hangs:
    """A tracker that never answers."""

    note = ""

    def __init__(self, session: object):
        pass

    def write(self, *_: object) -> None:
        while True:
            time.sleep(60)

    samples = close = write


def hanging_tracker() -> None:
    from jaxllm.monitor import metrics

    metrics.PATIENCE = 1.0
    metrics.TRACKERS["tensorboard"] = Hangs


def tracker(bench: Bench, _: int) -> None:
    """A tracker hangs: the run goes on without it."""
    with bench.case():
        place = bench.folder / "run"
        bench.undisturbed()
        bench.done(place, ["--log.report_to", "tensorboard"], hanging_tracker)
        if "tensorboard is disabled: no answer" not in (bench.folder / "log").read_text():
            raise Lost("it is not said that the tracker is disabled")
        bench.whole(place)


# ---- the table

ALL = tuple(OBJECTIVES)
KINDS: dict[str, tuple[Callable[[Bench, int], None], tuple[str, ...]]] = {
    "disk full, run folder": (full_run_folder, ("pretrain", "dpo", "grpo")),
    "disk full, cache": (full_cache, ("sft", "dpo")),
    "disk full, export, report, tokenizer": (full_verbs, ("pretrain",)),
    "read-only": (read_only, ("pretrain", "dpo")),
    "clock backwards": (clock, ("pretrain", "dpo", "grpo")),
    "inputs changed": (changed, tuple(dict.fromkeys(name for name, *_ in CHANGES))),
    "two runs in one folder": (two_runs, ("pretrain", "dpo")),
    "NaN": (not_finite, ALL),
    "a tracker hangs": (tracker, ("pretrain", "dpo")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", action="append", choices=[*KINDS], help="only these; repeatable")
    parser.add_argument("--sizes", type=int, default=12, help="of each disk that fills")
    options = parser.parse_args()
    needs_root = [name for name in KINDS if name.startswith(("disk", "read"))]
    kinds = [name for name in options.kind or KINDS if os.geteuid() == 0 or name not in needs_root]
    todo = [(kind, name) for kind in kinds for name in KINDS[kind][1]]
    with prepared() as (project, folder), ThreadPoolExecutor(2) as pool:

        def one(number: int) -> Row:
            kind, name = todo[number]
            bench = Bench(project, folder / str(number), name)
            KINDS[kind][0](bench, options.sizes)
            shutil.rmtree(bench.folder, ignore_errors=True)
            return bench.row

        rows = pool.map(one, range(len(todo)))
        named = {f"{kind}: {name}": row for (kind, name), row in zip(todo, rows, strict=True)}
    lost = table("trouble", ("tried", "refused", "with tracebacks", "bit-equal"), named)
    few = [name for name, row in named.items() if not row.counts["tried"]]
    if missing := {*(options.kind or KINDS)} - {*kinds}:
        print(f"\nnot tried, since only root can mount a disk: {', '.join(sorted(missing))}")
    return 1 if lost or few else 0


if __name__ == "__main__":
    sys.exit(main())
