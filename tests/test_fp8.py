# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints: FP8 is dequantized while it is read, every other format is an error."""

import copy
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from tiny import hf_config, logits_of, magnified, one_device, some_tokens, torch_logits
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from jaxllm.config import MeshSection, ModelSection, TrainConfig
from jaxllm.fp8 import Dequantised
from jaxllm.hf import load_hf, save_hf
from jaxllm.mesh import make_mesh
from jaxllm.program import build

F8 = torch.float8_e4m3fn
Q = "model.layers.0.self_attn.q_proj.weight"


def fine_grained(**values):
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", **values}


def compressed(**weights):
    weights = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": False, **weights}
    group = {"weights": weights, "input_activations": None, "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    return config | {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


# (family, quantization_config, end of the scale's name, block, shape of a scale of one number)
LAYOUTS = {
    "blocks": ("qwen3", fine_grained(weight_block_size=[16, 8]), "_scale_inv", (16, 8), None),
    "fused": ("phi3", fine_grained(weight_block_size=[24, 16]), "_scale_inv", (24, 16), None),
    "latent": (
        "deepseek_v32",
        fine_grained(weight_block_size=[16, 8]),
        "_scale_inv",
        (16, 8),
        None,
    ),
    "one": ("llama", fine_grained(weight_block_size=None), "_scale_inv", (0, 0), ()),
    "autofp8": (
        "llama",
        {"quant_method": "fp8", "activation_scheme": "static"},
        "_scale",
        (0, 0),
        (1,),
    ),
    "tensor": ("qwen2", compressed(strategy="tensor"), "_scale", (0, 0), (1,)),
    "channel": ("mistral", compressed(strategy="channel"), "_scale", (1, 0), None),
    "experts as modules": ("llama4_text", compressed(strategy="channel"), "_scale", (1, 0), None),
    "compressed blocks": (
        "gemma2",
        compressed(strategy="block", block_structure=[8, 32]),
        "_scale",
        (8, 32),
        None,
    ),
}


def as_modules(name, tensor):
    """A tensor of fused experts, [experts, in, out], as one of each."""
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    container, _, last = name.rpartition(".")
    if not container.endswith(".experts"):
        yield name, tensor
        return
    for part, matrices in zip(parts[last], tensor.chunk(len(parts[last]), -1), strict=True):
        for expert, matrix in enumerate(matrices):
            yield f"{container}.{expert}.{part}.weight", matrix.T.contiguous()


def quantised(folder, name, scale_dtype=torch.float32):
    """Writes a model in a layout; returns its tensors dequantized by torch, in float32."""
    kind, config, suffix, block, one = LAYOUTS[name]
    theirs = magnified(hf_config(kind))
    theirs.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if name == "experts as modules":
        tensors = dict(one for item in tensors.items() for one in as_modules(*item))
    whole = dict(tensors)
    for key, weight in list(tensors.items()):
        if not any(part in key for part in ("_proj", ".wk.", ".wq_b.")) or key.endswith("bias"):
            continue
        m, n = (b or size for b, size in zip(block, weight.shape, strict=True))
        scale = (torch.rand(-(-weight.shape[0] // m), -(-weight.shape[1] // n)) + 0.5) / 100
        scale = scale.to(scale_dtype)
        wide = scale.float().repeat_interleave(m, 0)[: weight.shape[0]]
        wide = wide.repeat_interleave(n, 1)[:, : weight.shape[1]]
        tensors[key] = (weight / wide).clamp(-448, 448).to(F8)
        whole[key] = tensors[key].float() * wide
        tensors[key + suffix] = scale if one is None else scale.reshape(one)
        tensors[key.replace("weight", "input_scale")] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change(folder, quantization_config=config)
    return whole


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    return folder, quantised(folder, "blocks")


def params(model):
    return dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_dequantised_exactly_and_saved_without_quantisation(tmp_path, name):
    scale_dtype = torch.bfloat16 if name in ("blocks", "channel") else torch.float32
    whole = quantised(tmp_path / "in", name, scale_dtype)
    model = load_hf(str(tmp_path / "in"), mesh=one_device())
    save_hf(model, str(tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    written = load_file(tmp_path / "out" / "model.safetensors")
    if name == "experts as modules":
        assert any(key.endswith(".experts.gate_up_proj") for key in written)
        written = dict(one for item in written.items() for one in as_modules(*item))
    assert written.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(written[key], value), key


def test_a_sharded_model_loads_the_same_weights(blocks):
    one = load_hf(str(blocks[0]), mesh=one_device())
    many = load_hf(str(blocks[0]), mesh=make_mesh(MeshSection(fsdp=2, tensor=4)))
    for path, value in params(one).items():
        np.testing.assert_array_equal(value[...], params(many)[path][...], str(path))


def test_bfloat16_weights_are_rounded_once(blocks):
    model = load_hf(str(blocks[0]), "bfloat16", mesh=one_device())
    kernel = model.layers.attn.q.kernel[...]
    want = blocks[1][Q].T.to(torch.bfloat16).float().numpy()
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel[0].astype(np.float32), want)


@pytest.mark.parametrize("kind", ["qwen3", "deepseek_v3", "deepseek_v32"])
def test_logits_equal_those_of_transformers_dequantised_model(tmp_path, monkeypatch, kind):
    """With blocks that divide the weights; transformers accepts no others."""
    even = (kind, fine_grained(weight_block_size=[4, 4]), "_scale_inv", (4, 4), None)
    monkeypatch.setitem(LAYOUTS, "even", even)
    quantised(tmp_path, "even")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True), dtype="float32"
    )
    tokens = some_tokens()
    got = logits_of(load_hf(str(tmp_path), mesh=one_device()), tokens)
    np.testing.assert_allclose(got, torch_logits(theirs.eval(), tokens), atol=1e-4)


def test_the_config_of_a_run_has_no_quantization(blocks):
    cfg = TrainConfig(objective="sft", model=ModelSection(path=str(blocks[0])))
    model = build(cfg, make_mesh(MeshSection())).policy
    assert "quantization_config" not in json.loads(model.hf_config)


# ---- refusals

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
ODD = ({"FP8": ["Linear"]}, {"a": None}, {"a": {"weights": [8]}}, None, [1], {})
GROUP = compressed(strategy="channel")["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "fp8"},
            r"no weight_block_size says.*FineGrainedFP8Config\(dequantize=True",
        ),
        (fine_grained(weight_block_size=[128]), "no weight_block_size says"),
        (BNB, r"\(bitsandbytes\).*\.dequantize\(\)\.save_pretrained.*save_original_format=False"),
        ({"quant_method": "gptq", "bits": 4}, r"\(gptq\); transformers cannot dequantize"),
        ({"quant_method": "awq"}, r"\(awq\); transformers cannot dequantize"),
        ({"bits": 4}, r"\(no quant_method\)"),
        (5, r"\(no quant_method\)"),
        ({"quant_method": ["x"]}, r"\(\['x'\]\); transformers cannot"),
        *((compressed() | {"config_groups": groups}, "CompressedTensorsConfig") for groups in ODD),
        (compressed(strategy=["tensor"]), "CompressedTensorsConfig"),
        (compressed(strategy="channel") | {"sparsity_config": [1]}, "CompressedTensorsConfig"),
        (["fp8"], r"\(no quant_method\)"),
        (compressed(type="int", strategy="channel"), "CompressedTensorsConfig"),
        (compressed(strategy="group", group_size=8), "CompressedTensorsConfig"),
        (compressed(strategy="channel", symmetric=False), "CompressedTensorsConfig"),
        (compressed(strategy="channel") | {"format": "pack-quantized"}, "CompressedTensorsConfig"),
        (
            compressed(strategy="channel") | {"transform_config": {"a": 1}},
            "CompressedTensorsConfig",
        ),
        (
            compressed(strategy="tensor")
            | {
                "config_groups": {
                    "a": GROUP,
                    "b": compressed(strategy="tensor")["config_groups"]["group_0"],
                }
            },
            "CompressedTensorsConfig",
        ),
    ],
)
def test_other_formats_are_refused_and_the_error_says_how_to_dequantise(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(hf_config("llama")))
    change(tmp_path, quantization_config=copy.deepcopy(config))
    with pytest.raises(ValueError, match=message) as error:
        load_hf(str(tmp_path))
    assert "\n" not in str(error.value) and "if they are not, remove" in str(error.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda t: t.pop(Q + "_scale_inv"), rf"{Q} is stored as F8_E4M3.*has no {Q}_scale_inv"),
        (lambda t: t.update({Q + "_scale_inv": torch.ones(1, 4)}), r"shape \(1, 4\).*\(3, 4\)"),
        (
            lambda t: t.update({Q + "_scale_inv": torch.ones(3, 4).int()}),
            "stored as I32, not F32 or",
        ),
        (lambda t: t.update({Q: t[Q].float()}), "stored as F32, not F8_E4M3, and has a scale"),
        (lambda t: t.update({Q: t[Q].float().to(torch.int8)}), "stored as I8, not F8_E4M3"),
        (
            lambda t: t.update({Q + "_scale": torch.ones(1)}),
            "quantization_config.*describes others",
        ),
    ],
)
def test_a_broken_fp8_checkpoint_is_named(tmp_path, blocks, broken, message):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((blocks[0] / name).read_bytes())
    rewrite(tmp_path, broken)
    with pytest.raises(ValueError, match=message):
        load_hf(str(tmp_path))


def test_quantised_weights_whose_config_was_removed_are_refused(tmp_path, blocks):
    (tmp_path / "model.safetensors").write_bytes((blocks[0] / "model.safetensors").read_bytes())
    change_of = json.loads((blocks[0] / "config.json").read_text())
    change_of.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(change_of))
    with pytest.raises(ValueError, match="of quantized weights, and quantization_config .*missing"):
        load_hf(str(tmp_path))
    rewrite(tmp_path, lambda t: [t.pop(k) for k in list(t) if "scale" in k])
    with pytest.raises(
        ValueError, match="stored as F8_E4M3, quantized, but no quantization_config"
    ):
        load_hf(str(tmp_path))


def test_a_quantised_model_can_give_its_shape_alone(tmp_path, blocks):
    """By its config.json or its directory: the weights are drawn and those of the files unused."""
    config = json.loads((blocks[0] / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": BNB}))
    head = {name: torch.ones(2, 2) * i for i, name in enumerate(("model.embed_tokens", "lm_head"))}
    head = {f"{name}.weight": tensor for name, tensor in head.items()}
    save_file(head, tmp_path / "model.safetensors", {"format": "pt"})
    for place in (tmp_path / "config.json", tmp_path):
        cfg = TrainConfig(model=ModelSection(config=str(place)))
        model = build(cfg, make_mesh(MeshSection(), jax.devices()[:1])).policy
        assert "quantization_config" not in model.hf_config
        assert model.cfg.tie_embeddings


def test_scales_are_never_expanded_to_the_size_of_the_weight():
    weight = np.ones((1024, 1024), jnp.float8_e4m3fn)
    for grid, block in (((1024, 1), (1, 0)), ((1, 1), (0, 0)), ((8, 8), (128, 128))):
        part = Dequantised(weight, np.full(grid, 0.5, np.float32), block)
        tracemalloc.start()
        value = part[slice(0, 1024), slice(0, 1024)]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (value == 0.5).all() and peak < 1.5 * value.nbytes
