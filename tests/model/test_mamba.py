# SPDX-License-Identifier: Apache-2.0
"""State spaces in place of attention: their recurrence, packed rows, devices, decoding, FLOPs."""

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
    WHOLE,
    batch_of,
    decoder,
    ragged_rows,
    same_lora_over_mesh,
    same_over_mesh,
    trajectory,
    unpacked,
)
from test_delta import read

from jaxllm.config import PeftSection
from jaxllm.errors import UserError
from jaxllm.model import delta, moe
from jaxllm.model.cache import StateCache
from jaxllm.model.config import Experts, LayerKind, Mamba, Rope
from jaxllm.model.delta import carried
from jaxllm.model.mamba import state_space
from jaxllm.model.stack import unstack
from jaxllm.monitor.flops import forward_flops
from jaxllm.objectives.lm import lm_loss
from jaxllm.ops.quantized import Quantized

SHAPE = replace(
    TINY,
    family="granitemoehybrid",
    ropes=(Rope(), Rope(kind="none")),
    kinds=(LayerKind(1, mixer="mamba"), LayerKind(1)),
    layer_kinds=(0, 1, 0, 1),
    norm_eps=1e-1,  # a smaller one magnifies the roundings of small states
    residual_scale=0.5,
    mamba=Mamba(heads=8, head_dim=8, groups=2, state=12, taps=4, bias=True),
)
# Layers that are a mixer, experts, attention or an MLP alone.
ALONE = replace(
    SHAPE,
    family="nemotron_h",
    ropes=(Rope(kind="none"),),
    kinds=(
        LayerKind(mixer="mamba", mlp=False),
        LayerKind(mixer="none"),
        LayerKind(mlp=False),
        LayerKind(mixer="none", dense=True),
    ),
    num_layers=7,
    layer_kinds=(0, 1, 0, 1, 2, 3, 0),
    residual_scale=1.0,
    gated_mlp=False,
    activation="relu2",
    mamba=replace(SHAPE.mamba, least_step=0.2),
    experts=Experts(8, 2, 16, "sigmoid", has_bias=True, shared_size=24, latent_size=24),
)
SHAPES = pytest.mark.parametrize("shape", [SHAPE, ALONE], ids=lambda shape: shape.family)
LORA = PeftSection(method="lora", r=4, target_modules=("all-linear",))


def remembering(section=WHOLE, shape=SHAPE):
    """A model whose states outlast its rows, and in which every token changes its neighbours."""
    model = decoder(section, shape=shape)
    key = iter(jax.random.split(jax.random.key(3), 99))
    for path, v in nnx.to_flat_state(nnx.state(model)):
        x = v.get_value()
        if path[-1] in ("a_log", "dt_bias"):
            v.set_value(jax.random.normal(next(key), x.shape) - 2)
        elif path[-1] in ("conv", "conv_bias", "skip", "bias"):
            v.set_value(jax.random.normal(next(key), x.shape))
        elif model.peft.frozen and model.peft.trains(path, v):
            v.set_value(x + 0.3 * jax.random.normal(next(key), x.shape))
    return model


@pytest.mark.parametrize("length", [1, 150])
def test_chunks_equal_the_recurrence_token_by_token(length):
    rng, (B, G, H, N, P) = np.random.default_rng(0), (2, 2, 4, 8, 6)
    c, b = (rng.normal(size=(B, length, G, N)).astype(np.float32) for _ in range(2))
    v = rng.normal(size=(B, length, H, P)).astype(np.float32)
    log = -0.2 * rng.random((B, length, H)).astype(np.float32)
    state = rng.normal(size=(B, H, N, P)).astype(np.float32)
    segments = np.repeat([[1, 1, 2, 2, 0], [0, 3, 3, 4, 4]], -(-length // 5), 1)[:, :length]
    real = (segments != 0)[..., None]
    v, log = v * real[..., None], log * real
    got, last = jax.jit(state_space)(c, b, v, log, carried(jnp.asarray(segments)), state)
    for row in range(B):
        S, text = state[row].astype(np.float64), 0
        for t in range(length):
            if not segments[row, t]:
                continue
            S = 0 * S if text not in (0, segments[row, t]) else S
            text = segments[row, t]
            keys, queries = (np.repeat(x[row, t], H // G, 0) for x in (b, c))
            S = S * np.exp(log[row, t])[:, None, None] + keys[..., None] * v[row, t][:, None]
            want = np.einsum("hnp,hn->hp", S, queries)
            np.testing.assert_allclose(got[row, t], want, atol=5e-5, err_msg=str(t))
        np.testing.assert_allclose(last[row], S, atol=5e-5)


@SHAPES
def test_packed_rows_of_state_spaces_equal_rows_of_one_text(monkeypatch, shape):
    """In loss and gradients; texts begin and end within chunks."""
    monkeypatch.setattr(delta, "CHUNK", 8)
    model, rows = remembering(shape=shape), ragged_rows(6)
    loss = nnx.jit(nnx.value_and_grad(lambda model, batch: lm_loss(model, batch, None)[0]))
    (value, grads), (other, others) = (loss(model, batch_of(r)) for r in (rows, unpacked(rows)))
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(others))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * scale)


@SHAPES
def test_a_text_continues_from_the_state_wherever_it_is_cut(shape):
    """Also after padding, which changes nothing although the projections have biases."""
    model = remembering(LORA, shape)
    tokens = np.asarray(ragged_rows(2)["tokens"][:, :10])
    want = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    cache, parts = replace(model.empty_cache(2, 20), length=jnp.int32(0)), []
    assert isinstance(cache.layers[0], StateCache)
    assert cache.layers[0].state.shape == (2, 2, 8, 12, 8)
    assert (shape is ALONE) == (None in cache.layers)
    for start, stop, pad in ((0, 1, 0), (1, 6, 3), *((i, i + 1, 0) for i in range(6, 10))):
        given = np.pad(tokens[:, start:stop], ((0, 0), (0, pad)))
        ids = np.pad(np.ones((2, stop - start), np.int32), ((0, 0), (0, pad)))
        positions = np.broadcast_to(start + np.arange(stop - start + pad), ids.shape)
        logits, cache = read(model, given, ids, positions, cache)
        parts.append(logits[:, : stop - start])
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=0, atol=1e-4)


MESHES_OF = [(SHAPE, "fsdp 8"), (SHAPE, "data 2 x fsdp 2 x tensor 2")]
MESHES_OF += [(ALONE, mesh) for mesh in ("fsdp 8", "expert 2 x tensor 2 x data 2")]


@pytest.mark.sweep
@pytest.mark.parametrize(("shape", "mesh"), MESHES_OF)
def test_a_mesh_remat_and_micro_batches_change_no_state_space(shape, mesh):
    losses, norms, *_ = trajectory(ragged_rows(16), shape=shape)
    attn = same_over_mesh(mesh, shape, losses, norms)["layers_0"]["attn"]
    section = (MESHES | EXPERT_MESHES)[mesh]
    for name in ("gate", "x", "b", "c", "o"):
        kernel = attn[name]["kernel"]
        parts = section.fsdp * section.tensor
        assert kernel.addressable_shards[0].data.size * parts == kernel.size, name


@pytest.mark.sweep
@SHAPES
def test_lora_over_quantized_projections_does_not_depend_on_the_mesh(shape):
    trained, frozen = same_lora_over_mesh(shape=shape, section=LORA, quantize_base="int8")
    assert set(trained["layers_0"]["attn"]) == {"inputs"} | ({"o"} if shape is SHAPE else set())
    if shape is ALONE:
        names = {"up", "down", "router_lora", "shared", "inward", "outward"}
        assert set(trained["layers_1"]["mlp"]) == names
    assert isinstance(frozen["layers_0"]["attn"]["x"]["kernel"], Quantized)


def test_what_state_spaces_cannot_do_is_refused():
    with pytest.raises(UserError, match="peft.method prefix.*which the state spaces of this"):
        decoder(PeftSection(method="prefix", num_virtual_tokens=3), shape=SHAPE)
    mesh = MESHES["context 2 x tensor 2 x fsdp 2"]
    with pytest.raises(
        UserError, match="mesh.context 2 is not possible: state spaces do not support"
    ):
        trajectory(ragged_rows(8), shape=SHAPE, devices=8, mesh=mesh, steps=1)


@SHAPES
def test_flops_of_state_spaces_are_those_that_xla_counts(shape, monkeypatch):
    """Of layers that are not in a loop, of one expert, and of attention in one block, which
    computes all keys."""
    monkeypatch.setattr(moe, "grouped", lambda x, w, sizes: x @ w[0])
    wide = replace(shape.mamba, head_dim=64, state=64)
    cfg, T = replace(shape, hidden_size=256, intermediate_size=384, head_dim=32, mamba=wide), 64
    if cfg.experts is not None:
        one = replace(cfg.experts, count=1, top_k=1, size=192, shared_size=192, latent_size=128)
        cfg = replace(cfg, experts=one)
    weights, attention, head = forward_flops(cfg, T)
    attending = sum(kind.mixer == "attention" for kind in cfg.kinds_by_layer)
    attention += attending * 2 * 2 * cfg.num_heads * cfg.head_dim * (T - (T + 1) / 2)
    model = nnx.eval_shape(lambda: unstack(decoder(shape=cfg)))
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    cost = forward.lower(state, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(T * (weights + head + attention), rel=0.03)
