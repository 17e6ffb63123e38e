# SPDX-License-Identifier: Apache-2.0
"""Generation: the cache changes nothing, and neither do batch mates."""

import gc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm import sampling as module
from jaxllm.config import MeshSection, PeftSection
from jaxllm.mesh import make_mesh
from jaxllm.model.config import LayerKind, ModelConfig, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.ops import attention, attention_tpu
from jaxllm.ops.matmul import operand
from jaxllm.peft.combine import merged
from jaxllm.peft.files import make_adapter
from jaxllm.sampling import (
    Completions,
    Sampling,
    completions,
    decode,
    filtered,
    generate,
    prefill,
    stream,
)

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
    ropes=(Rope(), Rope(kind="none")),
    kinds=(LayerKind(0), LayerKind(1), LayerKind(0, 7)),
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
    from jaxllm.sampling import decode

    generate(model, [[1, 2, 3]], Sampling(max_new_tokens=20))
    before = decode._cache_size()
    generate(model, [[4, 5, 6, 7, 8]], Sampling(max_new_tokens=20))
    assert decode._cache_size() == before


# ---- completions of an online run

ONE = make_mesh(MeshSection(), jax.devices()[:1])
WARM = Sampling(max_new_tokens=12, temperature=1.3, stop_ids=(4, 11, 33))
RAGGED = [[int(t) for t in (7 * i + np.arange(1 + i * 2)) % 61] for i in range(9)]


def completed(model, prompts, sampling, mesh=ONE, key=None):
    return completions(*nnx.split(model), prompts, sampling, mesh=mesh, key=key)


@pytest.mark.parametrize("devices", [1, 3, 4])
def test_completions_of_one_prompt_share_its_prefill(model, devices, monkeypatch):
    """9 prompts divide over 3 devices, not over 4, where each completion has a prefill."""
    mesh = make_mesh(MeshSection(), jax.devices()[:devices])
    rows = []
    monkeypatch.setattr(
        "jaxllm.sampling.prefill", lambda *a, **k: rows.append(len(a[2])) or prefill(*a, **k)
    )
    options = {"mesh": mesh, "key": jax.random.key(4)}
    each = [prompt for prompt in RAGGED for _ in range(4)]
    want = completions(*nnx.split(model), each, WARM, **options)
    got = completions(*nnx.split(model), RAGGED, WARM, copies=4, **options)
    assert rows == [36, 36 if devices == 4 else 9] and len(got.tokens) == 36
    assert_same(got, want, atol=1e-5)
    assert len({tuple(row) for row in got.tokens[:4].tolist()}) > 1


def assert_same(a, b, atol=0.0):
    """Two Completions are of the same tokens; what lies after a row's end does not matter."""
    np.testing.assert_array_equal(a.lengths, b.lengths)
    np.testing.assert_array_equal(a.truncated, b.truncated)
    here = np.arange(a.tokens.shape[1]) < a.lengths[:, None]
    np.testing.assert_array_equal(a.tokens[here], b.tokens[here])
    np.testing.assert_allclose(a.logps[here], b.logps[here], atol=atol, rtol=0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=12, temperature=1.0),
        WARM,
        Sampling(max_new_tokens=12, temperature=0.6, top_k=5, top_p=0.9, stop_ids=(4,)),
        Sampling(max_new_tokens=12),
    ],
    ids=["plain", "warm", "filtered", "greedy"],
)
def test_recorded_log_probabilities_are_those_of_the_full_forward(model, sampling):
    made = completed(model, RAGGED, sampling, key=jax.random.key(5))
    texts = [p + t[:n] for p, t, n in zip(RAGGED, made.tokens.tolist(), made.lengths, strict=True)]
    rows, segments = np.zeros((2, len(texts), max(map(len, texts))), np.int32)
    for row, segment, text in zip(rows, segments, texts, strict=True):
        row[: len(text)], segment[: len(text)] = text, 1
    logits = np.asarray(model(rows, segments)) / (sampling.temperature or 1.0)
    logps = np.asarray(jax.nn.log_softmax(logits))
    for row, (prompt, text) in enumerate(zip(RAGGED, texts, strict=True)):
        places, drawn = np.arange(len(prompt), len(text)) - 1, text[len(prompt) :]
        want = logps[row, places, drawn]
        np.testing.assert_allclose(made.logps[row, : len(drawn)], want, atol=1e-4)
        rank = (logps[row, places] > want[:, None]).sum(1).max()
        assert rank < (sampling.top_k or 61)


def test_greedy_completions_equal_generate(model):
    whole = generate(model, RAGGED, Sampling(max_new_tokens=12))
    greedy = Sampling(max_new_tokens=12, stop_ids=(whole[2][3], whole[5][7]))
    made = completed(model, RAGGED, greedy)
    want = generate(model, RAGGED, greedy)
    assert [row[:n] for row, n in zip(made.tokens.tolist(), made.lengths, strict=True)] == want
    assert made.lengths.tolist() == [len(row) for row in want]
    assert made.truncated.tolist() == [row[-1] not in greedy.stop_ids for row in want]
    assert 0 < made.truncated.sum() < len(RAGGED) and made.lengths[2] <= 4


def test_a_row_that_ends_at_its_last_token_is_not_truncated(model):
    first = completed(model, PROMPTS, Sampling(max_new_tokens=1))
    assert first.truncated.all() and first.lengths.tolist() == [1, 1, 1]
    ends = Sampling(max_new_tokens=1, stop_ids=tuple(first.tokens[:2, 0].tolist()))
    assert completed(model, PROMPTS, ends).truncated[:2].tolist() == [False, False]


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_completions_do_not_depend_on_the_mesh(model, shape):
    """Nine rows are no multiple of the devices: some rows are there to fill them up."""
    key = jax.random.key(1)
    alone = completed(model, RAGGED, WARM, key=key)
    assert 0 < alone.truncated.sum() < len(RAGGED)
    assert_same(completed(model, RAGGED, WARM, make_mesh(MeshSection(**shape)), key), alone, 1e-4)


def test_a_completion_does_not_depend_on_the_others_in_its_batch(model):
    key = jax.random.key(1)
    some, others = (completed(model, [*RAGGED[:4], *p], WARM, key=key) for p in (RAGGED, PROMPTS))
    fields = ("tokens", "logps", "lengths", "truncated")
    first = [Completions(*(getattr(x, f)[:4] for f in fields)) for x in (some, others)]
    assert_same(*first, 1e-4)


def test_draws_change_with_the_key_and_are_otherwise_the_same(model):
    a, b, c = (completed(model, RAGGED, WARM, key=jax.random.key(k)) for k in (1, 1, 2))
    assert_same(a, b)
    assert (a.tokens != c.tokens).any()
    same = completed(model, [RAGGED[4]] * 6, WARM, key=jax.random.key(1))
    assert len({tuple(row) for row in same.tokens[:, :3].tolist()}) > 1


def test_completions_end_when_every_row_has(model):
    """What would be drawn after that is not even computed: it stays 0."""
    greedy = Sampling(max_new_tokens=40)
    whole = completed(model, PROMPTS, greedy)
    made = completed(model, PROMPTS, Sampling(40, stop_ids=tuple(whole.tokens[:, 3].tolist())))
    longest = int(made.lengths.max())
    assert longest <= 4 and not made.truncated.any()
    assert not made.logps[:, longest:].any() and not made.tokens[:, longest:].any()
    assert (made.logps[:, :longest] != 0).all()


def test_lora_branches_complete_as_the_merged_model_does(model):
    plan = make_adapter(CFG, PeftSection(method="lora", r=3))
    tuned = Decoder(CFG, rngs=nnx.Rngs(params=3, peft=4), peft=plan)
    rest = nnx.state(tuned, lambda path, v: plan.trains(path, v))
    noise = iter(jax.random.split(jax.random.key(0), 99))
    nnx.update(tuned, jax.tree.map(lambda x: 0.2 * jax.random.normal(next(noise), x.shape), rest))
    key = jax.random.key(2)
    made = completed(tuned, RAGGED, WARM, key=key)
    assert_same(made, completed(merged(tuned), RAGGED, WARM, key=key), 1e-3)
    assert (made.tokens != completed(model, RAGGED, WARM, key=key).tokens).any()


@pytest.mark.parametrize("method", ["none", "lora", "adapter", "prefix", "prompt"])
def test_unstacked_layers_are_the_same_model(method, monkeypatch):
    section = PeftSection(method=method, target_modules=("all-linear",), num_virtual_tokens=5)
    model = Decoder(CFG, rngs=nnx.Rngs(params=3, peft=4), peft=make_adapter(CFG, section))
    model.peft.begin(model)
    unstacked = completed(model, RAGGED, WARM)
    monkeypatch.setattr(module, "decoding_layout", lambda *parts: parts)
    assert_same(unstacked, completed(model, RAGGED, WARM), atol=1e-4)


def test_in_bfloat16_the_cache_and_unstacked_layers_change_no_choice():
    small = Decoder(CFG, rngs=nnx.Rngs(3), compute_dtype="bfloat16")
    out = completed(small, PROMPTS, Sampling(max_new_tokens=12))
    for row, prompt in enumerate(PROMPTS):
        logits = small(jnp.array([[*prompt, *out.tokens[row].tolist()]]))[0, len(prompt) - 1 : -1]
        chosen = logits[jnp.arange(12), out.tokens[row]]
        assert (logits.max(-1) - chosen).max() < 0.05 * jnp.abs(logits).max()


def test_unstacked_layers_have_the_dtype_of_their_products():
    """A table that is cast at each step costs more than its product."""
    small = Decoder(CFG, rngs=nnx.Rngs(3), compute_dtype="bfloat16")
    _, held = module._unstacked(*nnx.split(small))
    kept = {str(x.dtype) for path, x in nnx.to_flat_state(held) if path[-1] != "scale"}
    assert kept == {str(operand(jnp.zeros(1, jnp.bfloat16)).dtype)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_for_decoding_takes_the_place_of_its_own(dtype):
    model = Decoder(CFG, rngs=nnx.Rngs(3), compute_dtype=dtype)
    expected = module.generate(model, PROMPTS, Sampling(max_new_tokens=5))
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    small = module.for_decoding(model)
    del model
    assert sum(x.nbytes for x in jax.live_arrays()) <= before
    graph, params = nnx.split(small)
    again = module.decoding_layout(graph, params)[1]  # no copy is made again
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (params, again)), strict=True))
    assert module.generate(small, PROMPTS, Sampling(max_new_tokens=5)) == expected


# ---- attention of prompts, and positions that depend on the length of the text


@pytest.mark.parametrize("shape", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_prompts_are_read_by_the_fused_kernel(model, monkeypatch, shape):
    """Splash attention, interpreted: left-padded rows of an empty cache attend to themselves."""
    calls = []

    def run(q, k, v, q_segments, k_segments, _, **options):
        calls.append(q.shape[1])
        return attention_tpu.run(q, k, v, q_segments, k_segments, interpret=True, **options)

    kernel = attention.Kernel("interpreted", "cpu", lambda **_: "", lambda: "it is slow", run)
    monkeypatch.setattr(attention, "KERNELS", (kernel,))
    mesh = make_mesh(MeshSection(**shape), jax.devices()[: 8 if shape else 1])
    want = completed(model, RAGGED[:8], WARM, mesh, jax.random.key(3))
    assert not calls
    fused = Decoder(CFG, rngs=nnx.Rngs(3), attention="interpreted")
    assert_same(completed(fused, RAGGED[:8], WARM, mesh, jax.random.key(3)), want, 1e-4)
    assert calls == [64] * CFG.num_layers  # one prefill, whose layers are unstacked


ORIGINAL = 12  # tokens after which longrope's factors are the long ones
LONGROPE = Rope(
    kind="longrope",
    theta=100.0,
    original_length=ORIGINAL,
    short_factor=(1.0, 1.1, 1.2, 1.3),
    long_factor=(1.5, 2.0, 4.0, 9.0),
    mscale=1.1,
)


@pytest.fixture(scope="module")
def stretched():
    return Decoder(replace(CFG, ropes=(LONGROPE,)), rngs=nnx.Rngs(3))


def by_growing_forward(model, prompt, count):
    """Greedy tokens, each by a forward pass of its own over the text so far."""
    text = list(prompt)
    for _ in range(count):
        row = jnp.array([text + [0] * (32 - len(text))])
        segments = (jnp.arange(32) < len(text)).astype(jnp.int32)[None]
        text.append(int(jnp.argmax(forward(model, row, segments)[0, len(text) - 1])))
    return text[len(prompt) :]


forward = nnx.jit(lambda model, row, segments: model(row, segments))


@pytest.mark.parametrize(("method", "chunk"), [("none", 1), ("prefix", 5)])
def test_longrope_follows_the_length_of_each_text_while_it_grows(method, chunk):
    """Prompts of 3, 11 and 1 tokens, and of 13, in one batch; cross 12 at different steps."""
    section = PeftSection(method=method, num_virtual_tokens=3)
    cfg = replace(CFG, ropes=(LONGROPE,))
    model = Decoder(cfg, rngs=nnx.Rngs(params=3, peft=4), peft=make_adapter(cfg, section))
    prompts = [*PROMPTS, list(range(20, 33))]
    made = np.concatenate([*stream(model, prompts, Sampling(max_new_tokens=13), chunk)], 1)
    assert made.tolist() == [by_growing_forward(model, p, 13) for p in prompts]
    short = Decoder(replace(CFG, ropes=(replace(LONGROPE, original_length=99),)), rngs=nnx.Rngs(3))
    assert method != "none" or made.tolist() != [by_growing_forward(short, p, 13) for p in prompts]


def test_longrope_samples_short_and_long_texts_as_they_are_trained_on(stretched):
    """The rollout's buffers are longer than ORIGINAL, the first texts are not."""
    prompts = [[5, 9, 2], [60], list(range(20, 33)), list(range(2, 18))]
    made = completed(stretched, prompts, Sampling(8, temperature=1.0), key=jax.random.key(5))
    for row, prompt in enumerate(prompts):
        text = [*prompt, *made.tokens[row].tolist()]
        assert len(text) <= ORIGINAL or len(prompt) > ORIGINAL
        padded = jnp.array([text + [0] * (32 - len(text))])
        segments = (jnp.arange(32) < len(text)).astype(jnp.int32)[None]
        logps = jax.nn.log_softmax(forward(stretched, padded, segments))
        want = logps[0, len(prompt) - 1 + np.arange(8), made.tokens[row]]
        np.testing.assert_allclose(made.logps[row], want, atol=1e-4)
