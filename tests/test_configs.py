# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/ is a run that loads, agrees with itself and lowers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.config import load_config
from jaxllm.config.checks import check, resolve
from jaxllm.data.batch import TEXT, Batch, Experience
from jaxllm.mesh import axes_of, batch_sharding, data_parallel, make_mesh, param_sharding
from jaxllm.model.decoder import Decoder, merge
from jaxllm.model.families import as_reward, from_hf
from jaxllm.objectives.ppo import ValueParam
from jaxllm.objectives.table import OBJECTIVES
from jaxllm.optim import make_optimizer, make_schedule
from jaxllm.rl.online import add_critic
from jaxllm.step import TrainState, make_step, state_shardings

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
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
NUMBERS = ("weights", "margin")  # the fields that are float32; so are those of Experience


def verb(path: Path) -> str:
    """That of the folder; in rl/ the last word of the name."""
    return path.stem.rpartition("-")[2] if path.parent.name == "rl" else path.parent.name


def load(path: Path):
    return load_config(verb(path), str(path))[0]


def shape_of(source: str) -> dict:
    shape = SHAPES.get(source, source)
    return json.loads((ROOT / shape).read_text()) if isinstance(shape, str) else shape


def batch_of(cfg, mesh) -> Batch:
    """The shapes of an update's batch, [A, B, T] and of pairs [A, B, P]."""
    online, paired = cfg.verb.online, cfg.objective in ("reward", "dpo")
    count = cfg.batch_size // (cfg.micro_batch_size * data_parallel(mesh))
    length = cfg.data.max_length * (2 if paired else 1) + online * cfg.rl.max_new_tokens
    fields = dict.fromkeys(TEXT, length)
    if paired:
        fields |= dict.fromkeys(("chosen_segment", "rejected_segment", "margin"), PAIRS)
    own = set(Experience.__dataclass_fields__) - set(Batch.__dataclass_fields__)
    fields |= dict.fromkeys(own, length) if online else {}

    def field(name: str, size: int):
        dims = (count, cfg.batch_size // count, size)
        kind = jnp.float32 if name in (*NUMBERS, *own) else jnp.int32
        return jax.ShapeDtypeStruct(dims, kind, sharding=batch_sharding(mesh, dims))

    return (Experience if online else Batch)(**{n: field(n, size) for n, size in fields.items()})


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
def test_a_config_lowers_over_eight_devices(path):
    cfg = load(path)
    mesh = make_mesh(cfg.mesh)
    cfg = resolve(cfg, data_parallel(mesh))
    config = shape_of(str(cfg.model.path or cfg.model.config)) | cfg.model.overrides
    shape = from_hf(as_reward(config) if cfg.objective == "reward" else config)
    assert cfg.data.max_length <= shape.max_positions

    options = dict(dtype=cfg.model.weight_dtype, compute_dtype=cfg.model.compute_dtype)
    options |= dict(remat=cfg.model.remat, scan_unroll=cfg.model.scan_unroll)

    def make() -> Decoder:
        model = Decoder(shape, rngs=nnx.Rngs(0), **options)
        if cfg.objective == "ppo":
            add_critic(model, cfg, lambda: Decoder(shape, rngs=nnx.Rngs(1), **options))
        return model

    graph, weights = nnx.split(nnx.eval_shape(make), nnx.Any(nnx.Param, ValueParam))
    weights = jax.tree.map(
        lambda v: v.replace(
            jax.ShapeDtypeStruct(
                v.get_value().shape,
                v.get_value().dtype,
                sharding=param_sharding(mesh, axes_of(v), v.get_value().shape),
            )
        ),
        weights,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    params = nnx.to_pure_dict(weights)
    schedule = make_schedule(cfg.optim, cfg.steps or 10_000)
    optimizer = make_optimizer(cfg.optim, schedule)
    _, gradient_layout, moment_layout = state_shardings(weights, optimizer, mesh, cfg.mesh.zero)
    moments = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(optimizer.init, params),
        moment_layout,
    )
    batch = batch_of(cfg, mesh)
    objective = OBJECTIVES[cfg.objective](cfg)

    def models(trainable, frozen):
        model = merge(graph, trainable, frozen)
        return model, model if objective.compares else None

    step = make_step(
        models,
        objective.loss,
        optimizer,
        schedule,
        max_norm=cfg.optim.clip,
        gradient_shardings=gradient_layout,
    )
    at = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(TrainState(at, params, moments), {}, batch)
    (state, _) = lowered.out_info
    assert [x.shape for x in jax.tree.leaves(state.trainable)] == [
        x.shape for x in jax.tree.leaves(params)
    ]


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
