# SPDX-License-Identifier: Apache-2.0
"""Norms of embeddings, norms side by side, learned activations and biases of the head, however
they are run."""

from dataclasses import replace

import numpy as np
import pytest
from steps import TINY, assert_same_trajectory, ragged_rows, same_over_mesh, trajectory

SHAPE = replace(
    TINY,
    norm="layer",
    norm_bias=True,
    norm_placement="parallel_each",
    embed_norm=True,
    rope_pairs="swapped",
    gated_mlp=False,
    activation="xielu",
    head_bias=True,
)


@pytest.fixture(scope="module")
def alone():
    return trajectory(ragged_rows(16), shape=SHAPE)[:3]


def test_an_activation_learns_what_transformers_trains_of_it(alone):
    *_, state = alone
    found = {n: np.asarray(x) for n, x in state.trainable["layers"]["mlp"]["xielu"].items()}
    assert (found["slope"] == 0.5).all() and (found["limit"] == np.float32(-1e-6)).all()
    for name, start in (("above", 0.8), ("below", 0.3)):
        moved = np.abs(found[name] - np.log(np.expm1(start)))
        assert (moved > 1e-4).all() and (moved < 1e-2).all()
    assert np.asarray(state.trainable["head"]["bias"]).any()


def test_blocks_of_mlp_and_vocabulary_change_nothing(alone):
    losses, norms, _ = alone
    found = trajectory(ragged_rows(16), shape=SHAPE, mlp_blocks=2, loss_blocks=2)
    assert_same_trajectory(found[0], losses)
    assert_same_trajectory(found[1], norms)


@pytest.mark.parametrize("mesh", ["fsdp 8", "data 2 x fsdp 2 x tensor 2"])
def test_a_mesh_changes_none_of_them(alone, mesh):
    losses, norms, _ = alone
    same_over_mesh(mesh, SHAPE, losses, norms)
