# SPDX-License-Identifier: Apache-2.0
"""jaxllm and transformers with torch.compile on one GPU: same packed rows, same card, same run.

    python benchmarks/gpu.py --out benchmarks/results [--shape llama-1b] [--budget 420]
    python benchmarks/gpu.py --tiny --out gpu.json             dry run, also on a CPU

Stages:

    attention  each kernel of jaxllm/ops/attention_gpu.py and the XLA form on packed segments: time,
               and error of output and gradients relative to XLA in float32
    full       full training: bfloat16 compute, float32 weights, AdamW, gradient clipping
    lora       r 8 on every linear module of the layers, bfloat16 base model
    dpo        as lora, with segments as pairs and the base model as the reference

The backward pass recomputes nothing (jaxllm: unless --remat). The torch side uses bfloat16
autocast, fused AdamW and torch.compile of the full model. Its attention is one of

    packed     sdpa with a segment mask
    causal     sdpa's flash kernel over complete rows, so documents attend to each other
    flex       flex_attention

Each stage runs in its own process, one after another. tokens/s is real tokens over the median step
time. MFU counts 6 FLOPs (lora: 4) per parameter and token, plus attention within segments,
against the card's dense bfloat16 peak. Results are written after each stage; a stage that fails or
runs out of time is recorded with its error.
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
import types
from functools import partial
from importlib import metadata
from pathlib import Path

WIDTHS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim"
).split()
SHAPES = {
    "llama-1b": (128256, 2048, 8192, 16, 32, 8, 64),
    "tiny": (512, 128, 256, 2, 4, 2, 32),
}
COMMON = dict(model_type="llama", max_position_embeddings=8192, tie_word_embeddings=True)
COMMON |= dict(rms_norm_eps=1e-5, rope_theta=500_000.0)
KERNELS = ("xla", "mosaic", "triton")
# Most important stages first, in case time runs out. "best": the fastest kernel of `attention`.
STAGES = [
    "attention",
    "full jaxllm kernel=best",
    "full torch attention=packed",
    "lora jaxllm kernel=best",
    "lora torch attention=packed",
    "dpo jaxllm kernel=best",
    "dpo torch attention=packed",
    "full torch attention=causal",
    "full jaxllm kernel=best chunk=4096",
    "full jaxllm kernel=xla",
    "full torch attention=flex",
]
OPTIONS = dict(batch=4, length=2048, segments=6, batches=4, warmup=3, steps=12, chunk=512)
OPTIONS |= {"remat": "none"}  # jaxllm only, like chunk: tokens projected to logits at a time
BETA = 0.1
LIMIT = 170  # maximum seconds of a stage
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, SXM


# ---- rows, the same for both sides


def shape(a) -> dict:
    return COMMON | dict(zip(WIDTHS, SHAPES[a.shape], strict=True))


def rows(a, seed: int) -> dict:
    """Packed rows as numpy arrays [B, T]: a.segments documents of random tokens per row, with
    padding in every second row. `weights` is 0 where the next token belongs to another document.
    For DPO, segments 1, 3, … are chosen and 2, 4, … rejected."""
    import numpy as np

    rng = np.random.default_rng(seed)
    B, T = a.batch, a.length
    out: dict = {name: np.zeros((B, T), np.int32) for name in ("segment_ids", "positions")}
    out["tokens"] = rng.integers(0, shape(a)["vocab_size"], (B, T), dtype=np.int32)
    for row in range(B):
        stop = T - (T // 64 if row % 2 else 0)
        cuts = np.sort(rng.choice(np.arange(8, stop - 8, 8), a.segments - 1, replace=False))
        edges = [0, *cuts.tolist(), stop]
        for index, (first, end) in enumerate(zip(edges, edges[1:], strict=False), 1):
            out["segment_ids"][row, first:end] = index
            out["positions"][row, first:end] = np.arange(end - first)
    out["targets"] = np.roll(out["tokens"], -1, 1)
    ids = out["segment_ids"]
    inside = (ids[:, :-1] == ids[:, 1:]) & (ids[:, 1:] > 0)
    out["weights"] = np.pad(inside, ((0, 0), (0, 1))).astype(np.float32)
    first = np.tile(np.arange(1, a.segments, 2, dtype=np.int32), (B, 1))
    return out | {"chosen_segment": first, "rejected_segment": first + 1}


def work(a, task: str, batches: list[dict]) -> tuple[float, float]:
    """(real tokens, model FLOPs) per step, averaged over the batches."""
    s = shape(a)
    Q, KV = (s[f"num_{n}_heads"] * s["head_dim"] for n in ("attention", "key_value"))
    layer = s["hidden_size"] * (2 * Q + 2 * KV + 3 * s["intermediate_size"])
    weights = s["num_hidden_layers"] * layer + s["hidden_size"] * s["vocab_size"]
    real = sum(int((b["segment_ids"] > 0).sum()) for b in batches) / len(batches)
    seen = sum(int((b["positions"] + 1)[b["segment_ids"] > 0].sum()) for b in batches)
    looks = seen / len(batches) * s["num_hidden_layers"]
    passes = {"full": 6, "lora": 4, "dpo": 6}[task]  # dpo: includes the reference's forward pass
    return real, passes * weights * real + (16 if task == "dpo" else 12) * Q * looks


def timed(a, task: str, batches: list[dict], step, began: float) -> dict:
    """Measures `step(i) -> loss`, which must block until the device is done."""
    first, ready = float(step(0)), time.perf_counter() - began
    print(f"    first step after {ready:.1f} s, loss {first:.4f}", flush=True)
    for i in range(1, a.warmup):
        step(i)
    seconds = []
    for i in range(a.steps):
        start = time.perf_counter()
        last = step(i)
        seconds.append(time.perf_counter() - start)
    (tokens, flops), middle = work(a, task, batches), statistics.median(seconds)
    peak = next((p for name, p in PEAK.items() if name in a.card), None)
    out = {"tokens_per_second": tokens / middle, "mfu": flops / middle / peak if peak else None}
    out |= {"step_ms": middle * 1e3, "step_ms_all": [round(s * 1e3, 2) for s in seconds]}
    return out | {"ready_seconds": ready, "first_loss": first, "last_loss": float(last)}


def failed(error: Exception) -> dict:
    return {"error": repr(error)[:1000], "trace": traceback.format_exc()[-3000:]}


# ---- jaxllm


def without_profiler() -> None:
    """Stubs xprof if it is missing: tokamax imports it (100 MB) only for its own benchmarks."""
    if importlib.util.find_spec("xprof") is None:
        for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["xprof.cli.tools"].get_kernel_stats_tool = None  # type: ignore


def kernels_of(compiled) -> dict:
    """The attention kernel a program runs, and the number of calls of each custom-call target."""
    found = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', compiled.as_text()))
    marks = {"mosaic_gpu": "mosaic", "gpu.triton": "triton"}
    hits = [name for mark, name in marks.items() if any(mark in call for call in found)]
    return {"ran": "+".join(hits) or "xla", "calls": found}


def attention(a) -> dict:
    """Errors and times of every kernel for one layer in bfloat16. "best" is the fastest kernel with
    errors at most four times those of the XLA implementation."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxllm.ops.attention import attention as attend

    s, rng = shape(a), np.random.default_rng(0)
    H, N, K = (s[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    batch = rows(a, 0)
    ids, places = (jnp.asarray(batch[n]) for n in ("segment_ids", "positions"))
    draws = [rng.standard_normal((a.batch, a.length, heads, K)) for heads in (H, N, N, H)]
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in draws]
    wide = [x.astype(jnp.float32) for x in narrow]
    real = (ids > 0)[..., None, None]

    def both(kernel, q, k, v, g):
        def run(q, k, v):
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            out = attend(q, k, v, ids, None, places, scale=K**-0.5, kernel=kernel)
            return jnp.where(real, out, 0)

        out, back = jax.vjp(run, q, k, v)
        return (out, *back(g))

    def measure(kernel: str, args) -> tuple[dict, list]:
        began = time.perf_counter()
        step = jax.jit(partial(both, kernel)).lower(*args).compile()
        took, out, seconds = time.perf_counter() - began, step(*args), []
        for _ in range(20):
            start = time.perf_counter()
            jax.block_until_ready(step(*args))
            seconds.append(time.perf_counter() - start)
        line = {"ms": statistics.median(seconds) * 1e3, "compile_seconds": took}
        line["temporary_gib"] = getattr(step.memory_analysis(), "temp_size_in_bytes", 0) / 2**30
        return line | kernels_of(step), [np.asarray(x, np.float64) for x in out]

    jax.config.update("jax_default_matmul_precision", "highest")
    _, exact = measure("xla", wide)
    jax.config.update("jax_default_matmul_precision", None)
    out: dict = {}
    for kernel in KERNELS:
        try:
            line, values = measure(kernel, narrow)
            for name, x, y in zip(("out", "dq", "dk", "dv"), values, exact, strict=True):
                line[f"error_{name}"] = float(np.linalg.norm(x - y) / np.linalg.norm(y))
                line[f"largest_{name}"] = float(np.max(np.abs(x - y)) / np.max(np.abs(y)))
            out[kernel] = line
        except Exception as error:
            out[kernel] = failed(error)
        print(f"    {kernel}: {json.dumps(out[kernel])[:600]}", flush=True)

    def good(kernel: str) -> bool:
        line = out[kernel]
        errors = (line[n] <= 4 * out["xla"][n] for n in line if n.startswith("error_"))
        return line.get("ran") == kernel and all(errors)

    return out | {"best": min(filter(good, KERNELS), key=lambda n: out[n]["ms"], default="xla")}


def jaxllm(a, task: str) -> dict:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxllm.config import OptimSection, PeftSection
    from jaxllm.data.batch import Batch
    from jaxllm.model.adapter import NO_ADAPTER
    from jaxllm.model.decoder import Decoder, merge
    from jaxllm.model.families import from_hf
    from jaxllm.objectives.lm import lm_loss
    from jaxllm.optim import make_optimizer, make_schedule
    from jaxllm.peft.files import make_adapter
    from jaxllm.step import TrainState, alone, make_step

    began = time.perf_counter()
    cfg = from_hf(shape(a))
    section = PeftSection(method="lora", r=8, lora_alpha=16.0, target_modules=("all-linear",))
    plan = NO_ADAPTER if task == "full" else make_adapter(cfg, section)
    dtype = jnp.float32 if task == "full" else jnp.bfloat16
    options: dict = dict(dtype=dtype, compute_dtype="bfloat16", remat=a.remat, attention=a.kernel)
    model = nnx.jit(lambda: Decoder(cfg, rngs=nnx.Rngs(0), peft=plan, **options))()
    graph, weights, rest = nnx.split(model, plan.trains, ...)
    params, frozen = nnx.to_pure_dict(weights), nnx.to_pure_dict(rest)
    del model, weights, rest
    optim = OptimSection(learning_rate=1e-4, weight_decay=0.1, schedule="constant")
    schedule = make_schedule(optim, 100)
    optimizer = make_optimizer(optim, schedule)
    batches = [rows(a, seed) for seed in range(a.batches)]
    models, objective = alone(graph), partial(lm_loss, chunk=a.chunk)
    if task == "dpo":
        from jaxllm.objectives.dpo import dpo_loss

        # The reference is the frozen base model without adapters.
        plain = nnx.graphdef(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), **options)))
        models = lambda held, base: (merge(graph, held, base), merge(plain, {}, base))  # noqa: E731
        objective = partial(dpo_loss, chunk=a.chunk, beta=BETA)
    update = make_step(models, objective, optimizer, schedule, max_norm=1.0)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
    del params
    on_device = [Batch(**{k: jnp.asarray(v)[None] for k, v in b.items()}) for b in batches]
    start = time.perf_counter()
    compiled = jax.jit(update, donate_argnums=0).lower(state, frozen, on_device[0]).compile()
    took = time.perf_counter() - start
    print(f"    compiled in {took:.1f} s, {kernels_of(compiled)}", flush=True)

    def step(i: int):
        nonlocal state
        state, metrics = compiled(state, frozen, on_device[i % len(on_device)])
        jax.block_until_ready(state)
        total, weight = metrics["loss"]
        return total / weight

    out = timed(a, task, batches, step, began)
    stats = jax.devices()[0].memory_stats() or {}
    out["peak_gib"] = stats.get("peak_bytes_in_use", 0) / 2**30
    program = getattr(compiled.memory_analysis(), "peak_memory_in_bytes", 0)
    return out | {"program_gib": program / 2**30, "compile_seconds": took} | kernels_of(compiled)


# ---- transformers


def torch_side(a, task: str) -> dict:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    config = AutoConfig.for_model(**shape(a))
    config.use_cache = False
    form = "flex_attention" if a.attention == "flex" else "sdpa"
    dtype = "float32" if task == "full" else "bfloat16"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=form, dtype=dtype)
    if task != "full":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=True)
    batches = [rows(a, seed) for seed in range(a.batches)]
    inputs = [torch_inputs(a, b, device) for b in batches]
    forward = torch.compile(model)
    loss_of = dpo_torch(a, model, inputs) if task == "dpo" else lambda i: forward(**inputs[i]).loss

    def step(i: int):
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(i % len(inputs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    out = timed(a, task, batches, step, began)
    if device == "cuda":
        out["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        with contextlib.suppress(Exception):  # the profiler may be missing
            with torch.profiler.profile() as seen:
                step(0)
            words = re.compile("flash|attention|fmha|attn|sdpa|flex", re.IGNORECASE)
            found = {e.key[:120] for e in seen.key_averages() if e.device_time_total}
            out["ran"] = sorted(filter(words.search, found))
    return out


def torch_inputs(a, batch: dict, device: str) -> dict:
    """Arguments of the model; the mask is explicit, so none is inferred from the positions."""
    import torch

    def put(x):
        return torch.from_numpy(x).to(device)

    tokens, ids = put(batch["tokens"]).long(), put(batch["segment_ids"])
    # HF shifts labels: labels[t + 1] is the target of token t.
    learned = torch.roll(put(batch["weights"]), 1, 1) > 0
    out = dict(input_ids=tokens, labels=torch.where(learned, tokens, -100))
    out["position_ids"] = put(batch["positions"]).long()
    if a.attention == "packed":
        causal = torch.ones(a.length, a.length, dtype=torch.bool, device=device).tril()
        out["attention_mask"] = ((ids[:, :, None] == ids[:, None, :]) & causal)[:, None]
    elif a.attention == "causal":  # no mask, so that sdpa uses the flash kernel
        out["position_ids"] = torch.arange(a.length, device=device)[None]
    return out


def dpo_torch(a, model, inputs):
    """i -> mean DPO loss of batch i, computed on the packed rows without unpacking the pairs."""
    import torch
    from torch.nn.functional import cross_entropy, logsigmoid

    def answers(input_ids, position_ids, labels, attention_mask=None):
        keys = dict(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask)
        logits = model(**keys).logits[:, :-1].float()
        return -cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")

    forward = torch.compile(answers)

    device = inputs[0]["labels"].device
    segments = [torch.from_numpy(rows(a, i)["segment_ids"]).to(device) for i in range(len(inputs))]

    def loss(i: int):
        ids = segments[i][:, 1:]
        with torch.no_grad(), model.disable_adapter():
            reference = forward(**inputs[i])
        delta = forward(**inputs[i]) - reference
        h = [torch.where(ids == n, delta, 0).sum(1) for n in range(1, a.segments + 1)]
        h = torch.stack([c - r for c, r in zip(h[::2], h[1::2], strict=True)])
        return -logsigmoid(BETA * h).mean()

    return loss


# ---- stages


def child(a) -> None:
    """Runs one stage in this process; the last line of output is the result."""
    task, *rest = a.stage.split()
    for key, value in (option.split("=") for option in rest[1:]):
        setattr(a, key, type(getattr(a, key))(value))
    try:
        if rest[:1] == ["torch"]:
            out = torch_side(a, task)
        else:
            without_profiler()
            out = jaxllm(a, task) if rest else attention(a)
    except Exception as error:
        out = failed(error)
    print("RESULT " + json.dumps(out), flush=True)


def spawn(a, stage: str, limit: float) -> dict:
    """Runs a stage in its own process, streams its output and returns its result."""
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    env |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TOKENIZERS_PARALLELISM": "false"}
    root = str(Path(__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(p for p in (root, env.get("PYTHONPATH")) if p)
    flags = [x for key in (*OPTIONS, "shape", "card") for x in (f"--{key}", str(getattr(a, key)))]
    command = [sys.executable, __file__, "--stage", stage, *flags]
    keys: dict = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    # A new session, so that torch's compiler processes are killed together with the stage.
    process = subprocess.Popen(command, start_new_session=True, **keys)
    timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    tail = collections.deque(maxlen=8)
    for line in process.stdout or ():
        if line.startswith("RESULT "):
            out = json.loads(line[7:])
            break
        tail.append(line.rstrip())
        if line.startswith("    ") or "Error" in line:
            print(line.rstrip()[:400], flush=True)
    else:
        why = "ended early" if timer.is_alive() else f"stopped after {limit:.0f} s"
        out = {"error": f"{why}: " + " | ".join(tail)[-1500:]}
    timer.cancel()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return out


def versions() -> dict[str, str]:
    names = "jax jaxlib flax optax torch transformers peft tokamax triton nvidia-cudnn-cu13".split()
    found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {"python": sys.version.split()[0]} | {n: found[n] for n in names if n in found}


def table(results: dict) -> None:
    print(f"\n{'stage':<36} {'tokens/s':>9} {'MFU':>6} {'ms':>8} {'GiB':>6} {'ready s':>8}  ran")
    for stage, r in results.items():
        if "step_ms" in r:
            numbers = f"{r['tokens_per_second']:>9.0f} {r['mfu'] or 0:>6.3f} {r['step_ms']:>8.1f}"
            numbers += f" {r.get('peak_gib', 0):>6.1f} {r['ready_seconds']:>8.1f}"
            print(f"{stage:<36} {numbers}  {str(r.get('ran', ''))[:60]}")
        elif "error" in r:
            print(f"{stage:<36} {r['error'][:100]}")
    print(flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", default="gpu.json", help="a JSON file, or a directory for CARD.json")
    p.add_argument("--shape", default="llama-1b", choices=SHAPES)
    p.add_argument("--tiny", action="store_true", help="dry run: tiny shape, few steps")
    p.add_argument(
        "--stages", default=",".join(STAGES), help="comma-separated stages [%(default)s]"
    )
    p.add_argument(
        "--budget", type=float, default=420, help="total seconds for all stages [%(default)s]"
    )
    for name, default in OPTIONS.items():
        p.add_argument(f"--{name}", type=type(default), default=default, help="[%(default)s]")
    for name in ("stage", "card", "kernel", "attention"):
        p.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.stage:
        child(a)
        return
    if a.tiny:
        a.shape, a.batch, a.length, a.segments, a.steps = "tiny", 2, 256, 4, 3
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.check_output(ask, text=True) if shutil.which(ask[0]) else "cpu"
    a.card = found.split("\n")[0].strip()
    out = Path(a.out)
    if out.suffix != ".json":
        out = out / (re.sub(r"\W+", "-", a.card.lower()).strip("-") + ".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    record: dict = {"card": a.card, "versions": versions(), "shape": shape(a)}
    record |= {"options": {key: getattr(a, key) for key in OPTIONS}, "stages": {}}
    print(json.dumps(record), flush=True)
    began, best, results = time.perf_counter(), "xla", record["stages"]
    for stage in a.stages.split(","):
        name = stage.replace("kernel=best", f"kernel={best}")
        if name in results:
            continue
        left = a.budget - (time.perf_counter() - began)
        print(f"== {name} ({left:.0f} s left)", flush=True)
        results[name] = {"error": "out of time"}
        if left > 20:
            results[name] = spawn(a, name, min(left, LIMIT))
        if stage == "attention":
            best = results[name].get("best", best)
        elif "jaxllm" in stage and "error" in results[name]:
            best = "xla"
        print(f"    {results[name].get('error', 'done')}; best kernel: {best}", flush=True)
        record["seconds"] = time.perf_counter() - began
        out.write_text(json.dumps(record, indent=1) + "\n")
    table(results)


if __name__ == "__main__":
    main()
