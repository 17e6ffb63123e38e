# SPDX-License-Identifier: Apache-2.0
"""Reward functions run in a process of their own: what they may do, and what of it is an error."""

import os
import subprocess
import sys
import time
from contextlib import suppress

import jax
import numpy as np
import pytest

from jaxllm.config import MeshSection, RlSection, TrainConfig
from jaxllm.errors import UserError
from jaxllm.mesh import make_mesh
from jaxllm.rl.rewards import Completion, RewardError, Worker, load_rewards

SIBLING = """
import json
from pathlib import Path

scale = json.loads((Path(__file__).parent / "scale.json").read_text())
"""
FUNCTIONS = """
import asyncio
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from sibling import scale

@dataclass
class Answer:
    text: "str"
    score: "float" = 0.0

def length(text):
    return float(len(text))

def dataclasses(prompts, completions, **_):
    return [replace(Answer(text), score=scale * len(text)).score for text in completions]

def spawned(prompts, completions, **_):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(length, completions))

def forked(prompts, completions, **_):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(length, completions)

async def awaited(prompts, completions, **_):
    await asyncio.sleep(0)
    return [length(text) for text in completions]

loops = set()

async def same_loop(prompts, completions, **_):
    loops.add(asyncio.get_running_loop())
    return [len(loops)] * len(prompts)

calls = 0

def counts(prompts, completions, **_):
    global calls
    calls += 1
    return [calls] * len(prompts)

def counted(prompts, completions, **_):
    return [calls] * len(prompts)

def named_as_in_trl(completions, answer, **kwargs):
    return [float(a in c) for a, c in zip(answer, completions)]

def other_names(asked, said, **kwargs):
    return [float(len(q) + 10 * len(a)) for q, a in zip(asked, said)]

def wrapped(*arguments, **columns):
    asked, said = arguments
    return other_names(asked, said)

def prints(prompts, completions, **_):
    print("a line of the function")
    return [0.0] * len(prompts)

def closes(prompts, completions, **_):
    os.chdir("/")
    sys.stdout.close()
    os.closerange(0, 3)
    return [1.0] * len(prompts)

def stops_another(prompts, completions, **_):
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    program.terminate()
    return [program.wait(20)] * len(prompts)

def is_signalled(prompts, completions, **_):
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), name)
    return [1.0] * len(prompts)

def imported(prompts, completions, **_):
    return [float("jax" in sys.modules or "numpy" in sys.modules)] * len(prompts)

def leaves_one_behind(prompts, completions, **_):
    left = subprocess.Popen(["sleep", "60"])
    return [os.getpid(), left.pid]

def no_score(prompts, completions, **_):
    return (None if c == "four" else 1 for c in completions)

def of_numpy(prompts, completions, **_):
    import numpy as np
    return np.array([c == "four" for c in completions])

def elements_of_numpy(prompts, completions, **_):
    import numpy as np
    return [np.bool_(True), np.array(0.5)]

def of_jax(prompts, completions, **_):
    import jax.numpy as jnp
    assert jnp.zeros(1).devices().pop().platform == "cpu"
    return [jnp.float32(0.25), jnp.array(2)]

def of_torch(prompts, completions, **_):
    import torch
    return torch.tensor([0.25, 2.0], requires_grad=True)

def exits(prompts, completions, **_):
    sys.exit(3)

def ends_the_process(prompts, completions, **_):
    os._exit(0)

def crashes(prompts, completions, **_):
    os.kill(os.getpid(), signal.SIGSEGV)

def ends_beside_a_copy(prompts, completions, **_):
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "60"])
    os._exit(4)

def raises(prompts, completions, answer, **_):
    return [1 / (len(a) - 1) for a in answer]

def raises_elsewhere(prompts, completions, **_):
    return [float("four") for c in completions]

def too_few(prompts, completions, **_):
    return [1.0]

def nothing(prompts, completions, **_):
    pass

def text(prompts, completions, **_):
    return ["1.0"] * len(prompts)

def not_a_number(prompts, completions, **_):
    return [1.0, float("nan")]

def too_large(prompts, completions, **_):
    return [1e39, 1.0]

def a_list_in_a_list(prompts, completions, **_):
    import numpy as np
    return [np.array([1.0]), 1.0]

constant = 1
"""
BATCH = [
    Completion({"said": q, "at": f"data.jsonl:{i}", "columns": {"answer": a}}, c)
    for i, (q, c, a) in enumerate([("two?", "four", "f"), ("ten?", "a hundred", "00")], 1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "judge.py").write_text(FUNCTIONS)
    (folder / "sibling.py").write_text(SIBLING)
    (folder / "scale.json").write_text("0.5")
    return folder


@pytest.fixture(scope="module")
def load(folder):
    mesh = make_mesh(MeshSection(), jax.devices()[:1])

    def load(*names):
        full = tuple(name if ":" in name else f"{folder}/judge.py:{name}" for name in names)
        return load_rewards(TrainConfig(objective="grpo", rl=RlSection(rewards=full)), mesh, {})

    return load


@pytest.fixture(scope="module")
def call(load):
    """The rewards of a function; those that leave their process as it was share one."""
    names = [
        line[4:].split("(")[0]
        for line in FUNCTIONS.replace("async ", "").splitlines()
        if line.startswith("def ")
    ]
    rewards = {reward.name: reward for reward in load(*names)}
    return lambda name: rewards[name].score(BATCH).tolist()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("dataclasses", [2.0, 4.5]),
        ("spawned", [4.0, 9.0]),
        ("forked", [4.0, 9.0]),
        ("awaited", [4.0, 9.0]),
        ("named_as_in_trl", [1.0, 0.0]),
        ("other_names", [44.0, 94.0]),
        ("wrapped", [44.0, 94.0]),
        ("stops_another", [-15.0, -15.0]),
        ("is_signalled", [1.0, 1.0]),
        ("no_score", [1.0, None]),
        ("of_numpy", [1.0, 0.0]),
        ("elements_of_numpy", [1.0, 0.5]),
        ("of_jax", [0.25, 2.0]),
        ("of_torch", [0.25, 2.0]),
    ],
)
def test_a_function_may_return_any_numbers_and_use_any_library(call, name, want):
    if name == "no_score":
        assert np.isnan(call(name)[0]) and call(name)[1] == 1.0
    else:
        assert call(name) == want


def test_state_is_kept_between_calls_and_shared_by_the_functions_of_a_file(call):
    assert [call("counts"), call("counts"), call("counted")] == [[1.0] * 2, [2.0] * 2, [2.0] * 2]
    assert [call("same_loop"), call("same_loop")] == [[1.0] * 2] * 2


def test_what_a_function_prints_is_printed_and_what_it_closes_stays_open_here(load, capfd):
    prints, closes = load("prints", "closes")
    prints.score(BATCH)
    assert "a line of the function" in capfd.readouterr().out
    where = os.getcwd()
    assert closes.score(BATCH).tolist() == closes.score(BATCH).tolist() == [1.0, 1.0]
    print("still here", flush=True)
    assert "still here" in capfd.readouterr().out and os.getcwd() == where


def test_the_process_imports_neither_jax_nor_numpy_and_ends_with_all_that_it_started(load):
    imported, leaves = load("imported", "leaves_one_behind")
    assert imported.score(BATCH).tolist() == [0.0, 0.0]
    pids = leaves.score(BATCH).astype(int).tolist()
    del imported, leaves
    until = time.time() + 5
    while (left := [pid for pid in pids if is_alive(pid)]) and time.time() < until:
        time.sleep(0.05)
    assert not left


def is_alive(pid):
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def test_the_process_does_not_outlive_a_run_that_is_killed(folder, tmp_path):
    program = f"""
import os, signal
from jaxllm.rl.rewards import Worker
worker = Worker({str(folder / "judge.py")!r})
print(worker.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    until = time.time() + 5
    while is_alive(int(done.stdout)) and time.time() < until:
        time.sleep(0.05)
    assert done.returncode == -9 and not is_alive(int(done.stdout))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exits", ["failed at data.jsonl:1: SystemExit: 3", "judge.py:LINE)"]),
        ("ends_the_process", ["ended its process when called for 2", "data.jsonl:1", "status 0"]),
        ("crashes", ["lost its process", "data.jsonl:1", "SIGSEGV"]),
        ("ends_beside_a_copy", ["ended its process", "status 4"]),
        ("raises", ["failed at data.jsonl:1: ZeroDivisionError", "judge.py:LINE)"]),
        ("raises_elsewhere", ["could not convert string to float: 'four'", "judge.py:LINE)"]),
        ("too_few", ["returned 1 rewards for 2 completions", "data.jsonl:1"]),
        ("nothing", ["returned None for 2 completions"]),
        ("text", ["returned '1.0' at data.jsonl:1", "a reward is a finite number"]),
        ("not_a_number", ["returned nan at data.jsonl:2"]),
        ("too_large", ["returned 1e+39 at data.jsonl:1"]),
        ("a_list_in_a_list", ["returned array([1.]) at data.jsonl:1"]),
    ],
)
def test_a_failure_names_the_function_the_record_and_the_line(load, name, words):
    lines = FUNCTIONS.splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text.startswith(f"def {name}(")) + 1
    with pytest.raises(RewardError) as error:
        load(name)[0].score(BATCH)
    for word in (f"judge.py:{name} ", *words):
        assert word.replace("LINE", str(line)) in str(error.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import os; os._exit(5)", ["ended its process while it was imported", "status 5"]),
        ("import sys; sys.exit(0)", ["SystemExit: 0", "bad.py:1"]),
        ("import nowhere_at_all", ["ModuleNotFoundError", "nowhere_at_all", "bad.py:1"]),
        ("def f(:", ["SyntaxError", "bad.py, line 1"]),
        ("f = 1", ["f is not a function"]),
        ("", ["has no attribute 'f'"]),
    ],
)
def test_a_module_that_cannot_be_imported_is_an_error_at_the_start(load, tmp_path, source, words):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(UserError) as error:
        load(f"{tmp_path}/bad.py:f")
    for word in ("rl.rewards", "bad.py", *words):
        assert word in str(error.value)


def test_a_rollout_takes_milliseconds_to_reach_the_function(folder):
    """512 completions of 3 KB; measured 0.01 s."""
    worker = Worker(f"{folder}/judge.py")
    message = {"function": "counts", "columns": {}, "places": ["data.jsonl:1"] * 512}
    message |= {"prompts": ["p" * 1000] * 512, "completions": ["c" * 2000] * 512}
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert len(worker.ask(message)["rewards"]) == 512
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2
