# SPDX-License-Identifier: Apache-2.0
"""What the report reads from a run folder, whatever state the run is in."""

import fcntl
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from folders import EVIL, eval_line, run_folder, train_line, write_lines

from jaxllm.cli import main
from jaxllm.errors import UserError
from jaxllm.lock import Lock
from jaxllm.report import page as report_page
from jaxllm.report.charts import CHARTS, charts_of
from jaxllm.report.columns import Columns, histogram, reduced
from jaxllm.report.page import page, write_report
from jaxllm.report.reading import read_run


def columns(*lines):
    made = Columns()
    for line in lines:
        made.add(line)
    return made


# ---- the columns


def test_the_later_line_of_a_step_counts():
    made = columns(*({"step": s, "loss": v} for s, v in ((1, 5.0), (3, 4.0), (2, 9.0), (3, 1.0))))
    steps, _, metrics = made.arrays()
    assert steps.tolist() == [1, 2, 3] and metrics["loss"].tolist() == [5.0, 9.0, 1.0]


def test_what_is_no_number_leaves_a_gap_and_is_counted():
    lines = [
        {"step": 1, "loss": 2.0, "mfu": None, "note": "text", "many": [1, 2]},
        {"step": 2, "loss": "NaN", "mfu": 0.5, "note": "text", "many": [1, 2]},
        {"step": 3, "loss": "Infinity", "late": 7},
        {"loss": 1.0},
        {"step": "NaN", "loss": 1.0},
    ]
    made = columns(*lines)
    found = reduced(made, 0.0, 10)
    assert found["mean"] == {
        "loss": [2, None, None],
        "mfu": [None, 0.5, None],
        "late": [None, None, 7],
    }
    assert found["broken"] == {"loss": 2} and found["rows"] == 3


def test_many_rows_keep_their_extremes():
    rng = np.random.default_rng(0)
    values = rng.normal(size=25_000)
    values[12_345], values[777] = 99.0, -50.0
    made = columns(*({"step": 10 * i, "loss": float(v)} for i, v in enumerate(values)))
    found = reduced(made, 0.0, 500)
    assert len(found["step"]) == len(found["mean"]["loss"]) == len(found["low"]["loss"]) == 500
    assert max(found["high"]["loss"]) == 99 and min(found["low"]["loss"]) == -50
    assert np.mean(found["mean"]["loss"]) == pytest.approx(values.mean(), abs=1e-4)
    first, last, least, at_least, most, at_most = found["about"]["loss"]
    assert (least, at_least, most, at_most) == (-50, 7770, 99, 123_450)
    assert (first, last) == pytest.approx((values[0], values[-1]), rel=1e-5)


def test_a_histogram_is_not_flattened_by_one_long_step():
    found = histogram(np.append(np.linspace(1.0, 1.1, 300), 500.0))
    assert found is not None and sum(found["counts"]) + found["above"] == 301
    assert found["above"] >= 1 and found["edges"][-1] < 2
    assert histogram(np.array([math.nan])) is None
    alone = histogram(np.array([3.0]))
    assert alone is not None and sum(alone["counts"]) == 1


# ---- the charts


def test_metrics_of_a_kind_share_a_chart_and_none_is_lost():
    names = ["reward/exact", "reward/form", "reward", "kl", "my_own", "tokens", "reward_chosen"]
    made = charts_of(names, "prompts")
    by_title = {chart["title"]: chart["metrics"] for chart in made}
    assert by_title["Reward by function"] == ["reward/exact", "reward/form"]
    assert by_title["Reward"] == ["reward"] and by_title["My own"] == ["my_own"]
    assert made[0]["section"] == "Rewards"
    shown = [name for chart in made for name in chart["metrics"]]
    assert sorted(shown) == sorted(set(names) - {"tokens"})


def test_every_metric_in_the_docs_has_a_chart():
    text = (Path(__file__).parents[2] / "docs" / "rl.md").read_text()
    tables = re.findall(r"^\| (`[a-z_/`, NAME]+) \|", text, re.MULTILINE)
    names = {n.replace("NAME", "x") for row in tables for n in re.findall(r"`([\w/]+)`", row)}
    assert len(names) > 15
    known = [name for name in names if any(re.fullmatch(c.metrics, name) for c in CHARTS)]
    assert {"reward/x", "reward_std/x", "update_kl", "explained_variance"} <= set(known)
    assert charts_of(known, "prompts")


# ---- the state of a run


@pytest.fixture
def folder(tmp_path):
    return run_folder(tmp_path / "first")


def append(folder, *lines):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def test_a_complete_run(folder):
    run = read_run(folder)
    assert (run["state"], run["step"], run["steps"]) == ("done", 60, 60)
    assert run["best"] == {"step": 40, "value": 2.5, "metric": "loss"}
    assert run["evals"]["held-out"]["step"] == [20, 40, 60]
    assert run["checkpoints"] == [
        {"step": 40, "gib": 1.5, "time": (folder / "checkpoints" / "40").stat().st_mtime}
    ]
    # From the start to 40 s, then from 50 s to the last line at 70 s.
    assert run["seconds"] == 40 + 20 and run["resumed"] == [20]
    origins = {key: origin for key, _, origin in run["config"]}
    assert origins["steps"] == "--steps" and origins["output_dir"] == "run.yaml:3"
    assert origins["seed"] == "default"


@pytest.mark.parametrize(
    ("last", "state", "message"),
    [
        ({"kind": "goodput", "step": 60, "ended": "early"}, "early", None),
        ({"kind": "goodput", "step": 60, "ended": "stopped"}, "stopped", None),
        ({"kind": "error", "step": 61, "message": "loss is nan"}, "failed", "loss is nan"),
        (train_line(61), "killed", None),
    ],
)
def test_how_a_run_ended(folder, last, state, message):
    append(folder, last)
    run = read_run(folder)
    assert (run["state"], run["message"]) == (state, message)


def test_a_run_that_trains_is_known_by_its_lock_and_says_what_is_left(folder):
    (folder / ".lock").write_text("process 1")
    append(folder, train_line(61))
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(folder / ".lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "held\n"
        starts = (folder / "starts.jsonl").read_text().replace('"steps": 60', '"steps": 100')
        (folder / "starts.jsonl").write_text(starts)
        run = read_run(folder)
        again = read_run(folder)  # the first took nothing, and released nothing
        process.stdin.close()
    assert run["state"] == again["state"] == "running" and run["ledger"] is None
    assert run["left"] == pytest.approx(39.0)  # a step takes a second
    assert read_run(folder)["state"] == "killed" and read_run(folder)["ledger"]
    with (folder / ".lock").open("a") as file:  # and nothing keeps the lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_process_that_trains_keeps_its_lock(folder):
    lock = Lock.of(folder)
    assert lock is not None and read_run(folder)["state"] == "running"
    code = "import sys; from pathlib import Path; from jaxllm.lock import Lock; "
    code += "print(Lock.is_held(Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(folder)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("lock", [None, ""])  # as in a bucket, and where nothing can be locked
def test_without_a_lock_the_age_of_the_last_line_decides(folder, lock):
    if lock is not None:
        (folder / ".lock").write_text(lock)
    now = time.time()
    for age, state in ((60, "running"), (3600, "killed")):
        append(folder, train_line(61) | {"time": now - age})
        assert read_run(folder)["state"] == state
        write_lines(folder / "metrics.jsonl", [])
    lines = [train_line(s) | {"time": now - 9000 + 2000 * s} for s in range(1, 4)]
    write_lines(folder / "metrics.jsonl", lines)  # lines are rare in this run
    assert read_run(folder)["state"] == "running"
    append(folder, {"kind": "goodput", "step": 60, "time": now, "ended": "done"})
    assert read_run(folder)["state"] == "done"


@pytest.mark.parametrize("rows", [0, 1])
def test_a_run_with_hardly_a_line(folder, rows):
    write_lines(folder / "metrics.jsonl", [train_line(1)] * rows)
    for name in ("samples.jsonl", "data.json", "starts.jsonl"):
        (folder / name).unlink()
    run = read_run(folder, running=True)
    assert run["state"] == ("running" if rows else "starting") and run["step"] == rows
    assert run["left"] is None and run["best"] is None
    assert "<main" in page([run])


def test_damaged_files_are_read_as_far_as_they_go(folder):
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[]\n\xff\xfe\n{"kind": "train", "step": 61, "loss"')
    (folder / "samples.jsonl").write_bytes(b'{"step": 20, "prompt": "p", "text": "\xff"}\n{"st')
    (folder / "data.json").write_text('{"train": {')
    (folder / "checkpoints" / "40" / "files.json").write_text("{")
    run = read_run(folder)
    assert run["step"] == 60 and run["data"] == {} and run["checkpoints"][0]["gib"] is None
    assert run["samples"][0]["rows"][0]["text"] == "�"
    page([run])


def test_values_that_json_or_a_float_does_not_have(folder):
    huge = "1" * 310
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 61, "loss": NaN, "mfu": 0.5}\n')
        file.write(f'{{"kind": "train", "step": 62, "loss": {huge}, "grad_norm": 7.0}}\n')
        file.write(f'{{"kind": "train", "step": {huge}, "loss": 1.0}}\n')
        file.write(f'{{"kind": "plan", "step": 62, "memory_gib": 1e999, "mfu": {huge}}}\n')
    (folder / "data.json").write_text('{"train": {"sources": [], "fill": 1e999}}')
    (folder / "samples.jsonl").write_text('{"step": 1, "prompt": "\\ud800 p", "text": "t"}\n')
    saved = folder / "checkpoints" / "50"
    saved.mkdir()
    (saved / "files.json").write_text(f'{{"a": 5, "b": [{huge}, 1], "c": [null]}}')
    run = read_run(folder)
    assert run["step"] == 62 and run["train"]["mean"]["loss"][-2:] == [None, None]
    assert run["train"]["mean"]["grad_norm"][-1] == 7 and run["train"]["broken"] == {"loss": 1}
    assert [(one["step"], one["gib"]) for one in run["checkpoints"]] == [(40, 1.5), (50, None)]
    text = write_report([str(folder)]).read_text()
    data = json.loads(re.findall(r'id="run-data">(.*?)</script>', text, re.DOTALL)[0])
    assert data["runs"][0]["plan"]["memory_gib"] is None
    assert data["runs"][0]["samples"][0]["rows"][0]["prompt"] == "? p"


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is not a run folder"):
        read_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"jaxllm: error: {tmp_path} is not a run folder")
    assert main(["report"]) == 2


def test_the_best_is_that_of_eval_metric(folder):
    config = json.loads((folder / "config.json").read_text())
    config["eval"] |= {"metric": "eval_accuracy"}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [eval_line(s, 2.0) | {"accuracy": a} for s, a in ((20, 0.2), (40, 0.1), (60, 0.2))]
    write_lines(folder / "metrics.jsonl", [train_line(60), *lines])
    best = read_run(folder)["best"]
    assert best == {"step": 20, "value": 0.2, "metric": "eval_accuracy"}


def test_samples_of_many_steps_are_thinned_and_long_ones_cut(folder):
    rows = [
        {"step": s, "prompt": "p", "text": "x" * 5000, "reward": 1.0, "rewards": {"f": 0.5}}
        for s in range(1, 201)
        for _ in range(8)
    ]
    write_lines(folder / "samples.jsonl", rows)
    found = read_run(folder)["samples"]
    assert len(found) == 24 and found[0]["step"] == 1 and found[-1]["step"] == 200
    assert len(found[0]["rows"]) == 6 and found[0]["more"] == 2
    row = found[0]["rows"][0]
    assert row["text"].endswith("x… (2,000 more characters)") and row["rewards"] == {"f": 0.5}


# ---- the page as a file


def test_the_page_is_small_and_fast_for_a_hundred_thousand_rows(folder):
    lines = (json.dumps(train_line(step, own=step % 7)) for step in range(1, 100_001))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    began = time.process_time()
    file = write_report([str(folder)])
    assert time.process_time() - began < 10  # 1.3 s on an idle core
    assert file == folder / "report.html" and file.stat().st_size < 1_000_000


def test_text_of_a_run_cannot_end_the_script_it_is_in(folder):
    text = page([read_run(folder)])
    assert EVIL not in text and text.count("</script>") == 2
    assert "<!--" not in text.split("<body")[1]
    data = re.search(r'id="run-data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert EVIL in json.loads(data[1])["runs"][0]["samples"][0]["rows"][0]["prompt"]


def test_the_policy_allows_this_script_and_style_alone(folder):
    text = page([read_run(folder)])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and policy[1].startswith("default-src &#x27;none&#x27;;")
    assert "unsafe" not in policy[1] and "http" not in policy[1]
    assert not re.search(r'(src|href)="(?!#)', text.split("<script")[0])


def test_several_runs_are_named_apart(tmp_path, monkeypatch, capsys):
    runs = [run_folder(tmp_path / name / "run") for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out == "report.html\n"
    text = (tmp_path / "report.html").read_text()
    assert f"<title>{runs[0]}, {runs[1]} · jaxllm report</title>" in text


def test_a_report_imports_no_jax(folder):
    code = "import sys; from jaxllm.cli import main; status = main(sys.argv[1:]); "
    code += "print({'jax', 'transformers', 'datasets'} & set(sys.modules)); sys.exit(status)"
    command = [sys.executable, "-c", code, "report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder / 'report.html'}\nset()\n"


def test_without_a_browser_a_picture_is_refused_in_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(report_page, "BROWSERS", ("no-such-browser",))
    assert main(["report", str(folder), "--png", str(folder / "x.png")]) == 2
    assert "--png needs Chromium or Chrome" in capsys.readouterr().err
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("flag", ["--out", "--png"])
def test_a_file_that_cannot_be_made_is_refused_in_one_line(folder, flag, capsys):
    for file, said in (
        (folder, f"{folder} is a directory; give a file in it"),
        (folder / "no" / "x", f"there is no directory {folder / 'no'}"),
    ):
        assert main(["report", str(folder), flag, str(file)]) == 2
        assert capsys.readouterr().err == f"jaxllm: error: {flag}: {said}\n"
    assert not (folder / "report.html").exists()


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_valid(tmp_path):
    script = "\n".join(p.read_text() for p in report_page.SHARED if p.suffix == ".js")
    script += (report_page.PARTS / "page.js").read_text()
    (tmp_path / "page.js").write_text(script)
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)


def test_the_chart_library_is_the_published_one_and_has_its_licence():
    """The files of dist/ in the npm package uplot 1.6.32, as they are."""
    published = {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
        "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    }
    folder = report_page.PARTS
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("uPlot*")}
    assert found == published
    assert "uPlot (v1.6.32)" in (folder / "uPlot.iife.min.js").read_text()[:80]
    assert "The MIT License" in (folder / "uPlot.LICENSE").read_text()
