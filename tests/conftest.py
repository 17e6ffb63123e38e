# SPDX-License-Identifier: Apache-2.0
"""Eight host devices and no network: set before anything imports jax."""

import gc
import os
import signal
import sys

import pytest
from runs import ENV, project  # noqa: F401, a fixture of every test

os.environ.update(ENV)
gc.set_threshold(200_000, 50, 100)  # else it scans millions of live traced objects
# A shell's background job ignores Ctrl-C, and nohup a closed terminal; the tests send both signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# Tests with a case for each family, method or option -> the cases that `make test` runs. The others
# run with `make sweep` and .ci/run.
SWEEPS = {
    "test_ten_steps_of_lora_equal_peft_and_adamw": ("llama", "gemma2"),
    "test_ten_steps_of_the_options_equal_peft_and_adamw": ("DoRA", "modules to save"),
    "test_lora_and_its_options_round_trip_with_peft": (
        "q and v",
        "rsLoRA",
        "embeddings and head",
    ),
    "test_only_the_adapter_is_trained_and_checkpointed": ("lora", "dora", "prefix"),
    "test_a_mesh_with_accumulation_and_remat_does_not_change_the_other_methods": (
        "prefix",
        "pissa",
    ),
    "test_generation_with_a_cache_equals_the_full_forward_pass": ("lora", "prefix"),
    "test_unstacked_layers_are_the_same_model": ("none", "lora"),
    "test_adapters_of_reward_models_go_to_peft_and_back": ("lora", "prefix"),
    "test_scores_equal_transformers_both_ways": ("llama", "gemma2", "qwen3"),
    "test_loss_and_gradients_equal_transformers": (
        *("llama", "gemma2", "qwen3", "phi3", "cohere2", "starcoder2", "qwen2_moe", "minimax_m2"),
        *("glm4_moe", "ernie4_5_moe", "qwen2_moe some dense", "hunyuan_v1_dense", "gpt_oss"),
    ),
    "test_stacks_on_a_mesh_equal_those_of_one_device": (
        *("first-fsdp 8", "periods-data 2 x fsdp 2 x tensor 2"),
        "periods-context 2 x tensor 2 x fsdp 2",
    ),
    "test_decoding_with_an_adapter_equals_the_whole_forward_pass": (
        *("one dense layer first-none", "a period of two-lora", "a period of two-prompt"),
        "a first layer, then periods-prefix",
    ),
    "test_a_mesh_remat_and_micro_batches_change_nothing": ("fsdp 8", "data 2 x fsdp 2 x tensor 2"),
    "test_an_export_equals_the_final_folder": ("pissa, nf4",),
}


@pytest.fixture(scope="module", autouse=True)
def freed_programs():
    """Compiled programs take memory mappings, of which Linux gives a process 65,530."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items):
    """Files that train in a subprocess run first, because they take longest; each stays in one
    process."""
    long = {item.path for item in items if {"project", "workspace"} & set(item.fixturenames)}
    items.sort(key=lambda item: item.path not in long)
    for item in items:
        kept = SWEEPS.get(getattr(item, "originalname", item.name))
        if kept is not None and item.callspec.id not in kept:
            item.add_marker(pytest.mark.sweep)
