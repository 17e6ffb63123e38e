# SPDX-License-Identifier: Apache-2.0
"""The step: the same numbers however an update is divided, laid out or recomputed."""

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import DEVICES, ENV, arguments, command, killed, lines_of, refused
from safetensors.numpy import load_file
from steps import assert_same_trajectory, ragged_rows, trajectory, unpacked

from jaxllm import training
from jaxllm.checkpoint import Checkpoints
from jaxllm.cli import main
from jaxllm.config import MeshSection, RlSection, TrainConfig
from jaxllm.errors import UserError
from jaxllm.timetable import Events, Timetable


@pytest.fixture(scope="module")
def reference():
    return trajectory(ragged_rows(16))


@pytest.mark.parametrize(
    "form",
    [
        dict(count=4),
        dict(count=16),
        dict(remat="full"),
        dict(remat="dots"),
        dict(remat="names"),
        dict(scan_unroll=4),
        dict(devices=8, mesh=MeshSection(data=8, fsdp=1)),
        dict(devices=8, mesh=MeshSection(fsdp=2, tensor=4), count=2, remat="full"),
    ],
    ids=lambda form: "-".join(f"{k}_{v}" for k, v in form.items() if k != "mesh"),
)
def test_trajectory_does_not_depend_on_how_an_update_is_computed(reference, form):
    losses, norms, _, _ = trajectory(ragged_rows(16), **form)
    assert_same_trajectory(losses, reference[0])
    assert_same_trajectory(norms, reference[1])


def test_mean_of_micro_batch_means_would_differ(reference):
    """The equivalence above can fail: the rows' weights are uneven enough to show a wrong mean."""
    rows = ragged_rows(16)
    weights = rows["weights"].reshape(4, -1).sum(1)
    assert weights.max() > 1.3 * weights.min()
    assert reference[0][-1] < reference[0][0]


def test_packed_rows_equal_unpacked_ones(reference):
    losses, norms, _, _ = trajectory(unpacked(ragged_rows(16)))
    assert_same_trajectory(losses, reference[0])
    assert_same_trajectory(norms, reference[1])


def test_loss_is_unchanged_by_what_padding_holds(reference):
    rows = ragged_rows(16)
    rows["tokens"] = np.where(rows["segment_ids"] == 0, 5, rows["tokens"])
    rows["targets"] = np.where(rows["weights"] == 0, 7, rows["targets"])
    np.testing.assert_allclose(trajectory(rows)[0], reference[0], rtol=1e-6)


def test_nothing_learned_gives_zero_loss_and_gradients():
    rows = ragged_rows(4)
    rows["weights"] = np.zeros_like(rows["weights"])
    losses, norms, _, _ = trajectory(rows, steps=1)
    assert norms[0] == 0.0 and np.isnan(losses[0])  # 0 / 0 only when divided by hand


def test_bf16_compute_stays_near_float32(reference):
    losses, _, _, _ = trajectory(ragged_rows(16), compute_dtype="bfloat16")
    assert_same_trajectory(losses, reference[0], rtol=2e-2)


# ---- how long a run is


def run_length(cfg, rows):
    timetable = Timetable(cfg, rows)
    return timetable.steps, timetable.stride


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    [(1, 31, 16, 2), (1, 32, 16, 2), (2, 31, 20, 4), (0.5, 31, 16, 1), (1.1, 100, 10, 11)]
    + [(0.01, 31, 16, 1), (1, 3, 16, 1), (3, 7, 7, 3), (0.3, 1000, 10, 30)],
)
def test_an_epoch_is_every_row(epochs, rows, batch, steps):
    cfg = TrainConfig(epochs=epochs, batch_size=batch)
    assert run_length(cfg, rows) == (steps, 1)
    assert run_length(replace(cfg, steps=5), rows) == (5, 1)


@pytest.mark.parametrize(
    ("epochs", "prompts", "group", "minibatches", "rollouts"),
    [(1, 31, 4, 2, 8), (1, 32, 4, 2, 8), (1.1, 40, 4, 1, 22), (0.1, 3, 8, 1, 1), (2, 5, 1, 1, 2)],
)
def test_an_epoch_asks_every_prompt(epochs, prompts, group, minibatches, rollouts):
    rl = RlSection(group_size=group, minibatches=minibatches, iterations=3)
    cfg = TrainConfig("grpo", epochs=epochs, batch_size=8, rl=rl)
    assert run_length(cfg, prompts) == (rollouts * minibatches * 3, minibatches * 3)


# ---- whole runs


@pytest.fixture(scope="module")
def straight(project):
    """Uninterrupted runs of 12 steps on 8 devices, accumulation 2."""
    for verb in ("pretrain", "sft"):
        assert main(arguments(project, verb, f"{verb}-straight")) == 0
    return project


@pytest.mark.parametrize("verb", [pytest.param("pretrain", marks=pytest.mark.sweep), "sft"])
def test_resume_after_sigkill_is_bit_exact(straight, verb):
    run = straight / f"{verb}-killed"
    killed(command(straight, verb, run.name), run)
    before = lines_of(run)
    assert max(before, default=0) < 12
    assert main(arguments(straight, verb, run.name)) == 0
    want, got = lines_of(straight / f"{verb}-straight"), lines_of(run)
    assert sorted(got) == sorted(want) == list(range(1, 13))
    for step in want:
        for key in ("loss", "grad_norm", "accuracy", "entropy", "tokens", "tokens_seen", "epoch"):
            assert got[step][key] == want[step][key], (step, key)
    assert want[12]["tokens_seen"] == sum(line["tokens"] for line in want.values())
    a, b = (
        load_file(straight / f"{verb}-{k}/final/model.safetensors") for k in ("straight", "killed")
    )
    assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}


def test_an_optimizer_state_in_the_hosts_memory_changes_nothing(straight, monkeypatch):
    """A killed run of it, which ends with the state on the devices."""
    run = straight / "offloaded"
    killed(command(straight, "pretrain", run.name, "--optim.offload", "true"), run)
    kinds, step = set(), training.compiled

    def recorded(program, *args):
        kinds.update(x.sharding.memory_kind for x in jax.tree.leaves(program.state.opt_state))
        kinds.update(x.sharding.memory_kind for x in jax.tree.leaves(args[2].opt_state))
        return step(program, *args)

    monkeypatch.setattr(training, "compiled", recorded)
    kind = "pinned_host"
    for offload, steps in (("true", "10"), ("false", "12")):
        more = ["--optim.offload", offload, "--steps", steps]
        assert main(arguments(straight, "pretrain", run.name, *more)) == 0
        assert kinds == {kind}
        kinds, kind = kinds - kinds, "device"
    want, got = (
        load_file(straight / f"{k}/final/model.safetensors")
        for k in ("pretrain-straight", "offloaded")
    )
    assert {k: v.tobytes() for k, v in got.items()} == {k: v.tobytes() for k, v in want.items()}


def test_resume_on_half_the_devices_sees_the_same_rows(straight):
    run = straight / "moved"
    killed(command(straight, "pretrain", "moved"), run)
    four = ENV | {"XLA_FLAGS": DEVICES + "4"}
    subprocess.run(
        command(straight, "pretrain", "moved"), env=four, check=True, capture_output=True
    )
    want, got = lines_of(straight / "pretrain-straight"), lines_of(run)
    assert sorted(got) == list(range(1, 13))
    for step in want:
        assert got[step]["tokens"] == want[step]["tokens"]
        assert abs(got[step]["loss"] - want[step]["loss"]) < 1e-5
    assert any(got[step]["loss"] != want[step]["loss"] for step in want)  # it did move


def test_sigterm_saves_and_exits_75(project):
    args = command(project, "pretrain", "stopped", "--steps", "100000", "--save.every", "100000")
    process = subprocess.Popen(args, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = project / "stopped" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (file.is_file() and file.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    # transformers imports torch, where it is installed, for a config: a command prevents it.
    mapped = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch" not in mapped and "jaxlib" in mapped
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert [p for p in (project / "stopped" / "checkpoints").iterdir() if p.name.isdigit()]


WAITING = """
import time
from pathlib import Path
from jaxllm.config import ClusterSection
from jaxllm.signals import stop_signal
from jaxllm.watch import Watch
watch = Watch(ClusterSection(), Path())
with stop_signal(watch):
    print("ready", flush=True)
    watch.stop.wait()
    print("stopping", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_run_at_once(first, second):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == b"stopping\n"  # the first one only sets the flag
    process.send_signal(second)
    _, said = process.communicate(timeout=20)
    assert process.returncode == -second
    assert b"a second signal ends the run at once" in said


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_spares_the_checkpoint_that_is_being_saved(second):
    saving = WAITING.replace('print("stopping"', 'spare_the_save(watch); print("saving"')
    saving = saving.replace("import stop_signal", "import spare_the_save, stop_signal")
    process = subprocess.Popen(
        [sys.executable, "-c", saving], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"saving\n"
    process.send_signal(second)
    for wanted in (b"stopping after this step", b"the next signal ends the run"):
        assert wanted in process.stderr.readline() + process.stderr.readline()
    process.send_signal(second)
    process.communicate(timeout=20)
    assert process.returncode == -second


# ---- the best model, and stopping for lack of a better one

# So that the loss of the held-out set rises after step 3.
RISE = ("--optim.learning_rate", "0.5", "--optim.warmup", "12", "--optim.clip", "0")


def judged_run(project, out, *more):
    held_out = ("--data.eval", str(project / "few.jsonl"), "--eval_every", "1", *RISE)
    keep = ("--save.every", "5", "--save.keep", "1", "--eval.patience", "3", "--save.load_best")
    return arguments(project, "sft", out, *held_out, *keep, *more)


@pytest.fixture(scope="module")
def early(project):
    """A run that stopped early, and what it printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(judged_run(project, "early")) == 0
    return project / "early", text.getvalue()


def best_of(run):
    losses = {step: line["loss"] for step, line in lines_of(run, "eval").items()}
    return min(losses, key=lambda step: (losses[step], step)), losses


def test_a_run_stops_after_its_patience_and_says_why(early):
    run, said = early
    best, losses = best_of(run)
    last = max(losses)
    assert last == best + 3 < 12 and list(lines_of(run)) == list(range(1, last + 1))
    assert f"best: step {best}, loss {losses[best]:.4f} (exported to final/)" in said
    assert "stopped early: loss has not improved in 3 evaluations (eval.patience)" in said
    assert f"done: {last} steps" in said


def test_the_best_model_is_final_and_outlives_rotation(early, capsys):
    run, _ = early
    best, losses = best_of(run)
    kept = {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {str(best), str(max(losses))}
    last, file = str(max(losses)), "model.safetensors"
    for flags, same in (([], True), (["--step", "best"], True), (["--step", last], False)):
        out = run.parent / f"early-{len(flags)}-{same}"
        assert main(["export", str(run), str(out), *flags]) == 0
        assert f"exporting checkpoint {best if same else last}\n" in capsys.readouterr().err
        assert ((out / file).read_bytes() == (run / "final" / file).read_bytes()) is same


def test_a_run_that_stopped_early_is_complete(early, capsys):
    run, said = early
    before = (run / "metrics.jsonl").read_text()
    model = (run / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "final")
    capsys.readouterr()
    assert main(judged_run(run.parent, "early")) == 0
    assert capsys.readouterr().out in said  # but for the evaluation, which is not done again
    assert (run / "metrics.jsonl").read_text() == before
    assert (run / "final" / "model.safetensors").read_bytes() == model


def evaluating(monkeypatch, at, action):
    """Calls `action` before the evaluation number `at` of a run."""
    from jaxllm import evaluations as module

    calls, real = itertools.count(1), module.evaluate

    def evaluate(*args, **keys):
        if next(calls) == at:
            action()
        return real(*args, **keys)

    monkeypatch.setattr(module, "evaluate", evaluate)


@pytest.mark.parametrize("at", [2, 5])
def test_a_signal_changes_nothing_of_what_is_best(early, monkeypatch, at):
    """The evaluation that a signal left out is made up for by the run that goes on: that of step 3
    is the best, after that of step 6 the run is over."""
    run, _ = early
    evaluating(
        monkeypatch, at, lambda: os.kill(os.getpid(), signal.SIGTERM)
    )  # a step later it ends
    args = judged_run(run.parent, f"signal-{at}")
    other = run.parent / f"signal-{at}"
    assert main(args) == 75
    assert max(lines_of(other)) == at + 1 and max(lines_of(other, "eval")) == at
    assert main(args) == 0
    want, got = lines_of(run, "eval"), lines_of(other, "eval")
    for line in (*want.values(), *got.values()):
        del line["time"]
    assert got == want and list(got) == list(want)
    a, b = (folder / "final" / "model.safetensors" for folder in (run, other))
    assert a.read_bytes() == b.read_bytes()
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert {p.name for p in (other / "checkpoints").iterdir()} == names


def test_a_run_that_ends_by_a_pending_evaluation_is_complete(project, monkeypatch, capsys):
    """Each evaluation is better than the one before, and none by enough; a signal puts off that of
    step 3, which ends the run."""
    evaluating(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    held_out = ("--data.eval", str(project / "few.jsonl"), "--eval_every", "1")
    enough = ("--eval.patience", "2", "--eval.min_delta", "9", "--save.load_best")
    args = arguments(project, "sft", "pending", *held_out, *enough, "--log.samples", "def f")
    args += ["--log.sample_tokens", "4"]
    run = project / "pending"
    assert main(args) == 75
    monkeypatch.undo()
    with monkeypatch.context() as patch:  # killed after the evaluation and before it is noted
        patch.setattr(Checkpoints, "amend", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(args)
    for _ in range(2):
        assert main(args) == 0
        lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines if x["kind"] == "eval"] == [1, 2, 3]
        samples = (run / "samples.jsonl").read_text().splitlines()
        assert [json.loads(x)["step"] for x in samples] == [1, 2, 3]
        said = capsys.readouterr().out
        assert "stopped early: loss has not improved by more than 9 in 2 evaluations" in said
    assert best_of(run)[0] == 3
    out = project / "pending-best"
    assert main(["export", str(run), str(out), "--step", "best"]) == 0
    file = "model.safetensors"
    assert (out / file).read_bytes() == (run / "final" / file).read_bytes()


def test_a_best_checkpoint_that_is_gone_is_named_before_the_first_step(project, capsys):
    """A higher loss counts as better, so that the first step of each run stays the best."""
    held_out = ("--data.eval", str(project / "few.jsonl"), "--eval_every", "1", "--save.every", "0")
    args = arguments(project, "sft", "gone", *held_out, "--eval.metric", "loss", "--eval.greater")
    run = project / "gone"
    assert main([*args, "--steps", "2", "--no-save.keep_best"]) == 0
    capsys.readouterr()
    assert main([*args, "--steps", "4", "--save.load_best"]) == 0
    said = capsys.readouterr()
    assert "warning: checkpoint 1, the best so far, is missing or damaged" in said.err
    assert "best: step 3" in said.out
    kept = {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()}
    assert {"3", "4"} <= kept
    out, file = project / "gone-best", "model.safetensors"
    assert main(["export", str(run), str(out), "--step", "best"]) == 0
    assert (out / file).read_bytes() == (run / "final" / file).read_bytes()
    shutil.rmtree(run / "checkpoints" / "3")  # and of a run that is done
    assert main([*args, "--steps", "4", "--save.load_best"]) == 0
    assert "checkpoint 3" in capsys.readouterr().err
    assert (out / file).read_bytes() != (run / "final" / file).read_bytes()


@pytest.fixture
def slow_compiler(monkeypatch):
    """Compiling the step takes a thousand seconds more, to whoever looks at the clock."""
    from jaxllm import training as module

    more, now, compiled = [0.0], time.perf_counter, module.compiled

    def slow(*args):
        more[0] += 1000.0
        return compiled(*args)

    monkeypatch.setattr(module, "compiled", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + more[0])
    return more


def test_every_epoch_ends_in_an_evaluation_and_a_checkpoint_by_another_metric(
    project, slow_compiler
):
    data = ("--data.train", str(project / "few.jsonl"), "--data.eval", str(project / "few.jsonl"))
    epoch = ("--eval_every", "epoch", "--save.every", "epoch", "--log.every", "epoch")
    more = ("--steps", "7", "--save.keep", "0", "--eval.metric", "eval_few_accuracy")
    assert main(arguments(project, "sft", "epochs", *data, *epoch, *more)) == 0
    run = project / "epochs"
    rows = json.loads((run / "data.json").read_text())["train"]["rows"]
    assert rows % 16  # epochs end within a batch
    ends = {math.ceil(k * rows / 16) for k in range(1, 99)}
    ends = [step for step in sorted(ends) if step <= 7]
    evals = lines_of(run, "eval")
    assert list(evals) == list(lines_of(run)) == sorted({*ends, 7})
    kept = {int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == set(evals)
    best = max(evals, key=lambda step: (evals[step]["accuracy"], -step))
    saves = Checkpoints(run / "checkpoints")
    assert saves.best() == best
    assert saves.meta(best)["best_eval"]["loss"] == evals[best]["loss"]
    saves.close()
    assert slow_compiler == [1000.0]  # compiled once, in no line's time
    assert all(line["step_seconds"] < 500 for line in lines_of(run).values())


@pytest.mark.parametrize(
    ("rows", "batch", "steps"),
    [
        (32, 16, [2, 4, 6, 8]),
        (31, 16, [2, 4, 6, 8]),
        (17, 16, [2, 3, 4, 5, 6, 7, 8]),
        (40, 16, [3, 5, 8]),
        (5, 16, [1, 2, 3, 4, 5, 6, 7, 8]),
        (200, 16, []),
    ],
)
def test_an_epoch_ends_with_the_step_that_learns_its_last_row(rows, batch, steps):
    timetable = Timetable(TrainConfig(batch_size=batch, steps=9, eval_every="epoch"), rows)
    assert [step for step in range(1, 9) if timetable.after(step, False).evaluate] == steps


def test_an_epoch_of_prompts_ends_with_a_rollout():
    rl = RlSection(group_size=4, minibatches=2, iterations=3)  # 6 updates a rollout, of 8 prompts
    cfg = TrainConfig(objective="grpo", batch_size=16, rl=rl)
    timetable = Timetable(replace(cfg, steps=99, eval_every="epoch"), 12)  # one rollout and a half
    evaluated = [step for step in range(1, 37) if timetable.after(step, False).evaluate]
    assert evaluated == [12, 18, 30, 36]
    assert [step for step in range(1, 20) if timetable.may_stop(step)] == [6, 12, 18]


def test_an_evaluation_is_postponed_where_the_run_stops():
    timetable = Timetable(TrainConfig(steps=4, eval_every=2, batch_size=1), 4)
    assert timetable.after(2, False) == Events(False, True, False, False)
    assert timetable.after(2, True) == Events(True, False, True, True)
    assert timetable.after(4, True) == Events(True, False, True, True)


def test_a_metric_that_is_not_logged_is_named_before_any_step(project, capsys):
    more = ("--data.eval", str(project / "few.jsonl"), "--eval.metric", "f1")
    args = arguments(project, "sft", "no-metric", *more)
    refused(capsys, args, "'f1' is not logged", "accuracy", "few")
    assert not (project / "no-metric" / "checkpoints" / "4").exists()


def test_what_was_due_at_the_last_step_is_made_up_after_a_signal(project, monkeypatch, capsys):
    """The evaluation, the samples and final/; what is printed is not said to be of that step."""
    evaluating(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    held_out = ("--data.eval", str(project / "few.jsonl"), "--eval_every", "1", "--steps", "2")
    samples = ("--log.samples", "def f", "--log.sample_tokens", "4")
    args, run = arguments(project, "sft", "due", *held_out, *samples), project / "due"
    assert main(args) == 75
    said = capsys.readouterr()
    assert "few at step 1: loss" in said.out and "stopped at step 2" in said.err
    assert list(lines_of(run, "eval")) == [1] and not (run / "final").exists()
    assert main(args) == 0
    assert "few: loss" in capsys.readouterr().out
    assert list(lines_of(run, "eval")) == [1, 2]
    lines = map(json.loads, (run / "samples.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == [1, 2]
    assert (run / "final" / "model.safetensors").is_file()


# ---- what a run does not share, and mistakes


def test_another_run_in_the_folder_is_refused(straight, capsys):
    model = straight / "pretrain-straight" / "final" / "model.safetensors"
    before = model.read_bytes()
    args = arguments(straight, "pretrain", "pretrain-straight", "--seed", "7")
    refused(capsys, args, "another run", "seed")
    assert model.read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(project, capsys):
    rise = ("--optim.learning_rate", "1e30", "--optim.clip", "0")
    line = refused(capsys, arguments(project, "pretrain", "nan", *rise))
    assert "step " in line and "the last good checkpoint is kept" in line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--optim.learning_rat", "1"], ["optim.learning_rate"]),
        (["--data.train", "nowhere.txt"], ["nowhere.txt"]),
        (["--data.max_length", "65"], ["65", "64 positions"]),
        (["--batch_size", "6"], ["6", "8 devices"]),
        (["--optim.schedule", "wsd", "--optim.decay", "50"], ["decay", "12"]),
        (["--mesh.tensor", "3"], ["mesh", "8 devices"]),
        (["--optim.name", "adamx"], ["adamx", "adamw"]),
        (["--model.overrides", "{vocab_size: 300}"], ["tokenizer", "300"]),
        (["--model.overrides", "{model_type: mamba}"], ["mamba", "llama"]),
        (["--log.samples", ""], ["prompt"]),
        (["--log.samples", "def", "--log.sample_tokens", "500"], ["500", "64 positions"]),
        (["--optim.name", "sgd", "--optim.b1", "0.8"], ["optim.b1", "sgd"]),
    ],
)
def test_a_users_mistake_is_one_line(project, capsys, more, words):
    refused(capsys, arguments(project, "pretrain", "wrong", *more), *words)
    assert not (project / "wrong" / "checkpoints").exists()  # found before any training


@pytest.mark.parametrize(
    "more", [["--data.train", "nowhere.txt"], ["--optim.name", "adamx"], ["--steps", "3"]]
)
def test_a_mistake_in_a_run_that_is_to_overwrite_another_deletes_nothing(
    project, capsys, more, monkeypatch
):
    from jaxllm import program

    def broken(*_, **__):  # the last that can go wrong
        raise UserError("model.safetensors is gone")

    monkeypatch.setattr(program, "load_model", broken)
    run = project / "kept"
    (run / "checkpoints" / "4").mkdir(parents=True, exist_ok=True)
    config = {"objective": "pretrain", "optim": {}, "data": {}}
    (run / "config.json").write_text(json.dumps(config))
    refused(capsys, arguments(project, "pretrain", "kept", "--overwrite", *more))
    assert (run / "checkpoints" / "4").is_dir()
    assert json.loads((run / "config.json").read_text()) == config


def test_a_run_whose_text_changed_does_not_go_on(project, capsys):
    text = project / "changing.txt"
    text.write_text((project / "text.txt").read_text())
    args = arguments(project, "pretrain", "changing", "--data.train", str(text))
    assert main([*args, "--steps", "4"]) == 0
    text.write_text(text.read_text() * 2)
    refused(capsys, args, "changing.txt changed since")


def test_a_changed_template_is_refused_unless_it_is_accepted_and_more_steps_jump(project, capsys):
    """The change is noted in starts.jsonl, and the next checkpoint is of the new identity."""
    template, run = project / "t.jinja", project / "template"
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    template.write_text(text + "{% if add_generation_prompt %}assistant: {% endif %}")
    args = arguments(project, "sft", "template", "--data.template", str(template))
    args = ["linear" if a == "constant" else a for a in args]
    assert main([*args, "--steps", "2"]) == 0
    template.write_text(template.read_text().replace("assistant: ", "assistant:"))
    template.write_text(template.read_text().replace("}}: {{", "}}:{{"))
    words = "template changed since", "--resume_changed data template"  # it has other tokens
    refused(capsys, [*args, "--steps", "4"], *words)
    assert main([*args, "--steps", "4", "--resume_changed", "data", "template"]) == 0
    said = capsys.readouterr().err
    assert "resume_changed: template changed" in said
    assert "the learning rate was 0.005 at step 2 of 2 and is 0.005 at step 3 of 4" in said
    assert "--optim.schedule constant --optim.learning_rate RATE --resume_changed" in said
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    names = [[name.partition(" ")[0] for name in start.get("changed", {})] for start in starts]
    assert names == [[], ["data", "template"]]
    saves = Checkpoints(run / "checkpoints")
    before, after = (saves.meta(step)["identity"]["template"] for step in (2, 4))
    assert starts[1]["changed"]["template"] == [before, after] and before != after
    (run / "data.json").write_text("{")  # neither is needed to go on
    with (run / "starts.jsonl").open("a") as file:
        file.write('{"time": 1')
    constant = ("--optim.schedule", "constant", "--resume_changed", "optim.schedule")
    assert main([*args, *constant, "--steps", "5"]) == 0
    said = capsys.readouterr().err
    assert "is 0.01 at step 5 of 5" in said and "at one rate" not in said
    assert lines_of(run)[5]["learning_rate"] == pytest.approx(0.01)
    assert json.loads((run / "data.json").read_text())["train"]["rows"] > 0
    assert len((run / "starts.jsonl").read_text().splitlines()) == 3


DAMAGES = {
    "changed": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "torn": lambda data: data[: len(data) // 2],
    "emptied": lambda _: b"",
}


@pytest.mark.parametrize("how", ["changed", "torn", "emptied", "gone"])
def test_no_damaged_file_of_a_checkpoint_is_exported(straight, capsys, tmp_path, how):
    run = tmp_path / "run"
    shutil.copytree(straight / "sft-straight", run)
    step, out = run / "checkpoints" / "8", str(tmp_path / "out")
    files = [p for p in step.rglob("*") if p.is_file()]
    for file in files:
        if file.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):  # orbax does not read them
            continue
        data = file.read_bytes()
        file.unlink() if how == "gone" else file.write_bytes(DAMAGES[how](data))
        for name in ([str(run), out, "--step", "8"], [str(step), out]):
            refused(capsys, ["export", *name], f"{step} is damaged (", "use another")
        file.write_bytes(data)
    (run / "model" / "tokenizer.json").write_text("{}")
    refused(capsys, ["export", str(run), out], f"{run / 'model'} is damaged (tokenizer.json has")
    (run / "config.json").write_text("")
    damaged = f"{run / 'config.json'}:1: malformed JSON"
    remedy = "resume the run, which writes the file again"
    refused(capsys, ["export", str(run), out], damaged, f"delete it and {remedy}")
    (run / "config.json").unlink()
    refused(capsys, ["export", str(run), out], f"{run / 'config.json'}: no such", remedy)
    words = ["eval", "--model", str(step), "--data", str(run / "data.json")]
    refused(capsys, words, f"jaxllm export {step} OUT")


def test_a_run_whose_evaluation_data_changed_does_not_go_on(project, capsys):
    held_out = project / "held-out.txt"
    held_out.write_text((project / "text.txt").read_text()[:20_000])
    args = arguments(project, "pretrain", "changing-eval", "--data.eval", str(held_out))
    assert main([*args, "--steps", "4"]) == 0
    before = (project / "changing-eval" / "metrics.jsonl").read_bytes()
    held_out.write_text(held_out.read_text()[:10_000])
    refused(capsys, args, "held-out.txt changed since")
    assert (project / "changing-eval" / "metrics.jsonl").read_bytes() == before
    more = arguments(project, "pretrain", "changing-eval")  # without the evaluation
    refused(capsys, more, "belongs to another run", "data.eval")


def test_an_error_in_the_loop_leaves_the_checkpoint_before_it_whole(project, monkeypatch):
    """Saving goes on in the background when the loop ends, however that comes."""
    from jaxllm import evaluations as module

    def fail(*_, **__):
        raise RuntimeError("no evaluation today")

    monkeypatch.setattr(module, "evaluate", fail)
    more = ("--data.eval", str(project / "text.txt"), "--eval_every", "5")
    with pytest.raises(RuntimeError, match="no evaluation"):
        main(arguments(project, "pretrain", "cut", *more))
    saves = Checkpoints(project / "cut" / "checkpoints")
    assert saves.latest() == 4
    saves.close()


def test_what_is_exported_is_what_was_evaluated(project):
    """schedule-free evaluates an average that is not the weights it trains."""
    from jaxllm.exports import export

    more = ("--optim.name", "schedule_free_adamw", "--steps", "6")
    assert main(arguments(project, "pretrain", "free", *more)) == 0
    export(str(project / "free"), str(project / "free-exported"))
    file = "model.safetensors"
    exported = load_file(project / "free-exported" / file)
    for name, value in load_file(project / "free" / "final" / file).items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)
