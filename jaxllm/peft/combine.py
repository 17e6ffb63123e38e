# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters combined: several in one model, or one merged into the weights of its base.

Rows of a batch use one of a model's adapters, none, or a weighted sum of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.errors import UserError
from jaxllm.model.adapter import Adapter
from jaxllm.model.decoder import Decoder
from jaxllm.ops.cross_entropy import HEAD_AXES
from jaxllm.peft.base import set_value
from jaxllm.peft.lora import (
    LoraAdapter,
    LoraBranch,
    branch_of,
    column_norms,
    exact_product,
    kernels_of,
)
from jaxllm.peft.targets import EMBED

# One of a model's adapters by name, none, or {name: weight}.
Choice = str | Mapping[str, float] | None


def combine(adapters: Mapping[str, Any]) -> LoraAdapter:
    """One adapter whose ranks are those of all; the first adapter is in use.

    Raises UserError for any that is not plain LoRA, and if they adapt experts in unlike forms.
    """
    for name, adapter in adapters.items():
        if not adapter.names or adapter.always_on or adapter.needs_base:
            raise UserError(
                f"adapter {name} cannot be combined with another: only LoRA can, without DoRA, "
                "PiSSA or modules_to_save"
            )
    targets = []
    by_path = {t.path: t for adapter in adapters.values() for t in adapter.targets}
    for path, target in by_path.items():
        layers = len(target.ranks[0])
        unadapted = replace(target, ranks=((0,) * layers,), alphas=((1.0,) * layers,))
        matching = [
            next((t for t in adapter.targets if t.path == path), unadapted)
            for adapter in adapters.values()
        ]
        if any(t.parameter != target.parameter for t in matching):
            raise UserError(
                f"the adapters {', '.join(adapters)} cannot be combined: only some name the "
                "experts in target_parameters"
            )
        ranks = tuple(t.ranks[0] for t in matching)
        alphas = tuple(t.alphas[0] for t in matching)
        targets.append(replace(target, ranks=ranks, alphas=alphas))
    return LoraAdapter(
        targets=tuple(targets),
        names=tuple(adapters),
        rslora=tuple(adapter.rslora[0] for adapter in adapters.values()),
        adapter_weights=(1.0,) + (0.0,) * (len(adapters) - 1),
    )


def choice_weights(adapter: Adapter, choice: Choice) -> tuple[float, ...]:
    """The weight of each of a model's adapters, in the order of its names.

    Raises UserError for an unknown name, and if the adapter cannot be turned off.
    """
    if not adapter.names:
        raise UserError("only LoRA adapters can be chosen; the model has none")
    weights = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice
    for name in weights:
        if name not in adapter.names:
            raise UserError(f"there is no adapter {name}; there are {', '.join(adapter.names)}")
    if adapter.always_on and set(weights.values()) != {1.0}:
        raise UserError(
            f"an adapter with {adapter.always_on} cannot be turned off or weighted; load the model "
            "without it"
        )
    return tuple(float(weights.get(name, 0.0)) for name in adapter.names)


def parse_choice(text: str) -> Choice:
    """`none`, NAME, or `NAME:WEIGHT,NAME:WEIGHT`, as --use has it."""
    if text == "none":
        return None
    if ":" not in text:
        return text
    pairs = [part.rpartition(":") for part in text.split(",")]
    try:
        return {name: float(weight) for name, _, weight in pairs}
    except ValueError:
        raise UserError(f"{text} is not a name, nor name:weight,name:weight") from None


def choose(model: Any, choice: Choice) -> None:
    """Sets which of the model's adapters are used from now on: one, none, or a weighted sum."""
    model.peft = replace(model.peft, adapter_weights=choice_weights(model.peft, choice))


def fold(model: Any, sign: int = 1) -> None:
    """Adds the adapter to the weights in place (sign -1: subtracts it), computed in float32.

    The branches stay in the model. The weights must not be quantized. Raises UserError for DoRA
    with sign -1.
    """
    adapter: LoraAdapter = model.peft
    if adapter.dora and sign < 0:
        raise UserError("a merged DoRA adapter cannot be subtracted: the column norms are lost")
    for target in adapter.targets:
        branch, first = branch_of(model, target.path), 0
        for kernel in kernels_of(model, target.path):
            last = first + kernel[...].shape[-1]
            set_value(kernel, _with_branch(kernel[...], branch, slice(first, last), sign))
            first = last


def _with_branch(kernel: jax.Array, branch: LoraBranch, outputs: slice, sign: int) -> jax.Array:
    """A target's weight [(L,) (E,) I, O] plus sign times the branch. outputs: the branch's outputs
    that are this weight's.

    Layers are computed one by one: all experts of all layers in float32 could take more memory
    than the model.
    """
    variables = {name: getattr(branch, name) for name in ("a", "b", "a0", "b0", "magnitude")}
    parts = {name: v[...] for name, v in variables.items() if v is not None}
    parts |= {n: parts[n][..., outputs] for n in ("b", "b0", "magnitude") if n in parts}
    parts["scale"] = branch.scales_by_layer()
    if not branch.target.stacked:
        return jax.jit(folded)(kernel, parts, sign)
    fold_layer = jax.jit(folded_layer, donate_argnums=0, out_shardings=kernel.sharding)
    out = jnp.zeros(kernel.shape, kernel.dtype, device=kernel.sharding)
    for layer in range(len(kernel)):
        out = fold_layer(out, layer, kernel, parts, sign)
    return out


def folded_layer(out: jax.Array, layer: Any, kernel: Any, parts: Any, sign: Any) -> jax.Array:
    """`out` with the result of `folded` for one layer; kernel and parts are those of all layers."""
    w, own = jax.tree.map(lambda x: x[layer], (kernel, parts))
    return lax.dynamic_update_index_in_dim(out, folded(w, own, sign), layer, 0)


def folded(kernel: jax.Array, parts: dict[str, jax.Array], sign: Any) -> jax.Array:
    """A weight [(E,) I, O] plus sign·s·AB, computed in float32; of DoRA with the trained norms."""
    a, b, scale_R, w = parts["a"], parts["b"], parts["scale"], kernel.astype(jnp.float32)
    delta = exact_product(a * scale_R, b)
    if "a0" in parts:
        delta = delta - exact_product(parts["a0"] * scale_R, parts["b0"])
    if "magnitude" in parts:
        factor_O = parts["magnitude"] / column_norms(w, a, scale_R[:, None] * b)
        delta = (w + delta) * factor_O - w
    return (w + sign * delta).astype(kernel.dtype)


def merged(model: Decoder) -> Decoder:
    """A model without an adapter that computes the same as `model`, in the weights' dtype.

    A tied head is untied if the adapter changes the token table only. Raises UserError for a
    quantized base, several adapters, and an adapter that is not LoRA.
    """
    adapter: Any = model.peft
    if model.quantized:
        raise UserError("the base is quantized; load it without quantize_base to merge")
    if len(adapter.names) != 1:
        raise UserError("only one LoRA adapter can be merged into the weights; export the adapter")
    graph, state = nnx.split(model)
    copy = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    table = copy.embed.embedding[...]
    fold(copy)
    cfg, weights = model.cfg, nnx.state(copy, nnx.Param)
    if cfg.tied_head and any(t.path == EMBED for t in adapter.targets):
        cfg = replace(cfg, tie_embeddings=False)
        weights["head"] = nnx.State({"kernel": nnx.Param(table.T, axes=HEAD_AXES)})
    options: Any = {"compute_dtype": model.compute_dtype, "remat": model.remat}
    plain = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), dtype=table.dtype, **options))
    out = nnx.merge(nnx.graphdef(plain), weights)
    out.base = model.base
    if model.hf_config:
        config = json.loads(model.hf_config) | {"tie_word_embeddings": cfg.tie_embeddings}
        out.hf_config = json.dumps(config)
    return out
