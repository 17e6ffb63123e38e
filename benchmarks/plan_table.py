# SPDX-License-Identifier: Apache-2.0
"""Plans of Llama-3.1 and of mixtures of experts on TPU pods.

The rows of Llama-3.1 are beside MaxText's figures from the same compiler.

    python benchmarks/plan_table.py [--only REGEX] [--out FILE.json]

Each row is `jaxllm plan --json` in a process of its own, a minute or two long. MaxText: its
defaults (float32 weights and Adam, full remat, scanned layers, flash attention, fsdp only),
compiled ahead of time by libtpu 0.0.52 on 2026-11-26. Peaks are `memory_analysis` of the whole
compiled step.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA = dict(model_type="llama", head_dim=128, vocab_size=128256, num_key_value_heads=8)
LLAMA |= dict(max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500_000.0)
LLAMA |= dict(tie_word_embeddings=False, hidden_act="silu")
LLAMA |= dict(rope_scaling=ROPE | dict(original_max_position_embeddings=8192))
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES = {
    name: LLAMA | dict(zip(NAMES, sizes, strict=True))
    for name, sizes in (("8B", (4096, 14336, 32, 32)), ("70B", (8192, 28672, 80, 64)))
}
EXPERTS = dict(tie_word_embeddings=False, hidden_act="silu", num_experts_per_tok=8)
SHAPES["Qwen3-30B-A3B"] = EXPERTS | dict(
    model_type="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    norm_topk_prob=True,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
)
YARN = dict(rope_type="yarn", beta_fast=32.0, beta_slow=1.0)
YARN |= dict(original_max_position_embeddings=4096)
SHAPES["gpt-oss-120b"] = EXPERTS | dict(
    model_type="gpt_oss",
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_local_experts=128,
    num_experts_per_tok=4,
    num_hidden_layers=36,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    sliding_window=128,
    attention_bias=True,
    swiglu_limit=7.0,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=150_000,
    rope_scaling=YARN | dict(factor=32.0, truncate=False),
)
SHAPES["DeepSeek-V3"] = EXPERTS | dict(
    model_type="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    first_k_dense_replace=3,
    n_routed_experts=256,
    n_shared_experts=1,
    n_group=8,
    topk_group=4,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    num_hidden_layers=61,
    num_attention_heads=128,
    num_key_value_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=163840,
    rms_norm_eps=1e-6,
    rope_theta=10_000,
    rope_scaling=YARN | dict(factor=40, mscale=1.0, mscale_all_dim=1.0),
)
LORA = "--peft.method lora --peft.r 16 --peft.target_modules all-linear"
ATTENTION = "--peft.method lora --peft.r 16 --peft.target_modules ["
BLOCKS = "--model.mlp_blocks 7"
INPUTS = "--model.remat offload"
MOMENTS = "--optim.offload true"
# (shape, topology, rows a device, tokens of a row, flags, MaxText's peak GiB, its wire GiB a step)
ROWS = [
    ("8B", "v5p:4x4x4", 2, 8192, "", 14.54, 54.1),
    ("8B", "v5p:4x4x4", 2, 8192, "--model.mlp_blocks 4", None, None),
    ("8B", "v5p:4x4x4", 2, 8192, INPUTS, None, None),
    ("8B", "v6e:16x16", 1, 8192, "", 7.49, 54.7),
    ("8B", "v6e:16x16", 1, 8192, BLOCKS, None, None),
    ("70B", "v5p:8x8x8", 1, 8192, "", 18.55, None),
    ("70B", "v5p:8x8x8", 1, 8192, BLOCKS, None, None),
    ("70B", "v5p:8x8x8", 1, 8192, f"{BLOCKS} {MOMENTS}", None, None),
    ("70B", "v5p:8x8x8", 1, 8192, f"{BLOCKS} {INPUTS}", None, None),
    ("70B", "v6e:16x16", 2, 8192, "", 34.8, None),
    ("70B", "v6e:16x16", 2, 8192, BLOCKS, None, None),
    ("70B", "v6e:16x16", 2, 8192, f"{BLOCKS} {INPUTS}", None, None),
    ("70B", "v5e:16x16", 1, 4096, LORA, None, None),
    ("Qwen3-30B-A3B", "v5p:4x4x4", 1, 4096, "", None, None),
    ("Qwen3-30B-A3B", "v5p:4x4x4", 1, 4096, "--mesh.fsdp 16 --mesh.expert 4", None, None),
    ("Qwen3-30B-A3B", "v6e:4x4", 1, 4096, LORA, None, None),
    ("gpt-oss-120b", "v5p:4x4x4", 1, 4096, f"{ATTENTION}q_proj,k_proj,v_proj,o_proj]", None, None),
    ("DeepSeek-V3", "v5p:8x8x8", 1, 4096, f"{ATTENTION}q_a_proj,q_b_proj,o_proj]", None, None),
    (
        *("DeepSeek-V3", "v5p:8x8x8", 1, 4096),
        f"--mesh.fsdp 64 --mesh.expert 8 {ATTENTION}q_a_proj,q_b_proj,o_proj]",
        *(None, None),
    ),
]
HEAD = (
    "| model | topology | rows x tokens | flags | GiB a device | of | wire GiB | bound ms | MFU | "
)
HEAD += "MaxText GiB | MaxText wire | planned in s |"


def devices(topology: str) -> int:
    count = 1
    for size in topology.partition(":")[2].split("x"):
        count *= int(size)
    return count


def run(shape: str, topology: str, rows: int, length: int, flags: str) -> dict:
    """The plan of a row; {"error": the last line} if it could not be made."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(SHAPES[shape]))
        command = [sys.executable, "-m", "jaxllm", "plan", "--objective", "sft", "--json"]
        command += ["--model.config", str(file), "--topology", topology, "--length", str(length)]
        command += ["--batch_size", str(rows * devices(topology))]
        command += ["--model.compute_dtype", "bfloat16", *flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1:]
    return json.loads(done.stdout) if done.returncode == 0 else {"error": "".join(last)}


def line(row: tuple, found: dict, seconds: float) -> str:
    shape, topology, rows, length, flags, peak, wire = row
    start = [shape, topology, f"{rows} x {length:,}", f"`{flags}`" if flags else ""]
    if "error" in found:
        cells = [found["error"], "", "", "", ""]
    else:
        fits = "" if found["fits"] else " (does not fit)"
        cells = [f"{found['peak_gib']:.2f}{fits}", f"{found['hbm_gib']:.2f}"]
        cells += [f"{found['wire_gib']:.1f}", f"{1000 * found['seconds_bound']:,.0f}"]
        cells += [f"{found['mfu']:.0%}"]
    theirs = ["" if number is None else f"{number:g}" for number in (peak, wire)]
    return f"| {' | '.join([*start, *cells, *theirs, f'{seconds:.0f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="rows whose model, topology and flags match")
    parser.add_argument("--out", help="file for the plans as JSON")
    options = parser.parse_args()
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    plans = []
    for row in ROWS:
        if not re.search(options.only, " ".join(map(str, row[:5]))):
            continue
        began = time.perf_counter()
        found = run(*row[:5])
        print(line(row, found, time.perf_counter() - began), flush=True)
        plans.append({"model": row[0], "rows": row[2], "flags": row[4], **found})
    if options.out:
        Path(options.out).write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
