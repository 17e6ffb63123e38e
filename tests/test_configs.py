# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/ is a run that loads, agrees with itself and lowers."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import yaml

from jaxllm.config import load_config
from jaxllm.config.checks import check, resolve
from jaxllm.mesh import data_parallel, make_mesh
from jaxllm.program import build

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
MADE = runpy.run_path(str(ROOT / "benchmarks" / "configs.py"))
SMOLLM2, QWEN = MADE["SMOLLM2"], MADE["QWEN"]
# What config.json says where a config names the hub, or a run that comes before it.
SHAPES = {
    "HuggingFaceTB/SmolLM2-135M": SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
    "Qwen/Qwen2.5-1.5B": QWEN,
    "run/qwen2.5-1.5b-book/final": QWEN,
    "run/stdlib/pretrain/final": "configs/pretrain/stdlib-tiny.json",
    "run/stdlib/sft/final": "configs/pretrain/stdlib-tiny.json",
}
PAIRS = 4  # in a row


def verb(path: Path) -> str:
    """That of the folder; in rl/ the last word of the name."""
    return path.stem.rpartition("-")[2] if path.parent.name == "rl" else path.parent.name


def load(path: Path):
    return load_config(verb(path), str(path))[0]


def shape_of(source: str) -> dict:
    shape = SHAPES.get(source, source)
    return json.loads((ROOT / shape).read_text()) if isinstance(shape, str) else shape


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_config_loads_and_agrees_with_itself(path):
    cfg = load(path)
    check(cfg)
    assert cfg.objective == verb(path)
    assert cfg.output_dir.startswith("run/")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_config_says_what_it_takes_and_gives(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(line.strip("# ") for line in head)
    for what in ("Hardware", "Time", "Expected"):
        said = re.search(rf"{what}[^:.]*: ([^.]+)", text)
        assert said, f"no {what}"
        assert said[1] == "unmeasured" or re.search(r"\d", said[1]), said[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_config_lowers_over_eight_devices(path, tmp_path):
    cfg = load(path)
    mesh = make_mesh(cfg.mesh)
    shape = shape_of(str(cfg.model.path or cfg.model.config)) | cfg.model.overrides
    (tmp_path / "config.json").write_text(json.dumps(shape))
    model = {"path" if cfg.model.path else "config": str(tmp_path), "overrides": {}}
    cfg = replace(cfg, model=replace(cfg.model, **model))
    program = build(resolve(cfg, data_parallel(mesh)), mesh)
    assert cfg.data.max_length <= program.shape.max_positions
    assert program.adapter.method == cfg.peft.method
    length = cfg.data.max_length * (2 if cfg.verb.data in ("pairs", "judged") else 1)
    batch = program.batch(length + cfg.verb.online * cfg.rl.max_new_tokens, PAIRS)
    with jax.set_mesh(mesh):
        lowered = program.step(cfg.steps or 10_000).lower(program.state, program.frozen, batch)
    state, metrics = lowered.out_info
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, program.state)
    assert "grad_norm" in metrics


def test_the_table_of_configs_is_up_to_date():
    page = (ROOT / "docs" / "configs.md").read_text()
    results = json.loads(MADE["RESULTS"].read_text())
    made = MADE["MARK"] + MADE["tables"](results)
    assert page.endswith(made), "run `python benchmarks/configs.py`"
    for path in FILES:
        assert f"`{path.relative_to(ROOT)}`" in page


def test_the_book_config_is_its_launch_line():
    line = """
        --config_name Qwen/Qwen2.5-1.5B
        --train_files mobvoi_seq_monkey_general_open_corpus.jsonl
        --per_device_train_batch_size 16 --gradient_accumulation_steps 4 --do_train
        --output_dir run/qwen2.5-1.5b-book --evaluation_strategy no --learning_rate 1e-4
        --num_train_epochs 1 --warmup_steps 200 --logging_strategy steps --logging_steps 5
        --save_strategy steps --save_steps 100 --save_total_limit 1 --seed 12 --block_size 2048
        --bf16 --gradient_checkpointing
    """.split()
    deepspeed = ROOT / "configs" / "deepspeed" / "zero2.json"
    theirs, _ = load_config("pretrain", None, [*line, "--deepspeed", str(deepspeed)])
    assert theirs == load(ROOT / "configs" / "pretrain" / "qwen2.5-1.5b-book.yaml")


def test_every_config_is_found():
    """A file elsewhere, or with another suffix, would never be read by the tests above."""
    named = {p.relative_to(ROOT / "configs").parts[0] for p in FILES}
    assert named == {"pretrain", "sft", "reward", "dpo", "rl"}
    assert not [p for p in (ROOT / "configs").rglob("*") if p.suffix == ".yml"]
    for path in FILES:
        assert yaml.safe_load(path.read_text())["output_dir"]
