# SPDX-License-Identifier: Apache-2.0
"""Models with layers of unlike structure: how they are cut, and that nothing else notices."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import MODEL, arguments, command, killed, lines_of
from safetensors.numpy import load_file
from steps import (
    MESHES,
    TINY,
    T,
    V,
    batch_of,
    decoder,
    ragged_rows,
    same_over_mesh,
    trajectory,
    unpacked,
)

from jaxllm.cli import main
from jaxllm.config import PeftSection
from jaxllm.finite import _tensor_name
from jaxllm.hf import hf_tensors
from jaxllm.model.config import Experts, LayerKind, cut_into_scans
from jaxllm.model.families.tensors import key_table, tensor_names
from jaxllm.model.moe import route
from jaxllm.objectives.lm import lm_loss
from jaxllm.ops.quantized import Quantized
from jaxllm.peft.combine import merged
from jaxllm.sampling import Sampling, generate

# Windows and RoPE differ within a stack too.
LAYERS = {
    "one dense layer first": "DEeEe",
    "a period of two": "DEDeDE",
    "a first layer, then periods": "DdEDEDe",
}
KINDS = {
    "D": LayerKind(0, None, dense=True),
    "d": LayerKind(1, 7, dense=True),
    "E": LayerKind(0, None),
    "e": LayerKind(1, 9),
}


def shape(layers):
    return replace(
        TINY,
        family="qwen3_moe",
        num_layers=len(layers),
        kinds=tuple(KINDS.values()),
        layer_kinds=tuple(map(list(KINDS).index, layers)),
        experts=Experts(count=8, top_k=3, size=16, shared_size=24),
    )


FIRST, PERIODS = shape(LAYERS["one dense layer first"]), shape(LAYERS["a period of two"])
LORA = PeftSection(method="lora", target_modules=("all-linear",), r=3)


@pytest.mark.parametrize(
    ("structures", "scans"),
    [
        ("EEEE", ["0 1 2 3"]),
        ("DEEEE", ["0", "1 2 3 4"]),
        ("DEDEDE", ["0 2 4|1 3 5"]),
        ("DDDEDEDE", ["0 1", "2 4 6|3 5 7"]),
        ("EDEE", ["0", "1", "2 3"]),
        ("GGGAGGGAGGGA", ["0 4 8|1 5 9|2 6 10|3 7 11"]),
        ("DE" * 4 + "E" * 3, ["0 2 4 6|1 3 5 7", "8 9 10"]),
    ],
)
def test_layers_are_cut_into_as_few_stacks_as_possible(structures, scans):
    found = cut_into_scans(tuple(structures))
    assert ["|".join(" ".join(map(str, stack)) for stack in scan) for scan in found] == scans


def test_a_long_model_of_random_structures_is_cut_in_time():
    structures = tuple(np.random.default_rng(0).integers(0, 3, 10_000).tolist())
    layers = [i for scan in cut_into_scans(structures) for i in np.array(scan).T.ravel()]
    assert layers == list(range(10_000))


def test_stacks_are_named_by_their_first_layer():
    assert TINY.stacks == {"layers": range(4)}
    assert FIRST.stacks == {"layers_0": range(1), "layers_1": range(1, 5)}
    assert PERIODS.stacks == {"layers_0": range(0, 6, 2), "layers_1": range(1, 6, 2)}
    names = [name for key in key_table(PERIODS) for name in tensor_names(PERIODS, key.name)]
    assert len(names) == len(set(names))
    gates = [n for n in names if n.endswith("mlp.gate_proj.weight")]
    assert gates == [f"model.layers.{i}.mlp.gate_proj.weight" for i in (0, 2, 4)]
    tensors = [t.name for t in hf_tensors(decoder(shape=PERIODS))]
    order = [int(name.split(".")[2]) for name in tensors if ".layers." in name]
    assert order == sorted(order)  # written layer by layer


@pytest.fixture(scope="module", params=[FIRST, PERIODS], ids=["first", "periods"])
def alone(request):
    return request.param, *trajectory(ragged_rows(16), shape=request.param)[:2]


@pytest.mark.parametrize("mesh", MESHES)
def test_stacks_on_a_mesh_equal_those_of_one_device(alone, mesh):
    cfg, *want = alone
    weights = same_over_mesh(mesh, cfg, *want)
    parts = MESHES[mesh].fsdp * MESHES[mesh].tensor
    for name in cfg.stacks:
        kernel = weights[name]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size * parts == kernel.size


@pytest.mark.parametrize("layers", LAYERS)
def test_packed_rows_equal_rows_of_one_text(layers):
    model, rows = decoder(shape=shape(LAYERS[layers])), ragged_rows(6)
    loss = nnx.jit(lambda model, batch: lm_loss(model, batch, None)[:2])
    packed, single = loss(model, batch_of(rows)), loss(model, batch_of(unpacked(rows)))
    assert [float(x) for x in packed] == pytest.approx([float(x) for x in single], rel=1e-6)


PEFT = {
    "none": PeftSection(),
    "lora": LORA,
    "prefix": PeftSection(method="prefix", num_virtual_tokens=3),
    "prompt": PeftSection(method="prompt", num_virtual_tokens=3),
    "adapter": PeftSection(method="adapter", bottleneck=4),
}


@pytest.mark.parametrize(
    ("layers", "method"),
    [
        ("one dense layer first", "none"),
        ("a period of two", "lora"),
        ("a period of two", "prompt"),
        ("a first layer, then periods", "prefix"),
        ("a first layer, then periods", "adapter"),
    ],
)
def test_decoding_with_an_adapter_equals_the_whole_forward_pass(layers, method):
    """Unstacked, through the cache; the adapter's weights are random."""
    model = decoder(PEFT[method], shape=shape(LAYERS[layers]))
    rng = np.random.default_rng(0)
    _, adapted, _ = nnx.split(model, model.peft.trains, ...)
    if model.peft.frozen:
        noise = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape)), adapted)
        nnx.update(model, jax.tree.map(lambda x, n: (x + n).astype(x.dtype), adapted, noise))
    prompts = [rng.integers(0, V, n).tolist() for n in (9, 4)]
    for prompt, got in zip(prompts, generate(model, prompts, Sampling(6)), strict=True):
        tokens = list(prompt)
        for _ in range(6):
            row = np.pad(np.asarray(tokens), (0, T - len(tokens)))[None]
            ids = (np.arange(T) < len(tokens)).astype(np.int32)[None]
            tokens.append(int(_logits(model, row, ids)[0, len(tokens) - 1].argmax()))
        assert got == tokens[len(prompt) :]


@nnx.jit
def _logits(model, tokens, segment_ids):
    return model(tokens, segment_ids)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_adapters_train_alike_on_every_mesh(method):
    want = trajectory(ragged_rows(16), PEFT[method], shape=PERIODS)
    assert want[0][-1] < want[0][0]
    found = trajectory(
        ragged_rows(16), PEFT[method], shape=PERIODS, devices=8, mesh=MESHES["fsdp 8"]
    )
    np.testing.assert_allclose(found[0], want[0], rtol=2e-5)
    np.testing.assert_allclose(found[1], want[1], rtol=1e-4)


def test_a_bottlenecks_file_names_every_layer_and_is_read_again():
    model, other = (decoder(PEFT["adapter"], shape=PERIODS) for _ in range(2))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "up_bias":  # another value in each layer
            x = variable.get_value()
            variable.set_value(x + jnp.arange(x.size).reshape(x.shape))
    tensors = model.peft.tensors(model)
    places = [f"layers.{i}.{place}.up.bias" for i in range(6) for place in ("attn", "mlp")]
    assert {name.replace("_adapter", "") for name in tensors if name.endswith("up.bias")} == {
        *places
    }
    layers = {
        name.split(".")[1] for name, x in tensors.items() if x.flat[0] == 0 and "up.b" in name
    }
    assert layers == {"0", "1"}  # the first of each stack
    other.peft.load(other, dict(tensors))
    tokens = np.ones((1, T), np.int32)
    np.testing.assert_array_equal(other(tokens), model(tokens))


@pytest.mark.sweep
def test_a_killed_run_resumes_bit_for_bit(project):
    shape = dict(model_type="glm4_moe", num_hidden_layers=3, moe_intermediate_size=16)
    shape |= dict(n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)
    (project / "model.json").write_text(json.dumps(MODEL | shape))
    assert main(arguments(project, "pretrain", "straight")) == 0
    killed(command(project, "pretrain", "killed"), project / "killed")
    assert max(lines_of(project / "killed"), default=0) < 12
    assert main(arguments(project, "pretrain", "killed")) == 0
    want, got = lines_of(project / "straight"), lines_of(project / "killed")
    assert [got[i]["loss"] for i in range(1, 13)] == [want[i]["loss"] for i in range(1, 13)]
    a, b = (load_file(project / f"{n}/final/model.safetensors") for n in ("straight", "killed"))
    assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}
    assert "model.layers.2.mlp.experts.3.down_proj.weight" in a


def test_the_layers_are_quantized_and_lora_is_merged():
    _, _, _, (_, frozen) = trajectory(
        ragged_rows(8), LORA, shape=PERIODS, quantize_base="int8", steps=1
    )
    for name in PERIODS.stacks:
        assert isinstance(frozen[name]["mlp"]["down"]["kernel"], Quantized)
    model, tokens = decoder(LORA, shape=FIRST), np.ones((1, T), np.int32)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "b":
            variable.set_value(variable.get_value() + 0.1)
    want = model(tokens)
    np.testing.assert_allclose(merged(model)(tokens), want, atol=1e-4)


def test_values_that_are_not_finite_are_named_by_their_layer():
    def name(*path, index):
        return _tensor_name([jax.tree_util.DictKey(p) for p in path], index, PERIODS)

    down = name("layers_1", "mlp", "down", "kernel", index=1)
    assert down == "model.layers.3.mlp.experts.0.down_proj.weight"
    assert name("layers_0", "attn", "q", "kernel", index=2) == (
        "model.layers.4.self_attn.q_proj.weight"
    )


def test_only_experts_of_the_best_groups_are_chosen():
    """Groups of two; of equal groups, and of equal experts, the first."""
    experts = Experts(6, 2, 8, "sigmoid", renormalised=False, scale=2.5, groups=3, top_groups=1)
    logits = jnp.asarray([[9.0, -9.0, 1.0, 1.0, -3.0, 2.0], [0.0] * 6])
    weights, chosen = route(logits, None, experts)
    assert chosen.tolist() == [[2, 3], [0, 1]]  # 9 is the best expert, in the second best group
    np.testing.assert_allclose(weights[0], 2.5 * jax.nn.sigmoid(jnp.ones(2)), rtol=1e-6)
    weights, chosen = route(logits, None, replace(experts, top_groups=2))
    assert chosen.tolist() == [[0, 2], [0, 1]]
