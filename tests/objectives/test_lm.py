# SPDX-License-Identifier: Apache-2.0
"""The chunked loss equals the plain one, and a run equals torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import VERBS
from jaxllm.ops.cross_entropy import Head, cross_entropy

B, T, D, V = 2, 37, 16, 103


@pytest.fixture(scope="module")
def case():
    k = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(k[0], (B, T, D)),
        jax.random.normal(k[1], (D, V)),
        jax.random.randint(k[2], (B, T), 0, V),
        jax.random.uniform(k[3], (B, T)) * (jax.random.uniform(k[3], (B, T)) > 0.5),
    )


def plain(h, w, targets, weights, softcap, z_loss):
    logits = h @ w
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    lse = jax.nn.logsumexp(logits, -1)
    nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    probs = jax.nn.softmax(logits, -1)
    entropy = -jnp.sum(probs * jnp.log(probs + 1e-30), -1)
    hit = jnp.argmax(logits, -1) == targets
    return jnp.stack([jnp.sum(x * weights) for x in (nll + z_loss * lse**2, nll, hit, entropy)])


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk", [1, 20, 10_000])
def test_chunked_loss_and_gradients_equal_the_plain_ones(case, softcap, z_loss, chunk):
    h, w, targets, weights = case

    def ours(h, w):
        return cross_entropy([(h, w)], targets, weights, Head(softcap, z_loss, chunk))

    want = plain(h, w, targets, weights, softcap, z_loss)
    np.testing.assert_allclose(ours(h, w), want, rtol=1e-5)
    a = jax.grad(lambda *x: 3 * ours(*x)[0], (0, 1))(h, w)
    b = jax.grad(lambda *x: 3 * plain(*x, targets, weights, softcap, z_loss)[0], (0, 1))(h, w)
    for got, ref in zip(a, b, strict=True):
        np.testing.assert_allclose(got, ref, atol=1e-5 * float(jnp.abs(ref).max()))


def test_chunks_that_nobody_learns_from_cost_nothing_and_change_nothing(case):
    """NaN where no weight is: it is not even looked at, but for what fills the last chunk."""
    h, w, targets, _ = case
    weights = jnp.zeros((B, T)).at[0, 30:36].set(1.0).at[1, 3:7].set(2.0)
    unseen = jnp.where(weights[..., None] > 0, h, jnp.nan)

    def loss(h, w):
        return cross_entropy([(h, w)], targets, weights, Head(chunk=4))[0]

    got = jax.value_and_grad(loss, (0, 1))(unseen.at[1, :2].set(0.0), w)
    want = jax.value_and_grad(lambda *x: plain(*x, targets, weights, 0.0, 0.0)[0], (0, 1))(h, w)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [20, 10_000])
def test_a_tied_table_in_bfloat16_learns_whatever_the_number_of_chunks(case, chunk):
    """With one chunk XLA once built a product that its CPU backend has no bfloat16 kernel for."""
    h, w, targets, weights = case

    def ours(table, dtype):
        x = h.astype(dtype)
        return cross_entropy([(x, table.T)], targets, weights, Head(chunk=chunk))[0]

    gradient = jax.jit(jax.grad(ours), static_argnums=1)
    got, want = gradient(w.T, jnp.bfloat16), gradient(w.T, jnp.float32)
    np.testing.assert_allclose(got, want, atol=0.02 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_devices_add_up_the_heads_gradient_once_not_once_a_chunk(case, shape, dtype):
    from jaxllm.mesh import MeshSection, batch_sharding, make_mesh

    k = jax.random.split(jax.random.key(1), 2)
    h, w = jax.random.normal(k[0], (8, 64, D)), jax.random.normal(k[1], (D, 96))
    targets, weights = jnp.ones((8, 64), jnp.int32), jnp.ones((8, 64))

    def gradient(h, w):
        def loss(h, w):
            x = h.astype(dtype)
            return cross_entropy([(x, w)], targets, weights, Head(chunk=8))[0]

        return jax.grad(loss, (0, 1))(h, w)

    want = jax.jit(gradient)(h, w)
    mesh = make_mesh(MeshSection(**shape))
    with jax.set_mesh(mesh):
        rows = jax.device_put(h, batch_sharding(mesh, (8, 64)))
        compiled = jax.jit(gradient).lower(rows, w).compile()
        got = compiled(rows, w)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    loop = compiled.as_text().split("ENTRY")[0]
    sums = [x for x in loop.splitlines() if " all-reduce(" in x]
    assert not [x for x in sums if f"f32[{D},{96 // shape.get('tensor', 1)}]" in x]


def test_no_buffer_holds_the_logits_of_all_tokens(case):
    h, w, targets, weights = case
    big = jnp.zeros((8, 256, D))
    args = big, jnp.zeros((D, 5000)), jnp.zeros((8, 256), jnp.int32), jnp.ones((8, 256))
    f = jax.jit(
        jax.grad(lambda h, w, t, x: cross_entropy([(h, w)], t, x, Head(chunk=128))[0], (0, 1))
    )
    memory = f.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert memory < 0.5 * 8 * 256 * 5000 * 4


@pytest.mark.parametrize("count", [1, 4])
def test_adamw_trajectory_equals_a_plain_torch_loop(tmp_path, count):
    torch = pytest.importorskip("torch")
    import transformers
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxllm.config import OptimSection
    from jaxllm.data.batch import Batch
    from jaxllm.hf import load_hf
    from jaxllm.mesh import MeshSection, make_mesh
    from jaxllm.objectives.lm import lm_loss
    from jaxllm.optim import make_optimizer, make_schedule
    from jaxllm.step import TrainState, alone, make_step

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, vocab_size=V, max_position_embeddings=64)
    config = transformers.Qwen2Config(**shape, tie_word_embeddings=True)
    ref = transformers.AutoModelForCausalLM.from_config(config)
    ref.save_pretrained(tmp_path)
    rng = np.random.default_rng(1)
    rows, length, steps = 8, 24, 20
    tokens = rng.integers(0, V, (rows, length + 1))
    weights = (rng.random((rows, length)) < np.linspace(0.1, 0.9, rows)[:, None]).astype(np.float32)

    decay = [p for p in ref.parameters() if p.ndim > 1]
    rest = [p for p in ref.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2)
    x, y, w = (torch.tensor(a) for a in (tokens[:, :-1], tokens[:, 1:], weights))
    want = []
    for _ in range(steps):
        logits = ref(x).logits
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
        loss = (nll * w).sum() / w.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(ref.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        want.append((loss.item(), norm.item()))

    mesh = make_mesh(MeshSection(), jax.devices()[:1])
    model = load_hf(str(tmp_path), mesh=mesh)
    graph, state = nnx.split(model, nnx.Param)
    optim = OptimSection(learning_rate=1e-2, weight_decay=0.1, schedule="constant")
    schedule, params = make_schedule(optim, steps), nnx.to_pure_dict(state)
    optimizer = make_optimizer(optim, schedule)
    whole = NamedSharding(mesh, P())
    step = make_step(alone(graph), lm_loss, optimizer, schedule, max_norm=1.0)
    step = jax.jit(step, out_shardings=(whole, None))
    ones = np.ones((rows, length), np.int32)
    fields = (tokens[:, :-1], tokens[:, 1:], weights, ones, np.arange(length) * ones)
    batch = Batch(*(jnp.asarray(f.reshape(count, -1, length)) for f in fields))
    train = jax.device_put(TrainState(jnp.int32(0), params, optimizer.init(params)), whole)
    got = []
    for _ in range(steps):
        train, metrics = step(train, {}, batch)
        loss, weight = metrics["loss"]
        got.append((float(loss / weight), float(metrics["grad_norm"][0])))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_an_objective_without_a_row_is_an_error_that_names_the_known_ones():
    from jaxllm import TrainConfig, UserError
    from jaxllm.objectives.table import OBJECTIVES, make_objective

    assert set(OBJECTIVES) == set(VERBS)
    cfg = TrainConfig(objective="dop")
    with pytest.raises(UserError, match="objective 'dop' is not known; known: pretrain, sft"):
        make_objective(cfg)
    with pytest.raises(UserError, match="objective 'dop' is not known; known: pretrain, sft"):
        _ = cfg.verb
