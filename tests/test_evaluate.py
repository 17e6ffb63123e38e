# SPDX-License-Identifier: Apache-2.0
"""Held-out loss counts every token once, by its weight."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from runs import arguments, lines_of

from jaxllm.best import Best, metric_value
from jaxllm.cli import main
from jaxllm.config import EvalSection
from jaxllm.data.batch import make_row
from jaxllm.evaluate import evaluate, evaluate_files, make_eval, metric_names
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


def test_an_objective_without_text_or_chats_is_refused():
    with pytest.raises(ValueError, match="objective is 'dpo'"):
        evaluate_files("anywhere", ["a.jsonl"], objective="dpo")


# A template with a variable of its own.
BRIEF = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' in brief' if brief }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant"
    "{{ ' in brief' if brief }}\n{% endif %}"
)


@pytest.fixture(scope="module")
def asked(project):
    """Questions with a context, as columns."""
    lines = (project / "few.jsonl").read_text().splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    file = project / "asked.jsonl"
    file.write_text(
        "".join(
            json.dumps({"question": q["content"], "answer": a["content"], "context": "of json"})
            + "\n"
            for q, a in turns
        )
    )
    return file


@pytest.mark.parametrize(
    "settings",
    [
        {"template": "brief.jinja", "template_kwargs": "{brief: true}"},
        {"user_template": "{context}: {question}"},
        {"system": "Answer with code."},
    ],
    ids=["variables", "user template", "system"],
)
def test_a_runs_held_out_loss_is_that_of_eval_on_its_model(settings, project, asked, capsys):
    (project / "brief.jinja").write_text(BRIEF)
    given = {k: str(project / v) if k == "template" else v for k, v in settings.items()}
    flags = [text for k, v in given.items() for text in (f"--data.{k}", v)]
    out = f"settings-{next(iter(settings))}"
    command = arguments(project, "sft", out, "--data.train", str(asked), "--data.eval", str(asked))
    assert main([*command, "--steps", "1", "--save.every", "0", *flags]) == 0
    (line,) = lines_of(project / out, "eval").values()
    capsys.readouterr()
    final = str(project / out / "final")
    command = ["eval", "--model", final, "--data", str(asked), "--chat", "--max_length", "64"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == line["tokens"] and found["examples"] > 10
    assert found["loss"] == pytest.approx(line["loss"], rel=1e-5)


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
        ([3, 2, 2.5], {"metric": "wikitext/bits_per_byte,first"}, 2, 1),
        ([3, 2, 2.5], {"metric": "a,b_loss"}, 2, 1),
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
        return metric_value(evals, EvalSection(metric=metric))

    assert of("loss") == of("eval_loss") == 2.0
    assert of("accuracy") == pytest.approx(0.3)
    assert of("wiki_loss") == of("eval_wiki_loss") == 3.0
    assert metric_value({"eval": {"loss": 4.0}}, EvalSection(metric="eval_loss")) == 4.0
    with pytest.raises(ValueError, match="'f1' is not logged .* accuracy, loss, .* books, wiki"):
        of("f1")


def test_metrics_are_known_before_anything_is_computed():
    graph, params = nnx.split(Decoder(CFG, rngs=nnx.Rngs(0)))
    eval_fn, held_out = make_eval(alone(graph), lm_loss), rows(1.0, 1.0)
    shapes = jax.eval_shape(lambda x: x, nnx.to_pure_dict(params))
    names = metric_names(eval_fn, shapes, {}, held_out, 2)
    arguments = {"mesh": make_mesh(MeshSection(), jax.devices()[:1]), "batch_size": 2}
    assert names == set(evaluate(eval_fn, nnx.to_pure_dict(params), {}, [held_out], **arguments))
