# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules and optimizers, each a row of a table; clipping as torch does it.

Weights are a nested dict whose leaves are called kernel, embedding, scale or bias. The layers'
leaves are stacked (a leading dim L), so what a leaf is shows in its name, never in its rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

from jaxllm.config import OptimSection
from jaxllm.errors import UserError
from jaxllm.peft import METHODS

# Whether weight decay pulls a leaf of that name to zero. A weight of another name is a bug.
DECAYED = {"kernel": True, "embedding": True, "scale": False, "bias": False}
for adapter in METHODS.values():
    DECAYED |= adapter.decayed


# ---- schedules


def _span(value: float, total: int) -> int:
    """Steps, from steps or (below 1) a share of all steps, rounded up as transformers does."""
    return math.ceil(value * total) if value < 1 else int(value)


def make_schedule(optim: OptimSection, total_steps: int) -> optax.Schedule:
    """The learning rate of update 0, 1, … (float32), the same as transformers' get_scheduler.

    A linear warm-up from 0 leads to the peak, then a shape over the rest of the run leads down to
    `final` times the peak: cosine and linear over all of it, wsd (arXiv:2404.06395) linearly over
    its last `decay`. inverse_sqrt is sqrt(warmup / step), without a warm-up sqrt(10,000 / (step +
    10,000)). warmup_log rises as log(step + 1) / log(warmup) and then stays: DeepSpeed's WarmupLR.

    Raises ValueError when the warm-up, or wsd's decay, is longer than the run, and when `final` is
    given to a shape that has no end.
    """
    warmup, floor = _span(optim.warmup, total_steps), optim.final
    if warmup > total_steps:
        raise UserError(
            f"optim.warmup is {warmup} steps and the run has {total_steps}; "
            "lower it, or give a share below 1"
        )
    rest = max(total_steps - warmup, 1)
    decay = max(_span(optim.decay, total_steps), 1)
    if optim.schedule == "wsd" and decay > rest:
        raise UserError(
            f"optim.decay is {decay} steps and {total_steps - warmup} are left after the warm-up; "
            "lower one of them"
        )
    timescale = warmup or 10_000

    def between(share: jax.Array) -> jax.Array:  # 1 at the peak, 0 at the end
        return floor + (1 - floor) * jnp.clip(share, 0, 1)

    # Share of the peak, t steps after the warm-up.
    shapes: dict[str, Callable[[jax.Array], jax.Array]] = {
        "cosine": lambda t: between(0.5 + 0.5 * jnp.cos(math.pi * jnp.minimum(t / rest, 1))),
        "linear": lambda t: between(1 - t / rest),
        "wsd": lambda t: between((rest - t) / decay),
        "constant": jnp.ones_like,
        "inverse_sqrt": lambda t: jnp.sqrt(timescale / (t + timescale)),
        "warmup_log": jnp.ones_like,
    }
    if optim.schedule not in shapes:
        known = ", ".join(shapes)
        raise UserError(f"optim.schedule {optim.schedule!r} is not known; known: {known}")
    if floor and optim.schedule in ("constant", "inverse_sqrt", "warmup_log"):
        raise UserError(
            f"optim.final {floor} goes with cosine, linear and wsd; {optim.schedule} has no end"
        )
    shape, peak = shapes[optim.schedule], optim.learning_rate

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        assert peak is not None  # checks.resolve
        at = jnp.asarray(step, jnp.float32)
        rise = at / max(warmup, 1)
        if optim.schedule == "warmup_log":
            rise = jnp.log1p(at) / math.log(max(warmup, 2))
        fall = shape(jnp.maximum(at - warmup, 0))
        return peak * jnp.where(at < warmup, rise, fall)

    return rate


# ---- optimizers


def _names(path: tuple[Any, ...]) -> list[str]:
    return [key.key for key in path]


def decay_mask(params: Any) -> Any:
    """True for matrices and the token table, False for norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: DECAYED[_names(path)[-1]], params)


def _adamw(rate: optax.Schedule, optim: OptimSection, **options: Any):
    return optax.adamw(
        rate,
        optim.b1,
        optim.b2,
        optim.eps,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
        **options,
    )


def _adam(rate: optax.Schedule, optim: OptimSection, **options: Any):
    decay = optax.add_decayed_weights(optim.weight_decay, decay_mask)
    return optax.chain(decay, optax.adam(rate, optim.b1, optim.b2, optim.eps, **options))


def _sgd(rate: optax.Schedule, optim: OptimSection, **options: Any):
    decay = optax.add_decayed_weights(optim.weight_decay, decay_mask)
    return optax.chain(decay, optax.sgd(rate, **options))


def _lion(rate: optax.Schedule, optim: OptimSection, **options: Any):
    return optax.lion(
        rate, optim.b1, optim.b2, weight_decay=optim.weight_decay, mask=decay_mask, **options
    )


def _adafactor(rate: optax.Schedule, optim: OptimSection, **options: Any):
    # optax's own keywords would take the decay without the learning rate. Its result is negated.
    keys: dict[str, Any] = {"multiply_by_parameter_scale": False} | options
    direction = optax.adafactor(**keys)
    decay = optax.add_decayed_weights(-optim.weight_decay, decay_mask)
    return optax.chain(direction, decay, optax.scale_by_schedule(rate))


def _muon(rate: optax.Schedule, optim: OptimSection, **options: Any):
    def kind(path: tuple[Any, ...], _: Any) -> str:
        names = _names(path)
        return "muon" if names[-1] == "kernel" and names[0] != "head" else "adamw"

    def matrices(params: Any) -> Any:  # of a stack, each layer's own
        dims = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return jax.tree.map(lambda _: dims, params)

    keys: dict[str, Any] = {"consistent_rms": 0.2} | options
    muon = contrib.muon(
        rate,
        weight_decay=optim.weight_decay,
        muon_weight_dimension_numbers=matrices,
        **keys,
    )
    return optax.partition(
        {"muon": muon, "adamw": _adamw(rate, optim)},
        lambda params: jax.tree_util.tree_map_with_path(kind, params),
    )


def _schedule_free_adamw(rate: optax.Schedule, optim: OptimSection, **options: Any):
    if optim.schedule not in ("constant", "warmup_log"):
        raise UserError(
            f"optim.schedule {optim.schedule} with schedule_free_adamw, which replaces the decay "
            "of the learning rate; set optim.schedule to constant"
        )
    if optim.b1 == 0:
        raise UserError("optim.b1 is 0; schedule_free_adamw's average needs it above 0, 0.9 say")
    base = optax.chain(
        optax.scale_by_rms(optim.b2, optim.eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(optim.weight_decay, decay_mask),
        optax.scale_by_learning_rate(rate),
    )
    # It counts updates from 1, its base from 0.
    return contrib.schedule_free(base, lambda step: rate(step - 1), optim.b1, **options)


# name -> (constructor, keywords of the optax function that optim.options may give, keys not read)
OPTIMIZERS: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = {
    "adamw": (_adamw, ("eps_root", "mu_dtype", "nesterov"), ()),
    "adam": (_adam, ("eps_root", "mu_dtype", "nesterov"), ()),
    "sgd": (_sgd, ("momentum", "nesterov"), ("b1", "b2", "eps")),
    "lion": (_lion, ("mu_dtype",), ("eps",)),
    "adafactor": (
        _adafactor,
        (
            "min_dim_size_to_factor",
            "decay_rate",
            "decay_offset",
            "multiply_by_parameter_scale",
            "clipping_threshold",
            "momentum",
            "factored",
        ),
        ("b1", "b2", "eps"),
    ),
    "muon": (
        _muon,
        ("beta", "ns_coeffs", "ns_steps", "nesterov", "preconditioning", "consistent_rms"),
        (),
    ),
    "schedule_free_adamw": (_schedule_free_adamw, ("weight_lr_power",), ()),
}


def make_optimizer(
    optim: OptimSection, schedule: optax.Schedule, ratios: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """The optimizer `optim.name`; moments and arithmetic are float32.

    ratios: {name of leaves: their learning rate as a multiple of the others'}.

    Gradients come in clipped (see `clip`). Weight decay leaves norms and biases alone and is
    decoupled and multiplied by the learning rate, as in torch; adam and sgd add it to the gradient,
    as torch's do.

    name                 is                        memory per weight, bytes
    adamw                torch.optim.AdamW         8
    adam                 torch.optim.Adam          8
    sgd                  torch.optim.SGD           0, with options.momentum 4
    lion                 arXiv:2302.06675          4
    adafactor            arXiv:1804.04235, learning rate as given (transformers' with
                         scale_parameter off)      about 0
    muon                 arXiv:2502.16982 for the matrices inside layers, at adamw's update size;
                         adamw for the rest        4
    schedule_free_adamw  arXiv:2405.15682; see `eval_params`  8

    adafactor's clipping takes a stack of layers as one block. Raises ValueError for a name or an
    option that is not known.
    """
    if optim.name not in OPTIMIZERS:
        raise UserError(f"optim.name {optim.name!r} is not known; known: {', '.join(OPTIMIZERS)}")
    make, accepted, unread = OPTIMIZERS[optim.name]
    for key in unread:
        if getattr(optim, key) != getattr(OptimSection(), key):
            raise UserError(f"optim.{key} is not read by {optim.name}; leave it out")
    for key in optim.options:
        if key in vars(optim):
            raise UserError(f"optim.options.{key}: give it as optim.{key}")
        if key not in accepted:
            raise UserError(
                f"optim.options.{key} is no option of {optim.name}; it has {', '.join(accepted)}"
            )
    inner = _in_float32(make(schedule, optim, **optim.options))
    ratios = {name: ratio for name, ratio in (ratios or {}).items() if ratio != 1}
    return optax.chain(inner, _at_ratios(ratios)) if ratios else inner


def _at_ratios(ratios: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of the named leaves."""

    def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        return update * ratios.get(_names(path)[-1], 1.0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates))


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps state and arithmetic in float32 when weights are bfloat16; costs nothing otherwise."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return inner.init(wide(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(wide(updates), state, wide(params))

    return optax.GradientTransformation(init, update)


def opt_state_shardings(opt_state: Any, params: Any, shardings: Any) -> Any:
    """Shardings of an optimizer's state: a moment lies as its weight does, the rest everywhere.

    opt_state: shapes of the state (`jax.eval_shape(optimizer.init, params)`); shardings: those of
    weights or moments, a tree like `params`. A moment is found by the weight's path at the end of
    its own and by its shape: so the masked trees of muon and the factors of adafactor, which have
    other shapes and are small, need no case of their own.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    lay = {
        jax.tree_util.keystr(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }
    mesh = jax.tree.leaves(shardings)[0].mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def find(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        ends = (jax.tree_util.keystr(path[start:]) for start in range(len(path)))
        shape, sharding = next((lay[end] for end in ends if end in lay), ((), whole))
        return sharding if leaf.shape == shape else whole

    return jax.tree_util.tree_map_with_path(find, opt_state)


def eval_params(opt_state: Any, params: Any) -> Any:
    """The weights to evaluate and export: schedule-free's average, for others `params` itself."""
    if isinstance(opt_state, contrib.ScheduleFreeState):
        mean = contrib.schedule_free_eval_params(opt_state, params)
        return jax.tree.map(lambda x, p: x.astype(p.dtype), mean, params)
    return params


# ---- clipping


def clip(grads: Any, norm: jax.Array, max_norm: float, scale: jax.typing.ArrayLike = 1.0) -> Any:
    """`grads` times `scale`, of global norm `norm` (after `scale`) and at most `max_norm`; 0 = any.

    The factor is torch.nn.utils.clip_grad_norm_'s, min(1, max_norm / (norm + 1e-6)). Gradients
    summed over a batch come here with `scale` = 1 / weight and `norm` = scale · global_norm(grads):
    then one pass reads them for the norm and the optimizer's own pass does the rest. Scaled before
    the norm they are written out once more, which took 0.7 s instead of 0.25 s at 91M weights on 2
    cores.
    """
    if max_norm:
        scale = scale * jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, grads)
