# SPDX-License-Identifier: Apache-2.0
"""Held-out loss counts every token once, by its weight."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from jaxllm.data.batch import make_row
from jaxllm.evaluate import evaluate, evaluate_files, make_eval
from jaxllm.mesh import MeshSection, make_mesh
from jaxllm.model.config import ModelConfig, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.lm import lm_loss
from jaxllm.step import alone

CFG = ModelConfig("llama", 61, 32, 48, 2, 4, 2, 8, 64, ropes=(Rope(),))


def rows(*weights: float) -> SimpleNamespace:
    """A set of one-conversation rows whose learned tokens have the given weights."""
    made = []
    for index, weight in enumerate(weights):
        tokens = np.random.default_rng(index).integers(1, 61, 9 + index).astype(np.int32)
        learn = np.full(len(tokens), weight, np.float32)
        made.append(make_row([(tokens, learn)], 16))
    return SimpleNamespace(parts=(made,), length=16)


@pytest.fixture(scope="module")
def run():
    graph, weights = nnx.split(Decoder(CFG, rngs=nnx.Rngs(0)), nnx.Param)
    eval_fn, params = make_eval(alone(graph), lm_loss), nnx.to_pure_dict(weights)
    mesh = make_mesh(MeshSection(), devices=jax.devices()[:1])

    def run(*sets, batch_size=2):
        return evaluate(eval_fn, params, {}, sets, mesh=mesh, batch_size=batch_size)

    return run


def test_a_light_token_is_still_a_token(run):
    whole, light = run(rows(1.0, 1.0)), run(rows(0.1, 0.1))
    assert light["tokens"] == whole["tokens"] == 8 + 9
    assert light["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_sets_and_batches_of_any_size_make_one_mean(run):
    together = run(rows(1.0, 0.5, 0.25), batch_size=3)
    apart = run(rows(1.0), SimpleNamespace(parts=(rows(1.0, 0.5, 0.25).parts[0][1:],), length=16))
    assert apart["tokens"] == together["tokens"]
    assert apart["loss"] == pytest.approx(together["loss"], rel=1e-6)


def test_nothing_to_evaluate_on_is_refused():
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluate_files("anywhere", [])
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate_files("anywhere", ["a.txt"], batch_size=0)
