# SPDX-License-Identifier: Apache-2.0
"""Splash attention, interpreted on a CPU, equals attention in blocks.

Tests with the mark tpu compile it for chips that are not attached.
"""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as infos
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.errors import UserError
from jaxllm.mesh import AXES, MeshSection, make_mesh
from jaxllm.model.stack import REMAT
from jaxllm.ops import attention, attention_blocks, attention_tpu
from jaxllm.ops.attention_mask import first_visible
from jaxllm.topologies import topology

LENGTHS = [[100, 30, 129], [140, 160]]  # of texts; the rest of a row is padding
T = 300


def packed(rows=2, length=T):
    """Segment ids, int32 [rows, length]."""
    out = np.zeros((rows, length), np.int32)
    for i, row in enumerate(out):
        ids = np.repeat(np.arange(len(LENGTHS[i % 2])) + 1, LENGTHS[i % 2])[:length]
        row[: len(ids)] = ids
    return jnp.asarray(out)


def arrays(rows, length, H, N, K, V):
    """q, k, v and a gradient of the result."""
    shapes = (length, H, K), (N, length, K), (N, length, V), (length, H, V)
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (rows, *s)) for key, s in zip(keys, shapes, strict=True)]


def with_gradients(run, segments, q, k, v, g, window=None):
    """(result, gradients of q, k and v), of which padding has no part; a compiled function."""

    def text(q, k, v):
        return jnp.where(segments[..., None, None] > 0, run(q, k, v, segments, window), 0.0)

    out, back = jax.vjp(text, q, k, v)
    return out, *back(g)


def assert_close(got, want):
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_tpu, "DEFAULT_BLOCKS", (128, 128))


@pytest.mark.parametrize(
    ("heads", "dims", "window", "softcap", "traced", "chunked"),
    [
        ((4, 2), (64, 64), None, 0.0, False, False),
        ((2, 1), (80, 80), 40, 2.0, False, False),
        ((2, 2), (96, 96), 150, 0.0, True, False),
        ((2, 2), (128, 32), 2**31 - 1, 0.0, True, False),  # a layer that sees all keys
        ((1, 1), (256, 256), None, 5.0, False, False),
        ((2, 1), (64, 64), 50, 0.0, True, True),
    ],
)
def test_splash_equals_blocks(small_blocks, heads, dims, window, softcap, traced, chunked):
    """Packed rows with padding, of a length that is no multiple of a block."""
    options = {"scale": dims[0] ** -0.5, "softcap": softcap, "chunked": chunked}

    def kernel(q, k, v, segments, window):
        options_ = options | {"window": window, "interpret": True}
        return attention_tpu.run(q, k, v, segments, segments, 0, **options_)

    def blocks(q, k, v, segments, window):
        positions = jnp.arange(T) - first_visible(segments, None)
        inputs = q, k, v, segments, segments, positions
        return attention_blocks.attend(*inputs, size=T, offset=0, window=window, **options)

    inputs = (packed(), *arrays(2, T, *heads, *dims))
    window = jnp.int32(window) if traced else window
    static = () if traced else ("window",)
    got, want = (
        jax.jit(partial(with_gradients, run), static_argnames=static)(*inputs, window=window)
        for run in (kernel, blocks)
    )
    assert_close(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("traced", [False, True])
def test_splash_has_sinks(small_blocks, traced, dtype):
    """In packed rows, with gradients: those of the sinks are float32."""
    segments, sinks = packed(), jnp.array([-2.0, 0.5, 1.0, 4.0])
    q, k, v, g = (x.astype(dtype) for x in arrays(2, T, 4, 2, 64, 64))
    options: dict = {"scale": 0.125, "softcap": 0.0}

    def kernel(q, k, v, sinks, window):
        keys = options | {"window": window, "sinks": sinks, "interpret": True}
        return attention_tpu.run(q, k, v, segments, segments, 0, **keys)

    def blocks(q, k, v, sinks, window):
        keys = options | {"window": window, "sinks": sinks, "size": T, "offset": 0}
        return attention_blocks.attend(q, k, v, segments, segments, segments, **keys)

    def both(run, window):
        def text(*inputs):
            return jnp.where(segments[..., None, None] > 0, run(*inputs, window), 0.0)

        out, back = jax.vjp(text, q, k, v, sinks)
        return out, *back(g)

    window = jnp.int32(40) if traced else 40
    got, want = (both(run, window) for run in (kernel, blocks))
    atol = 1e-5 if dtype == jnp.float32 else 0.05
    assert got[-1].dtype == jnp.float32
    for ours, theirs in zip(got, want, strict=True):
        near = dict(atol=atol, rtol=atol)
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), **near)


def test_padding_gives_no_nan(small_blocks):
    """Results are finite in blocks of padding alone, and so are gradients of all results."""
    q, k, v, g = arrays(1, T, 1, 1, 64, 64)
    segments = packed(1).at[:, 100:].set(0)

    @jax.jit
    def run(q, k, v):
        options = {"scale": 1.0, "window": 3, "softcap": 0.0, "interpret": True}
        return attention_tpu.run(q, k, v, segments, segments, 0, **options)

    out, back = jax.vjp(run, q, k, v)
    assert all(np.isfinite(x).all() for x in (out, *back(g)))


@pytest.mark.parametrize("window", [None, 200])
def test_the_table_of_blocks_is_that_of_the_static_mask(window):
    """Of one text: the same pairs are visited, and the same blocks are loaded before them."""
    length, size = 640, 128
    ones, indices = jnp.ones((5, 1, size), jnp.int32), jnp.arange(length).reshape(5, size)
    ranges = indices[:, 0], indices[:, -1]
    seen = attention_tpu.visible_blocks(ones, ones, ranges, ranges, window)
    shape, reach = (length, length), None if window is None else window - 1
    mask = masks.CausalMask(shape) if reach is None else masks.LocalMask(shape, (reach, 0), 0)
    for by_keys, process in ((False, infos.process_mask), (True, infos.process_mask_dkv)):
        want, _ = process(masks.MultiHeadMask([mask]), (size, size), shrink_grid=False)
        got = attention_tpu._mask_info(seen, indices.ravel(), by_keys)
        np.testing.assert_array_equal(got.block_mask > 0, want.block_mask > 0)
        np.testing.assert_array_equal(got.data_next, want.data_next)


def test_pairs_of_blocks_of_other_texts_are_not_visited(small_blocks):
    """Keys of a block that no query of another text may see are not read: NaN there is harmless."""
    q, k, v, _ = arrays(1, 384, 1, 1, 64, 64)
    segments = jnp.repeat(jnp.arange(1, 4), 128)[None]
    options = {"scale": 1.0, "window": None, "softcap": 0.0, "interpret": True}
    v = v.at[:, :, :128].set(jnp.nan)  # a masked probability of 0 times NaN is NaN
    out = attention_tpu.run(q, k, v, segments, segments, 0, **options)
    assert np.isnan(out[:, :128]).all() and np.isfinite(out[:, 128:]).all()


@pytest.mark.parametrize(("remat", "forward"), [("names", 1), ("full", 2)])
def test_a_saved_result_is_not_computed_again(remat, forward):
    """Kernels of a scan over layers and of its gradient, lowered for a TPU."""
    q, k, v, _ = arrays(1, 128, 1, 1, 64, 64)
    ones = jnp.ones((1, 128), jnp.int32)
    options = {"scale": 1.0, "window": None, "softcap": 0.0}

    @partial(jax.checkpoint, policy=REMAT[remat], prevent_cse=False)
    def layer(q, _):
        return q * attention_tpu.run(jnp.sin(q), k, v, ones, ones, 0, **options), None

    gradient = jax.jit(jax.grad(lambda q: jnp.sum(jax.lax.scan(layer, q, length=3)[0])))
    text = gradient.trace(q).lower(lowering_platforms=("tpu",)).as_text()
    kernels = Counter(re.findall(r'kernel_name = "splash_mha_(fwd|dq|dkv)', text))
    assert kernels == {"fwd": forward, "dq": 1, "dkv": 1}


def test_auto_is_splash_on_a_tpu():
    device = AbstractDevice(device_kind="TPU v5", num_cores=None, platform="tpu")
    types, facts = (AxisType.Auto,) * 5, {"dtype": "bfloat16", "softcap": 30.0}
    mesh = AbstractMesh((1,) * 5, AXES, axis_types=types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        choose = partial(attention.choose, **facts)
        assert choose("auto") == choose("splash") == ("splash", "")
        assert choose("auto", prefix=True) == ("xla", "keys of a prefix precede each text")
        with pytest.raises(UserError, match="splash cannot run: .* or float32, not float16"):
            attention.choose("splash", dtype="float16", softcap=0.0)
        with pytest.raises(UserError, match="rows are longer than 65536 tokens"):
            choose("splash", length=2**17, mixed_windows=True)
        assert choose("splash", length=2**17) == ("splash", "")
        with pytest.raises(UserError, match="needs an NVIDIA GPU, and this program is for a TPU"):
            choose("triton")
    with pytest.raises(UserError, match="splash cannot run: it needs a TPU"):
        attention.choose("splash", **facts)


@pytest.mark.parametrize("chunked", [False, True])
def test_splash_over_a_mesh(small_blocks, monkeypatch, chunked):
    """Rows split along context, inside a shard_map that is manual along fsdp."""
    inputs = (packed(4, 512), *arrays(4, 512, 2, 2, 64, 64))
    window, rows = jnp.int32(90), P(("data", "fsdp"))

    def run(q, k, v, segments, window):
        options = {"scale": 0.125, "window": window, "chunked": chunked}
        positions = jnp.arange(512) - first_visible(segments, None)
        return attention.attention(q, k, v, segments, None, positions, **options)

    compute = partial(with_gradients, run)
    want = jax.jit(compute)(*inputs, window)
    kernel = partial(attention_tpu.run, interpret=True)
    monkeypatch.setattr(attention_tpu, "run", kernel)
    monkeypatch.setattr(attention, "choose", lambda *_, **__: ("splash", ""))
    mesh = make_mesh(MeshSection(data=1, fsdp=2, context=2, tensor=2), jax.devices())
    specs, axes = (*[rows] * 5, P()), frozenset(("data", "fsdp", "expert"))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            compute, in_specs=specs, out_specs=rows, axis_names=axes, check_vma=False
        )
        assert_close(jax.jit(mapped)(*inputs, window), want)


def tpu_mesh(where, **sizes):
    """A mesh of chips that are not attached."""
    pytest.importorskip("libtpu")
    return make_mesh(MeshSection(**{"fsdp": 1} | sizes), list(topology(where).devices))


def compiled(mesh, K, window=None, softcap=0.0, length=2048, dtype=jnp.bfloat16):
    """The compiled program of attention and its gradient; window may be "traced"."""

    def loss(q, k, v, segments, index):
        seen = jnp.asarray([1024, 2**31 - 1])[index] if window == "traced" else window
        options = {"scale": K**-0.5, "window": seen, "softcap": softcap, "kernel": "splash"}
        out = attention.attention(q, k, v, segments, None, segments, **options)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    rows = ("data", "fsdp")
    shapes = {
        (4, length, 8, K): P(rows, "context", "tensor"),
        (4, 2, length, K): P(rows, "tensor", "context"),
        (4, length): P(rows, "context"),
    }
    q, k, segments = (
        jax.ShapeDtypeStruct(
            shape, dtype if len(shape) == 4 else jnp.int32, sharding=NamedSharding(mesh, spec)
        )
        for shape, spec in shapes.items()
    )
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, (0, 1, 2)))
        return program.lower(q, k, k, segments, jax.ShapeDtypeStruct((), jnp.int32)).compile()


@pytest.mark.tpu
@pytest.mark.parametrize("where", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_splash_compiles_for_tpus(where):
    mesh = tpu_mesh(where, fsdp=4)
    kinds = [{"K": 128, "window": "traced", "softcap": 50.0}]
    if where == "v5p:2x2x1":
        kinds += [{"K": K} for K in (64, 80, 256)]
        kinds += [{"K": 256, "window": 1024, "dtype": jnp.float32}, {"K": 128, "length": 1000}]
    for kind in kinds:
        assert compiled(mesh, **kind).memory_analysis().temp_size_in_bytes < 2**26, kind


@pytest.mark.tpu
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"context": 2, "tensor": 2}])
def test_splash_compiles_over_a_mesh_of_tpus(sizes):
    mesh = tpu_mesh("v5p:2x2x1", **sizes)
    assert compiled(mesh, 128, window="traced").memory_analysis().temp_size_in_bytes < 2**26
