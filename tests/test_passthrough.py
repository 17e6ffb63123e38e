# SPDX-License-Identifier: Apache-2.0
"""Tensors of multi-token prediction, which no model uses, come out of every export as they are."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fp8 import change, quantised, rewrite
from tiny import hf_config, magnified, one_device
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxllm.cli import main
from jaxllm.config import PeftSection
from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.files import INDEX, tensor_files
from jaxllm.hf import load_hf, save_adapter, save_hf
from jaxllm.hf_config import read_config
from jaxllm.model.families import from_hf
from jaxllm.peft.combine import merged
from jaxllm.peft.files import make_adapter

pytestmark = pytest.mark.usefixtures("on_one_device")

MTP = {
    "deepseek_v3": {
        "model.layers.2.eh_proj.weight": torch.randn(32, 64),
        "model.layers.2.embed_tokens.weight": torch.randn(131, 32).bfloat16(),
        "model.layers.2.shared_head.head.weight": torch.randn(131, 32).half(),
        "model.layers.2.mlp.gate.e_score_correction_bias": torch.randn(8),
    },
    "deepseek_v32": {
        "model.layers.2.eh_proj.weight": torch.randn(32, 64).bfloat16(),
        "model.layers.2.self_attn.indexer.wk.weight": torch.randn(12, 32),
    },
    "exaone_moe": {
        "mtp.fc.weight": torch.randn(32, 64).bfloat16(),
        "mtp.layers.0.input_layernorm.weight": torch.randn(32),
    },
    "hy_v3": {
        "model.layers.2.eh_proj.weight": torch.randn(32, 64).bfloat16(),
        "model.layers.2.mlp.shared_mlp.up_proj.weight": torch.randn(40, 32),
    },
    "ernie4_5_moe": {
        "model.mtp_block.0.input_layernorm.weight": torch.randn(32),
        "model.mtp_emb_norm.0.weight": torch.randn(32).bfloat16(),
    },
    "qwen3_next": {
        "mtp.fc.weight": torch.randn(32, 64).bfloat16(),
        "mtp.layers.0.input_layernorm.weight": torch.randn(32),
    },
    "nemotron_h": {
        "mtp.layers.0.eh_proj.weight": torch.randn(32, 64).bfloat16(),
        "mtp.layers.0.mixer.q_proj.weight": torch.randn(48, 32),
    },
}
LINE = "tensors of multi-token prediction"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """{family: directory of a model in several files}, with MTP."""
    folders: dict[str, Path] = {}
    for kind, extra in MTP.items():
        folders[kind] = tmp_path_factory.mktemp("base") / kind
        layers = {} if kind in ("qwen3_next", "nemotron_h") else {"num_hidden_layers": 2}
        layers |= {"num_nextn_predict_layers": 1} if kind in ("hy_v3", "deepseek_v32") else {}
        model = magnified(hf_config(kind) | layers)
        model.save_pretrained(folders[kind], max_shard_size="30KB")
        save_file(extra, folders[kind] / "model-mtp.safetensors", {"format": "pt"})
        index = json.loads((folders[kind] / INDEX).read_text())
        index["weight_map"] |= dict.fromkeys(extra, "model-mtp.safetensors")
        (folders[kind] / INDEX).write_text(json.dumps(index))
    return folders


def stored(folder: Any) -> dict[str, torch.Tensor]:
    return {n: t for f in {*tensor_files(Path(folder)).values()} for n, t in load_file(f).items()}


def assert_carried(kind: str, folder: Any) -> None:
    after = stored(folder)
    for name, tensor in MTP[kind].items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


@pytest.mark.parametrize("kind", MTP)
def test_multi_token_prediction_is_written_back_byte_for_byte(base, kind, tmp_path, capsys):
    """In the dtypes that it has, whichever the export has, and in files of any size."""
    model = load_hf(str(base[kind]), mesh=one_device())
    (line,) = [one for one in capsys.readouterr().err.splitlines() if LINE in one]
    first = min(MTP[kind])
    counted = f"{len(MTP[kind])} {LINE} ({first} …)"
    assert f"{counted} are neither loaded nor trained; exports copy them from there" in line
    save_hf(model, str(tmp_path / "one"))
    save_hf(model, str(tmp_path / "many"), "bfloat16", max_shard_bytes=20_000)
    before = stored(base[kind])
    for out in ("one", "many"):
        assert stored(tmp_path / out).keys() == before.keys()
        assert_carried(kind, tmp_path / out)
    count = "num_nextn_predict_layers"
    assert read_config(str(tmp_path / "one")).get(count) == read_config(str(base[kind])).get(count)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert MTP[kind].keys() <= index["weight_map"].keys()
    again = load_hf(str(tmp_path / "many"), mesh=one_device())
    save_hf(again, str(tmp_path / "again"))
    assert_carried(kind, tmp_path / "again")


def test_a_merged_adapter_has_multi_token_prediction_too(base, tmp_path):
    folder = base["deepseek_v3"]
    section = PeftSection(method="lora", r=2, target_modules=["o_proj"])
    adapter = make_adapter(from_hf(read_config(str(folder))), section)
    save_adapter(load_hf(str(folder), mesh=one_device(), peft=adapter), str(tmp_path / "adapter"))
    model = load_hf(str(tmp_path / "adapter"), mesh=one_device())
    save_hf(merged(model), str(tmp_path / "out"))
    assert_carried("deepseek_v3", tmp_path / "out")


def test_quantised_multi_token_prediction_is_dequantised_as_the_weights_are(tmp_path):
    """Its scales are not written, and tensors that are not quantized keep their bytes."""
    plain = torch.randn(32).half()

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.3." in name]:
            tensors[name.replace("layers.3.", "layers.4.")] = tensors[name].clone()
        tensors["model.layers.4.hnorm.weight"] = plain

    whole = quantised(tmp_path / "in", "latent")
    change(tmp_path / "in", num_nextn_predict_layers=1)
    rewrite(tmp_path / "in", add)
    save_hf(load_hf(str(tmp_path / "in"), mesh=one_device()), str(tmp_path / "out"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    mtp = {n: t for n, t in written.items() if "layers.4." in n}
    assert torch.equal(mtp.pop("model.layers.4.hnorm.weight"), plain)
    assert mtp and {n.replace("layers.4.", "layers.3.") for n in mtp} == {
        name for name in whole if "layers.3." in name
    }
    for name, tensor in mtp.items():
        assert torch.equal(tensor, whole[name.replace("layers.4.", "layers.3.")]), name
    save_hf(load_hf(str(tmp_path / "in"), mesh=one_device()), str(tmp_path / "half"), "bfloat16")
    half = load_file(tmp_path / "half" / "model.safetensors")
    name = "model.layers.4.self_attn.q_b_proj.weight"
    assert torch.equal(half[name], mtp[name].bfloat16())
    rewrite(tmp_path / "in", lambda tensors: tensors.pop(f"{name}_scale_inv"))
    with pytest.raises(ValueError, match=f"{name} is stored as F8_E4M3.*has no {name}_scale"):
        load_hf(str(tmp_path / "in"), mesh=one_device())


def test_quantised_multi_token_prediction_is_dequantised_to_be_trained(tmp_path):
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.3." in name]:
            tensors[name.replace("layers.3.", "layers.4.")] = tensors[name].clone()
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"model.layers.4.{name}.weight"] = torch.randn(32)
        tensors["model.layers.4.eh_proj.weight"] = torch.randn(32, 64)

    whole = quantised(tmp_path / "in", "latent")
    change(tmp_path / "in", num_nextn_predict_layers=1)
    rewrite(tmp_path / "in", add)
    module = load_hf(str(tmp_path / "in"), mesh=one_device(), mtp=True).mtp_1
    for part, name in (
        (module.attn.q_b, "self_attn.q_b_proj"),
        (module.attn.o, "self_attn.o_proj"),
    ):
        want = whole[f"model.layers.3.{name}.weight"].numpy()
        np.testing.assert_array_equal(part.kernel[...].T, want)


def test_a_reward_model_leaves_it_out_and_says_so(base, tmp_path, capsys):
    model = load_hf(str(base["deepseek_v3"]), mesh=one_device(), scores=True)
    assert "neither loaded nor saved with a reward model" in capsys.readouterr().err
    save_hf(model, str(tmp_path / "out"))
    assert not MTP["deepseek_v3"].keys() & stored(tmp_path / "out").keys()


def test_it_is_unexpected_where_the_config_has_none(base):
    with pytest.raises(ValueError, match="has 4 unexpected ones"):
        load_hf(str(base["deepseek_v3"]), overrides={"num_nextn_predict_layers": 0})


def test_a_warning_says_that_it_has_another_vocabulary(tmp_path, capsys):
    """As after transformers has resized that of the other layers."""
    config = hf_config("deepseek_v3") | {"num_hidden_layers": 2, "vocab_size": 140}
    larger = tmp_path / "larger"
    magnified(config).save_pretrained(larger)
    tensors = load_file(larger / "model.safetensors") | MTP["deepseek_v3"]
    save_file(tensors, larger / "model.safetensors", {"format": "pt"})
    save_hf(load_hf(str(larger), mesh=one_device()), str(tmp_path / "out"))
    warnings = [w for w in capsys.readouterr().err.splitlines() if w.startswith("warning")]
    assert len(warnings) == 2
    assert "layers.2.embed_tokens.weight has 131 rows, the vocabulary 140 tokens" in warnings[0]
    assert_carried("deepseek_v3", tmp_path / "out")


# ---- runs


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run of a model with MTP and a tokenizer, which are in `base`."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "a.txt").write_text("some text to learn from, and some more " * 30)
    train_tokenizer([folder / "a.txt"], folder / "base", 280)
    size = len(AutoTokenizer.from_pretrained(folder / "base"))
    changes = {"num_hidden_layers": 2, "vocab_size": size, "n_group": 1, "topk_group": 1}
    magnified(hf_config("deepseek_v3") | changes).save_pretrained(folder / "base")
    rewrite(folder / "base", lambda tensors: tensors.update(MTP["deepseek_v3"]))
    options = ["--data.max_length", "32", "--data.workers", "1", "--batch_size", "8"]
    options += ["--model.path", str(folder / "base"), "--output_dir", str(folder / "run")]
    assert main(["pretrain", "--data.train", str(folder / "a.txt"), "--steps", "1", *options]) == 0
    return folder


def test_a_run_and_its_exports_have_multi_token_prediction(project, tmp_path):
    assert_carried("deepseek_v3", project / "run" / "final")
    assert main(["export", str(project / "run"), str(tmp_path / "out")]) == 0
    assert_carried("deepseek_v3", tmp_path / "out")
    before, after = stored(project / "base"), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not changed & MTP["deepseek_v3"].keys()


def test_an_export_without_its_base_says_what_it_lacks(project, tmp_path, capsys):
    base, moved = project / "base", project / "moved"
    base.rename(moved)
    try:
        assert main(["export", str(project / "run"), str(tmp_path / "out")]) == 0
        lines = [w for w in capsys.readouterr().err.splitlines() if w.startswith("warning")]
        assert len(lines) == 1 and f"{base} cannot be read; put it back" in lines[0]
        assert f"{tmp_path / 'out'} lacks its weights of multi-token prediction" in lines[0]
        assert not MTP["deepseek_v3"].keys() & stored(tmp_path / "out").keys()
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        shutil.copytree(moved, base)
        config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 3}
        (base / "config.json").write_text(json.dumps(config))
        assert main(["export", str(project / "run"), str(tmp_path / "other")]) == 0
        assert "another model now (its num_hidden_layers differs)" in capsys.readouterr().err
    finally:
        shutil.rmtree(base, ignore_errors=True)
        moved.rename(base)
