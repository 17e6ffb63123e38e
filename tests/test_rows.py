# SPDX-License-Identifier: Apache-2.0
"""The rows of a run are recorded, printed with their sources, and verified."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from runs import ENV, arguments, command, launched, processes_of, refused

from jaxllm import dist
from jaxllm.cli import main
from jaxllm.config import from_dict, load_config, to_dict
from jaxllm.config.checks import resolve
from jaxllm.data.dataset import load_data
from jaxllm.data.loader import make_loader, ordered, unstacked
from jaxllm.data.rows import Rows
from jaxllm.data.template import with_settings
from jaxllm.reference import RowsWithLogps
from jaxllm.rows import (
    FILE,
    HASHED,
    RowLog,
    _shortened,
    describe,
    first_example,
    row_hash,
    rows_of_step,
)
from jaxllm.tokenizer import load_tokenizer

SIZE = 8  # rows of a step
# verb -> record `k` of letter `x`, which is in no other record and no template
RECORDS = {
    "pretrain": lambda k, x: {"text": x * (5 + 9 * k)},
    "sft": lambda k, x: {"prompt": x * k, "completion": x},
    "dpo": lambda k, x: {"prompt": x * k, "chosen": x, "rejected": x + x},
    "kto": lambda k, x: {"prompt": x * k, "completion": x, "label": k % 2 == 0},
    "grpo": lambda k, x: {"prompt": x * k},
}
CASES = ["pretrain", "plain", "streamed", "sft", "dpo", "kto", "kto-precomputed", "grpo"]
OPTIONS = {
    "plain": ("--no-data.segment",),
    "kto-precomputed": ("--align.reference", "precomputed"),
    "grpo": ("--rl.rewards", "none:none", "--rl.group_size", "2", "--rl.minibatches", "3"),
}
STEPS = 5


def data(project: Path, case: str) -> tuple[str, Path]:
    """(verb, folder) of a case: two files of ten records each."""
    verb = {"plain": "pretrain", "streamed": "pretrain"}.get(case, case.partition("-")[0])
    source = project / f"{case}-data"
    source.mkdir(exist_ok=True)
    records = [json.dumps(RECORDS[verb](k + 1, chr(ord("A") + k))) + "\n" for k in range(20)]
    for file in range(2):
        (source / f"{file}.jsonl").write_text("".join(records[10 * file : 10 * file + 10]))
    return verb, source


def recorded(project: Path, case: str) -> tuple[Path, int]:
    """(folder, steps from one record to the next) of what a run leaves."""
    (verb, source), run = data(project, case), project / f"{case}-recorded"
    path = f"{{path: {source}, streaming: true}}" if case == "streamed" else str(source)
    args = arguments(project, verb, run.name, "--data.train", path, *OPTIONS.get(case, ()))
    cfg = replace(resolve(load_config(verb, None, args[1:])[0]), batch_size=SIZE)
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps(to_dict(cfg)))
    rows = load_data(cfg, with_settings(load_tokenizer(project / "tokenizer"), cfg.data)).train
    assert rows is not None
    if case == "kto-precomputed":  # as reference.precomputed returns them
        rows = Rows((RowsWithLogps(rows.parts[0], {}),), None, rows.length)
    batches = map(unstacked, make_loader(rows, batch_size=SIZE, micro_batches=2, seed=cfg.seed))
    if verb == "grpo":
        batches = iter(ordered(rows, cfg.seed).batch(12, batch_fn=list))
    stride = 3 if verb == "grpo" else 1
    with RowLog(cfg, Path(cfg.output_dir), 0) as record:
        for index, batch in enumerate(islice(batches, STEPS)):
            record(1 + index * stride, batch)
    return run, stride


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_verified_from_its_config_and_data(project, case, capsys):
    run, _ = recorded(project, case)
    assert main(["verify", str(run)]) == 0
    size = 12 if case == "grpo" else SIZE
    assert capsys.readouterr().out == f"{run}: all {STEPS} steps of {size} rows are as recorded\n"


@pytest.mark.parametrize("case", CASES)
def test_each_segment_names_the_records_that_are_in_it(project, case):
    run, stride = recorded(project, case)
    seen = set()
    for step in range(1, STEPS * stride, stride):
        for row in rows_of_step(str(run), step)["rows"]:
            assert row["hash"] == row["recorded"] and 0 < row["tokens"] <= 128
            for segment in row["segments"]:
                named = set()
                for source in segment["sources"]:
                    file, _, line = source["location"].rpartition(":")
                    text = Path(file).read_text().splitlines()[int(line) - 1]
                    named |= set(filter(str.isupper, text))
                    before = 0 if case == "streamed" else 10 * int(Path(file).stem)
                    assert source["record"] == before + int(line) - 1
                text = "".join(piece for piece, _ in segment["text"])
                found = set(filter(str.isupper, text))
                ends = segment["text"][0][0].startswith("<|")  # the end of a text in this row
                assert found == named or (ends and found < named), (text, named)
                seen |= found
    assert len(seen) == 20


def test_what_is_learned_is_marked(project):
    run, _ = recorded(project, "sft")
    found = rows_of_step(str(run), 1)
    segment = found["rows"][0]["segments"][0]
    (prompt, no), (answer, yes), *_ = segment["text"]
    letter = next(filter(str.isupper, prompt))
    assert prompt.endswith("assistant\n") and (no, yes) == (False, True)
    assert answer == f"{letter}<|im_end|>" and segment["learned"] == segment["weight"] == 2
    assert f"[[{answer}]]" in describe(found, colour=False)
    assert f"\x1b[32m{answer}\x1b[0m" in describe(found, colour=True)


def test_text_cannot_control_the_terminal():
    segment = {"sources": [], "tokens": 1, "learned": 1, "weight": 1.0, "text": [["\x1b[2J", True]]}
    row = {"row": 0, "hash": "1", "recorded": None, "segments": [segment]}
    shown = describe({"step": 1, "rows": [segment | row]}, colour=False)
    assert "[[\\x1b[2J]]" in shown and "1 (not recorded)" in shown and "\x1b" not in shown


def test_every_field_that_comes_from_the_data_changes_the_hash():
    row = {name: np.arange(3, dtype=np.int32) for name in HASHED}
    hashes = {row_hash(row | {name: np.array([7, 1, 2], np.int32)}) for name in HASHED}
    assert len(hashes | {row_hash(row)}) == len(HASHED) + 1
    assert row_hash(row | {"chosen_logps": np.ones(3, np.float32)}) == row_hash(row)


def records_of(run: Path) -> np.ndarray:
    return np.fromfile(run / FILE, "<u8").reshape(-1, 1 + SIZE)


def test_steps_after_a_checkpoint_are_recorded_again(project, capsys):
    run, _ = recorded(project, "sft")
    records = records_of(run)
    with (run / FILE).open("ab") as file:
        file.write(b"killed while it was writing")
    cfg, _ = load_config("sft", None, ["--output_dir", str(run), "--batch_size", str(SIZE)])
    row = {"tokens": np.arange(4, dtype=np.int32)}
    with RowLog(cfg, Path(cfg.output_dir), 3) as record:  # two processes, whose rows alternate
        for first in (0, 1):
            record(4, [row] * (SIZE // 2), range(first, SIZE, 2))
    again = np.fromfile(run / FILE, "<u8")[: records.size].reshape(records.shape)
    assert (again[3] == [4, *[row_hash(row)] * SIZE]).all()
    assert np.array_equal(np.delete(again, 3, 0), np.delete(records, 3, 0))
    with (run / FILE).open("r+b") as file:
        file.write(records.tobytes())
    assert main(["verify", str(run)]) == 0
    assert f"all {len(records)} steps of {SIZE} rows are as recorded" in capsys.readouterr().out
    with RowLog(cfg, Path(cfg.output_dir), 0):  # a new run
        assert not (run / FILE).stat().st_size


def example_of(project, case, colour=False, start=0):
    """(title, text) of the first example that a run shows."""
    run, _ = recorded(project, case)
    cfg = from_dict(json.loads((run / "config.json").read_text()))
    tokenizer = with_settings(load_tokenizer(project / "tokenizer"), cfg.data)
    rows = load_data(cfg, tokenizer).train
    assert rows is not None
    title, *lines = first_example(cfg, rows, tokenizer, start, colour=colour)
    return title, "\n".join(lines)


@pytest.mark.parametrize("case", CASES)
def test_the_first_example_shows_what_is_learned(project, case):
    title, text = example_of(project, case)
    learned = re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL)
    given = re.sub(r"\[\[.*?\]\]", "", text, flags=re.DOTALL)
    letters = [re.sub("[^A-T]", "", piece) for piece in learned]
    prompt = re.sub("[^A-T]", "", given)
    x = (prompt + "".join(letters))[0]
    k = ord(x) - ord("A") + 1
    if case == "grpo":
        assert (title, learned, prompt) == ("first prompt:", [], x * k)
        return
    assert title == "first example, learned text in [[ ]]:"
    if case in ("pretrain", "plain", "streamed"):
        assert len(prompt) <= 1 and len("".join(letters)) > 4
    else:
        assert letters == {"dpo": [x, 2 * x]}.get(case, [x])
        assert prompt == x * k * len(letters)
    good = "good answer" if k % 2 == 0 else "bad answer"
    labels = {"dpo": ["chosen", "rejected"], "kto": [good], "kto-precomputed": [good]}
    assert re.findall(r"^  (\w.*):$", text, re.MULTILINE) == labels.get(case, [])


def test_a_resumed_run_shows_the_first_example_of_its_next_step(project):
    run, _ = recorded(project, "sft")
    row = rows_of_step(str(run), 3)["rows"][0]
    want = "".join(text for text, _ in row["segments"][0]["text"])
    _, text = example_of(project, "sft", start=2)
    assert re.sub(r"\[\[|\]\]|^    ", "", text, flags=re.MULTILINE) == want.removesuffix("\n")
    title, text = example_of(project, "sft", colour=True)
    assert title.endswith("in colour:") and "\x1b[32m" in text and "[[" not in text


def test_a_long_example_is_cut_to_a_readable_length():
    turns = [[f"{i} " + "x" * 1000, bool(i % 2)] for i in range(20)]
    shown = _shortened(turns)
    assert [text.split()[0] for text, _ in shown] == ["0", "1", "2", "…", "17", "18", "19"]
    assert [learned for _, learned in shown] == [False, True, False, False, True, False, True]
    assert shown[3][0] == " … 14 more parts … "
    assert shown[0][0] == f"0 {'x' * 118} … 762 characters … {'x' * 120}"
    assert len(_shortened(turns[:6])) == 6
    assert _shortened([["x" * 300, True]]) == [["x" * 300, True]]


def test_only_the_main_process_writes_rows_that_all_have(project, monkeypatch):
    run, _ = recorded(project, "sft")
    before = (run / FILE).read_bytes()
    monkeypatch.setattr(dist, "is_main", lambda: False)
    cfg, _ = load_config("sft", None, ["--output_dir", str(run), "--batch_size", str(SIZE)])
    with RowLog(cfg, Path(cfg.output_dir), 0) as record:
        record(1, iter([]))
    assert (run / FILE).read_bytes() == before


def test_the_first_row_that_differs_is_named(project, capsys):
    run, _ = recorded(project, "sft")
    right = records_of(run)
    for record, row in ((3, 5), (2, 7)):
        wrong = right.copy()
        wrong[record, 1 + row] = 0xABC
        wrong.tofile(run / FILE)
        words = f"step {record + 1}, row {row}: the run recorded hash 0000000000000abc"
        again = f"its config and data now give {right[record, 1 + row]:016x} ("
        line = refused(capsys, ["verify", str(run)], words, again)
        (source, *_) = rows_of_step(str(run), record + 1)["rows"][row]["segments"][0]["sources"]
        assert source["location"] in line


def test_changed_data_is_found(project, capsys):
    run, _ = recorded(project, "sft")
    file = project / "sft-data" / "1.jsonl"
    file.write_text(file.read_text().replace("K", "Z"))
    refused(capsys, ["verify", str(run)], "the run recorded hash", "-data/")


def test_a_missing_step_is_named(project, capsys):
    run, _ = recorded(project, "sft")
    records = records_of(run)
    np.delete(records, 2, 0).tofile(run / FILE)
    refused(capsys, ["verify", str(run)], "rows.bin does not have step 3")
    records[1:].tofile(run / FILE)
    refused(capsys, ["verify", str(run)], "rows.bin does not have step 1")
    records.tofile(run / FILE)
    checkpoint = run / "checkpoints" / str(STEPS + 1)
    checkpoint.mkdir(parents=True)
    refused(capsys, ["verify", str(run)], f"rows.bin does not have step {STEPS + 1}")
    checkpoint.rmdir()
    partial = records[:2] * (np.arange(1 + SIZE) < 4)  # a killed run of two processes
    with (run / FILE).open("ab") as file:
        file.write(np.zeros_like(records[:1]).tobytes() + partial.tobytes())
    assert main(["verify", str(run)]) == 0
    assert f"all {len(records)} steps" in capsys.readouterr().out
    (run / FILE).unlink()
    refused(capsys, ["verify", str(run)], "has no rows.bin: the run did not record its rows")
    refused(capsys, ["rows", str(project), "--step", "1"], "is not a run folder")


@pytest.mark.sweep
def test_a_run_of_two_processes_and_then_one_saw_the_rows_of_its_seed(project):
    run, sizes = project / "two-then-one", ("--steps", "40", "--save.every", "4")
    args = command(project, "sft", run.name, *sizes)
    process = launched(2, 4, args)
    try:
        deadline = time.time() + 120
        while process.poll() is None and not (run / "checkpoints" / "4").is_dir():
            assert time.time() < deadline
            time.sleep(0.01)
    finally:
        for pid in processes_of(process):  # the launcher and its two processes
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
    before = np.fromfile(run / FILE, "<u8").size // 17
    assert before < 40
    again = subprocess.run(args, env=ENV, check=True, timeout=120, capture_output=True, text=True)
    assert "resuming from step" in again.stderr
    assert np.fromfile(run / FILE, "<u8").size // 17 >= 40
    no_device = ENV | {"JAX_PLATFORMS": "none"}
    verify = [sys.executable, "-m", "jaxllm", "verify", str(run)]
    done = subprocess.run(verify, env=no_device, check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"{run}: all 40 steps of 16 rows are as recorded")
