# SPDX-License-Identifier: Apache-2.0
"""Online RL: the experience of a rollout, and runs of PPO and GRPO."""

import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import arguments, killed, lines_of, refused
from safetensors.numpy import load_file, save_file
from steps import V, decoder, plain

from jaxllm import sampling
from jaxllm.cli import main
from jaxllm.config import (
    AlignSection,
    MeshSection,
    PeftSection,
    RlSection,
    TrainConfig,
    load_config,
)
from jaxllm.config.checks import resolve
from jaxllm.data.chat import render
from jaxllm.data.rows import Rows
from jaxllm.hf import load_hf, save_adapter
from jaxllm.mesh import make_mesh
from jaxllm.model.families import from_hf
from jaxllm.monitor.meter import COMPILE_EVENTS, means
from jaxllm.objectives.ppo import Value, act, gae, token_rewards, whiten
from jaxllm.objectives.table import make_objective
from jaxllm.peft.files import make_adapter
from jaxllm.program import build, trained_by
from jaxllm.rl.online import Rollouts
from jaxllm.rl.rewards import Completion, Reward, RewardModel, load_rewards
from jaxllm.timetable import due
from jaxllm.tokenizer import load_tokenizer
from jaxllm.verify_resume import TIMES

# ---- a rollout

ENDS = tuple(range(12))


class Numbers:
    """A tokenizer whose text is the token ids."""

    eos_token = chat_template = None

    @staticmethod
    def decode(tokens):
        return " ".join(map(str, tokens))

    @staticmethod
    def convert_tokens_to_ids(_):
        return ENDS


PROMPTS = [
    {"tokens": np.arange(3 + i) + 20 + i, "said": f"p{i}", "columns": {}, "messages": [], "at": ""}
    for i in range(9)
]


class PromptList(list):
    """Prompts as `data.preference.Prompts` has them."""

    @property
    def longest(self):
        return max(len(prompt["tokens"]) for prompt in self)


class Online:
    """Rollouts of a tiny policy with another model as its reference."""

    def __init__(self, verb, *rewards, count=2, beta=None, on_policy=False, **rl):
        rl = {"group_size": 4, "minibatches": 2, "max_new_tokens": 6} | rl
        names = tuple(r.name for r in rewards)
        sizes = {"batch_size": 8, "micro_batch_size": 8 // count}
        cfg = TrainConfig(objective=verb, **sizes, align=AlignSection(beta=beta))
        self.cfg = resolve(replace(cfg, rl=RlSection(rewards=names, **rl)))
        self.policy, self.other = decoder(), decoder()
        state = nnx.state(self.other)
        nnx.update(self.other, jax.tree.map(lambda x: 1.05 * x, state))
        if verb == "ppo":
            self.policy.value = Value(32)
            kernel = np.random.default_rng(5).normal(size=(32, 1))
            self.policy.value.kernel[...] = jnp.asarray(kernel, jnp.float32)
        graph, self.trainable, rest = nnx.split(self.policy, trained_by(self.policy.peft), ...)
        self.trainable = nnx.to_pure_dict(self.trainable)
        assert not nnx.to_pure_dict(rest)

        def models(trainable, frozen):
            return nnx.merge(graph, nnx.State(trainable)), self.other

        self.samples = []
        mesh = make_mesh(MeshSection(), jax.devices()[:1])

        def sample(step, rows):
            self.samples += [{"step": step} | row for row in rows]

        rows = Rows((PromptList(PROMPTS),), None, 16)
        self.feed = Rollouts(
            self.cfg,
            mesh,
            rows,
            models,
            {},
            rewards,
            Numbers,
            sample,
            lambda *_: None,
            on_policy=on_policy,
            state={},
        )

    def updates(self, count):
        """(NumPy batches [B, T], logged metrics) of the first updates."""
        made = [self.feed(step, self.trainable) for step in range(count)]
        flat = [jax.tree.map(lambda x: np.asarray(x).reshape(-1, x.shape[-1]), b) for b, _ in made]
        return flat, [{k: a / w for k, (a, w) in seen.items()} for _, seen in made]


def scored(name, score):
    return Reward(name, lambda made: np.array([score(c.text.split()) for c in made], np.float32))


LENGTH = scored("length", len)
FIRST = scored("first", lambda words: int(words[0]) / V if words else 0.0)


def rows_of(batches):
    """The rows of several batches, each a dict, sorted by their tokens."""
    rows = {}
    for batch in batches:
        for i in range(len(batch.tokens)):
            row = {k: v[i] for k, v in vars(batch).items() if v is not None}
            rows[(*row["tokens"].tolist(), *row["targets"].tolist())] = row
    return [rows[key] for key in sorted(rows)]


def written(row):
    """(the prompt's tokens, the completion's) of a row."""
    n = int((row["segment_ids"] > 0).sum())
    text = row["tokens"][:n].tolist()
    asked = next(p for p in map(lambda p: p["tokens"].tolist(), PROMPTS) if text[: len(p)] == p)
    return asked, text[len(asked) :]


def earned(row, *scores):
    """A row's reward by the words of its completion."""
    return sum(w * s([t for t in written(row)[1] if t not in ENDS]) for w, s in scores)


def grouped(rows):
    groups = {}
    for row in rows:
        groups.setdefault(tuple(written(row)[0]), []).append(row)
    return list(groups.values())


def test_on_policy_a_row_has_the_samplers_log_probabilities():
    evaluated, sampled = (
        Online("grpo", FIRST, minibatches=1, on_policy=on) for on in (False, True)
    )
    (want,), (others,) = evaluated.updates(1)
    (got,), (seen,) = sampled.updates(1)
    assert sampled.feed.evaluation is None
    absent = {"sampling_entropy", "sampler_gap", "sampler_gap_max", "kl", "kl_k3"}
    assert others.keys() - seen.keys() == absent and seen["reward"] == others["reward"]
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.old_logps, want.old_logps, atol=1e-5)
    assert np.abs(got.old_logps).max() > 0.1


def test_only_one_update_without_a_reference_is_on_policy():
    def on_policy(own=None, beta=0.0, method="none", **rl):
        sections = {"align": AlignSection(beta=beta), "peft": PeftSection(method=method)}
        rl = RlSection(rewards=("r",), group_size=4, **rl)
        cfg = TrainConfig(objective="grpo", batch_size=8, rl=rl, **sections)
        return make_objective(resolve(cfg), own).on_policy

    assert on_policy()
    assert not on_policy(own=lambda *_: None)
    others = [{"beta": 0.1}, {"method": "lora"}, {"minibatches": 2}, {"iterations": 2}]
    assert not any(on_policy(**changed) for changed in others)


def test_a_row_learns_the_sampled_tokens_and_has_their_log_probabilities():
    run = Online("grpo", FIRST)
    batches, seen = run.updates(2)
    rows = rows_of(batches)
    assert len(rows) == 16
    fields = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    for row in rows:
        asked, made = written(row)
        learned = row["weights"] > 0
        assert row["targets"][learned].tolist() == made and 1 <= len(made) <= 6
        assert np.flatnonzero(learned).tolist() == [len(asked) - 1 + k for k in range(len(made))]
        assert not any(t in ENDS for t in made[:-1])
    logps = plain(run.policy, fields)[0] * (fields["weights"] > 0)
    np.testing.assert_allclose(fields["old_logps"], logps, atol=1e-5)
    assert seen[0]["sampler_gap_max"] < 1e-5
    assert seen[0]["completion_length"] == fields["weights"].sum(1).mean()
    ends = [written(row)[1][-1] in ENDS for row in rows]
    assert seen[0]["truncated"] == 1 - np.mean(ends) and 0 < np.mean(ends) < 1
    assert [len(group) for group in grouped(rows)] == [4] * 4


def test_each_iteration_sees_every_completion_once_in_another_order():
    run = Online("grpo", LENGTH, iterations=2)
    batches, seen = run.updates(6)
    assert [bool(s) for s in seen] == [True, False, False, False, True, False]
    keys = [[tuple(row) for row in batch.tokens.tolist()] for batch in batches]
    first, second, after = (sorted(keys[i] + keys[i + 1]) for i in (0, 2, 4))
    assert first == second != after
    assert keys[0] + keys[1] != keys[2] + keys[3]
    assert [s["step"] for s in run.samples] == [1] * 4 + [5] * 4
    again = Online("grpo", LENGTH, iterations=2)
    for step in (4, 5):  # another process goes on with the rollout that comes next
        batch, _ = again.feed(step, again.trainable)
        np.testing.assert_array_equal(batches[step].tokens, np.reshape(batch.tokens, (8, -1)))


@pytest.mark.parametrize("scale", [True, False])
def test_grpo_advantages_compare_the_weighted_sum_of_rewards_within_a_group(scale):
    run = Online("grpo", LENGTH, FIRST, reward_weights=(0.5, 3.0), scale_rewards=scale)
    batches, (seen, _) = run.updates(2)
    rows = rows_of(batches)
    scores = [(0.5, len), (3.0, lambda words: words[0] / V if words else 0.0)]
    for group in grouped(rows):
        r = [earned(row, *scores) for row in group]
        away = np.array(r) - np.mean(r)
        want = away / (np.std(r, ddof=1) + 1e-4) if scale else away
        for row, a in zip(group, want, strict=True):
            np.testing.assert_allclose(row["advantages"], a * row["weights"], atol=2e-5)
    totals = [earned(row, *scores) for row in rows]
    assert seen["reward"] == pytest.approx(np.mean(totals), rel=1e-5)
    assert seen["reward_std"] == pytest.approx(np.std(totals), rel=1e-5)
    assert seen["reward/length"] == pytest.approx(np.mean([earned(r, (1, len)) for r in rows]))
    assert seen["zero_variance_groups"] == 0


def test_completions_without_a_reward_or_without_an_end_are_not_learned():
    some = scored("some", lambda words: math.nan if len(words) == 2 else len(words))
    run = Online("grpo", some, mask_truncated=True, missing_eos_penalty=0.5)
    batches, (seen, _) = run.updates(2)
    rows = rows_of(batches)
    kinds = set()
    for group in grouped(rows):
        known = []
        for row in group:
            made = written(row)[1]
            ended, words = made[-1] in ENDS, [t for t in made if t not in ENDS]
            kinds.add((ended, len(words) == 2))
            learned = ended and len(words) != 2
            assert row["weights"].any() == learned
            if len(words) != 2:  # a truncated one is compared with, and not learned
                known.append((len(words) - 0.5 * (not ended), row))
        r = np.array([value for value, _ in known])
        for value, row in known:
            want = (value - r.mean()) / (r.std(ddof=1) + 1e-4) if len(r) > 1 else 0.0
            a = row["advantages"][row["weights"] > 0]
            np.testing.assert_allclose(a, want, atol=1e-5)
    assert kinds == {(True, True), (True, False), (False, False)}
    assert seen["reward"] == pytest.approx(seen["reward/some"] - 0.5 * seen["truncated"], abs=0.2)


def test_rewards_that_no_completion_has_are_left_out_of_the_metrics():
    none = scored("none", lambda _: math.nan)
    run = Online("grpo", LENGTH, none)
    _, metrics = run.feed(0, run.trainable)
    assert metrics["reward/none"] == metrics["reward_std/none"] == (0.0, 0.0)
    logged = means({"loss": (0.0, 1.0)} | metrics)
    assert not {"reward/none", "reward_std/none"} & logged.keys()
    assert logged["reward"] == pytest.approx(logged["reward/length"])


def test_groups_of_equal_rewards_are_counted_and_have_zero_advantages():
    batches, (seen, _) = Online("grpo", scored("same", lambda _: 1.0)).updates(2)
    assert seen["zero_variance_groups"] == 1 and seen["reward_group_std"] == 0
    assert not any(batch.advantages.any() for batch in batches)


def test_ppo_estimates_advantages_from_kl_score_and_value():
    options = dict(group_size=1, iterations=1, kl_target=2.0, discount=0.9, gae_lambda=0.8)
    run = Online("ppo", FIRST, beta=0.3, **options)
    batches, (seen, _) = run.updates(2)
    rows = rows_of(batches)
    fields = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    w = fields["weights"]
    kl = (plain(run.policy, fields)[0] - plain(run.other, fields)[0]) * w
    score = np.array(
        [earned(row, (1, lambda words: words[0] / V if words else 0.0)) for row in rows]
    )
    values = np.asarray(act(run.policy, SimpleNamespace(**fields))[2]) * w
    rewards = token_rewards(kl, score, w, 0.3)
    advantages, returns = gae(rewards, values, w, 0.9, 0.8)
    np.testing.assert_allclose(fields["old_values"], values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fields["returns"], returns, atol=2e-5)
    np.testing.assert_allclose(fields["advantages"], whiten(advantages, w), atol=1e-4)
    assert seen["kl"] == pytest.approx(kl.sum(1).mean(), rel=1e-3, abs=1e-5)
    here = w > 0
    left = 1 - np.var((returns - values)[here]) / np.var(returns[here])
    assert seen["explained_variance"] == pytest.approx(left, rel=1e-3)
    assert seen["beta"] == 0.3
    toward = np.clip(kl.sum(1).mean() / 2.0 - 1, -0.2, 0.2)
    assert run.feed.state() == {"beta": pytest.approx(0.3 * (1 + toward * 16 / 10_000))}


def test_all_rollouts_run_the_programs_of_the_first(monkeypatch):
    """Prompts of 3 to 11 tokens, in buckets of 4; nothing is compiled after the first rollout."""
    monkeypatch.setattr(sampling, "BUCKET", 4)
    compiled = []

    def listen(event, *_, **__):
        if event.endswith(COMPILE_EVENTS):
            compiled.append(event)

    run = Online("grpo", LENGTH, FIRST, mask_truncated=True)
    policies = [jax.tree.map(lambda x, n=n: (1 + n / 50) * x, run.trainable) for n in range(4)]
    counts = []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for rollout, policy in enumerate(policies):
            for update in range(2):
                run.feed(2 * rollout + update, policy)
            counts.append(len(compiled))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert counts[0] > 0 and counts == [counts[0]] * 4


def test_ppo_refuses_a_completion_without_any_reward():
    run = Online("ppo", scored("none", lambda _: math.nan), group_size=1)
    with pytest.raises(ValueError, match="gave no reward at all"):
        run.updates(1)


@pytest.mark.parametrize(
    ("every", "each", "steps"),
    [(4, 1, [4, 8, 12]), (4, 4, [4, 8, 12]), (5, 4, [8, 12]), (3, 4, [4, 8, 12]), (0, 4, [])],
)
def test_events_happen_only_between_rollouts(every, each, steps):
    assert [s for s in range(1, 13) if due(every, s, each)] == steps


# ---- whole runs

JUDGE = """
def length(prompts, completions, **_):
    assert all(isinstance(p, str) and isinstance(c, str) for p, c in zip(prompts, completions))
    return [len(c) / 10 for c in completions]

def right(prompts, completions, answer, **_):
    return [None if len(a) > 1 else float(a in c) for a, c in zip(answer, completions)]

def es(prompts, completions, **_):
    return [c.count("e") / 8 for c in completions]

def nothing(prompts, completions, **_):
    return [None] * len(prompts)

def raises(prompts, completions, answer, **_):
    return [1 / (int(a) - 7) for a in answer]

def short(prompts, completions, **_):
    return [1.0]

def words(prompts, completions, **_):
    return ["good"] * len(prompts)

def infinite(prompts, completions, **_):
    return [float("inf")] * len(prompts)

calls = 0

def stops(prompts, completions, **_):
    # a signal for the run in the second call, then a failure in the second of the next process
    import os, pathlib, signal
    global calls
    calls += 1
    signalled, failed = pathlib.Path("MARK"), pathlib.Path("MARK-too")
    if calls == 2 and not signalled.exists():
        signalled.touch()
        os.kill(os.getppid(), signal.SIGTERM)
    elif calls == 2 and not failed.exists():
        failed.touch()
        raise ConnectionError("no service")
    return es(prompts, completions)

def ends(prompts, completions, **_):
    import os
    os._exit(0)
"""


@pytest.fixture(scope="module")
def asked(project):
    """The project with prompts and reward functions."""
    sums = [{"prompt": f"{a} + {b} = ", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (project / "sums.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sums))
    (project / "judge.py").write_text(JUDGE.replace("MARK", str(project / "stopped-once")))
    return project


def online(project, verb, out, *more, rewards=("length",)):
    args = arguments(project, verb, out, "--data.train", str(project / "sums.jsonl"))
    args[args.index("--micro_batch_size") + 1] = "2"
    args[args.index("--data.max_length") + 1] = "48"
    named = [r if "/" in r else f"{project}/judge.py:{r}" for r in rewards]
    return [*args, "--rl.max_new_tokens", "8", *(("--rl.rewards", *named) if named else ()), *more]


def on_base(project, args):
    """The same over a model's weights."""
    at = args.index("--model.config")
    base = ["--model.path", str(project / "grpo" / "final")]
    return [*args[:at], *base, *args[at + 4 :]]


def weights_of(folder):
    file = next(folder.glob("*model.safetensors"))
    return {k: v.tobytes() for k, v in load_file(file).items()}


def assert_same_run(a, b, steps):
    """Equal numbers, samples and weights, all bit for bit."""
    want, got = lines_of(a), lines_of(b)
    assert sorted(want) == sorted(got) == list(range(1, steps + 1))
    for step in want:
        assert want[step].keys() == got[step].keys()
        for key in want[step].keys() - TIMES:
            assert want[step][key] == got[step][key], (step, key)
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
    assert weights_of(a / "final") == weights_of(b / "final")


# High learning rates, so that few steps show learning.
GRPO = ("--rl.group_size", "8", "--align.beta", "0.01", "--steps", "20", "--rl.temperature", "0.9")
GRPO += ("--rl.reward_weights", "1", "0.1", "--optim.learning_rate", "0.02")
PPO = ("--rl.minibatches", "2", "--rl.iterations", "2", "--rl.kl_target", "3")
PPO += ("--align.beta", "0.01", "--steps", "48", "--save.every", "20")
TWO = ("es", "right")
LORA = ("--peft.method", "lora", "--peft.r", "4", "--rl.critic", "separate", "--rl.iterations", "2")
LORA += ("--steps", "4", "--save.every", "2")


@pytest.fixture(scope="module")
def straight(asked):
    """Undisturbed runs of all weights, by grpo and ppo."""
    assert main(online(asked, "grpo", "grpo", *GRPO, rewards=TWO)) == 0
    assert main(online(asked, "ppo", "ppo", *PPO, rewards=["es"])) == 0
    return asked


@pytest.fixture(scope="module")
def lora(straight):
    """An undisturbed run of ppo with LoRA and a critic of its own."""
    assert main(on_base(straight, online(straight, "ppo", "lora", *LORA))) == 0


def test_grpo_logs_rewards_and_rollout_metrics(straight):
    lines = lines_of(straight / "grpo")
    first, last = lines[1], lines[20]
    for key in (
        *("reward", "reward_std", "reward_group_std", "reward/es", "reward/right"),
        *("reward_std/es", "reward_std/right", "zero_variance_groups", "kl", "kl_k3"),
        *("entropy", "sampling_entropy", "clip_fraction", "update_kl", "completion_length"),
        *("truncated", "sampler_gap", "sampler_gap_max", "rollout_seconds", "sampling_seconds"),
    ):
        assert key in first and key in last, key
    assert "value_loss" not in first and "beta" not in first
    assert abs(first["kl"]) < 1e-4 < last["kl_k3"]
    assert all(line["sampler_gap_max"] < 1e-4 for line in lines.values())
    assert all(abs(line["update_kl"]) < 1e-5 for line in lines.values())
    assert all(line["clip_fraction"] == 0 for line in lines.values())
    samples = [
        json.loads(x) for x in (straight / "grpo" / "samples.jsonl").read_text().splitlines()
    ]
    assert [s["step"] for s in samples] == [step for step in lines for _ in range(4)]
    for s in samples:
        assert s["rewards"]["es"] == s["text"].count("e") / 8
        known = [s["rewards"]["es"], 0.1 * (s["rewards"]["right"] or 0)]
        assert s["reward"] == pytest.approx(sum(known), abs=1e-6)
        a, b = int(s["prompt"][0]), int(s["prompt"][4])
        assert (s["rewards"]["right"] is None) == (a + b > 9)
    assert any(s["rewards"]["right"] is None for s in samples)


def test_ppo_logs_value_metrics(straight):
    lines = lines_of(straight / "ppo")
    rolls = list(range(1, 48, 4))
    assert [step for step in lines if "reward" in lines[step]] == rolls
    for key in ("policy_loss", "value_loss", "value_clip_fraction", "clip_fraction", "entropy"):
        assert all(key in line for line in lines.values()), key
    for step in rolls:
        for key in ("explained_variance", "value_mean", "beta", "kl", "completion_length"):
            assert key in lines[step], key
        assert lines[step]["sampler_gap_max"] < 1e-4
        assert abs(lines[step]["update_kl"]) < 1e-5 and lines[step]["clip_fraction"] == 0
    assert lines[1]["value_mean"] == 0 and lines[5]["value_mean"] != 0
    assert lines[1]["value_clip_fraction"] == 0 == lines[1]["explained_variance"]
    assert any(line["clip_fraction"] > 0 for line in lines.values())
    betas = [lines[step]["beta"] for step in rolls]
    assert betas[0] == 0.01 and betas[1] == pytest.approx(0.01 * (1 - 0.2 * 32 / 10_000))
    assert betas[2] != betas[1]


def test_grpo_resumes_bit_for_bit_after_sigkill(straight):
    run = straight / "grpo-killed"
    args = online(straight, "grpo", run.name, *GRPO, rewards=TWO)
    killed([sys.executable, "-m", "jaxllm", *args], run)
    assert max(lines_of(run), default=0) < 20
    assert main(args) == 0
    assert main(["verify", str(run)]) == 0
    assert_same_run(straight / "grpo", run, 20)


def test_ppo_stopped_by_a_signal_and_then_by_its_reward_resumes_bit_for_bit(straight, capsys):
    args = online(straight, "ppo", "ppo-stopped", *PPO, rewards=["stops"])
    run = straight / "ppo-stopped"

    def saved():
        names = (p.name for p in (run / "checkpoints").iterdir())
        return sorted(int(name) for name in names if name.isdigit())

    assert main(args) == 75  # after the rollout
    assert saved() == [8]
    line = refused(capsys, args, "step 13: reward", "judge.py:stops failed at", "checkpoint 12 is")
    assert "ConnectionError: no service" in line and "judge.py:" in line.partition("service")[2]
    assert saved() == [8, 12]
    assert main(args) == 0
    for file in (run / "metrics.jsonl", run / "samples.jsonl"):
        file.write_text(file.read_text().replace("stops", "es"))
    assert_same_run(straight / "ppo", run, 48)


def test_ppo_of_lora_with_a_separate_critic_resumes_bit_for_bit(straight, lora):
    run = straight / "lora-again"
    shutil.copytree(straight / "lora", run)
    shutil.rmtree(run / "checkpoints" / "4")
    shutil.rmtree(run / "final")
    args = on_base(straight, online(straight, "ppo", run.name, *LORA))
    assert main(args) == 0
    assert_same_run(straight / "lora", run, 4)


@pytest.mark.parametrize("run", ["ppo", "lora"])
def test_a_policy_is_exported_without_its_critic(request, straight, run):
    if run == "lora":
        request.getfixturevalue("lora")
    out = straight / f"{run}-exported"
    assert main(["export", str(straight / run), str(out)]) == 0
    assert weights_of(out) == weights_of(straight / run / "final")
    names = weights_of(out).keys()
    if run == "ppo":
        assert names == weights_of(straight / "grpo" / "final").keys()
    else:
        assert all(".lora_" in name for name in names)


@pytest.mark.parametrize("verb", ["grpo", "ppo"])
def test_training_increases_the_reward(straight, verb):
    lines = lines_of(straight / verb).values()
    rewards = [line["reward/es"] for line in lines if "reward/es" in line]
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3])


@pytest.fixture(scope="module")
def judge(straight):
    """The directory of a reward model."""
    few = [json.loads(x) for x in (straight / "few.jsonl").read_text().splitlines()]
    said = [[m["content"][:12] for m in chat["messages"]] for chat in few]
    pairs = [{"prompt": q, "chosen": a, "rejected": a[::-1]} for q, a in said]
    (straight / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    args = arguments(straight, "reward", "judge", "--data.train", str(straight / "pairs.jsonl"))
    assert main([*args, "--steps", "2"]) == 0
    return str(straight / "judge" / "final")


def test_a_reward_model_and_a_function_are_summed(straight, judge, capsys):
    run = online(straight, "grpo", "judged", "--steps", "1", rewards=["length", judge])
    assert main([*run, "--rl.group_size", "4"]) == 0
    assert f"reward model {judge}: 0.1 MiB of weights\n" in capsys.readouterr().err
    line = lines_of(straight / "judged")[1]
    assert line["reward"] == pytest.approx(line["reward/length"] + line["reward/final"], abs=1e-5)
    model = RewardModel.load(judge, make_mesh(MeshSection()))
    for s in map(json.loads, (straight / "judged" / "samples.jsonl").read_text().splitlines()):
        said = [{"role": "user", "content": s["prompt"]}]
        said += [{"role": "assistant", "content": s["text"]}]
        assert s["rewards"]["final"] == pytest.approx(float(model.score([said])[0]), abs=1e-5)
    refused(
        capsys,
        online(straight, "grpo", "wrong", rewards=[str(straight / "grpo" / "final")]),
        "is not a reward model",
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", np.nan, ["model.layers.1.mlp.up_proj.weight"]),
        ("score.weight", 3e38, ["step 1: reward", " at ", "sums.jsonl:"]),
    ],
)
def test_a_reward_model_that_is_not_finite_stops_the_run(
    straight, judge, tmp_path, capsys, name, value, words
):
    broken = with_weight(judge, tmp_path / "broken", name, value)
    args = online(straight, "grpo", "not-finite", "--overwrite", rewards=[broken])
    refused(capsys, args, broken, "not finite", *words)


def with_weight(model, copy, name, value):
    """A copy of a model in which some values of a weight are replaced."""
    shutil.copytree(model, copy)
    weights = load_file(copy / "model.safetensors")
    weights[name] = weights[name].copy()
    weights[name][:, 1::2] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


def test_a_reward_adapter_uses_the_arrays_of_the_policys_base(straight, tmp_path):
    base, adapter = str(straight / "grpo" / "final"), str(tmp_path / "adapter")
    section = PeftSection(method="lora", r=4, modules_to_save=("norm",))
    shape = from_hf(json.loads((straight / "model.json").read_text()))
    plan = make_adapter(replace(shape, scores=True), section)
    model = load_hf(base, scores=True, peft=plan)
    trained = nnx.state(model, plan.trains)
    waves = lambda x: 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)  # noqa: E731
    nnx.update(model, jax.tree.map(lambda x: x + waves(x), trained))
    save_adapter(model, adapter, load_tokenizer(base))

    more = "--peft.method", "lora", "--rl.group_size", "4"
    args = on_base(straight, online(straight, "grpo", "shares", *more, rewards=[adapter]))
    cfg = resolve(load_config("grpo", None, args[1:])[0])
    program = build(cfg, mesh := make_mesh(cfg.mesh))
    _, frozen = program.load()
    (reward,) = load_rewards(cfg, mesh, frozen)
    assert adapter in reward.about and "MiB shared with the policy" in reward.about
    theirs = {id(x) for x in jax.tree.leaves(frozen)}
    params = dict(nnx.to_flat_state(reward.score.args[1].params))
    own = {".".join(map(str, p)) for p, v in params.items() if id(v.get_value()) not in theirs}
    assert own == {".".join(map(str, path)) for path, _ in nnx.to_flat_state(trained)}
    assert len(params) - len(own) > 5
    asked = {"messages": [{"role": "user", "content": "a"}], "tools": None, "at": ""}
    made = [Completion(asked, text) for text in ("b", "some")]
    alone = RewardModel.load(adapter, mesh).score([one.conversation for one in made])
    np.testing.assert_allclose(reward.score(made), alone, atol=1e-5)
    assert np.ptp(alone) > 1e-3


def test_a_reward_model_reads_the_tools_and_the_settings_of_the_prompts(straight, judge, tmp_path):
    """Its own template renders them."""
    shutil.copytree(judge, tmp_path / "judge")
    tokenizer = load_tokenizer(judge)
    names = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    template = names + "{{ mood if mood is defined }}" + tokenizer.chat_template
    (tmp_path / "judge" / "chat_template.jinja").write_text(template)
    tools = [{"type": "function", "function": {"name": n}} for n in ("add", "multiply")]
    asked = [{"prompt": f"{a} + 1 = ", "tools": tools[: a % 3]} for a in range(16)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(a) + "\n" for a in asked))
    run = online(straight, "grpo", "with-tools", "--steps", "1", rewards=[str(tmp_path / "judge")])
    run[run.index("--data.train") + 1] = str(tmp_path / "asked.jsonl")
    run += ["--rl.group_size", "4"]
    run += ["--data.template", str(tmp_path / "judge" / "chat_template.jinja")]
    assert main([*run, "--data.template_kwargs", '{"mood": "sad"}']) == 0
    tokenizer.chat_template = template.replace("{{ mood if mood is defined }}", "sad")
    model = RewardModel.load(judge, make_mesh(MeshSection()))
    samples = (straight / "with-tools" / "samples.jsonl").read_text().splitlines()
    for s in map(json.loads, samples):
        given = next(a for a in asked if a["prompt"] == s["prompt"])["tools"]
        said = [{"role": "user", "content": s["prompt"]}]
        said += [{"role": "assistant", "content": s["text"]}]
        texts = [
            render(tokenizer, said, tools=use, learn="last")[0].tokens for use in (given, tools)
        ]
        want, other = model.score_tokens(texts)
        assert s["rewards"]["judge"] == pytest.approx(float(want), abs=1e-5)
        assert given == tools or abs(want - other) > 1e-5


# ---- mistakes


@pytest.mark.parametrize(
    ("verb", "reward", "words"),
    [
        ("grpo", "raises", ["judge.py:raises", "sums.jsonl:", "ZeroDivisionError"]),
        ("grpo", "short", ["judge.py:short", "returned 1 rewards for 16", "sums.jsonl:"]),
        ("grpo", "words", ["judge.py:words", "'good'", "sums.jsonl:"]),
        ("grpo", "infinite", ["judge.py:infinite", "inf", "sums.jsonl:"]),
        ("grpo", "ends", ["step 1: reward", "judge.py:ends ended its process", "sums.jsonl:"]),
        ("ppo", "nothing", ["no reward"]),
        ("grpo", "missing", ["judge.py:missing", "missing"]),
        ("grpo", "/nowhere/judge.py:length", ["/nowhere/judge.py"]),
        ("grpo", "./nowhere.judge:length", ["nowhere"]),
    ],
)
def test_the_error_of_a_reward_function_names_it_and_the_record(asked, capsys, verb, reward, words):
    args = online(asked, verb, "wrong", "--overwrite", rewards=[reward])
    line = refused(capsys, args, *words)
    if reward == "raises":
        number = int(line.split("sums.jsonl:")[1].split(":")[0])
        record = (asked / "sums.jsonl").read_text().splitlines()[number - 1]
        assert json.loads(record)["answer"] == "7"


@pytest.mark.parametrize(
    ("verb", "more", "words"),
    [
        ("grpo", ["--rl.group_size", "1"], ["rl.group_size is 1", "2 or more"]),
        ("grpo", ["--rl.group_size", "5"], ["batch_size 16", "rl.group_size 5"]),
        ("ppo", ["--data.eval", "sums.jsonl"], ["data.eval", "ppo"]),
        ("ppo", ["--rl.reward_weights", "1", "2"], ["rl.reward_weights", "2 weights for 1"]),
        ("grpo", ["--data.max_length", "5"], ["sums.jsonl", "all 64 examples", "too long"]),
        ("grpo", ["--rl.max_new_tokens", "17"], ["48", "17", "64 positions"]),
        ("ppo", ["--rl.temperature", "0"], ["rl.temperature"]),
        ("grpo", ["--rl.gae_lambda", "0.5"], ["rl.gae_lambda", "grpo"]),
        (
            "ppo",
            ["--rl.kl_target", "6", "--align.beta", "0"],
            ["rl.kl_target", "another initial value"],
        ),
    ],
)
def test_a_config_mistake_is_one_line(asked, capsys, verb, more, words):
    refused(capsys, online(asked, verb, "mistaken", *more), *words)
    assert not (asked / "mistaken" / "checkpoints").exists()


def test_a_run_without_a_reward_is_refused(asked, capsys):
    line = refused(capsys, online(asked, "ppo", "mistaken", rewards=[]))
    assert "no reward: give rl.rewards" in line
