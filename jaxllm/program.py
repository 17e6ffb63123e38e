# SPDX-License-Identifier: Apache-2.0
"""A run as shapes: mesh, models, state, and the jitted functions that the loop calls.

`build` allocates no array, so a Program can also be lowered for devices that are not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm import hf
from jaxllm.collectives import fsdp_dim, reduction
from jaxllm.config import ModelSection, TrainConfig
from jaxllm.data.batch import TEXT, Batch, Experience
from jaxllm.errors import UserError
from jaxllm.evaluate import Eval, make_eval
from jaxllm.finite import check_finite
from jaxllm.hf_config import source_config
from jaxllm.identity import base_weights, identity
from jaxllm.mesh import batch_sharding, data_parallel, replicated
from jaxllm.model.adapter import NO_ADAPTER, Adapter
from jaxllm.model.config import ModelConfig
from jaxllm.model.decoder import Decoder, merge
from jaxllm.model.families import from_hf, normalised, with_mtp
from jaxllm.model.parts import record_shapes
from jaxllm.model.stack import context_obstacle
from jaxllm.objectives.ppo import Value, ValueParam
from jaxllm.objectives.table import Objective, make_objective
from jaxllm.ops import attention
from jaxllm.ops.cross_entropy import blocks_of
from jaxllm.ops.decoding import shared_length
from jaxllm.ops.residuals import check_offload
from jaxllm.optim import make_optimizer, make_schedule
from jaxllm.peft.files import make_adapter
from jaxllm.run import started_from
from jaxllm.step import (
    Models,
    StepShardings,
    TrainState,
    alone,
    make_step,
    state_shardings,
    weight_shardings,
)


@dataclass(frozen=True)
class Program:
    """A run, as `build` derives it from a config. Arrays are ShapeDtypeStructs with shardings."""

    cfg: TrainConfig
    mesh: Mesh
    policy: Decoder
    """the model that is trained, without a critic"""
    objective: Objective
    models: Models
    """(trainable, frozen) -> (policy with its critic, reference or None)"""
    reference: Callable[[Any, Any], Decoder] | None
    """(trainable, frozen weights) of step 0 -> the reference; None if the objective has none"""
    copied: Any
    """the trainable weights that the reference copies; {} if it shares every weight"""
    state: TrainState
    frozen: Any
    shardings: StepShardings
    begin: Callable[[Any], TrainState]
    """jitted: trainable weights, which are donated -> the state of step 0"""
    evaluate: Eval

    @property
    def shape(self) -> ModelConfig:
        return self.policy.cfg

    @property
    def adapter(self) -> Adapter:
        return self.policy.peft

    @property
    def micro_batches(self) -> int:
        """Micro-batches in an update."""
        return self.cfg.batch_size // (self.cfg.micro_batch_size * data_parallel(self.mesh))

    @property
    def precomputes_reference(self) -> bool:
        """True if a step reads the reference's log-probabilities with the batch."""
        return self.reference is not None and self.cfg.align.reference == "precomputed"

    @property
    def keeps_reference(self) -> bool:
        """True if the reference model stays in memory during training."""
        return self.reference is not None and not self.precomputes_reference

    @property
    def row_length(self) -> int:
        """Tokens in the longest row of a training batch."""
        length = self.cfg.data.length
        if self.cfg.verb.online:
            return shared_length(length + self.cfg.rl.max_new_tokens)
        return length * (2 if self.cfg.verb.data in ("pairs", "judged") else 1)

    @property
    def loss_blocks(self) -> int:
        """Blocks of the vocabulary in the loss."""
        head = self.policy.embed.embedding if self.policy.head is None else self.policy.head.kernel
        sharding: Any = head.get_value().sharding
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            split = self.cfg.mesh.zero == 3 and fsdp_dim(sharding.spec) >= 0
            return blocks_of(self.cfg.model.loss_blocks, split)

    def identity(self, tokenizer: Any, manifest: dict[str, Any]) -> dict[str, Any]:
        """The identity of the run (identity.py) with its tokenizer and the manifest of its data.
        All processes call it."""
        compares = self.reference is not None
        depends = compares or self.adapter.frozen  # on weights that a checkpoint does not have
        weights = base_weights(self.cfg, adapter=compares) if depends else {}
        hf_config, own = json.loads(self.policy.hf_config), self.objective.own or None
        return identity(self.cfg, tokenizer, manifest, hf_config, weights, own)

    def summary(self) -> list[str]:
        """Lines that a run prints at the start."""
        facts = {"dtype": self.cfg.model.compute_dtype, "softcap": self.shape.attention_softcap}
        facts |= {"sinks": any(self.shape.of(kind).sinks for kind in self.shape.kinds)}
        facts |= {"prefix": self.adapter.length > 0, "length": self.row_length}
        indexer = self.shape.indexer
        facts["selected"] = indexer is not None and indexer.top_keys < self.row_length
        kinds, stacks = self.shape.kinds_by_layer, self.shape.stacks.values()
        windows = [{kinds[layer].window for layer in layers} for layers in stacks]
        mixed = any(len(some) > 1 for some in windows)
        facts["mixed_windows"] = mixed and not self.shape.chunked
        weights = [variable for _, variable in nnx.to_flat_state(nnx.state(self.policy))]
        dims = dict.fromkeys(self.shape.of(kind).attention_dims for kind in self.shape.kinds)
        kernel = partial(attention.notes, self.mesh, self.cfg.model.attention, **facts)
        return [
            *dict.fromkeys(line for some in dims for line in kernel(head_dims=some)),
            *replicated(self.mesh, weights, drop="" if self.cfg.mesh.zero else "fsdp"),
            *self.adapter.summary(self.policy),
        ]

    def step(self, steps: int) -> Callable[..., Any]:
        """Jitted `(state, frozen, batch [A, B, T]) -> (state, metrics)` of a run of `steps` steps.

        The state is donated.
        """
        schedule = make_schedule(self.cfg.optim, steps)
        update = make_step(
            self.models,
            self.objective.loss,
            make_optimizer(self.cfg.optim, schedule, self.adapter.learning_rate_ratios),
            schedule,
            baseline=self.objective.baseline,
            added_losses=added_losses(self.cfg.model),
            bias_rate=self.cfg.model.router_bias_rate,
            max_norm=self.cfg.optim.clip,
            seed=self.cfg.seed,
            offloaded=shardings_of(self.state.opt_state) if self.cfg.optim.offload else None,
            shardings=self.shardings if self.mesh.size > 1 else None,
        )
        return jax.jit(update, donate_argnums=0, out_shardings=(shardings_of(self.state), None))

    def batch(self, length: int, pairs: int = 1) -> Batch:
        """Shapes of an update's batch with rows of `length` tokens and at most `pairs` pairs."""
        verb = self.cfg.verb
        fields = dict.fromkeys(TEXT, length)
        if verb.data in ("pairs", "judged"):
            third = "margin" if verb.data == "pairs" else "unpaired_segment"
            fields |= dict.fromkeys(("chosen_segment", "rejected_segment", third), pairs)
        online = Experience.__dataclass_fields__.keys() - Batch.__dataclass_fields__.keys()
        fields |= dict.fromkeys(online if verb.online else (), length)
        floats = {"weights", "margin", *online}

        def field(name: str, size: int) -> jax.ShapeDtypeStruct:
            dims = (self.micro_batches, self.cfg.batch_size // self.micro_batches, size)
            dtype = jnp.float32 if name in floats else jnp.int32
            return jax.ShapeDtypeStruct(dims, dtype, sharding=batch_sharding(self.mesh, dims))

        kind = Experience if verb.online else Batch
        return kind(**{name: field(name, size) for name, size in fields.items()})

    def load(self, step: int | None = None) -> tuple[Any, Any]:
        """(trainable, frozen) arrays that the run starts with: those of its adapter (peft.path), of
        its HF directory (model.path), or random ones.

        step: of the checkpoint that replaces the trainable weights; if nothing else is needed from
        the model's files they are not read, and (None, the empty `frozen`) is returned.
        """
        resumed = step is not None and self.reference is None
        if resumed and not self.adapter.frozen:
            return None, {}
        cfg = replace(self.cfg, peft=replace(self.cfg.peft, path=None)) if resumed else self.cfg
        load = partial(load_model, cfg, self.mesh, self.shape, self.adapter)
        model = load()
        if files := [path for path in (cfg.model.path, cfg.peft.path) if path]:
            start, where = nnx.to_pure_dict(nnx.state(model)), " and ".join(files)
            check_finite(start, self.shape, where, "start from weights that are")
        if cfg.verb.critic:
            add_critic(model, cfg, load)
        _, trained, rest = nnx.split(model, trained_by(self.adapter), ...)
        shapes = self.frozen["weights"] if self.keeps_reference else self.frozen
        trained = jax.device_put(nnx.to_pure_dict(trained), shardings_of(self.state.trainable))
        return trained, jax.device_put(nnx.to_pure_dict(rest), shardings_of(shapes))

    def with_reference(self, trainable: Any, frozen: Any) -> Any:
        """The `frozen` argument of a step: the frozen weights, and the reference's copies."""
        if not self.keeps_reference:
            return frozen
        copy = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=shardings_of(self.copied))
        return {"weights": frozen, "reference": copy(_common(trainable, self.copied))}


def with_length(cfg: TrainConfig, shape: ModelConfig, adapter: Adapter) -> TrainConfig:
    """The config with data.max_length: if not given, 1,024 or the positions that the model has
    besides virtual tokens and completions, whichever is less."""
    if cfg.data.max_length is not None:
        return cfg
    left = shape.max_positions - adapter.length - cfg.verb.online * cfg.rl.max_new_tokens
    length = min(cfg.data.length, left) if left > 1 else cfg.data.length  # else: an error later
    return replace(cfg, data=replace(cfg.data, max_length=length))


def with_router_losses(
    cfg: TrainConfig, shape: ModelConfig, hf_config: dict[str, Any]
) -> TrainConfig:
    """The config with model.balance_loss: if not given, what transformers adds to the loss.

    Raises UserError for a key of routers that the model cannot follow.
    """
    model, known = cfg.model, normalised(hf_config)
    for key in ("balance_loss", "router_z_loss", "router_bias_rate"):
        if shape.experts is None and getattr(model, key):
            raise UserError(f"model.{key} is for mixtures of experts; this model has none")
    if model.router_bias_rate and not (shape.experts and shape.experts.has_bias):
        kind = f"the routers of {shape.family} have no bias"
        raise UserError(f"model.router_bias_rate: {kind}; use model.balance_loss")
    given = model.balance_loss
    if given is None:
        on = shape.experts and not shape.scores and known.get("output_router_logits")
        given = float(known.get("router_aux_loss_coef") or 0.0) if on else 0.0
    return replace(cfg, model=replace(model, balance_loss=given))


def added_losses(model: ModelSection) -> dict[str, float]:
    """{metric: coefficient} of the losses of routers and of multi-token prediction."""
    losses = {"balance_loss": model.balance_loss, "router_z_loss": model.router_z_loss}
    losses["mtp_loss"] = model.mtp_loss
    return {name: coefficient for name, coefficient in losses.items() if coefficient}


def build(cfg: TrainConfig, mesh: Mesh, own: Callable[..., Any] | None = None) -> Program:
    """The program of a resolved config; its `cfg` has data.max_length. own: replaces the loss of
    its objective.

    Raises UserError for a model, a module or a combination that does not exist.
    """
    if cfg.model.remat == "offload":
        check_offload(mesh)
    shape, hf_config = model_config(cfg)
    adapter = make_adapter(shape, started_from(cfg))
    cfg = with_router_losses(with_length(cfg, shape, adapter), shape, hf_config)
    if cfg.model.router_bias_rate and adapter.frozen:
        raise UserError("model.router_bias_rate: an adapter's base is not trained; set it to 0")
    count, parts = shape.experts.count if shape.experts else 0, mesh.shape["expert"]
    if parts > 1 and (count == 0 or count % parts):
        seen = f"{count} experts, which do not divide by it" if count else "no experts"
        raise UserError(f"mesh.expert is {parts}; this model has {seen}; change mesh.expert")
    make = partial(abstract_model, cfg, mesh, shape, hf_config)
    program = assemble(cfg, mesh, make, adapter, make_objective(cfg, own))
    if (blocks := cfg.model.mlp_blocks) > 1:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            stacks = [getattr(program.policy, name) for name in shape.stacks]
            obstacles = [stack.mlp.obstacle(blocks) for stack in stacks if stack.mlp is not None]
        for obstacle in filter(None, obstacles):
            raise UserError(f"model.mlp_blocks: {blocks} is not possible: {obstacle}; change it")
    if mesh.shape["context"] > 1 and (obstacle := context_obstacle(shape)):
        raise UserError(f"mesh.context {mesh.shape['context']} is not possible: {obstacle}")
    if program.row_length % mesh.shape["context"]:
        raise UserError(
            f"rows of {program.row_length} tokens do not divide by mesh.context "
            f"{mesh.shape['context']}; change data.max_length or mesh.context"
        )
    return program


def assemble(
    cfg: TrainConfig,
    mesh: Mesh,
    make: Callable[[Adapter], Decoder],
    adapter: Adapter,
    objective: Objective,
) -> Program:
    """The program of a model, an adapter and an objective. make: an adapter -> the abstract model
    that has it."""

    def sized(adapter: Adapter) -> Decoder:
        model = make(adapter)
        record_shapes(model)
        return model

    policy = model = sized(adapter)
    if cfg.verb.critic:
        model = sized(adapter)
        add_critic(model, cfg, partial(sized, adapter))

    # ---- trainable and frozen weights, and their shardings
    graph, trained, rest = nnx.split(model, trained_by(adapter), ...)
    optimizer = make_optimizer(cfg.optim, lambda _: 0.0, adapter.learning_rate_ratios)
    weights, gradients, moments = state_shardings(trained, optimizer, mesh, cfg)
    trained_shapes = _shapes(nnx.to_pure_dict(trained), weights)
    frozen = _shapes(
        nnx.to_pure_dict(rest), weight_shardings(rest, mesh, replicated=cfg.mesh.zero < 3)
    )
    opt_state = _shapes(jax.eval_shape(optimizer.init, trained_shapes), moments)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    state = TrainState(step, trained_shapes, opt_state)  # type: ignore[arg-type]

    # ---- the models of a step
    reference: Any = None
    copied: Any = {}
    models = alone(graph)
    if objective.compares:
        # The base model without new adapter weights is the reference, and shares every weight.
        shares = adapter.frozen and not adapter.saved and not cfg.peft.path
        reference_graph, variables = nnx.split(sized(NO_ADAPTER if shares else adapter))
        shapes = nnx.to_pure_dict(variables)
        if not shares:
            split = _shapes(trained_shapes, weight_shardings(trained, mesh, replicated=False))
            copied = _common(split, shapes)

        def first_policy(trainable: Any, frozen: Any) -> Decoder:
            parts = _common(trainable, copied), _common(frozen, shapes)
            return merge(reference_graph, *parts)

        reference = first_policy

        if cfg.align.reference == "model":
            frozen = {"weights": frozen, "reference": copied}

            def policy_and_reference(trainable: Any, frozen: Any) -> tuple[Any, Any]:
                policy = merge(graph, trainable, frozen["weights"])
                return policy, first_policy(frozen["reference"], frozen["weights"])

            models = policy_and_reference

    def begin(weights: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), weights, optimizer.init(weights))

    return Program(
        cfg=cfg,
        mesh=mesh,
        policy=policy,
        objective=objective,
        models=models,
        reference=reference,
        copied=copied,
        state=state,
        frozen=frozen,
        shardings=StepShardings(
            mesh, weights, shardings_of(frozen), gradients, reduction(cfg.mesh, mesh)
        ),
        begin=jax.jit(begin, out_shardings=shardings_of(state), donate_argnums=0),
        evaluate=make_eval(models, objective.loss, objective.baseline),
    )


# ---- models


def model_config(cfg: TrainConfig) -> tuple[ModelConfig, dict[str, Any]]:
    """The shape of a run's model, and the HF config that describes it."""
    source = cfg.model.path or str(cfg.model.config)
    scores, weights = cfg.verb.head == "score", cfg.model.path is not None
    config, _ = source_config(source, cfg.model.overrides, scores=scores, weights=weights)
    shape = from_hf(config)
    if cfg.model.mtp_loss:
        shape = with_mtp(shape, config)
    if shape.scores and not scores:
        raise UserError(f"{source} is a reward model; {cfg.objective} trains a language model")
    return shape, config


def _options(cfg: TrainConfig, adapter: Adapter) -> dict[str, Any]:
    model = cfg.model
    return {
        "dtype": model.weight_dtype,
        "compute_dtype": model.compute_dtype,
        "remat": model.remat,
        "scan_unroll": model.scan_unroll,
        "attention": model.attention,
        "loss_blocks": model.loss_blocks,
        "mlp_blocks": model.mlp_blocks,
        "peft": adapter,
        "quantize_base": cfg.peft.quantize_base,
    }


def abstract_model(
    cfg: TrainConfig, mesh: Mesh, shape: ModelConfig, hf_config: dict[str, Any], adapter: Adapter
) -> Decoder:
    """A run's model with ShapeDtypeStructs for weights."""
    base = cfg.model.path or ""
    return hf.abstract_model(shape, mesh, hf_config, base=base, **_options(cfg, adapter))


def load_model(cfg: TrainConfig, mesh: Mesh, shape: ModelConfig, adapter: Adapter) -> Decoder:
    """The model a run starts with: that of model.path (and peft.path), or random weights."""
    options: dict[str, Any] = _options(cfg, adapter) | {"seed": cfg.seed}
    if cfg.model.path:
        return hf.load_hf(
            cfg.model.path,
            mesh=mesh,
            adapter=cfg.peft.path,
            overrides=cfg.model.overrides,
            scores=shape.scores,
            mtp=shape.mtp > 0,
            **options,
        )
    if shape.wrapper:
        raise UserError(
            f"{cfg.model.config} is of a multimodal model, which cannot be trained from scratch; "
            "set model.path, or use the config of a language model"
        )
    return hf.random_model(shape, mesh, model_config(cfg)[1], **options)


def add_critic(model: Decoder, cfg: TrainConfig, load: Callable[[], Decoder]) -> None:
    """Gives a policy its `Value`. A separate critic has a trunk of its own, made by `load`, which
    shares the policy's frozen weights."""
    trunk = None
    if cfg.rl.critic == "separate":
        trunk = load()
        policy = {path: v for path, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)}
        critic = [(path, v) for path, v in nnx.iter_graph(trunk) if isinstance(v, nnx.Variable)]
        for path, variable in critic:
            if not model.peft.trains(path, variable):
                *parents, name = map(str, path)
                setattr(reduce(getattr, parents, trunk), name, policy[path])
    model.value = Value(model.cfg.hidden_size, trunk)


def trained_by(adapter: Adapter) -> Callable[[tuple[Any, ...], Any], bool]:
    """An nnx filter of the variables that are trained, including a critic's."""

    def trains(path: tuple[Any, ...], variable: Any) -> bool:
        if path[0] != "value":
            return adapter.trains(path, variable)
        return isinstance(variable, ValueParam) or adapter.trains(path[2:], variable)

    return trains


# ---- trees of shapes


def shardings_of(tree: Any) -> Any:
    """The sharding of each array of a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def _shapes(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _common(tree: Any, like: Any) -> Any:
    """The leaves of a nested dict whose paths `like` has too."""
    both = {k: (tree[k], v) for k, v in like.items() if k in tree}
    return {k: _common(t, v) if isinstance(v, dict) else t for k, (t, v) in both.items()}
