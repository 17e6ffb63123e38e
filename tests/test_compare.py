# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods: four real runs, and what surrounds the runs with a stand-in for them.

The stand-in is what is started instead of Python: it records the config it is given and leaves a
run folder behind.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from runs import FAST, MODEL

from jaxllm import cli, compare
from jaxllm.config import from_dict, to_dict

CORPUS = Path(json.__file__)
ENV = os.environ | {"XLA_FLAGS": FAST, "JAX_PLATFORMS": "cpu"}  # one device
STEPS, PYTHON = 3, sys.executable


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tokenizer, a model config, text, and run.yaml with keys for three of the methods."""
    from jaxllm.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("project")
    (folder / "text.txt").write_text(CORPUS.read_text())
    train_tokenizer([folder / "text.txt"], folder / "tokenizer", vocab_size=300)
    (folder / "model.json").write_text(json.dumps(MODEL | {"vocab_size": 300}))
    (folder / "run.yaml").write_text(
        f"""
        output_dir: {folder}/out
        batch_size: 4
        steps: {STEPS}
        model: {{config: {folder}/model.json, tokenizer: {folder}/tokenizer, remat: none}}
        data:
          train: {folder}/text.txt
          eval: {folder}/text.txt
          max_length: 32
          workers: 1
          cache_dir: {folder}/cache
        peft: {{r: 4, bottleneck: 8, num_virtual_tokens: 6}}
        log: {{every: 1}}
        save: {{final: false}}
        """
    )
    return folder


@pytest.fixture(scope="module")
def compared(project):
    """Terminal, objects and Markdown of full, LoRA, adapter and prefix tuning."""
    command = [sys.executable, "-m", "jaxllm", "compare", str(project / "run.yaml")]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = project / "out"
    return done.stdout, json.loads((out / "compare.json").read_text()), (out / "compare.md")


STAND_IN = """\
import json, signal, sys, time
from pathlib import Path
*_, verb, config = sys.argv
cfg = json.loads(Path(config).read_text())
with Path("{log}").open("a") as log:
    log.write(json.dumps([verb, cfg]) + "\\n")
method = cfg["peft"]["method"]
if method == "{fails}":
    print("jaxllm: error: no room", file=sys.stderr)
    {end}
run = Path(cfg["output_dir"])
(run / "checkpoints" / "9").mkdir(parents=True, exist_ok=True)
(run / "checkpoints" / "10").mkdir(exist_ok=True)
(run / "checkpoints" / "9" / "old").write_text("old" * 100)
(run / "checkpoints" / "10" / "new").write_text("new")
lines = [dict(kind="train", step=i, tokens_per_second=s, memory_gib=m) for i, s, m in {lines}]
losses = ((2, "a", 9.0), (3, "a", 2.0), (3, "b", 4.0))
lines += [dict(kind="eval", step=i, name=name, loss=loss) for i, name, loss in losses]
text = "".join(json.dumps(line) + "\\n" for line in lines)
(run / "metrics.jsonl").write_text(text + {ledger!r})
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Installs the stand-in; gives back a function that reads what the runs were given."""

    def put(fails="", end="", lines=((1, 1.0, 0.5), (2, 20.0, 2.0), (3, 30.0, 1.0)), ledger=""):
        log, script = tmp_path / "log.jsonl", tmp_path / "python"
        body = STAND_IN.format(log=log, fails=fails, end=end or "pass", lines=lines, ledger=ledger)
        script.write_text(f"#!{PYTHON}\n{body}")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        return lambda: [
            (verb, from_dict(cfg)) for verb, cfg in map(json.loads, log.read_text().splitlines())
        ]

    return put


def run(project, out: Path, *more: str) -> int:
    return cli.main(["compare", str(project / "run.yaml"), "--output_dir", str(out), *more])


# ---- four runs


@pytest.mark.sweep
def test_the_objects_hold_what_was_measured(compared, project):
    _, objects, _ = compared
    full, lora, adapter, prefix = objects
    assert [row["method"] for row in objects] == ["full", "lora", "adapter", "prefix"]
    linear = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # of a layer; and its norms
    model = 300 * 32 + 2 * (linear + 2 * 32 + 2 * 8) + 32
    assert full["trainable"] == model and full["share"] == 1
    assert lora["trainable"] == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert adapter["trainable"] == 2 * 2 * (2 * 32 * 8 + 8 + 32)
    assert prefix["trainable"] == 2 * 2 * 6 * 16
    for row in objects:
        assert row["share"] == row["trainable"] / model
        moments = row["optimizer_bytes"] - 8 * row["trainable"]
        assert 0 <= moments <= 16  # and the counts of updates
        assert row["steps"] == STEPS
        lines = [
            json.loads(line)
            for line in (project / "out" / row["method"] / "metrics.jsonl").read_text().splitlines()
        ]
        trained = [line for line in lines if line["kind"] == "train"]
        assert row["memory_gib"] == max(line["memory_gib"] for line in trained)
        assert row["eval_loss"] == [x["loss"] for x in lines if x["kind"] == "eval"][-1]
        assert row["tokens_per_second"] == sum(x["tokens_per_second"] for x in trained[1:]) / 2
        assert 1 < row["wall_seconds"] < 600
        saved = project / "out" / row["method"] / "checkpoints" / str(STEPS)
        files = [p.stat().st_size for p in saved.rglob("*") if p.is_file()]
        assert row["checkpoint_bytes"] == sum(files) > 12 * row["trainable"]
    sizes = [row["checkpoint_bytes"] for row in objects]
    assert sizes == sorted(sizes, reverse=True)
    assert [row["learning_rate"] for row in objects] == [1e-4, 5e-4, 5e-4, 1e-2]


@pytest.mark.sweep
def test_the_terminal_and_the_markdown_hold_the_same_rows(compared):
    terminal, objects, file = compared
    lines = file.read_text().splitlines()
    assert lines[0].startswith("| method | trainable | optimizer | checkpoint | peak GiB | tok")
    for row, line in zip(objects, lines[2:6], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == row["method"]
        assert cells[1] == f"{row['trainable']:,} ({100 * row['share']:.3g}%)"
        assert cells[3] == f"{row['checkpoint_bytes'] / 1024:.2f} KiB"
        assert cells[4] == f"{row['memory_gib']:.2f}"
        assert cells[5] == f"{row['tokens_per_second']:,.0f}"
        assert cells[6] == f"{row['eval_loss']:.4f}"
        shown = [x for x in terminal.splitlines() if x.startswith(f"│ {row['method']} ")]
        assert len(shown) == 1
        assert [cell.strip() for cell in shown[0].strip("│").split("│")] == cells
    note = "Learning rates, each method's default: full 0.0001, lora 0.0005, adapter 0.0005, prefix"
    assert note in file.read_text() and note in terminal
    assert str(file) in terminal.splitlines()


# ---- what each run is given, and what is read of it


def test_methods_chooses_and_orders_and_peft_keys_go_where_they_are_read(
    project, stand_in, tmp_path, capfd
):
    given = stand_in()
    out = tmp_path / "out"
    more = ("--methods", "prompt", "full", "lora", "--batch_size", "8", "--peft.r", "3")
    assert run(project, out, *more, "--objective", "sft") == 0
    (_, prompt), (_, full), (_, lora) = given()
    assert [verb for verb, _ in given()] == ["sft"] * 3
    assert [cfg.peft.method for _, cfg in given()] == ["prompt", "none", "lora"]
    assert [cfg.output_dir for _, cfg in given()] == [
        str(out / name) for name in ("prompt", "full", "lora")
    ]
    assert (lora.peft.r, lora.peft.num_virtual_tokens, lora.peft.bottleneck) == (3, 20, 64)
    assert (prompt.peft.r, prompt.peft.num_virtual_tokens) == (8, 6)
    assert full.peft == from_dict({}).peft
    for _, cfg in given():
        assert (cfg.batch_size, cfg.steps, cfg.data) == (8, STEPS, full.data)
    objects = json.loads((out / "compare.json").read_text())
    assert [row["method"] for row in objects] == ["prompt", "full", "lora"]
    assert "| prompt | 192 (" in (out / "compare.md").read_text()
    assert "compare: full, 2 of 3" in capfd.readouterr().err


def test_a_run_is_read_at_its_end(project, stand_in, tmp_path):
    """The newest checkpoint, the highest peak, the median speed after the first line, and the mean
    of the last evaluations. A line that was cut by a kill is skipped."""
    cut = '{"kind": "tr'
    stand_in(lines=((1, 1.0, 0.5), (2, 20.0, 2.0), (3, 60.0, 1.0), (4, 30.0, 1.0)), ledger=cut)
    assert run(project, tmp_path / "out", "--methods", "prefix") == 0
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (row["checkpoint_bytes"], row["memory_gib"]) == (3, 2.0)
    assert (row["tokens_per_second"], row["eval_loss"], row["steps"]) == (30.0, 3.0, 4)


def test_one_line_of_metrics_gives_no_speed_and_says_so(project, stand_in, tmp_path, capfd):
    stand_in(lines=((1, 1.0, 0.5),))
    assert run(project, tmp_path / "out", "--methods", "prefix") == 0
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert row["tokens_per_second"] is None
    assert "lower log.every" in capfd.readouterr().out
    assert "| – |" in (tmp_path / "out" / "compare.md").read_text()


def test_a_learning_rate_is_every_methods_and_a_line_says_so(project, stand_in, tmp_path, capfd):
    given = stand_in()
    more = ("--methods", "full", "lora", "--learning_rate", "2e-5")
    assert run(project, tmp_path / "out", *more) == 0
    assert [cfg.optim.learning_rate for _, cfg in given()] == [2e-5] * 2
    assert "learning rate 2e-05 (--learning_rate) is shared by all" in capfd.readouterr().out


def test_the_objective_of_the_file_counts_where_no_flag_says_another(project, stand_in, tmp_path):
    given = stand_in()
    file = tmp_path / "sft.yaml"
    file.write_text(
        "objective: sft\n" + (project / "run.yaml").read_text().replace("\n        ", "\n")
    )
    for n, more in enumerate([[], ["--objective=pretrain"], ["--objective=dpo"]]):
        out = ["--output_dir", str(tmp_path / str(n)), "--methods=full"]
        assert cli.main(["compare", str(file), *out, *more]) == 0
    assert [verb for verb, _ in given()] == ["sft", "pretrain", "dpo"]


# ---- a run that does not end well


def test_a_failing_run_ends_the_comparison_with_its_status_and_line(
    project, stand_in, tmp_path, capfd
):
    given = stand_in(fails="lora", end="sys.exit(2)")
    assert run(project, tmp_path / "out") == 2
    assert [cfg.peft.method for _, cfg in given()] == ["none", "lora"]
    error = capfd.readouterr().err
    assert "jaxllm: error: no room\n" in error and "lora ended with status 2" in error
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())  # nothing is lost
    assert row["method"] == "full"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_reaches_the_run_and_its_status_comes_back(
    project, stand_in, tmp_path, capfd, name
):
    """SIGHUP is what a process gets when its terminal is closed."""
    number = getattr(signal, name)
    end = "signal.signal(15, lambda *_: sys.exit(75)); Path('{}').touch(); time.sleep(60)"
    ready = tmp_path / "ready"
    stand_in(fails="none", end=end.format(ready))

    def stop():
        deadline = time.monotonic() + 20
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if ready.exists():
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        assert run(project, tmp_path / "out") == 75
    finally:
        thread.join()
    assert signal.getsignal(number) is before
    assert "full ended with status 75" in capfd.readouterr().err


def test_a_hangup_that_nohup_ignores_does_not_stop_the_runs(project, stand_in, tmp_path):
    stand_in(fails="none", end="import os; os.kill(os.getppid(), signal.SIGHUP)")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(project, tmp_path / "out", "--methods", "full") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_lets_the_run_save_once(project, tmp_path):
    """The terminal sends the signal to every process of its group; the run gets one of them."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jaxllm", "compare", str(project / "run.yaml")]
    command += ["--output_dir", str(out), "--methods", "lora", "--steps", "1000000"]
    process = subprocess.Popen(
        command, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics, deadline = out / "lora" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert "lora ended with status 75" in error
    assert [p for p in (out / "lora" / "checkpoints").iterdir() if p.name.isdigit()]


def test_a_killed_run_gives_the_shells_status(project, stand_in, tmp_path, capfd):
    stand_in(fails="none", end="import os; os.kill(os.getpid(), 9)")
    assert run(project, tmp_path / "out") == 128 + 9
    assert "full was killed by signal 9" in capfd.readouterr().err


# ---- what is refused, before anything runs


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "full", "lroa"], "unknown method lroa; did you mean lora?"),
        (["--methods", "ia3"], "unknown method ia3; there are full, lora, adapter, prefix, prompt"),
        (["--methods"], "--methods names none; there are full"),
        (["--methods", "full", "full"], "--methods: full is given twice"),
        (["--methods", "full", "--methods=lora"], "--methods is given twice"),
        (["--data.eval", "[]"], "give data.eval or data.eval_fraction"),
        (["--peft.path", "a"], "peft.path starts one method ahead of the others"),
        (["--methods", "full", "lora", "--peft.bottleneck", "9"], "--peft.bottleneck is read by n"),
        (["--peft.method", "lora"], "--peft.method is read by none of full, lora, adapter, prefix"),
        (
            ["--data.max_length", "60"],
            "60 is over the model's limit of 58 positions besides 6 virtual tokens",
        ),
        (["--data.max_length", "65"], "65 is over the model's limit of 64 positions"),
        (["--peft.target_modules", "q_prj"], "'q_prj' matches nothing"),
        (
            ["--peft.loraplus_lr_ratio", "2", "--optim.name", "schedule_free_adamw"]
            + ["--optim.schedule", "constant"],
            "is not supported with schedule_free_adamw",
        ),
        (["--objective", "grpo"], "objective is 'grpo', whose runs have no loss on held-out data"),
        (["--objective"], "objective needs a value, seen true"),
        (["--stepz", "3"], "unknown flag --stepz; did you mean --steps?"),
    ],
)
def test_mistakes_are_one_line_before_the_first_run(
    project, tmp_path, capfd, monkeypatch, more, message
):
    monkeypatch.setattr(compare, "_run", None)  # calling it would be a TypeError
    assert run(project, tmp_path / "out", *more) == 2
    error = capfd.readouterr().err
    assert error.startswith("jaxllm: error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_runs_of_another_config_are_refused_unless_overwritten(project, stand_in, tmp_path, capfd):
    given = stand_in()
    out = tmp_path / "out"
    assert run(project, out, "--methods", "lora") == 0
    ((_, cfg),) = given()
    (out / "lora" / "config.json").write_text(json.dumps(to_dict(replace(cfg, batch_size=8))))
    more = ("--seed", "7", "--methods", "full", "lora")
    assert run(project, out, *more) == 2
    error = capfd.readouterr().err
    assert f"{out / 'lora'} belongs to another run (seed was 0, is 7)" in error
    assert len(given()) == 1
    assert run(project, out, *more, "--overwrite") == 0
    assert [cfg.overwrite for _, cfg in given()] == [False, True, True]


def test_the_same_command_resumes_a_comparison_that_was_stopped(project, stand_in, tmp_path, capfd):
    """With the date of its first day, and the time of all processes."""
    given = stand_in(fails="lora", end="sys.exit(75)")
    out, methods = tmp_path / "out", ("--methods", "full", "lora")
    assert run(project, out, *methods, "--objective", "sft") == 75
    assert "lora ended with status 75; run the same command to resume" in capfd.readouterr().err
    for (_, cfg), date in zip(given(), ("2001-02-03", "2001-02-03"), strict=True):
        folder = Path(cfg.output_dir)
        (folder / "checkpoints" / "2").mkdir(parents=True, exist_ok=True)
        data = replace(cfg.data, date=date)
        (folder / "config.json").write_text(json.dumps(to_dict(replace(cfg, data=data))))
    ledger = '{"kind": "goodput", "step": 3, "train_seconds": 70.0, "lost_seconds": 7.0}\n'
    stand_in(ledger=ledger)
    assert run(project, out, *methods, "--objective", "sft") == 0
    assert [cfg.data.date for _, cfg in given()[2:]] == ["2001-02-03"] * 2
    rows = json.loads((out / "compare.json").read_text())
    assert [row["wall_seconds"] for row in rows] == [77.0, 77.0]


def test_help_names_the_methods_and_flags(capsys):
    assert cli.main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("usage: jaxllm compare", "--methods", "--objective", *compare.METHODS):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100
