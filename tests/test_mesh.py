# SPDX-License-Identifier: Apache-2.0
"""How logical dims are split along the axes of a mesh."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding

from jaxllm.data.loader import eval_batches, make_loader
from jaxllm.data.rows import Rows, Windows
from jaxllm.errors import UserError
from jaxllm.mesh import (
    AXES,
    MeshSection,
    axes_of,
    joined_slices,
    local_rows,
    make_mesh,
    put,
    replicated,
    spec,
)
from jaxllm.model.config import LayerKind, ModelConfig, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.step import weight_shardings

# SmolLM2-135M has 9 heads and 3 key/value heads of 64: 9 * 64 divides by 2, 9 does not.
CFG = ModelConfig(
    "llama",
    vocab_size=64,
    hidden_size=24,
    intermediate_size=48,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=4,
    max_positions=64,
    ropes=(Rope(),),
    kinds=(LayerKind(0),),
    qkv_bias=True,
)


def mesh(**sizes):
    return make_mesh(MeshSection(**{"data": 1, "fsdp": -1} | sizes), jax.devices())


def test_a_dim_is_split_in_units_only():
    axes, two, four = ("embed", ("heads", 9)), mesh(tensor=2), mesh(tensor=4)
    assert spec(axes, (24, 36), two) == P(("fsdp",), None)
    assert spec(("embed", "heads"), (24, 36), two) == P(("fsdp",), ("tensor",))
    assert spec(("embed", ("heads", 8)), (24, 32), four) == P(("fsdp",), ("tensor",))
    # A packed or scale dim may be smaller than the number of units.
    assert spec((("heads", 8), "embed"), (1, 24), four) == P(None, ("fsdp",))


def test_heads_are_not_cut_and_the_user_is_told():
    over = mesh(fsdp=4, tensor=2)
    model = nnx.eval_shape(lambda: Decoder(CFG, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    attn = weight_shardings(state, over, replicated=False)["layers"]["attn"]
    for name in "qkv":
        assert attn[name]["kernel"].spec == P(None, ("fsdp",), None)
        assert attn[name]["bias"].spec == P(None, None)
    assert attn["o"]["kernel"].spec == P(None, ("fsdp",), None)
    variables = [variable for _, variable in nnx.to_flat_state(state)]
    assert replicated(over, variables) == [
        "mesh: 3 kv_heads do not divide by tensor 2; they are replicated",
        "mesh: 9 heads do not divide by tensor 2; they are replicated",
    ]
    assert replicated(mesh(fsdp=8), variables) == []
    over = make_mesh(MeshSection(), jax.devices()[:7])
    assert (
        "mesh: no dim of 24 embed x 48 mlp is split along fsdp 7; it is replicated"
        in replicated(over, variables)
    )


def test_weights_of_heads_that_do_not_divide_give_the_same_logits():
    tokens = jnp.arange(2 * 16).reshape(2, 16) % CFG.vocab_size

    @jax.jit
    def logits(params):
        return nnx.merge(graph, params)(tokens)

    graph, params = nnx.split(Decoder(CFG, rngs=nnx.Rngs(0)))
    want = logits(params)
    over = mesh(fsdp=2, data=2, tensor=2)
    with jax.set_mesh(over):
        shardings = weight_shardings(params, over, replicated=False)
        placed = nnx.State(jax.device_put(nnx.to_pure_dict(params), shardings))
        got = logits(nnx.merge_state(params, placed))
    assert jnp.abs(got - want).max() < 1e-5


def test_an_unknown_dim_and_two_dims_of_one_axis_are_errors():
    with pytest.raises(UserError, match="logical axis 'head' has no rule"):
        spec(("head",), (4,), mesh(tensor=2))
    with pytest.raises(UserError, match="two dims use mesh axis tensor"):
        spec(("heads", "mlp"), (4, 4), mesh(tensor=2))


def test_axes_of_a_stack_begin_with_layers():
    variable = nnx.Param(jnp.zeros((2, 24, 36)), axes=("embed", ("heads", 9)))
    assert axes_of(variable) == ("layers", "embed", ("heads", 9))


def slices_of(count: int, size: int) -> list:
    """Stand-ins for the devices of several slices, in an order that mixes the slices."""
    return [
        SimpleNamespace(id=i, slice_index=i % count, platform="cpu", device_kind="cpu")
        for i in range(count * size)
    ]


@pytest.mark.parametrize(
    ("sizes", "joined"), [({"data": 2, "fsdp": 4}, "data"), ({"fsdp": 4, "tensor": 2}, "fsdp")]
)
def test_slices_are_joined_along_data_or_fsdp_and_other_axes_stay_inside(sizes, joined):
    sizes = dict.fromkeys(AXES, 1) | sizes
    grid = joined_slices(slices_of(2, 4), sizes)
    assert grid.shape == tuple(sizes.values())
    across = AXES.index(joined)
    for block in np.split(grid, 2, axis=across):
        assert len({device.slice_index for device in block.flat}) == 1


def test_slices_that_no_axis_can_join_are_refused():
    with pytest.raises(UserError, match="must be a multiple of 3"):
        joined_slices(slices_of(3, 2), dict.fromkeys(AXES, 1) | {"data": 1, "tensor": 6})


# ---- rows of a batch over processes


class Documents:
    """Stands for Examples."""

    def __init__(self, documents):
        self.documents, self.lengths = documents, np.array([len(d) for d in documents])

    def tokens(self, index):
        return self.documents[index]


PROCESSES = {  # mesh axes -> the devices of each process (fake), and the rows of 8 that they hold
    "rows of its own": ({"fsdp": 8}, [[0, 1, 2, 3], [4, 5, 6, 7]], [range(4), range(4, 8)]),
    "rows apart": ({"fsdp": 8}, [[0, 2], [1, 3, 4, 5, 6, 7]], [(0, 2), (1, 3, 4, 5, 6, 7)]),
    "tensor within": ({"tensor": 4}, [[0, 1, 2, 3], [4, 5, 6, 7]], [range(4), range(4, 8)]),
    "tensor across": ({"tensor": 8}, [[0, 1, 2, 3], [4, 5, 6, 7]], [range(8), range(8)]),
    "context across": (
        {"context": 4},
        [[0, 1], [2, 3, 4, 5], [6, 7]],
        [range(4), range(8), range(4, 8)],
    ),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_processes_that_build_their_own_rows_have_the_batch_of_one_process(name, monkeypatch):
    axes, processes, held = PROCESSES[name]
    over = mesh(**axes)
    documents = [np.arange(i, i + 40, dtype=np.int32) for i in range(40)]
    parts = (Windows(Documents(documents), np.arange(40), 16, segment=True, tail=True),)
    rows, sizes = Rows(parts, None, 16), {"batch_size": 16, "micro_batches": 2, "seed": 3}
    whole, *evals = next(make_loader(rows, **sizes, start_step=5)), *eval_batches(rows, 8)
    seen = []
    for devices, expected in zip(processes, held, strict=True):
        local_rows.cache_clear()
        mine = set(over.devices.flat[devices])

        def of_mine(sharding, shape, mine=mine):
            indices = sharding.devices_indices_map(shape).items()
            return {device: index for device, index in indices if device in mine}

        def shards(shape, sharding, callback, mine=mine):
            indices = of_mine(sharding, shape, mine).items()
            return {device: (index, callback(index)) for device, index in indices}

        with monkeypatch.context() as patch:
            patch.setattr(Sharding, "addressable_devices_indices_map", of_mine)
            patch.setattr(jax, "make_array_from_callback", shards)
            local = local_rows(over, 8)
            assert local == tuple(expected)
            built = next(make_loader(rows, **sizes, start_step=5, local=local))
            built_evals = list(eval_batches(rows, 8, local))
            assert built["tokens"].shape == (2, len(local), 16)
            for want, got in zip([whole, *evals], [built, *built_evals], strict=True):
                for field, parts in put(over, got, 8).items():
                    assert parts.keys() == mine
                    for index, part in parts.values():
                        np.testing.assert_array_equal(part, want[field][index])
            seen += local
    local_rows.cache_clear()
    assert set(seen) == set(range(8))
