# SPDX-License-Identifier: Apache-2.0
"""Tables of other libraries' argument names: transformers, TRL (1.16) and LLaMA-Factory.

A name has one of four outcomes: it is another name of a key (RENAMED), a rule gives its meaning
(`rules.TRANSLATED`), it has no effect here and is listed (IGNORED), or it is refused (REFUSED).
"""

from __future__ import annotations

from typing import Any

RENAMED = {
    # ---- transformers and its run_clm.py
    "config_name": "model.config",
    "tokenizer_name": "model.tokenizer",
    "train_file": "data.train",
    "train_files": "data.train",
    "validation_file": "data.eval",
    "validation_files": "data.eval",
    "block_size": "data.max_length",
    "max_seq_length": "data.max_length",
    "packing": "data.packing",
    "preprocessing_num_workers": "data.workers",
    "dataset_num_proc": "data.workers",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "optim.learning_rate",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "adam_epsilon": "optim.eps",
    "num_train_epochs": "epochs",
    "overwrite_output_dir": "overwrite",
    "resume_from_checkpoint": "resume",
    "logging_steps": "log.every",
    "eval_steps": "eval_every",
    "metric_for_best_model": "eval.metric",
    "greater_is_better": "eval.greater",
    "early_stopping_patience": "eval.patience",
    "early_stopping_threshold": "eval.min_delta",
    "load_best_model_at_end": "save.load_best",
    "save_steps": "save.every",
    "run_name": "log.run_name",
    "project": "log.project",
    # ---- PEFT, as TRL and LLaMA-Factory spell it
    "lora_r": "peft.r",
    "lora_alpha": "peft.lora_alpha",
    "peft.alpha": "peft.lora_alpha",
    "lora_dropout": "peft.lora_dropout",
    "peft.dropout": "peft.lora_dropout",
    "lora_target_modules": "peft.target_modules",
    "lora_target_parameters": "peft.target_parameters",
    "lora_modules_to_save": "peft.modules_to_save",
    "loraplus_lr_ratio": "peft.loraplus_lr_ratio",
    "use_rslora": "peft.use_rslora",
    "use_dora": "peft.use_dora",
    # ---- TRL
    "chat_template_path": "data.template",
    "chat_template_kwargs": "data.template_kwargs",
    "test_split_size": "data.eval_fraction",
    "beta": "align.beta",
    "kl_coef": "align.beta",
    "loss_weights": "align.loss_weights",
    "label_smoothing": "align.label_smoothing",
    "simpo_gamma": "align.gamma",
    "desirable_weight": "align.desirable_weight",
    "undesirable_weight": "align.undesirable_weight",
    "center_rewards_coefficient": "align.centering",
    "router_aux_loss_coef": "model.balance_loss",
    "reward_funcs": "rl.rewards",
    "reward_model_path": "rl.rewards",
    "reward_weights": "rl.reward_weights",
    "num_generations": "rl.group_size",
    "exp_name": "log.run_name",
    "response_length": "rl.max_new_tokens",
    "temperature": "rl.temperature",
    "top_p": "rl.top_p",
    "top_k": "rl.top_k",
    "min_p": "rl.min_p",
    "num_mini_batches": "rl.minibatches",
    "num_iterations": "rl.iterations",
    "num_ppo_epochs": "rl.iterations",
    "epsilon": "rl.clip",
    "epsilon_high": "rl.clip_high",
    "cliprange": "rl.clip",
    "cliprange_value": "rl.clip_value",
    "vf_coef": "rl.value_weight",
    "kl_estimator": "rl.kl",
    "gamma": "rl.discount",
    "lam": "rl.gae_lambda",
    "mask_truncated_completions": "rl.mask_truncated",
    "missing_eos_penalty": "rl.missing_eos_penalty",
    # ---- LLaMA-Factory
    "cutoff_len": "data.max_length",
    "train_on_prompt": "data.train_on_prompt",
    "default_system": "data.system",
    "early_stopping_steps": "eval.patience",
    "moe_aux_loss_coef": "model.balance_loss",
    "pref_beta": "align.beta",
    "dpo_label_smoothing": "align.label_smoothing",
    "kto_chosen_weight": "align.desirable_weight",
    "kto_rejected_weight": "align.undesirable_weight",
    "reward_model": "rl.rewards",
    "max_new_tokens": "rl.max_new_tokens",
    "ppo_epochs": "rl.iterations",
    "ppo_buffer_size": "rl.minibatches",
    "ppo_target": "rl.kl_target",
    "swanlab_project": "log.project",
    "swanlab_run_name": "log.run_name",
}

# lr_scheduler_type -> (optim.schedule, the keys of lr_scheduler_kwargs that it takes).
SCHEDULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cosine": ("cosine", ("num_cycles",)),
    "linear": ("linear", ()),
    "constant": ("constant", ()),
    "inverse_sqrt": ("inverse_sqrt", ()),
    "constant_with_warmup": ("constant", ()),
    "cosine_with_min_lr": ("cosine", ("min_lr", "min_lr_rate", "num_cycles")),
    "polynomial": ("polynomial", ("lr_end", "power")),
    "warmup_stable_decay": (
        "wsd",
        ("num_decay_steps", "min_lr_ratio", "decay_type", "warmup_type", "num_cycles"),
    ),
}
# Keys of lr_scheduler_kwargs: learning rates, our keys, and the only value of others.
RATES = ("min_lr", "lr_end")
SCHEDULE_KEYS = {"min_lr_rate": "optim.final", "min_lr_ratio": "optim.final"}
SCHEDULE_KEYS |= {"power": "optim.power", "num_decay_steps": "optim.decay"}
SCHEDULE_VALUES = {"num_cycles": 0.5, "decay_type": "linear", "warmup_type": "linear"}

# fmt: off
HF_OPTIMIZERS = dict.fromkeys(
    ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_hf",
     "paged_adamw_32bit", "adamw"), "adamw",
)
HF_OPTIMIZERS |= {"adafactor": "adafactor", "lion_32bit": "lion", "paged_lion_32bit": "lion"}
HF_OPTIMIZERS |= {"sgd": "sgd", "schedule_free_adamw": "schedule_free_adamw", "lion": "lion"}
# They round the optimizer state to 8 or 4 bits to save memory. Here it is float32.
QUANTIZED = dict.fromkeys(
    ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit"),
    "adamw",
)
QUANTIZED |= {"lion_8bit": "lion", "paged_lion_8bit": "lion"}
DPO_LOSSES = {"exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco", "sppo_hard": "sppo"}

_TRANSFORMERS = {
    "accelerator_config", "activation_checkpointing_kwargs", "attn_implementation",
    "auto_find_batch_size", "average_tokens_across_devices", "batch_eval_metrics",
    "bf16_full_eval", "data_seed", "dataloader_drop_last", "dataloader_in_order",
    "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
    "ddp_static_graph", "ddp_timeout", "debug", "do_eval", "do_predict", "do_train",
    "enable_jit_checkpoint", "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches",
    "eval_on_start", "eval_use_gather_object", "fp16_full_eval", "fsdp", "fsdp_config",
    "full_determinism", "generation_config", "generation_max_length", "generation_num_beams",
    "gradient_checkpointing_kwargs", "group_by_length", "hub_always_push", "hub_strategy",
    "include_for_metrics", "include_num_input_tokens_seen", "include_tokens_per_second",
    "keep_linebreaks", "label_names", "length_column_name", "liger_kernel_config", "local_rank",
    "log_level", "log_level_replica", "log_on_each_node", "logging_dir", "logging_first_step",
    "logging_nan_inf_filter", "low_cpu_mem_usage", "overwrite_cache", "parallelism_config",
    "per_device_eval_batch_size", "prediction_loss_only", "remove_unused_columns",
    "restore_callback_states_from_checkpoint", "save_on_each_node", "save_only_model",
    "save_safetensors", "skip_memory_metrics", "tf32", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "torch_empty_cache_steps", "trackio_bucket_id", "trackio_space_id",
    "trackio_static_space_id", "trust_remote_code", "use_cache", "use_cpu",
    "use_fast_tokenizer", "use_liger_kernel",
}
_TRL = {
    "bnb_4bit_quant_storage", "cache_implementation", "cast_lm_head_to_fp32", "discopop_tau",
    "ds3_gather_for_generation", "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min",
    "entropy_target", "eval_packing", "f_alpha_divergence_coef", "generate_during_eval",
    "ignore_bias_buffers", "is_encoder_decoder", "local_rollout_forward_batch_size",
    "log_completions", "log_completions_hub_repo", "log_multimodal", "log_unique_prompts",
    "lora_task_type", "num_completions_to_print", "num_generations_eval",
    "num_sample_generations", "pad_to_multiple_of", "pad_token", "padding_free",
    "padding_value", "precompute_ref_batch_size", "ref_model_mixup_alpha",
    "ref_model_sync_steps", "sapo_temperature_neg", "sapo_temperature_pos", "shuffle_dataset",
    "transformers_continuous_batching_config", "use_bnb_nested_quant",
    "use_transformers_continuous_batching", "use_transformers_paged", "use_vllm", "vespo_k_neg",
    "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos", "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization", "vllm_group_port", "vllm_importance_sampling_cap",
    "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
    "vllm_max_model_length", "vllm_mode", "vllm_model_impl", "vllm_server_base_url",
    "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_tensor_parallel_size",
}
_LLAMA_FACTORY = {
    "apollo_layerwise", "apollo_proj", "apollo_proj_type", "apollo_rank", "apollo_scale",
    "apollo_scale_front", "apollo_scale_type", "apollo_target", "apollo_update_interval",
    "asft_alpha", "audio_sampling_rate", "badam_mask_mode", "badam_mode", "badam_start_block",
    "badam_switch_interval", "badam_switch_mode", "badam_update_ratio", "badam_verbose",
    "buffer_size", "cache_dir", "chunk_size", "compute_accuracy", "cpu_infer",
    "crop_to_patches", "data_shared_file_system", "dataset_dir", "do_sample",
    "double_quantization", "eaft_alpha", "enable_liger_kernel", "eval_num_beams",
    "eval_on_each_dataset", "export_device", "export_legacy_format",
    "export_quantization_dataset", "export_quantization_maxlen", "export_quantization_nsamples",
    "export_size", "flash_attn", "fp8_backend", "fp8_enable_fsdp_float8_all_gather",
    "freeze_extra_modules", "freeze_language_model", "freeze_multi_modal_projector",
    "freeze_trainable_layers", "freeze_trainable_modules", "freeze_vision_tower",
    "galore_layerwise", "galore_proj_type", "galore_rank", "galore_scale", "galore_target",
    "galore_update_interval", "ignore_pad_token_for_loss", "image_do_pan_and_scan",
    "image_max_pixels", "image_min_pixels", "image_resolution",
    "include_effective_tokens_per_second", "infer_backend", "infer_dtype",
    "init_special_tokens", "kt_force_think", "kt_maxlen", "kt_mode", "kt_optimize_rule",
    "kt_use_cuda_graph", "length_penalty", "loraplus_lr_embedding", "media_dir", "mode",
    "module_dropout", "num_beams", "offload_folder", "oft_block_size", "oft_rank", "oft_target",
    "pissa_convert", "pissa_iter", "placement_strategy", "plot_loss",
    "preprocessing_batch_size", "print_param_status", "quantization_device_map",
    "ray_init_kwargs", "ray_num_workers", "ray_run_name", "ray_storage_filesystem",
    "ray_storage_path", "resources_per_worker", "sglang_config", "sglang_lora_backend",
    "sglang_maxlen", "sglang_mem_fraction", "sglang_tp_size", "skip_special_tokens",
    "split_special_tokens", "swanlab_logdir", "swanlab_workspace", "train_mm_proj_only",
    "upcast_layernorm", "upcast_lmhead_output", "use_audio_in_video", "use_kv_cache",
    "use_reentrant_gc", "use_unsloth", "use_unsloth_gc", "use_v1_kernels", "video_fps",
    "video_max_pixels", "video_maxlen", "video_min_pixels", "video_resolution", "vllm_config",
    "vllm_enforce_eager", "vllm_gpu_util", "vllm_max_lora_rank", "vllm_maxlen",
}
# fmt: on
IGNORED = frozenset(_TRANSFORMERS | _TRL | _LLAMA_FACTORY)

_TOKEN = "a token would be stored with the run; set HF_TOKEN, or run `hf auth login`"
_RANKING = "the loss is not supported; remove it"
_VOCABULARY = "the vocabulary is that of the model and its tokenizer; extend both before"
_OPTIMIZER = "this optimizer is not supported; optim.name muon and adafactor need less memory"
_REFERENCE = "the reference is the model that training starts from; remove it"
_REWARD = "give the directory of the reward model or of its adapter as rl.rewards; remove it"
_EXPORT = "use `jaxllm export RUN OUT`, with --merge for an adapter"
OFF = (None, False, 0, "", [], {})
# What would change the result and is not supported: name -> (why, or what to use instead; values
# besides those of OFF that change nothing).
REFUSED: dict[str, tuple[Any, ...]] = {
    # ---- transformers
    "config_overrides": ("use model.overrides",),
    "hub_revision": ("final/ is pushed to the main branch; remove it",),
    "hub_token": (_TOKEN,),
    "ignore_data_skip": ("a resumed run continues at its position in the data; remove it",),
    "label_smoothing_factor": (
        "label smoothing is not supported for language modeling; remove it",
    ),
    "neftune_noise_alpha": ("NEFTune is not supported; remove it",),
    "optim_args": ("use optim.options",),
    "optim_target_modules": ("all weights are optimized the same way; remove it",),
    "predict_with_generate": ("use log.samples, or `jaxllm generate` after training",),
    "sortish_sampler": ("rows are packed, and their order is random; remove it",),
    # ---- TRL
    "alpha": ("AlphaPO is not supported; remove it",),
    "bnb_4bit_quant_type": ("the 4-bit type is nf4; use it", "nf4"),
    "cpo_alpha": (
        "use `jaxllm dpo` with align.loss [simpo, sft] and align.loss_weights [1, ALPHA]",
    ),
    "dataset_kwargs": ("use columns of a source of data.train",),
    "dataset_text_field": (
        "use data.train: [{path: PATH, columns: {text: NAME}}]",
        "text",
    ),
    "delta": ("a second clipping bound is not supported; remove it",),
    "entropy_coef": ("an entropy bonus is not supported; remove it",),
    "eos_token": ("set it in tokenizer_config.json, and give that directory as model.tokenizer",),
    "f_divergence_type": ("the divergence is reverse_kl; use it", "reverse_kl"),
    "generation_batch_size": ("use rl.minibatches: a rollout has batch_size x rl.minibatches",),
    "generation_kwargs": ("use rl.temperature, rl.top_k, rl.top_p and rl.min_p",),
    "importance_sampling_level": ("the ratio is that of each token; use token", "token"),
    "ld_alpha": (_RANKING, 1),
    "max_tool_calling_iterations": ("tools are not called during rollouts; remove it",),
    "model_init_kwargs": ("use model.weight_dtype, model.compute_dtype and model.attention",),
    "model_revision": ("download it (`hf download --revision`) and give its path", "main"),
    "multi_objective_aggregation": (
        "rewards are summed, then normalized; use sum_then_normalize",
        "sum_then_normalize",
    ),
    "normalize_advantages": ("advantages are those of the group; remove it",),
    "off_policy_mask_threshold": ("off-policy masking is not supported; remove it",),
    "packing_strategy": ("examples are packed whole, best fit first; use bfd", "bfd"),
    "repetition_penalty": ("a repetition penalty is not supported; remove it", 1),
    "reward_clip_range": ("clip the reward in a function of rl.rewards",),
    "rpo_alpha": ("use align.loss [sigmoid, sft] and align.loss_weights [1, ALPHA]",),
    "sft_model_path": ("it is model.path; remove it",),
    "stop_token": ("completions end at the tokenizer's end tokens; use eos", "eos"),
    "stop_token_id": ("completions end at the tokenizer's end tokens; remove it",),
    "sync_ref_model": (_REFERENCE,),
    "total_episodes": ("use epochs, or steps",),
    "top_entropy_quantile": ("all tokens are learned; remove it", 1),
    "truncation_mode": ("the end is cut off; use keep_start, or data.too_long: drop", "keep_start"),
    "use_adaptive_entropy": ("an entropy bonus is not supported; remove it",),
    "use_weighting": (_RANKING,),
    "whiten_rewards": ("advantages are whitened, not rewards; remove it",),
    "vllm_structured_outputs_regex": ("structured outputs are not supported; remove it",),
    # ---- LLaMA-Factory
    "adapter_folder": ("give the adapter's directory as peft.path",),
    "add_special_tokens": (_VOCABULARY,),
    "add_tokens": (_VOCABULARY,),
    "create_new_adapter": ("merge the old adapter with `jaxllm export --merge` before",),
    "disable_shuffling": ("the order of rows is random, by seed; remove it",),
    "export_dir": (_EXPORT,),
    "export_hub_model_id": (_EXPORT,),
    "export_quantization_bit": ("exports are not quantized; remove it",),
    "fp8": ("training in FP8 is not supported; use bf16",),
    "hf_hub_token": (_TOKEN,),
    "hyper_parallel_args": ("use the mesh section",),
    "mixture_of_depths": ("mixtures of depths are not supported; remove it",),
    "ms_hub_token": ("models come from a directory or huggingface.co; remove it",),
    "new_special_tokens": (_VOCABULARY,),
    "new_special_tokens_config": (_VOCABULARY,),
    "om_hub_token": ("models come from a directory or huggingface.co; remove it",),
    "ppo_score_norm": ("rewards are not normalized; remove it",),
    "ppo_whiten_rewards": ("advantages are whitened, not rewards; remove it",),
    "pref_bco_weight": ("use align.loss [sigmoid, bco] and align.loss_weights [1, WEIGHT]",),
    "quantization_method": ("the base is quantized to nf4 or int8; use bnb", "bnb", "bitsandbytes"),
    "quantization_type": ("the 4-bit type is nf4; use it", "nf4"),
    "ref_model": (_REFERENCE,),
    "ref_model_adapters": (_REFERENCE,),
    "ref_model_quantization_bit": (_REFERENCE,),
    "resize_vocab": (_VOCABULARY,),
    "reward_model_adapters": (_REWARD,),
    "reward_model_quantization_bit": (_REWARD,),
    "reward_model_type": ("use full, or a function in rl.rewards for an API", "full", "lora"),
    "rope_scaling": ("set it in the model's config.json, or in model.overrides with model.config",),
    "shift_attn": ("shifted sparse attention is not supported; remove it",),
    "swanlab_api_key": ("a key would be stored with the run; set SWANLAB_API_KEY",),
    "swanlab_mode": ("set SWANLAB_MODE in the environment", "cloud", "online"),
    "swanlab_lark_secret": ("notifications are not supported; remove it",),
    "swanlab_lark_webhook_url": ("notifications are not supported; remove it",),
    "tokenized_path": ("tokens are cached in data.cache_dir (see `jaxllm tokenize`); remove it",),
    "tool_format": ("the chat template renders tools; remove it, or set data.template",),
    "use_adam_mini": (_OPTIMIZER,),
    "use_apollo": (_OPTIMIZER,),
    "use_asft_loss": (_RANKING,),
    "use_badam": (_OPTIMIZER,),
    "use_dft_loss": (_RANKING,),
    "use_eaft_loss": (_RANKING,),
    "use_galore": (_OPTIMIZER,),
    "use_hyper_parallel": ("use the mesh section",),
    "use_kt": ("KTransformers is not supported; remove it",),
    "use_llama_pro": ("block expansion is not supported; use lora or full",),
    "use_mca": ("use the mesh section",),
}


def harmless(name: str) -> tuple[Any, ...]:
    """The values of a refused name that change nothing: it is off, or has its neutral value."""
    neutral = REFUSED[name][1:]
    off = (None, "", [], {}) if any(isinstance(one, int) for one in neutral) else OFF
    return (*off, *neutral)
