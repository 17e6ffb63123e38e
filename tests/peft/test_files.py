# SPDX-License-Identifier: Apache-2.0
"""Adapters against peft on torch: each loads the other's random adapter; ten steps of AdamW."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.torch import load_file
from tiny import CASES, V, hf_config, logits_of, magnified, one_device, some_tokens
from transformers import AutoModelForCausalLM

from jaxllm.config import ModelSection, OptimSection, PeftSection, TrainConfig
from jaxllm.data.batch import Batch
from jaxllm.hf import load_hf, save_adapter, save_hf
from jaxllm.model.decoder import merge
from jaxllm.model.families.table import FAMILIES
from jaxllm.objectives.lm import lm_loss
from jaxllm.optim import make_optimizer, make_schedule
from jaxllm.peft.combine import choose, fold, merged
from jaxllm.peft.files import find, make_adapter, method_of
from jaxllm.program import load_model, model_config
from jaxllm.step import TrainState, alone, make_step

LLAMA = CASES["llama"]
QV = ["q_proj", "v_proj"]
LORA = {
    "q and v": dict(target_modules=QV),
    "all-linear": dict(target_modules="all-linear"),
    "a pattern": dict(target_modules=r".*layers\.[13]\.(self_attn\.o_proj|mlp\.up_proj)"),
    "rsLoRA": dict(target_modules=QV, use_rslora=True, r=3),
    "DoRA": dict(target_modules="all-linear", use_dora=True),
    "patterns of ranks": dict(
        target_modules=["q_proj", "up_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "up_proj": 7},
        alpha_pattern={"down_proj": 3, "layers.2.mlp.up_proj": 11},
    ),
    "some layers, excluding": dict(
        target_modules=["q_proj", "down_proj", "o_proj"],
        layers_to_transform=[0, 2, 3],
        exclude_modules=["layers.2.self_attn.o_proj"],
    ),
    "modules to save": dict(target_modules=QV, modules_to_save=["lm_head", "norm"]),
    "embeddings and head": dict(target_modules=[*QV, "embed_tokens", "lm_head"]),
    "embeddings, DoRA": dict(target_modules=["embed_tokens", "k_proj"], use_dora=True),
}
TIED = {
    "the token table of a tied model": dict(target_modules=["embed_tokens", "q_proj"]),
    "a tied table to save": dict(
        target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
}


def randomize(model, seed=1):
    """Sets the trained parameters to random values large enough to expose a mistake."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                noise = torch.randn_like(weight)
                scaled = "magnitude" in name or weight.ndim == 1
                weight.copy_(weight * (1 + 0.3 * noise) if scaled else 0.15 * noise)
    return model


def base_in(folder, name="llama", **changes):
    magnified(hf_config(name) | changes).save_pretrained(folder / "base")
    return str(folder / "base")


def torch_base(path):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").float()


def torch_logits(model, tokens):
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(tokens).long()).logits.numpy()
    return logits[:, -tokens.shape[1] :]  # peft's prompt tuning also returns the virtual tokens'


def loaded_strictly(base, folder):
    """The adapter loaded in peft; a missing or unexpected key is an error instead of a warning."""
    model = peft.PeftModel.from_pretrained(torch_base(base), folder)
    if model.active_peft_config.is_prompt_learning:  # peft loads its one tensor differently
        return model
    result = peft.utils.save_and_load.set_peft_model_state_dict(
        model, load_file(f"{folder}/adapter_model.safetensors")
    )
    missing = [k for k in result.missing_keys if "lora_" in k or "to_save" in k]
    assert not missing and not result.unexpected_keys
    return model


def both_ways(tmp_path, base, config, change=randomize):
    """(our model, logits of a random peft adapter in peft, in our model, and in peft after we saved
    it)."""
    theirs = change(peft.get_peft_model(torch_base(base), config))
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = some_tokens()
    want = torch_logits(theirs, tokens)
    assert np.abs(want - torch_logits(torch_base(base), tokens)).max() > 0.1
    ours = load_hf(base, adapter=str(tmp_path / "theirs"), mesh=one_device())
    save_adapter(ours, str(tmp_path / "ours"))
    back = torch_logits(loaded_strictly(base, str(tmp_path / "ours")), tokens)
    return ours, want, logits_of(ours, tokens), back


@pytest.mark.parametrize("options", LORA.values(), ids=LORA.keys())
def test_lora_and_its_options_round_trip_with_peft(tmp_path, options):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | options, task_type="CAUSAL_LM")
    ours, want, here, back = both_ways(tmp_path, base_in(tmp_path), config)
    for got in (here, back, logits_of(merged(ours), some_tokens())):
        np.testing.assert_allclose(got, want, atol=1e-4)


RECURRENT = [
    ("lfm2", "w1"),
    ("lfm3", "w1"),
    ("granitemoehybrid", "input_linear"),
    ("nemotron_h", "up_proj"),
    ("olmo_hybrid", "gate_proj"),
]


@pytest.mark.parametrize(("name", "mlp"), RECURRENT)
def test_lora_of_recurrent_layers_round_trips_with_peft(tmp_path, name, mlp):
    """in_proj is one module, of which three or five parts have one A."""
    # peft refuses nemotron_h's out_proj; g_proj gates the heads of lfm3; all layers of olmo_hybrid
    # have a q_proj.
    other = {"nemotron_h": "q_proj", "lfm3": "g_proj", "olmo_hybrid": "q_proj"}.get(
        name, "out_proj"
    )
    config = peft.LoraConfig(r=4, target_modules=["in_proj", other, mlp], use_rslora=True)
    ours, want, here, back = both_ways(tmp_path, base_in(tmp_path, name), config)
    for got in (here, back, logits_of(merged(ours), some_tokens())):
        np.testing.assert_allclose(got, want, atol=1e-4)


DENSE = {
    "nanochat": ["q_proj", "o_proj", "fc1", "fc2"],
    "apertus": ["q_proj", "o_proj", "up_proj", "down_proj"],
    "phi": ["q_proj", "dense", "fc2", "lm_head"],
    "gpt_neox": ["query_key_value", "dense", "dense_4h_to_h", "embed_in"],
}


@pytest.mark.parametrize("name", DENSE)
def test_lora_of_other_dense_layers_round_trips_with_peft_and_merges(tmp_path, name):
    """DoRA scales the outputs of gpt_neox without their biases."""
    options = dict(target_modules=DENSE[name], use_dora=name == "gpt_neox")
    config = peft.LoraConfig(**options, r=4, lora_alpha=6, task_type="CAUSAL_LM")
    ours, want, here, back = both_ways(tmp_path, base_in(tmp_path, name), config)
    assert {t.module.rpartition(".")[2] for t in ours.peft.targets} == {*DENSE[name]}
    for got in (here, back, logits_of(merged(ours), some_tokens())):
        np.testing.assert_allclose(got, want, atol=1e-4)


STACKS = {
    "other ranks in some layers": dict(
        target_modules=["q_proj", "k_proj", "o_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "o_proj": 7},
        alpha_pattern={"layers.0.self_attn.o_proj": 3, "k_proj": 11},
    ),
    "the layer without experts": dict(
        target_modules=["model.layers.0.self_attn.q_proj"], use_dora=True
    ),
    "a norm to save": dict(target_modules=["o_proj"], modules_to_save=["layers.0.input_layernorm"]),
}


@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS.keys())
def test_lora_of_layers_with_and_without_experts_round_trips_with_peft(tmp_path, options):
    """In models with experts, peft takes the names of MLPs for those of experts."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | options, task_type="CAUSAL_LM")
    ours, want, here, back = both_ways(tmp_path, base_in(tmp_path, "glm4_moe"), config)
    for got in (here, back, logits_of(merged(ours), some_tokens())):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("kind", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_virtual_tokens_before_alternating_layers_round_trip_with_peft(tmp_path, kind):
    config = kind(num_virtual_tokens=3, task_type="CAUSAL_LM")
    base = base_in(tmp_path, "qwen2_moe some dense")
    _, want, *found = both_ways(tmp_path, base, config)
    for got in found:
        np.testing.assert_allclose(got, want, atol=1e-4)


LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("minicpm3", dict(target_modules="all-linear")),
        ("deepseek_v3", dict(target_modules=LATENT, use_dora=True)),
        ("glm_moe_dsa", dict(target_modules=[*LATENT, "wq_b", "wk", "weights_proj"])),
    ],
)
def test_lora_of_latent_attention_round_trips_with_peft_and_merges(tmp_path, name, options):
    config = peft.LoraConfig(**options, r=4, lora_alpha=6, task_type="CAUSAL_LM")
    ours, want, here, back = both_ways(tmp_path, base_in(tmp_path, name), config)
    adapted = {target.module.rpartition(".")[2] for target in ours.peft.targets}
    assert set(LATENT) <= adapted
    for got in (here, back, logits_of(merged(ours), some_tokens())):
        np.testing.assert_allclose(got, want, atol=1e-4)


PROJECTIONS = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_next", dict(target_modules="all-linear")),
        ("qwen3_5_text", dict(target_modules=[*PROJECTIONS, "q_proj"], use_dora=True)),
    ],
)
def test_lora_of_delta_nets_round_trips_with_peft_and_merges(tmp_path, name, options):
    config = peft.LoraConfig(**options, r=4, lora_alpha=6, task_type="CAUSAL_LM")
    ours, want, here, back = both_ways(tmp_path, base_in(tmp_path, name), config)
    adapted = {target.module.rpartition(".")[2] for target in ours.peft.targets}
    projections = PROJECTIONS if name == "qwen3_5_text" else ["in_proj_qkvz", "in_proj_ba"]
    assert {*projections, "out_proj", "q_proj"} <= adapted and "conv1d" not in adapted
    for got in (here, back, logits_of(merged(ours), some_tokens())):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("options", TIED.values(), ids=TIED.keys())
def test_adapters_of_tied_weights_round_trip_with_peft_and_merge(tmp_path, options):
    base = base_in(tmp_path, tie_word_embeddings=True)
    config = peft.LoraConfig(**options, r=4, task_type="CAUSAL_LM")
    ours, want, here, back = both_ways(tmp_path, base, config)
    for got in (here, back, logits_of(merged(ours), some_tokens())):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "nanochat"])
@pytest.mark.parametrize("kind", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_virtual_tokens_round_trip_with_peft(tmp_path, family, kind):
    """mistral and gemma2 have windows shorter than the row; gemma2 scales its embeddings, and
    nanochat has a norm of these and of the virtual ones."""
    config = kind(num_virtual_tokens=3, task_type="CAUSAL_LM")
    _, want, *found = both_ways(tmp_path, base_in(tmp_path, family), config)
    for got in found:
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_peft_prefix_with_projection_is_loaded(tmp_path):
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM"
    )
    _, want, *found = both_ways(tmp_path, base_in(tmp_path), config)
    for got in found:
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_pissa_adapter_is_loaded_and_saved_at_twice_the_rank(tmp_path, rslora):
    base = base_in(tmp_path)
    model = torch_base(base)
    for layer in model.model.layers:  # distinct singular values, so the largest are unambiguous
        for module in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            module.weight.data *= 2 * 0.7 ** torch.arange(module.in_features)
    model.save_pretrained(base)
    config = peft.LoraConfig(
        r=3, target_modules=QV, init_lora_weights="pissa", use_rslora=rslora, task_type="CAUSAL_LM"
    )
    ours, want, here, back = both_ways(tmp_path, base, config, trained_further)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (written["r"], written["init_lora_weights"]) == (6, True)
    for got in (here, back, logits_of(merged(ours), some_tokens())):
        np.testing.assert_allclose(got, want, atol=1e-4)


def trained_further(model):
    """Changes PiSSA's initial A and B, as training would."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.mul_(1.2)
    return model


# ---- ten steps


RATE = 1e-3  # small, because AdamW amplifies the rounding of a tiny gradient to a full step


def rows(count=4, length=20):
    """Tokens and uneven loss weights."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (count, length + 1))
    weights = rng.random((count, length)) < np.linspace(0.2, 0.9, count)[:, None]
    return tokens, weights.astype(np.float32)


def torch_steps(model, steps=10, ratio=1.0):
    """(loss, gradient norm) of each AdamW step on the trained parameters."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def group(name, weight):
        small = weight.ndim == 1 or "prompt" in name
        rate = RATE * (ratio if "lora_B" in name or "embedding_B" in name else 1)
        return {"params": [weight], "lr": rate, "weight_decay": 0.0 if small else 0.1}

    adam = torch.optim.AdamW([group(*pair) for pair in named])
    x, y, w = (torch.tensor(a) for a in (rows()[0][:, :-1], rows()[0][:, 1:], rows()[1]))
    out = []
    for _ in range(steps):
        logits = model(x).logits[:, -x.shape[1] :]
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none")
        loss = (nll * w).sum() / w.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        adam.step()
        adam.zero_grad()
        out.append((loss.item(), norm.item()))
    return out


def our_steps(model, steps=10, ratio=1.0):
    graph, trained, rest = nnx.split(model, model.peft.trains, ...)
    optim = OptimSection(learning_rate=RATE, weight_decay=0.1, schedule="constant")
    schedule = make_schedule(optim, steps)
    optimizer = make_optimizer(optim, schedule, {"b": ratio})
    whole = NamedSharding(one_device(), P())
    step = make_step(alone(graph), lm_loss, optimizer, schedule, max_norm=1.0)
    step = jax.jit(step, out_shardings=(whole, None))
    tokens, weights = rows()
    ones = np.ones(weights.shape, np.int32)
    fields = (tokens[:, :-1], tokens[:, 1:], weights, ones, np.arange(ones.shape[1]) * ones)
    batch = Batch(*(jnp.asarray(f)[None] for f in fields))
    params, frozen = nnx.to_pure_dict(trained), nnx.to_pure_dict(rest)
    state = jax.device_put(TrainState(jnp.int32(0), params, optimizer.init(params)), whole)
    out = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        loss, weight = metrics["loss"]
        out.append((float(loss / weight), float(metrics["grad_norm"][0])))
    assert step._cache_size() == 1
    return out, merge(graph, state.trainable, frozen)


def steps_of_both(tmp_path, base, config, ratio=1.0):
    """(loss, gradient norm) of ten of our steps and of peft's, from the same adapter; our trained
    adapter gives the same logits in peft."""
    theirs = peft.get_peft_model(torch_base(base), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn_like(weight))
    theirs.save_pretrained(tmp_path / "start")
    start = str(tmp_path / "start")
    section = PeftSection(method=method_of(find(start).config), path=start)
    cfg = TrainConfig(model=ModelSection(path=base), peft=section)
    shape, _ = model_config(cfg)
    ours = load_model(cfg, one_device(), shape, make_adapter(shape, section))
    (got, trained), want = our_steps(ours, ratio=ratio), torch_steps(theirs.train(), ratio=ratio)
    assert want[-1][0] < want[0][0] - 1e-3
    save_adapter(trained, str(tmp_path / "ours"))
    back = loaded_strictly(base, str(tmp_path / "ours"))
    there = torch_logits(back, some_tokens())
    np.testing.assert_allclose(there, logits_of(trained, some_tokens()), atol=1e-4)
    return got, want


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_of_lora_equal_peft_and_adamw(tmp_path, family):
    options = {}
    if family == "qwen2_moe":  # peft's all-linear leaves its experts out, since it has shared ones
        options["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    if family == "llama4_text":  # whose router is a linear layer to peft
        options["exclude_modules"] = ["router"]
    if family == "nemotron_h":  # peft refuses this one
        options["exclude_modules"] = ["out_proj"]
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    got, want = steps_of_both(tmp_path, base_in(tmp_path, family), config)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["DoRA", "patterns of ranks", "modules to save", "embeddings and head"]
)
def test_ten_steps_of_the_options_equal_peft_and_adamw(tmp_path, name):
    config = peft.LoraConfig(r=4, **{k: v for k, v in LORA[name].items() if k != "r"})
    got, want = steps_of_both(tmp_path, base_in(tmp_path), config)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_ten_steps_of_lora_plus_equal_peft_and_adamw(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=QV, task_type="CAUSAL_LM")
    got, want = steps_of_both(tmp_path, base_in(tmp_path), config, ratio=4.0)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_ten_steps_of_virtual_tokens_equal_peft_and_adamw(tmp_path, kind):
    config = kind(num_virtual_tokens=3, task_type="CAUSAL_LM")
    got, want = steps_of_both(tmp_path, base_in(tmp_path), config)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


# ---- several adapters, and errors


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=QV, modules_to_save=["embed_tokens", "lm_head"]),
        dict(target_modules=QV, modules_to_save=["embed_tokens"]),
        dict(target_modules=[*QV, "lm_head"]),
    ],
    ids=["both saved", "table saved", "head adapted"],
)
def test_an_adapter_that_unties_a_model_is_loaded_on_an_untied_copy(tmp_path, monkeypatch, options):
    """On the tied model it is an error, whose message contains the code that makes the copy."""
    base, tokens = base_in(tmp_path, "qwen2"), some_tokens()
    theirs = randomize(peft.get_peft_model(torch_base(base), peft.LoraConfig(**options)))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="over an untied copy: ") as error:
        load_hf(base, adapter=str(tmp_path / "theirs"))
    monkeypatch.chdir(tmp_path)
    exec("import jaxllm; " + str(error.value).partition("copy: ")[2])
    ours = load_hf("untied", adapter="theirs", mesh=one_device())
    np.testing.assert_allclose(logits_of(ours, tokens), torch_logits(theirs, tokens), atol=1e-3)


def two_adapters(tmp_path):
    base = base_in(tmp_path)
    places = {}
    for seed, (name, options) in enumerate(
        {
            "law": dict(r=3, target_modules=QV),
            "code": dict(r=5, target_modules="all-linear"),
        }.items()
    ):
        config = peft.LoraConfig(**options, task_type="CAUSAL_LM")
        model = randomize(peft.get_peft_model(torch_base(base), config), seed)
        model.save_pretrained(tmp_path / name)
        places[name] = str(tmp_path / name)
    return base, places


def test_one_of_several_adapters_none_or_a_weighted_sum_can_be_chosen(tmp_path):
    base, places = two_adapters(tmp_path)
    tokens = some_tokens()
    model = load_hf(base, adapter=places, mesh=one_device())
    alone = {
        n: logits_of(load_hf(base, adapter=p, mesh=one_device()), tokens) for n, p in places.items()
    }
    plain = logits_of(load_hf(base, mesh=one_device()), tokens)
    for chosen, want in {"law": alone["law"], "code": alone["code"], None: plain}.items():
        choose(model, chosen)
        np.testing.assert_allclose(logits_of(model, tokens), want, atol=2e-5)
    choose(model, {"law": 0.7, "code": -0.5})
    summed = torch_base(base)
    summed = peft.PeftModel.from_pretrained(summed, places["law"], adapter_name="law")
    summed.load_adapter(places["code"], adapter_name="code")
    summed.add_weighted_adapter(["law", "code"], [0.7, -0.5], "sum", combination_type="cat")
    summed.set_adapter("sum")
    np.testing.assert_allclose(logits_of(model, tokens), torch_logits(summed, tokens), atol=1e-4)


def test_each_row_of_a_batch_can_use_another_adapter(tmp_path):
    from jaxllm.sampling import Sampling, generate

    base, places = two_adapters(tmp_path)
    model = load_hf(base, adapter=places, mesh=one_device())
    prompts = [[5, 9, 11], [5, 9, 11], [5, 9, 11], [7, 3]]
    uses = ["law", "code", None, {"law": 0.5, "code": 0.5}]
    got = generate(model, prompts, Sampling(max_new_tokens=12), adapters=uses)
    for row, use in enumerate(uses):
        choose(model, use)
        assert got[row] == generate(model, [prompts[row]], Sampling(max_new_tokens=12))[0]
    assert len({tuple(tokens) for tokens in got[:3]}) == 3


def test_merging_and_unmerging_restores_the_weights(tmp_path):
    base, places = two_adapters(tmp_path)
    model = load_hf(base, adapter=places["code"], mesh=one_device())
    before = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    fold(model)
    during = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert (
        np.abs(
            during["layers"]["mlp"]["up"]["kernel"] - before["layers"]["mlp"]["up"]["kernel"]
        ).max()
        > 0.1
    )
    fold(model, -1)
    after = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "IA3.*LORA"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_modules": ["q_proj"]}, "v_proj.*does not name"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj"),
        ({"r": 9}, "does not fit"),
        ({"r": None}, "does not fit"),  # 8, as in peft
        ({"rank_pattern": {"[": 3}}, "neither a module nor a pattern"),
        ({"layers_to_transform": ["x"]}, "layers_to_transform.* is 'x'"),
        ({"modules_to_save": ["lm_head"]}, "has no base_model.model.lm_head.weight"),
    ],
)
def test_an_unsupported_or_inconsistent_adapter_is_an_error(tmp_path, changes, words):
    base, places = two_adapters(tmp_path)
    file = tmp_path / "law" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        load_hf(base, adapter=places["law"], mesh=one_device())


def test_an_adapter_path_loads_its_base_model_or_explains_why_not(tmp_path):
    base, places = two_adapters(tmp_path)
    tokens = some_tokens()
    want = logits_of(load_hf(base, adapter=places["law"], mesh=one_device()), tokens)
    np.testing.assert_array_equal(
        logits_of(load_hf(places["law"], mesh=one_device()), tokens), want
    )
    with pytest.raises(ValueError, match="is an adapter too; name the other"):
        load_hf(places["law"], adapter=places["code"], mesh=one_device())
    both = load_hf(places["law"], adapter={"code": places["code"]}, mesh=one_device())
    np.testing.assert_allclose(logits_of(both, tokens), want, atol=1e-5)
    file = tmp_path / "law" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not name its base model"):
        load_hf(places["law"])
    (tmp_path / "law" / "adapter_model.safetensors").rename(tmp_path / "law" / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled adapter is not read"):
        load_hf(base, adapter=places["law"])
    with pytest.raises(ValueError, match="no adapter nothing; there are law, code"):
        choose(load_hf(base, adapter=places | {"law": places["code"]}), "nothing")


def test_dora_and_modules_to_save_cannot_be_turned_off_or_saved_as_a_model(tmp_path):
    base = base_in(tmp_path)
    for name, options in {
        "dora": dict(use_dora=True),
        "saved": dict(modules_to_save=["lm_head"]),
    }.items():
        config = peft.LoraConfig(r=3, target_modules=QV, **options, task_type="CAUSAL_LM")
        randomize(peft.get_peft_model(torch_base(base), config)).save_pretrained(tmp_path / name)
        model = load_hf(base, adapter=str(tmp_path / name), mesh=one_device())
        want = logits_of(model, some_tokens())
        choose(model, "default")
        np.testing.assert_allclose(logits_of(model, some_tokens()), want, atol=1e-5)
        with pytest.raises(ValueError, match="cannot be turned off"):
            choose(model, None)
        with pytest.raises(ValueError, match="use save_adapter"):
            save_hf(model, str(tmp_path / "plain"))
    quantised = load_hf(base, adapter=str(tmp_path / "dora"), quantize_base="int8")
    with pytest.raises(ValueError, match="quantized"):
        merged(quantised)
