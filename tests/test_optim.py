# SPDX-License-Identifier: Apache-2.0
"""Schedules against transformers', optimizers against torch's, and what holds for all of them."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib
from transformers import get_scheduler
from transformers.optimization import Adafactor

from jaxllm.config import OptimSection, load_config
from jaxllm.config.optimizers import OPTIMIZERS
from jaxllm.optim import (
    MAKERS,
    clip,
    eval_params,
    make_optimizer,
    make_schedule,
    opt_state_shardings,
)

DECAYED = {"kernel": True, "embedding": True, "scale": False, "bias": False}


def section(name="adamw", **keys):
    schedule = "constant" if name == "schedule_free_adamw" else "linear"
    return OptimSection(**{"name": name, "learning_rate": 1e-2, "schedule": schedule} | keys)


def weights(shape=(6, 5), layers=3, seed=0):
    """A stack of layers as the model has it: every kind of leaf, none recognisable by rank."""
    rng = np.random.default_rng(seed)

    def draw(*dims):
        return rng.standard_normal(dims).astype(np.float32)

    return {
        "embed": {"embedding": draw(7, shape[0])},
        "head": {"kernel": draw(shape[0], 7)},
        "layers": {
            "norm": {"scale": draw(layers, shape[0])},
            "up": {"kernel": draw(layers, *shape), "bias": draw(layers, shape[1])},
        },
        "norm": {"scale": draw(shape[0])},
    }


def descend(optim, params, steps, total=10, dtype=jnp.float32):
    """Weights after each of `steps` updates; gradients differ from step to step."""
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    optimizer = make_optimizer(optim, make_schedule(optim, total))
    state = optimizer.init(params)
    trajectory = []
    for step in range(steps):
        grads = jax.tree.map(jnp.asarray, weights(seed=100 + step))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def leaves(tree):
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def flat(tree):
    return {key: np.asarray(leaf) for key, leaf in leaves(tree)}


# ---- schedules


@pytest.mark.parametrize(
    ("ours", "theirs", "keys", "kwargs"),
    [
        ("cosine", "cosine", {}, {}),
        ("linear", "linear", {}, {}),
        ("constant", "constant_with_warmup", {}, {}),
        ("inverse_sqrt", "inverse_sqrt", {}, {}),
        ("cosine", "cosine_with_min_lr", {"final": 0.1}, {"min_lr_rate": 0.1}),
        (
            "wsd",
            "warmup_stable_decay",
            {"decay": 10, "final": 0.2},
            {"num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.2},
        ),
    ],
)
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedule_is_that_of_transformers_at_every_step(ours, theirs, keys, kwargs, warmup):
    steps = 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    reference = get_scheduler(theirs, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs)
    rate = make_schedule(
        OptimSection(schedule=ours, learning_rate=3e-4, warmup=warmup, **keys), steps
    )
    for step in range(steps + 1):
        # wsd's warmup starts at the final rate there, at 0 here as in the other schedules
        if theirs != "warmup_stable_decay" or step >= warmup:
            expected = reference.get_last_lr()[0]
            assert float(rate(step)) == pytest.approx(expected, rel=1e-5, abs=1e-10)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("warmup", [0, 7, 60])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("polynomial", {}),
        ("polynomial", {"lr_end": 1e-5, "power": 2.5}),
        ("cosine_with_min_lr", {"min_lr": 3e-5}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}),
        ("linear", {}),
    ],
)
def test_a_schedule_by_its_transformers_name_has_the_rates_of_transformers(name, kwargs, warmup):
    """Also if the warmup is longer than the run."""
    steps = 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs)
    args = ["--lr_scheduler_type", name, "--lr_scheduler_kwargs", str(kwargs)]
    args += ["--learning_rate", "3e-4", "--warmup_steps", str(warmup)]
    rate = make_schedule(load_config("pretrain", None, args)[0].optim, steps)
    for step in range(steps):
        assert float(rate(step)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-5, abs=1e-10)
        optimizer.step()
        theirs.step()


def test_the_tables_of_optimizers_have_the_same_names():
    assert MAKERS.keys() == OPTIMIZERS.keys()


def test_warmup_log_is_deepspeeds():
    rate = make_schedule(OptimSection(schedule="warmup_log", learning_rate=2.0, warmup=10), 100)
    for step in (0, 1, 5, 9):
        assert float(rate(step)) == pytest.approx(2 * math.log(step + 1) / math.log(10), rel=1e-6)
    assert float(rate(10)) == float(rate(99)) == 2.0


def test_warmup_below_one_is_a_share_of_the_run():
    rate = make_schedule(OptimSection(schedule="constant", learning_rate=1.0, warmup=0.05), 50)
    assert [float(rate(s)) for s in (0, 1, 2, 3)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "wsd", "warmup": 5, "decay": 6}, "optim.decay is 6 steps and 5 are left"),
        ({"schedule": "greedy"}, "'greedy' is unknown; choose from cosine"),
        ({"power": 2.0}, "optim.power 2.0 goes with polynomial; cosine ignores it"),
        ({"schedule": "constant", "final": 0.1}, "optim.final 0.1 goes with"),
    ],
)
def test_schedule_refuses(keys, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(OptimSection(**keys), 10)


# ---- against torch


def torch_trajectory(make, params, steps):
    """The same weights and gradients through a torch optimizer with decay in a group of its own."""
    tensors = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in flat(params).items()}
    groups = [
        {"params": [v for k, v in tensors.items() if DECAYED[k.split(".")[-1]] is decayed]}
        for decayed in (True, False)
    ]
    optimizer = make(groups)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    schedule = get_scheduler("linear", optimizer, 2, 10)
    trajectory = []
    for step in range(steps):
        for key, grad in flat(weights(seed=100 + step)).items():
            tensors[key].grad = torch.tensor(grad)
        optimizer.step()
        schedule.step()
        trajectory.append({k: v.detach().numpy().copy() for k, v in tensors.items()})
    return trajectory


@pytest.mark.parametrize(
    ("name", "keys", "make"),
    [
        ("adamw", {"b2": 0.95, "eps": 1e-3}, {"betas": (0.9, 0.95), "eps": 1e-3}),
        ("adam", {"b1": 0.8}, {"betas": (0.8, 0.999)}),
        ("sgd", {}, {}),
        ("sgd", {"options": {"momentum": 0.9}}, {"momentum": 0.9}),
        (
            "sgd",
            {"options": {"momentum": 0.9, "nesterov": True}},
            {"momentum": 0.9, "nesterov": True},
        ),
    ],
)
def test_ten_steps_are_torchs(name, keys, make):
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    params = weights()
    theirs = torch_trajectory(lambda g: kind(g, lr=1e-2, weight_decay=0.1, **make), params, 10)
    ours, _ = descend(section(name, weight_decay=0.1, warmup=2, **keys), params, 10)
    for a, b in zip(ours, theirs, strict=True):
        for key, value in flat(a).items():
            np.testing.assert_allclose(value, b[key], rtol=0, atol=1e-6, err_msg=key)


def test_adafactor_is_that_of_transformers():
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal((130, 140)), rng.standard_normal((5, 130, 140))
    leaf = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    theirs = Adafactor(
        [leaf], lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False
    )
    optim = section("adafactor", weight_decay=0.1, schedule="constant")
    params = {"kernel": jnp.asarray(start, jnp.float32)}
    optimizer = make_optimizer(optim, make_schedule(optim, 10))
    state = optimizer.init(params)
    for grad in grads:
        leaf.grad = torch.tensor(grad, dtype=torch.float32)
        theirs.step()
        updates, state = optimizer.update({"kernel": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["kernel"], leaf.detach().numpy(), atol=2e-5)


def test_muon_treats_each_layer_of_a_stack_as_its_own_matrix():
    optim = section("muon", weight_decay=0.1)
    stacked = {"layers": {"up": {"kernel": weights()["layers"]["up"]["kernel"]}}}
    grad = np.random.default_rng(1).standard_normal((3, 6, 5)).astype(np.float32)
    grad *= np.array([1.0, 10.0, 0.1], np.float32)[:, None, None]

    def update(kernel, grad):
        params = {"layers": {"up": {"kernel": jnp.asarray(kernel)}}}
        optimizer = make_optimizer(optim, make_schedule(optim, 10))
        grads = {"layers": {"up": {"kernel": jnp.asarray(grad)}}}
        return optimizer.update(grads, optimizer.init(params), params)[0]["layers"]["up"]["kernel"]

    kernel = stacked["layers"]["up"]["kernel"]
    together = update(kernel, grad)
    for layer in range(3):
        np.testing.assert_allclose(together[layer], update(kernel[layer], grad[layer]), atol=1e-6)


def test_muon_leaves_the_token_table_and_the_head_to_adamw():
    keys = {"weight_decay": 0.1, "warmup": 2}
    muon, _ = descend(section("muon", **keys), weights(), 4)
    adamw, _ = descend(section("adamw", **keys), weights(), 4)
    for key, value in flat(muon[-1]).items():
        assert np.array_equal(value, flat(adamw[-1])[key]) is (key != "layers.up.kernel"), key


@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule_free_evaluates_the_average_of_its_iterates(warmup):
    """Each weighted with the square of its learning rate (arXiv:2405.15682, section 4.3)."""
    optim = section("schedule_free_adamw", learning_rate=0.1, warmup=warmup)
    rate = make_schedule(optim, 10)
    target = jnp.arange(1.0, 7.0)
    params = {"kernel": jnp.zeros(6)}
    optimizer = make_optimizer(optim, rate)
    state, total, weight = optimizer.init(params), jnp.zeros(6), 0.0
    for step in range(10):
        grads = {"kernel": params["kernel"] - target}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        total += rate(step) ** 2 * state.z["kernel"]
        weight += rate(step) ** 2
    mean = eval_params(state, params)["kernel"]
    np.testing.assert_allclose(mean, total / weight, atol=1e-5)
    assert np.abs(mean - params["kernel"]).max() > 1e-3


def test_eval_params_of_other_optimizers_are_the_weights():
    trajectory, state = descend(section(), weights(), 1)
    assert eval_params(state, trajectory[0]) is trajectory[0]


# ---- every optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_moves_matrices_and_leaves_norms_and_biases(name):
    plain, _ = descend(section(name), weights(), 3)
    decayed, _ = descend(section(name, weight_decay=0.5), weights(), 3)
    for key, value in flat(plain[-1]).items():
        moved = not np.allclose(value, flat(decayed[-1])[key], atol=1e-7)
        assert moved is DECAYED[key.split(".")[-1]], key


# not adam: its decay joins the gradient and is normalised with it
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adam"])
def test_decay_follows_the_learning_rate(name):
    params = jax.tree.map(lambda x: np.abs(x) + 1, weights())

    def pull(rate):
        plain, _ = descend(section(name, learning_rate=rate), params, 1)
        decayed, _ = descend(section(name, learning_rate=rate, weight_decay=1e-3), params, 1)
        return flat(plain[0])["embed.embedding"] - flat(decayed[0])["embed.embedding"]

    np.testing.assert_allclose(pull(1e-1), 10 * pull(1e-2), rtol=0.2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_float32_under_bfloat16_weights(name):
    trajectory, state = descend(section(name), weights(), 2, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(trajectory[-1])} == {jnp.dtype("bfloat16")}
    assert {str(x.dtype) for x in jax.tree.leaves(state)} <= {"float32", "int32"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_lie_as_their_weights_do(name):
    params = jax.tree.map(jnp.asarray, weights(shape=(136, 144), layers=2))
    optim = section(name, options={"momentum": 0.9} if name in ("sgd", "adafactor") else {})
    optimizer = make_optimizer(optim, make_schedule(optim, 10))
    mesh = Mesh(np.array(jax.devices()), "x")
    whole = NamedSharding(mesh, P())
    last = {1: P("x"), 2: P(None, "x"), 3: P(None, None, "x")}
    lay = jax.tree.map(
        lambda w: whole if w.shape[-1] % 8 else NamedSharding(mesh, last[w.ndim]), params
    )
    shapes = jax.eval_shape(optimizer.init, params)
    state = jax.jit(optimizer.init, out_shardings=opt_state_shardings(shapes, params, lay))(params)
    by_weight = {key: (w.shape, w.sharding) for key, w in leaves(jax.device_put(params, lay))}
    moments = 0
    for key, leaf in leaves(state):
        weight = next((w for w in by_weight if key.endswith(w)), None)
        alike = weight is not None and leaf.shape == by_weight[weight][0]
        assert leaf.sharding == (by_weight[weight][1] if alike else whole), key
        moments += alike
    assert moments >= len(by_weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_option_of_the_table_is_taken(name):
    optax_of = {"muon": contrib.muon, "schedule_free_adamw": contrib.schedule_free}
    signature = inspect.signature(optax_of.get(name) or getattr(optax, name)).parameters
    for key in OPTIMIZERS[name][0]:
        default = signature[key].default
        optim = section(name, options={key: default})
        assert make_optimizer(optim, make_schedule(optim, 10)).init(weights())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "adamv"}, "optim.name 'adamv' is unknown; choose from adamw, adam"),
        ({"options": {"nestrov": True}}, "optim.options.nestrov is no option of adamw; it has eps"),
        ({"options": {"b1": 0.5}}, "optim.options.b1: give it as optim.b1"),
        (
            {"name": "schedule_free_adamw", "schedule": "cosine"},
            "schedule cosine with schedule_free_adamw",
        ),
    ],
)
def test_optimizer_refuses(keys, message):
    optim = OptimSection(**keys)
    with pytest.raises(ValueError, match=message):
        make_optimizer(optim, make_schedule(optim, 10))


@pytest.mark.parametrize("name", ["sgd", "adafactor", "lion"])
def test_a_key_without_effect_on_an_optimizer_is_refused(name):
    with pytest.raises(ValueError, match=f"optim.eps has no effect on {name}"):
        make_optimizer(section(name, eps=1e-3), optax.constant_schedule(1.0))


def test_schedule_free_needs_an_average():
    with pytest.raises(ValueError, match=r"optim\.b1 is 0"):
        optim = section("schedule_free_adamw", b1=0.0, schedule="constant")
        make_optimizer(optim, make_schedule(optim, 10))


def test_a_weight_of_unknown_name_is_no_silent_case():
    with pytest.raises(KeyError, match="gain"):
        make_optimizer(section(), make_schedule(section(), 10)).init(
            {"norm": {"gain": jnp.ones(3)}}
        )


# ---- clipping


@pytest.mark.parametrize(("size", "max_norm"), [(1.0, 0.5), (1.0, 1e6), (1e-8, 1e-7)])
def test_clip_is_torchs_clip_grad_norm(size, max_norm):
    grads = jax.tree.map(lambda g: g * size, weights())
    tensors = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in flat(grads).items()}
    for leaf in tensors.values():
        leaf.grad = leaf.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(tensors.values(), max_norm)
    ours = optax.tree.norm(grads)
    assert float(ours) == pytest.approx(float(norm), rel=1e-6)
    for key, value in flat(clip(grads, ours, max_norm)).items():
        np.testing.assert_allclose(value, tensors[key].grad.numpy(), rtol=2e-6)


def test_clip_with_a_scale_is_the_clip_of_scaled_gradients():
    grads, scale = weights(), 0.01
    scaled = jax.tree.map(lambda g: g * scale, grads)
    norm = optax.tree.norm(scaled)
    for max_norm in (0.0, 0.01, 100.0):
        once = clip(grads, scale * optax.tree.norm(grads), max_norm, scale)
        twice = clip(scaled, norm, max_norm) if max_norm else scaled
        for key, value in flat(once).items():
            np.testing.assert_allclose(value, flat(twice)[key], rtol=1e-6)


def test_update_writes_no_copy_of_the_gradients():
    """Norm, clipping and AdamW compile to passes over the gradients that keep none of them."""
    params = jax.tree.map(jnp.asarray, weights(shape=(256, 512), layers=8))
    optim = section(weight_decay=0.1)
    optimizer = make_optimizer(optim, make_schedule(optim, 10))

    def update(params, state, grads, weight):
        scale = 1 / weight
        grads = clip(grads, scale * optax.tree.norm(grads), 1.0, scale)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(update, donate_argnums=(0, 1))
    compiled = step.lower(params, optimizer.init(params), params, jnp.float32(2)).compile()
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert compiled.memory_analysis().temp_size_in_bytes < size // 20
