# SPDX-License-Identifier: Apache-2.0
"""Golden trajectories: 20 updates of every kind of run give the numbers of golden/NAME.json.

A change that should not change any number proves it here. One that should records the runs again,

    python tests/test_golden.py [NAME ...]

and its commit shows the numbers before and after; nothing else rewrites the files.
"""

import json
import os
import random
import sys
import tempfile
from contextlib import chdir
from pathlib import Path
from unittest import mock

import pytest
from runs import ENV, lines_of

GOLDEN = Path(__file__).parent / "golden"
STEPS = 20

# Rounding differs between kinds of CPU: vectors of another width add up in another order, and some
# have fused multiply-add. With XLA's code for SSE4.2 instead of AVX2 the runs differed by 1.3e-6 at
# most, relatively, and PPO's losses, which cross 0 as GRPO's do, by 5e-6 of their size plus 0.05.
# ATOL is for these; on one machine the numbers are the same bit for bit.
RTOL, ATOL = 2e-5, 1e-6

# ---- what the runs read: all of it is made here, of random.random() alone, which Python keeps

WORDS = "a an the cat dog sun sea old red big ran sat saw ate and but so not we you it".split()
JUDGE = """
def vowels(prompts, completions, **_):
    return [sum(c in "aeiou" for c in text) / 4 for text in completions]

def length(prompts, completions, **_):
    return [len(text) / 12 for text in completions]
"""
MODEL = {
    "model_type": "qwen3",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def write_inputs(folder: Path) -> None:
    """A model's shape, a tokenizer of bytes, reward functions, and data of every kind."""
    from jaxllm.data.tokenizer_training import train_tokenizer

    draw = random.Random(0).random

    def said(least: int, most: int) -> str:
        count = least + int(draw() * (most - least + 1))
        return " ".join(WORDS[int(draw() * len(WORDS))] for _ in range(count))

    def records(name: str, count: int, **columns) -> None:
        made = [{key: make(i) for key, make in columns.items()} for i in range(count)]
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in made))

    def chat(_):
        turns = [("user", said(1, 3)), ("assistant", said(1, 5))] * (1 + int(draw() * 2))
        return [{"role": role, "content": content} for role, content in turns]

    def text(_):
        return said(1, 14)

    def answer(_):
        return said(1, 4)

    for kind, count in (("train", 120), ("held-out", 12)):
        records(f"texts-{kind}.jsonl", 2 * count, text=text)
        records(f"chats-{kind}.jsonl", count, messages=chat)
        records(f"pairs-{kind}.jsonl", count, prompt=answer, chosen=answer, rejected=answer)
        judged = dict(prompt=answer, completion=answer, label=lambda i: i % 3 > 0)
        records(f"judged-{kind}.jsonl", count, **judged)
    records("prompts.jsonl", 24, prompt=answer)
    (folder / "judge.py").write_text(JUDGE)
    (folder / "model.json").write_text(json.dumps(MODEL))
    # 256 bytes and four special tokens, no merges: nothing here depends on a trainer's order.
    train_tokenizer([], folder / "tokenizer", vocab_size=260, texts=WORDS)


# ---- the runs, as `from_dict` reads them


def tree_of(objective: str, data: str, **more) -> dict:
    """A run's config: what all share, and `more` keys, by section."""
    held_out = {"eval": [{"path": f"{data}-held-out.jsonl"}]}
    online = data == "prompts"
    tree = {
        "objective": objective,
        "steps": STEPS,
        "seed": 1,
        "batch_size": 8,
        "model": {"config": "model.json", "tokenizer": "tokenizer"},
        "data": {
            "train": [{"path": "prompts.jsonl" if online else f"{data}-train.jsonl"}],
            "max_length": 32 if online else 96,
            "workers": 1,
            "cache_dir": "cache",
        }
        | ({} if online else held_out),
        "optim": {
            "learning_rate": 3e-3,
            "schedule": "cosine",
            "warmup": 4,
            "final": 0.1,
            "weight_decay": 0.1,
            "clip": 0.5,
        },
        "log": {"every": 1, "progress": False},
        "save": {"every": 0, "final": False},
    }
    for key, value in more.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return tree


LORA = {"method": "lora", "r": 4, "lora_dropout": 0.1}
ONLINE = {"rewards": ["judge.py:vowels", "judge.py:length"], "reward_weights": [1.0, 0.3]}
ONLINE |= {"max_new_tokens": 8, "iterations": 2, "temperature": 0.9}
RUNS = {
    "pretrain": tree_of(
        *("pretrain", "texts"),
        micro_batch_size=2,
        model={"z_loss": 1e-4, "loss_chunk": 100},
    ),
    "sft": tree_of("sft", "chats", micro_batch_size=4),
    "lora": tree_of("sft", "chats", peft=LORA),
    "dpo": tree_of(
        *("dpo", "pairs"),
        align={"beta": 0.2, "loss": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    ),
    "kto": tree_of("kto", "judged", align={"beta": 0.2, "desirable_weight": 1.3}),
    "reward": tree_of("reward", "pairs", align={"centering": 0.01}),
    "ppo": tree_of("ppo", "prompts", rl=ONLINE | {"minibatches": 2}),
    "grpo": tree_of("grpo", "prompts", align={"beta": 0.02}, rl=ONLINE | {"group_size": 4}),
}


def numbers_of(name: str, folder: Path) -> dict:
    """What a run logs: a list a metric, with None at the steps that do not log it."""
    import jax

    import jaxllm
    from jaxllm.config import from_dict

    one = jax.devices()[:1]  # of the tests' eight: programs for one compile soonest
    with chdir(folder), mock.patch("jax.devices", lambda *_: one):
        jaxllm.train(from_dict(RUNS[name] | {"output_dir": name}))
    lines = lines_of(folder / name)
    assert list(lines) == list(range(1, STEPS + 1))
    found = {key: [line.get(key) for line in lines.values()] for key in ("loss", "grad_norm")}
    if "rl" in RUNS[name]:
        found["reward"] = [line.get("reward") for line in lines.values()]
    else:
        evals = lines_of(folder / name, "eval")
        found["eval_loss"] = [evals.get(step, {}).get("loss") for step in lines]
    return found


# ---- compared, and recorded


def first_difference(want: dict, got: dict) -> str | None:
    """Where two runs first differ, the earliest step of any metric; None when they agree."""
    if want.keys() != got.keys():
        return f"metrics {sorted(want)} → {sorted(got)}"
    found = [
        (step, f"{key} at step {step}: {old!r} → {new!r}")
        for key in want
        for step, (old, new) in enumerate(zip(want[key], got[key], strict=True), 1)
        if not close(old, new)
    ]
    return min(found)[1] if found else None


def close(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is new
    return abs(new - old) <= ATOL + RTOL * abs(old)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_recorded_numbers(inputs, name):
    want = json.loads((GOLDEN / f"{name}.json").read_text())
    assert want["config"] == RUNS[name], "another run than the recorded one"
    difference = first_difference(want["numbers"], numbers_of(name, inputs))
    assert difference is None, (
        f"{name}: {difference} (recorded → now). If that is meant, run {Path(__file__).name} as a "
        "script and commit what it writes."
    )


def record(names: list[str]) -> None:
    """Rewrites the files of these runs, or of all, and says what changed."""
    os.environ.update(ENV)  # as conftest.py does, before jax is imported
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        for name in names or RUNS:
            file = GOLDEN / f"{name}.json"
            old = json.loads(file.read_text())["numbers"] if file.is_file() else {}
            new = numbers_of(name, Path(folder))
            file.write_text(json.dumps({"config": RUNS[name], "numbers": new}, indent=1) + "\n")
            print(f"{name}: {first_difference(old, new) or 'as before, to rounding'}")


if __name__ == "__main__":
    record(sys.argv[1:])
