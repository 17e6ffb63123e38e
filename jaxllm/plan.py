# SPDX-License-Identifier: Apache-2.0
"""`jaxllm plan`: compiles a run's step for devices that need not be attached, and adds it up.

The program is the run's own (`program.build`), lowered from shapes; no weights and no data are
read. Numbers are per device, and in GiB where their name says so.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxllm import hlo, hlo_memory
from jaxllm.compilation import use_cache
from jaxllm.config import Source, TrainConfig
from jaxllm.config.checks import check, resolve
from jaxllm.errors import UserError
from jaxllm.mesh import data_parallel, make_mesh
from jaxllm.monitor.flops import Flops, forward_flops, indexer_flops, run_flops, unread_weights
from jaxllm.ops.cross_entropy import ACCELERATOR_CHUNK, BLOCKS
from jaxllm.ops.decoding import shared_length
from jaxllm.paths import as_path, hub_id
from jaxllm.peft.virtual_tokens import context_length
from jaxllm.program import Program, build
from jaxllm.rl.online import make_evaluation
from jaxllm.sampling import Sampling, decode, prefill
from jaxllm.topologies import Topology, topology

GIB = 2**30
STEPS = 1000  # of the schedule; the program is the same for any number
LARGEST = 8  # scopes at the peak that are listed


# ---- the config


def prepared(cfg: TrainConfig, length: int | None = None) -> TrainConfig:
    """The config to plan for: valid, with stand-ins for what a step does not read (data, rewards,
    tokenizer, weights).

    length: tokens of a row; default: those of the run. Raises UserError as a run would.
    """
    stand_in = cfg.model.path or cfg.model.config
    cfg = replace(
        cfg,
        data=replace(cfg.data, train=cfg.data.train or (Source("none"),)),
        rl=replace(cfg.rl, rewards=cfg.rl.rewards or ("none",) * cfg.verb.online),
        model=replace(cfg.model, tokenizer=cfg.model.tokenizer or stand_in),
    )
    if length is not None:
        new = cfg.rl.max_new_tokens
        if cfg.verb.online and length <= new + 1:
            raise UserError(f"--length {length} has no room for a prompt and {new} new tokens")
        pairs = cfg.verb.data in ("pairs", "judged")
        text = length // 2 if pairs else length - new if cfg.verb.online else length
        cfg = replace(cfg, data=replace(cfg.data, max_length=text))
    check(cfg)
    config = _config_file(cfg.model.path or str(cfg.model.config))
    return replace(cfg, model=replace(cfg.model, path=None, config=config))


def _config_file(path: str) -> str:
    """A model's directory, or the config.json of a hub id, without its weights."""
    if as_path(path).exists() or not hub_id(path):
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download(path, "config.json")
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is no directory, nor could the hub be reached: {reason}") from None


# ---- one program


@dataclass(frozen=True)
class Compiled:
    """A compiled program in numbers, for one device."""

    peak: float
    """bytes of memory at the peak, with the arguments"""
    hlo: hlo.Program | None
    """None if the compiler gave up before it wrote the program"""
    largest: dict[str, int]
    """{named scope: bytes} of temporary buffers at the peak"""
    host: int
    """bytes kept in the host's memory"""
    outputs: Any
    """shapes of the results, with shardings"""

    def sent(self, imitated: bool) -> list[hlo.Collective]:
        return hlo.collectives(self.hlo, imitated=imitated) if self.hlo else []


def compiled(run: Any, *args: Any) -> Compiled:
    """Compiles a jitted function for arguments of these shapes, and reads what XLA dumps about it.

    A program that does not fit has the peak that the compiler reports when it gives up.
    """
    lowered = run.lower(*args)
    options = {"xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": ".*"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = lowered.compile(compiler_options=options | {"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            peak, host, outputs = refused_peak(error, device_bytes(args)), 0, None
        else:
            shardings = jax.tree.leaves(done.output_shardings)
            memory = done.memory_analysis()
            peak = device_peak(memory, next(iter(shardings[0].device_set)).platform)
            host = memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes
            leaves, tree = jax.tree.flatten(lowered.out_info)
            outputs = tree.unflatten(
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
                for x, s in zip(leaves, shardings, strict=True)
            )
        dumps = {
            name: max(
                (f.read_text() for f in Path(folder).glob(f"*{name}.txt")), key=len, default=""
            )
            for name in ("after_optimizations", "buffer-assignment", "live-range")
        }
    if not dumps["after_optimizations"]:
        return Compiled(peak, None, {}, host, outputs)
    program = hlo.parse(dumps["after_optimizations"])
    largest = hlo_memory.at_peak(dumps["buffer-assignment"], dumps["live-range"], program)
    return Compiled(peak, program, largest, host, outputs)


def device_peak(memory: Any, platform: str) -> float:
    """Bytes of a device's memory at the peak, from XLA's `memory_analysis`.

    libtpu's figure also has what is in the host's memory: arguments, and temporaries if these are
    more than the device's. XLA:CPU leaves the temporary buffers, one allocation, out of it.
    """
    sizes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    sizes += memory.output_size_in_bytes - memory.alias_size_in_bytes
    if platform == "cpu":
        return float(sizes)
    if platform != "tpu":
        return float(memory.peak_memory_in_bytes)
    return float(min(memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes, sizes))


def refused_peak(error: Exception, arguments: float) -> float:
    """Bytes that a program would need for which the compiler found no room; else raises `error`.

    libtpu reports either all that is used or the temporaries, which are without the `arguments`.
    """
    found = re.search(r"(Used |HLO temporaries \()([\d.]+)([KMGT])", str(error))
    if found is None or "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    size = float(found[2]) * 1024 ** "BKMGT".index(found[3])
    return size if found[1] == "Used " else size + arguments


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what compilers write on stderr themselves, unless the block raises a bug."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except BaseException:
            held.seek(0)
            os.write(terminal, held.read()[-4000:])
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded ShapeDtypeStructs on each device, without the host's memory."""
    sharded = [x for x in jax.tree.leaves(tree) if getattr(x, "sharding", None) is not None]
    sharded = [x for x in sharded if x.sharding.memory_kind != "pinned_host"]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in sharded)


# ---- the plan


def plan(cfg: TrainConfig, topology: Topology) -> dict[str, Any]:
    """The plan of a `prepared` config, as `jaxllm plan --json` prints it."""
    began = time.perf_counter()
    use_cache("off")  # a program that is read from the cache leaves no dump
    mesh = make_mesh(cfg.mesh, list(topology.devices))
    cfg = resolve(cfg, data_parallel(mesh))
    if topology.imitated:
        cfg = as_on_gpus(cfg, mesh)
    program = build(cfg, mesh)
    new = cfg.rl.max_new_tokens if cfg.verb.online else 0
    context_length(program.shape, program.adapter, program.cfg.data.length, new)
    batch = program.batch(program.row_length)
    with jax.set_mesh(mesh):
        step = compiled(program.step(STEPS), program.state, program.frozen, batch)
        phases = rollout(program) if cfg.verb.online else {}
    found = {
        "topology": topology.name,
        "objective": cfg.objective,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "zero": cfg.mesh.zero,
        "remat": cfg.model.remat,
        "batch_size": cfg.batch_size,
        "micro_batch_size": cfg.micro_batch_size,
        "micro_batches": program.micro_batches,
        "length": program.row_length,
        "estimate": topology.estimate,
    }
    highest = max([step.peak, *phases.values()])
    found |= {
        "peak_gib": step.peak / GIB,
        "rollout_peak_gib": {name: peak / GIB for name, peak in phases.items()},
        "hbm_gib": topology.hbm_gib,
        "fits": highest <= topology.hbm_gib * GIB,
        "classes": {k: n and n / GIB for k, n in classes(program, step, batch).items()},
        "host_gib": step.host / GIB,
        "largest": {name: size / GIB for name, size in [*step.largest.items()][:LARGEST]},
    }
    found |= roofline(program, topology, step)
    return found | {"plan_seconds": time.perf_counter() - began}


def planned_for(program: Program, step: Any) -> tuple[float, float | None] | None:
    """(GiB a device, MFU at most) of the compiled step of a run on the attached devices; None on a
    CPU, whose peak is not known, and if the compiler does not give the memory.

    The MFU is None for online runs, whose rollouts are programs of their own. On a GPU it is that
    of computing alone.
    """
    platform = jax.local_devices()[0].platform
    memory = step.memory_analysis()
    if platform == "cpu" or memory is None:
        return None
    text = step.as_text() if platform == "tpu" else ""
    compiled_text = hlo.parse(text) if text else None
    numbers = Compiled(device_peak(memory, platform), compiled_text, {}, 0, None)
    if program.cfg.verb.online:
        return numbers.peak / GIB, None
    return numbers.peak / GIB, roofline(program, topology("local"), numbers)["mfu"]


def as_on_gpus(cfg: TrainConfig, mesh: Mesh) -> TrainConfig:
    """The config with explicit values for the defaults that a run on GPUs has. The CPU devices that
    stand in for them would get others."""
    model, dtype = cfg.model, cfg.mesh.reduce_dtype
    if model.remat == "offload":
        raise UserError("a plan for GPUs cannot show model.remat: offload; set it to full")
    if cfg.optim.offload:
        raise UserError("a plan for GPUs cannot show optim.offload; set it to false")
    blocks = BLOCKS if mesh.shape["fsdp"] > 1 and cfg.mesh.zero == 3 else 1
    model = replace(model, loss_blocks=model.loss_blocks or blocks)
    return replace(
        cfg,
        model=replace(model, loss_chunk=model.loss_chunk or ACCELERATOR_CHUNK),
        mesh=replace(cfg.mesh, reduce_dtype="bfloat16" if dtype == "auto" else dtype),
    )


def classes(program: Program, step: Compiled, batch: Any) -> dict[str, Any]:
    """Bytes at the peak by what they are. Temporaries are what is left: results that are not kept,
    copies and padding, and the activations if these are unknown (None)."""
    held: dict[str, Any] = {
        "parameters": device_bytes(program.state.trainable),
        "optimizer": device_bytes(program.state.opt_state),
        "frozen": device_bytes(program.frozen),
        "batch": device_bytes(batch),
    }
    shardings = program.shardings.gradients
    gradients = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s),
        program.state.trainable,
        shardings,
    )
    left = max(step.peak - sum(held.values()), 0.0)
    held["gradients"] = min(device_bytes(gradients), left)
    left -= held["gradients"]
    saved = min(hlo_memory.saved_activations(step.hlo), left) if step.hlo else None
    return held | {"activations": saved, "temporaries": left - (saved or 0.0)}


def step_flops(program: Program) -> tuple[float, float]:
    """FLOPs of an update on a device: (of the model, with what remat computes again). All tokens of
    a row count as learned."""
    cfg, length = program.cfg, program.row_length
    # Without the rollout, which is a program of its own: shared by very many updates.
    alone = replace(cfg, rl=replace(cfg.rl, iterations=10**9)) if cfg.verb.online else cfg
    flops: Flops = run_flops(
        alone,
        program.shape,
        length,
        frozen=program.adapter.frozen,
        compares=program.reference is not None,
        baseline=program.objective.baseline is not None,
        on_policy=program.objective.on_policy,
    )
    shape = program.shape
    weights, attention, head = forward_flops(shape, length)
    weights -= 2 * unread_weights(shape)
    full = weights + attention + indexer_flops(shape, length)
    again = {"full": full, "offload": full, "names": weights}.get(cfg.model.remat, 0.0)
    if cfg.model.mlp_blocks > 1 and cfg.model.remat == "none" and program.mesh.size == 1:
        # Gate and up. Elsewhere the policy of the layers decides what is saved.
        sizes = (shape.of(k).intermediate_size for k in shape.kinds_by_layer if k.mlp)
        again += 2 * (1 + shape.gated_mlp) * shape.hidden_size * sum(sizes)
    again *= 2 if cfg.verb.critic and cfg.rl.critic == "separate" else 1
    # `cross_entropy` computes logits once, `token_logps` twice if the head is trained.
    kernel = "embed" if program.policy.head is None else "head"
    twice = cfg.verb.data not in ("text", "chat") and kernel in program.state.trainable
    again += head * ((program.loss_blocks > 1) + twice)
    tokens = cfg.batch_size * length / program.mesh.size
    model = (flops.layers + flops.head) * tokens
    return model, model + again * tokens


def roofline(program: Program, topology: Topology, step: Compiled) -> dict[str, Any]:
    """Collectives, FLOPs, and the time that a step takes at least: the longest of computing, moving
    memory and sending, if they overlap completely."""
    mesh: Mesh = program.mesh
    devices = mesh.devices.flat
    sent: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0, 0.0])
    for one in step.sent(topology.imitated):
        row = sent[one.op, one.axes(mesh.shape), one.dtype]
        speed = topology.speed([devices[i] for i in one.groups[0]])
        for i, value in enumerate((one.wire, one.count, one.wire / speed)):
            row[i] += value
    rows = [
        {"op": op, "axis": axis, "dtype": dtype, "gib": wire / GIB, "count": count, "seconds": took}
        for (op, axis, dtype), (wire, count, took) in sorted(
            sent.items(), key=lambda item: -item[1][0]
        )
    ]
    model, flops = step_flops(program)
    peak = topology.flops(program.cfg.model.compute_dtype)
    moved = hlo_memory.traffic(step.hlo) if step.hlo else None
    seconds: dict[str, Any] = {
        "compute": flops / peak,
        "memory": moved and moved / (topology.chip.bandwidth or math.inf),
        "links": sum(row["seconds"] for row in rows) if step.hlo else None,
    }
    limit = max(seconds, key=lambda name: seconds[name] or 0.0)
    bound = seconds[limit]
    tokens = program.cfg.batch_size * program.row_length
    return {
        "wire_gib": sum(row["gib"] for row in rows) if step.hlo else None,
        "collectives": rows if step.hlo else None,
        "flops": flops,
        "model_flops": model,
        "seconds": seconds,
        "seconds_bound": bound,
        "bound": limit,
        "tokens_per_second": tokens / bound if bound else 0.0,
        "mfu": model / (bound * peak) if bound else 0.0,
    }


def rollout(program: Program) -> dict[str, float]:
    """{phase: bytes at its peak} of an online run's rollout, with the state that stays in memory.

    (For bfloat16 on a CPU a run also copies the layers once, see `sampling.decoding_layout`.)
    """
    cfg, mesh = program.cfg, program.mesh
    resident = device_bytes((program.state, program.frozen))
    policy = program.models(program.state.trainable, program.frozen)[0]
    graph, params = nnx.split(policy)
    parts = data_parallel(mesh)
    rows = -(-cfg.batch_size * cfg.rl.minibatches // parts) * parts
    rl, new = cfg.rl, cfg.rl.max_new_tokens
    sampling = Sampling(new, rl.temperature, rl.top_k, rl.top_p, rl.min_p, stop_ids=(0,))
    length = program.row_length
    every = replace(program, cfg=replace(cfg, batch_size=cfg.batch_size * rl.minibatches))
    tokens = jax.tree.leaves(every.batch(shared_length(cfg.data.length)).tokens)[0]
    copies = rl.group_size or 1  # as in `sampling.completions`
    copies = 1 if rows // copies % parts else copies
    shape = (rows // copies, tokens.shape[-1])
    spec = jax.sharding.PartitionSpec(*tokens.sharding.spec[1:])
    prompts = jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    begin = compiled(prefill, graph, params, prompts, prompts, key, new, sampling, None, copies)
    stop = jax.ShapeDtypeStruct((), jnp.int32)
    phases: dict[str, tuple[Compiled, Any]] = {"prefill": (begin, params)}
    if begin.outputs is not None:
        decoding = compiled(decode, graph, params, begin.outputs, key, stop, sampling)
        phases["decode"] = decoding, params
    given = program.state.trainable, program.frozen
    if not program.objective.on_policy:
        evaluation = jax.jit(make_evaluation(cfg, program.models))
        phases["log-probabilities"] = compiled(evaluation, *given, every.batch(length)), given
    return {name: one.peak + resident - device_bytes(args) for name, (one, args) in phases.items()}


# ---- the text


def text(found: dict[str, Any]) -> str:
    """A plan as `jaxllm plan` prints it."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one device"
    rows = f"{found['batch_size']} rows of {found['length']:,} tokens"
    micro = f"{found['micro_batches']} x {found['micro_batch_size']} a device"
    lines = [
        f"{found['objective']} on {found['topology']}: {found['devices']} devices, mesh {mesh}, "
        f"zero {found['zero']}, remat {found['remat']}",
        f"update: {rows} ({micro})",
    ]
    if found["estimate"]:
        lines.append(f"estimate: {found['estimate']}")
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    lines += [
        "",
        f"memory, GiB a device   {found['peak_gib']:10.4f} of {found['hbm_gib']:.2f}: {verdict}",
    ]
    lines += _table(found["classes"])
    if found["host_gib"]:
        lines += _table({"in the host's memory": found["host_gib"]})
    if found["rollout_peak_gib"]:
        lines += ["peak of the rollout", *_table(found["rollout_peak_gib"])]
    lines += ["largest temporaries at the peak", *_table(found["largest"])]
    wire = found["wire_gib"]
    sent = "unknown" if wire is None else f"{wire:10.4f} a step"
    lines += ["", f"collectives, GiB sent  {sent:>10}"]
    lines += [
        f"  {row['op']:<20} {row['gib']:10.4f} {row['count']:6} x {row['dtype']:<5} "
        f"{1000 * row['seconds']:9.2f} ms  {row['axis']}"
        for row in found["collectives"] or ()
        if row["gib"] >= 5e-5
    ]
    took = ", ".join(
        f"{name} unknown" if s is None else f"{name} {1000 * s:,.1f} ms"
        for name, s in found["seconds"].items()
    )
    bound = 1000 * found["seconds_bound"]
    flops, model = (f"{found[key] / 1e12:,.3f}" for key in ("flops", "model_flops"))
    lines += [
        "",
        f"a step takes at least {bound:,.1f} ms ({found['bound']}): {took}",
        f"  {flops} TFLOP a device, {model} of the model, the rest computed again for remat",
        f"  at most {found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.0%}",
    ]
    return "\n".join(lines)


def _table(values: dict[str, Any]) -> list[str]:
    short = {name if len(name) <= 44 else f"…{name[-43:]}": gib for name, gib in values.items()}
    return [
        f"  {name:<44} {'unknown' if gib is None else f'{gib:.4f}':>10}"
        for name, gib in short.items()
        if gib is None or gib >= 5e-5
    ]
