# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction as a part of the model, against transformers' own modules on torch."""

import functools
import json
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AbstractMesh
from runs import arguments, lines_of, refused
from safetensors.torch import load_file, save_file
from steps import (
    EXPERT_MESHES,
    MESHES,
    TINY,
    assert_same_trajectory,
    decoder,
    ragged_rows,
    trajectory,
    unpacked,
)
from test_families import DEEPSEEK_V3
from tiny import B, T, as_saved, hf_config, magnified, one_device, some_tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import MtpLayer, MtpModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)

from jaxllm.cli import main
from jaxllm.config import MeshSection, ModelSection, PeftSection, TrainConfig
from jaxllm.config.checks import check, resolve
from jaxllm.data.batch import Batch
from jaxllm.errors import UserError
from jaxllm.evaluate import evaluate_files
from jaxllm.hf import hf_tensors, load_hf, save_hf
from jaxllm.mesh import axes_of, param_sharding
from jaxllm.model.config import Experts, LayerKind, Rope
from jaxllm.model.decoder import Decoder
from jaxllm.model.families import from_hf, with_mtp
from jaxllm.objectives.lm import lm_loss
from jaxllm.program import build

# Modules, by case of tiny.CASES. Only deepseek_v3's layout allows several.
MODULES = {"deepseek_v3": 2, "glm4_moe": 1, "qwen3_next": 1, "deepseek_v32": 1}
LAYERS = 2


def with_modules(name: str, folder: Any) -> tuple[Any, list[MtpLayer]]:
    """(a torch model, its modules), written to `folder` as published checkpoints have them.

    The modules' layers are the last ones of a deeper model.
    """
    count = MODULES[name]
    config = hf_config(name) | {"num_hidden_layers": LAYERS + count}
    if name == "qwen3_next":
        config["layer_types"] = ["linear_attention", "full_attention", "full_attention"]
    model = magnified(config)
    inner, tensors = model.model, as_saved(model, dict(model.state_dict()))
    modules, norm = [], type(inner.norm)
    for depth in range(count):
        layer, at = inner.layers[LAYERS + depth], f"model.layers.{LAYERS + depth}."
        module = MtpLayer(model.config, type(layer), norm, LAYERS + depth)
        module.mtp_block = layer
        own = {"enorm": module.enorm, "hnorm": module.hnorm, "post_norm": module.post_norm}
        with torch.no_grad():
            for part in own.values():
                around = 0.0 if name == "qwen3_next" else 1.0
                part.weight.copy_(around + 0.4 * torch.randn_like(part.weight))
            module.eh_proj.weight.copy_(0.3 * torch.randn_like(module.eh_proj.weight))
        modules.append(module)
        tensors |= {f"{at}{n}": t for n, t in named(module, name).items()}
        if name == "qwen3_next":
            parts = {n: n.replace(at, "mtp.layers.0.") for n in tensors if n.startswith(at)}
            tensors = {parts.get(n, n): t for n, t in tensors.items()}
            tensors = {n.replace("mtp.layers.0.mtp.", "mtp."): t for n, t in tensors.items()}
        else:
            tensors[f"{at}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
            tensors[f"{at}shared_head.head.weight"] = tensors["lm_head.weight"]
    model.config.num_hidden_layers = LAYERS  # which the model's own forward pass obeys
    folder.mkdir(parents=True)
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": count}
    if name == "qwen3_next":
        config["layer_types"] = config["layer_types"][:LAYERS]
        del config["num_nextn_predict_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    return model, modules


def named(module: MtpLayer, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a module besides its layer, by the names that they have in files."""
    names = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    if name == "qwen3_next":
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
        names = tuple(f"mtp.{one}" for one in names)
    parts = (module.enorm, module.hnorm, module.eh_proj, module.post_norm)
    return {f"{n}.weight": part.weight for n, part in zip(names, parts, strict=True)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """name -> (torch model, its modules, our model with them, the directory)."""

    @functools.cache
    def make(name: str) -> tuple[Any, list[MtpLayer], Any, Any]:
        folder = tmp_path_factory.mktemp("mtp") / name
        model, modules = with_modules(name, folder)
        return model, modules, load_hf(str(folder), mesh=one_device(), mtp=True), folder

    return make


def torch_losses(model: Any, modules: list[MtpLayer], rows: dict[str, np.ndarray]) -> Any:
    """(loss, multi-token prediction loss, hidden states of the modules) of rows of one text."""
    tokens, targets = (torch.from_numpy(rows[k]).long() for k in ("tokens", "targets"))
    weights = torch.from_numpy(rows["weights"])
    hidden = model.model(tokens).last_hidden_state
    head = lambda x: torch.log_softmax(model.lm_head(x), -1)  # noqa: E731

    def nll(x: torch.Tensor, start: int) -> torch.Tensor:
        found = head(x).gather(-1, targets[:, start:, None])[..., 0]
        return -(found * weights[:, start:]).sum()

    loss = nll(hidden, 0) / weights.sum()
    ahead, total, outputs = torch.zeros(()), torch.zeros(()), []
    for depth, module in enumerate(modules, 1):
        embedded, n = model.model.embed_tokens(tokens[:, depth:]), T - depth
        position = torch.arange(depth, T)[None]  # that of the embedded token
        mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
        hidden = module(
            embedded,
            hidden[:, :n],
            position_embeddings=model.model.rotary_emb(embedded, position),
            attention_mask=mask,
            position_ids=position,
            past_key_values=None,
        )
        outputs.append(hidden)
        ahead, total = ahead + nll(hidden, depth), total + weights[:, depth:].sum()
    return loss, ahead / total, outputs


def one_text_rows() -> dict[str, np.ndarray]:
    tokens = some_tokens(B, T + 1)
    rng = np.random.default_rng(3)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    rows["weights"] = np.float32(rng.random((B, T)) < 0.6)
    rows["segment_ids"] = np.ones((B, T), np.int32)
    rows["positions"] = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return rows


def loss_and_gradients(model: Any, rows: dict[str, np.ndarray], weight: float) -> Any:
    """(metrics, {tensor: the gradient of the loss plus weight times that of further tokens})."""
    graph, weights = nnx.split(model, nnx.Param)

    @jax.jit
    def run(weights: Any, batch: Batch) -> Any:
        def total(weights: Any) -> Any:
            loss, count, metrics = lm_loss(nnx.merge(graph, weights), batch, None)
            ahead, total = metrics["mtp_loss"]
            return loss / count + weight * ahead / total, metrics | {"loss": (loss, count)}

        return jax.grad(total, has_aux=True)(weights)

    grads, metrics = run(weights, Batch(**{k: jnp.asarray(v) for k, v in rows.items()}))
    return metrics, {t.name: t.read() for t in hf_tensors(nnx.merge(graph, grads))}


@pytest.mark.parametrize("name", MODULES)
def test_loss_and_gradients_of_further_tokens_equal_transformers(pair, name):
    model, modules, ours, _ = pair(name)
    rows = one_text_rows()
    metrics, seen = loss_and_gradients(ours, rows, 0.3)
    loss, ahead, _ = torch_losses(model, modules, rows)
    (loss + 0.3 * ahead).backward()
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(loss.item(), abs=1e-5)
    found = float(metrics["mtp_loss"][0] / metrics["mtp_loss"][1])
    assert found == pytest.approx(ahead.item(), abs=1e-5)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradients = as_saved(model, gradients)
    for depth, module in enumerate(modules):
        at = f"model.layers.{LAYERS + depth}."
        start = "" if name == "qwen3_next" else at
        own = named(module, name)
        gradients |= {f"{start}{n}": p.grad for n, p in own.items()}
        if name == "qwen3_next":
            gradients = {n.replace(at, "mtp.layers.0."): g for n, g in gradients.items()}
    untrained = {n for n in seen if n.endswith("correction_bias") or ".indexer." in n}
    assert seen.keys() - untrained == set(gradients)
    for path, gradient in gradients.items():
        want = gradient.numpy()
        np.testing.assert_allclose(
            seen[path], want, rtol=0, atol=2e-5 * max(1, np.abs(want).max()), err_msg=path
        )
    trained = seen.keys() - untrained
    assert all(np.abs(seen[n]).max() > 1e-5 for n in trained if "norm" in n or "fc" in n)


@pytest.mark.parametrize("name", MODULES)
def test_an_export_has_the_tensors_of_its_source(pair, name, tmp_path):
    """All of them, bit for bit, so that the inference engines for the source read it."""
    _, _, ours, folder = pair(name)
    save_hf(ours, str(tmp_path / "out"))
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    keys = "num_hidden_layers", "num_nextn_predict_layers"
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out")]
    assert len({tuple(config.get(key) for key in keys) for config in configs}) == 1


def test_transformers_drafts_with_what_was_trained(pair, tmp_path):
    """The modules of a changed model are read by `MtpModel`, of which `generate` takes drafts."""
    ours = load_hf(str(pair("deepseek_v3")[3]), mesh=one_device(), mtp=True)
    for path, variable in nnx.to_flat_state(nnx.state(ours, nnx.Param)):
        change = np.random.default_rng(len(str(path))).normal(size=variable[...].shape)
        variable.set_value(variable[...] + 0.02 * jnp.asarray(change, jnp.float32))
    save_hf(ours, str(tmp_path / "out"))
    main = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[23]\."]  # 61 in DeepSeek-V3
    modules = MtpModel.from_pretrained(main)
    tokens = some_tokens()
    seen = nnx.jit(lambda model, tokens: model.hidden(tokens).ahead)(ours, tokens)
    assert len(seen) == modules.num_mtp_layers == 2
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        hidden = main.model(ids).last_hidden_state
        for depth in (1, 2):
            position = torch.arange(depth, T)[None]
            hidden = hidden[:, : T - depth]
            hidden = modules.forward_layer(depth - 1, hidden, position, None, ids[:, depth:])
            got = seen[depth - 1][:, : T - depth]
            np.testing.assert_allclose(got, hidden.numpy(), atol=1e-4)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for depth in range(2):
        at = f"model.layers.{LAYERS + depth}."
        assert torch.equal(
            tensors[f"{at}embed_tokens.weight"], tensors["model.embed_tokens.weight"]
        )
        assert torch.equal(tensors[f"{at}shared_head.head.weight"], tensors["lm_head.weight"])


# ---- the same however the rows are divided

SHAPE = replace(
    TINY,
    family="glm4_moe",
    ropes=(Rope(),),
    kinds=(LayerKind(dense=True), LayerKind()),
    layer_kinds=(0, 1),
    num_layers=2,
    experts=Experts(8, 2, 16, "sigmoid", has_bias=True, shared_size=48),
    mtp=2,
)
LOSSES = {"mtp_loss": 0.5, "balance_loss": 0.3, "router_bias_rate": 0.01}
WAYS: dict[str, Any] = {
    "one text a row": {"rows": unpacked(ragged_rows(16)), "remat": "dots"},
    "micro-batches and remat": {"count": 4, "remat": "full"},
    "data 2 x fsdp 2 x tensor 2": {"mesh": MESHES["data 2 x fsdp 2 x tensor 2"], "count": 2},
    "one text a row, fsdp 2 x tensor 2": {
        "rows": unpacked(ragged_rows(16)),
        "mesh": MeshSection(fsdp=2, tensor=2),
        "devices": 4,
    },
    "context 2 x tensor 2 x fsdp 2": {"mesh": MESHES["context 2 x tensor 2 x fsdp 2"]},
    "expert 4 x fsdp 2": {"mesh": EXPERT_MESHES["expert 4 x fsdp 2"], "remat": "full"},
}


@pytest.fixture(scope="module")
def alone():
    metrics: dict[str, Any] = {}
    return *trajectory(ragged_rows(16), shape=SHAPE, routers=LOSSES, metrics=metrics), metrics


def test_further_tokens_are_learned(alone):
    losses, _, state, _, metrics = alone
    assert losses[-1] < losses[0]
    rows = {k: jnp.asarray(v) for k, v in ragged_rows(16).items()}
    start = lm_loss(decoder(shape=SHAPE), Batch(**rows), None)[2]
    loss, weight = start["mtp_loss"]
    assert metrics["mtp_loss"][0] < loss and metrics["mtp_loss"][1] == weight
    # A target counts once for each module that has a token of its text so far before it.
    ids, learned = np.asarray(rows["segment_ids"]), np.asarray(rows["weights"])
    same = [(ids[:, d:] == ids[:, :-d]) * learned[:, d:] for d in (1, 2)]
    assert float(weight) == pytest.approx(sum(one.sum() for one in same))
    assert start["expert_load"][0].keys() == {"layers_1", "mtp_1", "mtp_2"}
    for name in ("mtp_1", "mtp_2"):
        assert np.abs(state.trainable[name]["mlp"]["choice_bias"]).max() >= 0.01
        assert np.asarray(start["expert_load"][0][name]).sum() == 2 * (same_tokens(ids, name))


def same_tokens(ids: np.ndarray, name: str) -> int:
    depth = int(name[-1])
    return int(((ids[:, depth:] == ids[:, :-depth]) & (ids[:, depth:] > 0)).sum())


@pytest.mark.parametrize("way", WAYS)
def test_the_division_of_an_update_changes_no_further_token(alone, way):
    options = WAYS[way]
    options = {"rows": ragged_rows(16), "devices": 8 if "mesh" in options else 1} | options
    found = trajectory(shape=SHAPE, routers=LOSSES, **options)
    assert_same_trajectory(found[0], alone[0])
    assert_same_trajectory(found[1], alone[1], rtol=2e-5)
    for name in ("mtp_1", "mtp_2"):
        want = alone[2].trainable[name]
        got = jax.tree.leaves(found[2].trainable[name])
        for a, b in zip(got, jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


# ---- sizes, mistakes, runs


def test_the_module_of_deepseek_v3_has_as_many_weights_as_in_transformers():
    """11.6 billion of its own; its copies of table and head are those of the model."""
    cfg = with_mtp(from_hf(DEEPSEEK_V3), DEEPSEEK_V3)
    abstract = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(abstract.mtp_1, nnx.Param))
    own = sum(leaf.size for leaf in leaves)
    values = {k: v for k, v in DEEPSEEK_V3.items() if k != "model_type"}
    config = AutoConfig.for_model("deepseek_v3", **values).get_mtp_config()
    with torch.device("meta"):
        module = MtpLayer(config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, 0)
    assert own == sum(p.numel() for p in module.parameters()) + 256  # the router's bias
    shared = 2 * cfg.vocab_size * cfg.hidden_size
    assert (round(own / 1e8), round((own + shared) / 1e8)) == (116, 135)
    mesh = AbstractMesh((1, 8, 8, 1, 1), ("data", "fsdp", "expert", "context", "tensor"))
    for _, variable in nnx.to_flat_state(nnx.state(abstract.mtp_1, nnx.Param)):
        shape = variable.get_value().shape
        part = param_sharding(mesh, axes_of(variable), shape).shard_shape(shape)
        assert part != shape or prod(shape) < 2**21


def refusal(tmp_path: Any, name: str, change: dict[str, Any], *more: str) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(name) | change))
    section = ModelSection(config=str(tmp_path / "config.json"), mtp_loss=0.3)
    return build(resolve(TrainConfig(model=section), 1), one_device())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3", {}, "the config of this qwen3 model has no modules of multi-token prediction"),
        ("deepseek_v3", {"num_nextn_predict_layers": 0}, "has no modules of multi-token"),
        ("qwen3_next", {"mtp_num_hidden_layers": 2}, "has 2 modules of multi-token prediction"),
        ("ernie4_5_moe", {"mtp_num_hidden_layers": 1}, "of ernie4_5_moe is not supported"),
    ],
)
def test_a_model_without_modules_is_refused(tmp_path, name, change, message):
    with pytest.raises(UserError, match=f"model.mtp_loss: .*{message}.*set it to 0"):
        refusal(tmp_path, name, change)


def test_a_checkpoint_without_modules_is_refused(tmp_path, capsys):
    magnified(hf_config("deepseek_v3")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no weights of multi-token prediction; set model.mtp"):
        load_hf(str(tmp_path), mesh=one_device(), mtp=True)


def test_copies_that_differ_are_named(pair, tmp_path, capsys):
    folder = pair("glm4_moe")[3]
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{LAYERS}.shared_head.head.weight"] += 1
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    capsys.readouterr()
    load_hf(str(tmp_path), mesh=one_device(), mtp=True)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]
    name = f"model.layers.{LAYERS}.shared_head.head.weight"
    assert f"{name} differs from lm_head.weight, which replaces it" in line
    load_hf(str(folder), mesh=one_device(), mtp=True)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"peft": PeftSection(method="lora")}, "an adapter's base is not trained; set it to 0"),
        ({"objective": "dpo"}, "model.mtp_loss"),
    ],
)
def test_only_the_weights_of_a_language_model_learn_further_tokens(section, message):
    model = ModelSection(path="base", mtp_loss=0.3)
    with pytest.raises(UserError, match=message):
        check(TrainConfig(model=model, **section))


def test_a_run_resumes_and_evaluates_without_further_tokens(project, capsys):
    """From random weights; what it saves is a checkpoint like those published."""
    config = hf_config("glm4_moe") | {"num_hidden_layers": 1, "vocab_size": 500}
    config["first_k_dense_replace"] = 0
    (project / "model.json").write_text(json.dumps(config))
    (project / "few.txt").write_text((project / "text.txt").read_text()[:3000])
    keys = ["--model.mtp_loss", "0.3", "--batch_size", "8", "--save.every", "2"]
    keys += ["--data.eval", str(project / "few.txt"), "--eval_every", "4"]
    for run, steps in (("resumed", "2"), ("resumed", "4"), ("straight", "4")):
        assert main(arguments(project, "pretrain", run, *keys, "--steps", steps)) == 0
    want, got = (lines_of(project / run) for run in ("straight", "resumed"))
    for key in ("loss", "mtp_loss", "mtp_accuracy", "grad_norm"):
        assert [line[key] for line in want.values()] == [line[key] for line in got.values()]
    a, b = (load_file(project / r / "final/model.safetensors") for r in ("straight", "resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {"model.layers.1.eh_proj.weight", "model.layers.1.embed_tokens.weight"} < a.keys()
    *_, last = lines_of(project / "straight", "eval").values()
    final = str(project / "straight" / "final")
    found = evaluate_files(final, [str(project / "few.txt")], max_length=64)
    assert last["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert last["mtp_loss"] > 0 and last["perplexity"] == pytest.approx(np.exp(last["loss"]))
    assert main(["export", str(project / "straight"), str(project / "out")]) == 0
    exported = load_file(project / "out" / "model.safetensors")
    assert exported.keys() == a.keys()
    assert all(torch.equal(exported[name], a[name]) for name in a)
    change = ["--model.mtp_loss", "0", "--resume_changed", "model.mtp_loss", "--steps", "6"]
    words = "belongs to another model or optimizer", "mtp_1", "is not in this run"
    refused(capsys, arguments(project, "pretrain", "straight", *keys, *change), *words)
