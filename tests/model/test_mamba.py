# SPDX-License-Identifier: Apache-2.0
"""State spaces in place of attention: their recurrence, packed rows, devices, decoding, FLOPs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import (
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
from jaxllm.model import delta
from jaxllm.model.cache import StateCache
from jaxllm.model.config import LayerKind, Mamba, Rope
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
LORA = PeftSection(method="lora", r=4, target_modules=("all-linear",))


def remembering(section=WHOLE, **options):
    """A model whose states outlast its rows, and in which every token changes its neighbours."""
    model = decoder(section, shape=SHAPE, **options)
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


def test_packed_rows_of_state_spaces_equal_rows_of_one_text(monkeypatch):
    """In loss and gradients; texts begin and end within chunks."""
    monkeypatch.setattr(delta, "CHUNK", 8)
    model, rows = remembering(), ragged_rows(6)
    loss = nnx.jit(nnx.value_and_grad(lambda model, batch: lm_loss(model, batch, None)[0]))
    (value, grads), (other, others) = (loss(model, batch_of(r)) for r in (rows, unpacked(rows)))
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(others))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * scale)


def test_a_text_continues_from_the_state_wherever_it_is_cut():
    """Also after padding, which changes nothing although the projections have biases."""
    model = remembering(LORA)
    tokens = np.asarray(ragged_rows(2)["tokens"][:, :10])
    want = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    cache, parts = replace(model.empty_cache(2, 20), length=jnp.int32(0)), []
    assert isinstance(cache.layers[0], StateCache)
    assert cache.layers[0].state.shape == (2, 2, 8, 12, 8)
    for start, stop, pad in ((0, 1, 0), (1, 6, 3), *((i, i + 1, 0) for i in range(6, 10))):
        given = np.pad(tokens[:, start:stop], ((0, 0), (0, pad)))
        ids = np.pad(np.ones((2, stop - start), np.int32), ((0, 0), (0, pad)))
        positions = np.broadcast_to(start + np.arange(stop - start + pad), ids.shape)
        logits, cache = read(model, given, ids, positions, cache)
        parts.append(logits[:, : stop - start])
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=0, atol=1e-4)


@pytest.mark.sweep
@pytest.mark.parametrize("mesh", ["fsdp 8", "data 2 x fsdp 2 x tensor 2"])
def test_a_mesh_remat_and_micro_batches_change_no_state_space(mesh):
    losses, norms, *_ = trajectory(ragged_rows(16), shape=SHAPE)
    attn = same_over_mesh(mesh, SHAPE, losses, norms)["layers_0"]["attn"]
    section = MESHES[mesh]
    for name in ("gate", "x", "b", "c", "o"):
        kernel = attn[name]["kernel"]
        parts = section.fsdp * section.tensor
        assert kernel.addressable_shards[0].data.size * parts == kernel.size, name


@pytest.mark.sweep
def test_lora_over_quantized_projections_does_not_depend_on_the_mesh():
    trained, frozen = same_lora_over_mesh(shape=SHAPE, section=LORA, quantize_base="int8")
    assert set(trained["layers_0"]["attn"]) == {"inputs", "o"}
    assert isinstance(frozen["layers_0"]["attn"]["x"]["kernel"], Quantized)


def test_what_state_spaces_cannot_do_is_refused():
    with pytest.raises(UserError, match="peft.method prefix.*which the state spaces of this"):
        decoder(PeftSection(method="prefix", num_virtual_tokens=3), shape=SHAPE)
    mesh = MESHES["context 2 x tensor 2 x fsdp 2"]
    with pytest.raises(
        UserError, match="mesh.context 2 is not possible: state spaces do not support"
    ):
        trajectory(ragged_rows(8), shape=SHAPE, devices=8, mesh=mesh, steps=1)


def test_flops_of_state_spaces_are_those_that_xla_counts():
    """Of layers that are not in a loop, and of attention in one block, which computes all keys."""
    wide = replace(SHAPE.mamba, head_dim=64, state=64)
    cfg, T = replace(SHAPE, hidden_size=256, intermediate_size=384, head_dim=32, mamba=wide), 64
    weights, attention, head = forward_flops(cfg, T)
    attention += 2 * 2 * 2 * cfg.num_heads * cfg.head_dim * (T - (T + 1) / 2)  # 2 of attention
    model = nnx.eval_shape(lambda: unstack(decoder(shape=cfg)))
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    cost = forward.lower(state, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(T * (weights + head + attention), rel=0.03)
