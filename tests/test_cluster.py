# SPDX-License-Identifier: Apache-2.0
"""One run over several processes: the same numbers, one stop, one failure, one export."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from runs import (
    DEVICES,
    ENV,
    arguments,
    command,
    finished,
    launched,
    lines_of,
    one_device,
    processes_of,
)

from jaxllm import dist
from jaxllm.cli import main
from jaxllm.config import ClusterSection
from jaxllm.errors import UserError
from jaxllm.rendezvous import meet

ROOT = Path(__file__).parents[1]
REQUEUE = 75
REWARD = """
def length(prompts, completions, **columns):
    with open(LOG, "a") as log:
        log.write("x" * len(completions))
    return [float(len(text) % 7) for text in completions]
"""


def process_of(run: subprocess.Popen, index: int) -> int:
    """The pid of a process of a launched run."""
    for pid in processes_of(run):
        entry = Path(f"/proc/{pid}")
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            name = (entry / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:  # it has ended
            continue
        if f"JAX_PROCESS_ID={index}".encode() in variables and b"python" in name:
            return pid
    raise AssertionError(f"process {index} is not there")


def wait_for_step(run: Path, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and len(lines_of(run)) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} did not reach step {step}")


# ---- the same numbers

LAYOUTS = {"2x4": (2, 4), "4x2": (4, 2)}  # processes x devices of each
# The other courses -> the fixture that runs them.
SWEPT = {("4x2", "pretrain"): "four", ("2x4", "sft"): "tuned", ("2x4", "grpo"): "online"}
CASES = [("2x4", "pretrain")]
CASES += [pytest.param(*case, marks=pytest.mark.sweep) for case in SWEPT]


def verbs(project: Path, layout: str) -> dict[str, list[str]]:
    """Short runs of four objectives, whose folders end with the layout."""
    base = str(project / "base")
    common = ["--steps", "10", "--log.progress", "false"]
    reward = str(project / f"reward_{layout}.py")
    rl = ["--data.train", str(project / "prompts.jsonl"), "--rl.rewards", f"{reward}:length"]
    rl += ["--rl.group_size", "4", "--rl.max_new_tokens", "6"]
    pairs = ["--data.train", str(project / "pairs.jsonl")]
    held_out = ["--data.eval", str(project / "few.jsonl")]
    sample = ["--log.samples", "import", "--log.sample_tokens", "4"]
    more = {
        "pretrain": ["--data.eval", str(project / "held_out.txt"), *sample],
        "sft": ["--peft.method", "lora", "--data.packing", "true", *held_out],
        "dpo": pairs,
        "grpo": rl,
    }
    commands = {}
    for verb, options in more.items():
        args = arguments(project, verb, f"{verb}-{layout}", *common, *options)
        args[args.index("--data.max_length") + 1] = "32"  # leaves room for completions
        args[args.index("--optim.learning_rate") + 1] = "0.001"  # rounding grows with larger steps
        at = args.index("--model.config")
        commands[verb] = [*args[:at], "--model.path", base, *args[at + 2 :]]
    return commands


@pytest.fixture(scope="module")
def layouts(project):
    """The runs on one process with 8 devices, and on 2 with 4."""
    lines = [line for line in (project / "few.jsonl").read_text().splitlines()]
    texts = [[m["content"] for m in json.loads(line)["messages"]] for line in lines]
    pairs = [
        {"prompt": a, "chosen": b, "rejected": c}
        for (a, b), (c, _) in zip(texts, texts[1:], strict=False)
    ]
    prompts = [{"prompt": a[:20]} for a, _ in texts]
    for name, records in (("pairs", pairs), ("prompts", prompts)):
        (project / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (project / "held_out.txt").write_text((project / "text.txt").read_text()[:8000])
    with one_device():
        assert main(arguments(project, "pretrain", "start", "--steps", "1")) == 0
    shutil.copytree(project / "start" / "final", project / "base")
    for layout in ("1x8", *LAYOUTS):
        log = repr(str(project / f"calls-{layout}"))
        (project / f"reward_{layout}.py").write_text(f"LOG = {log}\n{REWARD}")
    assert main(verbs(project, "1x8")["pretrain"]) == 0
    run_over(project, "2x4", "pretrain")
    return project


@pytest.fixture(scope="module")
def four(layouts):
    """The runs on 4 processes with 2 devices."""
    run_over(layouts, "4x2", "pretrain")
    return layouts


@pytest.fixture(scope="module")
def tuned(layouts):
    """LoRA on one process with 8 devices, and on 2 with 4."""
    assert main(verbs(layouts, "1x8")["sft"]) == 0
    run_over(layouts, "2x4", "sft")
    return layouts


@pytest.fixture(scope="module")
def online(layouts):
    """GRPO on one process with 8 devices, and on 2 with 4."""
    assert main(verbs(layouts, "1x8")["grpo"]) == 0
    run_over(layouts, "2x4", "grpo")
    return layouts


def run_over(project: Path, layout: str, verb: str) -> None:
    command = [sys.executable, "-m", "jaxllm", *verbs(project, layout)[verb]]
    status, output = finished(launched(*LAYOUTS[layout], command))
    assert status == 0, output[-3000:]
    assert output.count("done: 10 steps") == 1  # not by each process


@pytest.mark.parametrize(("layout", "verb"), CASES)
def test_losses_and_gradient_norms_do_not_depend_on_the_processes(request, layouts, verb, layout):
    if (layout, verb) in SWEPT:
        request.getfixturevalue(SWEPT[layout, verb])
    assert_same_course(layouts, verb, layout)


def assert_same_course(layouts, verb, layout):
    one, several = (lines_of(layouts / f"{verb}-{name}") for name in ("1x8", layout))
    assert list(one) == list(several) == list(range(1, 11))
    for step in one:
        for key in ("loss", "grad_norm"):
            assert several[step][key] == pytest.approx(one[step][key], rel=1e-6, abs=1e-6)
        assert several[step]["tokens"] == one[step]["tokens"]
    rows = [(layouts / f"{verb}-{name}" / "rows.bin").read_bytes() for name in ("1x8", layout)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("layout", ["2x4", pytest.param("4x2", marks=pytest.mark.sweep)])
def test_evaluations_and_samples_are_those_of_one_process(request, layouts, layout):
    if layout == "4x2":
        request.getfixturevalue("four")
    one, several = (layouts / f"pretrain-{name}" for name in ("1x8", layout))
    assert lines_of(several, "eval")[10]["loss"] == pytest.approx(
        lines_of(one, "eval")[10]["loss"], rel=1e-6
    )
    assert (several / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("verb", "fixture"),
    [("pretrain", "layouts"), pytest.param("sft", "tuned", marks=pytest.mark.sweep)],
)
def test_an_export_of_one_process_has_the_bytes_of_the_export_of_two(
    request, layouts, verb, fixture, tmp_path
):
    request.getfixturevalue(fixture)
    run = layouts / f"{verb}-2x4"
    final = run / "final"
    written = {p.name: p.read_bytes() for p in final.iterdir()}
    moved = tmp_path / "final"
    final.rename(moved)
    assert main(verbs(layouts, "2x4")[verb]) == 0  # from the checkpoint of its last step
    assert {p.name: p.read_bytes() for p in final.iterdir()} == written


@pytest.mark.sweep
def test_a_reward_function_is_called_once_for_each_completion(online):
    calls = {name: len((online / f"calls-{name}").read_text()) for name in ("1x8", "2x4")}
    assert calls["2x4"] == calls["1x8"] == 10 * 16


@pytest.mark.sweep
def test_a_reward_that_fails_in_one_process_ends_all_of_them_with_a_checkpoint(layouts):
    file, mended = layouts / "fails.py", layouts / "mended"
    file.write_text(f"""
import os, pathlib
calls = 0

def length(prompts, completions, **columns):
    global calls
    calls += 1
    fails = calls == 3 and os.environ["JAX_PROCESS_ID"] == "1"
    if fails and not pathlib.Path({str(mended)!r}).exists():
        raise ConnectionError("no service")
    return [float(len(text) % 7) for text in completions]
""")
    args = verbs(layouts, "fails")["grpo"] + ["--save.every", "100", "--steps", "4"]
    args[args.index("--rl.rewards") + 1] = f"{file}:length"
    for status, words in ((2, "step 3: reward"), (0, "resuming from step 2")):
        run = launched(2, 4, [sys.executable, "-m", "jaxllm", *args])
        found, output = finished(run)
        assert found == status and words in output, output[-3000:]
        if status:
            assert "ConnectionError: no service" in output and "checkpoint 2 is saved" in output
            saved = (layouts / "grpo-fails" / "checkpoints").iterdir()
            assert [p.name for p in saved if p.name.isdigit()] == ["2"]
            mended.touch()


def test_each_process_records_digests_of_the_files_it_wrote(layouts):
    folder = layouts / "pretrain-2x4" / "checkpoints" / "10"
    files = json.loads((folder / "files.json").read_text())
    parts = {name.split("/")[1] for name in files if "ocdbt.process" in name}
    assert parts == {f"ocdbt.process_{i}" for i in range(2)}
    assert all(digest for _, digest in files.values())


# ---- one stop


def resumed_as_never_stopped(project: Path, name: str) -> None:
    """Resumes a run of two processes on one, and compares it with one that never stopped."""
    assert main(arguments(project, "pretrain", name)) == 0
    straight = project / "straight"
    if not straight.exists():
        assert main(arguments(project, "pretrain", "straight")) == 0
    one, several = lines_of(straight), lines_of(project / name)
    assert list(several) == list(one)
    for step in one:
        assert several[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.sweep), 1])
def test_a_signal_to_one_process_stops_all_at_one_step(project, index):
    name = f"stopped-{index}"
    long = ("--steps", "100000", "--save.every", "100000")
    run = launched(2, 2, command(project, "pretrain", name, *long))
    wait_for_step(project / name, 3)
    os.kill(process_of(run, index), signal.SIGTERM)
    status, output = finished(run)
    assert status == REQUEUE, output[-3000:]
    (checkpoint,) = (project / name / "checkpoints").iterdir()
    assert f"stopped at step {checkpoint.name}" in output
    assert max(lines_of(project / name)) == int(checkpoint.name)


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.sweep)])
def test_a_killed_process_ends_the_others_which_resume_on_one(project, index):
    name = f"killed-{index}"
    slow = ("--cluster.timeout", "5", "--steps", "100000", "--save.keep", "0")
    run = launched(2, 2, command(project, "pretrain", name, *slow))
    wait_for_step(project / name, 6)
    os.kill(process_of(run, index), signal.SIGKILL)
    start = time.monotonic()
    status, output = finished(run)
    assert time.monotonic() - start < 15
    assert status == REQUEUE, output[-3000:]
    assert f"lost process {index}" in output
    for step in (project / name / "checkpoints").iterdir():  # so that 12 steps are left to do
        if step.name.isdigit() and int(step.name) > 4:
            shutil.rmtree(step)
    assert (project / name / "checkpoints" / "4").is_dir()
    resumed_as_never_stopped(project, name)


@pytest.mark.sweep
def test_a_process_that_hangs_is_named_and_the_others_write_their_stacks(project):
    limits = ("--cluster.hang_exit", "4", "--cluster.timeout", "60", "--steps", "100000")
    run = launched(2, 2, command(project, "pretrain", "hangs", *limits))
    wait_for_step(project / "hangs", 5)
    stopped = process_of(run, 1)
    os.kill(stopped, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    stacks: list[Path] = []
    while time.monotonic() < deadline and not stacks:
        found = (project / "hangs").glob("hang-*-process-0.txt")
        stacks = [file for file in found if int(file.name.split("-")[1]) >= 5]
        time.sleep(0.2)
    assert stacks
    time.sleep(8)  # process 0 ends after cluster.hang_exit more
    os.kill(stopped, signal.SIGKILL)
    status, output = finished(run)
    assert status == REQUEUE, output[-3000:]
    assert re.search(r"step \d+ hangs in phase \w+; the others wait for process 1 \(", output)
    assert re.search(r"training.py\", line \d+ in train\n", stacks[0].read_text())


# ---- one start


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--optim.b2", "0.9"], "process 1 .* has optim.b2 0.9, the others 0.999"),
        (["--data.max_length", "32"], "process 1 .* has data.max_length 32"),
        (["--no.such_key", "1"], "no.such_key"),
    ],
)
def test_a_process_that_differs_is_named_by_all(project, extra, words):
    script = project / "odd.sh"
    extra_args = " ".join(extra)
    script.write_text(f'[ "$JAX_PROCESS_ID" = 1 ] && exec "$@" {extra_args}\nexec "$@"\n')
    args = [a for a in command(project, "pretrain", "odd", "--cluster.timeout", "8")]
    if "--data.max_length" in extra:  # given once
        at = args.index("--data.max_length")
        script.write_text(
            '[ "$JAX_PROCESS_ID" = 1 ] && exec "$@" --data.max_length 32\n'
            'exec "$@" --data.max_length 64\n'
        )
        args = args[:at] + args[at + 2 :]
    status, output = finished(launched(2, 1, ["bash", str(script), *args]))
    assert status == 2
    assert re.search(words, output), output[-2000:]


def test_other_data_in_one_process_is_named(project):
    text = (project / "text.txt").read_text()
    for i in (0, 1):
        (project / f"local-{i}").mkdir(exist_ok=True)
        (project / f"local-{i}" / "text.txt").write_text(text[i:])
    args = command(project, "pretrain", "other-data", "--data.train", "text.txt")
    script = f'cd {project}/local-$JAX_PROCESS_ID && exec "$@"'
    status, output = finished(launched(2, 1, ["bash", "-c", script, "-", *args]))
    assert status == 2
    assert "process 1" in output and "has data text.txt" in output, output[-2000:]


# Each case of tests/cluster_odd.py, and part of the error that both processes get.
NAMED = {
    "config": "has seed 1, the others 0",
    "code": "has jaxllm ",
    "jax": 'has jax "9.9"',
    "transformers": 'has transformers "9.9"',
    "grain": 'has grain "9.9"',
    "devices": 'has devices "1 x other"',
    "platform": 'has platform "CUDA 9"',
    "clock": "the clock of process 0 is 99 s behind that of process 1",
    "data": "has data a.txt",
    "tokenizer": 'has tokenizer "1", the others "0"',
    "template": 'has template "1", the others "0"',
    "reward": "has rewards reward.py:f ",
    "weights": "has model ",
}


def test_each_thing_that_may_differ_between_hosts_is_named_by_both(tmp_path):
    script = str(ROOT / "tests" / "cluster_odd.py")
    status, output = finished(launched(2, 2, [sys.executable, script, str(tmp_path)]))
    assert status == 0, output[-3000:]
    for told in (json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1)):
        assert told.pop("nothing") == ""
        assert told.keys() == NAMED.keys()
        for name, words in NAMED.items():
            assert words in told[name] and "process 1" in told[name], told[name]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def meeting(places: list[tuple[int, int]], timeout: float) -> list[str]:
    """What each of the (processes, index) is told that meet; "" if nothing is wrong."""
    address, told = f"127.0.0.1:{free_port()}", [""] * len(places)

    def visit(i: int) -> None:
        try:
            processes, index = places[i]
            meet(address, processes, index, timeout)
        except UserError as error:
            told[i] = str(error)

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_processes_meet():
    assert meeting([(3, 0), (3, 1), (3, 2)], 20) == ["", "", ""]


def test_a_process_that_does_not_arrive_is_named_by_those_that_did():
    told = meeting([(3, 0), (3, 2)], 2)
    assert all("process 1 of 3 did not arrive within cluster.timeout" in line for line in told)


def test_a_coordinator_that_cannot_be_reached_is_named():
    (line,) = meeting([(2, 1)], 1)
    assert "process 1" in line and "could not reach the coordinator 127.0.0.1:" in line


def test_processes_that_disagree_about_their_number_or_index_are_named():
    assert all("as one of 2 processes" in line for line in meeting([(3, 0), (2, 1)], 5))
    assert all("two processes have index 1" in x for x in meeting([(3, 0), (3, 1), (3, 1)], 5))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"processes": 2}, "cluster.coordinator"),
        ({"coordinator": "a:1", "processes": 2}, "cluster.process "),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "must be from 0 to 1"),
        ({"coordinator": "nowhere", "processes": 2, "process": 1}, "must be HOST:PORT"),
    ],
)
def test_half_a_place_in_a_cluster_is_refused(section, words):
    with pytest.raises(UserError, match=words):
        dist.start(replace(ClusterSection(timeout=1), **section))


def test_one_process_needs_no_coordinator(monkeypatch):
    for name, value in zip(dist.VARIABLES, ("localhost:1", "1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    dist.start(ClusterSection(timeout=1))
    assert dist.count() == 1


# ---- many times at random moments (make cluster)


FULL_IN_PROCESS_1 = """
import errno, os, sys
from jaxllm import checkpoint, dist
from jaxllm.cli import main
digests = checkpoint._digests
def full(*args):
    if dist.index() == 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")
    return digests(*args)
checkpoint._digests = full
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.cluster
def test_a_save_that_fails_in_one_process_ends_both(project):
    args = arguments(project, "pretrain", "full", "--cluster.timeout", "60")
    status, output = finished(launched(2, 2, [sys.executable, "-c", FULL_IN_PROCESS_1, *args]), 60)
    assert status == 2
    assert output.count("the disk is full (disk: No space left on device)") == 2, output[-3000:]


@pytest.mark.cluster
def test_hosts_with_caches_of_their_own_compute_references_and_load_adapters(project, tuned):
    """Each process has a home directory of its own; the second run of each verb resumes."""
    args = verbs(tuned, "own")
    dpo = [a for a in args["dpo"] if a != "--data.cache_dir"]
    dpo.remove(str(project / "cache"))
    dpo += ["--align.reference", "precomputed"]
    adapter = ["--peft.path", str(project / "sft-2x4" / "final"), "--output_dir"]
    runs = [[*dpo, "--steps", "2"], [*dpo, "--steps", "4"]]
    runs += [[*args["sft"], *adapter, str(project / "own"), "--steps", "2"]]
    host = f'HOME={project}/home-$JAX_PROCESS_ID exec "$@"'
    script = [sys.executable, str(ROOT / "tests" / "cluster_runs.py")]
    for some in (runs[:1], runs[1:]):
        command = ["bash", "-c", host, "-", *script, json.dumps(some)]
        status, output = finished(launched(2, 4, command), 200)
        assert status == 0, output[-3000:]
    assert list(lines_of(project / "dpo-own")) == [1, 2, 3, 4]
    assert main([*verbs(tuned, "plain")["dpo"], "--steps", "4"]) == 0
    for step, line in lines_of(project / "dpo-plain").items():
        assert lines_of(project / "dpo-own")[step]["loss"] == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.cluster
def test_online_rl_over_processes_resumes_exactly(layouts, online):
    args = verbs(layouts, "2x4")["grpo"]
    args[args.index("--output_dir") + 1] = str(layouts / "grpo-resumed")
    for steps in ("4", "10"):  # in processes of their own
        run = launched(2, 4, [sys.executable, "-m", "jaxllm", *args, "--steps", steps])
        status, output = finished(run)
        assert status == 0, output[-3000:]
    assert "resuming from step 4" in output
    straight, resumed = (lines_of(layouts / f"grpo-{name}") for name in ("2x4", "resumed"))
    for step in range(1, 11):
        for key in ("loss", "grad_norm", "reward_mean"):
            assert resumed[step].get(key) == straight[step].get(key)


MORE = [("dpo", "2x4"), ("sft", "4x2"), ("dpo", "4x2"), ("grpo", "4x2")]


@pytest.mark.cluster
@pytest.mark.parametrize(("verb", "layout"), MORE)
def test_more_verbs_and_layouts_have_the_losses_of_one_process(layouts, verb, layout):
    if not (layouts / f"{verb}-1x8").exists():
        assert main(verbs(layouts, "1x8")[verb]) == 0
    args = [sys.executable, "-m", "jaxllm", *verbs(layouts, layout)[verb]]
    status, output = finished(launched(*LAYOUTS[layout], args))
    assert status == 0, output[-3000:]
    assert_same_course(layouts, verb, layout)


def short(project: Path) -> list[str]:
    sizes = ["--steps", "40", "--save.every", "10", "--eval_every", "10", "--cluster.timeout", "5"]
    return [*sizes, "--data.eval", str(project / "few.txt"), "--optim.learning_rate", "0.001"]


def pair(project: Path, name: str, port: int, *more: str) -> list[subprocess.Popen]:
    """The two processes of a run, started without a launcher to see the exit status of each."""
    args = command(project, "pretrain", name, *short(project), *more)
    values = (f"127.0.0.1:{port}", "2")
    env = ENV | dict(zip(dist.VARIABLES, values, strict=False)) | {"XLA_FLAGS": f"{DEVICES}2"}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(args, env=env | {dist.VARIABLES[2]: str(i)}, **options) for i in range(2)
    ]


def ended(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Their exit statuses; fails if one of them lives longer."""
    try:
        for process in processes:
            process.communicate(timeout=seconds)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes]


@pytest.fixture(scope="module")
def straight(project):
    """A run of two processes that nobody disturbs, and its seconds after the processes met."""
    (project / "few.txt").write_text((project / "text.txt").read_text()[:9000])
    for _ in range(2):  # the first one compiles
        shutil.rmtree(project / "undisturbed", ignore_errors=True)
        processes = pair(project, "undisturbed", free_port())
        start = arrival(project / "undisturbed")
        assert ended(processes, 100) == [0, 0]
        seconds = time.monotonic() - start
    return project / "undisturbed", seconds


def arrival(run: Path) -> float:
    """The time at which the processes of a new run have met."""
    while not (run / "config.json").is_file():
        time.sleep(0.02)
    return time.monotonic()


@pytest.mark.cluster
@pytest.mark.parametrize("seed", range(20))
def test_a_sigkill_at_a_random_moment_loses_nothing(project, straight, seed):
    """One of two processes is killed while the run loads, compiles, steps, evaluates, saves or
    exports; the run resumes on two processes or on one."""
    (undisturbed, seconds), name, port = straight, f"killed-at-random-{seed}", free_port()
    draw, run = random.Random(seed), project / f"killed-at-random-{seed}"
    processes = pair(project, name, port)
    arrival(run)
    time.sleep(draw.uniform(0, seconds))
    victim = draw.randrange(2)
    processes[victim].kill()
    start = time.monotonic()
    statuses = ended(processes, 60)
    assert time.monotonic() - start < 5 + 10  # cluster.timeout, and time to end
    assert statuses[1 - victim] in (0, REQUEUE), statuses  # 0: it had ended before
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    if seed % 2:
        assert main(arguments(project, "pretrain", name, *short(project))) == 0
    else:
        assert ended(pair(project, name, free_port()), 100) == [0, 0]

    one, several = lines_of(undisturbed), lines_of(run)
    assert list(several) == list(one) == list(range(1, 41))
    evals = lines_of(undisturbed, "eval"), lines_of(run, "eval")
    assert list(evals[0]) == list(evals[1]) == [10, 20, 30, 40]
    tolerance = 1e-5 if seed % 2 else 0
    for step in one:
        for key in ("loss", "grad_norm"):
            assert several[step][key] == pytest.approx(one[step][key], rel=tolerance, abs=tolerance)
    final = [(folder / "final" / "model.safetensors").read_bytes() for folder in (undisturbed, run)]
    assert final[0] == final[1] or seed % 2
    assert main(["verify", str(run)]) == 0
    left = [p.name for p in (*run.rglob("*"), *(project / "cache").iterdir())]
    assert not [n for n in left if re.search(r"orbax-checkpoint-tmp|^\.final|^making", n)]


@pytest.mark.cluster
def test_twenty_sigterms_to_one_of_two_save_one_checkpoint_each(project, straight):
    draw, run, before = random.Random(0), project / "stopped-at-random", 0
    for _ in range(20):
        processes = pair(project, run.name, free_port(), "--steps", "100000")
        if before == 0:
            arrival(run)
        wait_for_step(run, before + 1)
        time.sleep(draw.uniform(0, 2))
        processes[draw.randrange(2)].send_signal(signal.SIGTERM)
        assert ended(processes, 60) == [REQUEUE, REQUEUE]
        latest = max(int(p.name) for p in (run / "checkpoints").iterdir())
        assert latest > before and max(lines_of(run)) == latest
        before = latest
    assert main(["verify", str(run)]) == 0
