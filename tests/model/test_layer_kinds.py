# SPDX-License-Identifier: Apache-2.0
"""Layers of two kinds, on several devices and in several blocks of attention."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from steps import MESHES, TINY, V, ragged_rows, same_over_mesh, trajectory

from jaxllm.config import MeshSection
from jaxllm.data.batch import Batch, make_row
from jaxllm.mesh import make_mesh, put
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.lm import lm_loss

ROWS, LENGTH = 8, 512  # four blocks of attention on a CPU


def test_windows_and_ropes_by_layer_do_not_depend_on_the_mesh():
    cfg = replace(TINY, max_positions=LENGTH)
    graph, params = nnx.split(Decoder(cfg, rngs=nnx.Rngs(0), remat="full"))
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 240, (ROWS, 2))
    rows = [
        make_row([(rng.integers(0, V, n), np.ones(n, np.float32)) for n in row], LENGTH)
        for row in lengths
    ]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def loss(params, batch):
        return lm_loss(nnx.merge(graph, params), batch, None)[0]

    def figures(section, devices):
        mesh = make_mesh(section, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            value, grads = jax.jit(jax.value_and_grad(loss))(params, Batch(**put(mesh, batch)))
        squares = sum(jnp.sum(x * x) for x in jax.tree.leaves(grads))
        return float(value), float(jnp.sqrt(squares))

    alone = figures(MeshSection(), 1)
    for section in (MeshSection(), MeshSection(data=2, fsdp=2, tensor=2)):
        assert figures(section, 8) == pytest.approx(alone, rel=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("gate", ["head", "feature"])
@pytest.mark.parametrize("mesh", MESHES)
def test_gates_of_attention_do_not_depend_on_the_mesh(gate, mesh):
    shape = replace(TINY, output_gate=gate, norm="layer", norm_weight=False, qkv_clip=0.8)
    want = trajectory(ragged_rows(16), shape=shape)[:2]
    kernel = same_over_mesh(mesh, shape, *want)["layers"]["attn"]["gate"]["kernel"]
    parts = MESHES[mesh].fsdp * MESHES[mesh].tensor
    assert kernel.addressable_shards[0].data.size * parts == kernel.size
