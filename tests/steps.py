# SPDX-License-Identifier: Apache-2.0
"""A tiny model, ragged rows, and a few steps of AdamW on them, computed in many ways."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxllm.config import MeshSection, ModelSection, OptimSection, PeftSection, TrainConfig
from jaxllm.data.batch import TEXT, Batch, Experience, make_row
from jaxllm.hf import abstract_model
from jaxllm.mesh import make_mesh, put
from jaxllm.model.config import LayerKind, ModelConfig, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.objectives.lm import lm_loss
from jaxllm.objectives.table import Objective
from jaxllm.ops.quantized import quantize
from jaxllm.peft.files import make_adapter
from jaxllm.program import assemble
from jaxllm.step import TrainState, alone, make_step

V, T = 97, 32
TINY = ModelConfig(
    "llama",
    vocab_size=V,
    hidden_size=32,
    intermediate_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    ropes=(Rope(), Rope(theta=500.0)),
    kinds=(LayerKind(0), LayerKind(1, 9)),
    layer_kinds=(0, 1, 0, 1),
    tie_embeddings=False,
    initializer_range=0.2,
)

MESHES = {
    "fsdp 8": MeshSection(fsdp=8),
    "data 2 x fsdp 2 x tensor 2": MeshSection(data=2, fsdp=2, tensor=2),
    "context 2 x tensor 2 x fsdp 2": MeshSection(fsdp=2, context=2, tensor=2),
}
EXPERT_MESHES = {
    "expert 4 x fsdp 2": MeshSection(expert=4, fsdp=2),
    "expert 2 x tensor 2 x data 2": MeshSection(data=2, fsdp=1, expert=2, tensor=2),
    "expert 2 x context 2 x fsdp 2": MeshSection(expert=2, context=2, fsdp=2),
}
WHOLE = PeftSection()  # every weight is trained


def decoder(section=WHOLE, *, shape=TINY, scores=False, quantize_base="none", **options):
    """A random model with what a peft section adds."""
    cfg = replace(shape, scores=scores)
    model = Decoder(
        cfg, rngs=nnx.Rngs(params=1, peft=2), peft=make_adapter(cfg, section), **options
    )
    model.peft.begin(model)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if quantize_base != "none" and path[0] in cfg.stacks and path[-1] == "kernel":
            variable.set_value(quantize(variable.get_value(), quantize_base, lambda x: x))
    return model


def ragged_rows(count=16, seed=0):
    """Rows of two or three segments with uneven masks and padding."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        segments = []
        for n in rng.integers(4, 11, 2 + i % 2):
            learn = (rng.random(n) < 0.2 + 0.1 * (i % 7)).astype(np.float32)
            segments.append((rng.integers(0, V, n), learn))
        rows.append(make_row(segments, T))
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


def pair_rows(count=16, seed=0, *, margin=False):
    """Rows of one or two pairs of answers to a prompt of their own, with uneven lengths."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        here, segments = 1 + i % 2, []
        for _ in range(here):
            prompt = rng.integers(0, V, rng.integers(1, 5))
            for _ in range(2):
                answer = rng.integers(0, V, rng.integers(1, 5))
                learn = np.repeat([0.0, 1.0], [len(prompt), len(answer)]).astype(np.float32)
                segments.append((np.concatenate([prompt, answer]), learn))
        row, each = make_row(segments, T), np.arange(2)
        row["chosen_segment"] = np.where(each < here, 2 * each + 1, 0).astype(np.int32)
        row["rejected_segment"] = np.where(each < here, 2 * each + 2, 0).astype(np.int32)
        row["margin"] = np.float32((each < here) * rng.random(2) * margin)
        rows.append(row)
    return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


def judged_rows(count=16, seed=0):
    """`pair_rows` read as judged answers, each beside its prompt with another answer."""
    rows = pair_rows(count, seed)
    first, second = rows.pop("chosen_segment"), rows.pop("rejected_segment")
    good = np.random.default_rng(seed).random(first.shape) < 0.6
    del rows["margin"]
    segments = {
        "chosen_segment": np.where(good, first, 0),
        "rejected_segment": np.where(good, 0, first),
        "unpaired_segment": second,
    }
    return rows | segments


def unpacked(rows):
    """Each segment of the rows in a row of its own."""
    single = []
    for r in range(len(rows["tokens"])):
        for s in range(1, rows["segment_ids"][r].max() + 1):
            at = rows["segment_ids"][r] == s
            row = {k: np.zeros(T, v.dtype) for k, v in rows.items()}
            for k in rows:
                row[k][: at.sum()] = rows[k][r][at]
            row["segment_ids"][: at.sum()] = 1
            single.append(row)
    return {k: np.stack([row[k] for row in single]) for k in rows}


def unpacked_slots(rows):
    """Each pair, or judged answer, of the rows in a row of its own."""
    names = [n for n in rows if n.endswith("_segment")]
    other = [n for n in rows if rows[n].shape[1] != T and n not in names]
    single = []
    for r, slot in np.ndindex(rows[names[0]].shape):
        used = sorted(rows[n][r, slot] for n in names if rows[n][r, slot])
        if not used:
            continue
        row = {k: np.zeros(T, rows[k].dtype) for k in TEXT}
        start = 0
        for index, s in enumerate(used, 1):
            at = rows["segment_ids"][r] == s
            for k in TEXT:
                row[k][start : start + at.sum()] = rows[k][r][at]
            row["segment_ids"][start : start + at.sum()] = index
            start += at.sum()
        for n in names:
            at = rows[n][r, slot]
            row[n] = np.array([used.index(at) + 1 if at else 0], np.int32)
        single.append(row | {n: rows[n][r, slot : slot + 1] for n in other})
    return {k: np.stack([row[k] for row in single]) for k in rows}


LANGUAGE = Objective(lm_loss)


def trajectory(
    rows,
    section=WHOLE,
    *,
    objective=LANGUAGE,
    count=1,
    steps=3,
    mesh=None,
    devices=1,
    routers=None,
    optimizer="adamw",
    metrics=None,
    **model,
):
    """(losses, gradient norms, the last state, (graph, frozen)) of AdamW steps on the same rows.

    routers: keys of the model section. metrics: receives those of the last step.
    """
    section_of_mesh = mesh or MeshSection()
    mesh = make_mesh(section_of_mesh, jax.devices()[:devices])
    keys = dict(learning_rate=3e-3, weight_decay=0.1, schedule="constant", clip=0.5)
    optim = OptimSection(optimizer, **keys)
    cfg = TrainConfig(
        model=ModelSection(**routers or {}), peft=section, optim=optim, mesh=section_of_mesh
    )
    made = decoder(section, **model)

    def make(adapter):
        options = {k: v for k, v in model.items() if k not in ("scores", "shape")}
        return abstract_model(made.cfg, mesh, {}, peft=adapter, **options)

    program = assemble(cfg, mesh, make, made.peft, objective)
    graph, trained, rest = nnx.split(made, made.peft.trains, ...)
    with jax.set_mesh(mesh):
        trainable = nnx.to_pure_dict(trained)
        frozen = program.with_reference(trainable, nnx.to_pure_dict(rest))
        frozen = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), frozen, program.frozen
        )
        state = program.begin(
            jax.tree.map(
                lambda x, like: jax.device_put(x, like.sharding), trainable, program.state.trainable
            )
        )
        step = program.step(100)
        split = {k: v.reshape(count, -1, *v.shape[1:]) for k, v in rows.items()}
        losses, norms = [], []
        for _ in range(steps):
            state, found = step(state, frozen, Batch(**put(mesh, split)))
            losses.append(float(found["loss"][0] / found["loss"][1]))
            norms.append(float(found["grad_norm"][0]))
            if metrics is not None:
                metrics.update(found)
        assert step._cache_size() == 1  # nothing is compiled again
    return np.array(losses), np.array(norms), state, (graph, frozen)


def experience(count=8, seed=0):
    """Completions of uneven lengths after prompts, one a row, and random numbers of what an online
    run knows of them; the last one is not learned. Fields of Experience, each [count, T]."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt, answer = rng.integers(2, 9), rng.integers(1, 16)
        learn = np.arange(prompt + answer) >= prompt
        rows.append(make_row([(rng.integers(0, V, len(learn)), learn.astype(np.float32))], T))
    rows = {k: np.stack([r[k] for r in rows]) for k in rows[0]}
    rows["weights"][-1] = 0
    names = ("old_logps", "reference_logps", "advantages", "old_values", "returns")
    drawn = {name: rng.normal(size=(count, T)).astype(np.float32) for name in names}
    drawn["old_logps"] = 0.3 * drawn["old_logps"] - 4
    drawn["reference_logps"] = 0.3 * drawn["reference_logps"] - 4
    return rows | {name: x * (rows["weights"] > 0) for name, x in drawn.items()}


def littered(rows):
    """The rows with other numbers wherever nothing is learned, tokens only in the padding."""
    rng = np.random.default_rng(9)
    changed = dict(rows)
    for name in rows.keys() - {"weights", "segment_ids", "positions"}:
        off = rows["segment_ids" if name == "tokens" else "weights"] == 0
        whole = rows[name].dtype == np.int32
        noise = rng.integers(0, V, off.shape) if whole else 3 * rng.normal(size=off.shape)
        changed[name] = np.where(off, noise, rows[name]).astype(rows[name].dtype)
    return changed


def plain(model, rows, temperature=1.0):
    """(log p of the targets, entropy), float64 [B, T], by a softmax of all logits."""
    logits = model(*(jnp.asarray(rows[k]) for k in ("tokens", "segment_ids", "positions")))
    logits = np.asarray(logits, np.float64) / temperature
    logps = logits - logits.max(-1, keepdims=True)
    logps -= np.log(np.exp(logps).sum(-1, keepdims=True))
    picked = np.take_along_axis(logps, rows["targets"][..., None], -1)[..., 0]
    return picked, -(np.exp(logps) * logps).sum(-1)


def descent(model, objective, trains):
    """update(batch [A, B, T]) -> (metrics, the weights after one step of gradient descent)."""
    graph, trained, rest = nnx.split(model, trains, ...)
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_step(alone(graph), objective, optimizer, lambda _: 1.0))
    params, frozen = nnx.to_pure_dict(trained), nnx.to_pure_dict(rest)

    def update(batch):
        state = TrainState(jnp.int32(0), params, optimizer.init(params))
        state, metrics = step(state, frozen, batch)
        return {k: [float(x) for x in pair] for k, pair in metrics.items()}, state.trainable

    return update


def batch_of(rows, count=None):
    """Rows as an Experience [B, T]; or [A, B, T], of `count` micro-batches."""
    lead = () if count is None else (count,)
    return Experience(**{k: jnp.asarray(v).reshape(*lead, -1, T) for k, v in rows.items()})


def assert_same_update(update, rows, counts):
    """What nothing is learned of changes no update, and neither does its division."""
    metrics, weights = update(batch_of(rows, 1))
    norm = metrics["grad_norm"][0]
    assert norm > 1e-2
    for batch in (batch_of(littered(rows), 1), *(batch_of(rows, count) for count in counts)):
        found, after = update(batch)
        for name, (value, weight) in metrics.items():
            assert found[name] == pytest.approx([value, weight], rel=2e-5), name
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(weights), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * norm)


def assert_same_trajectory(found, wanted, rtol=1e-5):
    """Losses or gradient norms of each step are equal, or differ by a few roundings of the largest:
    a sum's rounding follows its terms, also where it has become small."""
    wanted = np.asarray(wanted)
    atol = 4 * np.finfo(np.float32).eps * abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol)


def same_over_mesh(name, shape, losses, norms):
    """The weights after steps over MESHES[name], whose losses and gradient norms are those of one
    device; over fsdp 8 with remat and micro-batches."""
    keys = {"remat": "full", "count": 2} if name == "fsdp 8" else {}
    mesh = (MESHES | EXPERT_MESHES)[name]
    found = trajectory(ragged_rows(16), shape=shape, devices=8, mesh=mesh, **keys)
    assert_same_trajectory(found[0], losses)
    assert_same_trajectory(found[1], norms)
    return found[2].trainable


def same_lora_over_mesh(**keys):
    """(trained, frozen) weights after steps of LoRA on one device, in which the loss falls. Losses
    and gradient norms are the same over a mesh."""
    losses, norms, state, (_, frozen) = trajectory(ragged_rows(16), **keys)
    assert losses[-1] < losses[0]
    mesh = MESHES["data 2 x fsdp 2 x tensor 2"]
    over = trajectory(ragged_rows(16), devices=8, mesh=mesh, **keys)
    assert_same_trajectory(over[0], losses, rtol=2e-5)
    assert_same_trajectory(over[1], norms, rtol=1e-4)
    return state.trainable, frozen
