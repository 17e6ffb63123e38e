# SPDX-License-Identifier: Apache-2.0
"""FLOPs against the model's own weights and a count of every query's keys; peaks by device name."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from flax import nnx

from jaxllm.config import AlignSection, RlSection, TrainConfig
from jaxllm.model.config import Experts, LayerKind, ModelConfig
from jaxllm.model.decoder import Decoder
from jaxllm.monitor.flops import memory_gib, peak_flops, run_flops


def config(**keys):
    shape = {
        "family": "llama",
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 12,
        "max_positions": 64,
    }
    return ModelConfig(**shape | keys)


def products(cfg):
    """Weights that a token is multiplied with: every matrix, and the table where it is the head."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))), nnx.Param)
    names = {"kernel"} | ({"embedding"} if cfg.tie_embeddings else set())
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))
    return sum(leaf.size for path, leaf in leaves if path[-1].key in names)


def flops_per_token(cfg, length, objective="pretrain", align=None, rl=None, **keys):
    """FLOPs of a token that is learned."""
    run = TrainConfig(
        objective=objective, align=align or AlignSection(), rl=rl or RlSection(iterations=1)
    )
    found = run_flops(run, cfg, length, **keys)
    return found.layers + found.head


@pytest.mark.parametrize(
    ("tied", "gate"), [(True, "none"), (False, "query"), (False, "feature"), (False, "head")]
)
def test_products_with_weights_are_six_flops_a_weight(tied, gate):
    cfg = config(tie_embeddings=tied, output_gate=gate)
    without_attention = flops_per_token(cfg, 1) - 3 * 4 * 3 * 4 * 12  # one key in three layers
    assert without_attention == 6 * products(cfg)


def test_a_token_passes_its_chosen_experts_and_the_shared_one():
    shape = dict(family="qwen3_moe", qk_norm="head", tie_embeddings=False)
    cfg = config(experts=Experts(count=16, top_k=3, size=20), **shape)
    state = nnx.state(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))), nnx.Param)
    mlp = nnx.to_pure_dict(state)["layers"]["mlp"]
    held = sum(mlp[name]["kernel"].size for name in ("gate", "up", "down"))
    active = products(cfg) - held + held * 3 // 16 + mlp["router"].size
    attention = 3 * 4 * 3 * 4 * 12  # one key in three layers
    assert flops_per_token(cfg, 1) - attention == 6 * active
    shared = replace(cfg.experts, shared_size=28, shared_gate=True)
    more = flops_per_token(replace(cfg, experts=shared), 1) - flops_per_token(cfg, 1)
    assert more == 6 * 3 * (3 * 32 * 28 + 32)


def test_a_layer_without_experts_costs_its_mlp():
    shape = dict(family="qwen3_moe", experts=Experts(count=16, top_k=3, size=20))
    kinds = (LayerKind(), LayerKind(dense=True))
    mixed = config(kinds=kinds, layer_kinds=(1, 0, 0), **shape)
    more = flops_per_token(mixed, 1) - flops_per_token(config(**shape), 1)
    assert more == 6 * 32 * (3 * 48 - 3 * 3 * 20 - 16)


def test_a_module_of_multi_token_prediction_costs_a_layer_a_projection_and_the_head():
    cfg = config(tie_embeddings=False)
    more = flops_per_token(replace(cfg, mtp=1), 1) - flops_per_token(cfg, 1)
    own = products(replace(cfg, mtp=1)) - products(cfg)
    assert own > 2 * 32 * 32
    assert more == 6 * (own + 32 * 101) + 3 * 4 * 4 * 12  # one key


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_attention_counts_the_keys_that_each_query_sees(length, chunked):
    kinds = (LayerKind(), LayerKind(window=5))
    cfg = config(kinds=kinds, layer_kinds=(0, 1, 1), chunked=chunked)

    def seen(query, window):
        return query % window + 1 if chunked else min(query + 1, window)

    keys = sum(
        seen(query, kinds[kind].window or length)
        for kind in cfg.layer_kinds
        for query in range(length)
    )
    attention = keys / length * 4 * cfg.num_heads * cfg.head_dim  # q·k and p·v, 2 FLOPs each
    assert flops_per_token(cfg, length) == pytest.approx(6 * products(cfg) + 3 * attention)


def test_a_well_known_model():
    """Llama-3.1-8B at 8,192 tokens: 7.5 of its 8.03 billion weights are in products."""
    cfg = config(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        tie_embeddings=False,
    )
    attention = 6 * 32 * 4096 * 8193
    assert flops_per_token(cfg, 8192) == pytest.approx(6 * 7.504e9 + attention, rel=1e-3)


def test_the_head_counts_for_learned_tokens_and_not_for_scores():
    cfg = config()
    found = run_flops(TrainConfig(), cfg, 8)
    assert found.head == 6 * 32 * 101
    scores = run_flops(TrainConfig(objective="reward"), config(scores=True), 8)
    assert (scores.layers, scores.head) == (found.layers, 0)


PRECOMPUTED = AlignSection(reference="precomputed")
SEPARATE = RlSection(iterations=4, critic="separate")


@pytest.mark.parametrize(
    ("weights", "attention", "keys"),
    [
        (6, 3, {"objective": "sft"}),
        (4, 3, {"objective": "sft", "frozen": True}),
        (8, 4, {"objective": "dpo", "compares": True}),
        (6, 4, {"objective": "dpo", "compares": True, "frozen": True}),
        (6, 3, {"objective": "dpo", "compares": True, "align": PRECOMPUTED}),
        (12, 6, {"objective": "kto", "compares": True, "baseline": True}),
        (8, 4, {"objective": "kto", "compares": True, "baseline": True, "align": PRECOMPUTED}),
        # sampling, the policy's and the reference's log-probabilities, once for 4 updates
        (
            6 + 6 / 4,
            3 + 3 / 4,
            {"objective": "ppo", "compares": True, "rl": RlSection(iterations=4)},
        ),
        (6 + 4, 3 + 2, {"objective": "grpo"}),
        (6 + 2, 3 + 1, {"objective": "grpo", "on_policy": True}),
    ],
)
def test_forward_passes_besides_the_policys_are_counted(weights, attention, keys):
    cfg = config()
    once = 4 * 3 * 4 * 12 * (7 + 1) / 2  # a forward pass of attention in rows of 7
    want = weights * products(cfg) + attention * once
    assert flops_per_token(cfg, 7, **keys) == pytest.approx(want)


def test_a_separate_critic_is_a_model_without_a_head():
    cfg, keys = config(), {"compares": True}
    shared = run_flops(TrainConfig(objective="ppo", rl=RlSection(iterations=4)), cfg, 7, **keys)
    separate = run_flops(TrainConfig(objective="ppo", rl=SEPARATE), cfg, 7, **keys)
    plain = run_flops(TrainConfig(), cfg, 7)
    assert separate.head == shared.head
    assert separate.layers - shared.layers == pytest.approx(plain.layers * (1 + 1 / 4 / 3))


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
    ],
)
def test_peak_by_device_kind(kind, tera):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == tera * 1e12


def test_peak_of_float32_and_of_the_unknown():
    assert peak_flops(SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3"), "float32") == 494.5e12
    assert peak_flops(SimpleNamespace(device_kind="TPU v5p"), "float32") == 459e12
    assert peak_flops(SimpleNamespace(device_kind="NVIDIA L4000")) is None
    assert peak_flops(jax.devices()[0]) is None


def test_memory_is_the_fullest_devices_peak(monkeypatch):
    devices = [
        SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 << 30}),
        SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 5 << 30}),
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_gib() == 5.0


def test_memory_on_cpu_is_the_processs_peak():
    before = memory_gib()
    block = bytearray(300 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    assert 0.05 < before <= memory_gib() < 64
    del block
    assert memory_gib() >= 0.29  # a peak stays
