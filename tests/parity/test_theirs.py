# SPDX-License-Identifier: Apache-2.0
"""The user's run is read from YAML, JSON, DeepSpeed files and scripts, and no script is run."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from runs import MODEL, refused
from tiny import hf_config

from jaxllm.errors import UserError
from jaxllm.parity import command
from jaxllm.parity.reading import read_theirs
from jaxllm.parity.theirs import RECORD, cut_model, numbered

SCRIPT = """\
import torch
from pathlib import Path
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

Path({mark!r}).write_text("ran")
NAME = "base"
RATE = 3e-4
twice = 1
twice = 2
model = AutoModelForCausalLM.from_pretrained(NAME, torch_dtype=torch.bfloat16)
args = SFTConfig(
    "out", learning_rate=RATE, max_length=64, warmup_steps=len([1, 2]), seed=twice, packing=True,
    report_to="wandb", **dict(beta=1))
peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
SFTTrainer(model=model, args=args, peft_config=peft).train()
"""


def written(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder / name)


def test_a_script_is_read_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    found = read_theirs(written(tmp_path, "train.py", SCRIPT.format(mark=str(mark))))
    assert not mark.exists()
    assert (found.objective, found.model) == ("sft", "base")
    assert found.arguments == {"learning_rate": 3e-4, "max_length": 64, "packing": True}
    assert found.lora == {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    names = {one.name: (one.value, one.where.rpartition(":")[2]) for one in found.names}
    assert names["learning_rate"] == (3e-4, "14")
    assert names["dtype"] == ("bfloat16", "12")
    assert names["peft.r"] == (4, "16") and names["peft.method"][0] == "lora"
    said = "\n".join(found.notes)
    assert "train.py:14: warmup_steps=len([1, 2]) is no literal" in said
    assert "train.py:14: seed=twice is no literal" in said  # assigned twice
    assert "train.py:15: **dict(beta=1) is no literal" in said


@pytest.mark.parametrize(
    "again", ["RATE *= 2", "for RATE in [1]: pass", "def f(RATE=1): pass", "RATE: float = 2"]
)
def test_a_name_that_is_bound_again_is_not_read(tmp_path, again):
    script = "RATE = 1e-4\nSFTConfig(learning_rate=RATE)\n"
    assert read_theirs(written(tmp_path, "a.py", script)).arguments == {"learning_rate": 1e-4}
    found = read_theirs(written(tmp_path, "b.py", f"{script}{again}\n"))
    assert not found.arguments and "b.py:2: learning_rate=RATE is no literal" in found.notes[0]


def test_a_yaml_of_trl_has_the_defaults_of_trl_for_lora(tmp_path):
    text = "model_name_or_path: base\nuse_peft: true\nlora_r: 4\nlearning_rate: 1e-4\nbf16: true\n"
    found = read_theirs(written(tmp_path, "run.yaml", text))
    assert found.lora == {"r": 4, "lora_alpha": 32, "lora_dropout": 0.05}
    assert found.arguments == {"learning_rate": 1e-4, "bf16": True}
    assert found.model == "base" and found.objective is None


def test_a_file_of_llama_factory_is_in_the_terms_of_trl(tmp_path):
    text = "stage: dpo\nfinetuning_type: lora\nlora_rank: 4\nlora_target: all\ncutoff_len: 64\n"
    text += "warmup_ratio: 0.1\npref_beta: 0.2\npref_loss: sigmoid\n"
    found = read_theirs(written(tmp_path, "run.yaml", text))
    assert found.objective == "dpo"
    assert found.lora == {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    wanted = {"max_length": 64, "warmup_steps": 0.1, "beta": 0.2, "loss_type": ["sigmoid"]}
    assert found.arguments == wanted
    assert "LLaMA-Factory" in found.notes[0]


def test_a_deepspeed_file_gives_batch_clipping_and_optimizer(tmp_path):
    params = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": "auto", "weight_decay": 0.1}
    block = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    block["optimizer"] = {"type": "AdamW", "params": params}
    found = read_theirs(written(tmp_path, "ds.json", json.dumps(block)))
    assert found.arguments == {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
    }
    assert found.deepspeed == block


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("run.txt", "a: 1", "give a .yaml, .json or .py file"),
        ("run.yaml", "optim.learning_rate: 1", "optim.learning_rate is a key of jaxllm"),
        ("run.py", "def f(:\n", "run.py:1: not Python"),
        ("run.py", "x = 1\n", "a run has one SFTConfig, DPOConfig or RewardConfig; seen none"),
        ("run.py", "SFTConfig()\ntrl.DPOConfig()\n", "SFTConfig in line 1, DPOConfig in line 2"),
        ("run.py", "SFTConfig(deepspeed={})\n", "deepspeed= is a dict; save it as a JSON file"),
        ("run.yaml", "finetuning_type: lora\nlora_rank: {a: 1}\n", "lora_rank: seen"),
        ("ds.json", '{"optimizer": {"type": "Lion"}}', "optimizer.type lion"),
        (
            "ds.json",
            '{"train_batch_size": "x"}',
            "train_batch_size of the DeepSpeed file: seen 'x'",
        ),
        ("ds.json", '{"optimizer": {"type": "Adam", "params": {"betas": [1]}}}', "betas of the"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, content, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        read_theirs(written(tmp_path, name, content))


def test_records_are_lines_of_the_file_whatever_their_text_has(tmp_path):
    texts = ["a\u2028b", "c\x85d\x0ce\nf"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    found = numbered({"data": written(tmp_path, "data.jsonl", "".join(lines))})
    assert found["text"] == texts and found[RECORD] == [0, 1]


def test_no_cut_is_made_of_a_multimodal_model(tmp_path):
    written(tmp_path, "config.json", '{"model_type": "gemma3"}')
    with pytest.raises(ValueError, match="is a multimodal model, of which parity makes no cut"):
        cut_model({"model": str(tmp_path)}, tmp_path / "cut")


def test_a_cut_has_the_first_kinds_of_layers(tmp_path, project):
    config = hf_config("nemotron_h without experts, biases, least steps")
    written(tmp_path, "config.json", json.dumps(config | {"num_hidden_layers": 4}))
    spec = {"model": str(tmp_path), "tokenizer": str(project / "tokenizer"), "layers": 2}
    cut = tmp_path / "cut"
    _, whole = cut_model(spec | {"verb": "sft", "seed": 0}, cut)
    kinds = json.loads((cut / "config.json").read_text())["layers_block_type"]
    assert (whole, kinds) == (4, ["mlp", "linear_attention"])


def test_a_template_that_does_not_end_is_stopped_before_trl_runs_it(
    tmp_path, project, capsys, monkeypatch
):
    monkeypatch.setattr(command, "NEEDED", ())
    monkeypatch.setattr(command, "run_theirs", None)
    monkeypatch.setattr("jaxllm.untrusted.SECONDS", 1)
    model = tmp_path / "model"
    shutil.copytree(project / "tokenizer", model)
    (model / "config.json").write_text(json.dumps(MODEL))
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (model / "chat_template.jinja").write_text(endless)
    run = written(tmp_path, "run.yaml", "learning_rate: 1e-4\n")
    line = ["parity", run, "--data", str(project / "few.jsonl"), "--objective", "sft"]
    refused(capsys, [*line, "--model", str(model)], "the chat template takes more than 1 seconds")


def test_mistakes_of_the_command_are_one_line(tmp_path, project, capsys, monkeypatch):
    run = written(tmp_path, "run.yaml", "learning_rate: 1e-4\n")
    data, model = str(project / "few.jsonl"), str(project)
    line = ["parity", run, "--data", data]
    refused(capsys, line, "give --objective", "run.yaml does not say which")
    refused(capsys, [*line, "--objective", "kto"], "one of sft, dpo, reward", "seen kto")
    refused(capsys, [*line, "--objective", "sft"], "names no model; give --model DIR")
    full = [*line, "--objective", "sft", "--model"]
    refused(capsys, [*full, str(tmp_path / "no")], "no")
    refused(capsys, ["parity", run, "--data", "no.jsonl", *full[4:], model], "no.jsonl")
    refused(capsys, [*full, model, "--optim.rate", "1"], "unknown flag --optim.rate")
    monkeypatch.setattr(command, "find_spec", lambda n: None if n == "trl" else find_spec(n))
    refused(capsys, [*full, model], "trl not installed; pip install 'jaxllm[parity]'")
