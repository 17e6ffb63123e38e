# SPDX-License-Identifier: Apache-2.0
"""Gradients over a mesh: the numbers of one device, and what is sent."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from runs import ENV
from steps import TINY, T, V, assert_same_trajectory, pair_rows, ragged_rows, trajectory

from jaxllm import hlo
from jaxllm.collectives import fsdp_line, shard_over_rows
from jaxllm.config import MeshSection, OptimSection, PeftSection, TrainConfig
from jaxllm.hf import abstract_model
from jaxllm.mesh import AXES, make_mesh
from jaxllm.model import stack
from jaxllm.model.adapter import NO_ADAPTER
from jaxllm.objectives.dpo import dpo_loss
from jaxllm.objectives.lm import lm_loss
from jaxllm.objectives.reward import reward_loss
from jaxllm.objectives.table import Objective
from jaxllm.ops import embedding
from jaxllm.ops.embedding import lookup
from jaxllm.program import assemble

MESHES = {
    "fsdp 8": MeshSection(fsdp=8),
    "data 2 x fsdp 4": MeshSection(data=2, fsdp=4),
    "tensor 4 x fsdp 2": MeshSection(fsdp=2, tensor=4),
    "context 4 x fsdp 2": MeshSection(fsdp=2, context=4),
    "context 2 x tensor 2 x fsdp 2": MeshSection(fsdp=2, context=2, tensor=2),
    "data 2 x fsdp 2 x tensor 2": MeshSection(data=2, fsdp=2, tensor=2),
    "zero 0": MeshSection(fsdp=8, zero=0),
    "zero 1": MeshSection(fsdp=8, zero=1),
    "zero 2": MeshSection(data=2, fsdp=4, zero=2),
}
LORA = PeftSection(method="lora", target_modules=("all-linear",))
WORK = {
    "pretrain": (ragged_rows, {}),
    "LoRA": (ragged_rows, {"section": LORA}),
    "QLoRA": (ragged_rows, {"section": LORA, "quantize_base": "nf4"}),
    "int8": (ragged_rows, {"section": LORA, "quantize_base": "int8"}),
    "DoRA": (ragged_rows, {"section": replace(LORA, use_dora=True)}),
    "DPO": (pair_rows, {"objective": Objective(dpo_loss, compares=True)}),
    "reward": (pair_rows, {"objective": Objective(reward_loss), "scores": True}),
}


@pytest.fixture(scope="module")
def alone():
    """The trajectory of each kind of work on one device."""
    found = {}

    def of(work):
        if work not in found:
            rows, options = WORK[work]
            found[work] = trajectory(rows(16), steps=10, **options)[:2]
        return found[work]

    return of


def over(name, work, **options):
    rows, given = WORK[work]
    return trajectory(rows(16), steps=10, devices=8, mesh=MESHES[name], **given, **options)


# The rest of the product is run by make sweep.
SHORT = {("fsdp 8", "pretrain"), ("data 2 x fsdp 2 x tensor 2", "DPO"), ("zero 2", "LoRA")}
SHORT |= {("tensor 4 x fsdp 2", "LoRA"), ("context 4 x fsdp 2", "DPO")}
SWEEP = pytest.mark.sweep
CASES = [
    pytest.param(mesh, work, marks=[] if (mesh, work) in SHORT else SWEEP)
    for mesh in MESHES
    for work in WORK
]


@pytest.mark.parametrize(("mesh", "work"), CASES)
def test_ten_steps_over_a_mesh_equal_those_of_one_device(alone, mesh, work):
    losses, norms, state, _ = over(mesh, work)
    assert_same_trajectory(losses, alone(work)[0])
    assert_same_trajectory(norms, alone(work)[1])
    leaves = jax.tree.leaves(state.trainable if "section" not in WORK[work][1] else {})
    split = [not x.sharding.is_fully_replicated for x in leaves if x.ndim > 2]
    if MESHES[mesh].zero == 3:
        assert all(split)
    else:
        assert not any(split)
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim > 2]
        held = [not x.sharding.is_fully_replicated for x in moments]
        assert all(held) if MESHES[mesh].zero else not any(held)


def test_micro_batches_and_chunks_of_the_loss_change_nothing(alone):
    """Devices leave the loop over chunks at different times, since their rows are ragged."""
    mesh = MESHES["data 2 x fsdp 2 x tensor 2"]
    small = Objective(partial(lm_loss, chunk=8))
    losses, norms, _, _ = trajectory(
        ragged_rows(16), steps=10, devices=8, mesh=mesh, count=2, objective=small
    )
    assert_same_trajectory(losses, alone("pretrain")[0])
    assert_same_trajectory(norms, alone("pretrain")[1])


def test_zero_2_accumulates_parts_of_gradients(alone):
    losses, norms, _, _ = over("zero 2", "pretrain", count=2)
    assert_same_trajectory(losses, alone("pretrain")[0])
    assert_same_trajectory(norms, alone("pretrain")[1])


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("fsdp 8", {"loss_blocks": 3, "remat": "full"}),
        pytest.param("tensor 4 x fsdp 2", {"loss_blocks": 2}, marks=SWEEP),
    ],
)
def test_blocks_of_the_vocabulary_change_nothing(alone, mesh, options):
    losses, norms, _, _ = over(mesh, "pretrain", **options)
    assert_same_trajectory(losses, alone("pretrain")[0])
    assert_same_trajectory(norms, alone("pretrain")[1])


@pytest.mark.parametrize(
    ("mesh", "work", "options"),
    [
        ("fsdp 8", "pretrain", {"mlp_blocks": 4, "remat": "full"}),
        pytest.param("data 2 x fsdp 4", "LoRA", {"mlp_blocks": 2}, marks=SWEEP),
        ("context 4 x fsdp 2", "DPO", {"mlp_blocks": 4, "remat": "names"}),
        pytest.param("zero 2", "pretrain", {"mlp_blocks": 8, "remat": "dots"}, marks=SWEEP),
    ],
)
def test_blocks_of_the_mlp_change_nothing(alone, mesh, work, options):
    losses, norms, _, _ = over(mesh, work, **options)
    assert_same_trajectory(losses, alone(work)[0])
    assert_same_trajectory(norms, alone(work)[1])


def test_blocks_of_the_mlp_change_nothing_on_one_device(alone):
    losses, norms, _ = trajectory(ragged_rows(16), steps=10, mlp_blocks=4, remat="full")[:3]
    assert_same_trajectory(losses, alone("pretrain")[0])
    assert_same_trajectory(norms, alone("pretrain")[1])


def test_dropout_is_that_of_one_device_where_rows_are_split():
    lora = {"section": replace(LORA, lora_dropout=0.3)}
    wanted = trajectory(ragged_rows(16), steps=3, **lora)[0]
    mesh = MESHES["context 4 x fsdp 2"]
    losses = trajectory(ragged_rows(16), steps=3, devices=8, mesh=mesh, **lora)[0]
    assert_same_trajectory(losses, wanted)


def test_a_prefix_precedes_rows_that_are_split():
    prefix = {"section": PeftSection(method="prefix", num_virtual_tokens=5)}
    wanted = trajectory(ragged_rows(16), steps=3, **prefix)[:2]
    mesh = MESHES["context 2 x tensor 2 x fsdp 2"]
    found = trajectory(ragged_rows(16), steps=3, devices=8, mesh=mesh, **prefix)[:2]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_gradients_keep_the_dtype_of_their_sum_until_the_end_of_a_micro_batch(monkeypatch):
    """They are the same numbers as gradients that are converted back at once."""
    mesh = MeshSection(data=2, fsdp=4, reduce_dtype="bfloat16")

    def run(**options):
        rows = ragged_rows(16)
        model = {"compute_dtype": "bfloat16", "remat": "full"} | options
        return trajectory(rows, steps=3, devices=8, mesh=mesh, count=2, **model)[:2]

    found = run(), run(mlp_blocks=2)
    monkeypatch.setattr(stack, "narrowed", lambda weights, _: weights)
    np.testing.assert_array_equal(found[0], run())
    # Blocks round other sums to bfloat16, so the CPU's products matter; 2**-8 is its precision.
    (losses, norms), (wanted_losses, wanted_norms) = found[1], found[0]
    assert_same_trajectory(losses, wanted_losses, rtol=1e-3)
    assert_same_trajectory(norms, wanted_norms, rtol=2**-8)


def test_gradients_that_are_summed_in_bfloat16_are_near(alone):
    """docs/design.md has the figures: 1.5e-4 and 8.3e-4."""
    rows, options = WORK["pretrain"]
    mesh = MeshSection(fsdp=8, reduce_dtype="bfloat16")
    losses, norms, _, _ = trajectory(rows(16), steps=10, devices=8, mesh=mesh, **options)
    apart = np.abs(losses / alone("pretrain")[0] - 1)
    assert 1e-7 < apart.max() < 5e-4
    assert 1e-6 < np.abs(norms / alone("pretrain")[1] - 1).max() < 3e-3


# ---- what is sent, in the program that XLA compiles for eight CPU devices


def sent(section, rows=16, num_kv_heads=2, **model):
    """{(op, axes): [payloads of all runs, in elements of float32]} of TINY's step."""
    mesh = make_mesh(section, jax.devices()[:8])
    shape = replace(TINY, num_kv_heads=num_kv_heads)
    cfg = TrainConfig(objective="sft", mesh=section, batch_size=rows)
    cfg = replace(
        cfg,
        optim=OptimSection(learning_rate=1e-3),
        micro_batch_size=rows // (section.data * section.fsdp),
    )

    def make(adapter):
        return abstract_model(shape, mesh, {}, peft=adapter, **model)

    program = assemble(cfg, mesh, make, NO_ADAPTER, Objective(lm_loss))
    with jax.set_mesh(mesh):
        step = program.step(10).lower(program.state, program.frozen, program.batch(T))
        found = hlo.collectives(hlo.parse(step.compile().as_text()))
    sizes = {}
    for one in found:
        key = one.op, one.axes(mesh.shape)
        sizes.setdefault(key, []).extend([one.payload // 4] * one.count)
    return sizes


# Elements of the matrices of a layer of TINY: q, k, v, o, gate, up, down; and the head.
D, F, KV, L = 32, 64, 16, 4
LAYER, HEAD_SIZE = 2 * D * D + 2 * D * KV + 3 * D * F, D * V


def test_zero_3_gathers_each_weight_twice_and_scatters_its_gradient_once():
    found = sent(MeshSection(fsdp=8), remat="full")
    gathered, scattered = found.pop(("all-gather", "fsdp")), found.pop(("reduce-scatter", "fsdp"))
    tokens = 16 * T
    assert sum(gathered) == 2 * L * LAYER + HEAD_SIZE + tokens  # the head's gradient needs no third
    assert sum(scattered) == L * LAYER + HEAD_SIZE
    exchanged = found.pop(("all-to-all", "fsdp"))
    assert sum(exchanged) == 2 * (tokens // 8) * D  # the embedding's output and its gradient
    vectors = found.pop(("all-reduce", "fsdp"))
    assert sum(vectors) < 3 * (2 * L + 1) * D  # gradients of norms, and metrics: no matrix
    assert not found


def test_blocks_of_the_vocabulary_are_gathered_twice():
    blocks = 3
    found = sent(MeshSection(fsdp=8), remat="full", loss_blocks=blocks)
    width = -(-V // blocks) * blocks * D
    assert sum(found["all-gather", "fsdp"]) == 2 * L * LAYER + 2 * width + 16 * T
    assert sum(found["reduce-scatter", "fsdp"]) == L * LAYER + width


def test_blocks_of_the_mlp_send_what_the_whole_does():
    whole = sent(MeshSection(fsdp=8), remat="full")
    blocks = sent(MeshSection(fsdp=8), remat="full", mlp_blocks=4)
    assert {k: sum(v) for k, v in blocks.items()} == {k: sum(v) for k, v in whole.items()}
    more = 3 * (4 - 1) * L  # the matrices of an MLP, in 4 blocks each
    assert len(blocks["reduce-scatter", "fsdp"]) == len(whole["reduce-scatter", "fsdp"]) + more
    assert len(blocks["all-gather", "fsdp"]) == len(whole["all-gather", "fsdp"]) + 2 * more


def test_context_sums_the_scattered_gradients():
    """No weight's gradient is all-reduced before it is scattered along fsdp."""
    found = sent(MeshSection(fsdp=2, context=4), remat="full")
    assert sum(found["reduce-scatter", "fsdp"]) == L * LAYER + HEAD_SIZE
    parts = (L * LAYER + HEAD_SIZE + V * D) // 2  # and the token table's
    assert parts <= sum(found["all-reduce", "context"]) < parts + 3 * (2 * L + 1) * D


def test_zero_2_scatters_gradients_and_gathers_no_weight_in_the_layers():
    found = sent(MeshSection(fsdp=8, zero=2), remat="full")
    assert sum(found["reduce-scatter", "fsdp"]) == L * LAYER + 2 * HEAD_SIZE  # head and token table
    assert sum(found["all-reduce", "fsdp"]) < 3 * (2 * L + 1) * D


def test_tensor_parallelism_sends_activations_twice_a_layer_and_pass():
    """One all-gather and one reduce-scatter for each of attention and MLP, as much as one
    all-reduce; the backward pass has the same again."""
    found = sent(MeshSection(fsdp=2, tensor=4), remat="names", num_kv_heads=4)
    activations = 8 * T * D
    gathers = [n for n in found["all-gather", "tensor"] if n == activations]
    scatters = [n for n in found["reduce-scatter", "tensor"] if n == activations]
    # Forward, recomputed and backward; the output of down is not computed again. And the head.
    assert (len(gathers), len(scatters)) == (6 * L + 1, 5 * L)
    assert max(found["all-reduce", "tensor"]) < activations


STAGES = """
import numpy as np, jax
from jax.sharding import PartitionSpec as P
from jaxllm.config import MeshSection
from jaxllm.collectives import Reduction, shard_over_rows, reducing, scattered
from jaxllm.mesh import make_mesh

def summed(line, sizes):
    mesh = make_mesh(MeshSection(**sizes))
    size = mesh.shape["data"] * mesh.shape["fsdp"]
    x = np.random.default_rng(0).integers(-9, 9, (size, 128, 8)).astype(np.float32)
    def of_device(x):
        with reducing(Reduction(line=line)):
            return jax.lax.psum(scattered(x[0], 0, P()), "data")
    with jax.set_mesh(mesh):
        run = shard_over_rows(of_device, mesh, P(("data", "fsdp")), P("fsdp"))
        return np.array_equal(jax.jit(run)(x), x.sum(0))

found = [summed(line, {"fsdp": 64}) for line in (1, 4, 8, 16)]
found.append(summed(4, {"data": 4, "fsdp": 16}))
print(found)
assert all(found)
"""


def test_a_reduce_scatter_in_two_stages_gives_each_device_its_own_part():
    """64 devices: with the stages in the other order the parts would be permuted."""
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=64", "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", STAGES]
    done = subprocess.run(run, env=ENV | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


class Chip:
    """Stands in for a TPU."""

    platform, device_kind, slice_index = "tpu", "TPU v5p", 0

    def __init__(self, coords):
        self.coords, self.core_on_chip = coords, 0


@pytest.mark.parametrize(
    ("torus", "sizes", "line"),
    [
        ((4, 4, 4), (1, 64, 1, 1, 1), 4),
        ((4, 4, 8), (1, 128, 1, 1, 1), 8),
        ((16, 16), (1, 256, 1, 1, 1), 16),
        ((4, 4, 4), (4, 16, 1, 1, 1), 4),
        ((2, 2), (4, 1, 1, 1, 1), 1),
        ((4, 4, 4), (16, 4, 1, 1, 1), 1),
    ],
)
def test_the_last_stage_of_a_reduction_is_a_line_of_the_torus(torus, sizes, line):
    chips = np.empty(int(np.prod(torus)), object)
    chips[:] = [Chip(coords) for coords in np.ndindex(*torus)]
    types = (AxisType.Auto,) * len(AXES)
    mesh = Mesh(chips.reshape(sizes), AXES, axis_types=types)
    assert fsdp_line(mesh) == line


@pytest.mark.parametrize("most", [None, 100])  # of all devices; 100: in parts of a row
@pytest.mark.parametrize("length", [32, 30])  # 30 tokens divide by context 2, not by 4
@pytest.mark.parametrize("vocabulary", [96, 97])
@pytest.mark.parametrize("axes", [{"tensor": 4}, {"context": 2}, {"context": 2, "tensor": 2}])
def test_a_split_token_table_is_looked_up_like_a_whole_one(
    axes, vocabulary, length, most, monkeypatch
):
    if most:
        monkeypatch.setattr(embedding, "MOST_TOKENS", most)
    mesh = make_mesh(MeshSection(**axes))
    table = jax.random.normal(jax.random.key(0), (vocabulary, 16))
    tokens = jax.random.randint(jax.random.key(1), (8, length), 0, vocabulary)
    weights = jax.random.normal(jax.random.key(2), (8, length, 16))

    def loss(table, tokens, weights):
        return jnp.sum(weights * lookup(table, tokens, 16, jnp.float32))

    def of_device(table, tokens, weights):
        value, gradient = jax.value_and_grad(loss)(table, tokens, weights)
        return jax.lax.psum(value, "fsdp"), gradient

    split = P(None, "fsdp")
    with jax.set_mesh(mesh):
        run = shard_over_rows(of_device, mesh, (split, P("fsdp"), P("fsdp")), (P(), split))
        found = jax.jit(run)(table, tokens, weights)
    wanted = jax.value_and_grad(loss)(table, tokens, weights)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
