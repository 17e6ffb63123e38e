# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter merged into the weights of its base model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.errors import UserError
from jaxllm.model.decoder import Decoder
from jaxllm.ops.cross_entropy import HEAD_AXES
from jaxllm.peft.base import set_value
from jaxllm.peft.lora import LoraAdapter, branch_of, column_norms, dense_kernel, kernels_of
from jaxllm.peft.targets import EMBED


def fold(model: Any, sign: int = 1) -> None:
    """Adds the adapter to the weights in place (sign -1: subtracts it), computed in float32.

    The branches stay in the model. The weights must not be quantized. Raises UserError for DoRA
    with sign -1.
    """
    adapter: LoraAdapter = model.peft
    if adapter.dora and sign < 0:
        raise UserError("a merged DoRA adapter cannot be subtracted: the column norms are lost")
    for target in adapter.targets:
        branch, kernels = branch_of(model, target.path), kernels_of(model, target.path)
        delta = branch.delta()
        if branch.magnitude is not None:
            kernel = dense_kernel(model, target.path)
            norm = branch.map_layers(column_norms, kernel, branch.a[...], branch.scaled_b())
            factor = (branch.magnitude[...] / norm)[..., None, :]
            delta = (kernel + delta) * factor - kernel
        ends = np.cumsum([k[...].shape[-1] for k in kernels])[:-1]
        for kernel, part in zip(kernels, jnp.split(delta, ends, -1), strict=True):
            value = kernel[...]
            set_value(kernel, (value.astype(jnp.float32) + sign * part).astype(value.dtype))


def merged(model: Decoder) -> Decoder:
    """A model without an adapter that computes the same as `model`, in the weights' dtype.

    A tied head is untied if the adapter changes the token table only. Raises UserError for a
    quantized base, several adapters, and an adapter that is not LoRA.
    """
    adapter: Any = model.peft
    if model.quantized:
        raise UserError("the base is quantised; load it without quantize_base to merge")
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
    if model.hf_config:
        config = json.loads(model.hf_config) | {"tie_word_embeddings": cfg.tie_embeddings}
        out.hf_config = json.dumps(config)
    return out
