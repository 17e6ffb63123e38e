# SPDX-License-Identifier: Apache-2.0
"""Weights that are not finite: a run neither starts from them nor ends with them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runs import MODEL, arguments, refused
from safetensors.numpy import load_file, save_file
from steps import TINY, decoder

from jaxllm.cli import main
from jaxllm.config import MeshSection, PeftSection
from jaxllm.errors import UserError
from jaxllm.finite import check_finite
from jaxllm.hf import load_hf, random_model, save_adapter, save_hf
from jaxllm.mesh import make_mesh
from jaxllm.model.families import from_hf
from jaxllm.peft.files import make_adapter
from jaxllm.tokenizer import load_tokenizer, save_tokenizer

pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def final(project):
    """The directory of a model."""
    mesh = make_mesh(MeshSection(), jax.devices()[:1])
    save_hf(random_model(from_hf(MODEL), mesh, MODEL), str(project / "good"))
    save_tokenizer(load_tokenizer(str(project / "tokenizer")), project / "good")
    return project / "good"


def broken(folder, copy, name, value=np.nan, file="model.safetensors"):
    """A copy of a model in which the last value of a weight is another."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / file)
    weights[name] = weights[name].copy()
    weights[name].flat[-1] = value
    save_file(weights, copy / file, metadata={"format": "pt"})
    return str(copy)


def from_model(project, path, *more):
    args = arguments(project, "pretrain", "mistaken", "--steps", "1", *more)
    at = args.index("--model.config")
    return [*args[:at], "--model.path", path, *args[at + 4 :]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("path", "at", "name"),
    [
        (("layers", "mlp", "down", "kernel"), (2, 0, 0), "model.layers.2.mlp.down_proj.weight"),
        (("norm", "scale"), (3,), "model.norm.weight"),
        (("embed", "embedding"), (5, 1), "model.embed_tokens.weight"),
        (("layers", "attn", "q", "lora", "b"), (1, 0, 0), "layers.attn.q.lora.b"),
    ],
)
def test_the_tensor_is_named_whichever_device_has_it(value, path, at, name):
    model = decoder(PeftSection(method="lora", r=4))
    mesh = make_mesh(MeshSection())
    put = NamedSharding(mesh, P())
    weights = jax.tree.map(lambda x: jax.device_put(x, put), nnx.to_pure_dict(nnx.state(model)))
    weights["count"] = jnp.arange(3)
    check_finite(weights, TINY, "here", "go")
    here = weights
    for key in path[:-1]:
        here = here[key]
    split = NamedSharding(mesh, P(*[None] * (here[path[-1]].ndim - 1), "fsdp"))
    split = split if here[path[-1]].shape[-1] % 8 == 0 else put
    here[path[-1]] = jax.device_put(here[path[-1]].at[at].set(value), split)
    with pytest.raises(UserError, match=f"^here: {name} has values that are not finite; go$"):
        check_finite(weights, TINY, "here", "go")


def test_a_value_that_another_dtype_does_not_hold_is_not_finite_in_it():
    weights = {"norm": {"scale": jnp.full(3, 3.4e38)}}
    check_finite(weights, TINY, "here", "go")
    with pytest.raises(UserError, match="model.norm.weight"):
        check_finite(weights, TINY, "here", "go", "bfloat16")


def test_a_run_does_not_start_from_weights_that_are_not_finite(project, final, tmp_path, capsys):
    name = "model.layers.1.self_attn.k_proj.weight"
    path = broken(final, tmp_path / "broken", name)
    refused(capsys, from_model(project, path), path, name, "not finite")
    plan = make_adapter(from_hf(MODEL), PeftSection(method="lora", r=2))
    save_adapter(load_hf(str(final), peft=plan), str(tmp_path / "good"))
    file = "adapter_model.safetensors"
    name = sorted(load_file(tmp_path / "good" / file))[0]
    path = broken(tmp_path / "good", tmp_path / "adapter", name, file=file)
    args = from_model(project, str(final), "--peft.path", path, "--peft.method", "lora")
    refused(capsys, args, path, "lora", "not finite")


def test_weights_that_an_update_makes_infinite_are_not_saved(project, capsys):
    args = arguments(project, "pretrain", "infinite", "--steps", "1")
    args[args.index("--optim.learning_rate") + 1] = "1e39"
    refused(capsys, args, "step 1", "not finite", "no checkpoint was saved")
    assert not [p for p in (project / "infinite").glob("checkpoints/*") if p.name.isdigit()]
    assert not (project / "infinite" / "final").exists()


def test_a_final_model_that_is_not_finite_does_not_replace_a_good_one(project, capsys):
    args = arguments(project, "pretrain", "large", "--steps", "1")
    args[args.index("--optim.learning_rate") + 1] = "3.4e38"
    assert main(args) == 0
    file = project / "large" / "final" / "model.safetensors"
    before = file.read_bytes()
    refused(capsys, [*args, "--save.dtype", "bfloat16"], "the trained weights", "not finite")
    assert file.read_bytes() == before


def test_an_evaluation_of_such_a_model_prints_strict_json(project, final, tmp_path, capsys):
    path = broken(final, tmp_path / "broken", "model.norm.weight")
    capsys.readouterr()
    args = ["eval", "--model", path, "--data", str(project / "text.txt"), "--max_length", "64"]
    assert main([*args, "--batch_size", "64", "--json"]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["loss"] == found["perplexity"] == "NaN" and found["tokens"] > 0
