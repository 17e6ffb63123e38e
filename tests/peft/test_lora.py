# SPDX-License-Identifier: Apache-2.0
"""The PEFT methods in a step: initialization, trained parameters, dropout, and trajectories
that do not depend on how an update is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from steps import TINY, assert_same_trajectory, decoder, ragged_rows, trajectory, unpacked

from jaxllm.config import MeshSection, PeftSection
from jaxllm.mesh import axes_of, make_mesh, param_sharding, spec
from jaxllm.model.adapter import AdapterParam
from jaxllm.model.context import Context
from jaxllm.model.decoder import Decoder, merge
from jaxllm.model.families import from_hf
from jaxllm.peft import METHODS
from jaxllm.peft.files import make_adapter

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
def test_a_model_starts_equal_to_its_base_bit_for_bit(name, dtype):
    plain = Decoder(TINY, rngs=nnx.Rngs(params=1, peft=2), compute_dtype=dtype)
    adapted = decoder(SECTIONS[name], compute_dtype=dtype)
    base = nnx.to_flat_state(nnx.state(adapted, nnx.Param))
    for (path, a), (_, b) in zip(base, nnx.to_flat_state(nnx.state(plain)), strict=True):
        np.testing.assert_array_equal(a.get_value(), b.get_value(), err_msg=str(path))
    rows = ragged_rows(4)
    run = nnx.jit(lambda m: m(rows["tokens"], rows["segment_ids"], rows["positions"]))
    np.testing.assert_array_equal(run(adapted), run(plain))


def test_dora_starts_equal_to_its_base_up_to_rounding():
    rows = ragged_rows(2)["tokens"]
    want = nnx.jit(lambda m: m(rows))(Decoder(TINY, rngs=nnx.Rngs(params=1, peft=2)))
    np.testing.assert_allclose(
        nnx.jit(lambda m: m(rows))(decoder(SECTIONS["dora"])), want, atol=5e-5
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_only_the_adapter_is_trained_and_checkpointed(name):
    """The state, which is what a checkpoint saves, has only the adapter's leaves; each changes."""
    model = decoder(SECTIONS[name])
    _, _, state, (graph, frozen) = trajectory(ragged_rows(8), SECTIONS[name])
    start = nnx.to_pure_dict(nnx.state(model, model.peft.trains))
    end = jax.device_get(state.trainable)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), start, end)
    assert all(jax.tree.leaves(changed)), changed
    count = sum(x.size for x in jax.tree.leaves(start))
    assert model.peft.count(model) == count
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) <= 2 * count + 4  # moments, counts
    merge(graph, state.trainable, frozen)  # together they are the model


@pytest.fixture(scope="module")
def references():
    rows = ragged_rows()
    names = ("lora", "dora", "prompt", "prefix", "adapter", "pissa", "head and table")
    return {n: trajectory(rows, SECTIONS[n])[:2] for n in names}


FORMS = {
    "accumulated": dict(count=4),
    "16 micro-batches": dict(count=16),
    "remat full": dict(remat="full"),
    "remat dots": dict(remat="dots"),
    "unrolled": dict(scan_unroll=4),
    "fsdp 8": dict(devices=8, mesh=MeshSection(fsdp=8)),
    "tensor 4 x fsdp 2": dict(devices=8, mesh=MeshSection(fsdp=2, tensor=4), count=2, remat="full"),
}


DROPOUT = PeftSection(method="lora", r=4, lora_dropout=0.5)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("lora", form) for form in FORMS),
        ("dora", "remat full"),
        pytest.param("dora", "tensor 4 x fsdp 2", marks=pytest.mark.sweep),
    ],
)
def test_accumulation_remat_unrolling_and_meshes_do_not_change_a_trajectory(references, name, form):
    losses, norms, _, _ = trajectory(ragged_rows(), SECTIONS[name], **FORMS[form])
    assert_same_trajectory(losses, references[name][0])
    assert_same_trajectory(norms, references[name][1], rtol=1e-4 if name == "dora" else 2e-5)


@pytest.mark.parametrize(
    "name",
    ["prompt", "prefix", "adapter"]
    + [pytest.param(name, marks=pytest.mark.sweep) for name in ("pissa", "head and table")],
)
def test_a_mesh_with_accumulation_and_remat_does_not_change_the_other_methods(references, name):
    losses, norms, _, _ = trajectory(ragged_rows(), SECTIONS[name], **FORMS["tensor 4 x fsdp 2"])
    assert_same_trajectory(losses, references[name][0])
    assert_same_trajectory(norms, references[name][1], rtol=2e-5)


@pytest.mark.parametrize(
    "name", ["lora", "prompt", pytest.param("prefix", marks=pytest.mark.sweep)]
)
def test_packed_rows_equal_unpacked_ones(references, name):
    """Each text of a packed row has the virtual tokens before it, also in sliding windows."""
    losses, norms, _, _ = trajectory(unpacked(ragged_rows()), SECTIONS[name])
    assert_same_trajectory(losses, references[name][0])
    assert_same_trajectory(norms, references[name][1], rtol=2e-5)


def with_dropout(**options):
    """A model with LoRA dropout in which B is not 0, so that dropout changes the output."""
    model = decoder(PeftSection(method="lora", r=4, **options))
    model.layers.attn.q.lora.b.set_value(jnp.ones_like(model.layers.attn.q.lora.b[...]))
    return model


def row_keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_dropout_differs_by_key_and_is_off_without_one():
    model, plain = with_dropout(lora_dropout=0.5), with_dropout()
    tokens = jnp.asarray(ragged_rows(2)["tokens"])
    run = nnx.jit(lambda m, rng: m.hidden(tokens, rng=rng).x)
    first = run(model, row_keys(2))
    assert not np.allclose(first, run(model, row_keys(2, seed=1)))
    np.testing.assert_array_equal(first, run(model, row_keys(2)))
    hidden = nnx.jit(lambda m: m.hidden(tokens).x)
    np.testing.assert_array_equal(hidden(model), hidden(plain))


def test_dropout_differs_by_row_layer_and_module_and_keeps_the_mean():
    model, x = with_dropout(lora_dropout=0.5), jnp.ones((2, 2000, 32))
    q, k = model.layers.attn.q.lora, model.layers.attn.k.lora
    context = Context(rng=row_keys(2))
    masks = [
        q.dropout_mask(context.at_layer(0).rng, x.shape),
        q.dropout_mask(context.at_layer(1).rng, x.shape),
        k.dropout_mask(context.at_layer(0).rng, x.shape),
    ]
    rows = [row for mask in masks for row in np.asarray(mask)]
    for i, row in enumerate(rows):
        assert abs(row.mean() - 0.5) < 0.01
        assert all(0.45 < np.mean(row == other) < 0.55 for other in rows[:i])
    graph, state = nnx.split(q)
    one_layer = nnx.merge(graph, jax.tree.map(lambda v: jnp.ones_like(v[0]), state))
    h = one_layer.inner(x, context)
    assert abs(float(h.mean()) - 32 * 4) < 1  # 32 inputs, s = 16 / 4


def test_a_rows_dropout_does_not_depend_on_the_other_rows_or_the_mesh():
    model, tokens = with_dropout(lora_dropout=0.5), ragged_rows(16)["tokens"]
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, tokens, rng: nnx.merge(graph, state).hidden(tokens, rng=rng).x)
    rng, order = row_keys(16), np.random.default_rng(0).permutation(16)
    want = np.asarray(run(state, tokens, rng))
    for rows in (order[:4], order[4:5], order):
        got = run(state, tokens[rows], rng[rows])
        np.testing.assert_allclose(got, want[rows], atol=2e-5)
    mesh = make_mesh(MeshSection(fsdp=4, tensor=2), jax.devices())
    by_row = NamedSharding(mesh, P(("fsdp",)))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(state, param_shardings(state, mesh))
        got = run(sharded, jax.device_put(tokens, by_row), jax.device_put(rng, by_row))
    np.testing.assert_allclose(got, want, atol=2e-5)


def param_shardings(state, mesh):
    return jax.tree.map(
        lambda v: v.replace(param_sharding(mesh, axes_of(v), v.get_value().shape)),
        state,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )


@pytest.mark.parametrize("form", ["accumulated", "16 micro-batches", "tensor 4 x fsdp 2"])
def test_micro_batches_and_meshes_do_not_change_dropout(dropout_trajectory, form):
    losses, norms, _, _ = trajectory(ragged_rows(), DROPOUT, **FORMS[form])
    assert_same_trajectory(losses, dropout_trajectory[0])
    assert_same_trajectory(norms, dropout_trajectory[1], rtol=2e-5)


@pytest.fixture(scope="module")
def dropout_trajectory():
    return trajectory(ragged_rows(), DROPOUT)[:2]


def test_gaussian_and_kaiming_initialization():
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
    plan = make_adapter(cfg, section)
    return nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), peft=plan))


def test_parameters_of_qwen2_5_1_5b():
    section = PeftSection(method="lora", r=8, target_modules=("q_proj", "v_proj"))
    model = shapes(QWEN_1_5B, section)
    assert model.peft.count(model) == 1_089_536
    assert (
        sum(v.get_value().size for _, v in nnx.to_flat_state(nnx.state(model, AdapterParam)))
        == 1_089_536
    )
    assert model.peft.summary(model) == ["trainable: 1,089,536 parameters (0.07% of 1,543,714,304)"]
    section = PeftSection(method="lora", r=8, target_modules=("q_proj", "o_proj"))
    model = shapes(QWEN_1_5B, section)
    assert model.peft.summary(model)[0].endswith("= 2·L·d·r = 2 · 56 · 1,536 · 8")
    assert model.peft.count(model) == 2 * 56 * 1536 * 8


def test_columns_beyond_a_layers_rank_are_not_counted():
    section = PeftSection(
        method="lora",
        r=8,
        target_modules=("q_proj",),
        layers_to_transform=(0, 3),
        rank_pattern={"layers.3.self_attn.q_proj": 2},
    )
    model = shapes(QWEN_1_5B, section)
    assert model.peft.count(model) == (8 + 2) * 2 * 1536


def test_a_and_b_are_sharded_like_the_weight_they_adapt():
    mesh = make_mesh(MeshSection(fsdp=2, tensor=4), jax.devices())
    model = shapes(QWEN_1_5B, PeftSection(method="lora", r=8))

    def layout(variable):
        return spec(axes_of(variable), variable.get_value().shape, mesh)

    q, down = model.layers.attn.q.lora, model.layers.mlp.down.lora
    assert layout(q.a) == P(None, ("fsdp",), None) and layout(q.b) == P(None, None, ("tensor",))
    assert layout(down.a) == P(None, ("tensor",), None) and layout(down.b) == P(
        None, None, ("fsdp",)
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(target_modules=("q_prj",)), "q_prj.*matches nothing.*q_proj, k_proj.*all-linear"),
        (dict(target_modules=("q_proj[",)), "neither a module nor a pattern"),
        (dict(exclude_modules=("z",)), "exclude_modules: 'z'"),
        (dict(exclude_modules=(r".*proj",)), "no module is left"),
        (dict(layers_to_transform=(28,)), "no layer 28.*0 to 27"),
        (dict(rank_pattern={"z_proj": 4}), "rank_pattern"),
        (dict(modules_to_save=("score",)), "modules_to_save: 'score'.*embed_tokens"),
        (dict(modules_to_save=("layers.3.input_layernorm",)), "some layers of a stack"),
        (dict(target_modules=("lm_head",)), "the head is the token table"),
        (dict(target_modules=("embed_tokens",), init_lora_weights="pissa"), "pissa"),
    ],
)
def test_a_section_that_does_not_fit_the_model_is_an_error(keys, words):
    with pytest.raises(ValueError, match=words):
        make_adapter(from_hf(QWEN_1_5B), PeftSection(method="lora", **keys))


def test_pissa_of_a_rank_above_the_number_of_singular_values_is_an_error():
    section = PeftSection(method="lora", r=24, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="rank 24, but .*k_proj has 16 singular values"):
        decoder(section)


def test_a_prefix_as_long_as_the_context_is_an_error():
    with pytest.raises(ValueError, match="num_virtual_tokens 64 leaves nothing"):
        make_adapter(TINY, PeftSection(method="prefix", num_virtual_tokens=64))
    model = decoder(SECTIONS["prefix"])
    assert "3 virtual tokens leave each text 61 of 64 positions" in model.peft.summary(model)


@pytest.mark.parametrize("name", ["prefix", "prompt", "adapter", "lora"])
def test_generation_with_a_cache_equals_the_full_forward_pass(name):
    from jaxllm.sampling import Sampling, generate

    model = decoder(SECTIONS[name])
    noise = iter(jax.random.split(jax.random.key(3), 100))
    for _, v in nnx.to_flat_state(nnx.state(model, model.peft.trains)):
        v.set_value(v.get_value() + 0.3 * jax.random.normal(next(noise), v.get_value().shape))
    graph, state = nnx.split(model)
    prompts = [
        [3, 4, 5, 6, 7, 8, 9, 10],
        [11, 12],
    ]  # the second is padded; sliding windows of 9 end
    generated = generate(model, prompts, Sampling(max_new_tokens=8))
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    for prompt, new in zip(prompts, generated, strict=True):
        tokens = np.asarray(prompt + new)[None]
        want = np.asarray(forward(state, tokens)).argmax(-1)[0, len(prompt) - 1 : -1]
        np.testing.assert_array_equal(new, want)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_virtual_tokens_before_a_row_of_several_attention_blocks(name):
    """128 tokens are four blocks of queries, 130 one; later tokens change nothing."""
    model = decoder(SECTIONS[name])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (1, 130)))
    run = nnx.jit(lambda m, x: m(x))
    np.testing.assert_allclose(run(model, tokens[:, :128]), run(model, tokens)[:, :128], atol=1e-5)


def test_every_method_of_the_config_has_a_class():
    from typing import get_args, get_type_hints

    names = set(get_args(get_type_hints(PeftSection)["method"]))
    assert names == {"none", *METHODS}
