# SPDX-License-Identifier: Apache-2.0
"""Runs that train an adapter: killed and resumed, exported, merged, quantized, and errors."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from runs import arguments, killed, lines_of, refused
from safetensors.numpy import load_file, save_file

from jaxllm.checkpoint import Checkpoints
from jaxllm.cli import main
from jaxllm.config import MeshSection
from jaxllm.hf import load_hf
from jaxllm.mesh import make_mesh
from jaxllm.ops.quantized import Quantized, dense, quantize

pytestmark = pytest.mark.usefixtures("on_one_device")

LORA = ("--peft.method", "lora", "--peft.r", "4", "--peft.target_modules", "q_proj", "down_proj")
LORA += ("--peft.lora_dropout", "0.1")


@pytest.fixture(scope="module")
def base(project):
    """The project, with a base model in base/final."""
    assert main(arguments(project, "pretrain", "base", "--save.every", "0")) == 0
    return project


def tuning(project, out, *more):
    args = arguments(project, "sft", out, *more)
    at = args.index("--model.config")
    args[at : at + 4] = ["--model.path", str(project / "base" / "final")]
    return args


@pytest.fixture(scope="module")
def straight(base):
    held_out = ("--data.eval", str(base / "few.jsonl"), "--data.packing", "true")
    model = base / "base" / "final" / "model.safetensors"
    before = model.read_bytes()
    assert main(tuning(base, "straight", *LORA, *held_out)) == 0
    assert model.read_bytes() == before
    return base


def adapter(run):
    return load_file(run / "final" / "adapter_model.safetensors")


def evaluated(capsys, model, data, *more):
    capsys.readouterr()
    assert (
        main(["eval", "--model", str(model), "--data", str(data), "--chat", "--json", *more]) == 0
    )
    return json.loads(capsys.readouterr().out)["loss"]


def test_resume_after_sigkill_is_bit_exact(straight):
    held_out = ("--data.eval", str(straight / "few.jsonl"), "--data.packing", "true")
    args = tuning(straight, "killed", *LORA, *held_out)
    killed([sys.executable, "-m", "jaxllm", *args], straight / "killed")
    assert max(lines_of(straight / "killed"), default=0) < 12
    assert main(args) == 0
    want, got = lines_of(straight / "straight"), lines_of(straight / "killed")
    assert sorted(got) == sorted(want) == list(range(1, 13))
    for step in want:
        for key in ("loss", "grad_norm"):
            assert got[step][key] == want[step][key], (step, key)
    a, b = adapter(straight / "straight"), adapter(straight / "killed")
    assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}


def test_a_checkpoint_has_the_trained_weights_and_names_the_base(straight):
    saves = Checkpoints(straight / "straight" / "checkpoints")
    tree = saves.manager.item_metadata(12)["state"].tree
    names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)}
    weights = {n for n in names if "opt_state" not in n and "step" not in n}
    assert len(weights) == 4 and all("['lora']" in name for name in weights), weights
    assert not any("kernel" in name or "embedding" in name for name in names)
    identity = saves.meta(12)["identity"]
    assert identity["config"]["model.path"] == str(straight / "base" / "final")
    assert len(identity["weights"]["model.path"]) == 32
    saves.close()


def test_resuming_and_exporting_with_another_base_are_errors(straight, capsys):
    run, model = straight / "moved", straight / "base" / "final" / "model.safetensors"
    shutil.copytree(straight / "straight", run)
    kept = model.read_bytes()
    weights = load_file(model)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, model)
    held_out = ("--data.eval", str(straight / "few.jsonl"), "--data.packing", "true")
    try:
        again = tuning(straight, "moved", *LORA, *held_out, "--steps", "14")
        for args in (again, ["export", str(run), str(straight / "m"), "--merge"]):
            assert "weights model.path changed since" in refused(capsys, args)
    finally:
        model.write_bytes(kept)


def test_an_export_is_an_adapter_or_a_merged_model(straight, capsys):
    run, few = straight / "straight", straight / "few.jsonl"
    last = list(lines_of(run, "eval").values())[-1]["loss"]
    plain = evaluated(capsys, straight / "base" / "final", few, "--max_length", "64")
    assert last < plain - 1e-3
    for model in (run / "final", straight / "exported"):
        if not model.exists():
            assert main(["export", str(run), str(model)]) == 0
        assert not (model / "config.json").exists()
        assert evaluated(capsys, model, few, "--max_length", "64") == pytest.approx(last, abs=1e-5)
    beside = ("--adapter", f"mine={run / 'final'}", "--max_length", "64")
    base = straight / "base" / "final"
    assert evaluated(capsys, base, few, *beside) == pytest.approx(last, abs=1e-5)
    assert evaluated(capsys, base, few, *beside, "--use", "none") == pytest.approx(plain, abs=1e-6)
    assert (
        main(["export", str(run), str(straight / "whole"), "--merge", "--dtype", "bfloat16"]) == 0
    )
    said = capsys.readouterr().err
    assert "merged: the logits differ by at most" in said and "when rounded to bfloat16" in said
    assert evaluated(capsys, straight / "whole", few, "--max_length", "64") == pytest.approx(
        last, abs=2e-2
    )
    assert main(["export", str(run / "final"), str(straight / "whole32"), "--merge"]) == 0
    assert evaluated(capsys, straight / "whole32", few, "--max_length", "64") == pytest.approx(
        last, abs=1e-5
    )
    refused(capsys, ["export", str(run), str(straight / "x"), "--dtype", "bfloat16"], "--merge")


@pytest.mark.parametrize(
    "more",
    [
        ("--peft.use_dora", "true", "--model.compute_dtype", "bfloat16"),
        pytest.param(("--peft.init_lora_weights", "pissa"), marks=pytest.mark.sweep),
        ("--peft.init_lora_weights", "pissa", "--peft.quantize_base", "nf4"),
        ("--peft.modules_to_save", "norm", "--save.dtype", "bfloat16"),
    ],
    ids=["dora", "pissa", "pissa, nf4", "modules to save, save.dtype"],
)
def test_an_export_equals_the_final_folder(straight, more, request, capsys):
    name = request.node.callspec.id
    run, out = straight / name, straight / f"{name} exported"
    assert main(tuning(straight, name, *LORA, *more, "--steps", "2")) == 0
    assert main(["export", str(run), str(out)]) == 0
    want, got = adapter(run), load_file(out / "adapter_model.safetensors")
    assert want.keys() == got.keys()
    for key in want:
        np.testing.assert_allclose(got[key], want[key], atol=1e-6, err_msg=key)
    assert main(["export", str(run), str(straight / f"{name} merged"), "--merge"]) == 0
    said = capsys.readouterr().err
    difference = re.search(r"the logits differ by at most (\S+) in float32", said)
    assert difference and float(difference[1]) < 1e-3  # whatever the dtype of training


def test_training_starts_from_an_adapter(straight, capsys):
    start = str(straight / "straight" / "final")
    more = ("--peft.method", "lora", "--peft.path", start)
    assert main(tuning(straight, "further", *more, "--steps", "2")) == 0
    first = lines_of(straight / "further")[1]["loss"]
    assert first < lines_of(straight / "straight")[1]["loss"] - 0.01
    before, after = adapter(straight / "straight"), adapter(straight / "further")
    assert before.keys() == after.keys()
    assert any(np.any(before[k] != after[k]) for k in before)
    args = tuning(straight, "straight", *more, "--overwrite", "true")
    refused(capsys, args, "overwrite would delete", "which this run reads")
    (straight / "gone").symlink_to(straight / "straight" / "final")
    gone = ("--peft.method", "lora", "--peft.path", str(straight / "gone"))
    assert main(tuning(straight, "from-gone", *gone, "--steps", "2")) == 0
    (straight / "gone").unlink()
    assert main(["export", str(straight / "from-gone"), str(straight / "from-gone-out")]) == 0
    assert main(tuning(straight, "from-gone", *gone, "--steps", "3")) == 0
    args = tuning(straight, "wrong", "--peft.method", "prefix", "--peft.path", start)
    refused(capsys, args, "of method lora", "prefix")
    refused(capsys, tuning(straight, "wrong", *more, "--peft.r", "3"), "peft.r", "remove it")


@pytest.mark.parametrize(
    "method", ["prefix", *(pytest.param(x, marks=pytest.mark.sweep) for x in ("adapter", "prompt"))]
)
def test_the_other_methods_train_and_load_again(straight, capsys, method):
    size = ("--peft.bottleneck", "4") if method == "adapter" else ("--peft.num_virtual_tokens", "4")
    held_out = ("--data.eval", str(straight / "few.jsonl"), "--data.max_length", "60")
    args = tuning(straight, method, "--peft.method", method, *size, *held_out)
    assert main(args) == 0
    last = lines_of(straight / method, "eval")[12]["loss"]
    got = evaluated(
        capsys, straight / method / "final", straight / "few.jsonl", "--max_length", "60"
    )
    assert got == pytest.approx(last, abs=1e-5)
    refused(capsys, ["export", str(straight / method), str(straight / "x"), "--merge"], "only one")


@pytest.mark.parametrize("kind", ["nf4"])
def test_a_run_with_a_quantized_base_resumes_exactly(straight, capsys, kind):
    more = (*LORA, "--peft.quantize_base", kind)
    capsys.readouterr()
    assert main(tuning(straight, f"{kind}-once", *more, "--steps", "6", "--save.every", "3")) == 0
    assert f"the layers' kernels as {kind} take" in capsys.readouterr().err
    run = straight / f"{kind}-twice"
    assert main(tuning(straight, run.name, *more, "--steps", "3", "--save.every", "3")) == 0
    assert main(tuning(straight, run.name, *more, "--steps", "6", "--save.every", "3")) == 0
    a, b = adapter(straight / f"{kind}-once"), adapter(run)
    assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}
    plain = lines_of(straight / "straight")[1]["loss"]
    first = lines_of(run)[1]["loss"]
    assert first != plain and first == pytest.approx(plain, rel=0.03)


def dequantized(kernel):
    """All layers of a quantized kernel in float32."""
    layers = [jax.tree.map(lambda x, i=i: x[i], kernel) for i in range(kernel.shape[0])]
    return np.stack([dense(layer, "float32") for layer in layers])


@pytest.mark.parametrize(("kind", "error", "size"), [("int8", 0.009, 1.02), ("nf4", 0.095, 0.54)])
def test_quantized_kernels_are_small_and_close(kind, error, size):
    w = np.random.default_rng(0).normal(0, 0.02, (2, 576, 384)).astype(np.float32)
    found = quantize(jax.numpy.asarray(w), kind, lambda x: x)
    assert found.shape == w.shape and found.nbytes <= size * w.size
    assert np.linalg.norm(dequantized(found) - w) / np.linalg.norm(w) < error
    with pytest.raises(ValueError, match="an even divisor from 16 to 128, not 13"):
        quantize(jax.numpy.zeros((1, 13, 8)), "nf4", lambda x: x)


def test_a_quantized_model_equals_its_dequantized_copy(straight):
    path = str(straight / "base" / "final")
    mesh = make_mesh(MeshSection(fsdp=2, tensor=4))
    tokens = np.arange(16).reshape(2, 8)
    for kind in ("int8", "nf4"):
        model, whole = load_hf(path, quantize_base=kind, mesh=mesh), load_hf(path)
        into = dict(nnx.to_flat_state(nnx.state(whole)))
        for name, variable in nnx.to_flat_state(nnx.state(model)):
            if isinstance(held := variable.get_value(), Quantized):
                into[name].set_value(dequantized(held))
        whole = nnx.merge(nnx.graphdef(whole), nnx.from_flat_state(into))
        run = nnx.jit(lambda m: m(tokens))
        np.testing.assert_allclose(run(model), run(whole), atol=1e-4)
        assert float(np.abs(run(load_hf(path)) - run(whole)).max()) > 1e-3


def test_the_summary_warnings_and_errors_of_a_peft_run(straight, capsys):
    run = straight / "told"
    args = tuning(straight, "told", *LORA, "--steps", "1")
    at = args.index("--optim.learning_rate")
    del args[at : at + 2]
    args[args.index("--peft.r") + 1] = "128"
    capsys.readouterr()
    assert main(args) == 0
    printed = capsys.readouterr().err
    assert "warning: peft: rank 128 is outside the usual 4 to 64" in printed
    assert "trainable: " in printed
    assert json.loads((run / "config.json").read_text())["optim"]["learning_rate"] == 5e-4
    wrong = tuning(straight, "wrong", "--peft.method", "lora")
    refused(capsys, [*wrong, "--peft.r", "0"], "peft.r", "greater than 0")
    refused(capsys, [*wrong, "--peft.target_modules", "q"], "matches nothing", "q_proj")
    refused(capsys, [*wrong, "--peft.bottleneck", "4"], "peft.bottleneck", "lora")
    refused(capsys, tuning(straight, "wrong", "--peft.r", "4"), "peft.r", "peft.method")
    refused(
        capsys,
        tuning(straight, "wrong", "--peft.method", "prompt", "--peft.num_virtual_tokens", "4"),
        "60 positions besides 4 virtual tokens",
    )
