# SPDX-License-Identifier: Apache-2.0
"""Held-out loss counts every token once, by its weight."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from jaxllm.config import EvalSection
from jaxllm.data.batch import make_row
from jaxllm.evaluate import Best, evaluate, evaluate_files, judged, make_eval, metric_names
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


# ---- the best one


def after(values, **keys):
    """The best of evaluations after steps 1, 2, …"""
    best, section = Best(), EvalSection(**keys)
    for step, value in enumerate(values, 1):
        best = best.after(step, value, section)
    return best


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "keys", "step", "waited"),
    [
        ([3, 2, 2.5], {}, 2, 1),
        ([3, 2, 2, 2], {}, 2, 2),  # the earlier of equal ones
        ([NAN, 3, NAN, float("-inf")], {}, 2, 2),
        ([3, 2, 2.5], {"metric": "accuracy"}, 1, 2),
        ([3, 2, 2.5], {"metric": "eval_books_perplexity"}, 2, 1),
        ([3, 2, 2.5], {"metric": "accuracy", "greater": False}, 2, 1),
        ([3, 2, 2.5], {"greater": True}, 1, 2),
        ([3, 2.9, 2.8], {"min_delta": 0.5}, 3, 2),  # better, and yet no improvement worth waiting
        ([3, 2.9, 2], {"min_delta": 0.5}, 3, 0),
    ],
)
def test_the_best_evaluation_and_how_long_ago_it_was(values, keys, step, waited):
    best = after(values, **keys)
    assert (best.step, best.value, best.waited) == (step, values[step - 1], waited)


def test_a_run_is_over_after_as_many_evaluations_as_its_patience():
    assert [after([1] + [2] * n).is_over(EvalSection(patience=2)) for n in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    assert not after([1] + [2] * 9).is_over(EvalSection())  # off


def test_the_metric_is_a_mean_over_sets_or_that_of_one():
    evals = {"books": {"loss": 1.0, "accuracy": 0.2}, "wiki": {"loss": 3.0, "accuracy": 0.4}}

    def of(metric):
        return judged(evals, EvalSection(metric=metric))

    assert of("loss") == of("eval_loss") == 2.0
    assert of("accuracy") == pytest.approx(0.3)
    assert of("wiki_loss") == of("eval_wiki_loss") == 3.0
    assert judged({"eval": {"loss": 4.0}}, EvalSection(metric="eval_loss")) == 4.0
    with pytest.raises(ValueError, match="'f1' is not logged .* accuracy, loss, .* books, wiki"):
        of("f1")


def test_metrics_are_known_before_anything_is_computed():
    graph, params = nnx.split(Decoder(CFG, rngs=nnx.Rngs(0)))
    eval_fn, held_out = make_eval(alone(graph), lm_loss), rows(1.0, 1.0)
    shapes = jax.eval_shape(lambda x: x, nnx.to_pure_dict(params))
    names = metric_names(eval_fn, shapes, {}, held_out, 2)
    arguments = {"mesh": make_mesh(MeshSection(), jax.devices()[:1]), "batch_size": 2}
    assert names == set(evaluate(eval_fn, nnx.to_pure_dict(params), {}, [held_out], **arguments))
