# SPDX-License-Identifier: Apache-2.0
"""Plans of Llama-3.1 on TPU pods, beside MaxText's figures from the same compiler.

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
LORA = "--peft.method lora --peft.r 16 --peft.target_modules all-linear"
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
