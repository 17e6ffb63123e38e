# SPDX-License-Identifier: Apache-2.0
"""A run as shapes: built without arrays, also for devices that are not attached; one update."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from steps import batch_of, decoder, ragged_rows

from jaxllm.config import (
    AlignSection,
    DataSection,
    ModelSection,
    OptimSection,
    PeftSection,
    RlSection,
    TrainConfig,
)
from jaxllm.config.checks import resolve, warnings
from jaxllm.errors import UserError
from jaxllm.mesh import AXES
from jaxllm.objectives.lm import lm_loss
from jaxllm.ops import conditional
from jaxllm.ops.conditional import update_if
from jaxllm.optim import make_schedule
from jaxllm.peft.virtual_tokens import context_length
from jaxllm.program import build
from jaxllm.step import TrainState, alone, make_step
from jaxllm.training import length_note

SHAPE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = {"gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite"}
LORA = PeftSection(method="lora")


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return ModelSection(config=str(tmp_path / "config.json"), compute_dtype="bfloat16")


def program_of(model, options, platform):
    """A run on eight devices that are not attached."""
    device = AbstractDevice(device_kind=KINDS[platform], num_cores=None, platform=platform)
    types = (AxisType.Auto,) * len(AXES)
    mesh = AbstractMesh((2, 2, 1, 1, 2), AXES, axis_types=types, abstract_device=device)
    return build(resolve(TrainConfig(model=model, batch_size=8, **options), 4), mesh)


def lowered(model, options, platform):
    """The step of a run, lowered for eight devices that are not attached."""
    program = program_of(model, options, platform)
    with jax.sharding.use_abstract_mesh(program.mesh):
        traced = program.step(10).trace(program.state, program.frozen, program.batch(64, 2))
    return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))


def test_a_run_names_its_attention_kernel(tmp_path, model):
    """Rows of pairs are twice as long as data.max_length."""
    shape = SHAPE | {"model_type": "gemma2", "head_dim": 8, "sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    options = {"data": DataSection(max_length=40_000)}
    assert program_of(model, options, "tpu").summary()[0] == "attention: splash"
    note = program_of(model, options | {"objective": "reward"}, "tpu").summary()[0]
    assert note == (
        "attention: xla (layers have different windows and rows are longer than 65536 tokens)"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "pretrain"},
        {"objective": "sft", "peft": LORA},
        {"objective": "dpo"},
        {"objective": "dpo", "peft": LORA, "align": AlignSection(reference="precomputed")},
        {"objective": "ppo", "rl": RlSection(rewards=("m:f",), critic="separate")},
    ],
    ids=["pretrain", "LoRA", "DPO", "precomputed", "PPO"],
)
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_program_lowers_for_devices_that_are_not_attached(model, options, platform):
    text = lowered(model, options, platform).as_text()
    assert "LayoutConstraint" not in text and "xui16>" not in text


@pytest.mark.parametrize("objective", ["pretrain", "reward", "dpo"])
def test_each_part_of_a_step_has_a_named_scope(model, objective):
    text = lowered(model, {"objective": objective}, "tpu").as_text(debug_info=True)
    paths = re.findall(r'loc\("([^"]*)"', text)
    scopes = {name for path in paths for name in re.split(r"[/()]", path)}
    assert {"embed", "attention", "mlp", "head", "loss", "optimizer"} <= scopes


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_each_platform_has_its_form_of_a_conditional_update(platform, monkeypatch):
    monkeypatch.setattr(conditional, "platform", lambda: platform)

    def run(condition):
        old = ({"a": jnp.ones(2)}, jnp.zeros(1))
        return update_if(condition, lambda a, b, c: ({"a": a["a"] + c}, b + c), old, 2.0)

    run = jax.jit(run)
    (after, count), (kept, same) = run(jnp.bool(True)), run(jnp.bool(False))
    assert after["a"].tolist() == [3, 3] and count.tolist() == [2]
    assert kept["a"].tolist() == [1, 1] and same.tolist() == [0]
    primitives = {eqn.primitive.name for eqn in run.trace(jnp.bool(True)).jaxpr.eqns}
    assert ("cond" in primitives) == (platform == "cpu")


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_keeps_weights_and_optimizer_state(broken):
    graph, params = nnx.split(decoder())
    params = nnx.to_pure_dict(params)

    def objective(model, batch, rng, reference):
        loss, weight, metrics = lm_loss(model, batch, rng)
        hidden = model.embed.embedding[...]
        # The square root of 0 is finite, and its gradient is not.
        extra = jnp.nan * jnp.sum(hidden) if broken == "loss" else jnp.sqrt(jnp.sum(0 * hidden))
        return loss + extra, weight, metrics

    optimizer = optax.adamw(1e-3)
    step = jax.jit(make_step(alone(graph), objective, optimizer, lambda _: 1e-3))
    state = TrainState(jnp.int32(4), params, optimizer.init(params))
    after, metrics = step(state, {}, batch_of(ragged_rows(4), 2))
    norm = float(metrics["grad_norm"][0])
    assert not np.isfinite(norm)
    assert np.isfinite(float(metrics["loss"][0])) == (broken == "gradient")
    assert int(after.step) == 5
    for new, old in zip(jax.tree.leaves(after.trainable), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(new, old)
    for new, old in zip(
        jax.tree.leaves(after.opt_state), jax.tree.leaves(state.opt_state), strict=True
    ):
        np.testing.assert_array_equal(new, old)


# ---- data.max_length


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 64),
        ({"peft": PeftSection(method="prefix", num_virtual_tokens=20)}, 44),
        ({"objective": "grpo", "rl": RlSection(max_new_tokens=16)}, 48),
        ({"data": DataSection(max_length=32)}, 32),
    ],
)
def test_the_default_length_is_the_models_limit(model, options, length):
    program = program_of(model, options, "gpu")
    assert program.cfg.data.max_length == length
    given = replace(program.cfg, **options) if "data" in options else TrainConfig()
    said = f"data.max_length is {length}, the default; the model has 64 positions"
    assert length_note(given, program) == ([] if "data" in options else [said])


def test_the_default_length_is_at_most_1024(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"max_position_embeddings": 4096}))
    assert program_of(model, {}, "gpu").cfg.data.max_length == 1024


def test_a_model_without_room_for_a_prompt_is_an_error(model):
    program = program_of(model, {"objective": "grpo", "rl": RlSection(max_new_tokens=64)}, "gpu")
    with pytest.raises(UserError, match=r"1024 and rl\.max_new_tokens 64 together are over"):
        context_length(program.shape, program.adapter, program.cfg.data.length, 64)


# ---- the warmup


@pytest.mark.parametrize(
    ("optim", "end"),
    [
        (OptimSection(warmup=20), None),
        (OptimSection(warmup=0.5), None),
        (OptimSection(warmup=38), "50%"),
        (OptimSection(warmup=400, schedule="warmup_log"), "50%"),
    ],
)
def test_a_warmup_that_is_longer_than_the_run_is_said(optim, end):
    lines = list(warnings(TrainConfig(optim=optim), 20))
    assert len(lines) == (end is not None)
    rate = make_schedule(replace(optim, learning_rate=1.0), 20)
    if end:
        assert lines[0].endswith(
            f"and the run has 20, so the learning rate ends at {end} of its peak"
        )
        assert f"{float(rate(19)):.0%}" == end
