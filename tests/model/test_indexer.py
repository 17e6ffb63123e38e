# SPDX-License-Identifier: Apache-2.0
"""Attention to the keys that an indexer chooses: what it equals, packed rows, remat, several
devices, adapters, decoding, and FLOPs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import (
    MESHES,
    batch_of,
    decoder,
    ragged_rows,
    same_lora_over_mesh,
    same_over_mesh,
    trajectory,
    unpacked,
)
from test_mla import LOW

from jaxllm.config import MeshSection, PeftSection
from jaxllm.errors import UserError
from jaxllm.mesh import make_mesh
from jaxllm.model.cache import Cache
from jaxllm.model.config import Indexer
from jaxllm.model.context import Context
from jaxllm.model.indexer import highest, select
from jaxllm.model.stack import unstack
from jaxllm.monitor.flops import forward_flops, indexer_flops
from jaxllm.objectives.lm import lm_loss
from jaxllm.ops import attention, attention_blocks, attention_gpu, attention_tpu
from jaxllm.ops.attention_mask import visible
from jaxllm.sampling import Sampling, generate

SHAPE = replace(
    LOW, family="deepseek_v32", qkv_bias=False, indexer=Indexer(top_keys=3, heads=16, dim=12)
)
LORA = PeftSection(method="lora", r=4, target_modules=("all-linear",))
PROMPT = PeftSection(method="prompt", num_virtual_tokens=3)


@nnx.jit
def logits(model, tokens):
    return model(tokens)


def test_texts_of_no_more_keys_than_it_chooses_are_those_of_latent_attention():
    """With the same weights, bit for bit; longer ones are not."""
    model = decoder(shape=replace(SHAPE, indexer=replace(SHAPE.indexer, top_keys=20)))
    plain = decoder(shape=replace(SHAPE, indexer=None))
    mine = nnx.state(model)
    for stack in plain.cfg.stacks:
        del mine[stack]["attn"]["indexer"]
    nnx.update(plain, mine)
    tokens = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (2, 24))
    np.testing.assert_array_equal(logits(model, tokens[:, :20]), logits(plain, tokens[:, :20]))
    got, want = logits(model, tokens), logits(plain, tokens)
    np.testing.assert_allclose(got[:, :20], want[:, :20], rtol=0, atol=1e-5)
    assert np.abs(got[:, 20:] - want[:, 20:]).min(0).max() > 0.1


def test_the_first_of_equal_scores_are_chosen():
    scores = jnp.asarray([[3.0, 0, 1, 0, 0, 5], [0, 0, 0, 0, 0, 0], [-1, -2, -1, 0, -1, -3]])
    want = [[1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]]
    np.testing.assert_array_equal(highest(scores, 4), np.asarray(want, bool))


@pytest.mark.parametrize("before", [0, 3])
def test_keys_are_chosen_in_blocks_as_in_one(monkeypatch, before):
    """Each query's best keys, of its own text and of what precedes each; as many as it sees, if
    these are fewer. The blocks of attention then read the same mask."""
    monkeypatch.setattr(attention_blocks, "CPU_BLOCK", 8)
    rows = ragged_rows(3)
    T = rows["tokens"].shape[1]
    keys = iter(jax.random.split(jax.random.key(0), 9))
    q, w, k = (
        jax.random.normal(next(keys), shape)
        for shape in ((3, T, 4, 6), (3, T, 4), (3, T + before, 6))
    )
    segments = jnp.asarray(rows["segment_ids"])
    k_segments = jnp.pad(segments, ((0, 0), (before, 0)), constant_values=attention.EVERYWHERE)
    ctx = Context(
        segment_ids=segments,
        positions=jnp.asarray(rows["positions"]) + before,
        key_segment_ids=k_segments if before else None,
        offset=before,
    )
    got = jax.jit(lambda *inputs: select(*inputs, ctx, 4))(q, w, k)
    scores = np.einsum("bth,bths->bts", w, np.maximum(np.einsum("bthk,bsk->bths", q, k), 0))
    indices = before + jnp.arange(T), jnp.arange(T + before)
    seen = np.asarray(visible(segments, k_segments, ctx.positions, *indices, None))
    rank = np.argsort(np.argsort(-np.where(seen, scores, -np.inf), kind="stable"), kind="stable")
    np.testing.assert_array_equal(got, (rank < 4) & seen)
    assert (np.sum(got, -1) == np.minimum(np.sum(seen, -1), 4)).all() and seen.sum(-1).max() > 8

    q, k, v = (
        jax.random.normal(next(keys), shape)
        for shape in ((3, T, 4, 8), (3, 4, T + before, 8), (3, 4, T + before, 5))
    )
    tokens = segments, ctx.key_segment_ids, ctx.positions

    def attend(q, k, v):
        return attention.attention(q, k, v, *tokens, offset=before, scale=0.3, selected=got)

    def plain(q, k, v):
        scores = 0.3 * jnp.einsum("bthk,bhsk->bhts", q, k)
        probs = jax.nn.softmax(jnp.where(got[:, None], scores, -jnp.inf), -1)
        return jnp.einsum("bhts,bhsv->bthv", probs, v)

    @partial(jax.jit, static_argnums=0)
    def with_gradients(attend, *inputs):
        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(jnp.cos(out))

    pairs = zip(with_gradients(attend, q, k, v), with_gradients(plain, q, k, v), strict=True)
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone():
    return trajectory(ragged_rows(16), shape=SHAPE)


@pytest.mark.parametrize("mesh", ["fsdp 8", "data 2 x fsdp 2 x tensor 2"])
def test_a_mesh_remat_and_micro_batches_change_no_choice(alone, mesh):
    indexer = same_over_mesh(mesh, SHAPE, *alone[:2])["layers"]["attn"]["indexer"]
    for name in ("q", "k", "weigh"):
        kernel = indexer[name]["kernel"]
        assert kernel.addressable_shards[0].data.size * MESHES[mesh].fsdp == kernel.size, name


@pytest.mark.parametrize("remat", ["full", "names", "dots"])
def test_remat_changes_no_choice(alone, remat):
    found = trajectory(ragged_rows(16), shape=SHAPE, remat=remat)
    np.testing.assert_allclose(found[0], alone[0], rtol=2e-5)
    np.testing.assert_allclose(found[1], alone[1], rtol=1e-4)


def test_training_leaves_the_indexers_as_they_are(alone):
    """As in transformers, where nothing of an indexer has a gradient: not even decay moves it."""
    start = nnx.to_pure_dict(nnx.state(decoder(shape=SHAPE)))["layers"]["attn"]
    after = alone[2].trainable["layers"]["attn"]
    jax.tree.map(np.testing.assert_array_equal, after["indexer"], start["indexer"])
    assert (np.asarray(after["q_a"]["kernel"]) != start["q_a"]["kernel"]).any()


@pytest.mark.parametrize("section", [PeftSection(), PROMPT], ids=["whole", "prompt"])
def test_chosen_keys_never_cross_the_texts_of_a_packed_row(section):
    model, rows = decoder(section, shape=SHAPE), ragged_rows(6)
    loss = nnx.jit(lambda model, batch: lm_loss(model, batch, None)[:2])
    packed, single = loss(model, batch_of(rows)), loss(model, batch_of(unpacked(rows)))
    assert [float(x) for x in packed] == pytest.approx([float(x) for x in single], rel=1e-6)


def test_lora_over_quantized_indexers_does_not_depend_on_the_mesh():
    trained, _ = same_lora_over_mesh(shape=SHAPE, section=LORA, quantize_base="int8")
    indexer = trained["layers"]["attn"]["indexer"]
    assert {"q", "k", "weigh"} == set(indexer)
    assert not any(np.asarray(part["lora"]["b"]).any() for part in indexer.values())


@nnx.jit
def read(model, tokens, cache):
    out = model.hidden(tokens, cache=cache)
    return model.logits(out.x), out.cache


@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
@pytest.mark.parametrize("section", [PeftSection(), LORA, PROMPT], ids=["whole", "lora", "prompt"])
def test_decoding_chooses_the_keys_of_the_whole_forward_pass(section, layout):
    """Several tokens at once, then one by one, in a cache with slots to spare."""
    model = decoder(section, shape=SHAPE)
    tokens = np.asarray(ragged_rows(2)["tokens"][:, :12])
    want = logits(model, tokens)
    model = model if layout == "stacked" else unstack(model)
    cache, parts = model.empty_cache(2, 16), []
    for start, stop in ((0, 5), *((i, i + 1) for i in range(5, 12))):
        some, cache = read(model, tokens[:, start:stop], cache)
        parts.append(some)
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=0, atol=1e-4)


def test_generation_of_a_ragged_batch_on_a_mesh_equals_the_whole_forward_pass():
    model, prompts = decoder(shape=SHAPE), [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12]]
    mesh = make_mesh(MeshSection(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        completions = generate(model, prompts, Sampling(8))
    for prompt, new in zip(prompts, completions, strict=True):
        want = np.asarray(logits(model, np.asarray(prompt + new)[None])).argmax(-1)[0]
        np.testing.assert_array_equal(new, want[len(prompt) - 1 : -1])


def test_the_cache_has_the_indexers_key_beside_the_rotated_one():
    cache = Cache.empty(SHAPE, 3, 7, jnp.float32)
    sizes = sum(x.size for x in jax.tree.leaves(cache.layers))
    assert sizes == SHAPE.num_layers * 3 * 7 * (24 + 8 + 12)


def test_no_fused_kernel_takes_chosen_keys(monkeypatch):
    assert "indexer" in attention_tpu.obstacle(dtype=jnp.bfloat16, selected=True)
    monkeypatch.setattr(attention_gpu.jax, "devices", lambda: [type("D", (), {"platform": "gpu"})])
    monkeypatch.setattr(
        attention_gpu.metadata, "version", lambda _: attention_gpu.TOKAMAX_VERSIONS[0]
    )
    facts = dict(dtype=jnp.bfloat16, softcap=0.0, head_dims=(64, 64))
    assert attention_gpu.obstacle(**facts) == ""
    assert "indexer" in attention_gpu.obstacle(**facts, selected=True)


def test_rows_that_are_split_over_devices_choose_no_keys():
    mesh = MESHES["context 2 x tensor 2 x fsdp 2"]
    with pytest.raises(UserError, match="mesh.context is not possible: indexers do not support"):
        trajectory(ragged_rows(8), shape=SHAPE, devices=8, mesh=mesh, steps=1)


def test_flops_of_indexers_are_those_that_xla_counts():
    """Of layers that are not in a loop, and of one block, in which all keys have a score."""
    T, indexer = 64, Indexer(top_keys=16, heads=32, dim=64)
    cfg = replace(SHAPE, hidden_size=256, latent=replace(SHAPE.latent, q_rank=96), indexer=indexer)

    def counted(cfg):
        graph, state = nnx.split(nnx.eval_shape(lambda: unstack(decoder(shape=cfg))))
        forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
        lowered = forward.lower(state, jax.ShapeDtypeStruct((1, T), jnp.int32))
        return lowered.compile().cost_analysis()["flops"]

    all_keys = replace(cfg, indexer=replace(indexer, top_keys=T))
    assert indexer_flops(all_keys, T) == 0
    weights = 2 * cfg.num_layers * (96 * 32 * 64 + 256 * (64 + 32))
    scores = (indexer_flops(cfg, T) - weights) * 2 * T / (T + 1)
    assert counted(cfg) - counted(all_keys) == pytest.approx(T * (weights + scores), rel=0.05)
    kept = 16 - 16 * 15 / (2 * T)  # keys that a query attends to, on average
    ratio = forward_flops(cfg, T)[1] / forward_flops(all_keys, T)[1]
    assert ratio == pytest.approx(kept / ((T + 1) / 2))
