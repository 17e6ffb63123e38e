# SPDX-License-Identifier: Apache-2.0
"""Gated delta nets: their recurrence, packed rows, several devices, adapters, decoding, FLOPs."""

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

from jaxllm.config import MeshSection, PeftSection, TrainConfig
from jaxllm.errors import UserError
from jaxllm.mesh import make_mesh
from jaxllm.model import delta
from jaxllm.model.cache import StateCache
from jaxllm.model.config import Delta, LayerKind, Rope
from jaxllm.model.delta import carried, delta_rule, inverse, unit
from jaxllm.model.stack import unstack
from jaxllm.monitor.flops import forward_flops
from jaxllm.objectives.lm import lm_loss
from jaxllm.ops.quantized import Quantized
from jaxllm.rl.shared import can_share
from jaxllm.sampling import Sampling, generate

GROUPED = replace(
    TINY,
    family="qwen3_next",
    ropes=(Rope(partial=0.5),),
    kinds=(LayerKind(mixer="delta"), LayerKind()),
    layer_kinds=(0, 1, 0, 1),
    norm_eps=3e-2,  # a smaller one magnifies the roundings of small states
    norm_offset=1.0,
    qk_norm="head",
    output_gate="query",
    delta=Delta(key_heads=2, value_heads=4, key_dim=8, value_dim=16, taps=4, grouped=True),
)
PARTS = replace(GROUPED, family="qwen3_5_text", delta=replace(GROUPED.delta, grouped=False))
SEPARATE = replace(
    PARTS,
    family="olmo_hybrid",
    kinds=(LayerKind(mixer="delta", norm_placement="pre"), LayerKind()),
    norm_offset=0.0,
    norm_placement="post",
    qk_norm="full",
    output_gate="none",
    delta=replace(PARTS.delta, negative=True),
)
LORA = PeftSection(method="lora", r=4, target_modules=("all-linear",))


def remembering(section=WHOLE, **options):
    """A model whose states outlast its rows, and whose adapter is far from its start."""
    model, key = decoder(section, **options), iter(jax.random.split(jax.random.key(3), 99))
    for path, v in nnx.to_flat_state(nnx.state(model)):
        x = v.get_value()
        if path[-1] in ("a_log", "dt_bias"):
            v.set_value(jax.random.normal(next(key), x.shape) - 2)
        elif path[-1].endswith("_conv"):
            v.set_value(jax.random.normal(next(key), x.shape))
        elif model.peft.frozen and model.peft.trains(path, v):
            v.set_value(x + 0.3 * jax.random.normal(next(key), x.shape))
    return model


def drawn(B, length, G, H, K, V):
    rng = np.random.default_rng(0)
    q, k = (unit(jnp.asarray(rng.normal(size=(B, length, G, K)), jnp.float32)) for _ in range(2))
    k = k.at[:, 20:].set(k[:, 20:21])  # one and the same key
    v = rng.normal(size=(B, length, H, V))
    beta, log = rng.random((B, length, H)), -0.2 * rng.random((B, length, H))
    beta[:, 20:], log[:, 20:] = 1, 0
    state = rng.normal(size=(B, H, K, V))
    return q, k, *(jnp.asarray(x, jnp.float32) for x in (v, beta, log)), state.astype(np.float32)


@pytest.mark.parametrize("length", [1, 150])
def test_chunks_equal_the_recurrence_token_by_token(length):
    q, k, v, beta, log, state = drawn(2, length, 2, 4, 8, 6)
    segments = np.repeat([[1, 1, 2, 2, 0], [0, 3, 3, 4, 4]], -(-length // 5), 1)[:, :length]
    real = (segments != 0)[..., None]
    beta, log = beta * real, log * real
    got, last = jax.jit(delta_rule)(q, k, v, beta, log, carried(jnp.asarray(segments)), state)
    for row in range(2):
        S, text = state[row].astype(np.float64), 0
        for t in range(length):
            if not segments[row, t]:
                continue
            S = 0 * S if text not in (0, segments[row, t]) else S
            text = segments[row, t]
            S = S * np.exp(log[row, t])[:, None, None]
            keys, queries = (np.repeat(x[row, t], 2, 0) for x in (k, q))
            change = beta[row, t][:, None] * (v[row, t] - np.einsum("hkv,hk->hv", S, keys))
            S = S + keys[..., None] * change[:, None]
            np.testing.assert_allclose(
                got[row, t], np.einsum("hkv,hk->hv", S, queries), atol=2e-5, err_msg=str(t)
            )
        np.testing.assert_allclose(last[row], S, atol=2e-5)


def test_the_inverse_and_its_gradient_are_exact_for_equal_keys():
    """Where powers of the matrix are as large as 1e18."""
    a = jnp.tril(jnp.ones((64, 64)), -1)
    want = np.linalg.inv(np.eye(64) + np.asarray(a, np.float64))
    np.testing.assert_allclose(inverse(a), want, atol=1e-6)
    g = np.random.default_rng(0).normal(size=a.shape)
    (got,) = jax.vjp(inverse, a)[1](jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(got, np.tril(-want.T @ g @ want.T, -1), atol=1e-4)


def test_packed_rows_of_delta_nets_equal_rows_of_one_text(monkeypatch):
    """In loss and gradients; texts begin and end within chunks."""
    monkeypatch.setattr(delta, "CHUNK", 8)
    model, rows = remembering(shape=GROUPED), ragged_rows(6)
    rows["segment_ids"] = np.where(rows["segment_ids"] == 2, 7, rows["segment_ids"])  # any numbers
    single = unpacked(ragged_rows(6))
    loss = nnx.jit(nnx.value_and_grad(lambda model, batch: lm_loss(model, batch, None)[0]))
    (value, grads), (other, others) = (loss(model, batch_of(r)) for r in (rows, single))
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(others))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * scale)


@pytest.fixture(scope="module")
def alone():
    return trajectory(ragged_rows(16), shape=GROUPED)[:2]


@pytest.mark.parametrize("mesh", ["fsdp 8", "data 2 x fsdp 2 x tensor 2"])
def test_a_mesh_remat_and_micro_batches_change_no_delta_net(alone, mesh):
    attn, section = same_over_mesh(mesh, GROUPED, *alone)["layers_0"]["attn"], MESHES[mesh]
    for name in ("qkvz", "ba", "o"):
        kernel = attn[name]["kernel"]
        parts = section.fsdp * section.tensor
        assert kernel.addressable_shards[0].data.size * parts == kernel.size, name


@pytest.mark.parametrize(
    ("shape", "own"),
    [
        (GROUPED, {"qkvz", "ba"}),
        (PARTS, {"qkv", "gate", "beta", "decay"}),
        (SEPARATE, {"q", "k", "v", "gate", "beta", "decay"}),
    ],
    ids=["grouped", "parts", "separate"],
)
def test_lora_over_quantized_delta_nets_does_not_depend_on_the_mesh(shape, own):
    trained, frozen = same_lora_over_mesh(shape=shape, section=LORA, quantize_base="int8")
    assert set(trained["layers_0"]["attn"]) == own | {"o"}
    assert isinstance(frozen["layers_0"]["attn"]["o"]["kernel"], Quantized)


@nnx.jit
def read(model, tokens, segment_ids, positions, cache):
    out = model.hidden(tokens, segment_ids, positions, cache)
    return model.logits(out.x), out.cache


def test_a_text_continues_from_the_cache_wherever_it_is_cut():
    """Also after padding, which changes neither the state nor the window of the convolution."""
    model = remembering(LORA, shape=PARTS)
    tokens = np.asarray(ragged_rows(2)["tokens"][:, :14])
    want = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    cache, parts = replace(model.empty_cache(2, 20), length=jnp.int32(0)), []
    for start, stop, pad in ((0, 2, 0), (2, 7, 3), *((i, i + 1, 0) for i in range(7, 14))):
        given = np.pad(tokens[:, start:stop], ((0, 0), (0, pad)))
        ids = np.pad(np.ones((2, stop - start), np.int32), ((0, 0), (0, pad)))
        positions = np.broadcast_to(start + np.arange(stop - start + pad), ids.shape)
        logits, cache = read(model, given, ids, positions, cache)
        parts.append(logits[:, : stop - start])
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=0, atol=1e-4)


def test_generation_of_a_ragged_batch_equals_the_full_forward_pass():
    model = remembering(LORA, shape=GROUPED)
    forward = nnx.jit(lambda model, tokens: model(tokens))
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12], [5]]
    for prompt, new in zip(prompts, generate(model, prompts, Sampling(8)), strict=True):
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(prompt) + 8] = prompt + new
        want = np.asarray(forward(model, tokens)).argmax(-1)[0, len(prompt) - 1 :][:8]
        np.testing.assert_array_equal(new, want)


def test_the_cache_has_a_state_that_does_not_grow_and_is_repeated_by_row():
    cache = decoder(shape=GROUPED).empty_cache(3, 7)
    states = [x for x in cache.layers if isinstance(x, StateCache)]
    d = GROUPED.delta
    window = (d.taps - 1) * (2 * d.key_heads * d.key_dim + d.value_heads * d.value_dim)
    each = window + d.value_heads * d.key_dim * d.value_dim
    assert sum(x.size for x in jax.tree.leaves(states)) == 2 * 3 * each
    numbered = jax.tree.map(lambda x: x + jnp.arange(3).reshape(3, 1, 1, 1), cache.layers[0])
    (again, *_) = replace(cache, layers=(numbered, cache.layers[1])).repeated(2).layers
    for x in jax.tree.leaves(again):
        np.testing.assert_array_equal(x[0, :, 0, 0, 0], [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_are_refused(method):
    with pytest.raises(UserError, match=f"peft.method {method}.*delta nets.*use method lora"):
        decoder(PeftSection(method=method, num_virtual_tokens=3), shape=GROUPED)


def test_rows_that_are_split_over_devices_are_refused():
    mesh = MESHES["context 2 x tensor 2 x fsdp 2"]
    with pytest.raises(
        UserError, match="mesh.context 2 is not possible: delta nets do not support"
    ):
        trajectory(ragged_rows(8), shape=GROUPED, devices=8, mesh=mesh, steps=1)


def test_completions_do_not_share_a_prompt_whose_state_would_go_through_them():
    cfg, mesh = TrainConfig(micro_batch_size=4), make_mesh(MeshSection(), jax.devices()[:1])
    cfg = replace(cfg, rl=replace(cfg.rl, group_size=2, minibatches=1))
    assert can_share(cfg, decoder(), mesh) and not can_share(cfg, decoder(shape=GROUPED), mesh)


def test_flops_of_delta_nets_are_those_that_xla_counts():
    """Of layers that are not in a loop, and of attention in one block, which computes all keys."""
    wide = replace(GROUPED.delta, key_dim=64, value_dim=64)
    cfg = replace(GROUPED, hidden_size=256, intermediate_size=384, head_dim=32, delta=wide)
    length = 64  # one chunk: XLA counts the body of a loop once
    weights, attention, head = forward_flops(cfg, length)
    layers = 2 * 2 * cfg.num_heads * 2 * cfg.head_dim  # 2 of attention
    attention += layers * (length - (length + 1) / 2)
    model = nnx.eval_shape(lambda: unstack(decoder(shape=cfg)))
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    cost = forward.lower(state, tokens).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(length * (weights + head + attention), rel=0.03)
