# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: packed rows, remat and several devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import TINY, T, batch_of, decoder, ragged_rows, trajectory, unpacked

from jaxllm.config import MeshSection
from jaxllm.data.batch import Batch
from jaxllm.errors import UserError
from jaxllm.mesh import make_mesh, put
from jaxllm.model.config import Experts, LayerKind, Rope
from jaxllm.model.moe import route
from jaxllm.objectives.lm import lm_loss

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
MESHES = {
    "fsdp 8": MeshSection(fsdp=8),
    "data 2 x fsdp 2 x tensor 2": MeshSection(data=2, fsdp=2, tensor=2),
    "context 2 x tensor 2 x fsdp 2": MeshSection(fsdp=2, context=2, tensor=2),
}


@pytest.fixture(scope="module")
def alone():
    return trajectory(ragged_rows(16), shape=SHARED)[:2]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_remat_and_micro_batches_change_nothing(alone, mesh):
    keys = {"remat": "full", "count": 2} if mesh == "fsdp 8" else {}
    losses, norms, state, _ = trajectory(
        ragged_rows(16), shape=SHARED, devices=8, mesh=MESHES[mesh], **keys
    )
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    np.testing.assert_allclose(norms, alone[1], rtol=1e-5)
    mlp = state.trainable["layers"]["mlp"]
    for name in ("gate", "up", "down"):
        kernel = mlp[name]["kernel"]
        parts = MESHES[mesh].fsdp * MESHES[mesh].tensor
        assert kernel.addressable_shards[0].data.size * parts == kernel.size
    assert not mlp["choice_bias"].any()  # no gradient and no decay


def test_an_evaluation_over_a_mesh_equals_that_of_one_device():
    """Outside of shard_over_rows, where axes of rows are automatic."""
    graph, params = nnx.split(decoder(shape=SHARED))

    @jax.jit
    def loss(params, batch):
        return lm_loss(nnx.merge(graph, params), batch, None)[0]

    found = []
    for section, devices in ((MeshSection(), 1), (MESHES["data 2 x fsdp 2 x tensor 2"], 8)):
        mesh = make_mesh(section, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            found.append(float(loss(params, Batch(**put(mesh, ragged_rows(8))))))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_packed_rows_equal_rows_of_one_text():
    model, rows = decoder(shape=PLAIN), ragged_rows(6)
    loss = nnx.jit(lambda model, batch: lm_loss(model, batch, None)[:2])
    packed, single = loss(model, batch_of(rows)), loss(model, batch_of(unpacked(rows)))
    assert [float(x) for x in packed] == pytest.approx([float(x) for x in single], rel=1e-6)


def test_the_bias_changes_the_choice_and_not_the_weights():
    logits = jnp.asarray([[2.0, 1.0, 0.0, -1.0]])
    experts = Experts(4, 2, 8, "sigmoid", has_bias=True, renormalised=False)
    weights, chosen = route(logits, jnp.asarray([-9.0, 0.0, 0.0, 9.0]), experts)
    assert chosen.tolist() == [[3, 1]]
    np.testing.assert_allclose(weights, jax.nn.sigmoid(jnp.asarray([[-1.0, 1.0]])), rtol=1e-6)
    softmax = replace(experts, score="softmax", renormalised=True)
    weights, chosen = route(jnp.zeros((1, 4)), None, softmax)
    assert chosen.tolist() == [[0, 1]] and weights.tolist() == [[0.5, 0.5]]  # the first of equals


def test_blocks_of_hidden_features_are_refused():
    with pytest.raises(UserError, match="mlp_blocks 2 is not possible: its MLP is a mixture"):
        decoder(shape=PLAIN, mlp_blocks=2)(np.zeros((1, T), np.int32))
