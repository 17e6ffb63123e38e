# SPDX-License-Identifier: Apache-2.0
"""MXFP4 experts, as gpt-oss is published, are dequantized exactly while they are read."""

import copy
import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from tiny import CASES, SHAPE, logits_of, magnified, one_device, some_tokens, torch_logits
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jaxllm.config import MeshSection
from jaxllm.errors import UserError
from jaxllm.hf import load_hf, save_hf
from jaxllm.mesh import make_mesh
from jaxllm.mxfp4 import Mxfp4

CONFIG = SHAPE | CASES["gpt_oss"][1] | dict(model_type="gpt_oss", intermediate_size=64)
# As in the published config.json.
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
EXPERTS = "model.layers.2.mlp.experts."


def packed(*shape, low=0, high=255):
    """Random blocks [E, O, G, 16] and scales [E, O, G]."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (*shape, 16)).astype(np.uint8)
    return blocks, rng.integers(low, high, shape).astype(np.uint8)


def change(folder, edit):
    """Applies `edit` to the tensors of a directory."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(directory in the layout of the published checkpoints, its tensors dequantized by
    transformers)."""
    folder = tmp_path_factory.mktemp("mxfp4")
    magnified(copy.deepcopy(CONFIG)).save_pretrained(folder)
    whole = load_file(folder / "model.safetensors")
    tensors = dict(whole)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        pair = packed(experts, outputs, inputs // 32, low=122, high=126)
        blocks, scales = map(torch.from_numpy, pair)
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
        whole[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert whole[name].shape == (experts, inputs, outputs)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION
    (folder / "config.json").write_text(json.dumps(config))
    return folder, whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_equal_those_of_transformers(dtype):
    """With every byte and every scale but 255, which is NaN."""
    blocks, scales = packed(3, 170, 5)
    scales.ravel()[:255] = np.arange(255)
    want = convert_moe_packed_tensors(*map(torch.from_numpy, (blocks, scales)), dtype=dtype)
    weight = Mxfp4(blocks, scales)
    with np.errstate(over="ignore"):
        got = weight[:, :, :]
        np.testing.assert_array_equal(torch.from_numpy(got).to(dtype).float(), want.float())
        some = (slice(1, 3), slice(37, 130), slice(3, 170, 2))
        np.testing.assert_array_equal(weight[some], got[some])
    assert weight.get_shape() == list(got.shape) == [3, 160, 170]


def test_a_published_checkpoint_is_loaded_and_saved_without_quantization(
    published, tmp_path, capsys
):
    folder, whole = published
    model = load_hf(str(folder), mesh=one_device())
    said = capsys.readouterr().err.splitlines()
    line = "quantized weights are read as float32 and saved without quantization"
    assert said.count(f"{folder}: {line}") == 1
    save_hf(model, str(tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(written[name], value), name
    tokens = some_tokens()
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    want = torch_logits(theirs.eval(), tokens)
    np.testing.assert_allclose(logits_of(model, tokens), want, atol=1e-4)


def test_logits_equal_those_of_transformers_dequantized_model(published):
    folder, _ = published
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    tokens = some_tokens()
    got = logits_of(load_hf(str(folder), mesh=one_device()), tokens)
    np.testing.assert_allclose(got, torch_logits(theirs.eval(), tokens), atol=1e-4)


def test_a_sharded_model_loads_the_same_weights_and_bfloat16_is_exact(published):
    folder, whole = published
    flat = {}
    for dtype, mesh in (("float32", one_device()), ("bfloat16", make_mesh(MeshSection(tensor=4)))):
        state = nnx.state(load_hf(str(folder), dtype, mesh), nnx.Param)
        flat[dtype] = dict(nnx.to_flat_state(state))
    for part, columns in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
        path = ("layers", "mlp", part, "kernel")
        wide, narrow = (np.asarray(flat[d][path][...], np.float32) for d in flat)
        np.testing.assert_array_equal(wide, narrow)
        np.testing.assert_array_equal(wide[2], whole[EXPERTS + "gate_up_proj"][..., columns])
    assert flat["bfloat16"][path][...].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda t: t.pop(EXPERTS + "down_proj_scales"), "has no .*down_proj_scales"),
        (lambda t: t.pop(EXPERTS + "down_proj_blocks"), r"lacks 1 tensors \(.*2.*down_proj\)"),
        (
            lambda t: t.update({EXPERTS + "down_proj_scales": torch.ones(8, 32).byte()}),
            r"shape \(8, 32, 2, 16\) and its scales \(8, 32\); MXFP4 has",
        ),
        (
            lambda t: t.update({EXPERTS + "down_proj_scales": torch.ones(8, 32, 2)}),
            "down_proj_scales is stored as F32, not U8",
        ),
        (lambda t: t.update({"down_proj_blocks": torch.ones(1)}), r"1 unexpected ones \(down_proj"),
        (
            lambda t: t.update(
                {
                    EXPERTS + f"down_proj_{part}": t[EXPERTS + f"gate_up_proj_{part}"].clone()
                    for part in ("blocks", "scales")
                }
            ),
            r"down_proj has shape \(8, 32, 128\); the config asks for \(8, 64, 32\)",
        ),
    ],
)
def test_a_broken_checkpoint_is_named(published, tmp_path, broken, message):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((published[0] / name).read_bytes())
    change(tmp_path, broken)
    with pytest.raises(UserError, match=message):
        load_hf(str(tmp_path))


def test_blocks_without_a_quantization_config_are_refused(published, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((published[0] / "model.safetensors").read_bytes())
    config = json.loads((published[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    with pytest.raises(UserError, match="of quantized weights, and quantization_config .*missing"):
        load_hf(str(tmp_path))


def test_experts_are_dequantized_one_by_one(tmp_path):
    """Reading takes little more memory than the weight itself."""
    experts, hidden, size = 32, 64, 256
    shape = dict(hidden_size=hidden, intermediate_size=size, num_local_experts=experts)
    config = CONFIG | shape | dict(num_hidden_layers=1, quantization_config=QUANTIZATION)
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    magnified(copy.deepcopy(plain)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = {"gate_up_proj": (2 * size, hidden), "down_proj": (hidden, size)}

    def pack(tensors):
        for name, (outputs, inputs) in names.items():
            path = f"model.layers.0.mlp.experts.{name}"
            del tensors[path]
            pair = packed(experts, outputs, inputs // 32, high=127)
            blocks, scales = map(torch.from_numpy, pair)
            tensors |= {path + "_blocks": blocks, path + "_scales": scales}

    change(tmp_path, pack)
    load_hf(str(tmp_path), mesh=one_device())  # imports what is needed
    tracemalloc.start()
    model = load_hf(str(tmp_path), mesh=one_device())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = 4 * model.layers.mlp.down.kernel[...].size
    assert peak < 1.7 * largest
