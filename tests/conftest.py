# SPDX-License-Identifier: Apache-2.0
"""Eight host devices and no network: set before anything imports jax."""

import gc
import hashlib
import os
import signal
import sys
import time

import pytest
from runs import ENV, on_one_device, project  # noqa: F401, fixtures of every test

os.environ.update(ENV)
gc.set_threshold(200_000, 50, 100)  # else it scans millions of live traced objects
# A shell's background job ignores Ctrl-C, and nohup a closed terminal; the tests send both signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


BEGAN = time.monotonic()  # of this process

# A case for each structure of a decoder.
STRUCTURES = (
    *("llama", "llama yarn", "gemma2", "gemma3_text", "qwen3", "phi3 longrope, long", "olmo2"),
    *("olmo", "glm4", "granite", "cohere2", "nemotron", "hunyuan_v1_dense", "afmoe"),
    *("qwen2_moe", "minimax_m2", "ernie4_5_moe", "gpt_oss", "deepseek_v32", "minicpm3"),
    *("qwen3_next", "qwen3_5_text", "llama4_text", "lfm3", "lfm2_moe", "gemma4_text"),
    *("gemma4_text experts", "granitemoehybrid", "nemotron_h", "nanochat", "gpt_neox"),
    *("apertus", "phi"),
)
# Costly tests -> the cases that `make test` runs: one of each structure, way and objective. The
# other cases, and tests that have none here, run with `make sweep`; .ci/run takes those that fit.
SWEEPS = {
    "test_logits_equal_transformers": (
        *(*STRUCTURES, "olmo_hybrid", "cohere2_moe", "mimo_v2_flash"),
    ),
    "test_logits_equal_transformers_over_300_tokens": (
        *("gpt_oss", "llama4_text", "gemma4_text", "qwen3_next"),
    ),
    "test_decoding_through_the_cache_equals_transformers": (
        *("gemma2", "gpt_oss", "deepseek_v3", "qwen3_next", "lfm2", "granitemoehybrid"),
    ),
    "test_export_reloads_in_transformers_bit_for_bit": STRUCTURES,
    "test_a_config_of_our_own_builds_the_same_torch_model": STRUCTURES,
    "test_ten_steps_of_lora_equal_peft_and_adamw": ("llama",),
    "test_ten_steps_of_the_options_equal_peft_and_adamw": ("DoRA", "modules to save"),
    "test_lora_and_its_options_round_trip_with_peft": ("q and v", "rsLoRA", "embeddings and head"),
    "test_only_the_adapter_is_trained_and_checkpointed": ("lora", "prefix"),
    "test_a_mesh_with_accumulation_and_remat_does_not_change_the_other_methods": ("pissa",),
    "test_generation_with_a_cache_equals_the_full_forward_pass": ("lora",),
    "test_unstacked_layers_are_the_same_model": ("none", "lora"),
    "test_adapters_of_reward_models_go_to_peft_and_back": ("lora", "prefix"),
    "test_scores_equal_transformers_both_ways": ("llama", "gemma2", "qwen3"),
    "test_loss_and_gradients_equal_transformers": ("gemma2", "deepseek_v3", "qwen3_next"),
    "test_24_greedy_tokens_of_a_ragged_batch_equal_transformers": ("gemma4_text",),
    "test_logits_equal_transformers_over_2048_tokens": ("gemma3_text",),
    "test_logits_of_text_equal_transformers": (
        *("gemma3-300", "gemma4-7", "qwen2_5_vl-7", "qwen3_vl_moe-7", "qwen3_5-7", "llama4-7"),
    ),
    "test_greedy_tokens_equal_transformers": ("gemma3", "qwen3_vl"),
    "test_an_untouched_model_comes_out_as_it_went_in": ("gemma3", "qwen2_5_vl", "llama4"),
    "test_the_tuned_weights_are_in_the_whole_model": ("gemma3", "mistral3"),
    "test_the_names_of_the_files_are_kept_whichever_they_are": ("gemma3",),
    "test_adapters_of_ours_load_in_peft_on_the_whole_model": (
        "gemma3-all-linear, ranks, two layers",
        "qwen3_vl-q and v",
    ),
    "test_virtual_tokens_of_ours_load_in_peft_on_the_whole_model": ("prefix-gemma3",),
    "test_adapters_of_fused_parameters_round_trip_with_peft": (
        "qwen3_moe-experts and router",
        "gpt_oss-experts, router, q",
    ),
    "test_adapters_of_experts_as_modules_load_in_peft_and_come_back": ("mixtral",),
    "test_the_base_may_be_quantized": (),
    "test_training_does_not_depend_on_how_an_update_is_computed": (),
    "test_adapters_of_experts_can_be_chosen_and_decode_as_the_forward_pass_does": (),
    "test_lora_of_gpt_oss_adapts_attention": (),
    "test_lora_of_delta_nets_round_trips_with_peft_and_merges": ("qwen3_5_text-options1",),
    "test_lora_of_latent_attention_round_trips_with_peft_and_merges": ("minicpm3-options0",),
    "test_lora_over_quantized_projections_does_not_depend_on_the_mesh": (),
    "test_accumulation_remat_unrolling_and_meshes_do_not_change_a_trajectory": (),
    "test_micro_batches_and_meshes_do_not_change_dropout": (),
    "test_a_run_with_a_quantized_base_resumes_exactly": (),
    "test_a_quantized_model_equals_its_dequantized_copy": (),
    "test_the_losses_of_one_text_equal_transformers": ("mixtral-padded",),
    "test_the_division_of_an_update_changes_nothing": (),
    "test_the_bias_moves_by_the_sign_of_the_load_and_by_nothing_else": (),
    "test_routers_of_several_stacks_have_losses_and_biases": (),
    "test_adapters_train_alike_on_every_mesh": (),
    "test_ten_steps_equal_trl": ("sigmoid",),
    "test_stacks_on_a_mesh_equal_those_of_one_device": (),
    "test_the_layers_are_quantized_and_lora_is_merged": (),
    "test_decoding_with_an_adapter_equals_the_whole_forward_pass": (),
    "test_a_mesh_remat_and_micro_batches_change_nothing": ("expert 2 x tensor 2 x data 2",),
    "test_a_mesh_changes_neither_chunks_nor_weighted_inputs_of_experts": (),
    "test_lora_of_fused_experts_does_not_depend_on_the_mesh": (),
    "test_adapters_of_experts_go_to_peft_and_back_on_the_whole_model": (
        "llama4-feed_forward.router",
    ),
    "test_loss_and_gradients_of_further_tokens_equal_transformers": ("deepseek_v3",),
    "test_the_division_of_an_update_changes_no_further_token": (),
    "test_a_run_resumes_and_evaluates_without_further_tokens": (),
    "test_a_mesh_changes_neither_sinks_nor_biases_of_experts": (),
    "test_a_mesh_remat_and_micro_batches_change_no_delta_net": (),
    "test_generation_of_a_ragged_batch_equals_the_full_forward_pass": (),
    "test_lora_over_quantized_delta_nets_does_not_depend_on_the_mesh": (),
    "test_a_mesh_changes_nothing": (),
    "test_texts_of_no_more_keys_than_it_chooses_are_those_of_latent_attention": (),
    "test_keys_are_chosen_in_blocks_as_in_one": ("3",),
    "test_a_mesh_remat_and_micro_batches_change_no_choice": (),
    "test_remat_changes_no_choice": (),
    "test_training_leaves_the_indexers_as_they_are": (),
    "test_chosen_keys_never_cross_the_texts_of_a_packed_row": (),
    "test_lora_over_quantized_indexers_does_not_depend_on_the_mesh": (),
    "test_decoding_chooses_the_keys_of_the_whole_forward_pass": (),
    "test_generation_of_a_ragged_batch_on_a_mesh_equals_the_whole_forward_pass": (),
    "test_flops_of_indexers_are_those_that_xla_counts": (),
    "test_rows_that_are_split_over_devices_choose_no_keys": (),
    "test_remat_changes_nothing": (),
    "test_windows_and_ropes_by_layer_do_not_depend_on_the_mesh": (),
    "test_the_absorbed_form_equals_the_expanded_one": ("whole-stacked", "lora-stacked"),
    "test_training_leaves_the_scalars_of_layers_as_they_are": (),
    "test_decoding_with_lora_equals_the_whole_forward_pass": (),
    "test_an_export_equals_the_final_folder": (),
    "test_shared_prompts_change_neither_loss_nor_gradients": ("sequence-windows",),
    "test_a_run_gives_the_recorded_numbers": ("pretrain",),
    "test_trajectory_does_not_depend_on_how_an_update_is_computed": (
        *("accumulated, recomputed-dpo", "on eight devices-kto", "count_4", "remat_names"),
        "devices_8-count_2-remat_full",
    ),
    "test_a_run_resumes_from_its_checkpoint_exactly": (),
    "test_ten_steps_over_a_mesh_equal_those_of_one_device": (
        "tensor 4 x fsdp 2-LoRA",
        "context 4 x fsdp 2-DPO",
    ),
    "test_blocks_of_the_mlp_change_nothing": ("fsdp 8-pretrain-options0",),
    "test_dropout_is_that_of_one_device_where_rows_are_split": (),
    "test_a_prefix_precedes_rows_that_are_split": (),
    "test_an_optimizer_state_in_the_hosts_memory_changes_nothing": (),
    "test_resume_on_half_the_devices_sees_the_same_rows": (),
    "test_a_signal_changes_nothing_of_what_is_best": (),
    "test_resume_after_sigkill_is_bit_exact": (),
    "test_ppo_stopped_by_a_signal_and_then_by_its_reward_resumes_bit_for_bit": (),
    "test_ppo_of_lora_with_a_separate_critic_resumes_bit_for_bit": (),
    "test_a_policy_is_exported_without_its_critic": ("ppo",),
    "test_an_epoch_of_a_mixture_has_every_row_of_the_largest": (
        *("sizes0-weights0", "sizes0-weights1", "sizes1-weights2", "sizes2-weights0"),
    ),
    "test_splash_has_sinks": ("False-float32",),
    "test_splash_equals_blocks": (
        "heads1-dims1-40-2.0-False-False",
        "heads5-dims5-50-0.0-True-True",
    ),
    "test_a_bucket_that_cannot_be_read_is_one_line": ("eval-no network",),
    "test_longrope_follows_the_length_of_each_text_while_it_grows": (),
    "test_longrope_samples_short_and_long_texts_as_they_are_trained_on": (),
    "test_a_mistake_in_the_data_ends_all_processes": (),
    "test_a_signal_to_one_process_stops_all_at_one_step": (),
    "test_a_best_checkpoint_that_is_gone_is_named_before_the_first_step": (),
    "test_residuals_stored_as_bits_change_no_gradient": (),
    "test_ctrl_c_lets_the_run_save_once": (),
    "test_other_data_in_one_process_is_named": (),
    "test_a_run_that_ends_by_a_pending_evaluation_is_complete": (),
    "test_a_reward_model_and_a_function_are_summed": (),
    "test_a_run_ends_with_the_seconds_of_each_phase_over_its_restarts": (),
    "test_a_killed_process_ends_the_others_which_resume_on_one": (),
    "test_grpo_resumes_bit_for_bit_after_sigkill": (),
    "test_packed_rows_of_convolutions_equal_rows_of_one_text": (),
    "test_multi_token_prediction_is_written_back_byte_for_byte": (
        "deepseek_v3",
        "ernie4_5_moe",
        "qwen3_next",
    ),
    "test_packed_rows_of_state_spaces_equal_rows_of_one_text": ("granitemoehybrid",),
    "test_flops_of_state_spaces_are_those_that_xla_counts": ("granitemoehybrid",),
    "test_a_text_continues_from_the_state_wherever_it_is_cut": (),
    "test_further_tokens_are_learned": (),
    "test_transformers_drafts_with_what_was_trained": (),
    "test_each_row_of_a_batch_can_use_another_adapter": (),
    "test_dora_and_modules_to_save_cannot_be_turned_off_or_saved_as_a_model": (),
    "test_the_other_methods_train_and_load_again": (),
    "test_what_was_due_at_the_last_step_is_made_up_after_a_signal": (),
    "test_a_run_is_resumed_and_writes_the_whole_model": (),
    "test_a_reload_waits_for_a_control_but_not_for_a_click": (),
    "test_the_weight_of_the_loss_takes_no_forward_pass": (),
    "test_a_rollout_takes_milliseconds_to_reach_the_function": (),
    "test_a_score_does_not_depend_on_batch_mates_or_padding": (),
    "test_gradients_keep_the_dtype_of_their_sum_until_the_end_of_a_micro_batch": (),
    "test_other_devices_and_flags_have_their_own_programs": (),
    "test_a_run_whose_evaluation_data_changed_does_not_go_on": (),
    "test_a_resumed_run_frees_its_first_weights_before_it_restores": (),
    "test_a_device_multiplies_its_part_of_the_features": (),
    "test_lora_branches_complete_as_the_merged_model_does": (),
    "test_lora_of_recurrent_layers_round_trips_with_peft": ("lfm2-w1",),
    "test_blocks_of_mlp_and_vocabulary_change_nothing": (),
    "test_a_mesh_changes_none_of_them": (),
    "test_lora_of_other_dense_layers_round_trips_with_peft_and_merges": ("gpt_neox",),
    "test_virtual_tokens_round_trip_with_peft": (
        *("PrefixTuningConfig-mistral", "PrefixTuningConfig-gemma2"),
        *("PromptTuningConfig-mistral", "PromptTuningConfig-gemma2"),
    ),
    "test_lora_of_layers_with_and_without_experts_round_trips_with_peft": (
        "other ranks in some layers",
    ),
    "test_virtual_tokens_before_alternating_layers_round_trip_with_peft": ("PrefixTuningConfig",),
    "test_a_reward_model_that_is_not_finite_stops_the_run": ("score.weight-3e+38-words1",),
    "test_neither_padding_nor_the_division_into_micro_batches_changes_an_update": (
        "separate",
        "tokens",
    ),
    "test_prompts_are_read_by_the_fused_kernel": ("shape1",),
    "test_splash_over_a_mesh": ("True",),
    "test_completions_of_one_prompt_share_its_prefill": ("3",),
    "test_a_config_lowers_over_eight_devices": (
        *("configs/dpo/smollm2-ultrafeedback.yaml", "configs/pretrain/qwen2.5-1.5b-book.yaml"),
        *("configs/rl/smollm2-grpo.yaml", "configs/sft/stdlib-lora.yaml"),
    ),
    "test_a_program_lowers_for_devices_that_are_not_attached": (
        *("gpu-LoRA", "gpu-PPO", "tpu-pretrain", "tpu-DPO"),
    ),
    "test_a_flat_or_sparse_config_is_read_as_transformers_reads_it": (
        *("gemma3", "mistral3", "qwen3_vl", "llama4"),
    ),
    "test_a_large_model_costs_nothing_to_describe": (
        *("llama-", "deepseek_v3-0", "gpt_oss-0", "qwen3_next-", "llama4_text-0"),
        *("gemma4_text-0", "granitemoehybrid-"),
    ),
    "test_a_model_starts_equal_to_its_base_bit_for_bit": (
        *("float32-lora", "float32-pissa", "bfloat16-adapter"),
    ),
    "test_log_probabilities_and_their_gradients_equal_the_plain_ones": (
        *("all-20-3.0-1.6", "not the head-10000-0.0-0.7", "only LoRA's second-1-0.0-1.0"),
        "a tied table-20-3.0-1.0",
    ),
    "test_attention_does_not_depend_on_the_mesh": (
        *("sizes0-manual0-37-0-False", "sizes3-manual3-64-5-True", "sizes5-manual5-64-5-False"),
    ),
    "test_the_error_of_a_reward_function_names_it_and_the_record": (
        *("grpo-raises-words0", "ppo-nothing-words5", "grpo-/nowhere/judge.py:length-words7"),
    ),
    "test_every_verb_has_a_plan": ("grpo",),
    "test_a_runs_held_out_loss_is_that_of_eval_on_its_model": ("variables",),
    "test_a_completion_sees_its_prompt_and_itself_in_blocks": ("60-True",),
    "test_a_folder_in_which_another_process_trains_is_refused": ("True",),
    "test_a_second_signal_ends_a_run_at_once": ("15-15", "2-2"),
    "test_packed_rows_equal_unpacked_ones": ("prefix",),
    "test_recorded_log_probabilities_are_those_of_the_full_forward": ("warm", "filtered"),
    "test_the_reference_is_the_start_and_only_trained_weights_are_copied": (
        "all weights",
        "lora and the head",
    ),
    "test_a_program_for_an_accelerator_has_no_form_of_a_cpu": ("gpu-sizes0", "tpu-sizes1"),
    "test_values_may_have_another_head_dim": ("5-8", "12-128"),
    "test_packed_rows_equal_rows_of_one_text": ("one dense layer first", "whole", "qwen3_moe"),
    "test_a_resumed_run_does_not_compile_again": (),
    "test_a_run_of_lora_is_merged_into_the_whole_model": (),
    "test_a_run_tokenizes_nothing_after_it": (),
    "test_a_changed_template_is_refused_unless_it_is_accepted_and_more_steps_jump": (),
    "test_a_run_and_its_exports_have_multi_token_prediction": (),
    "test_the_bias_balances_the_load": (),
    "test_a_run_that_stopped_early_is_complete": (),
    "test_greedy_completions_equal_generate": (),
    "test_real_templates_render_as_in_transformers_and_none_is_refused": ("0",),
    "test_what_a_template_is_said_to_lack_is_not_in_its_rendering": ("0",),
    "test_what_is_learned_is_what_trls_training_templates_mark": ("0",),
}


@pytest.fixture(scope="module", autouse=True)
def freed_programs():
    """Compiled programs take memory mappings, of which Linux gives a process 65,530."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


def pytest_addoption(parser):
    about = "skip tests that would begin later than this; each run has another order of files"
    parser.addoption("--minutes", type=float, default=0, help=about)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    minutes = item.config.getoption("minutes")
    if minutes and time.monotonic() > BEGAN + 60 * minutes:
        pytest.skip(f"it would begin after {minutes:g} minutes")


def pytest_collection_modifyitems(config, items):
    """Files that train in a subprocess run first, because they take longest; each stays in one
    process."""
    long = {item.path for item in items if {"project", "workspace"} & set(item.fixturenames)}
    items.sort(key=lambda item: item.path not in long)
    if config.getoption("minutes"):
        seed = os.environ.get("PYTEST_XDIST_TESTRUNUID", "")  # the same in all workers
        items.sort(key=lambda item: hashlib.sha256(f"{seed}{item.path}".encode()).digest())
    unknown = {(name, case) for name, cases in SWEEPS.items() for case in (*cases, None)}
    for item in items:
        name, case = getattr(item, "originalname", item.name), getattr(item, "callspec", None)
        kept = SWEEPS.get(name)
        if kept is not None and (not kept if case is None else case.id not in kept):
            item.add_marker(pytest.mark.sweep)
        unknown -= {(name, case and case.id), (name, None)}
    if unknown and config.args == config.getini("testpaths"):  # all tests were collected
        raise pytest.UsageError(f"SWEEPS in tests/conftest.py names no test: {unknown}")
