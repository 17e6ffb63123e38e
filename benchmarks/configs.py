# SPDX-License-Identifier: Apache-2.0
"""Time, memory and result of the files in configs/: the tables of docs/configs.md.

    python benchmarks/configs.py             # write the tables from results/configs.json
    python benchmarks/configs.py measure     # first train the configs of the demo, on this CPU
    python benchmarks/configs.py plan        # first plan the others

Measurements need the text and the tokenizer of README.md, and an idle machine. Each config trains
in a process of its own, without a compilation cache. Plans read no weights or data: the shapes
of the models are below.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "configs.json"
PAGE = ROOT / "docs" / "configs.md"
MARK = "<!-- made by benchmarks/configs.py: do not edit below -->\n"
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
SMOLLM2 = LLAMA | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
}
QWEN = SMOLLM2 | {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
}
MEASURED = (  # in the order in which they need each other
    "pretrain/stdlib-tiny",
    "sft/stdlib-tiny",
    "sft/stdlib-lora",
    "reward/stdlib-tiny",
    "dpo/stdlib-tiny",
)
PLANNED = {  # config: (shape, devices)
    "pretrain/smollm2-135m": (SMOLLM2, "h100:8x1"),
    "pretrain/qwen2.5-1.5b-book": (QWEN, "h100:1x1"),
    "sft/smollm2-alpaca": (SMOLLM2, "h100:1x1"),
    "sft/qwen2.5-1.5b-book": (QWEN, "h100:1x1"),
    "reward/smollm2-ultrafeedback": (SMOLLM2, "h100:1x1"),
    "dpo/smollm2-ultrafeedback": (SMOLLM2, "h100:1x1"),
    "rl/smollm2-grpo": (SMOLLM2, "h100:1x1"),
    "rl/smollm2-ppo": (SMOLLM2, "h100:1x1"),
}


def verb(config: str) -> str:
    """The command that runs a config: its folder, in rl/ the last word of its name."""
    folder, _, name = config.partition("/")
    return name.rpartition("-")[2] if folder == "rl" else folder


def processor() -> str:
    """Cores, model and widest vector instructions of this machine."""
    from turns import WIDEST, cpu, widest  # beside this file

    found = cpu()
    kind = WIDEST.get(flag := widest(found), flag)
    return f"{len(os.sched_getaffinity(0))} cores of an {found.get('Model name', 'CPU')} ({kind})"


def measure(config: str) -> dict:
    """Trains a config of the demo: seconds of the whole command, GiB, the last evaluation."""
    command = [sys.executable, "-m", "jaxllm", verb(config), f"configs/{config}.yaml"]
    began = time.perf_counter()
    subprocess.run([*command, "--overwrite", "--log.compile_cache", "off"], check=True, cwd=ROOT)
    seconds = time.perf_counter() - began
    (folder,) = re.findall(r"^output_dir: (\S+)", (ROOT / command[4]).read_text(), re.MULTILINE)
    lines = [
        json.loads(line) for line in (ROOT / folder / "metrics.jsonl").read_text().splitlines()
    ]
    evaluation = [line for line in lines if line["kind"] == "eval"][-1]
    return {
        "hardware": processor(),
        "steps": lines[-1].get("step") or evaluation["step"],
        "seconds": round(seconds, 1),
        "gib": max(line["memory_gib"] for line in lines if line["kind"] == "train"),
        "metrics": {k: evaluation[k] for k in ("loss", "accuracy") if k in evaluation},
    }


def plan(config: str) -> dict:
    """`jaxllm plan` of a config: GiB and seconds of a step, at least."""
    shape, devices = PLANNED[config]
    text = (ROOT / "configs" / f"{config}.yaml").read_text()
    given = "path" if re.search(r"^  path: ", text, re.MULTILINE) else "config"
    steps = re.search(r"^steps: (\d+)", text, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        command = [sys.executable, "-m", "jaxllm", "plan", f"configs/{config}.yaml", "--json"]
        command += ["--objective", verb(config), f"--model.{given}", folder, "--topology", devices]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found = json.loads(done.stdout)
    return {
        "hardware": devices,
        "steps": int(steps[1]) if steps else None,
        "seconds_per_step": found["seconds_bound"],
        "gib": max([found["peak_gib"], *(found.get("rollout_peak_gib") or {}).values()]),
    }


def duration(seconds: float) -> str:
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def tables(results: dict) -> str:
    """Markdown with a row for each config: those that were measured, then those planned."""
    first = results[MEASURED[0]]
    lines = ["", "## Measured", ""]
    lines += [
        f"{first['hardware']}, {first['date']}. Time and peak memory of the whole command.",
        "",
    ]
    lines += ["| config | steps | time | GiB | held-out data |", "|---|---|---|---|---|"]
    for config in MEASURED:
        row = results[config]
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in row["metrics"].items())
        cells = [f"{row['steps']}", duration(row["seconds"]), f"{row['gib']:.1f}", metrics]
        lines.append(f"| `configs/{config}.yaml` | {' | '.join(cells)} |")
    lines += ["", "## Planned", ""]
    lines += [f"By `jaxllm plan`, {results[next(iter(PLANNED))]['date']}. Nothing was trained.", ""]
    lines += ["| config | GPUs | GiB per GPU | one step | steps | all steps |"]
    lines += ["|---|---|---|---|---|---|"]
    for config in PLANNED:
        row = results[config]
        count, each = row["steps"], row["seconds_per_step"]
        kind, _, sizes = row["hardware"].partition(":")
        cells = [f"{sizes.partition('x')[0]} x {kind.upper()}", f"{row['gib']:.1f}"]
        cells += [f"at least {duration(each)}", f"{count:,}" if count else "one epoch"]
        is_complete = count and not config.startswith("rl/")  # the plan has no time of sampling
        cells += [f"at least {duration(count * each)}" if is_complete else ""]
        lines.append(f"| `configs/{config}.yaml` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="?", choices=["measure", "plan"])
    parser.add_argument("--only", default="", help="configs that match this regex")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    names = {"measure": MEASURED, "plan": tuple(PLANNED)}.get(options.what, ())
    for config in names:
        if re.search(options.only, config):
            found = measure(config) if options.what == "measure" else plan(config)
            results[config] = {"date": datetime.date.today().isoformat(), **found}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if missing := [name for name in (*MEASURED, *PLANNED) if name not in results]:
        sys.exit(f"the tables need {', '.join(missing)} too")
    head = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(head + MARK + tables(results), encoding="utf-8")


if __name__ == "__main__":
    main()
