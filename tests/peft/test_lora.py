# SPDX-License-Identifier: Apache-2.0
"""LoRA and its kin in a step: where they begin, what they train, and that how an update is computed
does not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from steps import TINY, decoder, ragged_rows, trajectory, unpacked

from jaxllm.config import MeshSection, PeftSection
from jaxllm.mesh import axes_of, make_mesh, spec
from jaxllm.model.context import Context
from jaxllm.model.decoder import Decoder, merge
from jaxllm.model.families import from_hf
from jaxllm.peft.interop import METHODS, plan_of
from jaxllm.peft.lora import LoraParam

SECTIONS = {
    "lora": PeftSection(method="lora", r=4),
    "dora": PeftSection(method="lora", r=4, use_dora=True),
    "pissa": PeftSection(method="lora", r=4, init_lora_weights="pissa"),
    "head and table": PeftSection(
        method="lora", r=4, target_modules=("q_proj", "lm_head"), modules_to_save=("embed_tokens",)
    ),
    "adapter": PeftSection(method="adapter", bottleneck=8),
    "pfeiffer": PeftSection(method="adapter", bottleneck=8, placement="pfeiffer"),
    "prefix": PeftSection(method="prefix", num_virtual_tokens=3),
    "prompt": PeftSection(method="prompt", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", ["lora", "adapter", "pfeiffer", "pissa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_begins_as_its_base_bit_for_bit(name, dtype):
    plain = Decoder(TINY, rngs=nnx.Rngs(params=1, peft=2), compute_dtype=dtype)
    begun = decoder(SECTIONS[name], compute_dtype=dtype)
    base = nnx.to_flat_state(nnx.state(begun, nnx.Param))
    for (path, a), (_, b) in zip(base, nnx.to_flat_state(nnx.state(plain)), strict=True):
        np.testing.assert_array_equal(a.get_value(), b.get_value(), err_msg=str(path))
    rows = ragged_rows(4)
    run = nnx.jit(lambda m: m(rows["tokens"], rows["segment_ids"], rows["positions"]))
    np.testing.assert_array_equal(run(begun), run(plain))


def test_dora_begins_as_its_base_but_for_rounding():
    rows = ragged_rows(2)["tokens"]
    want = nnx.jit(lambda m: m(rows))(Decoder(TINY, rngs=nnx.Rngs(params=1, peft=2)))
    np.testing.assert_allclose(
        nnx.jit(lambda m: m(rows))(decoder(SECTIONS["dora"])), want, atol=5e-5
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_only_what_is_asked_is_trained_and_kept(name):
    """The state, which is what a checkpoint holds, has the adapter's leaves only; each moves."""
    made = decoder(SECTIONS[name])
    _, _, state, (graph, frozen) = trajectory(ragged_rows(8), SECTIONS[name])
    start = nnx.to_pure_dict(nnx.state(made, made.peft.trains))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), start, jax.device_get(state.trainable))
    assert all(jax.tree.leaves(moved)), moved
    own = sum(x.size for x in jax.tree.leaves(start))
    assert made.peft.count(made) == own
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) <= 2 * own + 4  # moments, counts
    merge(graph, state.trainable, frozen)  # together they are the whole model


@pytest.fixture(scope="module")
def references():
    rows = ragged_rows()
    names = ("lora", "dora", "prompt", "prefix", "adapter", "pissa", "head and table")
    return {n: trajectory(rows, SECTIONS[n])[:2] for n in names}


FORMS = {
    "accumulated": dict(count=4),
    "remat full": dict(remat="full"),
    "remat dots": dict(remat="dots"),
    "unrolled": dict(scan_unroll=4),
    "fsdp 8": dict(devices=8, mesh=MeshSection(fsdp=8)),
    "tensor 4 x fsdp 2": dict(devices=8, mesh=MeshSection(fsdp=2, tensor=4), count=2, remat="full"),
}


@pytest.mark.parametrize(
    ("name", "form"),
    [*(("lora", form) for form in FORMS), ("dora", "remat full"), ("dora", "tensor 4 x fsdp 2")],
)
def test_a_trajectory_does_not_depend_on_how_an_update_is_computed(references, name, form):
    losses, norms, _, _ = trajectory(ragged_rows(), SECTIONS[name], **FORMS[form])
    np.testing.assert_allclose(losses, references[name][0], rtol=1e-5)
    np.testing.assert_allclose(norms, references[name][1], rtol=1e-4 if name == "dora" else 2e-5)


@pytest.mark.parametrize("name", ["prompt", "prefix", "adapter", "pissa", "head and table"])
def test_the_other_methods_on_a_mesh_accumulated_with_remat(references, name):
    losses, norms, _, _ = trajectory(ragged_rows(), SECTIONS[name], **FORMS["tensor 4 x fsdp 2"])
    np.testing.assert_allclose(losses, references[name][0], rtol=1e-5)
    np.testing.assert_allclose(norms, references[name][1], rtol=2e-5)


@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_packed_rows_equal_unpacked_ones(references, name):
    """Each text of a packed row has the virtual tokens before it, within windows too."""
    losses, norms, _, _ = trajectory(unpacked(ragged_rows()), SECTIONS[name])
    np.testing.assert_allclose(losses, references[name][0], rtol=1e-5)
    np.testing.assert_allclose(norms, references[name][1], rtol=2e-5)


def test_dropout_differs_by_step_layer_and_module_and_is_off_without_a_key():
    section = PeftSection(method="lora", r=4, lora_dropout=0.5)
    model = decoder(section)
    model.layers.attn.q.lora.b.set_value(jnp.ones_like(model.layers.attn.q.lora.b[...]))
    tokens = jnp.asarray(ragged_rows(2)["tokens"])
    run = nnx.jit(lambda m, key: m.hidden(tokens, rng=key))
    first, second = (jax.random.split(jax.random.key(seed), 2) for seed in (0, 1))
    a, b = run(model, first), run(model, second)
    assert not np.allclose(a, b)
    np.testing.assert_array_equal(a, run(model, first))
    still = nnx.jit(lambda m: m.hidden(tokens))(model)
    without = decoder(PeftSection(method="lora", r=4))
    without.layers.attn.q.lora.b.set_value(jnp.ones_like(without.layers.attn.q.lora.b[...]))
    np.testing.assert_array_equal(still, nnx.jit(lambda m: m.hidden(tokens))(without))
    lora, x = model.layers.attn.q.lora, jnp.ones((1, 2000, 32))
    graph, state = nnx.split(lora)
    one = nnx.merge(graph, jax.tree.map(lambda v: jnp.ones_like(v[0]), state))
    h = one.inner(x, Context(rng=jax.random.split(jax.random.key(0), 1)))
    assert abs(float(h.mean()) - 32 * 4) < 1  # the mean stays: 32 inputs, s = 16 / 4


def test_gaussian_and_kaiming_starts():
    a = decoder(PeftSection(method="lora", r=4)).layers.mlp.up.lora.a[...]
    assert float(jnp.abs(a).max()) <= 32**-0.5 and float(a.std()) == pytest.approx(
        (3 * 32) ** -0.5, rel=0.1
    )
    a = decoder(PeftSection(method="lora", r=4, init_lora_weights="gaussian")).layers.mlp.up.lora.a
    assert float(a[...].std()) == pytest.approx(1 / 4, rel=0.1)


QWEN_1_5B = dict(
    model_type="qwen2",
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def shapes(config, section):
    cfg = from_hf(config)
    plan = plan_of(cfg, section)
    return nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), peft=plan))


def test_parameters_of_qwen2_5_1_5b():
    section = PeftSection(method="lora", r=8, target_modules=("q_proj", "v_proj"))
    model = shapes(QWEN_1_5B, section)
    assert model.peft.count(model) == 1_089_536
    assert (
        sum(v.get_value().size for _, v in nnx.to_flat_state(nnx.state(model, LoraParam)))
        == 1_089_536
    )
    assert model.peft.summary(model) == [
        "trainable: 1,089,536 parameters beside 1,543,714,304 (0.07%)"
    ]
    section = PeftSection(method="lora", r=8, target_modules=("q_proj", "o_proj"))
    model = shapes(QWEN_1_5B, section)
    assert model.peft.summary(model)[0].endswith("= 2·L·d·r = 2 · 56 · 1,536 · 8")
    assert model.peft.count(model) == 2 * 56 * 1536 * 8


def test_what_a_layer_has_less_of_is_not_counted():
    section = PeftSection(
        method="lora",
        r=8,
        target_modules=("q_proj",),
        layers_to_transform=(0, 3),
        rank_pattern={"layers.3.self_attn.q_proj": 2},
    )
    model = shapes(QWEN_1_5B, section)
    assert model.peft.count(model) == (8 + 2) * 2 * 1536


def test_a_and_b_lie_as_their_base_does():
    mesh = make_mesh(MeshSection(fsdp=2, tensor=4), jax.devices())
    model = shapes(QWEN_1_5B, PeftSection(method="lora", r=8))

    def lies(variable):
        return spec(axes_of(variable), variable.get_value().shape, mesh)

    q, down = model.layers.attn.q.lora, model.layers.mlp.down.lora
    assert lies(q.a) == P(None, ("fsdp",), None) and lies(q.b) == P(None, None, ("tensor",))
    assert lies(down.a) == P(None, ("tensor",), None) and lies(down.b) == P(None, None, ("fsdp",))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(target_modules=("q_prj",)), "q_prj.*matches nothing.*q_proj, k_proj.*all-linear"),
        (dict(target_modules=("q_proj[",)), "neither a module nor a pattern"),
        (dict(exclude_modules=("z",)), "exclude_modules: 'z'"),
        (dict(exclude_modules=(r".*proj",)), "nothing is left"),
        (dict(layers_to_transform=(28,)), "no layer 28.*0 to 27"),
        (dict(rank_pattern={"z_proj": 4}), "rank_pattern"),
        (dict(modules_to_save=("score",)), "modules_to_save: 'score'.*embed_tokens"),
        (dict(modules_to_save=("layers.3.input_layernorm",)), "some layers of a stack"),
        (dict(target_modules=("lm_head",)), "the head is the token table"),
        (dict(target_modules=("embed_tokens",), init_lora_weights="pissa"), "pissa"),
    ],
)
def test_what_the_model_does_not_have_is_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        plan_of(from_hf(QWEN_1_5B), PeftSection(method="lora", **keys))


def test_pissa_of_more_than_a_matrix_has_is_refused():
    section = PeftSection(method="lora", r=24, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="rank 24, but .*k_proj has 16 singular values"):
        decoder(section)


def test_a_prefix_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="num_virtual_tokens 64 leaves nothing"):
        plan_of(TINY, PeftSection(method="prefix", num_virtual_tokens=64))
    model = decoder(SECTIONS["prefix"])
    assert "3 virtual tokens leave each text 61 of 64 positions" in model.peft.summary(model)


@pytest.mark.parametrize("name", ["prefix", "prompt", "adapter", "lora"])
def test_generation_with_a_cache_equals_the_whole_pass(name):
    from jaxllm.sampling import Sampling, generate

    model = decoder(SECTIONS[name])
    noise = iter(jax.random.split(jax.random.key(3), 100))
    for _, v in nnx.to_flat_state(nnx.state(model, model.peft.trains)):
        v.set_value(v.get_value() + 0.3 * jax.random.normal(next(noise), v.get_value().shape))
    graph, state = nnx.split(model)
    prompts = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12]]  # the shorter is padded; a window of 9 ends
    made = generate(model, prompts, Sampling(max_new_tokens=8))
    whole = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    for prompt, new in zip(prompts, made, strict=True):
        tokens = np.asarray(prompt + new)[None]
        want = np.asarray(whole(state, tokens)).argmax(-1)[0, len(prompt) - 1 : -1]
        np.testing.assert_array_equal(new, want)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_a_long_row_behind_virtual_tokens_goes_block_by_block(name):
    """128 tokens are four blocks of queries, 130 one: what comes later does not show."""
    model = decoder(SECTIONS[name])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (1, 130)))
    run = nnx.jit(lambda m, x: m(x))
    np.testing.assert_allclose(run(model, tokens[:, :128]), run(model, tokens)[:, :128], atol=1e-5)


def test_every_method_has_a_row():
    from typing import get_args, get_type_hints

    names = set(get_args(get_type_hints(PeftSection)["method"]))
    assert names == {"none", *METHODS}
