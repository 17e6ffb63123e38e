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


# A case for each structure of a decoder.
STRUCTURES = (
    *("llama", "llama yarn", "gemma2", "gemma3_text", "qwen3", "phi3 longrope, long", "olmo2"),
    *("exaone4", "glm4", "granite", "cohere2", "starcoder2", "nemotron", "hunyuan_v1_dense"),
    *("qwen2_moe", "minimax_m2", "ernie4_5_moe", "gpt_oss", "deepseek_v3", "minicpm3"),
    *("qwen3_next", "qwen3_5_text", "llama4_text", "lfm2", "gemma4_text", "gemma4_text experts"),
)
# Tests with a case for each family, method or option -> the cases that `make test` runs. The others
# run with `make sweep` and .ci/run.
SWEEPS = {
    "test_logits_equal_transformers": STRUCTURES,
    "test_logits_equal_transformers_over_300_tokens": (
        *("exaone4", "mellum", "gpt_oss", "minicpm3", "qwen3_next", "llama4_text", "gemma4_text"),
    ),
    "test_decoding_through_the_cache_equals_transformers": (
        *("gemma2", "gemma3_text", "exaone4", "cohere2", "mellum", "gpt_oss", "deepseek_v3"),
        *("qwen3_next", "llama4_text", "lfm2", "gemma4_text"),
    ),
    "test_export_reloads_in_transformers_bit_for_bit": STRUCTURES,
    "test_a_config_of_our_own_builds_the_same_torch_model": STRUCTURES,
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
        *("gemma2", "qwen3", "cohere2", "starcoder2", "minimax_m2", "qwen2_moe some dense"),
        *("gpt_oss", "deepseek_v3", "qwen3_next", "llama4_text", "lfm2", "gemma4_text"),
        "gemma4_text experts",
    ),
    "test_logits_of_text_equal_transformers": (
        *("gemma3-300", "gemma4-7", "qwen2_5_vl-7", "qwen3_vl_moe-7", "qwen3_5-7", "llama4-7"),
    ),
    "test_greedy_tokens_equal_transformers": ("gemma3", "qwen3_vl"),
    "test_an_untouched_model_comes_out_as_it_went_in": ("gemma3", "qwen2_5_vl", "llama4"),
    "test_the_tuned_weights_are_in_the_whole_model": ("gemma3", "mistral3"),
    "test_the_names_of_the_files_are_kept_whichever_they_are": ("gemma3",),
    "test_adapters_of_ours_load_in_peft_on_the_whole_model": (
        *("gemma3-all-linear, ranks, two layers", "qwen3_vl-q and v"),
        "gemma4-all-linear, ranks, two layers",
        "qwen2_5_vl-of modules that vision towers have too, one saved",
    ),
    "test_virtual_tokens_of_ours_load_in_peft_on_the_whole_model": ("prefix-gemma3",),
    "test_adapters_of_fused_parameters_round_trip_with_peft": (
        *("qwen3_moe-experts and router", "minimax_m2-all-linear"),
        *("ernie4_5_moe-experts and router", "gpt_oss-experts, router, q"),
        "llama4_text-experts, router, q",
    ),
    "test_adapters_of_experts_as_modules_load_in_peft_and_come_back": ("mixtral",),
    "test_the_base_may_be_quantized": ("nf4",),
    "test_the_losses_of_one_text_equal_transformers": ("mixtral-padded", "minimax_m2-whole"),
    "test_the_division_of_an_update_changes_nothing": ("fsdp 2 x tensor 2 x data 2",),
    "test_routers_of_several_stacks_have_losses_and_biases": (),
    "test_adapters_train_alike_on_every_mesh": (),
    "test_ten_steps_equal_trl": ("sigmoid",),
    "test_stacks_on_a_mesh_equal_those_of_one_device": ("periods-data 2 x fsdp 2 x tensor 2",),
    "test_decoding_with_an_adapter_equals_the_whole_forward_pass": (
        "a first layer, then periods-prefix",
    ),
    "test_a_mesh_remat_and_micro_batches_change_nothing": (
        *("fsdp 8", "data 2 x fsdp 2 x tensor 2", "expert 2 x tensor 2 x data 2"),
    ),
    "test_a_mesh_changes_neither_chunks_nor_weighted_inputs_of_experts": (
        "expert 2 x context 2 x fsdp 2",
    ),
    "test_lora_of_fused_experts_does_not_depend_on_the_mesh": (),
    "test_adapters_of_experts_go_to_peft_and_back_on_the_whole_model": (
        "qwen3_vl_moe-mlp.gate",
        "llama4-feed_forward.router",
    ),
    "test_loss_and_gradients_of_further_tokens_equal_transformers": ("deepseek_v3", "qwen3_next"),
    "test_the_division_of_an_update_changes_no_further_token": (
        *("micro-batches and remat", "one text a row, fsdp 2 x tensor 2"),
    ),
    "test_a_mesh_changes_neither_sinks_nor_biases_of_experts": ("expert 2 x tensor 2 x data 2",),
    "test_a_mesh_remat_and_micro_batches_change_no_delta_net": ("data 2 x fsdp 2 x tensor 2",),
    "test_lora_over_quantized_delta_nets_does_not_depend_on_the_mesh": (),
    "test_a_mesh_changes_nothing": ("keys of others-data 2 x fsdp 2 x tensor 2",),
    "test_remat_changes_nothing": ("keys of others-full",),
    "test_training_leaves_the_scalars_of_layers_as_they_are": ("keys of others",),
    "test_decoding_with_lora_equals_the_whole_forward_pass": ("nf4",),
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
