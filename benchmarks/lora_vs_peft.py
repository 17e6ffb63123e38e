# SPDX-License-Identifier: Apache-2.0
"""LoRA (r 8, alpha 16) of SmolLM2-135M: jaxllm and peft on torch, same batch shape.

    python benchmarks/lora_vs_peft.py --model SMOLLM2_DIR [--remat full]
    python benchmarks/lora_vs_peft.py --quick     a dry run on a tiny random model

The three parts:

speed: tokens/s and peak memory of both sides in turn, with LoRA on q_proj and v_proj or on
every linear module of the layers. Memory is that of the process and includes the runtime and the
compiler. peft runs as in transformers' Trainer(bf16=True): bfloat16 autocast over weights of
--weight_dtype, fused AdamW, no KV cache, no gradient checkpointing. Rows have no padding and hold
one document each.

flops: FLOPs of jaxllm's compiled update by XLA's cost analysis, including recomputation: LoRA on
q_proj and v_proj against full training, for each remat policy.

memory: additional memory of LoRA in jaxllm's update (arguments and temporaries, by XLA's memory
analysis) against the size of A, B, their moments and gradients (by jax.eval_shape). The baseline is
an update that trains only the norm scales of the layers, minus the bytes of those scales. Its
gradients pass through the same layers, so activations cancel out. Layer inputs that are stored only
for A's gradient count as LoRA's (--remat none stores many).
"""

import argparse
import tempfile
from functools import partial

from turns import Side, add_blocks, compare, serve

TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}
PARTS = ("speed", "flops", "memory")
TINY = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def torch_step(a):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=a.weight_dtype)
    model.config.use_cache = False
    modules = TARGETS[a.targets]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    if a.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0, fused=True)
    tokens = torch.randint(0, model.config.vocab_size, (a.batch, a.length))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=a.dtype == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()
        return a.batch * a.length

    return step


def lora(a, targets: str):
    from jaxllm.config import PeftSection
    from jaxllm.hf_config import read_config
    from jaxllm.model.families import from_hf
    from jaxllm.peft.files import make_adapter

    modules = TARGETS[targets]
    names = (modules,) if isinstance(modules, str) else tuple(modules)
    section = PeftSection(method="lora", r=8, lora_alpha=16.0, target_modules=names)
    return make_adapter(from_hf(read_config(a.model)), section)


def program(a, model, chunk: int):
    """(jitted update, weights -> state, weights, frozen, batch); the model may be abstract."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxllm.config import OptimSection
    from jaxllm.data.batch import Batch
    from jaxllm.objectives.lm import lm_loss
    from jaxllm.optim import make_optimizer, make_schedule
    from jaxllm.step import TrainState, alone, make_step

    graph, weights, rest = nnx.split(model, model.peft.trains, ...)
    optim = OptimSection(learning_rate=5e-4, schedule="constant")
    schedule = make_schedule(optim, 100)
    optimizer = make_optimizer(optim, schedule)
    objective = partial(lm_loss, chunk=chunk)
    step = make_step(alone(graph), objective, optimizer, schedule, max_norm=1.0)
    tokens = np.random.default_rng(0).integers(0, model.cfg.vocab_size, (1, a.batch, a.length + 1))
    ones = np.ones((1, a.batch, a.length), np.int32)
    places = np.arange(a.length) * ones
    fields = (tokens[..., :-1], tokens[..., 1:], ones.astype(np.float32), ones, places)
    batch = Batch(*(jnp.asarray(f) for f in fields))

    def begin(params):
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    parts = nnx.to_pure_dict(weights), nnx.to_pure_dict(rest)
    return jax.jit(step, donate_argnums=0), begin, *parts, batch


def jaxllm_step(a):
    from jaxllm.libraries import hide_torch

    hide_torch()  # as a command does
    import jax

    from jaxllm.hf import load_hf

    options = dict(compute_dtype=a.dtype, remat=a.remat, scan_unroll=a.scan_unroll)
    model = load_hf(a.model, a.weight_dtype, peft=lora(a, a.targets), **options)
    update, begin, params, frozen, batch = program(a, model, chunk=512)
    del model
    state = begin(params)
    compiled = update.lower(state, frozen, batch).compile()

    def step():
        nonlocal state
        state, _ = compiled(state, frozen, batch)
        jax.block_until_ready(state)
        return a.batch * a.length

    return step


def compiled(a, plan, remat: str, unroll: int = 1, chunk: int = 512):
    """(compiled update, shapes of its state) of an abstract model."""
    import jax
    from flax import nnx

    from jaxllm.hf_config import read_config
    from jaxllm.model.decoder import Decoder
    from jaxllm.model.families import from_hf

    cfg = from_hf(read_config(a.model))
    options = dict(dtype=a.weight_dtype, compute_dtype=a.dtype, remat=remat, scan_unroll=unroll)
    model = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), peft=plan, **options))
    update, begin, params, frozen, batch = program(a, model, chunk)
    state = jax.eval_shape(begin, params)
    return update.lower(state, frozen, batch).compile(), state


def gflop(a, plan, remat: str, layers: int) -> float:
    """GFLOP of one update.

    XLA's cost analysis counts a loop body once, so the FLOPs of a layer are extrapolated from loop
    bodies of 1 and of `few` layers. The loss is set to one chunk and attention to one block, so
    that their loops have one iteration. (Unrolling all layers compiles three times longer and gives
    0.5 % less for SmolLM2, because the input of the first layer then needs no gradient.)
    """
    from jaxllm.ops import attention_blocks

    attention_blocks.CPU_BLOCK = a.length
    few = next(n for n in range(2, layers + 1) if layers % n == 0)
    one, more = (
        compiled(a, plan, remat, n, a.batch * a.length)[0].cost_analysis()["flops"] / 1e9
        for n in (1, few)
    )
    return one + (layers - 1) * (more - one) / (few - 1)


def reserved(a, plan) -> tuple[float, float]:
    """MiB of an update: (total by XLA, trained weights with moments and gradients)."""
    import jax

    step, state = compiled(a, plan, a.remat, a.scan_unroll)
    m = step.memory_analysis()
    total = m.argument_size_in_bytes + m.temp_size_in_bytes
    total += m.output_size_in_bytes - m.alias_size_in_bytes
    kept = jax.tree.leaves((state.trainable, state.opt_state))
    own = sum(x.size * x.dtype.itemsize for x in kept)
    own += sum(4 * x.size for x in jax.tree.leaves(state.trainable))  # float32 gradients
    return total / 2**20, own / 2**20


def speed(a) -> None:
    keys = ("model", "batch", "length", "dtype", "remat")
    keys += ("scan_unroll", "weight_dtype", "checkpointing")
    options = {key: getattr(a, key) for key in keys}
    for targets in TARGETS:
        sides = {n: Side(__file__, side=n, targets=targets, **options) for n in ("jaxllm", "torch")}
        compare(
            f"LoRA {targets}, {a.dtype}, remat {a.remat}",
            sides,
            a.blocks,
            a.steps,
            save=not a.quick,
        )


def flops(a) -> None:
    from jaxllm.model.adapter import NO_ADAPTER

    plan = lora(a, "q,v")
    layers = len(plan.targets[0].ranks[0])
    print("GFLOP per update, remat    LoRA q,v   full train  ratio (<= 0.72)")
    for remat in (a.remat,) if a.quick else ("none", "dots", "full"):
        ours, full = (gflop(a, p, remat, layers) for p in (plan, NO_ADAPTER))
        print(f"{remat:<26} {ours:>8.1f} {full:>12.1f} {ours / full:>16.3f}", flush=True)


def memory(a) -> None:
    from jaxllm.model.adapter import Adapter

    class Scales(Adapter):
        frozen = True

        def trains(self, path, variable):
            return path[0] == "layers" and path[-1] == "scale"

    total, own = reserved(a, Scales())
    base = total - own
    print(f"MiB above baseline {base:,.0f}  reserved  eval_shape  ratio (<= 1.10)")
    for targets in TARGETS:
        total, own = reserved(a, lora(a, targets))
        above = total - base
        print(f"{targets:<24} {above:>9.2f} {own:>11.2f} {above / own:>16.3f}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", help="a HuggingFace directory")
    p.add_argument("--quick", action="store_true", help="a tiny random model, one round")
    p.add_argument("--parts", default=",".join(PARTS), help="parts to run [%(default)s]")
    add_blocks(p)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--dtype", default="bfloat16", help="of the products, both sides [%(default)s]")
    p.add_argument("--remat", default="full", help="jaxllm: none, names, dots, full [%(default)s]")
    p.add_argument(
        "--scan_unroll", type=int, default=1, help="jaxllm: model.scan_unroll [%(default)s]"
    )
    p.add_argument("--weight_dtype", default="float32", help="base model, both sides [%(default)s]")
    p.add_argument("--checkpointing", type=int, default=0, help="torch: 0 or 1 [%(default)s]")
    p.add_argument("--side", help=argparse.SUPPRESS)
    p.add_argument("--targets", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.side:
        make = {"torch": torch_step, "jaxllm": jaxllm_step}[a.side]
        return serve(lambda: make(a))
    if not (a.model or a.quick):
        p.error("give --model, or --quick")
    with tempfile.TemporaryDirectory() as folder:
        if a.quick:
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.for_model("llama", **TINY)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            a.model, a.blocks, a.batch, a.length = folder, 1, 2, 32
        print(
            f"batch {a.batch} x {a.length}, AdamW, base {a.weight_dtype}, {a.dtype} compute, "
            f"remat {a.remat}",
            flush=True,
        )
        for part in a.parts.split(","):
            {"speed": speed, "flops": flops, "memory": memory}[part](a)
    return None


if __name__ == "__main__":
    main()
