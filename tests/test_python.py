# SPDX-License-Identifier: Apache-2.0
"""The Python interface: data in memory, an objective of the caller, an observer, a loaded model."""

import json
import pickle
from copy import deepcopy
from dataclasses import replace
from functools import partial

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import lines_of, refused

import jaxllm
from jaxllm.chat import TextModel
from jaxllm.config import (
    DataSection,
    LogSection,
    ModelSection,
    Source,
    TrainConfig,
    from_dict,
    to_dict,
)
from jaxllm.config.checks import check, resolve
from jaxllm.config.source import InMemory
from jaxllm.data import examples
from jaxllm.data.dataset import load_data
from jaxllm.data.examples import fingerprint
from jaxllm.data.loader import ordered
from jaxllm.objectives.table import make_objective


@pytest.fixture(scope="module")
def records(project):
    return [json.loads(line) for line in (project / "few.jsonl").read_text().splitlines()]


def config(project, out, data, **changes):
    model = ModelSection(config=f"{project}/model.json", tokenizer=f"{project}/tokenizer")
    options = {"max_length": 64, "workers": 1, "cache_dir": f"{project}/cache"}
    return TrainConfig(
        objective="sft",
        output_dir=f"{project}/{out}",
        batch_size=8,
        micro_batch_size=1,
        model=model,
        data=DataSection(train=data, **options),
        log=LogSection(every=1, progress=False),
        **({"steps": 3} | changes),
    )


# ---- data in memory


def test_data_is_a_path_a_dataset_or_records_or_a_source_of_one(records):
    dataset = datasets.Dataset.from_list(records)
    data = DataSection(train=["a.txt", dataset, records, Source(records, weight=2.0)])
    assert data.train[0] == Source("a.txt")
    assert all(isinstance(one.path, InMemory) for one in data.train[1:])
    assert data.train[2].path == data.train[3].path != data.train[1].path
    assert DataSection(eval="a.txt").eval == (Source("a.txt"),)
    for wrong in ({"train": records}, {"eval": [3]}, {"train": datasets.DatasetDict(a=dataset)}):
        with pytest.raises(jaxllm.UserError, match=r"a source must be a path, .* seen "):
            DataSection(**wrong)
    with pytest.raises(jaxllm.UserError, match=r"record 1 \(from 0\) is not JSON: .*set"):
        Source([{"text": "a"}, {"text": {1}}])


def test_the_path_of_data_in_memory_is_a_hash_of_its_content(records, tmp_path):
    one, same, other = Source(records), Source(deepcopy(records)), Source(records[1:])
    assert one == same != other
    assert one.path.startswith("memory:") and len(one.path) == len("memory:") + 32
    dataset = datasets.Dataset.from_list([*records, {"messages": None}])
    dataset.save_to_disk(str(tmp_path / "saved"))
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    path = Source(dataset).path
    assert Source(saved).path == path
    assert Source(dataset.select(range(len(dataset)))).path == path
    some = dataset.select(range(3, 30, 2))
    assert Source(some).path == Source(datasets.Dataset.from_list(some.to_list())).path != path
    assert Source(dataset.rename_column("messages", "text")).path != path


def test_a_config_keeps_the_records_and_its_json_their_name(project, records):
    cfg = config(project, "x", [records])
    check(cfg)
    path = cfg.data.train[0].path
    assert deepcopy(cfg).data.train[0].path is resolve(cfg).data.train[0].path is path
    assert type(pickle.loads(pickle.dumps(path))) is str
    assert to_dict(cfg)["data"]["train"][0]["path"] == path
    with pytest.raises(jaxllm.UserError, match="run that program again"):
        load_data(from_dict(to_dict(cfg)), jaxllm.load_tokenizer(project / "tokenizer"))
    split = replace(cfg, data=replace(cfg.data, train=[Source(records, split="train")]))
    with pytest.raises(jaxllm.UserError, match="has neither split nor streaming"):
        load_data(split, jaxllm.load_tokenizer(project / "tokenizer"))


def test_records_in_memory_make_the_rows_of_a_file_with_them(project, records, monkeypatch):
    tokenizer = jaxllm.load_tokenizer(project / "tokenizer")

    def rows_of(data, **more):
        cfg = resolve(config(project, "x", data))
        loaded = load_data(replace(cfg, data=replace(cfg.data, **more)), tokenizer)
        return loaded, [ordered(loaded.train, 0)[i] for i in range(12)]

    _, want = rows_of([str(project / "few.jsonl")])
    dataset = datasets.Dataset.from_list(records)
    for data in (records, dataset):
        loaded, got = rows_of([data], eval=[data, data])
        for row, same in zip(got, want, strict=True):
            assert all(np.array_equal(row[name], same[name]) for name in want[0])
        (source,) = loaded.manifest["train"]["sources"]
        assert source["read"] == len(records) and source["path"] == f"memory:{source['content']}"
        assert list(loaded.evals) == ["memory", "memory-2"]
        assert len(rows_of([Source(data, max_samples=5)])[0].train.parts[0].examples) == 5
        with monkeypatch.context() as patch:
            patch.setattr(examples, "tokenize_table", None)  # it is in the cache
            rows_of([deepcopy(data)])
    with pytest.raises(jaxllm.UserError, match="data in memory, record 1: "):
        rows_of([[records[0], {"messages": [{"role": "nobody"}]}]])


# ---- an objective and an observer


def own_loss(model, batch, rng, reference, scale=1.0):
    """The cross-entropy, and how many targets have one of the first 100 ids."""
    assert reference is None
    logits = model(batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    weight = batch.weights.sum()
    low = jnp.where(batch.targets < 100, batch.weights, 0.0).sum()
    return -scale * (logps * batch.weights).sum(), weight, {"low": (low, weight)}


@pytest.fixture(scope="module")
def observed(project, records):
    """A run on records in memory whose steps were observed, and what was seen."""
    seen = []
    result = jaxllm.train(
        config(project, "observed", [records]), on_step=lambda *line: seen.append(line)
    )
    return result, seen


def test_an_observer_sees_the_lines_of_the_log(project, records, observed, capsys):
    result, seen = observed
    lines = lines_of(project / "observed")
    assert result.step == 3 and [step for step, _ in seen] == list(lines) == [1, 2, 3]
    for step, metrics in seen:
        line = {k: v for k, v in lines[step].items() if k not in ("kind", "step", "time")}
        assert metrics == line
        assert metrics["epoch"] == pytest.approx(
            step
            * 8
            / json.loads((project / "observed" / "data.json").read_text())["train"][
                "rows_per_epoch"
            ]
        )
    assert seen[-1][1]["tokens_seen"] == sum(metrics["tokens"] for _, metrics in seen)


def test_a_run_on_records_is_resumed_with_the_same_records_only(project, records, observed, capsys):
    written = json.loads((project / "observed" / "config.json").read_text())
    assert written["data"]["train"][0]["path"].startswith("memory:")
    more = config(project, "observed", [deepcopy(records)], steps=4)
    assert jaxllm.train(more).step == 4
    assert (
        "resuming from step 3\nfirst example, learned text in [[ ]]:\n" in capsys.readouterr().err
    )
    last = lines_of(project / "observed")[4]
    assert last["tokens_seen"] == observed[1][-1][1]["tokens_seen"] + last["tokens"]
    with pytest.raises(jaxllm.UserError, match=r"belongs to another run \(data\.train was "):
        jaxllm.train(config(project, "observed", [records[1:]], steps=5))
    run = str(project / "observed")
    refused(capsys, ["rows", run, "--step", "1"], "memory:", "run that program again")


def test_an_own_objective_replaces_the_loss(project, records, observed):
    cfg = config(project, "own", [records])
    jaxllm.train(cfg, objective=own_loss)
    lines = lines_of(project / "own")
    for step, metrics in observed[1]:
        assert 0 < lines[step]["low"] < 1 and "accuracy" not in lines[step]
        for key in ("loss", "grad_norm"):
            assert lines[step][key] == pytest.approx(metrics[key], rel=1e-5), (step, key)
    with pytest.raises(
        jaxllm.UserError, match=r"own_objective was 'test_python\.own_loss', is None"
    ):
        jaxllm.train(replace(cfg, steps=4))
    with pytest.raises(
        jaxllm.UserError, match=r"own_objective was None, is 'test_python\.own_loss'"
    ):
        jaxllm.train(config(project, "observed", [records], steps=5), objective=own_loss)


def test_an_own_objective_may_have_arguments_bound():
    objective = make_objective(TrainConfig(), partial(own_loss, scale=2.0))
    assert objective.own == "test_python.own_loss" and objective.baseline is None


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (1.0, r"must return \(Σ loss, weight, metrics\)"),
        ((1.0, 2.0), r"must return \(Σ loss, weight, metrics\)"),
        ((np.ones(3), 2.0, {}), r"the loss must be two scalars"),
        ((1.0, 2.0, {"a": 3.0}), r"a must be two scalars, \(Σ, weight\)"),
        ((1.0, 2.0, {"tokens": (3.0, 1.0)}), "every run has a metric tokens; rename it"),
    ],
)
def test_what_an_own_objective_returns_is_checked(result, words):
    def wrong(model, batch, rng, reference):
        return result

    loss = make_objective(TrainConfig(), wrong).loss
    with pytest.raises(jaxllm.UserError, match=f"objective test_python.*wrong.* {words}"):
        loss(None, None, None, None)


def test_the_sums_of_an_own_objective_are_float32():
    def half(model, batch, rng, reference):
        return np.float16(1), 2, {"a": (True, 1)}

    loss = make_objective(TrainConfig(), half).loss
    assert {x.dtype.name for x in jax.tree.leaves(loss(*"mbrr"))} == {"float32"}


# ---- models


def test_a_loaded_model_generates_what_its_directory_does(project, observed, tmp_path):
    final = observed[0].final
    options = {"chat": True, "sampling": jaxllm.Sampling(max_new_tokens=8)}
    want = jaxllm.generate_text(final, ["import os"], **options)
    model, tokenizer = jaxllm.load_hf(final), jaxllm.load_tokenizer(final)
    assert jaxllm.generate_text(model, ["import os"], tokenizer=tokenizer, **options) == want
    assert jaxllm.generate_text(model, "import os", tokenizer=tokenizer, **options) == want
    found = TextModel.of(model)  # the tokenizer of model.base
    assert fingerprint(found.tokenizer) == fingerprint(tokenizer) and len(found.stop_ids) == 2
    jaxllm.save_hf(model, str(tmp_path / "saved"), tokenizer=tokenizer)
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    saved = jaxllm.load_tokenizer(tmp_path / "saved")
    assert fingerprint(saved) == fingerprint(tokenizer)
    with pytest.raises(jaxllm.UserError, match="apply to a model given by its path"):
        jaxllm.generate_text(model, ["a"], dtype="bfloat16")
    with pytest.raises(jaxllm.UserError, match="tokenizer is used only with a loaded model"):
        jaxllm.generate_text(final, ["a"], tokenizer=tokenizer)
    model.base = ""
    with pytest.raises(jaxllm.UserError, match="was not loaded from a directory; give its token"):
        jaxllm.generate_text(model, ["a"])


def test_the_vocabulary_of_a_loaded_model_is_checked_once(observed, monkeypatch):
    sizes = []
    monkeypatch.setattr("jaxllm.chat.check_vocabulary", lambda _, size: sizes.append(size))
    assert sizes == [TextModel.load(observed[0].final).model.cfg.vocab_size]
