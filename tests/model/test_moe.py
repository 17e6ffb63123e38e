# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: packed rows, remat and several devices."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from steps import (
    EXPERT_MESHES,
    MESHES,
    TINY,
    T,
    assert_same_trajectory,
    batch_of,
    decoder,
    ragged_rows,
    same_lora_over_mesh,
    same_over_mesh,
    trajectory,
    unpacked,
)
from test_sampling import RAGGED, WARM, assert_same, completed

from jaxllm.config import MeshSection, PeftSection
from jaxllm.data.batch import Batch
from jaxllm.errors import UserError
from jaxllm.mesh import make_mesh, put
from jaxllm.model import moe
from jaxllm.model.config import Experts, LayerKind, Rope
from jaxllm.model.expert_axis import over_experts
from jaxllm.model.moe import route
from jaxllm.model.stack import unstack
from jaxllm.monitor.flops import forward_flops, unread_weights
from jaxllm.objectives.lm import lm_loss
from jaxllm.ops.grouped import grouped
from jaxllm.ops.quantized import Quantized
from jaxllm.peft.targets import adaptable_modules

PLAIN = replace(
    TINY,
    family="qwen3_moe",
    ropes=(Rope(),),
    kinds=(LayerKind(),),
    layer_kinds=(),
    num_layers=2,
    experts=Experts(count=8, top_k=3, size=16),
)
# Every feature at once.
SHARED = replace(
    PLAIN,
    family="minimax_m2",
    experts=Experts(8, 2, 16, "sigmoid", has_bias=True, shared_size=48, shared_gate=True),
)
GPT_OSS = replace(
    PLAIN,
    family="gpt_oss",
    sinks=True,
    kinds=(LayerKind(0, 9), LayerKind(0)),
    layer_kinds=(0, 1),
    experts=Experts(8, 3, 16, bias=True, limit=0.5),
)
LLAMA4 = replace(
    PLAIN,
    family="llama4_text",
    rope_pairs="neighbours",
    qk_norm="unit",
    chunked=True,
    ropes=(Rope(), Rope(kind="none", query_beta=0.3, query_shift=1, original_length=4)),
    kinds=(LayerKind(0, 5), LayerKind(1), LayerKind(0, 5, dense=True)),
    num_layers=4,
    layer_kinds=(0, 2, 1, 2),
    experts=Experts(8, 2, 16, "sigmoid", renormalised=False, on_input=True, shared_size=24),
)
LORA = PeftSection(method="lora", target_modules=("all-linear",))


@pytest.fixture(scope="module")
def alone():
    return trajectory(ragged_rows(16), shape=SHARED)[:2]


@pytest.mark.parametrize("mesh", [*MESHES, *EXPERT_MESHES])
def test_a_mesh_remat_and_micro_batches_change_nothing(alone, mesh):
    mlp = same_over_mesh(mesh, SHARED, *alone)["layers"]["mlp"]
    for name in ("gate", "up", "down"):
        kernel, section = mlp[name]["kernel"], (MESHES | EXPERT_MESHES)[mesh]
        parts = section.expert * section.fsdp * section.tensor
        assert kernel.addressable_shards[0].data.size * parts == kernel.size
    assert not mlp["choice_bias"].any()  # no gradient and no decay


def test_a_device_multiplies_its_part_of_the_features(monkeypatch):
    shapes = set()

    def seen(x, w, sizes):
        shapes.add(w.shape)
        return grouped(x, w, sizes)

    monkeypatch.setattr(moe, "grouped", seen)
    mesh = MESHES["data 2 x fsdp 2 x tensor 2"]
    trajectory(ragged_rows(8), shape=GPT_OSS, devices=8, mesh=mesh, steps=1)
    assert shapes == {(8, 32, 8), (8, 8, 32)}


@pytest.mark.parametrize(
    "mesh", ["fsdp 8", "context 2 x tensor 2 x fsdp 2", "expert 2 x tensor 2 x data 2"]
)
def test_a_mesh_changes_neither_sinks_nor_biases_of_experts(mesh):
    section = (MESHES | EXPERT_MESHES)[mesh]
    losses, norms, want, _ = trajectory(ragged_rows(16), shape=GPT_OSS)
    over = trajectory(ragged_rows(16), shape=GPT_OSS, devices=8, mesh=section, remat="full")
    assert_same_trajectory(over[0], losses)
    assert_same_trajectory(over[1], norms)
    layers, tensor, expert = over[2].trainable["layers"], section.tensor, section.expert
    want = want.trainable["layers"]
    vectors = [(layers["attn"]["sinks"], want["attn"]["sinks"], tensor)]
    for name, parts in (("gate", tensor * expert), ("up", tensor * expert), ("down", expert)):
        vectors.append((layers["mlp"][name]["bias"], want["mlp"][name]["bias"], parts))
    vectors.append((layers["mlp"]["router_bias"], want["mlp"]["router_bias"], 1))
    for ours, theirs, parts in vectors:
        assert ours.addressable_shards[0].data.size * parts == ours.size
        assert np.abs(theirs).min(-1).max() > 1e-3, "it was not trained"
        # Adam's first steps have the signs of the gradients, also of those that are almost 0.
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("mesh", ["fsdp 8", "expert 2 x context 2 x fsdp 2"])
def test_a_mesh_changes_neither_chunks_nor_weighted_inputs_of_experts(mesh):
    losses, norms, *_ = trajectory(ragged_rows(16), shape=LLAMA4)
    same_over_mesh(mesh, LLAMA4, losses, norms)


def test_the_logits_decide_where_sigmoids_are_rounded_to_1():
    experts = replace(LLAMA4.experts, count=4, top_k=1)
    weights, chosen = route(jnp.asarray([[40.0, 90.0, -3.0, 0.0]]), None, experts)
    assert chosen.tolist() == [[1]] and weights.tolist() == [[1.0]]


def test_flops_of_dense_layers_and_experts_are_those_that_xla_counts(monkeypatch):
    """Of layers that are not in a loop, of one expert, and of attention in one block, which
    computes all keys; `test_flops` has those of chunks."""
    monkeypatch.setattr(moe, "grouped", lambda x, w, sizes: x @ w[0])
    experts = replace(LLAMA4.experts, count=1, top_k=1, size=192, shared_size=192)
    cfg = replace(LLAMA4, hidden_size=256, intermediate_size=384, head_dim=32, experts=experts)
    T, kinds = 64, tuple(replace(kind, window=None) for kind in cfg.kinds)
    weights, attention, head = forward_flops(replace(cfg, kinds=kinds), T)
    want = T * (weights + head + attention * 2 * T / (T + 1))
    model = nnx.eval_shape(lambda: unstack(decoder(shape=cfg)))
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    cost = forward.lower(state, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize(
    "parts",
    [
        dict(latent_size=128),
        dict(latent_size=96, shared_size=192),
        dict(shared_size=192, shared_gate=True),
    ],
    ids=lambda parts: " ".join(parts),
)
def test_remat_computes_all_weights_again_but_those_that_no_gradient_reads(parts, monkeypatch):
    monkeypatch.setattr(moe, "grouped", lambda x, w, sizes: x @ w[0])
    experts = Experts(count=1, top_k=1, size=192, **parts)
    kinds = (LayerKind(mixer="none"),)
    cfg = replace(PLAIN, hidden_size=256, experts=experts, kinds=kinds, num_layers=1)
    flops = []
    for remat in ("none", "full"):
        made = partial(decoder, shape=cfg, remat=remat)
        graph, state = nnx.split(nnx.eval_shape(made))
        loss = jax.grad(lambda state, tokens, g=graph: jnp.sum(nnx.merge(g, state)(tokens) ** 2))
        tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
        flops.append(jax.jit(loss).lower(state, tokens).compile().cost_analysis()["flops"])
    weights = forward_flops(cfg, T)[0]
    again = T * (weights - 2 * unread_weights(cfg))
    assert flops[1] - flops[0] == pytest.approx(again, rel=0.04)


def test_an_evaluation_over_a_mesh_equals_that_of_one_device():
    """Outside of shard_over_rows, where axes of rows are automatic."""
    graph, params = nnx.split(decoder(shape=SHARED))

    @jax.jit
    def loss(params, batch):
        return lm_loss(nnx.merge(graph, params), batch, None)[0]

    found = []
    meshes = MESHES["data 2 x fsdp 2 x tensor 2"], EXPERT_MESHES["expert 2 x tensor 2 x data 2"]
    for section, devices in ((MeshSection(), 1), (meshes[0], 8), (meshes[1], 8)):
        mesh = make_mesh(section, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            found.append(float(loss(params, Batch(**put(mesh, ragged_rows(8))))))
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-6)


@pytest.mark.parametrize("choice", ["even", "one device's experts", "none of a device's"])
def test_no_token_is_dropped_however_the_experts_of_a_mesh_are_chosen(choice):
    """Also the gradients, of which one of two weights has none."""
    experts, tokens = 8, 24
    allowed = {"even": experts, "one device's experts": 2, "none of a device's": 6}[choice]
    keys = jax.random.split(jax.random.key(0), 5)
    chosen = jax.lax.top_k(jax.random.normal(keys[0], (tokens, allowed)), 2)[1]
    x, weights = jax.random.normal(keys[1], (tokens, 6)), jax.random.uniform(keys[2], (tokens, 2))
    kernels = {"w": jax.random.normal(keys[3], (experts, 6, 6)), "v": jnp.ones((experts, 6, 6))}

    def run(rows, weights, expert, sizes, kernels):
        out = jnp.tanh(grouped(rows, kernels["w"], sizes)) + grouped(rows, kernels["v"], sizes)
        return out * weights[:, None]

    def whole(x, weights, w):
        each = jnp.einsum("nd,edf->nef", x, w)
        out = jnp.tanh(each) + jnp.einsum("nd,edf->nef", x, kernels["v"])
        return jnp.sum(jnp.take_along_axis(out, chosen[..., None], 1) * weights[..., None], 1)

    mesh = make_mesh(MeshSection(fsdp=1, expert=4), jax.devices()[:4])

    @partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    def over(x, weights, chosen, w, v, g):
        """The outputs, and the gradients of a device's own arrays."""

        def own(x, weights, w):
            return over_experts(run, x, weights, chosen, {"w": w, "v": v})

        y, back = jax.vjp(own, x, weights, w)
        return y, *back(g)

    want, back = jax.vjp(whole, x, weights, kernels["w"])
    g = jnp.cos(want)
    found = jax.jit(over)(x, weights, chosen, kernels["w"], kernels["v"], g)
    for ours, theirs in zip(found, (want, *back(g)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.sweep
def test_completions_do_not_depend_on_where_the_experts_are():
    model, key = decoder(shape=replace(PLAIN, max_positions=128)), jax.random.key(4)
    mesh = make_mesh(EXPERT_MESHES["expert 4 x fsdp 2"])
    alone = completed(model, RAGGED, WARM, key=key)
    assert_same(completed(model, RAGGED, WARM, mesh, key), alone, 1e-4)


@pytest.mark.parametrize("shape", [PLAIN, GPT_OSS, LLAMA4], ids=lambda shape: shape.family)
def test_packed_rows_equal_rows_of_one_text(shape):
    model, rows = decoder(shape=shape), ragged_rows(6)
    loss = nnx.jit(lambda model, batch: lm_loss(model, batch, None)[:2])
    packed, single = loss(model, batch_of(rows)), loss(model, batch_of(unpacked(rows)))
    assert [float(x) for x in packed] == pytest.approx([float(x) for x in single], rel=1e-6)


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_lora_of_gpt_oss_adapts_attention(kind):
    trained, frozen = same_lora_over_mesh(shape=GPT_OSS, section=LORA, quantize_base=kind)
    names = {name.rpartition(".")[2] for name in adaptable_modules(GPT_OSS).values()}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "lm_head"}
    assert set(trained["layers"]) == {"attn"}
    kernel = frozen["layers"]["mlp"]["gate"]["kernel"]
    assert isinstance(kernel, Quantized) == (kind != "none")


@pytest.mark.parametrize("shape", [GPT_OSS, LLAMA4], ids=lambda shape: shape.family)
def test_lora_of_fused_experts_does_not_depend_on_the_mesh(shape):
    names = ("experts.gate_up_proj", "experts.down_proj", "router.weight")
    section = PeftSection(method="lora", target_modules=(), target_parameters=names)
    trained, _ = same_lora_over_mesh(shape=shape, section=section)
    stacks = [trained[name] for name in trained]
    assert all(set(stack["mlp"]) == {"gate_up", "down", "router_lora"} for stack in stacks)


def test_the_bias_changes_the_choice_and_not_the_weights():
    logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])
    experts = Experts(4, 2, 8, "sigmoid", has_bias=True, renormalised=False)
    weights, chosen = route(logits, jnp.asarray([-9.0, 0.0, 0.0, 9.0]), experts)
    assert chosen.tolist() == [[3, 1]]
    np.testing.assert_allclose(weights, jax.nn.sigmoid(jnp.asarray([[-1.0, 1.0]])), rtol=1e-6)
    softmax = replace(experts, score="softmax", renormalised=True)
    weights, chosen = route(jnp.zeros((1, 4)), None, softmax)
    assert chosen.tolist() == [[0, 1]] and weights.tolist() == [[0.5, 0.5]]  # the first of equals


@pytest.mark.parametrize(("best", "expert"), [(1, 0), (2, 2)])
def test_groups_are_chosen_by_their_best_or_their_two_best_experts(best, expert):
    """The first group has the best expert, the second the better two."""
    logits = jnp.log(jnp.asarray([[0.4, 0.05, 0.3, 0.25]]))
    experts = Experts(4, 1, 8, renormalised=False, groups=2, group_best=best)
    weights, chosen = route(logits, None, experts)
    assert chosen.tolist() == [[expert]]
    np.testing.assert_allclose(weights, [[jnp.exp(logits)[0, expert]]], rtol=1e-6)


def test_blocks_of_hidden_features_are_refused():
    with pytest.raises(UserError, match="mlp_blocks 2 is not possible: its MLP is a mixture"):
        decoder(shape=PLAIN, mlp_blocks=2)(np.zeros((1, T), np.int32))
