# SPDX-License-Identifier: Apache-2.0
"""`jaxllm export --check`: what is written, in transformers and peft, and what a check finds."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from runs import MODEL, arguments, refused
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jaxllm import export_check, exports
from jaxllm.cli import main
from jaxllm.config import PeftSection, from_dict
from jaxllm.export_check import PROMPTS, TOLERANCE, prompts_of
from jaxllm.files import CARD
from jaxllm.hf import load_hf, save_adapter
from jaxllm.hf_config import source_config
from jaxllm.model.families import from_hf
from jaxllm.peft.files import make_adapter
from jaxllm.tokenizer import load_tokenizer

FIGURES = re.compile(
    r"check: ([\d,]+) (\S+) of (.*) \(([\d,]+) tokens\) differ by at most (\S+), (\S+) on average, "
    r"from those of (.*); (\w+) weights, computed in float32(?:; merging .* by up to (\S+))?\n"
)


@pytest.fixture(scope="module")
def runs(project):
    """A base model, a run that trained LoRA and has evaluation data, and a LoRA reward model."""
    torch.manual_seed(0)
    shape = {k: v for k, v in MODEL.items() if k != "model_type"}
    config = AutoConfig.for_model("llama", **shape, initializer_range=0.2)
    made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(project / "base")
    made.half().save_pretrained(project / "half")
    for name in ("base", "half"):
        AutoTokenizer.from_pretrained(project / "tokenizer").save_pretrained(project / name)
    args = arguments(project, "sft", "lora", "--peft.method", "lora", "--peft.r", "4")
    at = args.index("--model.config")
    args[at : at + 4] = ["--model.path", str(project / "base")]
    args += ["--steps", "2", "--save.every", "0", "--data.eval", f"{project}/few.jsonl"]
    assert main(args) == 0

    config, _ = source_config(str(project / "base"), {}, scores=True)
    plan = make_adapter(from_hf(config), PeftSection(method="lora", r=4))
    model = load_hf(str(project / "base"), scores=True, peft=plan)
    graph, weights, rest = nnx.split(model, plan.trains, ...)
    moved = jax.tree.map(lambda x: x + 0.02, weights)
    tokenizer = load_tokenizer(project / "tokenizer")
    save_adapter(nnx.merge(graph, moved, rest), str(project / "judge"), tokenizer)
    return project


def exported(capsys, run, out, *flags):
    """The figures that `export --check` prints."""
    capsys.readouterr()
    assert main(["export", str(run), str(out), "--check", *flags]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    found = FIGURES.search(said.err)
    assert found, said.err
    return found.groups()


@pytest.mark.parametrize(
    ("run", "flags", "dtype", "packages"),
    [
        pytest.param("base", (), "float32", "transformers, torch", marks=pytest.mark.sweep),
        ("base", ("--dtype", "bfloat16"), "bfloat16", "transformers, torch"),
        pytest.param("half", (), "float16", "transformers, torch", marks=pytest.mark.sweep),
        ("lora", (), "float32", "transformers, torch, peft"),
        pytest.param(
            "lora", ("--merge",), "float32", "transformers, torch", marks=pytest.mark.sweep
        ),
        ("judge", (), "float32", "transformers, torch, peft"),
        pytest.param(
            "judge", ("--merge",), "float32", "transformers, torch", marks=pytest.mark.sweep
        ),
    ],
)
def test_an_export_computes_the_same_in_transformers_and_peft(
    runs, capsys, tmp_path, run, flags, dtype, packages
):
    found = exported(capsys, runs / run, tmp_path / "out", *flags)
    what = "scores" if run == "judge" else "log-probabilities"
    count, kind, prompts, tokens, largest, mean, versions, stored, changed = found
    assert (kind, stored) == (what, dtype)
    assert re.sub(r" [\d.+a-z]+(?=,|$)", "", versions) == f"jaxllm, {packages}"
    of_run = "the run's data" if run == "lora" else "random tokens"
    assert prompts == f"{PROMPTS} prompts of {of_run}"
    tokens = int(tokens.replace(",", ""))
    assert int(count.replace(",", "")) == (PROMPTS if what == "scores" else tokens - PROMPTS)
    assert 0 <= float(mean) <= float(largest) < 1e-4 < TOLERANCE
    assert (changed is not None) == ("--merge" in flags)
    assert changed is None or float(changed) > 1e-3
    card = (tmp_path / "out" / CARD).read_text()
    assert f"| largest difference | {largest} (tolerance 0.001) |" in card
    assert "| result | they agree |" in card


def spoil(file):
    """Doubles one row of a weight."""
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if "down_proj" in n)
    value = tensors[name].copy()
    value[0] *= 2
    save_file(tensors | {name: value}, file, {"format": "pt"})


@pytest.mark.parametrize("flags", [pytest.param((), marks=pytest.mark.sweep), ("--merge",)])
def test_a_wrong_weight_is_found_and_the_export_stays(runs, capsys, tmp_path, monkeypatch, flags):
    """The file is changed after our side has read it."""
    out, read = tmp_path / "out", export_check.token_values

    def with_a_wrong_weight(folder, *args, **keys):
        spoil(next(folder.glob("*model.safetensors")))
        return read(folder, *args, **keys)

    monkeypatch.setattr(export_check, "token_values", with_a_wrong_weight)
    args = ["export", str(runs / "lora"), str(out), "--check", *flags]
    refused(capsys, args, f"{out} is written, but its log-probabilities differ by up to ")
    assert (out / ("config.json" if flags else "adapter_config.json")).is_file()
    assert "| result | **they differ** |" in (out / CARD).read_text()


def test_merging_an_adapter_that_changes_nothing_is_an_error(runs, capsys, tmp_path, monkeypatch):
    untrained, out = tmp_path / "untrained", tmp_path / "out"
    assert main(["export", str(runs / "lora"), str(untrained)]) == 0
    file = untrained / "adapter_model.safetensors"
    tensors = load_file(file)
    zeros = {n: np.zeros_like(x) for n, x in tensors.items() if "lora_B" in n}
    assert zeros
    save_file(tensors | zeros, file, {"format": "pt"})
    args = ["export", str(untrained), str(out), "--check", "--merge"]
    refused(capsys, args, f"{out} is written, but the adapter changes nothing")
    tiny = {n: x * 1e-9 for n, x in tensors.items() if "lora_B" in n}
    save_file(tensors | tiny, file, {"format": "pt"})
    refused(capsys, [*args, "--dtype", "bfloat16"], "its changes are lost in bfloat16")


def test_what_transformers_does_not_load_is_an_error(runs, capsys, tmp_path, monkeypatch):
    read = export_check.token_values

    def without_weights(folder, *args, **keys):
        (folder / "model.safetensors").unlink()
        return read(folder, *args, **keys)

    monkeypatch.setattr(export_check, "token_values", without_weights)
    args = ["export", str(runs / "base"), str(tmp_path / "out"), "--check"]
    refused(capsys, args, "out is written, but transformers does not load it")


def test_a_check_without_the_extra_is_refused_before_anything_is_written(
    runs, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("jaxllm.parity.exported.find_spec", lambda name: None)
    args = ["export", str(runs / "lora"), str(tmp_path / "out"), "--check"]
    refused(capsys, args, "--check needs torch and peft", "pip install 'jaxllm[parity]'")
    refused(capsys, [*args, "--merge"], "--check needs torch, not installed")
    assert not (tmp_path / "out").exists()


def test_prompts_are_the_evaluation_data_or_random_tokens(runs):
    cfg = from_dict(json.loads((runs / "lora" / "config.json").read_text()))
    tokenizer = load_tokenizer(runs / "lora" / "final")
    found, about = prompts_of(cfg, tokenizer, 50, 500)
    first = json.loads((runs / "few.jsonl").read_text().splitlines()[0])["messages"][0]["content"]
    assert first[:20] in tokenizer.decode(found[0])
    assert about == "32 prompts of the run's data"
    (runs / "two.jsonl").write_text("".join(open(runs / "few.jsonl").readlines()[:2]))
    data = replace(cfg.data, eval=(replace(cfg.data.eval[0], path=str(runs / "two.jsonl")),))
    few, about = prompts_of(replace(cfg, data=data), tokenizer, 50, 500)
    assert about == "2 prompts of the run's data and 30 prompts of random tokens"
    assert [*map(list, few[:2])] == [*map(list, found[:2])]
    assert not {*np.concatenate(few[2:])} & {*tokenizer.all_special_ids}
    again, _ = prompts_of(replace(cfg, data=data), tokenizer, 50, 500)
    assert all(np.array_equal(a, b) for a, b in zip(few, again, strict=True))
    gone = replace(cfg.data, eval=(replace(cfg.data.eval[0], path="gone.jsonl"),))
    assert prompts_of(replace(cfg, data=gone), tokenizer, 50, 500)[1] == (
        "32 prompts of random tokens"
    )


def test_a_final_model_has_the_card_of_its_export(runs, tmp_path):
    exports.export(str(runs / "lora"), str(tmp_path / "out"))
    card = (tmp_path / "out" / CARD).read_text()
    assert (runs / "lora" / "final" / CARD).read_text() == card
    assert "| `few` | perplexity |" in card and "peft.r: 4\n" in card


def test_a_bucket_is_refused_before_anything_is_written(runs):
    with pytest.raises(ValueError, match="is in a bucket, where this is not supported"):
        exports.export(str(runs / "base"), "s3://bucket/out", check=True)
