# SPDX-License-Identifier: Apache-2.0
"""Losses of routers: against transformers, and the same however the rows are divided."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from runs import MODEL, arguments, command, killed, lines_of
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_file_torch
from steps import (
    TINY,
    WHOLE,
    assert_same_trajectory,
    decoder,
    pair_rows,
    ragged_rows,
    trajectory,
    unpacked,
    unpacked_slots,
)
from tiny import V, as_saved, hf_config, magnified, one_device
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import (
    router_z_loss_func,
)

from jaxllm.cli import main
from jaxllm.config import MeshSection, ModelSection, PeftSection, TrainConfig
from jaxllm.config.checks import resolve
from jaxllm.data.batch import Batch, make_row
from jaxllm.errors import UserError
from jaxllm.hf import hf_tensors, load_hf, save_hf
from jaxllm.mesh import make_mesh
from jaxllm.model.config import Experts, LayerKind, Rope
from jaxllm.objectives.dpo import dpo_loss
from jaxllm.objectives.lm import forward, lm_loss
from jaxllm.objectives.table import Objective, make_objective
from jaxllm.optim import eval_params
from jaxllm.program import build

SHAPE = replace(
    TINY,
    family="minimax_m2",
    ropes=(Rope(),),
    kinds=(LayerKind(),),
    layer_kinds=(),
    num_layers=2,
    experts=Experts(8, 2, 16, "sigmoid", has_bias=True, shared_size=48),
)
ROUTERS = {"balance_loss": 0.3, "router_z_loss": 0.05}
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "minimax_m2"]


@pytest.mark.parametrize("real", [24, 17], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_of_one_text_equal_transformers(tmp_path, family, real):
    """In minimax_m2 transformers counts choices without the bias, so that is 0 here."""
    theirs = magnified(hf_config(family) | {"router_aux_loss_coef": 0.3})
    for name, buffer in theirs.named_buffers():
        buffer.mul_(not name.endswith("correction_bias"))
    theirs.save_pretrained(tmp_path)
    graph, weights = nnx.split(load_hf(str(tmp_path), mesh=one_device()), nnx.Param)
    tokens = np.random.default_rng(0).integers(0, V, real)
    row = make_row([(tokens, np.ones(real, np.float32))], 24)
    batch = Batch(**{name: jnp.asarray(x)[None] for name, x in row.items()})

    @jax.jit
    def run(weights):
        def total(weights):
            loss, weight, metrics = lm_loss(nnx.merge(graph, weights), batch, None)
            aux = {name: metrics[name][0] / metrics[name][1] for name in ROUTERS}
            return loss / weight + sum(ROUTERS[name] * aux[name] for name in ROUTERS), aux

        return jax.value_and_grad(total, has_aux=True)(weights)

    (loss, aux), grads = run(weights)
    ids, mask = torch.from_numpy(row["tokens"])[None].long(), torch.arange(24)[None] < real
    labels = torch.where(mask, ids, -100)
    out = theirs(ids, attention_mask=mask.long(), labels=labels, output_router_logits=True)
    logits = torch.stack([logits[mask[0]] for logits in out.router_logits])
    z_loss = router_z_loss_func(logits)
    want = out.loss + ROUTERS["router_z_loss"] * z_loss
    want.backward()
    top_k, experts = theirs.config.num_experts_per_tok, logits.shape[-1]
    alone = load_balancing_loss_func(tuple(logits), experts, top_k)
    assert float(aux["balance_loss"]) == pytest.approx(out.aux_loss.item(), abs=1e-5)
    assert float(aux["balance_loss"]) == pytest.approx(alone.item(), abs=1e-5)
    assert float(aux["router_z_loss"]) == pytest.approx(z_loss.item(), rel=1e-5)
    assert float(loss) == pytest.approx(want.item(), abs=1e-5)
    gradients = as_saved(theirs, {n: p.grad for n, p in theirs.named_parameters()})
    seen = {t.name: t.read() for t in hf_tensors(nnx.merge(graph, grads))}
    for path, gradient in gradients.items():
        scale = 1e-5 * max(1, gradient.abs().max().item())
        np.testing.assert_allclose(seen[path], gradient.numpy(), rtol=0, atol=scale, err_msg=path)


def test_the_balance_loss_of_several_texts_is_the_mean_over_their_tokens():
    model, rows = decoder(shape=SHAPE), ragged_rows(4)
    of = nnx.jit(lambda model, batch: forward(model, batch).aux)
    aux = of(model, Batch(**{k: jnp.asarray(v) for k, v in rows.items()}))
    single, total = unpacked(rows), 0.0
    for r in range(len(single["tokens"])):
        one = of(model, Batch(**{k: jnp.asarray(v[r : r + 1]) for k, v in single.items()}))
        total += float(one["balance_loss"][0])
        assert one["balance_loss"][1] == (single["segment_ids"][r] > 0).sum()
    assert float(aux["balance_loss"][0]) == pytest.approx(total, rel=1e-5)
    tokens = (rows["segment_ids"] > 0).sum()
    loads = aux["expert_load"][0]["layers"]
    assert loads.shape == (2, 8) and loads.sum(1).tolist() == [2 * tokens] * 2
    assert 0 < float(aux["router_entropy"][0]) / tokens < np.log(8)


def test_even_routing_has_the_least_losses():
    """Zero weights give equal logits: entropy log E, z-loss log² E, P = 1 / E."""
    model = decoder(shape=SHAPE)
    model.layers.mlp.router.set_value(jnp.zeros_like(model.layers.mlp.router.get_value()))
    batch = Batch(**{k: jnp.asarray(v) for k, v in ragged_rows(2).items()})
    aux = forward(model, batch).aux
    values = {n: float(aux[n][0] / aux[n][1]) for n in aux if n != "expert_load"}
    want = {"balance_loss": 2, "router_z_loss": np.log(8) ** 2, "router_entropy": np.log(8)}
    assert values == pytest.approx(want, rel=1e-5)


@pytest.fixture(scope="module")
def alone():
    return trajectory(ragged_rows(16), shape=SHAPE, routers=ROUTERS)[:2]


WAYS = {
    "micro-batches and remat": (ragged_rows(16), {"count": 4, "remat": "full"}),
    "one text a row": (unpacked(ragged_rows(16)), {"remat": "dots"}),
    "fsdp 2 x tensor 2 x data 2": (
        ragged_rows(16),
        {"devices": 8, "mesh": MeshSection(data=2, fsdp=2, tensor=2), "count": 2},
    ),
    "fsdp 2 x context 4": (ragged_rows(16), {"devices": 8, "mesh": MeshSection(context=4)}),
    "zero 1": (ragged_rows(16), {"devices": 8, "mesh": MeshSection(fsdp=8, zero=1)}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_division_of_an_update_changes_nothing(alone, way):
    rows, options = WAYS[way]
    losses, norms, *_ = trajectory(rows, shape=SHAPE, routers=ROUTERS, **options)
    assert_same_trajectory(losses, alone[0])
    assert_same_trajectory(norms, alone[1], rtol=2e-5)


def test_the_losses_are_added_to_the_mean_loss(alone):
    plain = trajectory(ragged_rows(16), shape=SHAPE, steps=1)[0][0]
    model = decoder(shape=SHAPE)
    aux = forward(model, Batch(**{k: jnp.asarray(v) for k, v in ragged_rows(16).items()})).aux
    added = sum(float(ROUTERS[n] * aux[n][0] / aux[n][1]) for n in ROUTERS)
    assert alone[0][0] == pytest.approx(plain + added, rel=1e-5) and added > 0.1


@pytest.mark.sweep
def test_pairs_of_answers_have_the_losses_too():
    objective = Objective(dpo_loss, compares=True)
    rows, keys = pair_rows(16), dict(shape=SHAPE, objective=objective, routers=ROUTERS)
    losses, norms, *_ = trajectory(rows, **keys)
    assert losses[0] > np.log(2) + 0.1
    single = unpacked_slots(rows)
    single = {k: np.concatenate([v, np.zeros_like(v[: -len(v) % 4])]) for k, v in single.items()}
    for way in (rows, single):
        found = trajectory(way, count=4, **keys)
        np.testing.assert_allclose(found[0], losses, rtol=2e-5)
        np.testing.assert_allclose(found[1], norms, rtol=2e-5)


# ---- the bias


def test_the_bias_moves_by_the_sign_of_the_load_and_by_nothing_else():
    """Also where the optimizer averages weights, and however the update is divided."""
    rows = ragged_rows(16)
    model = decoder(shape=SHAPE)
    aux = forward(model, Batch(**{k: jnp.asarray(v) for k, v in rows.items()})).aux
    load = np.asarray(aux["expert_load"][0]["layers"])
    want = 0.01 * np.sign(load.mean(1, keepdims=True) - load)
    assert (want > 0).any() and (want < 0).any()
    for options in (
        {},
        {"count": 4, "optimizer": "schedule_free_adamw"},
        {"devices": 8, "mesh": MeshSection(data=2, fsdp=2, tensor=2), "optimizer": "muon"},
        {"devices": 8, "mesh": MeshSection(context=4), "optimizer": "lion"},
    ):
        _, _, state, _ = trajectory(
            rows, shape=SHAPE, steps=1, routers={"router_bias_rate": 0.01}, **options
        )
        weights = eval_params(state.opt_state, state.trainable)
        bias = weights["layers"]["mlp"]["choice_bias"]
        np.testing.assert_allclose(bias, want, atol=1e-7)
        paths = [str(path) for path, _ in jax.tree.leaves_with_path(state.opt_state)]
        assert any("router" in path for path in paths)
        assert not any("choice_bias" in path for path in paths)


@pytest.mark.parametrize(
    "mesh",
    [MeshSection(data=2, fsdp=2, tensor=2), MeshSection(context=4)],
    ids=["tensor", "context"],
)
def test_routers_of_several_stacks_have_losses_and_biases(mesh):
    layers = dict(num_layers=5, kinds=(LayerKind(dense=True), LayerKind()))
    shape = replace(SHAPE, **layers, layer_kinds=(0, 0, 1, 0, 1))
    stacks = [name for name, places in shape.stacks.items() if places[0] in (2, 4)]
    options = {"shape": shape, "routers": ROUTERS | {"router_bias_rate": 0.01}}
    losses, norms, alone, _ = trajectory(ragged_rows(16), **options)
    over = trajectory(ragged_rows(16), devices=8, mesh=mesh, remat="full", count=2, **options)
    assert_same_trajectory(over[0], losses)
    assert_same_trajectory(over[1], norms, rtol=2e-5)
    assert stacks
    for name in stacks:
        bias = alone.trainable[name]["mlp"]["choice_bias"]
        assert np.abs(bias).max() >= 0.01
        np.testing.assert_allclose(over[2].trainable[name]["mlp"]["choice_bias"], bias, atol=1e-7)


def test_the_bias_balances_the_load():
    rows, loads = ragged_rows(16), []
    for steps in (1, 40):
        kept = {}
        trajectory(rows, shape=SHAPE, steps=steps, routers={"router_bias_rate": 0.02}, metrics=kept)
        loads.append(float(kept["max_expert_load"][0]))
    assert loads[0] > 1.5 and loads[1] < 1.2


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3"])
def test_a_rate_needs_a_bias(tmp_path, family):
    words = {"qwen3_moe": "the routers of qwen3_moe have no bias; use model.balance_loss"}
    words |= {"qwen3": "is for mixtures of experts; this model has none"}
    with pytest.raises(UserError, match=f"model.router_bias_rate.*{words[family]}"):
        program(tmp_path, family=family, router_bias_rate=0.001)


def test_a_rate_needs_a_base_that_is_trained(tmp_path):
    peft = PeftSection(method="lora", target_modules=("q_proj",))
    with pytest.raises(UserError, match="router_bias_rate: an adapter's base is not trained"):
        program(tmp_path, family="minimax_m2", router_bias_rate=0.001, peft=peft)


# ---- runs


def program(tmp_path, family="qwen3_moe", config=(), peft=WHOLE, mesh=None, **model):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(family) | dict(config)))
    section = ModelSection(config=str(tmp_path / "config.json"), **model)
    cfg = TrainConfig(model=section, batch_size=4, micro_batch_size=2, peft=peft)
    return build(resolve(cfg, 1), mesh or one_device())


@pytest.mark.parametrize(("family", "experts"), [("qwen3", 2), ("qwen3_moe", 3)])
def test_experts_that_a_mesh_cannot_divide_are_refused(tmp_path, family, experts):
    seen = {"qwen3": "no experts", "qwen3_moe": "8 experts, which do not divide by it"}[family]
    mesh = make_mesh(MeshSection(expert=experts), jax.devices()[:experts])
    with pytest.raises(UserError, match=f"mesh.expert is {experts}; this model has {seen}; change"):
        program(tmp_path, family=family, mesh=mesh)


def test_the_weight_of_the_loss_takes_no_forward_pass(tmp_path):
    """It is computed before the gradients; XLA leaves out what it does not depend on."""

    def flops(routers):
        made = program(tmp_path, **routers)
        step = made.step(10).lower(made.state, made.frozen, made.batch(24)).compile()
        return step.cost_analysis()["flops"]

    without = flops({})
    assert without < flops(ROUTERS) < 1.02 * without


@pytest.mark.parametrize(
    ("config", "given", "want"),
    [
        ({}, None, 0.0),
        ({"output_router_logits": True}, None, 0.001),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.02}, None, 0.02),
        ({"output_router_logits": True}, 0.0, 0.0),
        ({"router_aux_loss_coef": 0.02}, 0.5, 0.5),
    ],
)
def test_the_default_coefficient_is_what_transformers_adds(tmp_path, config, given, want):
    assert program(tmp_path, config=config, balance_loss=given).cfg.model.balance_loss == want


@pytest.mark.parametrize("key", ROUTERS)
def test_a_dense_model_has_no_routers(tmp_path, key):
    with pytest.raises(UserError, match=f"model.{key} is for mixtures of experts; this model has"):
        program(tmp_path, family="qwen3", **{key: 0.1})
    assert program(tmp_path, family="qwen3").cfg.model.balance_loss == 0


def test_an_objective_of_ones_own_needs_the_metrics_of_routers(tmp_path):
    made = program(tmp_path, balance_loss=0.1)

    def own(keep, model, batch, rng, reference):
        out = forward(model, batch, rng)
        return jnp.sum(out.x), jnp.float32(1), out.aux if keep else {}

    for keep in (True, False):
        replaced = make_objective(made.cfg, partial(own, keep))
        step = replace(made, objective=replaced).step(10)
        args = made.state, made.frozen, made.batch(24)
        if keep:
            assert "max_expert_load" in jax.eval_shape(step, *args)[1]
        else:
            with pytest.raises(UserError, match=r"balance_loss needs the metrics of .*aux"):
                jax.eval_shape(step, *args)


def test_an_export_keeps_the_bias_in_float32(tmp_path):
    magnified(hf_config("minimax_m2")).save_pretrained(tmp_path / "base")
    model = load_hf(str(tmp_path / "base"), mesh=one_device(), dtype="bfloat16")
    bias = model.layers.mlp.choice_bias
    bias.set_value(3 + 0.001 * jnp.arange(bias.get_value().size).reshape(bias.get_value().shape))
    save_hf(model, str(tmp_path / "saved"))
    saved = load_file_torch(tmp_path / "saved/model.safetensors")
    for layer, row in enumerate(bias[...]):
        one = saved[f"model.layers.{layer}.block_sparse_moe.e_score_correction_bias"]
        np.testing.assert_array_equal(one.numpy(), row)
    assert saved["model.norm.weight"].dtype == torch.bfloat16
    again = load_hf(str(tmp_path / "saved"), mesh=one_device(), dtype="bfloat16")
    np.testing.assert_array_equal(again.layers.mlp.choice_bias[...], bias[...])


MINIMAX = MODEL | {
    "model_type": "minimax_m2",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


@pytest.mark.sweep
def test_a_killed_run_resumes_with_the_same_bias_and_exports_it(project):
    (project / "model.json").write_text(json.dumps(MINIMAX))
    flags = ("--model.router_bias_rate", "0.01", "--model.balance_loss", "0.02")
    assert main(arguments(project, "pretrain", "straight", *flags)) == 0
    killed(command(project, "pretrain", "killed", *flags), project / "killed")
    assert main(arguments(project, "pretrain", "killed", *flags)) == 0
    lines = [lines_of(project / name) for name in ("straight", "killed")]
    for name in ("loss", "balance_loss", "router_z_loss", "router_entropy", "max_expert_load"):
        values = [line[name] for line in lines[0].values()]
        assert len(values) == 12 and all(np.isfinite(values))
        assert values == [line[name] for line in lines[1].values()]
    straight, resumed = (
        load_file(project / name / "final/model.safetensors") for name in ("straight", "killed")
    )
    for name in straight:
        np.testing.assert_array_equal(straight[name], resumed[name])
    bias = straight["model.layers.1.block_sparse_moe.e_score_correction_bias"]
    assert np.abs(bias).max() >= 0.02  # of 12 steps that move it by 0.01
