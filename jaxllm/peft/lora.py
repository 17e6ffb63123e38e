# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv:2106.09685): a low-rank branch next to a frozen weight, y = xW + s·dropout(x)·A·B.

s = alpha / r, with rsLoRA (arXiv:2312.03732) alpha / √r. DoRA (arXiv:2402.09353) scales each column
of W + s·AB to a trained norm. PiSSA (arXiv:2404.02948) initializes A and B from W's r largest
singular values; the initial product is subtracted in the forward pass, so W does not change.
W + s·AB is formed only for export (combine.py).

Ranks may differ between the layers of one stack: A and B have the largest rank of all layers, and
s is 0 beyond a layer's own rank, so the surplus columns neither act nor get a gradient. Several
adapters are one with the sum of their ranks, and s includes the weight of each adapter in a row.

Dims: B rows, T tokens, I inputs, O outputs, R ranks of all adapters, L layers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxllm.config import PeftSection
from jaxllm.errors import UserError
from jaxllm.files import ADAPTER_CONFIG
from jaxllm.mesh import Axes, context_shards
from jaxllm.model.adapter import AdapterParam
from jaxllm.model.config import MAMBA_PARTS, ModelConfig
from jaxllm.model.context import Context
from jaxllm.ops.matmul import dot
from jaxllm.ops.quantized import Quantized, dense
from jaxllm.peft.base import SEQUENCE_CLASSIFICATION, PeftAdapter, Slot, read_slots, set_value
from jaxllm.peft.experts import check_experts, check_modules, expert_slots
from jaxllm.peft.targets import (
    EMBED,
    HEAD,
    Target,
    common_value,
    find_targets,
    is_router,
    names_by_layer,
    saved_paths,
    target_names,
)

# Modules that peft saves with an adapter for sequence classification, present or not.
SCORE_MODULES = ("classifier", "score")
# Options of peft's LoraConfig that change the computation and are not supported, unless empty.
UNSUPPORTED = (
    "fan_in_fan_out lora_bias use_qalora layer_replication "
    "alora_invocation_tokens trainable_token_indices use_bdlora arrow_config kasa_config "
    "velora_config monteclora_config"
).split()


class LoraStart(nnx.Variable):
    """The initial A or B of PiSSA: computed again whenever the base is loaded, never trained."""


@dataclass(frozen=True)
class LoraAdapter(PeftAdapter):
    """LoRA branches on `targets`. rslora: of each adapter in `names`."""

    method = "lora"
    peft_type = "LORA"
    decayed = {"a": True, "b": True, "magnitude": False}
    targets: tuple[Target, ...]
    names: tuple[str, ...] = ("default",)
    rslora: tuple[bool, ...] = (False,)
    saved: tuple[str, ...] = ()
    init: str = "kaiming"
    dora: bool = False
    adapter_weights: tuple[float, ...] = ()
    lora_dropout: float = 0.0
    loraplus_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        plain = not (self.dora or self.lora_dropout or self.init == "pissa")
        check_experts(self.targets, plain)

    @classmethod
    def from_section(cls, cfg: ModelConfig, section: PeftSection, strict: bool = True) -> Self:
        saved = saved_paths(cfg, section.modules_to_save)
        targets = find_targets(cfg, section, strict)
        if strict:
            check_modules(targets, section.use_rslora)
        paths = {t.path for t in targets}
        if section.use_dora and HEAD in paths:
            raise UserError("peft.use_dora does not support lm_head; exclude it")
        if section.init_lora_weights == "pissa" and EMBED in paths:
            raise UserError(
                "peft.init_lora_weights pissa does not support embed_tokens; exclude it"
            )
        return cls(
            targets,
            rslora=(section.use_rslora,),
            saved=saved,
            init=section.init_lora_weights,
            dora=section.use_dora,
            lora_dropout=section.lora_dropout,
            loraplus_lr_ratio=section.loraplus_lr_ratio,
        )

    @classmethod
    def section_values(cls, config: dict[str, Any]) -> dict[str, Any]:
        for key in UNSUPPORTED:
            if config.get(key):
                raise UserError(f"{ADAPTER_CONFIG}: {key} is {config[key]!r}; it is not supported")
        if config.get("bias", "none") != "none":
            raise UserError(f"{ADAPTER_CONFIG}: bias is {config['bias']!r}; only none is supported")
        init = str(config.get("init_lora_weights", True)).lower()
        if init.startswith(("olora", "corda", "loftq", "lora_ga", "pissa_niter")):
            raise UserError(
                f"{ADAPTER_CONFIG}: init_lora_weights {init} changed the base; convert the adapter "
                "with peft's path_initial_model_for_weight_conversion"
            )
        values: dict[str, Any] = {"r": 8, "lora_alpha": 8}  # peft's defaults
        values |= super().section_values(config)
        lists = ("target_modules", "target_parameters", "exclude_modules")
        for key in (*lists, "layers_to_transform", "modules_to_save"):
            values[key] = _listed(config, key)
        if config.get("task_type") == SEQUENCE_CLASSIFICATION:
            modules = values["modules_to_save"]
            values["modules_to_save"] = [name for name in modules if name not in SCORE_MODULES]
        return values | {"init_lora_weights": "pissa" if init == "pissa" else "kaiming"}

    @classmethod
    def from_config(cls, cfg: ModelConfig, config: dict[str, Any], file: Path) -> Self:
        names = _listed(config, "target_modules") + _listed(config, "modules_to_save")
        if cfg.tied_head and any(str(n).rpartition(".")[2] == "lm_head" for n in names):
            raise _untied(config, file, "adapts lm_head, which is the token table in this model")
        adapter = super().from_config(cfg, config, file)
        # peft would change the token table and not the tied head, or both where we adapt the table.
        saved = "embed.embedding" in adapter.saved
        adapted = any(t.path == EMBED for t in adapter.targets)
        tied = bool(config.get("ensure_weight_tying"))
        if cfg.tied_head and ((saved and not tied) or (adapted and tied)):
            reason = "so that embed_tokens and the head, which are tied in this model, would differ"
            raise _untied(config, file, f"has ensure_weight_tying {str(tied).lower()}, {reason}")
        return adapter

    def to_config(self, model: Any) -> dict[str, Any]:
        cfg, config = model.cfg, super().to_config(model)
        r_factor = 2 if self.init == "pissa" else 1  # see `tensors`
        alpha_factor = math.sqrt(r_factor) if self.rslora[0] else r_factor  # s stays the same
        ranks, alphas = {}, {}
        for t in self.targets:
            layers = dict(t.adapted_layers(0))
            ranks[t.module] = {layer: r * r_factor for layer, r in layers.items()}
            alphas[t.module] = {layer: t.alphas[0][layer] * alpha_factor for layer in layers}
        parameters = {t.module for t in self.targets if t.parameter}
        experts = next((t.module for t in self.targets if t.experts and not t.parameter), "")
        r, rank_pattern = common_value(cfg, ranks, experts)
        alpha, alpha_pattern = common_value(cfg, alphas, experts)
        modules, fused = target_names(cfg, ranks, parameters)
        config |= {
            "r": r,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": modules,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "use_rslora": self.rslora[0],
            "use_dora": self.dora,
            "init_lora_weights": True,
            "bias": "none",
            "fan_in_fan_out": False,
        }
        if fused:
            config["target_parameters"] = fused
        if cfg.tied_head and "embed.embedding" in self.saved:
            config["ensure_weight_tying"] = True
        return config

    @property
    def needs_base(self) -> bool:
        return self.init == "pissa"

    @property
    def always_on(self) -> str:
        return "DoRA" if self.dora else "modules_to_save" if self.saved else ""

    @property
    def learning_rate_ratios(self) -> Mapping[str, float]:
        return {"b": self.loraplus_lr_ratio}  # LoRA+ (arXiv:2402.12354)

    def linear(
        self, path: str, axes: Axes, shape: tuple[int, int], rngs: nnx.Rngs
    ) -> LoraBranch | None:
        return self.experts(path, axes, shape, rngs)

    def experts(
        self, path: str, axes: Axes, shape: tuple[int, ...], rngs: nnx.Rngs
    ) -> LoraBranch | None:
        target = next((t for t in self.targets if t.path == path), None)
        return None if target is None else LoraBranch(self, target, axes, shape, rngs.peft())

    def begin(self, model: Any) -> None:
        for target in self.targets if self.dora or self.init == "pissa" else ():
            branch, kernel = branch_of(model, target.path), dense_kernel(model, target.path)
            if self.init == "pissa":
                branch.begin_pissa(kernel)
            if branch.magnitude is not None:
                set_value(branch.magnitude, branch.column_norms(kernel))

    def count(self, model: Any) -> int:
        total = 0
        for target in self.targets:
            branch, ranks = branch_of(model, target.path), np.asarray(target.ranks)
            *lead, inputs, _ = branch.a.get_value().shape
            outputs, experts = branch.b.get_value().shape[-1], math.prod(lead[target.stacked :])
            norms = outputs * (ranks > 0).sum() if self.dora else 0
            total += int(ranks.sum() * (inputs + outputs) * experts + norms)
        weights = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return total + sum(v.get_value().size for path, v in weights if self.trains(path, v))

    def summary(self, model: Any) -> list[str]:
        """Adds the formula 2·L·d·r if every adapted matrix is d x d and of rank r."""
        branches = [branch_of(model, target.path) for target in self.targets]
        shapes = [(b.a.get_value().shape, b.b.get_value().shape) for b in branches]
        sizes = {n for a, b in shapes for n in (a[-2], b[-1])}
        ranks = [r for t in self.targets for r in t.ranks[0] if r]
        lines = super().summary(model)
        one = len(sizes) == len(set(ranks)) == 1 and not any(t.experts for t in self.targets)
        if one and not (self.saved or self.dora):
            lines[0] += f" = 2·L·d·r = 2 · {len(ranks)} · {sizes.pop():,} · {ranks[0]}"
        return lines

    def slots(self, model: Any, which: int = 0, initial: bool = False) -> Iterator[Slot]:
        """initial: the A and B that PiSSA started from."""
        for target in self.targets:
            branch, widths = branch_of(model, target.path), target.widths()
            start = sum(widths[:which])
            embedding = target.path == EMBED
            names = names_by_layer(model.cfg, target.module)
            container = target.path.rpartition(".")[0]
            down = next((t for t in self.targets if t.path == f"{container}.down"), None)
            for index, r in target.adapted_layers(which):
                if target.experts:
                    columns = slice(start, start + r)
                    nested = down not in (None, target) and down.ranks[which][index] > 0
                    at = index, columns, nested
                    yield from expert_slots(self.root, target, names[index], branch, *at)
                    continue
                prefix = f"{self.root}{names[index][0].removesuffix('.weight')}.lora_"
                stack = (index,) if target.stacked else ()
                a, b = (branch.a0, branch.b0) if initial else (branch.a, branch.b)
                ranks = slice(start, start + r)
                name = "embedding_A" if embedding else "A.weight"
                yield Slot(prefix + name, a, (*stack, slice(None), ranks), transpose=True)
                name = "embedding_B" if embedding else "B.weight"
                yield Slot(prefix + name, b, (*stack, ranks), True, target.outputs)
                if branch.magnitude is not None and not initial:
                    at = branch.magnitude, stack or ...
                    yield Slot(prefix + "magnitude_vector", *at, outputs=target.outputs)

    def tensors(self, model: Any) -> dict[str, np.ndarray]:
        """PiSSA's A and B have twice the rank, [A, A0] and [B, -B0], so that their product is the
        change of the base's original weights."""
        if len(self.names) > 1:
            names = ", ".join(self.names)
            raise UserError(f"the model has the adapters {names}; load only the one to save")
        tensors = super().tensors(model)
        if self.init == "pissa":
            for name, initial in read_slots(self.slots(model, initial=True)).items():
                sign, dim = (1, 0) if name.endswith("_A.weight") else (-1, 1)
                tensors[name] = np.concatenate([tensors[name], sign * initial], dim)
        return tensors


class LoraBranch(nnx.Module):
    """A [I, R] and B [R, O] of one target; I of an embedding is the vocabulary. Those of experts
    have a leading dim E."""

    def __init__(
        self, adapter: LoraAdapter, target: Target, axes: Axes, shape: tuple[int, ...], key: Any
    ):
        (*experts, inputs, outputs), width = shape, sum(target.widths())
        a, b = jnp.zeros((*experts, inputs, width)), jnp.zeros((*experts, width, outputs))
        if target.path == EMBED:
            b = jax.random.normal(key, b.shape)
        elif adapter.init == "gaussian":
            a = jax.random.normal(key, a.shape) / width
        else:
            a = jax.random.uniform(key, a.shape, minval=-1, maxval=1) / math.sqrt(inputs)
        if not target.stacked:  # only the layers' weights are gathered along fsdp
            axes = tuple(None if axis == "embed" else axis for axis in axes)
        a_axes, b_axes = (*axes[:-1], None), (*axes[:-2], None, axes[-1])
        self.a, self.b = AdapterParam(a, axes=a_axes), AdapterParam(b, axes=b_axes)
        pissa = adapter.init == "pissa"
        self.a0: Any = LoraStart(a, axes=a_axes) if pissa else None
        self.b0: Any = LoraStart(b, axes=b_axes) if pissa else None
        self.magnitude = AdapterParam(jnp.ones(outputs), axes=axes[1:]) if adapter.dora else None
        self.target, self.rslora, self.dropout = target, adapter.rslora, adapter.lora_dropout

    def __call__(self, x: jax.Array, y_BTO: jax.Array, kernel: Any, ctx: Context) -> jax.Array:
        """y plus the branch of x, [B, T, I] or tokens [B, T]. kernel() is W, float32 [I, O]."""
        terms = self.terms(x, ctx, y_BTO.dtype)
        products: list[Any] = [dot(h_BTR, w_RO) for h_BTR, w_RO in terms]
        y_BTO = y_BTO + sum(products[1:], products[0])
        columns_O = self.columns(kernel, ctx)
        return y_BTO if columns_O is None else (y_BTO * columns_O).astype(y_BTO.dtype)

    def columns(self, kernel: Any, ctx: Context) -> jax.Array | None:
        """What DoRA multiplies each column of W + s·AB by, float32 [O]; None without DoRA."""
        if self.magnitude is None:
            return None
        scale_R = self.scale(replace(ctx, adapter_weights=None), 1)
        norm_O = column_norms(kernel(), self.a[...], scale_R[:, None] * self.b[...])
        factor_O = self.magnitude[...] / jax.lax.stop_gradient(norm_O)
        return jnp.where(jnp.any(scale_R > 0), factor_O, 1.0)

    def factors(
        self, kernel: Any, ctx: Context, ndim: int
    ) -> tuple[list[tuple[jax.Array, jax.Array, jax.Array]], jax.Array | None]:
        """([(A [I, R], s, B [R, O])], `columns`): what is added to W is the sum of A·s·B. For code
        that multiplies otherwise than x W. ndim: dims of what s is multiplied with."""
        s = self.scale(ctx, ndim)
        factors = [(self.a[...], s, self.b[...])]
        if self.a0 is not None:
            factors.append((self.a0[...], -s, self.b0[...]))
        return factors, self.columns(kernel, ctx)

    @property
    def additive(self) -> bool:
        """True if the branches of blocks of its inputs can be computed separately and added."""
        return self.magnitude is None and not self.dropout

    def inner(
        self, x: jax.Array, ctx: Context, initial: bool = False, dtype: Any = None
    ) -> jax.Array:
        """s · dropout(x) A, [B, T, R] in x's dtype (for tokens: in `dtype`). initial: with PiSSA's
        initial A and without dropout."""
        a: Any = self.a0 if initial else self.a
        if jnp.issubdtype(x.dtype, jnp.integer):
            h: Any = jnp.take(a[...], x, axis=0, mode="clip").astype(dtype)
        else:
            if self.dropout and ctx.rng is not None and not initial:
                mask = self.dropout_mask(ctx.rng, x.shape)
                x = jnp.where(mask, x / (1 - self.dropout), 0).astype(x.dtype)
            h = dot(x, a[...])
        return (self.scale(ctx, h.ndim) * h).astype(h.dtype)  # in float32, as in torch

    def dropout_mask(self, rng_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """bool `shape`, False where an input is dropped. A row's mask depends on its own key and on
        the target, so micro-batches and meshes do not change it."""
        target = zlib.crc32(self.target.path.encode())
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, target))(rng_B)
        _, here, *rest = shape
        whole = here * context_shards()  # so that a token's mask does not depend on the mesh
        draw = partial(jax.random.bernoulli, p=1 - self.dropout, shape=(whole, *rest))
        mask = jax.vmap(draw)(keys_B)
        if whole == here:
            return mask
        return lax.dynamic_slice_in_dim(mask, lax.axis_index("context") * here, here, 1)

    def scale(self, ctx: Context, ndim: int) -> jax.Array:
        """s of each rank in this layer, [R]; with adapter weights [B, 1, R], of `ndim` dims."""
        scales_LR = self.target.scales(self.rslora)
        same = (scales_LR == scales_LR[0]).all()
        scale_R = jnp.asarray(scales_LR[0]) if same else jnp.asarray(scales_LR)[ctx.layer]
        if ctx.adapter_weights is None:
            return scale_R
        adapter_of_rank = np.repeat(np.arange(len(self.target.ranks)), self.target.widths())
        weights_BR = ctx.adapter_weights[:, adapter_of_rank]
        return scale_R * weights_BR.reshape(len(weights_BR), *(1,) * (ndim - 2), -1)

    def factors_of_experts(self, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """(A [E, I, R], s·B [E, R, O]) of this layer."""
        weights = ctx.adapter_weights
        if weights is not None and len(weights) > 1:
            raise UserError("rows of a batch cannot use different adapters of experts")
        scale_R = self.scale(ctx, 2).reshape(-1)
        return self.a[...], scale_R[:, None] * self.b[...]

    def terms(self, x: jax.Array, ctx: Context, dtype: Any = None) -> list[tuple[Any, Any]]:
        """[(h [..., R], w [R, O])]: the branch's output is the sum of the products h w. dtype: of h
        if x are tokens."""
        terms = [(self.inner(x, ctx, dtype=dtype), self.b[...])]
        if self.b0 is not None:
            terms.append((-self.inner(x, ctx, initial=True), self.b0[...]))
        return terms

    # ---- all layers at once, outside the training step

    def scales_by_layer(self) -> jax.Array:
        """s of each rank, float32 [L, R], or [R] without a stack."""
        scales_LR = jnp.asarray(self.target.scales(self.rslora))
        return scales_LR if self.target.stacked else scales_LR[0]

    def _map_layers(self, f: Any, *arrays: jax.Array) -> Any:
        """f of the arrays of each layer, stacked; without a stack f(*arrays)."""
        return jax.lax.map(lambda x: f(*x), arrays) if self.target.stacked else f(*arrays)

    def column_norms(self, kernel: jax.Array) -> jax.Array:
        """Norm of each column of W + s·AB, float32 [(L,) O]. kernel: W, [(L,) I, O]."""
        scaled_b = self.scales_by_layer()[..., None] * self.b[...]
        return self._map_layers(column_norms, kernel, self.a[...], scaled_b)

    def begin_pissa(self, kernel: jax.Array) -> None:
        """A, B = U √S / √s, √S V / √s of W's R largest singular values. kernel: [(L,) I, O]."""
        R = self.a[...].shape[-1]
        if R > min(kernel.shape[-2:]):
            raise UserError(
                f"peft: pissa of rank {R}, but {self.target.module} has {min(kernel.shape[-2:])} "
                "singular values; lower its rank with rank_pattern"
            )

        def factors(w_IO: jax.Array, s_R: jax.Array) -> tuple[jax.Array, jax.Array]:
            u, values, v = jnp.linalg.svd(w_IO, full_matrices=False)
            root_R = jnp.sqrt(values[:R] / jnp.where(s_R > 0, s_R, 1.0))
            return u[:, :R] * root_R, root_R[:, None] * v[:R]

        a, b = self._map_layers(factors, kernel, self.scales_by_layer())
        # a0 and b0 need their own buffers, because a and b are donated to the first step.
        initial = ((self.a0, jnp.copy(a)), (self.b0, jnp.copy(b)))
        for variable, value in ((self.a, a), (self.b, b), *initial):
            set_value(variable, value)


# Products in full float32, even where a GPU or TPU would round the inputs.
exact_product = partial(jnp.matmul, precision="highest")


def column_norms(w_IO: jax.Array, a_IR: jax.Array, scaled_b_RO: jax.Array) -> jax.Array:
    """Norm of each column of W + sAB, float32 [O], without forming it: the square is
    W·W + 2 (WᵀA)·sB + sB·(AᵀA)sB."""
    w_IO = w_IO.astype(jnp.float32)
    square_O = jnp.sum(w_IO * w_IO, 0)
    square_O += 2 * jnp.sum(exact_product(a_IR.T, w_IO) * scaled_b_RO, 0)
    square_O += jnp.sum(scaled_b_RO * exact_product(exact_product(a_IR.T, a_IR), scaled_b_RO), 0)
    return jnp.sqrt(jnp.maximum(square_O, 0))


# ---- a target's modules in a model


def branch_of(model: Any, path: str) -> LoraBranch:
    """The branch of a target."""
    module = reduce(getattr, path.split("."), model)
    return module if isinstance(module, LoraBranch) else module.lora


def kernels_of(model: Any, path: str) -> list[Any]:
    """The variables of the weights that a target adapts, in HF's order."""
    if path == EMBED:
        return [model.embed.embedding]
    *parents, last = path.split(".")
    parent = reduce(getattr, parents, model)
    if is_router(path):
        return [parent.router]
    fused = {"qkv": "qkv", "bcx": "bcx", "gate_up": ("gate", "up"), "inputs": MAMBA_PARTS}
    parts = fused.get(last, (last,))
    return [getattr(parent, part).kernel for part in parts]


def dense_kernel(model: Any, path: str) -> jax.Array:
    """The weight that a target adapts, dequantized and with fused parts joined, float32
    [(L,) I, O]."""

    def to_float32(value: Any) -> jax.Array:
        if not isinstance(value, Quantized):
            return value.astype(jnp.float32)
        return jax.lax.map(lambda w: dense(w, jnp.float32), value)

    return jnp.concatenate([to_float32(k.get_value()) for k in kernels_of(model, path)], -1)


# ---- adapter_config.json


def _listed(config: dict[str, Any], key: str) -> list[Any]:
    value = config.get(key)
    return value if isinstance(value, list) else [] if value is None else [value]


def _untied(config: dict[str, Any], file: Path, problem: str) -> UserError:
    base = config.get("base_model_name_or_path")
    return UserError(
        f"{file} {problem}; load it over an untied copy: "
        f"jaxllm.save_hf(jaxllm.load_hf({base!r}, overrides={{'tie_word_embeddings': False}}), "
        "'untied')"
    )
