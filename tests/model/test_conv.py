# SPDX-License-Identifier: Apache-2.0
"""Short convolutions in place of attention: packed rows, several devices, decoding, adapters."""

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
from test_delta import read

from jaxllm.config import PeftSection
from jaxllm.errors import UserError
from jaxllm.model.config import Convolution, LayerKind, Rope
from jaxllm.model.stack import unstack
from jaxllm.monitor.flops import forward_flops
from jaxllm.objectives.lm import lm_loss
from jaxllm.ops.quantized import Quantized

SHAPE = replace(
    TINY,
    family="lfm2",
    ropes=(Rope(),),
    kinds=(LayerKind(mixer="conv"), LayerKind()),
    layer_kinds=(0, 0, 1, 0),
    qk_norm="head",
    conv=Convolution(taps=3, bias=True),
)
LORA = PeftSection(method="lora", r=4, target_modules=("all-linear",))


def remembering():
    """A model in which every token changes its neighbours' outputs."""
    model, key = decoder(shape=SHAPE), iter(jax.random.split(jax.random.key(3), 99))
    for path, v in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("conv", "conv_bias", "bias"):
            v.set_value(jax.random.normal(next(key), v.get_value().shape))
    return model


def test_packed_rows_of_convolutions_equal_rows_of_one_text():
    model, rows = remembering(), ragged_rows(6)
    loss = nnx.jit(nnx.value_and_grad(lambda model, batch: lm_loss(model, batch, None)[0]))
    (value, grads), (other, others) = (loss(model, batch_of(r)) for r in (rows, unpacked(rows)))
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_a_text_continues_from_the_window_wherever_it_is_cut():
    """Also after padding, which changes nothing although the projections have biases."""
    model = remembering()
    tokens = np.asarray(ragged_rows(2)["tokens"][:, :10])
    want = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    cache, parts = replace(model.empty_cache(2, 20), length=jnp.int32(0)), []
    assert cache.layers[0].windows[0].shape == (2, 2, 1, 2, 32) and cache.layers[0].state is None
    for start, stop, pad in ((0, 1, 0), (1, 6, 3), *((i, i + 1, 0) for i in range(6, 10))):
        given = np.pad(tokens[:, start:stop], ((0, 0), (0, pad)))
        ids = np.pad(np.ones((2, stop - start), np.int32), ((0, 0), (0, pad)))
        positions = np.broadcast_to(start + np.arange(stop - start + pad), ids.shape)
        logits, cache = read(model, given, ids, positions, cache)
        parts.append(logits[:, : stop - start])
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=0, atol=1e-4)


@pytest.mark.sweep
def test_a_mesh_remat_and_micro_batches_change_no_convolution():
    losses, norms, *_ = trajectory(ragged_rows(16), shape=SHAPE)
    mesh = "data 2 x fsdp 2 x tensor 2"
    attn = same_over_mesh(mesh, SHAPE, losses, norms)["layers_0"]["attn"]
    for name in "bcxo":
        kernel = attn[name]["kernel"]
        assert kernel.addressable_shards[0].data.size * 4 == kernel.size


@pytest.mark.sweep
def test_lora_over_quantized_projections_does_not_depend_on_the_mesh():
    trained, frozen = same_lora_over_mesh(shape=SHAPE, section=LORA, quantize_base="int8")
    assert set(trained["layers_0"]["attn"]) == {"bcx", "o"}
    assert isinstance(frozen["layers_0"]["attn"]["x"]["kernel"], Quantized)


def test_what_convolutions_cannot_do_is_refused():
    with pytest.raises(UserError, match="peft.method prefix.*which the convolutions of this model"):
        decoder(PeftSection(method="prefix", num_virtual_tokens=3), shape=SHAPE)
    mesh = MESHES["context 2 x tensor 2 x fsdp 2"]
    with pytest.raises(
        UserError, match="mesh.context 2 is not possible: convolutions do not support"
    ):
        trajectory(ragged_rows(8), shape=SHAPE, devices=8, mesh=mesh, steps=1)


def test_flops_of_convolutions_are_those_that_xla_counts():
    """Of layers that are not in a loop, and of attention in one block, which computes all keys."""
    cfg, T = replace(SHAPE, hidden_size=256, intermediate_size=384, head_dim=32), 64
    weights, attention, head = forward_flops(cfg, T)
    want = T * (weights + head + attention * 2 * T / (T + 1))
    model = nnx.eval_shape(lambda: unstack(decoder(shape=cfg)))
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    cost = forward.lower(state, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(want, rel=0.03)
