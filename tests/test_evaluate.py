# SPDX-License-Identifier: Apache-2.0
"""Held-out loss counts every token once, by its weight."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from runs import arguments, lines_of

from jaxllm.cli import main
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
