# SPDX-License-Identifier: Apache-2.0
"""A program built on a CPU for another platform has the forms of that platform."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxllm.data.batch import Batch
from jaxllm.mesh import AXES, MeshSection, make_mesh, platform
from jaxllm.model.config import LayerKind, ModelConfig, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.lm import lm_loss
from jaxllm.ops import matmul
from jaxllm.ops.attention_blocks import block_size
from jaxllm.ops.cross_entropy import default_chunk
from jaxllm.ops.decoding import argmax, cache_dtype, kernel_for_decoding, prefers_unstacked
from jaxllm.ops.matmul import FEW, ByOutputs, dot
from jaxllm.ops.quantized import dense
from jaxllm.sampling import Sampling, decode, prefill

CFG = ModelConfig(
    "llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=2048,
    ropes=(Rope(),),
    kinds=(LayerKind(0),),
)
ROWS, LENGTH = 4, 1024
KINDS = {"cpu": "cpu", "gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite"}
ONE, EIGHT = (1, 1, 1, 1, 1), (2, 2, 1, 1, 2)


def mesh_of(name, sizes=ONE):
    """A mesh of devices that are not attached."""
    device = AbstractDevice(device_kind=KINDS[name], num_cores=None, platform=name)
    types = (AxisType.Auto,) * len(AXES)
    return AbstractMesh(sizes, AXES, axis_types=types, abstract_device=device)


def gradient(params, graph, batch):
    def loss(params):
        return lm_loss(nnx.merge(graph, params), batch, None)[0]

    return jax.grad(loss)(params)


def traced(name, sizes):
    """The traced gradient of a decoder's loss, for a mesh of that platform."""
    with jax.sharding.use_abstract_mesh(mesh_of(name, sizes)):
        options = {"compute_dtype": "bfloat16", "remat": "names"}
        graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(CFG, rngs=nnx.Rngs(0), **options)))
        ints, floats = (jax.ShapeDtypeStruct((ROWS, LENGTH), d) for d in (jnp.int32, jnp.float32))
        fields = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ints)
        batch = Batch(**fields, weights=floats)
        return jax.jit(gradient, static_argnums=1).trace(params, graph, batch)


def equations(jaxpr):
    """Equations of a jaxpr and all jaxprs inside it, each with the jaxpr it is in."""
    for eqn in jaxpr.eqns:
        yield eqn, jaxpr
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(getattr(inner, "jaxpr", inner))


def forms(name, sizes):
    """What a program holds of each form, and the sizes of its blocks of tokens."""
    found = traced(name, sizes)
    target = "cuda" if name == "gpu" else name
    text = found.lower(lowering_platforms=(target,)).as_text()
    rounded = 0  # bfloat16 products that are float32 first
    for eqn, jaxpr in equations(found.jaxpr.jaxpr):
        if eqn.primitive.name == "dot_general" and eqn.invars[0].aval.dtype == jnp.bfloat16:
            uses = [e for e in jaxpr.eqns if eqn.outvars[0] in e.invars]
            rounded += any(e.params.get("new_dtype") == jnp.bfloat16 for e in uses)
    return {
        "pinned layouts": text.count("LayoutConstraint"),
        "residuals as bits": text.count("xui16>"),
        "rounded products": rounded,
        "bfloat16 products": len(re.findall(r"dot_general.*-> tensor<[\dx]*xbf16>", text)),
        "blocks": {size for size in (128, 512) if re.search(rf"x{size}x8x(bf16|f32)", text)},
        "splash": "splash_mha_fwd" in text,
    }


@pytest.mark.parametrize("sizes", [ONE, EIGHT])
@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_a_program_for_an_accelerator_has_no_form_of_a_cpu(name, sizes):
    found = forms(name, sizes)
    assert found.pop("bfloat16 products") > 0
    blocks = found.pop("blocks")
    assert name == "tpu" or blocks == {512}
    assert found == {
        "pinned layouts": 0,
        "residuals as bits": 0,
        "rounded products": 0,
        "splash": name == "tpu",
    }


@pytest.fixture
def bfloat16(monkeypatch):
    """Sets whether the CPU has bfloat16 products; functions are traced again."""

    def set_to(value):
        monkeypatch.setattr(matmul, "has_bfloat16", lambda: value)
        jax.clear_caches()

    yield set_to
    jax.clear_caches()


def test_a_program_for_a_cpu_has_the_forms_of_a_cpu(bfloat16):
    bfloat16(True)
    found = forms("cpu", ONE)
    assert found.pop("bfloat16 products") == 0 and found.pop("blocks") == {128}
    assert not found.pop("splash")
    assert all(count > 0 for count in found.values()), found
    assert forms("cpu", EIGHT)["pinned layouts"] == 0  # a pinned layout cannot be sharded


def test_a_cpu_without_bfloat16_products_multiplies_in_float32(bfloat16):
    bfloat16(False)
    found = [eqn for eqn, _ in equations(traced("cpu", ONE).jaxpr.jaxpr)]
    products = [eqn for eqn in found if eqn.primitive.name == "dot_general"]
    operands = {operand.aval.dtype for eqn in products for operand in eqn.invars}
    assert operands == {jnp.dtype("float32")}
    assert forms("cpu", ONE)["pinned layouts"] == 0
    x, w = (jax.random.normal(jax.random.key(i), (64, 64), jnp.bfloat16) for i in (0, 1))
    widened = matmul.product(x, w, (1, 0), jnp.float32)
    bfloat16(True)
    kept = matmul.product(x, w, (1, 0), jnp.float32)
    np.testing.assert_allclose(widened, kept, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [ONE, EIGHT, (1, 2, 1, 2, 1)])
def test_prompts_are_read_by_the_kernel_of_the_platform_and_tokens_are_not(sizes):
    with jax.sharding.use_abstract_mesh(mesh_of("tpu", sizes)):
        graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(CFG, rngs=nnx.Rngs(0))))
        tokens = jax.ShapeDtypeStruct((ROWS, 64), jnp.int32)
        key, stop = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(8)))
        found = prefill.trace(graph, params, tokens, tokens, key, 8, Sampling())
        state = jax.eval_shape(prefill, graph, params, tokens, tokens, key, 8, Sampling())
        step = decode.trace(graph, params, state, key, stop, Sampling())
        texts = [one.lower(lowering_platforms=("tpu",)).as_text() for one in (found, step)]
    assert ["splash_mha_fwd" in text for text in texts] == [True, False]


def test_one_function_is_traced_for_each_platform():
    seen = []

    @jax.jit
    def f(x):
        seen.append((platform(), block_size(4096), default_chunk(), cache_dtype(jnp.bfloat16)))
        return x

    with jax.set_mesh(make_mesh(MeshSection(), jax.devices()[:1])):
        f(jnp.ones(2))
    f(jnp.ones(2))
    assert {x[0] for x in seen} == {"cpu"}
    for name in ("gpu", "tpu", "gpu"):
        with jax.sharding.use_abstract_mesh(mesh_of(name)):
            f.trace(jnp.ones(2))
    cpu, other = (128, 512, jnp.float32), (512, 4096, jnp.bfloat16)
    assert {x[0]: x[1:] for x in seen} == {"cpu": cpu, "gpu": other, "tpu": other}


@pytest.mark.parametrize("rows", [(3, 2), (FEW + 1,)])
def test_a_kernel_stored_by_outputs_gives_the_same_product(rows):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((*rows, 24), (24, 40)))
    turned = kernel_for_decoding(w)
    assert isinstance(turned, ByOutputs) and turned.shape == w.shape
    np.testing.assert_array_equal(dense(turned, jnp.float32), w)
    np.testing.assert_allclose(dot(x, turned), x @ w, rtol=0, atol=1e-5)
    first = [
        e.invars[0].aval.shape
        for e, _ in equations(jax.make_jaxpr(dot)(x, turned).jaxpr)
        if e.primitive.name == "dot_general"
    ]
    assert first == [(40, 24) if math.prod(rows) <= FEW else x.shape]
    with jax.sharding.use_abstract_mesh(mesh_of("tpu")):
        assert jax.eval_shape(kernel_for_decoding, w).shape == w.shape


def test_decoding_forms_differ_and_results_do_not():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, (64, 9)), jnp.float32)
    want = np.argmax(x, -1)
    assert prefers_unstacked()
    np.testing.assert_array_equal(argmax(x), want)
    with jax.sharding.use_abstract_mesh(mesh_of("tpu")):
        assert not prefers_unstacked()
        primitives = {e.primitive.name for e, _ in equations(jax.make_jaxpr(argmax)(x).jaxpr)}
    assert "argmax" in primitives
