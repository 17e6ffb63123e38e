# SPDX-License-Identifier: Apache-2.0
"""LoRA (arXiv:2106.09685): a low-rank branch beside a frozen weight, y = xW + s·dropout(x)·A·B.

s = alpha / r, with rsLoRA (arXiv:2312.03732) alpha / √r. DoRA (arXiv:2402.09353) scales each column
of the sum to a trained magnitude. PiSSA (arXiv:2404.02948) starts from W's r largest singular
directions, whose product is subtracted again, so W itself stays as it is. W + s·AB is never formed
but to export (`fold`).

Ranks may differ from layer to layer though the layers are one stack: A and B are as wide as the
widest, and s is 0 where a layer has less, which keeps what is beyond from being seen or trained.
Several adapters are one that is wider: their ranks lie side by side, and s carries how much of each
a row gets.

Dims: B rows, T tokens, I in, O out, R ranks of all adapters together, L layers.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.config import PeftSection
from jaxllm.errors import UserError
from jaxllm.model.adapter import Peft, PeftParam, score_of
from jaxllm.model.config import ModelConfig
from jaxllm.model.context import Context
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import key_table
from jaxllm.ops.cross_entropy import HEAD_AXES
from jaxllm.ops.matmul import dot
from jaxllm.ops.quantized import Quantized, dense

ALL_LINEAR = "all-linear"
EMBED, HEAD = "embed", "head"


class LoraParam(PeftParam):
    """A, B, or a DoRA magnitude."""


class LoraStart(nnx.Variable):
    """A and B as PiSSA set them: made from the base again whenever it is loaded, never trained."""


@dataclass(frozen=True)
class Target:
    """One adapted weight, all layers of it.

    path: where it lies in our model; parts that HF keeps in one tensor are one target.
    module: its name in HF's model, `{i}` for the layer.
    ranks, alphas: [adapters][layers]; rank 0 = that layer is not adapted.
    """

    path: str
    module: str
    ranks: tuple[tuple[int, ...], ...]
    alphas: tuple[tuple[float, ...], ...]

    def widths(self) -> list[int]:
        """Columns of A that each adapter has."""
        return [max(ranks) for ranks in self.ranks]

    def scales(self, rslora: Sequence[bool]) -> np.ndarray:
        """s of each rank of each layer, float32 [L, R]; 0 beyond a layer's rank."""
        parts = []
        for ranks, alphas, root in zip(self.ranks, self.alphas, rslora, strict=True):
            r, alpha = np.asarray(ranks)[:, None], np.asarray(alphas)[:, None]
            s = alpha / np.maximum(np.sqrt(r) if root else r, 1)
            parts.append(np.where(np.arange(max(ranks)) < r, s, 0.0))
        return np.concatenate(parts, 1).astype(np.float32)


@dataclass(frozen=True)
class LoraPeft(Peft):
    """LoRA on some weights. `names`: the adapters'; `saved`: weights trained as they are (their
    paths); `mix`: how much of each adapter a row gets if it does not say, empty = all of it."""

    method = "lora"
    targets: tuple[Target, ...]
    names: tuple[str, ...] = ("default",)
    rslora: tuple[bool, ...] = (False,)
    saved: tuple[str, ...] = ()
    dropout: float = 0.0
    init: str = "kaiming"
    dora: bool = False
    mix: tuple[float, ...] = ()

    @property
    def needs_base(self) -> bool:
        return self.init == "pissa"

    def trains(self, path: tuple[Any, ...], variable: Any) -> bool:
        return isinstance(variable, LoraParam) or ".".join(map(str, path)) in self.saved

    def linear(
        self, path: str, axes: tuple[str, str], shape: tuple[int, int], rngs: nnx.Rngs
    ) -> Lora | None:
        target = next((t for t in self.targets if t.path == path), None)
        return None if target is None else Lora(self, target, axes, shape, rngs)

    def count(self, model: Any) -> int:
        sizes = {}
        for target in self.targets:
            lora = lora_of(model, target.path)
            inputs, outputs = lora.a.get_value().shape[-2], lora.b.get_value().shape[-1]
            ranks = np.asarray(target.ranks)
            lengths = outputs * (ranks > 0).sum() if self.dora else 0
            sizes[target.path] = int(ranks.sum() * (inputs + outputs) + lengths)
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        saved = [v.get_value().size for path, v in state if self.trains(path, v)]
        return sum(sizes.values()) + sum(saved)

    def _branches(self, model: Any) -> list[Lora]:
        return [lora_of(model, target.path) for target in self.targets]

    def summary(self, model: Any) -> list[str]:
        """Beside the count the usual formula, where every adapted matrix is d x d and of rank r."""
        shapes = [(b.a.get_value().shape, b.b.get_value().shape) for b in self._branches(model)]
        sizes = {n for a, b in shapes for n in (a[-2], b[-1])}
        ranks = {r for t in self.targets for r in t.ranks[0] if r}
        lines = super().summary(model)
        if len(sizes) == len(ranks) == 1 and not (self.saved or self.dora):
            matrices = sum(r > 0 for t in self.targets for r in t.ranks[0])
            d, r = sizes.pop(), ranks.pop()
            lines[0] += f" = 2·L·d·r = 2 · {matrices} · {d:,} · {r}"
        return lines

    def begin(self, model: Any) -> None:
        for target in self.targets:
            lora, kernel = lora_of(model, target.path), whole_kernel(model, target.path)
            if self.init == "pissa":
                lora.begin_pissa(kernel)
            if self.dora:
                norm = lora.each_layer(column_norms, kernel, lora.a[...], lora.scaled_b())
                _set(lora.magnitude, norm)


class Lora(nnx.Module):
    """The branch of one target. `a` [I, R], `b` [R, O]; of an embedding I is the vocabulary."""

    def __init__(
        self,
        plan: LoraPeft,
        target: Target,
        axes: tuple[str, str],
        shape: tuple[int, int],
        rngs: nnx.Rngs,
    ):
        (inputs, outputs), width = shape, sum(target.widths())
        key = rngs.peft()
        a, b = jnp.zeros((inputs, width)), jnp.zeros((width, outputs))
        if target.path == EMBED:
            b = jax.random.normal(key, b.shape)
        elif plan.init == "gaussian":
            a = jax.random.normal(key, a.shape) / width
        else:
            a = jax.random.uniform(key, a.shape, minval=-1, maxval=1) / math.sqrt(inputs)
        into, out = (axes[0], None), (None, axes[1])
        self.a, self.b = LoraParam(a, axes=into), LoraParam(b, axes=out)
        pissa = plan.init == "pissa"
        self.a0: Any = LoraStart(a, axes=into) if pissa else None
        self.b0: Any = LoraStart(b, axes=out) if pissa else None
        self.magnitude = LoraParam(jnp.ones(outputs), axes=axes[1:]) if plan.dora else None
        self.target, self.rslora, self.dropout = target, plan.rslora, plan.dropout

    def inner(
        self, x: jax.Array, ctx: Context, start: bool = False, dtype: Any = None
    ) -> jax.Array:
        """s · dropout(x) A, [..., R] in x's dtype (`dtype` where x are tokens); `start`: with the A
        that PiSSA began with, without dropout."""
        a: Any = self.a0 if start else self.a
        h: Any
        if jnp.issubdtype(x.dtype, jnp.integer):
            h = jnp.take(a[...], x, axis=0, mode="clip").astype(dtype)
        else:
            if self.dropout and ctx.rng is not None and not start:
                kept = self.dropout_mask(ctx.rng, x.shape)
                x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
            h = dot(x, a[...], a.get_metadata("axes")[-2:])
        return (self.scale(ctx, h.ndim) * h).astype(h.dtype)  # in float32, as in torch

    def dropout_mask(self, rng: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """bool [B, ...], True where an input is kept. rng: typed keys [B], a mask from each."""

        def row(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(key, zlib.crc32(self.target.path.encode()))
            return jax.random.bernoulli(key, 1 - self.dropout, shape[1:])

        return jax.vmap(row)(rng)

    def scale(self, ctx: Context, ndim: int) -> jax.Array:
        """s of each rank in this layer, and of each row where rows mix adapters: [(B, 1,) R]."""
        scales = self.target.scales(self.rslora)
        same = (scales == scales[0]).all()
        scale = jnp.asarray(scales[0]) if same else jnp.asarray(scales)[ctx.layer]
        if ctx.adapter_weights is None:
            return scale
        owner = np.repeat(np.arange(len(self.target.ranks)), self.target.widths())
        mix = ctx.adapter_weights[:, owner]
        return scale * mix.reshape(mix.shape[0], *(1,) * (ndim - 2), mix.shape[1])

    def __call__(self, x: jax.Array, y: jax.Array, kernel: Any, ctx: Context) -> jax.Array:
        axes = self.b.get_metadata("axes")[-2:]
        added: Any = dot(self.inner(x, ctx, dtype=y.dtype), self.b[...], axes)
        if self.b0 is not None:
            began: Any = dot(self.inner(x, ctx, start=True), self.b0[...], axes)
            added = added - began
        y = y + added
        if self.magnitude is None:
            return y
        scale = self.scale(replace(ctx, adapter_weights=None), 1)
        norm = column_norms(kernel(), self.a[...], scale[:, None] * self.b[...])
        factor = self.magnitude[...] / jax.lax.stop_gradient(norm)
        return (y * jnp.where(jnp.any(scale > 0), factor, 1.0)).astype(y.dtype)

    def terms(self, x: jax.Array, ctx: Context) -> list[tuple[jax.Array, jax.Array]]:
        """[(x' [..., R], w [R, O])], whose products add up to what the branch adds."""
        found = [(self.inner(x, ctx), self.b[...])]
        if self.b0 is not None:
            found.append((-self.inner(x, ctx, start=True), self.b0[...]))
        return found

    # ---- over all layers at once, outside a step

    def scaled_b(self) -> jax.Array:
        """s·B, float32 [R, O] or [L, R, O]."""
        scales = jnp.asarray(self.target.scales(self.rslora))
        b = self.b[...]
        return (scales if b.ndim == 3 else scales[0])[..., None] * b

    def each_layer(self, f: Any, *arrays: jax.Array) -> jax.Array:
        """f on the arrays of one layer after another, stacked; at once where there is no stack."""
        return jax.lax.map(lambda x: f(*x), arrays) if self.a[...].ndim == 3 else f(*arrays)

    def begin_pissa(self, kernel: jax.Array) -> None:
        """A, B = U √S / √s, √S V / √s of the R largest singular values of W."""
        R = self.a[...].shape[-1]
        if R > min(kernel.shape[-2:]):
            raise UserError(
                f"peft: pissa of rank {R}, but {self.target.module} has {min(kernel.shape[-2:])} "
                "singular values; give it less by rank_pattern"
            )
        scales = jnp.asarray(self.target.scales(self.rslora))
        scales = scales if kernel.ndim == 3 else scales[0]

        def halves(w: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
            u, values, v = jnp.linalg.svd(w, full_matrices=False)
            root = jnp.sqrt(values[:R] / jnp.where(s > 0, s, 1.0))
            return u[:, :R] * root, root[:, None] * v[:R]

        a, b = self.each_layer(halves, kernel, scales)
        # Buffers of their own: a and b are donated to the first step.
        starts = ((self.a0, jnp.copy(a)), (self.b0, jnp.copy(b)))
        for variable, value in ((self.a, a), (self.b, b), *starts):
            _set(variable, value)

    def delta(self) -> jax.Array:
        """s·AB, less what PiSSA began with: float32 [I, O] or [L, I, O]."""
        scales = jnp.asarray(self.target.scales(self.rslora))
        scales = (scales if self.a[...].ndim == 3 else scales[0])[..., None, :]
        whole = _exact(self.a[...] * scales, self.b[...])
        return whole if self.a0 is None else whole - _exact(self.a0[...] * scales, self.b0[...])


def _set(variable: Any, value: jax.Array) -> None:
    """Gives a weight another value, laid out as the one before."""
    variable.set_value(jax.device_put(value, variable.get_value().sharding))


def column_norms(w: jax.Array, a: jax.Array, scaled_b: jax.Array) -> jax.Array:
    """‖W + sAB‖ of each column, float32 [O], without the sum: W·W + 2 (WᵀA)·sB + sB·(AᵀA)sB."""
    w = w.astype(jnp.float32)
    square = jnp.sum(w * w, 0)
    square += 2 * jnp.sum(_exact(a.T, w) * scaled_b, 0)
    square += jnp.sum(scaled_b * _exact(_exact(a.T, a), scaled_b), 0)
    return jnp.sqrt(jnp.maximum(square, 0))


# float32 products, not the shorter form that a GPU or TPU takes by itself.
_exact = partial(jnp.matmul, precision="highest")


# ---- where the targets lie in a model


def _owner(model: Any, path: str) -> tuple[Any, str]:
    """The module that holds what lies at a path, and its name there."""
    *parents, last = path.split(".")
    for name in parents:
        model = getattr(model, name)
    return model, last


def lora_of(model: Any, path: str) -> Lora:
    """The branch of a target."""
    owner, last = _owner(model, path)
    found = getattr(owner, last)
    return found if isinstance(found, Lora) else found.lora


def kernels_of(model: Any, path: str) -> list[Any]:
    """The weights that a target adapts, in HF's order."""
    if path == EMBED:
        return [model.embed.embedding]
    owner, last = _owner(model, path)
    parts = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(last, (last,))
    return [getattr(owner, part).kernel for part in parts]


def whole_kernel(model: Any, path: str) -> jax.Array:
    """The weights that a target adapts as one, float32 [(L,) I, O]."""

    def wide(value: Any) -> jax.Array:
        if not isinstance(value, Quantized):
            return value.astype(jnp.float32)
        return jax.lax.map(lambda w: dense(w, (None, None), jnp.float32), value)

    return jnp.concatenate([wide(k.get_value()) for k in kernels_of(model, path)], -1)


def fold(model: Any, sign: int = 1) -> None:
    """Adds every adapter to the weights it stands beside (sign -1: takes it away), in float32.

    The branches themselves stay. The weights must not be quantised. Raises ValueError for what
    cannot be taken away.
    """
    plan: LoraPeft = model.peft
    if plan.dora and sign < 0:
        raise UserError("a folded DoRA adapter cannot be taken away: the columns' norms are gone")
    for target in plan.targets:
        lora, kernels = lora_of(model, target.path), kernels_of(model, target.path)
        delta = lora.delta()
        if plan.dora:
            whole = whole_kernel(model, target.path)
            norm = lora.each_layer(column_norms, whole, lora.a[...], lora.scaled_b())
            assert lora.magnitude is not None
            factor = (lora.magnitude[...] / norm)[..., None, :]
            delta = (whole + delta) * factor - whole
        ends = np.cumsum([k[...].shape[-1] for k in kernels])[:-1]
        for kernel, part in zip(kernels, jnp.split(delta, ends, -1), strict=True):
            value = kernel[...]
            _set(kernel, (value.astype(jnp.float32) + sign * part).astype(value.dtype))


def merged(model: Decoder) -> Decoder:
    """The plain model that computes what `model` does: its adapter folded, in the weights' dtype.

    A tied head is untied where the token table alone was adapted. Raises ValueError for an adapter
    that is not of the weights.
    """
    plan = model.peft
    if model.quantized:
        raise UserError("the base is quantised; load it without quantize_base to merge")
    if not isinstance(plan, LoraPeft) or len(plan.names) > 1:
        raise UserError("only one LoRA adapter can be merged into the weights; export the adapter")
    graph, state = nnx.split(model)
    whole = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    table = whole.embed.embedding[...]
    fold(whole)
    cfg, weights = model.cfg, nnx.state(whole, nnx.Param)
    if cfg.tied_head and any(t.path == EMBED for t in plan.targets):
        cfg = replace(cfg, tie_embeddings=False)
        weights["head"] = nnx.State({"kernel": nnx.Param(table.T, axes=HEAD_AXES)})
    options: Any = dict(compute_dtype=model.compute_dtype, remat=model.remat)
    plain = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), dtype=table.dtype, **options))
    out = nnx.merge(nnx.graphdef(plain), weights)
    if model.hf_config:
        config = json.loads(model.hf_config) | {"tie_word_embeddings": cfg.tie_embeddings}
        out.hf_config = json.dumps(config)
    return out


# ---- which modules a configuration names


def modules(cfg: ModelConfig) -> dict[str, str]:
    """{path of ours: HF's module, `{i}` for the layer} of every weight LoRA can stand beside."""
    found: dict[str, str] = {}
    for key in key_table(cfg):
        path, _, leaf = key.path.rpartition(".")
        module = key.name.removesuffix(".weight")
        if key.rows:  # a part of a fused tensor
            path = path.rpartition(".")[0] + "." + module.rpartition(".")[2].removesuffix("_proj")
        if leaf in ("kernel", "embedding") and key.path not in score_of(cfg):
            found[path] = module
    return found


def _matches(entry: str, name: str) -> bool:
    if name == entry or name.endswith(f".{entry}"):
        return True
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as error:
        raise UserError(f"peft: {entry!r} is neither a module nor a pattern: {error}") from None


def _names(cfg: ModelConfig, module: str) -> list[str]:
    """A module's name in each layer."""
    return [module.format(i=i) for i in range(cfg.num_layers if "{i}" in module else 1)]


def _check_named(cfg: ModelConfig, key: str, entries: Iterable[str], form: str = "{}") -> None:
    """Raises ValueError for an entry that, in the pattern `form`, names no module."""
    there = [name for module in modules(cfg).values() for name in _names(cfg, module)]
    for entry in entries:
        if not any(_matches(form.format(entry), name) for name in there):
            known = dict.fromkeys(name.rpartition(".")[2] for name in there)
            tied = " (the head is the token table: embed_tokens)" if cfg.tied_head else ""
            raise UserError(
                f"peft.{key}: {entry!r} matches nothing; the model has {', '.join(known)}{tied}, "
                f"or say {ALL_LINEAR}"
            )


def _pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a module's name, as peft reads them."""
    fits = (value for key, value in patterns.items() if _matches(rf"(.*\.)?({key})", name))
    return next(fits, default)


def resolve(cfg: ModelConfig, section: PeftSection, strict: bool = True) -> LoraPeft:
    """The LoRA that a configuration describes. Raises ValueError for a module that is not there
    (with `strict`) and for what cannot be combined."""
    saved = (*saved_paths(cfg, section.modules_to_save), *score_of(cfg))
    saved = tuple(dict.fromkeys(saved))
    if strict:
        named = [e for e in section.target_modules if e != ALL_LINEAR]
        _check_named(cfg, "target_modules", named)
        _check_named(cfg, "exclude_modules", section.exclude_modules)
        _check_named(cfg, "rank_pattern", section.rank_pattern, r"(.*\.)?({})")
        _check_named(cfg, "alpha_pattern", section.alpha_pattern, r"(.*\.)?({})")
    for layer in section.layers_to_transform:
        if layer >= cfg.num_layers:
            raise UserError(
                f"peft.layers_to_transform: there is no layer {layer}, the model has "
                f"{cfg.num_layers} (0 to {cfg.num_layers - 1})"
            )

    def rank(path: str, name: str) -> int:
        if any(_matches(entry, name) for entry in section.exclude_modules):
            return 0
        if name.endswith(tuple(section.modules_to_save)):
            return 0
        chosen = any(
            path not in (EMBED, HEAD) if entry == ALL_LINEAR else _matches(entry, name)
            for entry in section.target_modules
        )
        layer = re.search(r"\.(\d+)\.", name)
        if section.layers_to_transform:
            chosen &= layer is not None and int(layer[1]) in section.layers_to_transform
        return int(_pattern(section.rank_pattern, name, section.r)) if chosen else 0

    targets = []
    for path, module in modules(cfg).items():
        names = _names(cfg, module)
        ranks = tuple(rank(path, name) for name in names)
        alphas = tuple(float(_pattern(section.alpha_pattern, n, section.lora_alpha)) for n in names)
        if max(ranks):
            targets.append(Target(path, module, (ranks,), (alphas,)))
    if not targets:
        raise UserError("peft: nothing is left to adapt; see target_modules and exclude_modules")
    paths = {t.path for t in targets}
    if section.use_dora and HEAD in paths:
        raise UserError("peft.use_dora does not go with lm_head; exclude it")
    if section.init_lora_weights == "pissa" and EMBED in paths:
        raise UserError("peft.init_lora_weights pissa does not go with embed_tokens; exclude it")
    return LoraPeft(
        targets=tuple(targets),
        rslora=(section.use_rslora,),
        saved=saved,
        dropout=section.lora_dropout,
        init=section.init_lora_weights,
        dora=section.use_dora,
    )


def saved_paths(cfg: ModelConfig, names: Sequence[str]) -> tuple[str, ...]:
    """The weights of `modules_to_save`, as peft reads them: modules whose name ends so."""
    paths: dict[str, None] = {}
    for entry in names:
        found = []
        for key in key_table(cfg):
            module = key.name.rpartition(".")[0]
            hits = [name.endswith(entry) for name in _names(cfg, module)]
            if any(hits) and not all(hits):
                raise UserError(
                    f"peft.modules_to_save: {entry} is some layers of a stack; name all or none"
                )
            found += [key.path] if all(hits) else []
        if not found:
            there = dict.fromkeys(k.name.split(".")[-2] for k in key_table(cfg))
            raise UserError(
                f"peft.modules_to_save: {entry!r} matches nothing; the model has {', '.join(there)}"
            )
        paths |= dict.fromkeys(found)
    return tuple(paths)
