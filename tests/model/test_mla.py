# SPDX-License-Identifier: Apache-2.0
"""Latent attention: its two forms, packed rows, remat, several devices, adapters, and FLOPs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import (
    MESHES,
    TINY,
    batch_of,
    decoder,
    ragged_rows,
    same_lora_over_mesh,
    same_over_mesh,
    trajectory,
    unpacked,
)

from jaxllm.config import MeshSection, PeftSection
from jaxllm.data.batch import Batch
from jaxllm.errors import UserError
from jaxllm.mesh import make_mesh, put
from jaxllm.model.cache import Cache
from jaxllm.model.config import Latent, LayerKind, Rope
from jaxllm.model.stack import unstack
from jaxllm.monitor.flops import forward_flops
from jaxllm.objectives.lm import lm_loss
from jaxllm.ops.quantized import Quantized
from jaxllm.sampling import Sampling, generate

LOW = replace(
    TINY,
    family="minicpm3",
    ropes=(Rope(),),
    kinds=(LayerKind(),),
    layer_kinds=(),
    num_layers=2,
    num_kv_heads=4,
    qkv_bias=True,
    latent=Latent(kv_rank=24, nope_dim=12, value_dim=10, q_rank=16),
)
DIRECT = replace(LOW, latent=replace(LOW.latent, q_rank=0), rope_pairs="neighbours")
ALL = ("all-linear",)
SECTIONS = {
    "whole": PeftSection(),
    "lora": PeftSection(method="lora", r=4, target_modules=ALL),
    "dora": PeftSection(method="lora", r=4, target_modules=ALL, use_dora=True),
    "pissa": PeftSection(method="lora", r=4, target_modules=ALL, init_lora_weights="pissa"),
    "prompt": PeftSection(method="prompt", num_virtual_tokens=3),
}


def changed(section, **options):
    """A model whose adapter is far from its start."""
    model = decoder(section, **options)
    if model.peft.frozen:
        noise = iter(jax.random.split(jax.random.key(3), 100))
        for _, v in nnx.to_flat_state(nnx.state(model, model.peft.trains)):
            v.set_value(v.get_value() + 0.3 * jax.random.normal(next(noise), v.get_value().shape))
    return model


@pytest.fixture(scope="module")
def alone():
    return trajectory(ragged_rows(16), shape=LOW)[:2]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_remat_and_micro_batches_change_nothing(alone, mesh):
    attn = same_over_mesh(mesh, LOW, *alone)["layers"]["attn"]
    section = MESHES[mesh]
    for name in ("q_a", "q_b", "kv_a", "kv_b", "o"):
        kernel = attn[name]["kernel"]
        parts = section.fsdp * (1 if name.endswith("_a") else section.tensor)  # heads are split
        assert kernel.addressable_shards[0].data.size * parts == kernel.size, name


def test_an_evaluation_over_a_mesh_equals_that_of_one_device():
    graph, params = nnx.split(decoder(shape=LOW))

    @jax.jit
    def loss(params, batch):
        return lm_loss(nnx.merge(graph, params), batch, None)[0]

    found = []
    for section, devices in ((MeshSection(), 1), (MESHES["data 2 x fsdp 2 x tensor 2"], 8)):
        mesh = make_mesh(section, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            found.append(float(loss(params, Batch(**put(mesh, ragged_rows(8))))))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("name", ["whole", "prompt"])
def test_packed_rows_equal_rows_of_one_text(name):
    model, rows = changed(SECTIONS[name], shape=LOW), ragged_rows(6)
    loss = nnx.jit(lambda model, batch: lm_loss(model, batch, None)[:2])
    packed, single = loss(model, batch_of(rows)), loss(model, batch_of(unpacked(rows)))
    assert [float(x) for x in packed] == pytest.approx([float(x) for x in single], rel=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_lora_over_quantized_projections_does_not_depend_on_the_mesh(kind):
    keys = dict(shape=LOW, section=SECTIONS["lora"], quantize_base=kind)
    trained, frozen = same_lora_over_mesh(**keys)
    assert {"q_a", "q_b", "kv_a", "kv_b", "o"} == set(trained["layers"]["attn"])
    assert isinstance(frozen["layers"]["attn"]["kv_b"]["kernel"], Quantized)


@nnx.jit
def read(model, tokens, cache):
    """A static cache.length would be the expanded form; here it is traced."""
    out = model.hidden(tokens, cache=cache)
    return model.logits(out.x), out.cache


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "stacked") for name in [*SECTIONS, "int8", "direct"]), ("dora", "unstacked")],
)
def test_the_absorbed_form_equals_the_expanded_one(name, layout):
    """Several tokens at once, then one by one, in a cache with slots to spare."""
    section = SECTIONS.get(name, SECTIONS["lora"])
    kind = "int8" if name == "int8" else "none"
    model = changed(section, shape=DIRECT if name == "direct" else LOW, quantize_base=kind)
    tokens = np.asarray(ragged_rows(2)["tokens"][:, :12])
    want = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    model = model if layout == "stacked" else unstack(model)
    cache, parts = model.empty_cache(2, 16), []
    for start, stop in ((0, 5), *((i, i + 1) for i in range(5, 12))):
        logits, cache = read(model, tokens[:, start:stop], cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=0, atol=1e-4)


def test_adapters_are_weighted_by_row_in_the_absorbed_form():
    model = changed(SECTIONS["lora"], shape=LOW)
    tokens, weights = jnp.asarray(ragged_rows(2)["tokens"][:, :6]), jnp.asarray([[0.0], [1.7]])
    want = model.hidden(tokens, adapter_weights=weights).x
    cache = replace(model.empty_cache(2, 8), length=jnp.int32(0))
    got = model.hidden(tokens, cache=cache, adapter_weights=weights).x
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_the_cache_has_a_latent_and_one_rotated_key_for_each_token():
    cache = Cache.empty(LOW, 3, 7, jnp.float32)
    sizes = sum(x.size for x in jax.tree.leaves(cache.layers))
    assert sizes == LOW.num_layers * 3 * 7 * (24 + 8)


@pytest.mark.parametrize("name", ["whole", "lora", "prompt"])
def test_generation_equals_the_full_forward_pass(name):
    model = changed(SECTIONS[name], shape=LOW)
    forward = nnx.jit(lambda model, tokens: model(tokens))
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12]]
    for prompt, new in zip(prompts, generate(model, prompts, Sampling(8)), strict=True):
        tokens = np.asarray(prompt + new)[None]
        want = np.asarray(forward(model, tokens)).argmax(-1)[0, len(prompt) - 1 : -1]
        np.testing.assert_array_equal(new, want)


def test_prefix_tuning_is_refused():
    with pytest.raises(UserError, match="prefix.*latent attention.*method prompt"):
        decoder(PeftSection(method="prefix", num_virtual_tokens=3), shape=LOW)


@pytest.mark.parametrize("shape", [LOW, DIRECT], ids=["low rank", "direct"])
def test_flops_are_those_that_xla_counts(shape):
    """Of layers that are not in a loop, and of attention in one block, which computes all keys."""
    latent = replace(shape.latent, kv_rank=96, nope_dim=64, value_dim=48)
    cfg = replace(shape, hidden_size=256, intermediate_size=384, head_dim=32, latent=latent)
    T = 64
    weights, attention, head = forward_flops(cfg, T)
    want = T * (weights + head + attention * 2 * T / (T + 1))
    model = nnx.eval_shape(lambda: unstack(decoder(shape=cfg)))
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    cost = forward.lower(state, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(want, rel=0.03)
