# SPDX-License-Identifier: Apache-2.0
"""LoRA on experts: in both spellings of peft, over meshes, quantized, merged and in decoding."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from flax import nnx
from safetensors.numpy import load_file
from steps import TINY, ragged_rows, trajectory
from test_files import base_in, both_ways, loaded_strictly, torch_base, torch_logits
from tiny import logits_of, one_device, some_tokens

from jaxllm.config import MeshSection, PeftSection
from jaxllm.errors import UserError
from jaxllm.hf import load_hf, save_adapter
from jaxllm.model.config import Experts, LayerKind, Rope
from jaxllm.ops.quantized import Quantized
from jaxllm.peft.combine import choose, folded_layer, merged
from jaxllm.peft.files import make_adapter
from jaxllm.peft.targets import UNCONVERTED
from jaxllm.sampling import Sampling, generate

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "minimax_m2"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PARAMETERS = {
    "all-linear": dict(target_modules="all-linear"),
    "experts and router": dict(
        target_modules=["q_proj"], target_parameters=[*FUSED, "gate.weight"], use_rslora=True
    ),
    "gate and up": dict(target_modules=[], target_parameters=FUSED[:1]),
    "down, of one layer": dict(
        target_modules=["v_proj"], target_parameters=["model.layers.2.mlp.experts.down_proj"]
    ),
    "experts, router, q": dict(
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj", "router.weight"],
        use_rslora=True,
    ),
    "experts, gate, dense MLPs, convolutions": dict(
        target_modules=["in_proj", "w2"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
    ),
    "experts, router as a module, q": dict(
        target_modules=["q_proj", "router.proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    ),
    "experts without gates, router, modules": dict(
        target_modules=["in_proj", "up_proj", "fc1_latent_proj"],
        target_parameters=["experts.up_proj", "experts.down_proj", "gate.weight"],
    ),
    "gate and up alone": dict(target_modules=[], target_parameters=["experts.gate_up_proj"]),
    "patterns": dict(
        target_modules=[],
        target_parameters=FUSED,
        rank_pattern={"experts.gate_up_proj": 3},
        alpha_pattern={r".*\.1\.mlp\.experts\.down_proj": 11},
    ),
}
FUSED_TOO = ("experts, router, q", "gate and up alone")  # of families fused in checkpoints
CONVOLVED = "experts, gate, dense MLPs, convolutions"
ROUTED = "experts, router as a module, q"
UNGATED = "experts without gates, router, modules"
OTHERS = (*FUSED_TOO, CONVOLVED, ROUTED, UNGATED)
CASES = [("qwen3_moe", name) for name in PARAMETERS if name not in OTHERS]
CASES += [("lfm2_moe", CONVOLVED), ("lfm2_moe", "all-linear"), ("gemma4_text experts", ROUTED)]
CASES += [("gpt_oss", name) for name in FUSED_TOO] + [("llama4_text", name) for name in FUSED_TOO]
CASES += [(name, "experts, router, q") for name in ("granitemoehybrid", "granitemoeshared")]
CASES += [("flex_olmo", "all-linear")]
CASES += [(name, "experts and router") for name in ("solar_open", "exaone_moe", "hy_v3", "afmoe")]
CASES += [(name, "experts and router") for name in ("cohere2_moe", "mimo_v2_flash")]
CASES += [("nemotron_h experts of latents, biases", UNGATED)]
CASES += [(f, "all-linear") for f in FAMILIES]
STACKS = ["glm4_moe", "dots1", "ernie4_5_moe", "mellum", "qwen2_moe some dense"]
CASES += [(name, "experts and router") for name in STACKS] + [("hunyuan_v1_moe", "all-linear")]
CASES += [(name, "all-linear") for name in ("glm4_moe", "deepseek_v3", "deepseek_v32", "mellum")]


@pytest.mark.parametrize(("family", "name"), dict.fromkeys(CASES))
def test_adapters_of_fused_parameters_round_trip_with_peft(tmp_path, family, name):
    options = {"r": 4, "lora_alpha": 6} | PARAMETERS[name]
    config = peft.LoraConfig(**options, task_type="CAUSAL_LM")
    ours, want, here, back = both_ways(tmp_path, base_in(tmp_path, family), config)
    for got in (here, back, logits_of(merged(ours), some_tokens())):
        np.testing.assert_allclose(got, want, atol=1e-4)
    theirs, saved = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")
    )
    assert theirs.keys() == saved.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(saved[key], value)
    assert any(".experts." in key for key in theirs) or (
        family in UNCONVERTED and name == "all-linear"
    )
    assert ours.peft.count(ours) == sum(value.size for value in theirs.values())


MODULES = {
    "qwen3_moe": ("q_proj", "gate_proj", "up_proj", "down_proj"),
    "olmoe": ("gate", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("w1", "w2", "w3", "gate", "v_proj"),
    "minimax_m2": ("w1", "w2", "w3"),
}


def randomized(model):
    """The model with random A and B."""
    keys = iter(jax.random.split(jax.random.key(3), 100))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("a", "b"):
            noise = jax.random.normal(next(keys), variable.get_value().shape)
            variable.set_value(0.15 * noise)
    return model


def trained_in_ours(base, section):
    """Our model with a random adapter of a section."""
    cfg = load_hf(base, mesh=one_device()).cfg
    adapter = make_adapter(cfg, section)
    model = load_hf(base, mesh=one_device(), peft=adapter)
    return randomized(model)


@pytest.mark.parametrize("family", MODULES)
def test_adapters_of_experts_as_modules_load_in_peft_and_come_back(tmp_path, family):
    base, tokens = base_in(tmp_path, family), some_tokens()
    section = PeftSection("lora", r=3, lora_alpha=7.0, target_modules=MODULES[family])
    ours = trained_in_ours(base, section)
    plain = logits_of(load_hf(base, mesh=one_device()), tokens)
    want = logits_of(ours, tokens)
    assert np.abs(want - plain).max() > 0.1
    save_adapter(ours, str(tmp_path / "saved"))
    names = load_file(tmp_path / "saved/adapter_model.safetensors")
    inner = (
        "block_sparse_moe.experts.5.w1" if "w1" in MODULES[family] else "mlp.experts.5.gate_proj"
    )
    assert names[f"base_model.model.model.layers.3.{inner}.lora_A.weight"].shape == (3, 32)
    config = json.loads((tmp_path / "saved/adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(MODULES[family])
    assert "target_parameters" not in config and not config["rank_pattern"]
    there = torch_logits(loaded_strictly(base, str(tmp_path / "saved")), tokens)
    model = peft.PeftModel.from_pretrained(torch_base(base), str(tmp_path / "saved"))
    for got in (there, torch_logits(model, tokens), logits_of(merged(ours), tokens)):
        np.testing.assert_allclose(got, want, atol=1e-4)
    again = load_hf(base, adapter=str(tmp_path / "saved"), mesh=one_device())
    save_adapter(again, str(tmp_path / "again"))
    for key, value in load_file(tmp_path / "again/adapter_model.safetensors").items():
        np.testing.assert_array_equal(value, names.pop(key))
    assert not names


def test_shared_experts_are_modules_and_the_others_are_not(tmp_path):
    """As in peft with transformers 5, whose model has gate_proj in the shared expert alone."""
    base = base_in(tmp_path, "qwen2_moe")
    config = peft.LoraConfig(r=4, target_modules=["gate_proj", "o_proj"], task_type="CAUSAL_LM")
    _, want, here, back = both_ways(tmp_path, base, config)
    for got in (here, back):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_adapters_of_experts_can_be_chosen_and_decode_as_the_forward_pass_does(tmp_path):
    base, tokens = base_in(tmp_path, "qwen3_moe"), some_tokens()
    for seed, name in enumerate(("law", "code")):
        config = peft.LoraConfig(r=2 + seed, target_modules="all-linear", task_type="CAUSAL_LM")
        _, *found = both_ways(tmp_path / name, base, config)
        if not seed:
            law = found[1]
    places = {name: str(tmp_path / name / "theirs") for name in ("law", "code")}
    model = load_hf(base, adapter=places, mesh=one_device())
    np.testing.assert_allclose(logits_of(model, tokens), law, atol=2e-5)
    choose(model, None)
    plain = logits_of(load_hf(base, mesh=one_device()), tokens)
    np.testing.assert_allclose(logits_of(model, tokens), plain, atol=2e-5)
    choose(model, "code")
    text = [5, 9, 11]
    for token in generate(model, [text], Sampling(max_new_tokens=8))[0]:
        assert token == int(jnp.argmax(logits_of(model, np.asarray([text]))[0, -1]))
        text = [*text, token]
    with pytest.raises(UserError, match="rows of a batch cannot use different adapters of experts"):
        generate(model, [text, text], Sampling(max_new_tokens=2), adapters=["law", "code"])


# ---- training


PLAIN = replace(
    TINY,
    family="qwen3_moe",
    ropes=(Rope(),),
    kinds=(LayerKind(),),
    layer_kinds=(),
    num_layers=2,
    experts=Experts(count=8, top_k=3, size=16),
)
SECTIONS = {
    "fused": PeftSection("lora", target_modules=("all-linear",)),
    "modules": PeftSection("lora", target_modules=("gate_proj", "up_proj", "down_proj", "gate")),
}
WAYS = {
    "micro-batches and remat": dict(count=4, remat="dots"),
    "fsdp 2 x tensor 2 x data 2": dict(devices=8, mesh=MeshSection(data=2, fsdp=2, tensor=2)),
    "fsdp 2 x context 4": dict(devices=8, mesh=MeshSection(context=4, fsdp=2), remat="full"),
    "expert 4 x fsdp 2": dict(devices=8, mesh=MeshSection(expert=4, fsdp=2)),
}


@pytest.fixture(scope="module")
def alone():
    found = {}

    def of(spelled, base="none"):
        if (spelled, base) not in found:
            keys = dict(section=SECTIONS[spelled], shape=PLAIN, quantize_base=base)
            found[spelled, base] = trajectory(ragged_rows(16), **keys)
        return found[spelled, base]

    return of


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spelled", SECTIONS)
def test_training_does_not_depend_on_how_an_update_is_computed(alone, spelled, way):
    losses, norms, state, _ = trajectory(
        ragged_rows(16), section=SECTIONS[spelled], shape=PLAIN, **WAYS[way]
    )
    np.testing.assert_allclose(losses, alone(spelled)[0], rtol=2e-5)
    np.testing.assert_allclose(norms, alone(spelled)[1], rtol=1e-4)
    mlp = state.trainable["layers"]["mlp"]
    names = {"fused": {"gate_up", "down"}, "modules": {"gate", "up", "down"}}[spelled]
    assert set(mlp) == names | {"router_lora"} and losses[-1] < losses[0]
    b = mlp["down"]["lora"]["b"]
    assert b.shape == (2, 8, 8, 32) and np.all(np.any(np.asarray(b), (2, 3)))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_base_may_be_quantized(alone, kind):
    losses, norms, _, (_, frozen) = alone("fused", kind)
    assert isinstance(frozen["layers"]["mlp"]["down"]["kernel"], Quantized)
    assert losses[-1] < losses[0] and losses[0] != alone("fused")[0][0]
    keys = dict(section=SECTIONS["fused"], shape=PLAIN, quantize_base=kind)
    way = "fsdp 2 x tensor 2 x data 2" if kind == "int8" else "expert 4 x fsdp 2"
    over = trajectory(ragged_rows(16), **keys, **WAYS[way])
    np.testing.assert_allclose(over[0], losses, rtol=2e-5)
    np.testing.assert_allclose(over[1], norms, rtol=1e-4)


# ---- errors


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(lora_dropout=0.1), "without dropout, DoRA and PiSSA, as in peft; or set exclude"),
        (dict(use_dora=True, target_modules=("gate",)), "without dropout, DoRA and PiSSA"),
        (dict(init_lora_weights="pissa"), "without dropout, DoRA and PiSSA"),
        (dict(target_modules=("down_proj",)), "down_proj of experts cannot be adapted without"),
        (
            dict(target_modules=(r".*experts\.1\..*",)),
            "the experts of a layer need one rank and alpha; name all or none",
        ),
        (
            dict(target_modules=("gate_proj", "up_proj", "down_proj"), rank_pattern={"up_proj": 2}),
            "need one rank and alpha in all layers",
        ),
        (
            dict(
                target_modules=("gate_proj", "up_proj", "down_proj"),
                target_parameters=("experts.down_proj",),
            ),
            "the experts are named in target_modules and in target_parameters",
        ),
        (
            dict(target_parameters=("experts.up_proj",)),
            "'experts.up_proj' matches nothing; the model has mlp.experts.gate_up_proj, mlp.exp",
        ),
    ],
)
def test_what_peft_does_not_do_with_experts_is_an_error(keys, words):
    with pytest.raises(UserError, match=words):
        make_adapter(PLAIN, PeftSection("lora", **keys))


def test_experts_and_router_can_be_excluded():
    keys = dict(lora_dropout=0.1, use_dora=True, exclude_modules=("experts", "gate"))
    targets = make_adapter(PLAIN, PeftSection("lora", **keys)).targets
    assert {t.path for t in targets} == {f"layers.attn.{part}" for part in "qkvo"}


def test_a_dense_model_has_no_such_parameters():
    with pytest.raises(UserError, match="target_parameters: the model has no parameters that it"):
        make_adapter(TINY, PeftSection("lora", target_parameters=("experts.down_proj",)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_needs_the_float32_of_one_layer_of_experts(dtype):
    """Beside the weights it reads and those it writes, in place."""
    L, E, D, F, R = 8, 4, 64, 64, 4
    kernel = jax.ShapeDtypeStruct((L, E, D, F), dtype)
    shapes = {"a": (L, E, D, R), "b": (L, E, R, F), "scale": (L, R)}
    parts = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    lowered = jax.jit(folded_layer, donate_argnums=0).lower(kernel, 0, kernel, parts, 1)
    memory = lowered.compile().memory_analysis()
    layer = 4 * E * D * F
    assert memory is not None and layer <= memory.temp_size_in_bytes < 1.5 * layer
    assert memory.alias_size_in_bytes == kernel.size * kernel.dtype.itemsize
