# SPDX-License-Identifier: Apache-2.0
"""Every argument of TRL and LLaMA-Factory is read, listed as having no effect, or refused; mistakes
are reported together."""

import ast
import json
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config import VERBS, Source, TrainConfig, aliases, from_dict, leaves, load_config
from jaxllm.config.checks import check
from jaxllm.errors import UnknownFlag, UserError

ZOO = Path(os.environ.get("JAXLLM_ZOO") or Path(__file__).parents[1] / ".venv" / "zoo")
WHEEL = "trl-1.16.0-py3-none-any.whl"
MODULES = {
    "_BaseConfig": "trainer/base_config",
    "SFTConfig": "trainer/sft_config",
    "DPOConfig": "trainer/dpo_config",
    "KTOConfig": "trainer/kto_config",
    "RewardConfig": "trainer/reward_config",
    "GRPOConfig": "trainer/grpo_config",
    "ModelConfig": "trainer/model_config",
    "ORPOConfig": "experimental/orpo/orpo_config",
    "CPOConfig": "experimental/cpo/cpo_config",
    "DatasetMixtureConfig": "scripts/utils",
    "ScriptArguments": "scripts/utils",
}
# The fields of TRL 1.16's dataclasses; PPOConfig is that of the last TRL that had one.
TRL = {
    "_BaseConfig": """
        logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel
        torch_empty_cache_steps
    """,
    "SFTConfig": """
        learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef
        chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token
        max_length truncation_mode shuffle_dataset packing packing_strategy padding_free
        pad_to_multiple_of eval_packing completion_only_loss assistant_only_loss loss_type
        activation_offloading pad_token
    """,
    "DPOConfig": """
        learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef
        disable_dropout dataset_num_proc max_length truncation_mode padding_free
        pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type
        loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta
        use_weighting discopop_tau activation_offloading sync_ref_model
        ref_model_mixup_alpha ref_model_sync_steps pad_token
    """,
    "KTOConfig": """
        learning_rate train_sampling_strategy model_init_kwargs trust_remote_code
        router_aux_loss_coef disable_dropout dataset_num_proc max_length pad_to_multiple_of
        precompute_ref_log_probs precompute_ref_batch_size loss_type beta desirable_weight
        undesirable_weight activation_offloading sync_ref_model ref_model_mixup_alpha
        ref_model_sync_steps
    """,
    "RewardConfig": """
        learning_rate model_init_kwargs trust_remote_code chat_template_path disable_dropout
        dataset_num_proc eos_token max_length pad_to_multiple_of center_rewards_coefficient
        activation_offloading pad_token
    """,
    "GRPOConfig": """
        learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef
        disable_dropout cast_lm_head_to_fp32 remove_unused_columns num_generations
        num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset
        pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p
        top_k min_p generation_kwargs chat_template_kwargs repetition_penalty
        cache_implementation use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode
        vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
        vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
        vllm_max_model_length vllm_tensor_parallel_size beta num_iterations epsilon delta
        epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos
        vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights
        multi_objective_aggregation scale_rewards loss_type mask_truncated_completions
        sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile
        entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max
        entropy_coef_delta entropy_target max_tool_calling_iterations
        vllm_importance_sampling_correction vllm_importance_sampling_mode
        vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
        off_policy_mask_threshold use_bias_correction_kl log_completions log_multimodal
        num_completions_to_print log_unique_prompts log_completions_hub_repo
        use_transformers_continuous_batching transformers_continuous_batching_config
        use_transformers_paged vllm_importance_sampling_cap
    """,
    "ModelConfig": """
        model_name_or_path model_revision dtype attn_implementation use_peft lora_r
        lora_alpha lora_dropout lora_target_modules lora_target_parameters
        lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit
        bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
    """,
    "ORPOConfig": """
        learning_rate max_length max_completion_length beta disable_dropout padding_value
        generate_during_eval is_encoder_decoder model_init_kwargs trust_remote_code
        dataset_num_proc
    """,
    "CPOConfig": """
        learning_rate max_length max_completion_length beta label_smoothing loss_type
        disable_dropout cpo_alpha simpo_gamma alpha generate_during_eval is_encoder_decoder
        model_init_kwargs trust_remote_code dataset_num_proc
    """,
    "DatasetMixtureConfig": """
        datasets streaming test_split_size
    """,
    "ScriptArguments": """
        dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming
        ignore_bias_buffers
    """,
    "PPOConfig": """
        exp_name reward_model_path num_ppo_epochs whiten_rewards kl_coef kl_estimator
        cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation
        num_mini_batches total_episodes local_rollout_forward_batch_size
        num_sample_generations response_length stop_token stop_token_id temperature
        missing_eos_penalty sft_model_path
    """,
}
# Those of LLaMA-Factory's finetuning, data, model, generating and Ray arguments.
LLAMA_FACTORY = """
    freeze_trainable_layers freeze_trainable_modules freeze_extra_modules additional_target
    lora_alpha lora_dropout lora_rank lora_target loraplus_lr_ratio loraplus_lr_embedding
    use_rslora use_dora pissa_init pissa_iter pissa_convert create_new_adapter module_dropout
    oft_rank oft_block_size oft_target pref_beta pref_ftx pref_bco_weight pref_loss
    dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size
    ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters
    ref_model_quantization_bit reward_model reward_model_adapters reward_model_quantization_bit
    reward_model_type ld_alpha use_galore galore_target galore_rank galore_update_interval
    galore_scale galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank
    apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type
    apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block badam_switch_mode
    badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose use_swanlab
    swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key
    swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret pure_bf16 stage finetuning_type
    use_llama_pro use_adam_mini use_mca use_hyper_parallel hyper_parallel_args use_muon
    use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha freeze_vision_tower
    freeze_multi_modal_projector freeze_language_model train_mm_proj_only compute_accuracy
    disable_shuffling early_stopping_steps plot_loss include_effective_tokens_per_second
    template dataset eval_dataset dataset_dir media_dir cutoff_len train_on_prompt mask_history
    streaming buffer_size mix_strategy interleave_probs overwrite_cache preprocessing_batch_size
    preprocessing_num_workers max_samples eval_num_beams ignore_pad_token_for_loss val_size
    eval_on_each_dataset packing neat_packing tool_format default_system enable_thinking
    tokenized_path data_shared_file_system model_name_or_path adapter_name_or_path
    adapter_folder cache_dir use_fast_tokenizer resize_vocab split_special_tokens add_tokens
    add_special_tokens new_special_tokens new_special_tokens_config init_special_tokens
    model_revision low_cpu_mem_usage rope_scaling flash_attn shift_attn mixture_of_depths
    use_unsloth use_unsloth_gc enable_liger_kernel moe_aux_loss_coef
    disable_gradient_checkpointing use_reentrant_gc upcast_layernorm upcast_lmhead_output
    train_from_scratch infer_backend offload_folder use_kv_cache use_cache use_v1_kernels
    infer_dtype hf_hub_token ms_hub_token om_hub_token print_param_status trust_remote_code
    quantization_method quantization_bit quantization_type double_quantization
    quantization_device_map fp8 fp8_backend fp8_enable_fsdp_float8_all_gather image_max_pixels
    image_min_pixels image_resolution image_do_pan_and_scan crop_to_patches video_max_pixels
    video_min_pixels video_resolution video_fps video_maxlen use_audio_in_video
    audio_sampling_rate export_dir export_size export_device export_quantization_bit
    export_quantization_dataset export_quantization_nsamples export_quantization_maxlen
    export_legacy_format export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager
    vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size
    sglang_config sglang_lora_backend use_kt kt_optimize_rule cpu_infer chunk_size mode
    kt_maxlen kt_use_cuda_graph kt_mode kt_force_think do_sample temperature top_p top_k
    num_beams max_length max_new_tokens repetition_penalty length_penalty skip_special_tokens
    ray_run_name ray_storage_path ray_storage_filesystem ray_num_workers resources_per_worker
    placement_strategy ray_init_kwargs overwrite_output_dir
"""
COMMANDS = {
    "SFTConfig": "sft",
    "DPOConfig": "dpo",
    "KTOConfig": "kto",
    "RewardConfig": "reward",
    "GRPOConfig": "grpo",
    "ORPOConfig": "orpo",
    "CPOConfig": "simpo",
}
# The defaults without a counterpart: KTO's order of rows, and CPO without SimPO.
REFUSED_DEFAULTS = {
    "KTOConfig": {"train_sampling_strategy"},
    "CPOConfig": {"loss_type", "cpo_alpha"},
}


@pytest.fixture
def yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return "run.yaml"

    return write


def fields_in_wheel():
    """{dataclass: {field: its default as source}} of the archive of TRL."""
    if not (ZOO / WHEEL).is_file():
        pytest.skip(f"needs {WHEEL}")
    found = {}
    with zipfile.ZipFile(ZOO / WHEEL) as archive:
        for name, module in MODULES.items():
            tree = ast.parse(archive.read(f"trl/{module}.py"))
            (kind,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
            lines = [n for n in kind.body if isinstance(n, ast.AnnAssign)]
            found[name] = {ast.unparse(n.target): n.value for n in lines}
    return found


def default_of(node):
    """The default of a dataclass's field, from its source."""
    if not isinstance(node, ast.Call):
        return node and ast.literal_eval(node)
    keys = {word.arg: word.value for word in node.keywords}
    if "default" in keys:
        return ast.literal_eval(keys["default"])
    factory = keys["default_factory"]
    return ast.literal_eval(factory.body) if isinstance(factory, ast.Lambda) else []


@pytest.mark.parametrize("name", [*TRL, "LLaMA-Factory"])
def test_every_argument_is_read_listed_or_refused(name):
    known = aliases.NAMES | set(leaves())
    theirs = set(TRL.get(name, LLAMA_FACTORY).split())
    assert theirs and not theirs - known


def test_the_lists_of_trl_are_those_of_its_archive():
    for name, fields in fields_in_wheel().items():
        assert set(TRL[name].split()) == set(fields), name


@pytest.mark.parametrize("name", COMMANDS)
def test_a_config_of_trl_that_states_every_default_is_taken(name, yaml):
    defaults = {key: default_of(node) for key, node in fields_in_wheel()[name].items()}
    refused = REFUSED_DEFAULTS.get(name, set())
    taken = {key: value for key, value in defaults.items() if key not in refused}
    cfg, _ = load_config(COMMANDS[name], yaml(json.dumps(taken)))
    assert cfg.optim.learning_rate == defaults["learning_rate"]
    for key in refused:
        with pytest.raises(UserError, match=key):
            load_config(COMMANDS[name], yaml(json.dumps({key: defaults[key]})))


# ---- what has no effect, and what is said


def test_ignored_names_of_a_file_are_listed_by_name(yaml, capsys):
    path = yaml("plot_loss: true\nuse_vllm: true\nddp_timeout: 9\n")
    load_config("grpo", path, ["--logging_dir", "x"])
    assert capsys.readouterr().err == (
        "jaxllm: ignored, no effect here: run.yaml:1: plot_loss, run.yaml:2: use_vllm, "
        "run.yaml:3: ddp_timeout, --logging_dir\n"
    )


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("--optim adamw_8bit", "--optim: adamw_8bit runs as adamw with float32 moments, which"),
        (
            "--template llama3",
            "--template: llama3: the tokenizer's own chat template is used; data.",
        ),
        (
            "--lr_scheduler_type warmup_stable_decay",
            "the decay is linear; without decay_type, transf",
        ),
    ],
)
def test_a_value_that_means_something_else_here_is_said(args, line, capsys):
    load_config("sft", None, args.split())
    said = capsys.readouterr().err
    assert said.startswith("jaxllm: ") and line in said and said.count("\n") == 1


def test_null_means_not_given(yaml):
    names = ("validation_file", "eval_steps", "resume_from_checkpoint", "bf16", "packing", "optim")
    text = "".join(f"{name}: null\n" for name in (*names, "lora_target", "report_to"))
    text += "model: {path: null}\ndata: {train: null, cache_dir: null}\n"
    assert load_config("sft", yaml(text))[0] == TrainConfig(objective="sft")
    assert load_config("sft", yaml("steps: 9\n"), ["--steps", "null"])[0].steps == 0


# ---- all mistakes at once


def test_all_unknown_and_refused_names_are_in_one_error(yaml):
    path = yaml("learning_rat: 1\nneftune_noise_alpha: 5\noptim:\n  clp: 1\nbeta: 1\n")
    with pytest.raises(UserError) as error:
        load_config("sft", path, ["--zzz", "1", "--loss_type", "dft"])
    assert str(error.value) == (
        "5 mistakes: (1) run.yaml:1: unknown key learning_rat; did you mean learning_rate?; "
        "(2) run.yaml:4: unknown key optim.clp; did you mean optim.clip?; "
        "(3) run.yaml:2: neftune_noise_alpha: NEFTune is not supported; remove it; "
        "(4) unknown flag --zzz; --help lists all keys; "
        "(5) --loss_type: 'dft' is not known; known: nll, chunked_nll"
    )
    assert isinstance(error.value, UnknownFlag)


def test_all_invalid_values_and_all_contradictions_are_in_one_error():
    with pytest.raises(UserError, match=r"2 mistakes: \(1\) seed is 'a'.*\(2\) optim\.clip is -1"):
        from_dict({"seed": "a", "optim": {"clip": -1}})
    with pytest.raises(
        UserError, match=r"2 mistakes: \(1\) unknown key x; .*\(2\) unknown key optim.y"
    ):
        from_dict({"x": 1, "optim": {"y": 1}})
    cfg = load_config("sft", None, ["--model.path", "m", "--rl.top_k", "5", "--align.beta", "1"])[0]
    with pytest.raises(UserError) as error:
        check(cfg)
    assert str(error.value) == (
        "3 mistakes: (1) no data: give data.train; (2) align.beta is not used by sft; remove it; "
        "(3) rl.top_k is not used by sft; remove it"
    )


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lr", "optim.learning_rate"),
        ("optim.lr", "optim.learning_rate"),
        ("mbs", "micro_batch_size"),
        ("optim.weight_deca", "optim.weight_decay"),
        ("optm.clip", "optim.clip"),
        ("peft.rank", None),
        ("peft.rr", None),
        ("data.lr", None),
        ("mesh.dtype", None),
        ("data.beta", None),
        ("dat.packin", "data.packing"),
        ("rl.temperatur", "rl.temperature"),
        ("temperatur", "temperature"),
        ("batchsize", "batch_size"),
        ("max_len", "max_length"),
        ("clip", "optim.clip"),
        ("modle", "model.path"),
        ("zz", None),
        ("r", "peft.r"),
    ],
)
def test_a_suggestion_comes_from_the_same_section(key, near, yaml):
    with pytest.raises(UserError) as error:
        load_config("sft", None, [f"--{key}", "1"])
    hint = f"did you mean --{near}?" if near else "--help lists all keys"
    assert str(error.value) == f"unknown flag --{key}; {hint}"


# ---- the data of LLaMA-Factory


def info(**entries):
    Path("data").mkdir(exist_ok=True)
    Path("data/dataset_info.json").write_text(json.dumps(entries))


def sources(verb, *args):
    return load_config(verb, None, ["--dataset", *args])[0].data


def test_datasets_are_found_by_dataset_info(yaml):
    columns = {"prompt": "question", "response": "answer", "system": "system"}
    info(
        identity={"file_name": "identity.json"},
        qa={"file_name": "sub/qa.jsonl", "columns": columns, "num_samples": 9},
        chat={"hf_hub_url": "o/d", "subset": "en", "split": "dev", "formatting": "sharegpt"},
        texts={"file_name": "c4.json", "columns": {"prompt": "body"}},
    )
    named = {"instruction": "question", "output": "answer"}
    assert sources("sft", "identity, qa,chat").train == (
        Source("data/identity.json"),
        Source("data/sub/qa.jsonl", columns=named, max_samples=9),
        Source("o/d:en", split="dev"),
    )
    assert sources("pretrain", "texts").train == (Source("data/c4.json", columns={"text": "body"}),)


def test_tags_of_dataset_info_are_roles(yaml):
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "customer"}
    columns = {"messages": "dialog", "chosen": "good", "rejected": "bad"}
    info(pairs={"file_name": "p.json", "ranking": True, "columns": columns, "tags": tags})
    data = sources("dpo", "pairs")
    assert data.roles == {"customer": "user"}
    named = {"messages": "dialog", "chosen": "good", "rejected": "bad"}
    assert data.train == (Source("data/p.json", columns=named),)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "f", "columns": [1]}, "d: columns must be an object of strings, seen [1]"),
        ({"script_url": "x"}, "d: only file_name and hf_hub_url are read"),
        ({"file_name": "f", "columns": {"images": "i"}}, "d: the column images is not read"),
        ({"file_name": "f", "tags": {"role_tag": "who"}}, "d: role_tag is who; rename that key"),
    ],
)
def test_what_dataset_info_cannot_say_here_is_refused(entry, message, yaml):
    info(d=entry)
    with pytest.raises(UserError, match=re.escape(message)):
        sources("sft", "d")


def test_a_dataset_without_an_entry_may_be_a_file_or_a_hub_id(yaml):
    info(other={"file_name": "f"})
    Path("data/mine.jsonl").touch()
    assert sources("sft", "mine.jsonl,o/d").train == (Source("data/mine.jsonl"), Source("o/d"))
    with pytest.raises(UserError, match=re.escape("data/dataset_info.json: no entry mine")):
        sources("sft", "mine")
    Path("data/dataset_info.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="must be an object of objects"):
        sources("sft", "mine")


# ---- values of any kind

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["no", "steps", "a,b", "polynomial", "cosine_with_min_lr", "sigmoid", "o/d"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["path", "min_lr", "power", "name"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.sampled_from(sorted(aliases.NAMES - {"deepspeed"})), VALUES, max_size=5),
    st.sampled_from(sorted(VERBS)),
)
def test_no_value_of_a_name_ends_in_a_traceback(given, verb):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(json.dumps(given))
        with suppress(UserError):
            check(load_config(verb, str(file))[0])
