# SPDX-License-Identifier: Apache-2.0
"""What each optimizer and learning-rate schedule reads of the `optim` section.

The arithmetic is in `jaxllm.optim`, which needs jax; a mistake is found here without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_ADAM = ("eps_root", "mu_dtype", "nesterov")
_ADAFACTOR = ("min_dim_size_to_factor", "multiply_by_parameter_scale", "clipping_threshold")
_ADAFACTOR += ("decay_rate", "decay_offset", "momentum", "factored")
_MUON = ("beta", "ns_coeffs", "ns_steps", "nesterov", "preconditioning", "consistent_rms")
# optim.name -> (keywords of the optax function for optim.options, keys of optim without effect).
OPTIMIZERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "adamw": (_ADAM, ()),
    "adam": (_ADAM, ()),
    "sgd": (("momentum", "nesterov"), ("b1", "b2", "eps")),
    "lion": (("mu_dtype",), ("eps",)),
    "adafactor": (_ADAFACTOR, ("b1", "b2", "eps")),
    "muon": (_MUON, ()),
    "schedule_free_adamw": (("weight_lr_power",), ()),
}
FLAT = ("constant", "warmup_log")  # schedules without a decay
DECAYS = ("cosine", "linear", "polynomial", "wsd")  # schedules that end at optim.final


def optimizer_mistakes(optim: Any) -> Iterator[str]:
    """Messages on an OptimSection's optimizer, its options, and keys that it does not read."""
    if optim.name not in OPTIMIZERS:
        yield f"optim.name {optim.name!r} is unknown; choose from {', '.join(OPTIMIZERS)}"
        return
    accepted, ignored = OPTIMIZERS[optim.name]
    for key in ignored:
        if getattr(optim, key) != getattr(type(optim)(), key):
            yield f"optim.{key} has no effect on {optim.name}; leave it out"
    for key in optim.options:
        if key in vars(optim):
            yield f"optim.options.{key}: give it as optim.{key}"
        elif key not in accepted:
            known = ", ".join(accepted)
            yield f"optim.options.{key} is no option of {optim.name}; it has {known}"
    if optim.name == "schedule_free_adamw":
        if optim.schedule not in FLAT:
            yield (
                f"optim.schedule {optim.schedule} with schedule_free_adamw, which needs no "
                "decay of the learning rate; set optim.schedule to constant"
            )
        if optim.b1 == 0:
            yield "optim.b1 is 0; schedule_free_adamw needs a value above 0, such as 0.9"


def schedule_mistakes(optim: Any) -> Iterator[str]:
    """Messages on an OptimSection's keys that its schedule does not read."""
    if optim.final and optim.schedule not in DECAYS:
        yield (
            f"optim.final {optim.final} goes with {', '.join(DECAYS)}; {optim.schedule} ignores it"
        )
    if optim.power != 1 and optim.schedule != "polynomial":
        yield f"optim.power {optim.power} goes with polynomial; {optim.schedule} ignores it"
