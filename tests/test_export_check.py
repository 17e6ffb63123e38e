# SPDX-License-Identifier: Apache-2.0
"""`jaxllm export --check`: a directory in transformers, peft and vLLM; what a check finds."""

import json
import os
import re
import sys
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
from jaxllm.parity.exported import python_of_vllm
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
    shape["head_dim"] = 32  # vLLM has no kernel for a smaller one
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


@pytest.fixture(autouse=True)
def without_vllm(monkeypatch):
    """As on a machine without it."""
    monkeypatch.setattr(export_check, "python_of_vllm", lambda: None)


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


# What the program for vLLM uses of it, computed by transformers.
VLLM = """
from types import SimpleNamespace
import peft, torch, transformers

__version__ = "0.0.test"


class SamplingParams:
    def __init__(self, max_tokens, prompt_logprobs, detokenize):
        assert (max_tokens, prompt_logprobs, detokenize) == (1, 0, False)


class LLM:
    def __init__(self, path, dtype, max_model_len, max_lora_rank=0, **options):
        assert dtype == "float32" and not options["trust_remote_code"]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self.longest, self.rank = max_model_len, max_lora_rank

    def generate(self, prompts, params, lora_request, use_tqdm):
        if lora_request:
            self.model = peft.PeftModel.from_pretrained(self.model, lora_request.path)
            assert self.model.peft_config["default"].r <= self.rank
        return [self.logps(prompt["prompt_token_ids"]) for prompt in prompts]

    @torch.no_grad()
    def logps(self, prompt):
        assert len(prompt) < self.longest
        logps = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1) + OFFSET
        some = [{t: SimpleNamespace(logprob=float(x[t]))} for t, x in zip(prompt[1:], logps)]
        return SimpleNamespace(prompt_logprobs=[None, *some])
"""
LORA = """
from collections import namedtuple
LoRARequest = namedtuple("LoRARequest", "name number path")
"""


def with_vllm(monkeypatch, folder, text):
    """A command `vllm` whose environment has this text for the module."""
    package = folder / "packages" / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    (package / "lora" / "request.py").write_text(LORA)
    (folder / "bin").mkdir()
    for name in ("vllm", "python"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin", prepend=os.pathsep)
    monkeypatch.setattr(export_check, "python_of_vllm", python_of_vllm)
    assert python_of_vllm() == str(folder / "bin" / "python")


@pytest.mark.parametrize("run", ["lora", pytest.param("base", marks=pytest.mark.sweep)])
def test_an_export_is_compared_in_vllm_where_it_is(runs, capsys, tmp_path, monkeypatch, run):
    with_vllm(monkeypatch, tmp_path, VLLM.replace("+ OFFSET", ""))
    assert main(["export", str(runs / run), str(tmp_path / "out"), "--check"]) == 0
    first, second = FIGURES.finditer(capsys.readouterr().err)
    assert second[7].endswith(", vllm 0.0.test") and second[1] == first[1]
    assert float(second[5]) < 1e-4
    assert "## Check in vLLM\n" in (tmp_path / "out" / CARD).read_text()


@pytest.mark.sweep
def test_other_values_in_vllm_are_an_error(runs, capsys, tmp_path, monkeypatch):
    with_vllm(monkeypatch, tmp_path, VLLM.replace("OFFSET", "0.01"))
    args = ["export", str(runs / "base"), str(tmp_path / "out"), "--check"]
    words = "between jaxllm and vLLM", "In transformers they agree, so do not use it in vLLM"
    refused(capsys, args, "differ by up to 1.0e-02", *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise ValueError('no kernel\\nfor it')", "ValueError: no kernel\n"),
        pytest.param("import os; os._exit(3)", "ended with status 3", marks=pytest.mark.sweep),
    ],
)
def test_what_vllm_does_not_load_is_said(runs, capsys, tmp_path, monkeypatch, text, words):
    with_vllm(monkeypatch, tmp_path, text)
    assert main(["export", str(runs / "base"), str(tmp_path / "out"), "--check"]) == 0
    said = capsys.readouterr().err
    assert "check: not compared with vLLM: " in said and words in said
    assert len(FIGURES.findall(said)) == 1


@pytest.mark.real
@pytest.mark.parametrize("run", ["base", "lora"])
def test_an_export_computes_the_same_in_vllm(runs, capsys, tmp_path, monkeypatch, run):
    if not python_of_vllm():
        pytest.skip("vLLM is not installed")
    monkeypatch.setattr(export_check, "python_of_vllm", python_of_vllm)
    assert main(["export", str(runs / run), str(tmp_path / "out"), "--check"]) == 0
    said = capsys.readouterr().err
    assert "not compared" not in said, said
    _, (*_, largest, _, versions, _, _) = FIGURES.findall(said)
    assert "vllm" in versions and float(largest) < 2e-4


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
