# SPDX-License-Identifier: Apache-2.0
"""Generation: the cache changes nothing, and neither do batch mates."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.model.config import LayerKind, ModelConfig, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.rollout import Sampling, cut, decode, filtered, generate, prefill, stream

CFG = ModelConfig(
    "llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=256,
    ropes=(Rope(),),
    kinds=(LayerKind(0), LayerKind(None), LayerKind(0, 7)),
    layer_kinds=(0, 1, 2, 0),
    initializer_range=0.4,
)
PROMPTS = [[5, 9, 2], [7, 1, 1, 30, 44, 8, 3, 22, 6, 2, 19], [60]]


@pytest.fixture(scope="module")
def model():
    return Decoder(CFG, rngs=nnx.Rngs(3))


def by_full_forward(model, prompt, out):
    """The greedy choice after the prompt and after each token of `out`, without a cache."""
    logits = model(jnp.array([[*prompt, *out]]))[0]
    return jnp.argmax(logits[len(prompt) - 1 : -1], -1).tolist()


def test_cached_greedy_decoding_equals_the_full_forward_in_a_ragged_batch(model):
    outs = generate(model, PROMPTS, Sampling(max_new_tokens=20))
    assert outs == [by_full_forward(model, p, out) for p, out in zip(PROMPTS, outs, strict=True)]


def test_streaming_yields_what_generate_returns(model):
    tokens = [
        int(t) for new in stream(model, PROMPTS[1:2], Sampling(max_new_tokens=9)) for t in new[0]
    ]
    assert tokens == generate(model, PROMPTS[1:2], Sampling(max_new_tokens=9))[0]


def test_a_row_ends_with_its_stop_id_and_others_go_on(model):
    whole = generate(model, PROMPTS, Sampling(max_new_tokens=20))
    stop = whole[0][2]
    outs = generate(model, PROMPTS, Sampling(max_new_tokens=20, stop_ids=(stop,)))
    for out, full in zip(outs, whole, strict=True):
        assert out == (full[: full.index(stop) + 1] if stop in full else full)
    assert len(outs[0]) <= 3


def test_sampling_repeats_with_its_seed_and_changes_with_another(model):
    def draw(seed):
        return generate(model, PROMPTS, Sampling(max_new_tokens=12, temperature=1.0, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_filters_equal_a_short_numpy_reference():
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 3
    got = np.asarray(
        filtered(jnp.asarray(logits), Sampling(temperature=0.7, top_k=12, top_p=0.8, min_p=0.05))
    )
    for row, out in zip(logits / np.float32(0.7), got, strict=True):
        kept = set(np.argsort(-row)[:12])
        probs = {i: np.exp(row[i]) for i in kept}
        total, used, nucleus = sum(probs.values()), 0.0, set()
        for i in sorted(kept, key=lambda i: -row[i]):
            if used < 0.8:
                nucleus.add(i)
            used += probs[i] / total
        rest = sum(probs[i] for i in nucleus)
        top = max(probs[i] for i in nucleus)
        nucleus = {i for i in nucleus if probs[i] / rest >= 0.05 * top / rest}
        assert set(np.flatnonzero(np.isfinite(out))) == nucleus


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(max_new_tokens=0), "max_new_tokens"),
        (Sampling(temperature=-1.0), "temperature"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(max_new_tokens=10_000), "positions"),
    ],
)
def test_values_out_of_range_are_refused(model, sampling, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, sampling)


def test_no_prompt_at_all_is_refused(model):
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        generate(model, [], Sampling())


def test_text_is_cut_before_the_first_stop_string():
    assert cut("one two three", ["three", "two"]) == ("one ", True)
    assert cut("one", ["two"]) == ("one", False)


def test_another_seed_is_no_other_program(model):
    generate(model, [[1, 2]], Sampling(max_new_tokens=4, temperature=1.0, seed=1))
    before = prefill._cache_size(), decode._cache_size()
    generate(model, [[1, 2]], Sampling(max_new_tokens=4, temperature=1.0, seed=2))
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_logits_are_not_rounded_to_bfloat16(model):
    small = Decoder(model.cfg, rngs=nnx.Rngs(0), compute_dtype="bfloat16")
    logits = small(jnp.array([[1, 2, 3]]))
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.5


def test_decoding_compiles_once_for_prompts_of_one_bucket(model):
    from jaxllm.rollout import decode

    generate(model, [[1, 2, 3]], Sampling(max_new_tokens=20))
    before = decode._cache_size()
    generate(model, [[4, 5, 6, 7, 8]], Sampling(max_new_tokens=20))
    assert decode._cache_size() == before
