# SPDX-License-Identifier: Apache-2.0
"""Eight host devices and no network: set before anything imports jax."""

import os

import pytest
from runs import ENV, project  # noqa: F401, a fixture of every test

os.environ.update(ENV)

# Tests of the same over many families, methods or options, and the cases of each that `make test`
# runs; `make sweep` and .ci/run run the others.
SWEEPS = {
    "test_ten_steps_of_lora_equal_peft_and_adamw": ("llama", "gemma2"),
    "test_ten_steps_of_each_option_equal_peft_and_adamw": ("DoRA", "modules to save"),
    "test_lora_and_its_options_go_both_ways": ("q and v", "rsLoRA", "embeddings and head"),
    "test_only_what_is_asked_is_trained_and_kept": ("lora", "dora", "prefix"),
    "test_the_other_methods_on_a_mesh_accumulated_with_remat": ("prefix", "pissa"),
    "test_generation_with_a_cache_equals_the_whole_pass": ("lora", "prefix"),
    "test_unstacked_layers_are_the_same_model": ("none", "lora"),
    "test_adapters_of_reward_models_go_to_peft_and_back": ("lora", "prefix"),
    "test_scores_equal_transformers_both_ways": ("llama", "gemma2", "qwen3"),
    "test_loss_and_gradients_equal_transformers": ("llama", "gemma2", "qwen3", "phi3"),
    "test_what_is_exported_is_what_final_holds": ("dora", "pissa, nf4"),
}


def pytest_collection_modifyitems(items):
    """Files with whole runs come first: they take longest, and a file stays in one process."""
    long = {item.path for item in items if {"project", "workspace"} & set(item.fixturenames)}
    items.sort(key=lambda item: item.path not in long)
    for item in items:
        kept = SWEEPS.get(getattr(item, "originalname", item.name))
        if kept is not None and item.callspec.id not in kept:
            item.add_marker(pytest.mark.sweep)
