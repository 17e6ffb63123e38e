# SPDX-License-Identifier: Apache-2.0
"""HuggingFace directories in and out: files, shardings, names, dtypes, memory, refusals."""

import errno
import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import hf_config, magnified
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jaxllm import files, hf
from jaxllm import hf_config as configs
from jaxllm.checkpoint import Checkpoints
from jaxllm.config import MeshSection, ModelSection, TrainConfig, to_dict
from jaxllm.config.schema import from_dict
from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.exports import export
from jaxllm.files import local_dir
from jaxllm.hf import load_hf, save_adapter, save_hf
from jaxllm.hf_config import read_config
from jaxllm.mesh import axes_of, make_mesh, spec
from jaxllm.model.adapter import NO_ADAPTER
from jaxllm.model.config import ModelConfig, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import tensors
from jaxllm.model.families.tensors import embed_name
from jaxllm.model.families.wrappers import HEAD
from jaxllm.program import load_model, model_config
from jaxllm.run import RunFolder
from jaxllm.sampling import Sampling, generate
from jaxllm.tokenizer import load_tokenizer

MESHES = {
    "fsdp 8": MeshSection(fsdp=8),
    "tensor 4 x fsdp 2": MeshSection(fsdp=2, tensor=4),
    "data 4 x fsdp 2": MeshSection(data=4, fsdp=2),
}
TOKENS = [1, 2, 3, 5, 8, 13]
SHAPE: dict[str, Any] = dict(
    vocab_size=136,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=None,
)


def write_model(folder: Path, kind: str = "llama", dtype=torch.float32, **changes: Any) -> Any:
    """A random torch model, biases included, saved at `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


def one_device() -> Any:
    return make_mesh(MeshSection(), jax.devices()[:1])


def weights_of(model: Decoder) -> dict[str, Any]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(path): variable for path, variable in flat}


def assert_same_weights(a: Decoder, b: Decoder) -> None:
    left, right = weights_of(a), weights_of(b)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(
            np.asarray(left[path][...]), np.asarray(right[path][...]), path
        )


def rewrite(folder: Path, change: Any) -> None:
    """Changes the tensors of a saved model in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").write_text("some text to learn from " * 20)
    train_tokenizer([folder / "text"], folder / "out", 280)
    return AutoTokenizer.from_pretrained(folder / "out")


# ---- layouts


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("phi3", {"tie_word_embeddings": True}),
        ("olmo2", {"vocab_size": 131}),
        ("gpt_neox", {}),
    ],
)
def test_every_mesh_gets_the_same_weights_in_shards(tmp_path, mesh, kind, changes):
    write_model(tmp_path, kind, **changes)
    devices = make_mesh(MESHES[mesh])
    whole, split = load_hf(str(tmp_path), mesh=one_device()), load_hf(str(tmp_path), mesh=devices)
    assert_same_weights(whole, split)
    for path, variable in weights_of(split).items():
        array = variable[...]
        want = spec(axes_of(variable), array.shape, devices)
        assert array.sharding.spec == want, path
        if "kernel" in path:
            assert array.addressable_shards[0].data.size < array.size, f"{path} is not split"


def test_files_split_by_torch_are_read_as_one(tmp_path):
    model = write_model(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert_same_weights(load_hf(str(tmp_path / "one")), load_hf(str(tmp_path / "many")))


def test_no_written_file_passes_the_limit_and_torch_reads_them_as_one(tmp_path):
    model = write_model(tmp_path / "in")
    save_hf(load_hf(str(tmp_path / "in")), str(tmp_path / "out"), max_shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        assert sum(t.nbytes for t in load_file(file).values()) <= 20_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for path, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[path]), path


def test_masks_in_files_of_gpt_neox_are_passed_over(tmp_path):
    write_model(tmp_path, "gpt_neox")
    before = load_hf(str(tmp_path))
    masks = {"bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), "masked_bias": torch.tensor(-1e9)}
    name = "gpt_neox.layers.0.attention."
    rewrite(tmp_path, lambda tensors: tensors.update({name + k: v for k, v in masks.items()}))
    assert_same_weights(load_hf(str(tmp_path)), before)


def test_a_sharded_model_is_written_as_a_whole_one(tmp_path):
    write_model(tmp_path / "in", "phi3")
    save_hf(load_hf(str(tmp_path / "in"), mesh=make_mesh(MESHES["fsdp 8"])), str(tmp_path / "out"))
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


# ---- dtypes and memory


def test_bfloat16_files_are_read_exactly_and_written_back(tmp_path):
    model = write_model(tmp_path / "in", dtype=torch.bfloat16)
    wide = load_hf(str(tmp_path / "in"))
    assert wide.embed.embedding[...].dtype == jnp.float32
    kept = load_hf(str(tmp_path / "in"), "bfloat16")
    assert all(v[...].dtype == jnp.bfloat16 for v in weights_of(kept).values())
    save_hf(kept, str(tmp_path / "kept"))
    save_hf(wide, str(tmp_path / "narrowed"), "bfloat16")
    for name in ("kept", "narrowed"):
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert read_config(str(tmp_path / name))["dtype"] == "bfloat16"
        for path, weight in model.state_dict().items():
            assert tensors[path].dtype == torch.bfloat16 and torch.equal(weight, tensors[path])


def test_compute_dtype_leaves_the_weights_alone(tmp_path):
    write_model(tmp_path)
    model = load_hf(str(tmp_path), compute_dtype="bfloat16")
    assert model.embed.embedding[...].dtype == jnp.float32
    assert model.hidden(jnp.ones((1, 4), jnp.int32)).x.dtype == jnp.bfloat16


def traced_peak(function: Any) -> int:
    """Bytes of host memory (numpy's and safetensors' included, device arrays not) at the peak."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def unaligned(shape: Any, dtype: Any) -> np.ndarray:
    """np.empty at an address that a CPU device copies from instead of taking it over."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.ndarray(size + 80, np.uint8)
    start = -room.ctypes.data % 64 + 16
    return room[start : start + size].view(dtype).reshape(shape)


def test_host_memory_holds_a_shard_when_loading_and_a_tensor_when_saving(tmp_path, monkeypatch):
    cfg = ModelConfig("llama", 512, 512, 4096, 6, 4, 4, 128, 64, tie_embeddings=True)
    model = Decoder(cfg, rngs=nnx.Rngs(0))
    tensor, stack = 512 * 4096 * 4, 6 * 512 * 4096 * 4
    total = sum(v[...].nbytes for v in weights_of(model).values())
    python = 8_000_000  # jaxprs and other objects
    assert total > 20 * tensor
    folder = str(tmp_path / "m")
    save_hf(model, folder)
    load_hf(folder)  # imports and caches are not what is measured
    save = traced_peak(lambda: save_hf(model, folder, max_shard_bytes=4 * tensor))
    assert save < 3 * tensor + python
    monkeypatch.setattr(hf, "np", SimpleNamespace(**vars(np) | {"empty": unaligned}))
    one = traced_peak(lambda: load_hf(folder, mesh=one_device()))
    assert one < stack + tensor + python < total / 2
    eight = traced_peak(lambda: load_hf(folder, mesh=make_mesh(MESHES["fsdp 8"])))
    assert eight < (stack + tensor) / 8 + python < total / 8


# ---- names and configs


def test_tied_weights_are_written_once_and_a_second_copy_is_passed_over(tmp_path):
    write_model(tmp_path / "in", tie_word_embeddings=True)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    rewrite(tmp_path / "in", add)
    model = load_hf(str(tmp_path / "in"))
    assert model.head is None
    save_hf(model, str(tmp_path / "out"))
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    """Of a model of either library, float32 [T, V]."""
    if isinstance(model, Decoder):
        return np.asarray(model(jnp.asarray([tokens])))[0]
    with torch.no_grad():
        return model.eval()(torch.tensor([tokens])).logits[0].numpy()


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A tied model whose file has a head of its own, and transformers' logits of it."""
    folder = tmp_path_factory.mktemp("apart")
    write_model(folder, tie_word_embeddings=True)
    rewrite(folder, put(HEAD, torch.randn(136, 32)))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    return folder, logits_of(theirs, TOKENS)


def test_a_tied_config_with_another_head_is_read_untied_and_written_so(apart, tmp_path):
    folder, want = apart
    model = load_hf(str(folder), mesh=make_mesh(MESHES["fsdp 8"]))
    np.testing.assert_allclose(logits_of(model, TOKENS), want, atol=1e-4)
    save_hf(model, str(tmp_path / "out"))
    assert read_config(str(tmp_path / "out"))["tie_word_embeddings"] is False
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(logits_of(again, TOKENS), want, atol=1e-4)


def test_a_run_of_a_tied_config_with_another_head_is_untied(apart):
    shape, config = model_config(TrainConfig(model=ModelSection(path=str(apart[0]))))
    assert not shape.tie_embeddings and not config["tie_word_embeddings"]
    asked = ModelSection(path=str(apart[0]), overrides={"tie_word_embeddings": True})
    assert model_config(TrainConfig(model=asked))[0].tie_embeddings


def test_one_number_of_the_head_is_enough_and_its_dtype_is_not(tmp_path):
    """Also where it lies in the last rows of a table that is compared part by part."""
    write_model(tmp_path, tie_word_embeddings=True, dtype=torch.bfloat16)

    def add(tensors):
        tensors[HEAD] = tensors[embed_name("llama", "")].float()

    rewrite(tmp_path, add)
    assert load_hf(str(tmp_path)).head is None

    def change(tensors):
        tensors[HEAD][-1, -1] += 1e-3

    rewrite(tmp_path, change)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "CHUNK", 32 * 50)
        assert load_hf(str(tmp_path)).head is not None


def test_a_tied_model_kept_as_its_head_alone_is_read(tmp_path):
    model = write_model(tmp_path, tie_word_embeddings=True)

    def rename(tensors):
        tensors[HEAD] = tensors.pop(embed_name("llama", ""))

    rewrite(tmp_path, rename)
    want = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), TOKENS)
    np.testing.assert_array_equal(want, logits_of(model, TOKENS))
    np.testing.assert_allclose(logits_of(load_hf(str(tmp_path)), TOKENS), want, atol=1e-4)


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_adapters_of_a_tied_config_with_another_head_are_those_of_peft(apart, tmp_path, saved):
    base = AutoModelForCausalLM.from_pretrained(apart[0])
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[saved], init_lora_weights=False)
    theirs = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn_like(weight))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_hf(str(apart[0]), adapter=str(tmp_path / "theirs"))
    want = logits_of(theirs, TOKENS)
    assert np.abs(want - apart[1]).max() > 1
    np.testing.assert_allclose(logits_of(ours, TOKENS), want, atol=1e-3)
    save_adapter(ours, str(tmp_path / "ours"))
    base = AutoModelForCausalLM.from_pretrained(apart[0])
    back = PeftModel.from_pretrained(base, tmp_path / "ours")
    np.testing.assert_allclose(logits_of(back, TOKENS), want, atol=1e-3)


def test_the_sources_config_is_kept_and_brought_up_to_date(tmp_path):
    write_model(tmp_path / "in", "phi3", dtype=torch.bfloat16)
    file = tmp_path / "in" / "config.json"
    old = json.loads(file.read_text())
    old |= {"my_note": [1, 2], "auto_map": {"AutoConfig": "x.Y"}, "torch_dtype": "bfloat16"}
    del old["dtype"]
    file.write_text(json.dumps(old | {"bos_token_id": 5, "pad_token_id": 32000}))
    save_hf(load_hf(str(tmp_path / "in")), str(tmp_path / "out"))
    new = read_config(str(tmp_path / "out"))
    assert new["my_note"] == [1, 2] and new["torch_dtype"] == "float32"
    assert "dtype" not in new and "auto_map" not in new
    assert new["architectures"] == ["Phi3ForCausalLM"]
    assert (new["bos_token_id"], new["pad_token_id"]) == (5, None), (
        "32000 is outside the vocabulary"
    )


def test_generation_settings_survive_and_know_every_end(tmp_path, tokenizer):
    write_model(tmp_path / "in", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    settings = {"eos_token_id": [tokenizer.eos_token_id, 77], "temperature": 0.6, "do_sample": True}
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps(settings))
    save_hf(load_hf(str(tmp_path / "in")), str(tmp_path / "out"), tokenizer=tokenizer)
    new = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert new["eos_token_id"] == [tokenizer.eos_token_id, 77, end_of_turn]
    assert new["temperature"] == 0.6 and new["pad_token_id"] == tokenizer.pad_token_id
    assert "generation_config" not in read_config(str(tmp_path / "out"))
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "some <|im_start|> text"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == new["eos_token_id"]


@pytest.mark.parametrize(
    ("config", "generation", "want"),
    [
        (99, None, 99),
        (99, 98, [98, 99]),
        (9, [100, 9], [100, 9]),
        (9, [9], [9]),
        ([101, 9], None, [101, 9]),
        ([101, 9], [9, 102, 101], [9, 102, 101]),
    ],
)
def test_the_order_and_form_of_eos_are_kept(tmp_path, config, generation, want):
    write_model(tmp_path / "in", eos_token_id=config)
    file = tmp_path / "in" / "generation_config.json"
    file.write_text(json.dumps({} if generation is None else {"eos_token_id": generation}))
    save_hf(load_hf(str(tmp_path / "in")), str(tmp_path / "out"))
    assert read_config(str(tmp_path / "out"))["eos_token_id"] == config
    out = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert out["eos_token_id"] == want


def test_the_ends_of_a_replaced_tokenizer_are_forgotten(tmp_path, tokenizer):
    write_model(tmp_path / "in", vocab_size=len(tokenizer), eos_token_id=99)
    save_hf(load_hf(str(tmp_path / "in")), str(tmp_path / "out"), tokenizer=tokenizer)
    assert read_config(str(tmp_path / "out"))["eos_token_id"] == tokenizer.eos_token_id
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert 99 not in generation["eos_token_id"]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "smollm3"])
def test_a_model_made_from_a_shape_alone_loads_in_transformers(tmp_path, kind):
    cfg = hf.from_hf(SHAPE | {"model_type": kind})
    model = Decoder(cfg, rngs=nnx.Rngs(0))
    save_hf(model, str(tmp_path / "out"))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    want = theirs(torch.tensor([[1, 2, 3]])).logits.detach().numpy()
    got = model(jnp.asarray([[1, 2, 3]]))
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=1e-4)


def test_a_loaded_model_generates(tmp_path):
    write_model(tmp_path)
    (tokens,) = generate(load_hf(str(tmp_path)), [[1, 2, 3]], Sampling(max_new_tokens=4))
    assert len(tokens) == 4


def test_overrides_change_the_config_that_is_saved(tmp_path):
    write_model(tmp_path / "in")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    model = load_hf(str(tmp_path / "in"), overrides={"rope_parameters": rope})
    assert model.cfg.ropes[0].kind == "linear"
    save_hf(model, str(tmp_path / "out"))
    assert read_config(str(tmp_path / "out"))["rope_parameters"] == rope


def respell(folder: Path, **rope: Any) -> None:
    """Writes a config's RoPE as of these keys alone."""
    config = read_config(str(folder))
    config = {k: v for k, v in config.items() if "rope" not in k}
    (folder / "config.json").write_text(json.dumps(config | rope))


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_theta=7e3, rope_scaling=dict(type="linear", factor=2.0)),
        dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=7e3)),
        dict(
            rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=7e3),
            rope_theta=7e3,
            rope_scaling=dict(rope_type="linear", factor=2.0),
        ),
    ],
    ids=["old", "new", "both"],
)
def test_overrides_of_rope_hold_in_either_spelling_over_either(tmp_path, rope):
    write_model(tmp_path)
    respell(tmp_path, **rope)
    linear = Rope(7e3, "linear", factor=2.0)
    for overrides, want in (
        ({}, linear),
        ({"rope_theta": 9e3}, replace(linear, theta=9e3)),
        ({"rope_scaling": None}, Rope(7e3)),
        ({"rope_scaling": dict(rope_type="linear", factor=3.0)}, replace(linear, factor=3.0)),
        ({"rope_parameters": dict(rope_type="default")}, Rope(7e3)),
        ({"rope_parameters": dict(rope_type="default", rope_theta=5.0)}, Rope(5.0)),
    ):
        source = ModelSection(path=str(tmp_path), overrides=overrides)
        assert model_config(TrainConfig(model=source))[0].ropes == (want,), overrides


def test_overrides_of_rope_have_the_familys_names(tmp_path):
    write_model(tmp_path / "in", "gpt_neox")
    save_hf(load_hf(str(tmp_path / "in")), str(tmp_path / "out"))  # with both spellings
    for folder in ("in", "out"):
        source = ModelSection(
            path=str(tmp_path / folder), overrides={"rotary_emb_base": 9e3, "rotary_pct": 0.5}
        )
        assert model_config(TrainConfig(model=source))[0].ropes == (Rope(9e3, partial=0.5),)
        source = replace(source, overrides={"rope_theta": 9e3})
        with pytest.raises(ValueError, match="rope_theta is not a key of a gpt_neox config"):
            model_config(TrainConfig(model=source))


@pytest.mark.parametrize("key", ["rope_theta", "partial_rotary_factor"])
def test_overrides_of_rope_that_transformers_would_ignore_are_refused(tmp_path, key):
    write_model(tmp_path, "mimo_v2_flash")
    source = ModelSection(path=str(tmp_path), overrides={key: 0.5})
    with pytest.raises(ValueError, match=f"{key} is not a key of a mimo_v2_flash config"):
        model_config(TrainConfig(model=source))


def test_norms_of_olmo_hybrid_are_written_under_the_names_of_modules(tmp_path):
    """vLLM reads these only; transformers 5.23 saves those of delta nets under others."""
    magnified(hf_config("olmo_hybrid")).save_pretrained(tmp_path / "in")
    save_hf(load_hf(str(tmp_path / "in")), str(tmp_path / "out"))
    read, written = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    names = {name.partition("layers.")[2] for name in written if "norm" in name.split(".")[-2]}
    assert not any("layer_norm." in name for name in names)
    assert {"0.input_layernorm.weight", "0.post_attention_layernorm.weight"} <= names
    assert {"3.post_attention_layernorm.weight", "3.post_feedforward_layernorm.weight"} <= names
    old, new = "model.layers.0.attention_layer_norm.weight", "model.layers.0.input_layernorm.weight"
    assert torch.equal(read[old], written[new])


def test_a_random_model_does_not_depend_on_the_mesh(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SHAPE | {"model_type": "llama"}))
    cfg = TrainConfig(model=ModelSection(config=str(file), overrides={"num_hidden_layers": 3}))
    shape, _ = model_config(cfg)
    models = [
        load_model(cfg, mesh, shape, NO_ADAPTER)
        for mesh in (one_device(), make_mesh(MESHES["fsdp 8"]))
    ]
    assert models[0].cfg.num_layers == 3
    assert_same_weights(*models)


# ---- refusals


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Any:
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("model.layers.1.mlp.up_proj.weight"),
            r"lacks 1 tensors \(model.layers.1.mlp.up_proj",
        ),
        (put("model.extra.weight", torch.ones(2)), r"has 1 unexpected ones \(model.extra.weight"),
        (
            put("model.embed_tokens.weight", torch.ones(192, 32)),
            r"model.embed_tokens.weight has shape \(192, 32\); the config asks for \(136, 32\)",
        ),
        (
            put("model.layers.1.mlp.down_proj.weight", torch.ones(32, 60)),
            r"layers.1.mlp.*\(32, 60\)",
        ),
        (
            put("model.layers.1.mlp.down_proj.weight", torch.ones(32, 64, dtype=torch.int8)),
            "stored as I8, quantized",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(tmp_path, change, message):
    write_model(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_hf(str(tmp_path))


def test_a_config_of_kimi_k2_is_read_and_saved_as_its_architecture(tmp_path):
    magnified(hf_config("deepseek_v3")).save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    config = json.loads(file.read_text())
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    file.write_text(json.dumps(config | {"model_type": "kimi_k2", "auto_map": code}))
    save_hf(load_hf(str(tmp_path / "in"), mesh=one_device()), str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "deepseek_v3" and "auto_map" not in written
    file.write_text(json.dumps(config | {"model_type": "kimi_k2", "architectures": ["Other"]}))
    with pytest.raises(ValueError, match="'kimi_k2' is not supported"):
        load_hf(str(tmp_path / "in"))


def test_a_fused_tensor_of_another_height_is_refused(tmp_path):
    write_model(tmp_path, "phi3")
    rewrite(tmp_path, put("model.layers.0.self_attn.qkv_proj.weight", torch.ones(72, 32)))
    with pytest.raises(ValueError, match=r"qkv_proj.weight has shape \(72, 32\).*\(64, 32\)"):
        load_hf(str(tmp_path))


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path):
    model = write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is a pickle.*python -c .*save_pretrained"
    ):
        load_hf(str(tmp_path))


def test_broken_directories_are_named(tmp_path):
    write_model(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is not a complete safetensors file"):
        load_hf(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        load_hf(str(tmp_path))
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json names .*00001-of-00002.*not there"):
        load_hf(str(tmp_path))
    (tmp_path / "config.json").write_text('{\n "a": 1,\n}')
    with pytest.raises(ValueError, match=r"config.json:3: "):
        load_hf(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        load_hf(str(tmp_path))


def test_a_hub_id_without_a_hub_is_one_clear_line():
    with pytest.raises(ValueError, match="nobody/nothing is no directory, nor could the hub") as e:
        local_dir("nobody/nothing")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no such directory"):
        local_dir("./nothing/here")


def test_an_unknown_dtype_is_refused(tmp_path):
    write_model(tmp_path)
    with pytest.raises(ValueError, match="'fp8' is not known; known: float32, bfloat16"):
        load_hf(str(tmp_path), "fp8")


# ---- replacing


def test_only_a_saved_model_is_replaced(tmp_path):
    write_model(tmp_path / "in")
    model = load_hf(str(tmp_path / "in"))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="run holds checkpoints, so it is not replaced"):
        save_hf(model, str(run))
    assert (run / "checkpoints").is_dir()
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds notes.txt"):
        save_hf(model, str(notes))
    with pytest.raises(ValueError, match="is a file"):
        save_hf(model, str(notes / "notes.txt"))
    with pytest.raises(ValueError, match="in was not written by jaxllm, so it is not replaced"):
        save_hf(model, str(tmp_path / "in"))
    out = tmp_path / "out"
    for _ in range(2):
        save_hf(model, str(out))
        (out / "README.md").write_text("my model card")
    assert_same_weights(model, load_hf(str(out)))
    save_hf(model, str(out))
    assert (out / "README.md").read_text() == "my model card"
    (out / "LICENSE").write_text("mine")
    with pytest.raises(ValueError, match="holds LICENSE"):
        save_hf(model, str(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "notes", "out", "run"]


def test_folders_beside_an_export_are_left_alone(tmp_path):
    write_model(tmp_path / "in")
    model = load_hf(str(tmp_path / "in"))
    mine = [tmp_path / name for name in ("out.partial", "out.replaced", ".out.mine", ".out.mine2")]
    other = Path(files._place_beside(tmp_path / "out.2"))  # an export that is being written
    for folder in mine:
        (folder / "new").mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    for _ in range(2):
        save_hf(model, str(tmp_path / "out"))
    assert all((folder / "notes.txt").read_text() == "mine" for folder in mine)
    assert (other / "new" / files.MARKER).is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out", *(f.name for f in (*mine, other))}


@pytest.mark.parametrize("at", ["start", "move", "deletion"])
def test_a_killed_export_is_cleared_up_by_the_next(tmp_path, at):
    """Also one that was killed between moving the old model away and the new one in."""
    write_model(tmp_path / "in")
    model = load_hf(str(tmp_path / "in"))
    out = tmp_path / "out"
    save_hf(model, str(out))
    place = Path(files._place_beside(out))
    if at == "start":
        shutil.rmtree(place)
        place.mkdir()
    elif at == "move":
        out.rename(place / "old")
    else:  # of the old model, whose marker is gone and whose weights are not
        shutil.rmtree(place / "new")
        shutil.copytree(out, place / "old")
        (place / "old" / files.MARKER).unlink()
    save_hf(model, str(out))
    assert_same_weights(model, load_hf(str(out)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_full_disk_loses_nothing_already_saved(tmp_path, monkeypatch):
    write_model(tmp_path / "in")
    model = load_hf(str(tmp_path / "in"))
    save_hf(model, str(tmp_path / "out"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_hf(model, str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert_same_weights(model, load_hf(str(tmp_path / "out")))


def test_a_failure_to_move_the_new_model_in_brings_the_old_one_back(tmp_path, monkeypatch):
    write_model(tmp_path / "in")
    model = load_hf(str(tmp_path / "in"))
    save_hf(model, str(tmp_path / "out"))
    rename = Path.rename

    def fail_for_the_new(self, target):
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="Input/output"):
        save_hf(model, str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert_same_weights(model, load_hf(str(tmp_path / "out")))


# ---- runs


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run folder with checkpoints 1 and 2, and the models that were saved there."""
    source = tmp_path / "source"
    write_model(source, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(source)
    folder = tmp_path / "run"
    cfg = TrainConfig(model=ModelSection(path=str(source)), output_dir=str(folder))
    saves = Checkpoints(folder / "checkpoints")
    (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
    models = {}
    for step in (1, 2):
        models[step] = load_hf(str(source))
        models[step].norm.scale.set_value(models[step].norm.scale[...] + step)
        weights = nnx.to_pure_dict(nnx.state(models[step], nnx.Param))
        saves.save(step, {"trainable": weights, "step": jnp.int32(step)}, meta={})
    saves.close()
    return folder, models


def test_a_run_exports_its_newest_or_a_chosen_checkpoint(run, tmp_path):
    folder, models = run
    export(str(folder), str(tmp_path / "new"))
    export(str(folder), str(tmp_path / "chosen"), step=1)
    export(str(folder / "checkpoints" / "1"), str(tmp_path / "named"))
    for name, step in (("new", 2), ("chosen", 1), ("named", 1)):
        assert_same_weights(load_hf(str(tmp_path / name)), models[step])
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template
    export(str(tmp_path / "new"), str(tmp_path / "half"), "bfloat16")
    assert read_config(str(tmp_path / "half"))["dtype"] == "bfloat16"


def test_a_run_exports_when_what_it_started_from_is_gone(run, tmp_path):
    folder, models = run
    source = tmp_path / "source"
    cfg = from_dict(json.loads((folder / "config.json").read_text()))
    RunFolder(cfg).save_start(models[1], load_tokenizer(source))
    shutil.rmtree(source)
    export(str(folder), str(tmp_path / "out"))
    assert_same_weights(load_hf(str(tmp_path / "out")), models[2])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_an_override_that_is_no_key_of_the_family_is_refused(tmp_path):
    write_model(tmp_path / "model")
    with pytest.raises(ValueError, match="num_hiden_layers.*did you mean num_hidden_layers"):
        load_hf(str(tmp_path / "model"), overrides={"num_hiden_layers": 7})
    write_model(tmp_path / "gemma", "gemma3_text")
    load_hf(str(tmp_path / "gemma"), overrides={"sliding_window_pattern": 2})
    with pytest.raises(ValueError, match="num_hidden_layers is 0"):
        load_hf(str(tmp_path / "model"), overrides={"num_hidden_layers": 0})


def test_a_run_folder_given_as_a_model_names_the_command(run):
    with pytest.raises(
        ValueError, match="run is a run folder without a final model; `jaxllm export"
    ):
        load_hf(str(run[0]))


def test_export_names_what_is_missing(run, tmp_path):
    folder, _ = run
    with pytest.raises(ValueError, match="has no checkpoint 7; it has 1, 2"):
        export(str(folder), str(tmp_path / "out"), step=7)
    with pytest.raises(ValueError, match="is neither a run folder nor"):
        export(str(tmp_path), str(tmp_path / "out"))


def test_a_weight_with_two_indices_is_read_and_written_tensor_by_tensor(tmp_path, monkeypatch):
    """As the weights of experts: [layers, experts, in, out], a tensor for each layer and expert."""
    name = "layers.{layers}.experts.{expert}.weight"
    key = tensors.Key("layers.kernel", name, transpose=True)
    cfg: Any = SimpleNamespace(stacks={"layers": range(3)}, experts=SimpleNamespace(count=2))
    weight = np.arange(3 * 2 * 4 * 5, dtype=np.float32).reshape(3, 2, 4, 5)
    names = tensors.tensor_names(cfg, key.name)
    assert names[:3] == [f"layers.{i}.experts.{e}.weight" for i, e in ((0, 0), (0, 1), (1, 0))]
    files = {n: weight[divmod(i, 2)].T.copy() for i, n in enumerate(names)}
    save_file({n: torch.tensor(x) for n, x in files.items()}, tmp_path / "model.safetensors")

    with safe_open(tmp_path / "model.safetensors", "np") as opened:
        parts = [opened.get_slice(name) for name in names]
        like = jax.ShapeDtypeStruct(weight.shape, np.float32)
        for index in ((slice(None),) * 4, (slice(1, 3), slice(1, 2), slice(0, 2), slice(3, 5))):
            assert np.array_equal(hf._read_shards(parts, key, like, [index])[0], weight[index])

    monkeypatch.setattr(hf, "key_table", lambda _: [key])
    model: Any = nnx.Module()
    model.cfg, model.layers = nnx.static(cfg), nnx.Module()
    model.layers.kernel = nnx.Param(jnp.asarray(weight))
    written = {tensor.name: tensor for tensor in hf.hf_tensors(model)}
    assert list(written) == names
    for name, tensor in written.items():
        assert tensor.shape == (5, 4) and np.array_equal(tensor.read(0), files[name])
