# SPDX-License-Identifier: Apache-2.0
"""Configs of TRL and LLaMA-Factory and the book's launch line run; the names in the docs exist."""

import importlib
import json
import re
import shlex
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import pytest
import yaml
from runs import MODEL, lines_of
from transformers import AutoConfig, AutoModelForCausalLM

from jaxllm import hub
from jaxllm.cli import main
from jaxllm.config import aliases, leaves, load_config
from jaxllm.config.deepspeed import CARRIED
from jaxllm.config.schema import SECTIONS, leaf_of
from jaxllm.config.verbs import VERBS
from jaxllm.mesh import make_mesh
from jaxllm.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("on_one_device")

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

# ---- configs of other libraries, with the fields of their public examples

FACTORY = {
    "model_name_or_path": "base",
    "trust_remote_code": True,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "all",
    "dataset": "identity,alpaca_en_demo",
    "template": "llama3",
    "cutoff_len": 64,
    "max_samples": 20,
    "overwrite_cache": True,
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 4,
    "output_dir": "saves/sft",
    "logging_steps": 2,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "save_only_model": False,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": False,
    "ddp_timeout": 180000000,
    "resume_from_checkpoint": None,
    "val_size": 0.1,
    "per_device_eval_batch_size": 1,
    "eval_strategy": "steps",
    "eval_steps": 500,
}
FACTORY_DPO = {name: value for name, value in FACTORY.items() if "eval" not in name} | {
    "stage": "dpo",
    "dataset": "dpo_en_demo",
    "output_dir": "saves/dpo",
    "pref_beta": 0.1,
    "pref_loss": "sigmoid",
    "pref_ftx": 0.5,
    "val_size": 0.0,
    "template": "qwen",
    "max_steps": 2,
}
TRL = {
    "model_name_or_path": "base",
    "dataset_name": "chats.jsonl",
    "dtype": "float32",
    "learning_rate": 2.0e-4,
    "num_train_epochs": 1,
    "max_steps": 2,
    "packing": True,
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "completion_only_loss": None,
    "assistant_only_loss": True,
    "eval_strategy": "no",
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "logging_steps": 1,
    "report_to": "none",
    "output_dir": "trl/sft",
}
TRL_DPO = {name: value for name, value in TRL.items() if "_only_" not in name} | {
    "dataset_name": "data/pairs.json",
    "output_dir": "trl/dpo",
    "beta": 0.1,
    "loss_type": ["sigmoid", "bco_pair"],
    "loss_weights": [1.0, 0.5],
    "precompute_ref_log_probs": False,
    "optim": "adamw_8bit",
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "run_name": "first",
    "push_to_hub": True,
    "hub_model_id": "mine/dpo",
    "hub_private_repo": True,
    "hub_strategy": "every_save",
}
TRL_GRPO = {
    "model_name_or_path": "base",
    "dataset_name": "prompts.jsonl",
    "reward_funcs": ["rewards.py:score"],
    "num_generations": 4,
    "max_prompt_length": 16,
    "max_completion_length": 16,
    "use_vllm": True,
    "vllm_mode": "colocate",
    "log_completions": True,
    "importance_sampling_level": "sequence",
    "loss_type": "cispo",
    "delta": 2.0,
    "scale_rewards": "batch",
}
FACTORY_OFT = {"stage": "sft", "finetuning_type": "oft", "use_galore": True, "resize_vocab": True}


@pytest.fixture(scope="module")
def place(project):
    """The project with a model, and data as LLaMA-Factory lays it out."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL))
    model.save_pretrained(project / "base")
    load_tokenizer(project / "tokenizer").save_pretrained(project / "base")
    chats = [json.loads(x) for x in (project / "few.jsonl").read_text().splitlines()]
    said = [[m["content"][:40] for m in chat["messages"]] for chat in chats]
    records = [{"instruction": q, "input": "", "output": a} for q, a in said]
    pairs = [{"instruction": q, "chosen": f"yes {a}", "rejected": "no"} for q, a in said]
    info = {
        "identity": {"file_name": "identity.json"},
        "alpaca_en_demo": {"file_name": "alpaca.json"},
        "dpo_en_demo": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
    }
    contents = {"identity": records, "alpaca": records[::-1], "pairs": pairs, "dataset_info": info}
    (project / "data").mkdir()
    for name, content in contents.items():
        (project / "data" / f"{name}.json").write_text(json.dumps(content))
    return project


@pytest.fixture
def run(place, monkeypatch):
    """Runs a config in the project, on one device."""
    monkeypatch.chdir(place)
    module = importlib.import_module("jaxllm.training")
    monkeypatch.setattr(module, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    monkeypatch.setenv("HOME", str(place))

    def run(verb, config, *args):
        Path("run.yaml").write_text(yaml.safe_dump(config))
        return main([verb, "run.yaml", *args])

    return run


def test_a_config_of_llama_factory_runs(run, capsys):
    assert run("sft", FACTORY) == 0
    said = capsys.readouterr().err
    assert re.search(r"no effect here: .*run\.yaml:\d+: plot_loss, ", said)
    assert "template: llama3: the tokenizer's own chat template is used" in said
    assert Path("saves/sft/final/adapter_model.safetensors").is_file()
    assert lines_of(Path("saves/sft"), "eval")
    config = json.loads(Path("saves/sft/config.json").read_text())
    assert config["peft"]["lora_alpha"] == 8 and config["data"]["max_length"] == 64
    assert [source["max_samples"] for source in config["data"]["train"]] == [20, 20]


@pytest.mark.sweep
def test_a_dpo_config_of_llama_factory_runs(run):
    assert run("dpo", FACTORY_DPO) == 0
    align = json.loads(Path("saves/dpo/config.json").read_text())["align"]
    assert align["loss"] == ["sigmoid", "sft"] and align["loss_weights"] == [1.0, 0.5]


@pytest.mark.sweep
def test_a_config_of_trl_runs(run):
    assert run("sft", TRL) == 0
    assert Path("trl/sft/final/adapter_model.safetensors").is_file()


class Hub:
    """A hub that records what it is asked; `fails` makes an upload fail."""

    calls: list = []
    fails = public = False

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))
        return SimpleNamespace(repo_id=name)

    def repo_info(self, name):
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, repo_id, folder_path, **_):
        assert (Path(folder_path) / "adapter_model.safetensors").is_file()
        self.calls.append(("upload", repo_id, folder_path))
        if self.fails:
            raise ConnectionError("no route to host\nlong trace")
        return f"https://hub/{repo_id}/commit/1"


def test_a_dpo_config_of_trl_runs_and_is_uploaded(run, monkeypatch, capsys):
    monkeypatch.setattr(hub, "HfApi", Hub)
    assert run("dpo", TRL_DPO) == 0
    assert Hub.calls[0] == ("create", "mine/dpo", {"private": True, "exist_ok": True})
    assert Hub.calls[-1] == ("upload", "mine/dpo", "trl/dpo/final")
    assert all(private for kind, *_, private in Hub.calls if kind == "create")
    said = capsys.readouterr().err
    assert "adamw_8bit runs as adamw" in said and "\nhttps://hub/mine/dpo/commit/1\n" in said
    config = json.loads(Path("trl/dpo/config.json").read_text())
    assert config["optim"]["final"] == 0.1 and config["log"]["run_name"] == "first"

    monkeypatch.setattr(Hub, "fails", True)  # the run is done; it only writes final/ again
    assert run("dpo", TRL_DPO) == 0
    said = capsys.readouterr().err
    assert "warning: not uploaded: no route to host\n" in said
    assert "to upload it: hf upload mine/dpo trl/dpo/final\n" in said


def test_a_hub_that_refuses_is_found_before_training(run, monkeypatch, capsys):
    def refuse(*_, **__):
        raise PermissionError("401 Unauthorized\nlong trace")

    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(create_repo=refuse))
    assert run("dpo", TRL_DPO | {"output_dir": "trl/none"}) == 2
    said = capsys.readouterr().err
    monkeypatch.setattr(Hub, "public", True)
    monkeypatch.setattr(hub, "HfApi", Hub)
    assert run("dpo", TRL_DPO | {"output_dir": "trl/none"}) == 2
    assert "error: save.hub mine/dpo: mine/dpo exists and is public" in capsys.readouterr().err
    assert "error: save.hub mine/dpo: 401 Unauthorized (`hf auth login`, or HF_TOKEN, gives" in said
    assert "step" not in said.replace("steps", "") and not Path("trl/none/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("verb", "config", "lacks"),
    [
        (
            "grpo",
            TRL_GRPO,
            (
                "importance_sampling_level: the ratio is that of each token; use token",
                "loss_type: 'cispo' is not known; known: dapo, bnpo, grpo, dr_grpo",
                "delta: a second clipping bound is not supported",
                "scale_rewards: 'batch' is not known; known: group, none",
            ),
        ),
        (
            "sft",
            FACTORY_OFT,
            (
                "finetuning_type: oft is not supported; use lora or full",
                "use_galore: this optimizer is not supported",
                "resize_vocab: the vocabulary is that of the model",
            ),
        ),
    ],
)
def test_a_config_says_in_one_go_what_it_lacks(run, verb, config, lacks, capsys):
    assert run(verb, config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"jaxllm: error: {len(lacks)} mistakes: (1) ")
    for text in lacks:
        assert text in line


BOOK = """--config_name model.json --tokenizer_name tokenizer --train_files text.txt
    --per_device_train_batch_size 16 --gradient_accumulation_steps 4 --do_train
    --output_dir output/pretrain --evaluation_strategy no --learning_rate 1e-4 --num_train_epochs 1
    --warmup_steps 200 --logging_dir output/pretrain/logs --logging_strategy steps
    --logging_steps 5 --save_strategy steps --save_steps 100 --preprocessing_num_workers 10
    --save_total_limit 1 --seed 12 --block_size 64 --bf16 --gradient_checkpointing
    --deepspeed ds_config_zero2.json --report_to swanlab"""


def test_the_launch_line_of_the_book_runs(run, place, monkeypatch, capsys):
    """As chapter 6 of happy-llm has it, with files and length of its own."""
    swanlab = MagicMock()
    swanlab.__spec__ = ModuleSpec("swanlab", None, origin="swanlab/__init__.py")
    swanlab.Settings.return_value = SimpleNamespace(api_key=None, mode="online")
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    (place / "ds_config_zero2.json").write_text(
        (ROOT / "configs" / "deepspeed" / "zero2.json").read_text()
    )
    assert main(["pretrain", *shlex.split(BOOK)]) == 0
    said = capsys.readouterr().err
    assert swanlab.init.call_args.kwargs["mode"] == "offline"
    sent = [call.args[0] for call in swanlab.init.return_value.log.call_args_list]
    assert any("train/loss" in numbers for numbers in sent)
    assert "ignored, no effect here: --do_train, --logging_dir, ds_config_zero2.json: " in said
    steps = max(lines_of(Path("output/pretrain")))
    assert steps < 200 and f"optim.warmup is 200 steps and the run has {steps}, so the" in said
    rates = [line["learning_rate"] for line in lines_of(Path("output/pretrain")).values()]
    assert rates == sorted(rates) and 0 < rates[-1] < 1e-4


def test_the_launch_line_of_the_docs_is_that_of_the_book():
    page = (ROOT / "docs" / "coming-from.md").read_text()
    line = page.partition("```bash\njaxllm pretrain \\\n")[2].partition("```")[0]
    flags = re.findall(r"--(\w+)", BOOK)
    assert re.findall(r"^ +--(\w+)", line, re.MULTILINE) == flags
    same = {"--warmup_steps 200", "--preprocessing_num_workers 10", "--seed 12", "--save_steps 100"}
    assert all(text in line and text in " ".join(BOOK.split()) for text in same)


# ---- names in the documentation

SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
KEY = re.compile(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_][\w.]*")
FILES = re.compile(r"\.(py|json|jsonl|md|safetensors|yaml|txt|html|bin)\b")
# In the first column of docs/coming-from.md, but no argument.
NO_ARGUMENTS = {
    "run_clm", "save_pretrained", "prepare_model_for_kbit_training", "merge_and_unload",
    "get_peft_model", "load_adapter", "set_adapter", "add_weighted_adapter",
    "print_trainable_parameters", "formatting_func", "lm_eval", "accelerate", "deepspeed",
    "optimizer", "scheduler", "false", "true", "null",
}  # fmt: skip


def test_every_key_that_the_documentation_names_is_a_key():
    for page in PAGES:
        for span in SPAN.findall(page.read_text()):
            if "(" in span or "://" in span or span.startswith("jaxllm."):
                continue
            for key in KEY.findall(span):
                key = key.rstrip(".")
                if not FILES.search(key) and f"/{key}" not in span:
                    assert leaf_of(key) or key in aliases.NAMES, f"{page.name}: `{span}`"


def test_every_argument_that_the_migration_tables_name_is_accepted():
    page = (ROOT / "docs" / "coming-from.md").read_text()
    known = aliases.NAMES | set(leaves()) | {key.partition(".")[0] for key in CARRIED}
    stages = {verb.stage for verb in VERBS.values()} | set(VERBS)
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    names = {
        name for row in rows for name in re.findall(r"`(?:--)?([a-z]\w+)(?:[=: ][^`]*)?`", row)
    }
    assert len(names) > 80
    assert not names - known - NO_ARGUMENTS - stages


def test_every_flag_of_a_training_command_in_the_documentation_is_accepted():
    found = 0
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for verb, rest in re.findall(rf"\bjaxllm ({'|'.join(VERBS)}) ([^`\n]*)", text):
            for flag in re.findall(r"(?<!\S)--([A-Za-z][\w.-]*)", rest.partition(" #")[0]):
                name = flag.replace("-", "_").removeprefix("no_")
                known = leaf_of(name) or name in aliases.NAMES or name in COMMON
                assert known, f"{page.name}: jaxllm {verb} … --{flag}"
                found += 1
    assert found > 60


COMMON = {"explain", "schema", "help", "on", "nodes", "dry_run", "options", "image", "resource"}


def test_the_names_in_the_table_of_commands_are_commands():
    table = (ROOT / "README.md").read_text().partition("## Commands")[2].partition("## Python")[0]
    for row in re.findall(r"^\| (.+?) \|", table, re.MULTILINE):
        for name in re.findall(r"`([a-z ]+)`", row):
            assert name.split()[0] in importlib.import_module("jaxllm.cli").VERBS
    assert load_config("sft")[0].objective == "sft"
