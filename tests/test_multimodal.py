# SPDX-License-Identifier: Apache-2.0
"""Multimodal models against transformers: text goes through their language model, which is trained
and written back; all the rest comes out as it went in."""

import copy
import functools
import json
import shutil
import tracemalloc
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from runs import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import (
    CASES,
    DELTA,
    DELTA_EXPERTS,
    FULL,
    GEMMA,
    SHAPE,
    SLIDING,
    logits_of,
    magnified,
    one_device,
    some_tokens,
    torch_logits,
)
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from jaxllm.cli import main
from jaxllm.config import PeftSection
from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.errors import UserError
from jaxllm.exports import export
from jaxllm.files import tensor_files
from jaxllm.hf import load_hf, save_adapter, save_hf
from jaxllm.hf_config import read_config
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import from_hf, to_hf, with_mtp
from jaxllm.model.families.tensors import key_table
from jaxllm.model.families.wrappers import WRAPPERS, is_text
from jaxllm.peft.combine import merged
from jaxllm.peft.files import make_adapter
from jaxllm.sampling import Sampling, generate

# Ids of images lie beyond the vocabulary, so that every token is text.
VISION = dict(hidden_size=16, intermediate_size=20, image_size=28, patch_size=7)
HEADS = dict(num_hidden_layers=2, num_attention_heads=2)
GEMMA4_VISION = VISION | HEADS | dict(head_dim=8, num_key_value_heads=2, pooling_kernel_size=2)
GEMMA4_VISION |= dict(position_embedding_size=16)
QWEN_VISION = dict(depth=2, num_heads=2, hidden_size=16, intermediate_size=20, out_hidden_size=32)
YARN = CASES["ministral3"][1]
SECTIONS = dict(rope_type="default", rope_theta=500.0)
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": dict(
        model_type="gemma3",
        text_config=SHAPE | GEMMA | dict(layer_types=[SLIDING, FULL] * 2),
        vision_config=VISION | HEADS | dict(model_type="siglip_vision_model"),
        mm_tokens_per_image=4,
        **dict(image_token_index=140, boi_token_index=141, eoi_token_index=142),
    ),
    "gemma4": dict(
        model_type="gemma4",
        text_config=SHAPE | CASES["gemma4_text"][1] | dict(pad_token_id=0),
        vision_config=GEMMA4_VISION,
        audio_config=None,
        **dict(image_token_id=140, video_token_id=141, audio_token_id=142),
    ),
    "gemma4_unified": dict(
        model_type="gemma4_unified",
        text_config={
            key: value
            for key, value in (SHAPE | CASES["gemma4_text values from keys"][1]).items()
            if "per_layer_input" not in key
        }
        | dict(pad_token_id=0, attention_bias=False),
        vision_config=dict(mm_embed_dim=32, mm_posemb_size=8, output_proj_dims=32),
        audio_config=dict(audio_embed_dim=16),
        **dict(image_token_id=140, video_token_id=141, audio_token_id=142),
    ),
    "mistral3": dict(
        model_type="mistral3",
        text_config=SHAPE | dict(model_type="mistral", head_dim=12, sliding_window=None),
        vision_config=VISION | HEADS | dict(model_type="pixtral", head_dim=8),
        image_token_index=140,
    ),
    "mistral3 of ministral3, untied": dict(
        model_type="mistral3",
        text_config=SHAPE | YARN | dict(model_type="ministral3"),
        vision_config=VISION | HEADS | dict(model_type="pixtral", head_dim=8),
        image_token_index=140,
        tie_word_embeddings=False,
    ),
    "qwen2_vl": dict(
        model_type="qwen2_vl",
        text_config=SHAPE
        | dict(
            rope_parameters=SECTIONS | dict(mrope_section=[1, 1, 2]),
            **dict(use_sliding_window=True, sliding_window=5, max_window_layers=2),
        ),
        vision_config=dict(depth=2, embed_dim=16, num_heads=2, hidden_size=32, patch_size=7),
        image_token_id=140,
        tie_word_embeddings=True,
    ),
    "qwen2_5_vl": dict(
        model_type="qwen2_5_vl",
        text_config=SHAPE | dict(rope_parameters=SECTIONS | dict(mrope_section=[1, 1, 2])),
        vision_config=QWEN_VISION | dict(patch_size=7, window_size=28, fullatt_block_indexes=[1]),
        image_token_id=140,
    ),
    "qwen3_vl": dict(
        model_type="qwen3_vl",
        text_config=SHAPE
        | dict(
            head_dim=12,
            rope_parameters=SECTIONS | dict(mrope_section=[2, 2, 2], mrope_interleaved=True),
        ),
        vision_config=QWEN_VISION
        | dict(patch_size=7, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        image_token_id=140,
        tie_word_embeddings=True,
    ),
    "qwen3_vl_moe": dict(
        model_type="qwen3_vl_moe",
        text_config=SHAPE
        | dict(
            head_dim=12,
            moe_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            mlp_only_layers=[1],
            rope_parameters=SECTIONS | dict(mrope_section=[2, 2, 2], mrope_interleaved=True),
        ),
        vision_config=QWEN_VISION
        | dict(patch_size=7, num_position_embeddings=16, deepstack_visual_indexes=[0]),
        image_token_id=140,
        tie_word_embeddings=False,
    ),
    "qwen3_5": dict(
        model_type="qwen3_5",
        text_config=SHAPE
        | DELTA
        | dict(
            rope_parameters=DELTA["rope_parameters"]
            | dict(mrope_section=[1, 1, 1], mrope_interleaved=True)
        ),
        vision_config=QWEN_VISION | dict(patch_size=7, num_position_embeddings=16),
        image_token_id=140,
    ),
}
MODELS["llama4"] = dict(
    model_type="llama4",
    text_config=SHAPE | CASES["llama4_text"][1],
    vision_config=HEADS
    | dict(
        **dict(hidden_size=16, intermediate_size=64, image_size=28, patch_size=7),
        **dict(vision_output_dim=24, projector_input_dim=24, projector_output_dim=24),
    ),
    image_token_index=140,
)
MODELS["qwen3_5_moe"] = MODELS["qwen3_5"] | dict(
    model_type="qwen3_5_moe", text_config=MODELS["qwen3_5"]["text_config"] | DELTA_EXPERTS
)


# Models whose tensors have the same names in transformers and on the hub, or cannot be compared.
ONE_SPELLING = {"qwen3_vl_moe", "qwen3_5_moe", "gemma4", "gemma4_unified"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """name -> (torch model, the directory that it is saved in, under the hub's names)."""

    @functools.cache
    def make(name: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("base")
        model = magnified(MODELS[name])
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        for path in tensors:  # [experts, inputs, outputs] on the hub, unlike in transformers 5
            if "qwen" in name and path.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[path] = tensors[path].transpose(1, 2).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        for file in ("preprocessor_config.json", "processor_config.json"):
            (folder / file).write_text(json.dumps({"from": name}))
        return model, folder

    return make


def loaded(folder: Any) -> Any:
    """The torch model in a directory, which has all of its weights and no others."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def stored(folder: Any) -> dict[str, torch.Tensor]:
    return {n: t for f in {*tensor_files(Path(folder)).values()} for n, t in load_file(f).items()}


def tuned(model: Any) -> Any:
    """`model` with other weights of all kinds, as training leaves it."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(variable[...] * 1.25 if path[-1] != "embedding" else variable[...] + 0.5)
    return model


@pytest.mark.parametrize("length", [7, 300])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_text_equal_transformers(base, name, length):
    model, folder = base(name)
    tokens = some_tokens(2, length)
    ours = load_hf(str(folder), mesh=one_device())
    np.testing.assert_allclose(
        logits_of(ours, tokens), torch_logits(model, tokens), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers(base, name):
    model, folder = base(name)
    ours = load_hf(str(folder), mesh=one_device())
    prompts = [some_tokens()[0, :n].tolist() for n in (11, 4)]
    for prompt, got in zip(prompts, generate(ours, prompts, Sampling(24)), strict=True):
        tokens = torch.tensor([prompt])
        want = model.generate(tokens, max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert got == want.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_an_untouched_model_comes_out_as_it_went_in(base, name, tmp_path):
    model, folder = base(name)
    out = tmp_path / "out"
    save_hf(load_hf(str(folder), mesh=one_device()), str(out))
    before, after = stored(folder), stored(out)
    assert before.keys() == after.keys()
    for path, tensor in before.items():
        assert tensor.dtype == after[path].dtype and torch.equal(tensor, after[path]), path
    kept, written = read_config(str(folder)), read_config(str(out))
    kept["text_config"]["tie_word_embeddings"] = kept["tie_word_embeddings"]  # for transformers 4
    assert_config_kept(kept, written)
    for file in ("preprocessor_config.json", "processor_config.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    again, tokens = loaded(out), some_tokens()
    assert type(again) is type(model)
    for path, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[path]), path
    np.testing.assert_array_equal(torch_logits(model, tokens), torch_logits(again, tokens))


def test_multi_token_prediction_is_trained_with_the_text(base, tmp_path):
    """Its tensors are beside those of the language model; without mtp they are copied."""
    folder, config = base("qwen3_5")[1], MODELS["qwen3_5"]
    cfg = with_mtp(from_hf(config), config)
    weights = nnx.state(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))), nnx.Param)
    shapes = {".".join(path): v.get_value().shape for path, v in nnx.to_flat_state(weights)}
    own = {k.name: shapes[k.path][::-1] for k in key_table(cfg) if k.path.startswith("mtp_1.")}
    assert {"mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight"} < own.keys()
    shutil.copytree(folder, tmp_path / "in")
    tensors = stored(folder) | {name: torch.randn(shape) for name, shape in own.items()}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    for mtp in (True, False):
        model = load_hf(str(tmp_path / "in"), mesh=one_device(), mtp=mtp)
        assert model.cfg.mtp == mtp
        save_hf(model, str(tmp_path / "out"))
        after = stored(tmp_path / "out")
        assert after.keys() == tensors.keys()
        assert all(torch.equal(after[name], tensors[name]) for name in tensors)


def assert_config_kept(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key == "text_config":
            assert_config_kept(value, after[key])
        elif key == "rope_parameters":
            assert value.items() >= after[key].items() or value == after[key]
        else:
            assert after[key] == value, key


@pytest.mark.parametrize("name", MODELS)
def test_the_tuned_weights_are_in_the_whole_model(base, name, tmp_path):
    model, folder = base(name)
    ours, tokens = tuned(load_hf(str(folder), mesh=one_device())), some_tokens()
    save_hf(ours, str(tmp_path / "out"))
    before, after = stored(folder), stored(tmp_path / "out")
    same = {path for path in before if torch.equal(before[path], after[path])}
    assert same == {p for p in before if any(part in p for part in ("vis", "audio", "projector"))}
    got = torch_logits(loaded(tmp_path / "out"), tokens)
    assert np.abs(got - torch_logits(model, tokens)).max() > 0.1
    np.testing.assert_allclose(got, logits_of(ours, tokens), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(
        logits_of(load_hf(str(tmp_path / "out"), mesh=one_device()), tokens),
        logits_of(ours, tokens),
    )


@pytest.mark.parametrize("name", sorted(MODELS.keys() - ONE_SPELLING))
def test_the_names_of_the_files_are_kept_whichever_they_are(base, name, tmp_path):
    """transformers writes the hub's names, or those of its modules, and in shards if asked to."""
    model, folder = base(name)
    for original, limit in ((False, "20KB"), (True, "20KB")):
        source, out = tmp_path / f"source-{original}", tmp_path / f"out-{original}"
        model.save_pretrained(source, max_shard_size=limit, save_original_format=original)
        assert len({*tensor_files(source).values()}) > 2
        ours = load_hf(str(source), mesh=one_device())
        save_hf(ours, str(out), max_shard_bytes=20_000)
        before, after = stored(source), stored(out)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[path], after[path]) for path in before)
        assert all(f.stat().st_size < 40_000 for f in {*tensor_files(out).values()})
        loaded(out)
        tokens = some_tokens()
        np.testing.assert_allclose(
            logits_of(ours, tokens), torch_logits(model, tokens), rtol=0, atol=1e-4
        )


def test_keys_that_no_layer_of_gemma4_uses_are_copied(base, tmp_path):
    """Published checkpoints have them in the layers that use those of others."""
    model, folder = base("gemma4")
    tensors, root = stored(folder), "model.language_model.layers."
    assert f"{root}4.self_attn.k_proj.weight" not in tensors
    spare = {f"{root}4.self_attn.{part}.weight": torch.randn(3, 5) for part in ("k_proj", "v_norm")}
    shutil.copytree(folder, tmp_path / "in")
    save_file(tensors | spare, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    ours = load_hf(str(tmp_path / "in"), mesh=one_device())
    save_hf(ours, str(tmp_path / "out"))
    after = stored(tmp_path / "out")
    assert after.keys() == tensors.keys() | spare.keys()
    assert all(torch.equal(tensor, after[path]) for path, tensor in (tensors | spare).items())
    spare = {f"{root}0.self_attn.v_norm.weight": torch.ones(2)}
    save_file(tensors | spare, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match="1 unexpected ones .*layers.0.self_attn.v_norm"):
        load_hf(str(tmp_path / "in"))


def test_experts_are_read_in_the_layout_of_transformers_5_too(base, tmp_path):
    model, folder = base("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "five")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert stored(folder)[name].shape == stored(tmp_path / "five")[name].mT.shape
    save_hf(load_hf(str(tmp_path / "five"), mesh=one_device()), str(tmp_path / "out"))
    after = stored(tmp_path / "out")
    assert all(torch.equal(tensor, after[path]) for path, tensor in stored(folder).items())
    config = copy.deepcopy(MODELS["qwen3_vl_moe"])
    config["text_config"]["moe_intermediate_size"] = 16
    magnified(config).save_pretrained(tmp_path / "square")
    with pytest.raises(UserError, match="gate_up_proj is square, so its shape does not say"):
        load_hf(str(tmp_path / "square"), mesh=one_device())


def test_fused_experts_are_read_where_transformers_saves_them_one_by_one(base, tmp_path):
    """As the hub has those of Qwen3.5: like the modules of transformers 5. They come out one by
    one; all the rest comes out as it went in."""
    model, folder = base("qwen3_5_moe")
    shutil.copytree(folder, tmp_path / "fused")
    expected = stored(folder)
    tensors = {n: t for n, t in expected.items() if ".experts." not in n}
    assert len(expected) - len(tensors) == 4 * 6 * 3
    fused = {n: t.contiguous() for n, t in model.state_dict().items() if ".experts." in n}
    assert {t.shape for t in fused.values()} == {(6, 40, 32), (6, 32, 20)}
    save_file(tensors | fused, tmp_path / "fused/model.safetensors", {"format": "pt"})
    loaded(tmp_path / "fused")
    ours, tokens = load_hf(str(tmp_path / "fused"), mesh=one_device()), some_tokens()
    np.testing.assert_array_equal(
        logits_of(ours, tokens), logits_of(load_hf(str(folder), mesh=one_device()), tokens)
    )
    save_hf(ours, str(tmp_path / "out"))
    after = stored(tmp_path / "out")
    assert after.keys() == expected.keys()
    assert all(torch.equal(tensor, after[path]) for path, tensor in expected.items())
    del fused["model.language_model.layers.1.mlp.experts.down_proj"]
    save_file(tensors | fused, tmp_path / "fused/model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"lacks 1 tensors \(model.language_model.layers.1.mlp.expe"
    ):
        load_hf(str(tmp_path / "fused"), mesh=one_device())


def test_tensors_are_copied_in_their_own_dtypes_and_aligned(base, tmp_path):
    """Of 8, 4, 2 and 1 bytes, odd counts and no dims, as buffers of vision towers are."""
    _, folder = base("gemma3")
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(folder, source)
    tensors = load_file(source / "model.safetensors")
    extra = {
        "vision_tower.a": torch.arange(3, dtype=torch.uint8),
        "vision_tower.b": torch.arange(5, dtype=torch.int64),
        "vision_tower.c": torch.randn(7).bfloat16(),
        "vision_tower.d": torch.tensor(2.5, dtype=torch.float64),
        "vision_tower.e": torch.zeros(0, 3),
    }
    save_file(tensors | extra, source / "model.safetensors", {"format": "pt"})
    save_hf(load_hf(str(source), mesh=one_device()), str(out), "bfloat16")
    after = stored(out)
    for name, tensor in extra.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
    assert after["language_model.model.norm.weight"].dtype == torch.bfloat16
    assert after["vision_tower.post_layernorm.weight"].dtype == torch.float32
    assert read_config(str(out))["dtype"] == "bfloat16"


def test_host_memory_holds_one_of_the_copied_tensors(base, tmp_path):
    _, folder = base("qwen3_vl")
    source, size = tmp_path / "source", 8_000_000
    shutil.copytree(folder, source)
    extra = {f"model.visual.{i}": torch.full((size,), i, dtype=torch.uint8) for i in range(8)}
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors")
    ours = load_hf(str(source), mesh=one_device())
    tracemalloc.start()
    try:
        save_hf(ours, str(tmp_path / "out"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size < peak < 3.5 * size
    after = stored(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in extra.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_flat_or_sparse_config_is_read_as_transformers_reads_it(base, name, tmp_path):
    """As on the hub: Qwen2.5-VL's has no text_config, others leave out what is the default."""
    model, folder = base(name)
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    config = read_config(str(source))
    if name in ("qwen2_vl", "qwen2_5_vl"):
        text = config.pop("text_config")
        del text["model_type"]
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope["rope_theta"]}
        text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
        config |= text
    else:
        text = config["text_config"]
        defaults = dict(attention_bias=False, attention_dropout=0.0, initializer_range=0.02)
        for key in (*defaults, "use_cache", "hidden_act", "tie_word_embeddings"):
            text.pop(key, None)
    (source / "config.json").write_text(json.dumps(config))
    tokens = some_tokens()
    np.testing.assert_array_equal(torch_logits(model, tokens), torch_logits(loaded(source), tokens))
    ours = load_hf(str(source), mesh=one_device())
    np.testing.assert_allclose(
        logits_of(ours, tokens), torch_logits(model, tokens), rtol=0, atol=1e-4
    )
    save_hf(ours, str(tmp_path / "out"))
    written = read_config(str(tmp_path / "out"))
    assert ("text_config" in written) == ("text_config" in config)
    np.testing.assert_array_equal(
        torch_logits(model, tokens), torch_logits(loaded(tmp_path / "out"), tokens)
    )


@pytest.mark.parametrize("name", MODELS)
def test_to_hf_inverts_from_hf(base, name):
    config = read_config(str(base(name)[1]))
    cfg = from_hf(config)
    assert cfg.wrapper == config["model_type"] and from_hf(to_hf(cfg)) == cfg
    assert from_hf(copy.deepcopy(config)) == cfg


# As published: these alone of the keys that shape the language model.
GEMMA_3_27B = dict(
    model_type="gemma3",
    text_config=dict(
        model_type="gemma3_text",
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=62,
        head_dim=128,
        query_pre_attn_scalar=168,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
        **dict(num_attention_heads=32, num_key_value_heads=16),
    ),
)
MISTRAL_SMALL_3_1 = dict(
    model_type="mistral3",
    tie_word_embeddings=False,
    text_config=dict(
        model_type="mistral",
        hidden_size=5120,
        intermediate_size=32768,
        num_hidden_layers=40,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e9,
        sliding_window=None,
        vocab_size=131072,
        **dict(num_attention_heads=32, num_key_value_heads=8),
    ),
)
QWEN_2_5_VL_7B = dict(
    model_type="qwen2_5_vl",
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    max_position_embeddings=128000,
    max_window_layers=28,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
    sliding_window=32768,
    tie_word_embeddings=False,
    use_sliding_window=False,
    vocab_size=152064,
    **dict(num_attention_heads=28, num_key_value_heads=4),
)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (GEMMA_3_27B, 27_009_346_304),
        (MISTRAL_SMALL_3_1, 23_572_403_200),
        (QWEN_2_5_VL_7B, 7_615_616_512),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_published_models_have_as_many_parameters_as_in_transformers(config, want):
    cfg = from_hf(config)
    assert from_hf(to_hf(cfg)) == cfg
    abstract = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(abstract, nnx.Param))
    assert sum(prod(leaf.shape) for leaf in leaves) == want
    values = copy.deepcopy({k: v for k, v in config.items() if k != "model_type"})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(config["model_type"], **values)
        )
    names = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(n for name, n in names.items() if is_text(name, cfg.wrapper)) == want


def test_every_wrapper_is_tested():
    assert {config["model_type"] for config in MODELS.values()} == {*WRAPPERS}


# ---- adapters

SECTIONS_OF_LORA = {
    "q and v": dict(target_modules=["q_proj", "v_proj"]),
    "all-linear, ranks, two layers": dict(
        layers_to_transform=[1, 3], rank_pattern={"q_proj": 2, "up_proj": 3}
    ),
    "of modules that vision towers have too, one saved": dict(
        target_modules=["q_proj", "down_proj"], modules_to_save=["k_proj", "norm"], use_dora=True
    ),
}


def randomized(model: Any) -> Any:
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if model.peft.trains(path, variable):
            noise = np.random.default_rng(len(str(path))).normal(size=variable[...].shape)
            variable.set_value(variable[...] + 0.06 * jnp.asarray(noise, jnp.float32))
    return model


def in_peft(base: Any, folder: Any) -> Any:
    """The whole torch model with the adapter, whose keys all match."""
    model = peft.PeftModel.from_pretrained(loaded(base), folder)
    result = peft.utils.save_and_load.set_peft_model_state_dict(
        model, load_file(f"{folder}/adapter_model.safetensors")
    )
    missing = [k for k in result.missing_keys if "lora_" in k or "to_save" in k]
    assert not missing and not result.unexpected_keys
    adapted = [n for n, _ in model.named_parameters() if "lora_" in n or "modules_to_save" in n]
    assert adapted and all(".language_model." in name for name in adapted)
    return model.eval()


@pytest.mark.parametrize("options", SECTIONS_OF_LORA.values(), ids=SECTIONS_OF_LORA.keys())
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"qwen3_5_moe"}))
def test_adapters_of_ours_load_in_peft_on_the_whole_model(base, name, options, tmp_path):
    model, folder = base(name)
    section: Any = PeftSection(method="lora", r=4, **options)
    adapter = make_adapter(from_hf(read_config(str(folder))), section)
    ours = randomized(load_hf(str(folder), mesh=one_device(), peft=adapter))
    save_adapter(ours, str(tmp_path / "adapter"))
    tokens = some_tokens()
    got, want = logits_of(ours, tokens), torch_logits(in_peft(folder, tmp_path / "adapter"), tokens)
    assert np.abs(want - torch_logits(model, tokens)).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    again = load_hf(str(tmp_path / "adapter"), mesh=one_device())
    np.testing.assert_array_equal(logits_of(again, tokens), got)
    save_hf(merged(again), str(tmp_path / "merged"))
    np.testing.assert_allclose(
        torch_logits(loaded(tmp_path / "merged"), tokens), want, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "router"), [("qwen3_vl_moe", "mlp.gate"), ("llama4", "feed_forward.router")]
)
def test_adapters_of_experts_go_to_peft_and_back_on_the_whole_model(base, name, router, tmp_path):
    """Of the hub's layout, which transformers 5 swaps for qwen3_vl_moe."""
    model, folder = base(name)
    targets = ["experts.gate_up_proj", "experts.down_proj", f"{router}.weight"]
    options: Any = dict(r=3, target_modules=[], target_parameters=targets)
    adapter = make_adapter(from_hf(read_config(str(folder))), PeftSection("lora", **options))
    ours, tokens = load_hf(str(folder), mesh=one_device(), peft=adapter), some_tokens()
    save_adapter(randomized(ours), str(tmp_path / "adapter"))
    theirs = in_peft(folder, tmp_path / "adapter")
    want, got = torch_logits(theirs, tokens), logits_of(ours, tokens)
    assert np.abs(want - torch_logits(model, tokens)).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_hf(str(folder), adapter=str(tmp_path / "theirs"), mesh=one_device())
    np.testing.assert_array_equal(logits_of(again, tokens), got)
    save_hf(merged(again), str(tmp_path / "merged"))
    np.testing.assert_allclose(
        torch_logits(loaded(tmp_path / "merged"), tokens), want, rtol=0, atol=1e-4
    )


OLD = {
    "gemma3": "language_model.model.",
    "mistral3": "language_model.model.",
    "qwen2_5_vl": "model.",
}


@pytest.mark.parametrize("name", [*OLD, "qwen3_vl"])
def test_adapters_of_peft_are_read_under_todays_and_earlier_names(base, name, tmp_path):
    _, folder = base(name)
    torch.manual_seed(1)
    language = r"model\.language_model\..*\.(q_proj|down_proj)"
    config = peft.LoraConfig(r=4, target_modules=language, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(loaded(folder), config)
    with torch.no_grad():
        for path, weight in theirs.named_parameters():
            if "lora_B" in path:
                weight.copy_(0.2 * torch.randn_like(weight))
    theirs.save_pretrained(tmp_path / "new")
    tokens = some_tokens()
    want = torch_logits(theirs.eval(), tokens)

    def read(place: str) -> Any:
        ours = load_hf(str(folder), adapter=str(tmp_path / place), mesh=one_device())
        return logits_of(ours, tokens)

    np.testing.assert_allclose(read("new"), want, rtol=0, atol=1e-4)
    if name in OLD:
        shutil.copytree(tmp_path / "new", tmp_path / "old")
        weights = load_file(tmp_path / "new" / "adapter_model.safetensors")
        renamed = {k.replace("model.language_model.", OLD[name], 1): v for k, v in weights.items()}
        assert renamed.keys() != weights.keys()
        save_file(renamed, tmp_path / "old" / "adapter_model.safetensors")
        config_file = tmp_path / "old" / "adapter_config.json"
        values = json.loads(config_file.read_text()) | {"target_modules": ["q_proj", "down_proj"]}
        config_file.write_text(json.dumps(values))
        np.testing.assert_array_equal(read("old"), read("new"))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_of_ours_load_in_peft_on_the_whole_model(base, name, method, tmp_path):
    _, folder = base(name)
    section: Any = PeftSection(method=method, num_virtual_tokens=3)
    adapter = make_adapter(from_hf(read_config(str(folder))), section)
    ours = randomized(load_hf(str(folder), mesh=one_device(), peft=adapter))
    save_adapter(ours, str(tmp_path / "adapter"))
    theirs = peft.PeftModel.from_pretrained(loaded(folder), tmp_path / "adapter").eval()
    tokens = some_tokens()
    want = torch_logits(theirs, tokens)[:, -tokens.shape[1] :]
    np.testing.assert_allclose(logits_of(ours, tokens), want, rtol=0, atol=1e-4)


def test_an_adapter_of_the_vision_tower_is_refused(base, tmp_path):
    _, folder = base("gemma3")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(loaded(folder), config).save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="vision_tower.*, which is not of the language model; only"):
        load_hf(str(folder), adapter=str(tmp_path / "a"), mesh=one_device())


# ---- runs


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A model with a tokenizer, in `base`, and chats."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "text").write_text("some text to learn from, and some more " * 30)
    train_tokenizer([folder / "text"], folder / "base", 280)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    config = copy.deepcopy(MODELS["gemma3"])
    config["text_config"]["vocab_size"] = len(tokenizer)
    config |= {"image_token_index": 998, "eos_token_id": [tokenizer.eos_token_id, 7]}
    magnified(config).save_pretrained(folder / "base")
    (folder / "base" / "preprocessor_config.json").write_text('{"size": 28}')
    (folder / "base" / "chat_template.json").write_text('{"chat_template": "the old one"}')
    turns = [{"role": "user", "content": "some"}, {"role": "assistant", "content": "more text"}]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    return folder


def tuning(project: Path, out: Path, *more: str) -> list[str]:
    return [
        *("sft", "--model.path", str(project / "base"), "--output_dir", str(out)),
        *("--data.train", str(project / "chats.jsonl"), "--data.max_length", "32"),
        *("--data.workers", "1", "--batch_size", "8", "--save.every", "2", "--save.keep", "9"),
        *("--optim.learning_rate", "0.01", "--optim.schedule", "constant", *more),
    ]


def test_a_run_is_resumed_and_writes_the_whole_model(project, tmp_path):
    run, straight, before = tmp_path / "run", tmp_path / "straight", stored(project / "base")
    assert main(tuning(project, straight, "--steps", "4")) == 0
    assert main(tuning(project, run, "--steps", "2")) == 0
    assert main(tuning(project, run, "--steps", "4")) == 0
    for file in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (run / "final" / file).read_bytes() == (straight / "final" / file).read_bytes()
    after = stored(run / "final")
    assert after.keys() == before.keys()
    for path, tensor in before.items():
        assert torch.equal(tensor, after[path]) == ("language_model" not in path), path
    # A run's template is in the tokenizer; transformers would prefer that of an old processor.
    assert not (run / "final" / "chat_template.json").exists()
    assert (run / "final" / "chat_template.jinja").exists()
    export(str(run), str(tmp_path / "out"))
    assert stored(tmp_path / "out").keys() == after.keys()
    assert all(torch.equal(t, after[path]) for path, t in stored(tmp_path / "out").items())
    export(str(run), str(tmp_path / "earlier"), step=2)
    ours = load_hf(str(tmp_path / "earlier"), mesh=one_device())
    np.testing.assert_allclose(
        logits_of(ours, some_tokens()),
        torch_logits(loaded(tmp_path / "earlier"), some_tokens()),
        rtol=0,
        atol=1e-4,
    )


def test_the_rest_of_the_model_is_copied_from_the_base_or_the_line_says_where_it_was(
    project, tmp_path, capsys
):
    run, base = tmp_path / "run", project / "base"
    assert main(tuning(project, run, "--steps", "2")) == 0
    moved = base.rename(project / "moved")
    try:
        refused(capsys, ["export", str(run), str(tmp_path / "out")], "the rest of the gemma3 model")
        shutil.copytree(moved, base)
        config = json.loads((base / "config.json").read_text())
        config["vision_config"]["hidden_size"] = 24
        (base / "config.json").write_text(json.dumps(config))
        words = ("is another model now (its vision_config differs); put it back",)
        refused(capsys, ["export", str(run), str(tmp_path / "out")], *words)
        assert not (tmp_path / "out").exists()
    finally:
        shutil.rmtree(base, ignore_errors=True)
        moved.rename(base)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    loaded(tmp_path / "out")


def test_a_run_of_lora_is_merged_into_the_whole_model(project, tmp_path):
    run = tmp_path / "run"
    assert main(tuning(project, run, "--steps", "2", "--peft.method", "lora")) == 0
    assert main(["export", str(run), str(tmp_path / "adapter"), "--check"]) == 0
    assert main(["export", str(run), str(tmp_path / "merged"), "--merge", "--check"]) == 0
    tokens = some_tokens()
    want = torch_logits(in_peft(project / "base", run / "final"), tokens)
    got = torch_logits(loaded(tmp_path / "merged"), tokens)
    assert np.abs(want - torch_logits(loaded(project / "base"), tokens)).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_what_cannot_be_done_with_a_part_of_a_model_is_one_line(project, tmp_path, capsys):
    config, base = str(project / "base" / "config.json"), str(project / "base")
    args = tuning(project, tmp_path / "run", "--steps", "2")
    at = args.index("--model.path")
    args[at : at + 2] = ["--model.config", config, "--model.tokenizer", base]
    refused(capsys, args, "is of a multimodal model", "set model.path")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    args = ["reward", *tuning(project, tmp_path / "reward")[1:]]
    args[args.index("--data.train") + 1] = str(pairs)
    refused(capsys, args, "reward models of model_type gemma3 are not supported")
    with safe_open(f"{base}/model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    shutil.copytree(base, tmp_path / "fp8")
    spare = {"language_model.model.layers.9.mlp.up_proj.weight": torch.ones(2)}
    save_file(tensors | spare, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected ones \(model.language_model.layers.9"):
        load_hf(str(tmp_path / "fp8"))
    name = "vision_tower.post_layernorm.weight"
    save_file(
        tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, tmp_path / "fp8/model.safetensors"
    )
    with pytest.raises(UserError, match=f"{name} is stored as F8_E4M3, quantized, but no quant"):
        load_hf(str(tmp_path / "fp8"))
