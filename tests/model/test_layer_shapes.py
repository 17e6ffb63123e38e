# SPDX-License-Identifier: Apache-2.0
"""Layers that have sizes, embeddings or no keys and values of their own, however they are run."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import (
    EXPERT_MESHES,
    MESHES,
    TINY,
    T,
    V,
    batch_of,
    decoder,
    ragged_rows,
    same_over_mesh,
    trajectory,
    unpacked,
)

from jaxllm.config import PeftSection
from jaxllm.errors import UserError
from jaxllm.model.cache import Cache
from jaxllm.model.config import Experts, LayerEmbeds, LayerKind
from jaxllm.model.stack import unstack
from jaxllm.monitor.flops import forward_flops
from jaxllm.objectives.lm import lm_loss
from jaxllm.sampling import Sampling, generate

# The last three layers use the keys and values of the first two.
SLIDING, FULL = LayerKind(1, 9), LayerKind(0, head_dim=16, num_kv_heads=1, values_from_keys=True)
KINDS = (
    replace(SLIDING, keeps=1),
    replace(FULL, keeps=2),
    replace(SLIDING, uses=1, intermediate_size=96),
    LayerKind(0, head_dim=16, uses=2, intermediate_size=96),
)
SHAPE = replace(
    TINY,
    family="gemma4_text",
    num_layers=5,
    kinds=KINDS,
    layer_kinds=(0, 1, 2, 2, 3),
    norm_eps=1e-3,
    norm_placement="sandwich",
    qk_norm="head",
    value_norm=True,
    layer_scale=True,
    layer_embeds=LayerEmbeds(16, V),
)
EXPERTS = replace(
    SHAPE,
    num_layers=4,
    kinds=(SLIDING, FULL),
    layer_kinds=(0, 1, 0, 1),
    layer_embeds=None,
    experts=Experts(count=8, top_k=3, size=16, shared_size=64, branch=True),
)
LORA = PeftSection(method="lora", target_modules=("all-linear",), r=3)
LORA_OF_EXPERTS = PeftSection(
    method="lora",
    target_modules=("router.proj",),
    target_parameters=("experts.gate_up_proj", "experts.down_proj"),
    r=3,
)


def test_a_layer_without_keys_has_neither_their_weights_nor_a_cache():
    assert [*SHAPE.stacks.values()] == [range(1), range(1, 2), range(2, 4), range(4, 5)]
    model = decoder(shape=SHAPE)
    assert model.layers_2.attn.k is model.layers_2.attn.v is model.layers_2.attn.k_norm is None
    assert model.layers_1.attn.v is None and model.layers_1.attn.k.kernel.shape == (1, 32, 16)
    caches = Cache.empty(SHAPE, 2, 8, jnp.float32).layers
    assert [cache and cache.k.shape for cache in caches[1:]] == [(1, 2, 1, 16, 8), None, None]


@pytest.fixture(scope="module", params=[SHAPE, EXPERTS], ids=["keys of others", "experts"])
def alone(request):
    return request.param, *trajectory(ragged_rows(16), shape=request.param)[:3]


@pytest.mark.parametrize("mesh", ["fsdp 8", "data 2 x fsdp 2 x tensor 2"])
def test_a_mesh_changes_nothing(alone, mesh):
    cfg, *want, _ = alone
    same_over_mesh(mesh, cfg, *want)


@pytest.mark.sweep
@pytest.mark.parametrize("mesh", EXPERT_MESHES)
@pytest.mark.parametrize("alone", [EXPERTS], indirect=True, ids=["experts"])
def test_experts_beside_an_mlp_are_divided_among_devices(alone, mesh):
    cfg, *want, _ = alone
    mlp = same_over_mesh(mesh, cfg, *want)["layers_0"]["mlp"]
    for weight in (mlp["scale"], mlp["gate"]["kernel"]):
        assert weight.addressable_shards[0].data.shape[1] * EXPERT_MESHES[mesh].expert == 8


@pytest.mark.parametrize("remat", ["full", "names"])
def test_remat_changes_nothing(alone, remat):
    cfg, *want, _ = alone
    found = trajectory(ragged_rows(16), shape=cfg, remat=remat)
    np.testing.assert_allclose(found[0], want[0], rtol=2e-5)
    np.testing.assert_allclose(found[1], want[1], rtol=1e-4)


def test_packed_rows_equal_rows_of_one_text():
    model, rows = decoder(shape=SHAPE), ragged_rows(6)
    loss = nnx.jit(lambda model, batch: lm_loss(model, batch, None)[:2])
    packed, single = loss(model, batch_of(rows)), loss(model, batch_of(unpacked(rows)))
    assert [float(x) for x in packed] == pytest.approx([float(x) for x in single], rel=1e-6)


def test_training_leaves_the_scalars_of_layers_as_they_are(alone):
    cfg, *_, state = alone
    for stack in cfg.stacks:
        assert (np.asarray(state.trainable[stack]["scalar"]) == 1).all()
        assert (np.asarray(state.trainable[stack]["mlp_norm"]["scale"]) != 1).any()


@nnx.jit
def _logits(model, tokens, segment_ids):
    return model(tokens, segment_ids)


@pytest.mark.parametrize("base", ["none", "nf4"])
def test_decoding_with_lora_equals_the_whole_forward_pass(base):
    """Unstacked, through the cache; the adapter's weights are random."""
    model = decoder(LORA, shape=SHAPE, quantize_base=base)
    paths = {target.path for target in model.peft.targets}
    assert {"layers_2.attn.q", "layers_2.embed.gate", "layer_embeds.project"} <= paths
    assert not {"layers_2.attn.k", "layers_1.attn.v", "layer_embeds.table"} & paths
    rng = np.random.default_rng(0)
    _, adapted, _ = nnx.split(model, model.peft.trains, ...)
    noise = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape)), adapted)
    nnx.update(model, jax.tree.map(lambda x, n: (x + n).astype(x.dtype), adapted, noise))
    prompts = [rng.integers(0, V, n).tolist() for n in (9, 4)]
    for prompt, got in zip(prompts, generate(model, prompts, Sampling(6)), strict=True):
        tokens = list(prompt)
        for _ in range(6):
            row = np.pad(np.asarray(tokens), (0, T - len(tokens)))[None]
            ids = (np.arange(T) < len(tokens)).astype(np.int32)[None]
            tokens.append(int(_logits(model, row, ids)[0, len(tokens) - 1].argmax()))
        assert got == tokens[len(prompt) :]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("shape", "section", "mesh"),
    [
        (SHAPE, LORA, "data 2 x fsdp 2 x tensor 2"),
        (EXPERTS, LORA_OF_EXPERTS, "data 2 x fsdp 2 x tensor 2"),
        (EXPERTS, LORA_OF_EXPERTS, "expert 2 x tensor 2 x data 2"),
    ],
    ids=["keys of others", "experts", "divided experts"],
)
def test_lora_trains_alike_on_a_mesh(shape, section, mesh):
    want = trajectory(ragged_rows(16), section, shape=shape)
    assert want[0][-1] < want[0][0]
    mesh = (MESHES | EXPERT_MESHES)[mesh]
    found = trajectory(ragged_rows(16), section, shape=shape, devices=8, mesh=mesh)
    np.testing.assert_allclose(found[0], want[0], rtol=2e-5)
    np.testing.assert_allclose(found[1], want[1], rtol=1e-4)


def test_flops_of_such_layers_are_those_that_xla_counts():
    """Of layers that are not in a loop, and of attention in one block, which computes all keys."""
    kinds = tuple(
        replace(
            kind,
            window=None,
            head_dim=kind.head_dim and 64,
            intermediate_size=kind.intermediate_size and 768,
        )
        for kind in SHAPE.kinds
    )
    sizes = dict(hidden_size=256, intermediate_size=384, head_dim=32)
    cfg = replace(SHAPE, kinds=kinds, layer_embeds=LayerEmbeds(32, V), **sizes)
    length = 64
    weights, attention, head = forward_flops(cfg, length)
    want = length * (weights + head + attention * 2 * length / (length + 1))
    model = nnx.eval_shape(lambda: unstack(decoder(shape=cfg)))
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    cost = forward.lower(state, tokens).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(want, rel=0.03)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_are_refused(method):
    with pytest.raises(UserError, match=f"{method} adds keys and values of one shape.*use method"):
        decoder(PeftSection(method=method, num_virtual_tokens=3), shape=SHAPE)


def test_rows_are_not_split_along_context():
    mesh = MESHES["context 2 x tensor 2 x fsdp 2"]
    with pytest.raises(UserError, match="context.*layers that use the keys of others or embeddin"):
        trajectory(ragged_rows(16), shape=SHAPE, devices=8, mesh=mesh, steps=1)
