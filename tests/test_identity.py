# SPDX-License-Identifier: Apache-2.0
"""The identity of a run: what is in it, that a change is named, and how a change is accepted."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.config import DataSection, ModelSection, OptimSection, RlSection, Source, TrainConfig
from jaxllm.config.checks import IDENTITY, check
from jaxllm.config.schema import leaves
from jaxllm.data import cache as cache_module
from jaxllm.errors import UserError
from jaxllm.identity import base_weights, check_same_run, fixed, identity

HF = {"model_type": "llama", "rope_theta": 1e4, "generation_config": {"eos_token_id": 2}}
RUN = Path("run")


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return TrainConfig(
        objective="grpo",
        model=ModelSection(path="base"),
        data=DataSection(train=(Source("a.txt"),), cache_dir="cache"),
        optim=OptimSection(learning_rate=1e-3),
        rl=RlSection(rewards=("reward.py:score",)),
    )


def manifest(content="1", tokenizer="t", **evals):
    source = {"path": "a.txt", "content": content, "examples": 3, "tokens": 9, "rows": 2}
    sets = {name: {"sources": [source | {"path": name, "content": c}]} for name, c in evals.items()}
    return {"tokenizer": tokenizer, "train": {"sources": [source]}, "eval": sets}


def found(cfg, data=None, template="t", hf=HF, weights=None, own=None):
    tokenizer, data = SimpleNamespace(chat_template=template), data or manifest(b="1")
    return identity(cfg, tokenizer, data, hf, weights or {"model.path": "1"}, own)


def changes(cfg):
    """Name -> (the identity after it changed, the words for it)."""
    theta, ends = HF | {"rope_theta": 1e5}, HF | {"generation_config": {"eos_token_id": 3}}
    return {
        "data": (found(cfg, manifest("2", b="1")), "data a.txt changed since"),
        "eval": (found(cfg, manifest(b="2")), "eval b changed since"),
        "tokenizer": (found(cfg, manifest(tokenizer="u", b="1")), "tokenizer changed since"),
        "template": (found(cfg, template="u"), "template changed since"),
        "model_config": (found(cfg, hf=theta), "model_config rope_theta was 10000.0, is 100000.0"),
        "generation_config": (found(cfg, hf=ends), "generation_config eos_token_id was 2, is 3"),
        "weights": (found(cfg, weights={"model.path": "2"}), "weights model.path changed since"),
        "own_objective": (found(cfg, own="a.loss"), "own_objective was None, is 'a.loss'"),
        "seed": (found(replace(cfg, seed=1)), "seed was 0, is 1"),
    }


def test_each_change_is_named_and_refused_unless_it_is_accepted(cfg):
    before = found(cfg)
    assert json.loads(json.dumps(before)) == before
    assert check_same_run(RUN, before, found(replace(cfg, steps=9, resume_changed=("seed",)))) == {}
    cases = changes(cfg)
    assert {*cases, "rewards"} == {*IDENTITY, "seed"}
    for name, (now, words) in cases.items():
        with pytest.raises(UserError, match="run belongs to another run") as error:
            check_same_run(RUN, before, now, [n for n in cases if n != name])
        assert words in str(error.value)
        assert str(error.value).endswith(f"or resume with --resume_changed {name}")
        (changed,) = check_same_run(RUN, before, now, [name])
        assert changed.partition(" ")[0] == name


@pytest.mark.parametrize("sets", [{}, {"b": "1", "c": "1"}], ids=["fewer", "more"])
def test_a_source_that_is_gone_or_new_is_a_change(cfg, sets):
    with pytest.raises(UserError, match="eval [bc] changed since"):
        check_same_run(RUN, found(cfg), found(cfg, manifest(**sets)))


def test_what_a_checkpoint_does_not_record_is_not_compared(cfg):
    now = found(cfg)
    assert check_same_run(RUN, {}, now) == {}
    keys = {k: v for k, v in now["config"].items() if k != "seed"}  # a key of a later version
    assert check_same_run(RUN, {"config": keys}, now) == {}


def test_resume_changed_names_what_there_is(cfg):
    assert all(name in leaves()["resume_changed"].doc for name in IDENTITY)
    check(replace(cfg, resume_changed=("data", "weights", "optim.schedule")))
    with pytest.raises(UserError, match="resume_changed: wieghts is unknown; did you mean weights"):
        check(replace(cfg, resume_changed=("wieghts",)))
    assert not {"resume_changed", "steps", "mesh.fsdp"} & fixed({"steps": 1, "seed": 2}).keys()


# ---- weights


def base(folder, at=None):
    """A model of two tensors; `at`: a byte of the second to change."""
    Path(folder).mkdir(exist_ok=True)
    values = np.zeros(50_000, np.uint8)
    if at is not None:
        values[at] = 1
    save_file({"a": np.zeros(3), "b": values}, f"{folder}/model.safetensors")


def test_every_byte_of_the_weights_counts_and_is_read_once(cfg, monkeypatch):
    read = []
    monkeypatch.setattr(
        cache_module,
        "file_hash",
        lambda file, real=cache_module.file_hash: read.append(file) or real(file),
    )
    base("base")
    first = base_weights(cfg)
    assert base_weights(cfg) == first and len(read) == 1
    os.utime("base/model.safetensors")  # read again, and the same
    assert base_weights(cfg) == first and len(read) == 2
    base("base", at=20_000)  # neither at the start nor in the middle of a tensor
    assert base_weights(cfg) != first and len(read) == 3
    record = next(Path("cache/hashes").iterdir())
    record.write_text(record.read_text()[:-9])  # damaged
    base("base")
    assert base_weights(cfg) == first


def test_random_weights_are_identified_by_their_seed(cfg):
    random = replace(cfg, model=ModelSection(config="model.json"))
    assert base_weights(random) != base_weights(replace(random, seed=1))


# ---- rewards


def reward_of(cfg, name):
    return found(replace(cfg, rl=RlSection(rewards=(name,))))["rewards"][name]


@pytest.mark.parametrize("name", ["reward.py:score", "rewards.maths:score"])
def test_the_source_of_a_reward_function_is_part_of_the_identity(cfg, name):
    Path("rewards").mkdir()
    for file in ("reward.py", "rewards/maths.py"):
        Path(file).write_text("raise SystemExit  # it is not run")
    first = reward_of(cfg, name)
    assert first is not None and reward_of(cfg, name) == first
    for file in ("reward.py", "rewards/maths.py"):
        Path(file).write_text("x = 1")
    assert reward_of(cfg, name) != first


@pytest.mark.parametrize("name", ["reward.py:score", "reward:score", "pkg.reward:score"])
def test_the_modules_next_to_a_reward_function_that_it_imports_count(cfg, name):
    Path("pkg").mkdir()
    Path("pkg/reward.py").write_text("from .near import a\nimport helper")
    Path("pkg/near.py").write_text("")
    for module, imports in (("reward", "helper"), ("helper", "deeper"), ("deeper", "numpy")):
        Path(f"{module}.py").write_text(f"def score(): pass\ndef f():\n    import {imports}")
    Path("other.py").write_text("")
    first = reward_of(cfg, name)
    Path("other.py").write_text("x = 1")
    assert reward_of(cfg, name) == first
    Path("deeper.py").write_text("import numpy as np")
    second = reward_of(cfg, name)
    assert second != first
    Path("pkg/near.py").write_text("a = 1")
    assert (reward_of(cfg, name) == second) == (not name.startswith("pkg"))


def test_a_folder_of_the_name_of_an_import_is_no_module(cfg):
    Path("wandb").mkdir()
    Path("wandb/run.txt").touch()
    Path("judge.py").write_text("import wandb, os.path\nfrom wandb import log\nfrom . import x")
    assert reward_of(cfg, "judge.py:score") is not None
    Path("judge.py").write_text("def (")  # reported when it is imported
    assert reward_of(cfg, "judge.py:score") is not None
    assert reward_of(cfg, "missing.py:score") is None is reward_of(cfg, "missing.module:score")


def test_a_reward_model_is_identified_by_its_files_and_those_of_its_base(cfg):
    base("base")
    base("reward")
    Path("reward/config.json").write_text("{}")
    first = reward_of(cfg, "reward")
    Path("reward/README.md").write_text("a card")
    assert reward_of(cfg, "reward") == first
    base("reward", at=20_000)
    second = reward_of(cfg, "reward")
    Path("reward/config.json").write_text('{"a": 1}')
    assert len({first, second, reward_of(cfg, "reward")}) == 3
    Path("reward/config.json").unlink()
    Path("reward/model.safetensors").rename("reward/adapter_model.safetensors")
    Path("reward/adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    adapter = reward_of(cfg, "reward")
    base("base", at=20_000)
    assert reward_of(cfg, "reward") != adapter
