# SPDX-License-Identifier: Apache-2.0
"""Groups of completions that share their prompt: the same numbers as rows with one completion."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import TINY, decoder
from test_online import FIRST, Online

from jaxllm.data.batch import make_row
from jaxllm.model.config import Experts, Latent, LayerKind, Rope
from jaxllm.objectives.grpo import grpo_loss, token_weights
from jaxllm.ops.attention import EVERYWHERE, attention
from jaxllm.ops.attention_blocks import CPU_BLOCK
from jaxllm.rl import online
from jaxllm.rl.shared import SharedRows, can_share

WINDOWS = dict(kinds=(LayerKind(0, 3), LayerKind(0, None)), layer_kinds=(0, 1) * 2)


def update(monkeypatch, shares: bool, normalizer: str, **shape):
    """(batch, metrics of the rollout, loss, its gradients, metrics of the loss) of an update."""
    monkeypatch.setattr(online, "can_share", lambda *_: shares)
    monkeypatch.setitem(decoder.__kwdefaults__, "shape", replace(TINY, **shape))
    run = Online("grpo", FIRST, count=1, beta=0.1, minibatches=1)
    (batch,), (seen,) = run.updates(1)
    graph, weights = nnx.split(run.policy, nnx.Param)

    @jax.jit
    def value_and_grad(weights, batch):
        def loss(weights):
            model = nnx.merge(graph, weights)
            total, weight, metrics = grpo_loss(
                model, batch, None, beta=0.1, normalizer=normalizer, max_tokens=6
            )
            for name in model.hidden(batch.tokens).aux:  # a shared prompt is a text of its own
                metrics.pop(name)
            return total / weight, metrics

        return jax.value_and_grad(loss, has_aux=True)(weights)

    moved = jax.tree.map(lambda x: 1.03 * x, weights)  # so that the ratios are not 1
    (loss, metrics), grads = value_and_grad(moved, jax.tree.map(jnp.asarray, batch))
    return batch, seen, loss, grads, {k: a / w for k, (a, w) in metrics.items()}


SINKS = WINDOWS | dict(
    family="gpt_oss", sinks=True, experts=Experts(8, 3, 16, bias=True, limit=2.0)
)
LATENT = dict(family="minicpm3", latent=Latent(12, 8, 6), head_dim=4, qk_norm="none")
LATENT |= dict(kinds=(LayerKind(dense=True), LayerKind()), layer_kinds=(0, 1, 1, 1))
LATENT |= dict(ropes=(Rope(),), experts=Experts(8, 3, 16))
SHAPES = {"plain": {}, "windows": WINDOWS, "sinks": SINKS, "latent": LATENT}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("normalizer", ["tokens", "sequence", "constant"])
def test_shared_prompts_change_neither_loss_nor_gradients(monkeypatch, normalizer, shape):
    alone, seen, loss, grads, metrics = update(monkeypatch, False, normalizer, **shape)
    shared, seen_shared, *ours = update(monkeypatch, True, normalizer, **shape)
    assert alone.tokens.shape[0] == 8 and shared.tokens.shape[0] == 2
    prompts = (alone.weights > 0).argmax(1)  # without their last token
    assert {*(shared.segment_ids == EVERYWHERE).sum(1)} == {*prompts}
    assert shared.weights.sum() == alone.weights.sum() > 0
    np.testing.assert_allclose(ours[0], loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, float(jnp.abs(b).max())))
    for name, value in metrics.items():
        np.testing.assert_allclose(ours[2][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for name in ("reward", "kl", "sampling_entropy", "completion_length"):
        assert seen_shared[name] == pytest.approx(seen[name], rel=1e-4), name
    assert seen_shared["sampler_gap_max"] < 1e-4


def test_values_come_back_to_the_rows_they_are_of():
    texts = [(3, 2), (3, 4), (5, 1), (5, 3)]  # tokens of prompts and completions
    rows = [
        make_row([(np.arange(p + n) + 10 * i, (np.arange(p + n) >= p).astype(np.float32))], 10)
        for i, (p, n) in enumerate(texts)
    ]
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    layout = SharedRows(fields, 2, 12)
    packed = layout.pack(fields)
    assert packed["tokens"][0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 0, 0, 0, 0]
    assert packed["segment_ids"][0].tolist() == [EVERYWHERE] * 2 + [1] * 2 + [2] * 4 + [0] * 4
    assert packed["positions"][0].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 0, 0, 0, 0]
    back = layout.unpack(packed["targets"] * packed["weights"])
    np.testing.assert_array_equal(back, fields["targets"] * fields["weights"])


def test_a_row_of_completions_weighs_each_as_a_row_of_its_own():
    mask = jnp.asarray([[0, 1, 1, 1, 1, 0]], jnp.float32)
    segments = jnp.asarray([[EVERYWHERE, 1, 1, 1, 2, 2]])
    weights, count = token_weights(mask, "sequence", 4, segments)
    np.testing.assert_allclose(weights, [[0, 1 / 3, 1 / 3, 1 / 3, 1, 0]])
    assert count == 2
    assert token_weights(mask, "constant", 4, segments)[1] == 2


def test_what_cannot_share_does_not():
    run = Online("grpo", FIRST, count=1, minibatches=1)
    mesh = run.feed.mesh
    assert can_share(run.cfg, run.policy, mesh)
    others = [
        replace(run.cfg, micro_batch_size=2),
        replace(run.cfg, rl=replace(run.cfg.rl, minibatches=2)),
        replace(run.cfg, rl=replace(run.cfg.rl, group_size=1)),
        replace(run.cfg, model=replace(run.cfg.model, attention="splash")),
        replace(run.cfg, model=replace(run.cfg.model, balance_loss=0.1)),
        replace(run.cfg, model=replace(run.cfg.model, router_z_loss=0.1)),
    ]
    assert not any(can_share(cfg, run.policy, mesh) for cfg in others)
    long = replace(run.policy.cfg, ropes=(Rope(kind="longrope"),))
    stretched = SimpleNamespace(cfg=long, peft=run.policy.peft)
    assert not can_share(run.cfg, stretched, mesh)


@pytest.mark.parametrize(("window", "chunked"), [(None, False), (60, False), (60, True)])
def test_a_completion_sees_its_prompt_and_itself_in_blocks(window, chunked):
    """Rows of more than one block of keys and queries."""
    P, n, count = 140, 45, 4
    length = P + n * count
    assert length > 2 * CPU_BLOCK
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, length, 4, 8))
    k, v = (jax.random.normal(key, (1, 2, length, 8)) for key in keys[1:])
    segments = np.repeat([EVERYWHERE, *range(1, count + 1)], [P] + [n] * count)[None]
    positions = np.concatenate([np.arange(P), *[P + np.arange(n)] * count])[None]
    options = dict(window=window, chunked=chunked, scale=0.3)
    got = attention(q, k, v, segments, None, positions, kernel="xla", **options)
    for i in range(count):
        own = np.r_[:P, P + n * i : P + n * (i + 1)]
        ones = np.ones((1, P + n), np.int32)
        want = attention(
            q[:, own], k[:, :, own], v[:, :, own], ones, None, positions[:, : P + n], **options
        )
        np.testing.assert_allclose(got[:, own], want, rtol=0, atol=2e-6)
