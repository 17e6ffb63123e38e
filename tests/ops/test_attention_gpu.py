# SPDX-License-Identifier: Apache-2.0
"""The choice of a fused attention kernel, its mask and its shards.

The kernels themselves run on a GPU only; benchmarks/gpu.py compares their results with XLA's.
"""

import tomllib
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice

from jaxllm.errors import UserError
from jaxllm.mesh import MeshSection, make_mesh
from jaxllm.ops import attention, attention_gpu
from jaxllm.ops.attention_mask import first_visible, in_chunks, visible

SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 7 + [0] * 3, [4] * 16, [1, 2, 3, 4] * 4], np.int32)
FACTS = {"dtype": jnp.bfloat16, "softcap": 0.0, "head_dims": (8, 8)}
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
A100 = SimpleNamespace(platform="gpu", compute_capability="8.0")


def on_gpu(monkeypatch, device=H100, version=attention_gpu.TOKAMAX_VERSIONS[-1]):
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    monkeypatch.setattr(attention_gpu.jax, "devices", lambda: [device])
    monkeypatch.setattr(attention_gpu.metadata, "version", lambda name: version)


def test_a_token_sees_keys_from_the_start_of_its_segment():
    np.testing.assert_array_equal(
        first_visible(jnp.asarray(SEGMENTS[:2]), None),
        [[0] * 5 + [5] + [6] * 7 + [13] * 3, [0] * 16],
    )


@pytest.mark.parametrize("window", [None, 3])
def test_first_visible_key_and_causality_equal_the_mask(window):
    segments = jnp.asarray(SEGMENTS[:2])
    indices = jnp.arange(segments.shape[1])
    first = first_visible(segments, window)
    got = (indices >= first[:, :, None]) & (indices <= indices[:, None])
    want = visible(segments, segments, jnp.zeros_like(segments), indices, indices, window)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("chunk", [1, 3, 2**31 - 1])
def test_a_chunk_of_a_text_is_a_segment_of_its_own(chunk):
    segments = jnp.asarray(SEGMENTS)
    indices = jnp.arange(segments.shape[1])
    positions = indices - first_visible(segments, None)
    want = visible(segments, segments, positions, indices, indices, chunk, True)
    chunks = in_chunks(segments, chunk)
    got = visible(chunks, chunks, positions, indices, indices, None)
    real = (segments > 0)[:, :, None]
    np.testing.assert_array_equal(got & real, want & real)
    assert ((chunks == 0) == (segments == 0)).all() and (np.diff(chunks[1:]) >= 0).all()


def test_the_kernel_of_chunks_sees_them_as_segments(monkeypatch):
    """tokamax is not installed here, so its mask is looked at."""
    masks, segments = [], jnp.asarray(SEGMENTS[:2])

    def kernel(q, k, v, *, mask, **_):
        masks.append(mask.k_start[:, 0])
        return q

    api = SimpleNamespace(IMPLEMENTATIONS={"mosaic_gpu": kernel})
    modules = {"api": api, "base": SimpleNamespace(Mask=lambda **given: SimpleNamespace(**given))}
    named = lambda name: modules[name.rpartition(".")[2]]  # noqa: E731
    monkeypatch.setattr(attention_gpu, "import_module", named)
    q = jnp.ones((2, 16, 1, 8))
    options = dict(scale=1.0, softcap=0.0, window=jnp.int32(3), chunked=True)
    attention_gpu.run("mosaic", q, q.swapaxes(1, 2), q.swapaxes(1, 2), segments, **options)
    starts = [0, 0, 0, 3, 3, 5, 6, 6, 6, 9, 9, 9, 12]
    np.testing.assert_array_equal(masks[0][0, :13], starts)
    np.testing.assert_array_equal(masks[0][1], np.arange(16) // 3 * 3)


def test_auto_is_mosaic_on_hopper_and_xla_elsewhere(monkeypatch):
    assert attention.choose("auto", **FACTS)[0] == "xla"  # on this CPU
    on_gpu(monkeypatch)
    assert attention.choose("auto", **FACTS) == ("mosaic", "")
    assert attention.choose("xla", **FACTS) == ("xla", "")
    assert attention.choose("triton", **FACTS) == ("triton", "")
    on_gpu(monkeypatch, A100)
    assert attention.choose("auto", **FACTS) == (
        "xla",
        "mosaic is the fastest kernel on Hopper only",
    )


@pytest.mark.parametrize(
    ("kernel", "facts", "machine", "reason"),
    [
        ("mosaic", {"dtype": jnp.float32}, {}, "model.compute_dtype bfloat16, not float32"),
        ("triton", {"softcap": 30.0}, {}, "no soft cap"),
        ("mosaic", {"head_dims": (8, 4)}, {}, "head_dim is 8 for queries and 4 for values"),
        ("mosaic", {"prefix": True}, {}, "keys of a prefix precede each text"),
        ("mosaic", {"sinks": True}, {}, "it has no attention sinks, and this model has them"),
        ("triton", {"sinks": True}, {}, "it has no attention sinks, and this model has them"),
        ("mosaic", {}, {"context": 2}, "mesh.context splits the rows"),
        ("mosaic", {}, {"version": "0.0.1"}, "tokamax 0.0.1 is not one of the tested versions"),
        ("mosaic", {}, {"device": SimpleNamespace(platform="cpu")}, "that is no GPU"),
    ],
)
def test_a_kernel_that_cannot_run_is_an_error(monkeypatch, kernel, facts, machine, reason):
    shards = machine.pop("context", 1)
    mesh = make_mesh(MeshSection(context=shards), jax.devices()[:shards])
    on_gpu(monkeypatch, **machine)
    with jax.set_mesh(mesh):
        with pytest.raises(UserError, match=reason):
            attention.choose(kernel, **FACTS | facts)
        if kernel == "mosaic":  # auto uses XLA, and says why
            name, why = attention.choose("auto", **FACTS | facts)
            assert name == "xla" and reason in why


def test_a_kernel_is_refused_without_a_gpu_and_without_tokamax(monkeypatch):
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    k, ones = q.swapaxes(1, 2), jnp.ones((1, 4), jnp.int32)
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and this program is for a CPU"):
        attention.attention(q, k, k, ones, None, ones, scale=1.0, kernel="triton")

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    on_gpu(monkeypatch)
    monkeypatch.setattr(attention_gpu.metadata, "version", missing)
    with pytest.raises(UserError, match="tokamax is not installed"):
        attention.choose("mosaic", **FACTS)


def test_the_kernel_is_printed_at_the_start(monkeypatch):
    mesh = make_mesh(MeshSection(), jax.devices()[:1])
    facts = {"dtype": "bfloat16", "softcap": 0.0}
    assert attention.notes(mesh, "auto", **facts) == []
    with pytest.raises(UserError, match="mosaic cannot run"):
        attention.notes(mesh, "mosaic", **facts)
    on_gpu(monkeypatch)
    assert attention.notes(mesh, "auto", **facts) == ["attention: mosaic"]
    assert attention.notes(mesh, "auto", dtype="float32", softcap=0.0) == [
        "attention: xla (it needs model.compute_dtype bfloat16, not float32)"
    ]


@pytest.mark.parametrize("dtype, fused", [("bfloat16", True), ("float32", False)])
def test_the_kernel_serves_bfloat16_rows_that_attend_to_themselves(monkeypatch, dtype, fused):
    segments, calls = jnp.asarray(SEGMENTS), []
    q = jnp.full((*segments.shape, 4, 8), 1.5, dtype)
    k = v = jnp.ones((len(segments), 2, segments.shape[1], 8), dtype)

    def run(kernel, q, k, v, segments, **options):
        calls.append((kernel, q.shape, k.shape, v.shape))
        assert options["scale"] == 144**-0.5 and (q == 1.5).all()  # the kernel scales, in float32
        return q

    on_gpu(monkeypatch)
    monkeypatch.setattr(attention_gpu, "run", run)
    attention.attention(q, k, v, segments, None, segments, scale=144**-0.5)
    heads = (3, 16, 4, 8), (3, 2, 16, 8), (3, 2, 16, 8)
    assert calls == ([("mosaic", *heads)] if fused else [])
    attention.attention(q, k, v, segments, segments, segments, scale=144**-0.5)  # keys of a cache
    assert len(calls) == fused


def stand_in(kernel, q, k, v, segments, *, scale, window, softcap, chunked):
    """A kernel of jnp operations: a softmax over all keys, in float32."""
    assert not chunked
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[1], 1) for x in (k, v))
    scores = scale * jnp.einsum("bthk,bhsk->bhts", q, k)
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    indices = jnp.arange(q.shape[1])
    mask = visible(segments, segments, jnp.zeros_like(segments), indices, indices, window)
    probs = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), -1)
    return jnp.einsum("bhts,bhsv->bthv", probs, v)


@pytest.mark.parametrize(
    ("sizes", "rows", "heads", "shard"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (4, 2), (2, 2, 1)),
        ({"data": 4, "fsdp": 2}, 8, (4, 2), (1, 4, 2)),
        ({"data": 2, "tensor": 4}, 4, (8, 2), (2, 2, 1)),  # two devices share a key/value head
        ({"fsdp": 4, "tensor": 2}, 4, (3, 3), (1, 3, 3)),  # 3 heads do not divide by 2
        ({"fsdp": 4, "tensor": 2}, 3, (4, 2), (3, 2, 1)),  # 3 rows do not divide by 4
        ({"expert": 4, "tensor": 2}, 2, (4, 2), (2, 2, 1)),
    ],
)
def test_a_kernel_runs_on_each_devices_rows_and_heads(monkeypatch, sizes, rows, heads, shard):
    (H, N), T, K = heads, 16, 8
    segments = jnp.asarray(np.resize(SEGMENTS[:2], (rows, T)))
    keys = jax.random.split(jax.random.key(0), 4)
    q, g = (jax.random.normal(key, (rows, T, H, K)) for key in keys[:2])
    k, v = (jax.random.normal(key, (rows, N, T, K)) for key in keys[2:])
    seen = set()

    def run(kernel, q, k, v, segments, **options):
        seen.add((q.shape[0], q.shape[2], k.shape[1]))
        return stand_in(kernel, q, k, v, segments, **options)

    def both(kernel):
        def result(q, k, v, g):
            def attend(q, k, v):
                return attention.attention(
                    q, k, v, segments, None, segments, scale=0.5, window=5, kernel=kernel
                )

            out, back = jax.vjp(attend, q, k, v)
            return out, *back(g)

        return jax.jit(result)(q, k, v, g)

    want = both("xla")
    monkeypatch.setattr(attention_gpu, "run", run)
    monkeypatch.setattr(attention, "choose", lambda kernel, **_: (kernel, ""))
    mesh = make_mesh(MeshSection(**{"data": 1, "fsdp": 1} | sizes), jax.devices())
    with jax.set_mesh(mesh):
        got = both("mosaic")
    assert seen == {shard}
    real = (segments > 0)[..., None, None]
    np.testing.assert_allclose(jnp.where(real, got[0], 0), jnp.where(real, want[0], 0), atol=2e-6)
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_mesh_and_not_this_machine_decides(monkeypatch):
    mesh = make_mesh(MeshSection(), jax.devices()[:1]).abstract_mesh
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        assert "tokamax asks the attached device" in attention.choose("auto", **FACTS)[1]
        with pytest.raises(UserError, match="that is no GPU"):
            attention.choose("mosaic", **FACTS)


def test_private_modules_of_tokamax_are_used_in_tested_versions_only():
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    pinned = [x for x in pyproject["project"]["optional-dependencies"]["cuda"] if "tokamax" in x]
    assert pinned == [f"tokamax=={attention_gpu.TOKAMAX_VERSIONS[-1]}"]
    if find_spec("tokamax") is None:
        pytest.skip("tokamax is not installed")
    assert metadata.version("tokamax") in attention_gpu.TOKAMAX_VERSIONS
    api = import_module("tokamax._src.ops.attention.api")
    assert set(attention_gpu.IMPLEMENTATIONS.values()) <= set(api.IMPLEMENTATIONS)
    base = import_module("tokamax._src.ops.attention.base")
    base.Mask(k_start=jnp.zeros((1, 1, 4), jnp.int32), is_causal=True)
