# SPDX-License-Identifier: Apache-2.0
"""Scores of a trained reward model do not depend on how texts are batched, and its evaluation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import arguments, lines_of

from jaxllm.cli import main
from jaxllm.config import MeshSection, Source
from jaxllm.data.batch import make_row
from jaxllm.data.dataset import Data
from jaxllm.data.rows import Rows
from jaxllm.mesh import make_mesh
from jaxllm.rl import rewards
from jaxllm.rl.rewards import RewardModel, evaluate_rewards

pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def pairs(project):
    """A file of pairs."""
    few = [json.loads(x) for x in (project / "few.jsonl").read_text().splitlines()]
    said = [[m["content"][:12] for m in chat["messages"]] for chat in few]
    records = [{"prompt": q, "chosen": a, "rejected": a[::-1]} for q, a in said]
    (project / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in records))
    return project / "pairs.jsonl"


@pytest.fixture(scope="module")
def judge(project, pairs):
    """The directory of a reward model."""
    args = arguments(project, "reward", "judge", "--data.train", str(pairs))
    assert main([*args, "--data.eval", str(pairs), "--steps", "2"]) == 0
    return str(project / "judge" / "final")


def test_a_score_does_not_depend_on_batch_mates_or_padding(judge):
    one = make_mesh(MeshSection(), jax.devices()[:1])
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 400, n) for n in (3, 64, 1, 40, 9, 63, 22, 5, 17)]
    model = RewardModel.load(judge, one)
    alone = np.concatenate([model.score_tokens([text]) for text in texts])
    assert np.ptp(alone) > 1e-3
    np.testing.assert_allclose(model.score_tokens(texts), alone, atol=1e-5)
    np.testing.assert_allclose(model.score_tokens(texts[::-1]), alone[::-1], atol=1e-5)
    many = RewardModel.load(judge, make_mesh(MeshSection()))
    np.testing.assert_allclose(many.score_tokens(texts), alone, atol=1e-5)
    whole = nnx.merge(model.graph, model.params)(jnp.asarray(texts[3])[None])
    assert float(whole[0, 0]) == pytest.approx(float(alone[3]), abs=1e-5)


def test_evaluation_on_pairs_equals_that_of_the_run_and_on_chats_the_scores(
    project, pairs, judge, capsys
):
    line = list(lines_of(project / "judge", "eval").values())[-1]
    options = ["--max_length", "64", "--json"]
    capsys.readouterr()
    assert main(["eval", "--model", judge, "--data", str(pairs), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == len(pairs.read_text().splitlines())
    assert found["accuracy"] == line["accuracy"]
    for key in ("loss", "margin", "reward_mean"):
        assert found[key] == pytest.approx(line[key], abs=1e-5), key
    chats = project / "short.jsonl"
    said = [json.loads(x) for x in pairs.read_text().splitlines()]
    turns = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]
        for r in said
    ]
    chats.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    assert main(["eval", "--model", judge, "--data", str(chats), *options]) == 0
    scored = json.loads(capsys.readouterr().out)
    scores = RewardModel.load(judge, make_mesh(MeshSection())).score(turns)
    assert scored["examples"] == len(turns) and "loss" not in scored
    assert scored["reward_mean"] == pytest.approx(scores.mean(), abs=1e-5)
    assert scored["reward_max"] == pytest.approx(scores.max(), abs=1e-5)
    assert found["chosen_mean"] == pytest.approx(scores.mean(), abs=1e-5)


def test_rows_with_more_and_more_texts_are_scored_by_few_programs(project, judge, monkeypatch):
    texts = [np.arange(3) + 20 * n for n in range(1, 10)]
    made = [make_row([(text, np.zeros(3)) for text in texts[:n]], 64) for n in range(1, 10)]
    data = Data(None, {"texts": Rows((made,), None, 64)}, {})
    monkeypatch.setattr(rewards, "load_data", lambda *_: data)
    monkeypatch.setattr(rewards, "summarize", lambda _: [])
    model = RewardModel.load(judge, make_mesh(MeshSection(), jax.devices()[:1]))
    before = rewards._scores._cache_size()
    source = Source(str(project / "few.jsonl"))
    found = evaluate_rewards(model, [source], max_length=64, batch_size=1)
    assert rewards._scores._cache_size() - before == 5  # 1, 2, 4, 8 and 16 texts
    scores = model.score_tokens(texts)
    assert found["examples"] == 45
    assert found["reward_mean"] == pytest.approx(scores @ np.arange(9, 0, -1) / 45, abs=1e-5)
    assert found["reward_max"] == pytest.approx(scores.max(), abs=1e-5)
