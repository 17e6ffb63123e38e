# SPDX-License-Identifier: Apache-2.0
"""Generation: the cache changes nothing, and neither do batch mates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm import rollout
from jaxllm.config import MeshSection, PeftSection
from jaxllm.mesh import make_mesh
from jaxllm.model.config import LayerKind, ModelConfig, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.peft.interop import plan_of
from jaxllm.peft.lora import lora_of, merged
from jaxllm.rollout import (
    Sampling,
    completions,
    cut,
    decode,
    filtered,
    generate,
    prefill,
    stream,
)
from jaxllm.step import weight_shardings

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


HOT = Sampling(max_new_tokens=12, temperature=0.8, top_k=20, seed=5)


def complete(model, prompts=PROMPTS, sampling=HOT, **options):
    graph, trainable, frozen = nnx.split(model, model.peft.trains, ...)
    parts = nnx.to_pure_dict(trainable), nnx.to_pure_dict(frozen)
    return completions(graph, *parts, prompts, sampling, **options)


def with_lora(model):
    """The model beside LoRA branches that are not nothing."""
    section = PeftSection(method="lora", target_modules=("all-linear",), r=3)
    adapted = Decoder(CFG, rngs=nnx.Rngs(params=3, peft=4), peft=plan_of(CFG, section))
    for target in adapted.peft.targets:
        b = lora_of(adapted, target.path).b
        b.set_value(0.05 * jax.random.normal(jax.random.key(1), b.get_value().shape))
    return adapted


@pytest.mark.parametrize("temperature", [0.8, 0.0])
def test_recorded_logps_are_those_of_a_full_forward(model, temperature):
    sampling = Sampling(max_new_tokens=12, temperature=temperature, top_k=3, top_p=0.9)
    out = complete(model, sampling=sampling)
    for row, prompt in enumerate(PROMPTS):
        tokens = jnp.array([*prompt, *out.tokens[row].tolist()])
        logits = model(tokens[None])[0, len(prompt) - 1 : -1] / (temperature or 1)
        logps = jax.nn.log_softmax(logits)[jnp.arange(12), out.tokens[row]]
        np.testing.assert_allclose(out.logps[row], logps, atol=1e-4)
    assert out.tokens.dtype == np.int32
    assert out.logps.dtype == np.float32


def test_greedy_completions_are_what_generate_gives(model):
    sampling = Sampling(max_new_tokens=20, stop_ids=(7, 30, 44))
    out = complete(model, sampling=sampling)
    rows = [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)]
    assert rows == generate(model, PROMPTS, sampling)


def test_lengths_and_truncation_follow_the_first_stop_id(model):
    whole = complete(model).tokens
    stop = int(whole[0, 4])
    out = complete(model, sampling=Sampling(12, 0.8, 20, seed=5, stop_ids=(stop, 1_000)))
    for row, full in enumerate(whole.tolist()):
        length = full.index(stop) + 1 if stop in full else 12
        assert out.lengths[row] == length
        assert out.truncated[row] == (stop not in full)
        assert out.tokens[row].tolist() == full[:length] + [0] * (12 - length)
        assert not out.logps[row, length:].any()
    assert 0 < out.truncated.sum() < 3


def test_a_single_new_token_is_made_without_decoding(model):
    out = complete(model, sampling=Sampling(max_new_tokens=1))
    assert out.tokens[:, 0].tolist() == [o[0] for o in generate(model, PROMPTS, Sampling(1))]


def test_randomness_is_of_key_row_and_step_and_not_of_batch_mates(model):
    key = jax.random.key(11)
    out = complete(model, key=key)
    others = complete(model, [PROMPTS[0], [3, 3], [60], [8, 1], [2]], key=key)
    assert (others.tokens[[0, 2]] == out.tokens[[0, 2]]).all()
    assert (complete(model, key=jax.random.key(12)).tokens != out.tokens).any()


@pytest.mark.parametrize("axes", [dict(fsdp=4), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_mesh_gives_what_one_device_gives(model, axes):
    out = complete(model)
    graph, state = nnx.split(model)
    size = int(np.prod(list(axes.values())))
    mesh = make_mesh(MeshSection(**({"fsdp": 1} | axes)), jax.devices()[:size])
    weights = jax.device_put(nnx.to_pure_dict(state), weight_shardings(state, mesh, whole=False))
    spread = completions(graph, weights, {}, PROMPTS, HOT, mesh=mesh)
    assert (spread.tokens == out.tokens).all()
    np.testing.assert_allclose(spread.logps, out.logps, atol=1e-4)


def test_the_cache_is_divided_over_the_mesh(model):
    graph, state = nnx.split(model)
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        rows = jnp.ones((4, 64), jnp.int32)
        *_, cache = prefill(graph, (state, {}), rows, rows, jax.random.key(0), 128, Sampling(1))
    assert cache.k.sharding.shard_shape(cache.k.shape) == (4, 1, 1, 128, 8)
    assert cache.segments.sharding.shard_shape(cache.segments.shape) == (1, 128)


def test_lora_branches_count_as_if_they_were_folded_in(model):
    adapted = with_lora(model)
    out, folded = complete(adapted), complete(merged(adapted))
    assert (out.tokens == folded.tokens).all()
    assert (out.tokens != complete(model).tokens).any()
    np.testing.assert_allclose(out.logps, folded.logps, atol=1e-3)


@pytest.mark.parametrize("method", ["none", "lora", "adapter", "prefix", "prompt"])
def test_layers_apart_are_the_same_model(method, monkeypatch):
    section = PeftSection(method=method, target_modules=("all-linear",), num_virtual_tokens=5)
    model = Decoder(CFG, rngs=nnx.Rngs(params=3, peft=4), peft=plan_of(CFG, section))
    model.peft.begin(model)
    whole = complete(model)

    def ready(model, graph, weights):
        graph, state = rollout._apart(graph, weights)
        assert graph != nnx.graphdef(model)
        return graph, (state, {})

    monkeypatch.setattr(rollout, "ready", ready)
    out = complete(model)
    assert (out.tokens == whole.tokens).all()
    np.testing.assert_allclose(out.logps, whole.logps, atol=1e-4)


def test_in_bfloat16_the_cache_and_layers_apart_change_no_choice(model):
    small = Decoder(CFG, rngs=nnx.Rngs(3), compute_dtype="bfloat16")
    out = complete(small, sampling=Sampling(max_new_tokens=12))
    for row, prompt in enumerate(PROMPTS):
        logits = small(jnp.array([[*prompt, *out.tokens[row].tolist()]]))[0, len(prompt) - 1 : -1]
        chosen = logits[jnp.arange(12), out.tokens[row]]
        assert (logits.max(-1) - chosen).max() < 0.05 * jnp.abs(logits).max()
        logps = jax.nn.log_softmax(logits)[jnp.arange(12), out.tokens[row]]
        np.testing.assert_allclose(out.logps[row], logps, atol=0.3)


def test_decoding_ends_with_the_last_row(model):
    graph, state = nnx.split(model)
    rows = jnp.zeros((2, 64), jnp.int32).at[0, 62:].set(jnp.array([7, 30]))
    segments = (rows > 0).astype(jnp.int32)  # the second has no prompt: it fills up the mesh

    def run(*stops):
        sampling, key = Sampling(1, stop_ids=stops), jax.random.key(0)
        token, _, cache = prefill(graph, (state, {}), rows, segments, key, 128, sampling)
        tokens, _, cache = decode(graph, (state, {}), cache, token, key, jnp.int32(1), 9, sampling)
        return [int(token[0]), *tokens[0].tolist()], int(cache.length) - 64

    whole, steps = run(CFG.vocab_size)
    assert steps == 9
    for stop in dict.fromkeys(whole):
        made = whole.index(stop)
        assert run(stop) == (whole[: made + 1] + [0] * (9 - made), made)


def test_completions_refuse_what_generate_refuses(model):
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        complete(model, [[1], []])
