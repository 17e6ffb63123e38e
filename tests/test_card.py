# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: what it says and leaves out, and whose README.md it replaces."""

import json

import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from huggingface_hub import ModelCard
from runs import MODEL
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jaxllm.card import Origin, license_of, model_card, shown
from jaxllm.checkpoint import Checkpoints
from jaxllm.config import DataSection, ModelSection, PeftSection, Source, TrainConfig, to_dict
from jaxllm.exports import export
from jaxllm.files import CARD, own_card
from jaxllm.hf import load_hf, save_adapter, save_hf
from jaxllm.model.families import from_hf
from jaxllm.peft.files import make_adapter
from jaxllm.run import RunFolder
from jaxllm.tokenizer import load_tokenizer

TOKEN = "hf_0123456789abcdefABCDEF"
SECRETS = (TOKEN, "password", "signature", "/data/me", "private-bucket")
SOURCES = (
    "owner/chats",
    f"https://me:{TOKEN}@example.com/a.jsonl",
    "https://me:password@example.com/b.jsonl?token=signature#signature",
    "/data/me/c.jsonl",
    "s3://private-bucket/d.jsonl",
    "data/text/e.jsonl",
)
SHOWN = ("owner/chats", "https://example.com/a.jsonl", "https://example.com/b.jsonl")
SHOWN += ("c.jsonl", "d.jsonl", "data/text/e.jsonl")


@pytest.fixture(scope="module")
def base(project):
    """A model directory."""
    torch.manual_seed(0)
    shape = {k: v for k, v in MODEL.items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))
    model.save_pretrained(project / "base")
    AutoTokenizer.from_pretrained(project / "tokenizer").save_pretrained(project / "base")
    return project / "base"


@pytest.fixture(scope="module")
def run(base):
    """The folder of a run that started from a model of the hub, with checkpoints 1 and 2."""
    folder = base.parent / "run"
    data = DataSection(train=tuple(map(Source, SOURCES)), system=f"Your key is {TOKEN}.")
    rewards = "/data/me/rewards.py:exact"
    cfg = TrainConfig(
        objective="sft",
        model=ModelSection(path="owner/base", tokenizer="/data/me/tokenizer"),
        data=data,
        batch_size=24,
        output_dir=str(folder),
    )
    values = to_dict(cfg)
    values["rl"]["rewards"] = [rewards]
    model = load_hf(str(base))
    RunFolder(cfg).save_start(model, load_tokenizer(base))
    (folder / "config.json").write_text(json.dumps(values))
    saves = Checkpoints(folder / "checkpoints")
    for step in (1, 2):
        weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        saves.save(step, {"trainable": weights, "step": jnp.int32(step)}, meta={})
    saves.close()
    counts = {"examples": 1234, "tokens": 56789, "learned_tokens": None}
    sources = [{"path": path, **counts} for path in SOURCES]
    manifest = {"train": {"sources": sources}, "eval": {"few|odd`": {"sources": sources[:1]}}}
    (folder / "data.json").write_text(json.dumps(manifest))
    lines = [
        {"kind": "train", "step": 2, "loss": 9.0},
        {"kind": "eval", "step": 1, "name": "few", "loss": 3.0},
        {"kind": "eval", "step": 2, "name": "few", "time": 1.5, "loss": 2.0, "tokens": 1000},
        {"kind": "eval", "step": 2, "name": "few", "time": 2.5, "loss": 1.23456, "tokens": 1000},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"ki')
    return folder


def test_a_card_says_how_the_model_was_made_and_has_no_secret(run, tmp_path):
    export(str(run), str(tmp_path / "out"), "bfloat16")
    text = (tmp_path / "out" / CARD).read_text()
    for secret in SECRETS:
        assert secret not in text
    data = ModelCard.load(tmp_path / "out" / CARD).data.to_dict()
    assert data == {
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxllm", "sft"],
        "datasets": ["owner/chats"],
    }
    for name in SHOWN:
        assert f"| `train` | `{name}` | 1,234 | 56,789 | streamed |" in text
    assert r"| `few\|odd'` | `owner/chats` |" in text
    assert "batch_size: 24\n" in text and 'rl.rewards: ["rewards.py:exact"]\n' in text
    assert 'data.system: "Your key is ….' in text and "output_dir" not in text
    assert "parameters in bfloat16 |\n| checkpoint | step 2 |" in text
    evaluation = text.partition("## Evaluation")[2].partition("##")[0]
    assert "| `few` | loss | 1.235 |\n| `few` | tokens | 1,000 |\n\n" in evaluation
    assert "2.5" not in evaluation and "3" not in evaluation.replace("1.235", "")
    assert "jaxllm 0.1.0, jax " in text
    export(str(run), str(tmp_path / "first"), step=1)
    first = (tmp_path / "first" / CARD).read_text()
    with pytest.raises(ValueError, match="is checkpoint 2; drop --step 1"):
        export(str(run / "checkpoints" / "2"), str(tmp_path / "none"), step=1)
    assert "| checkpoint | step 1 |" in first and "| `few` | loss | 3 |" in first


def test_an_export_replaces_only_a_card_that_jaxllm_wrote(run, base, tmp_path):
    out = tmp_path / "out"
    export(str(run), str(out), step=1)
    export(str(run), str(out))
    assert own_card(out) is None and "step 2" in (out / CARD).read_text()
    edited = (out / CARD).read_text().replace("# base", "# My model")
    for text in (edited, "my model card", "---\nlicense: mit\n---\n"):
        (out / CARD).write_text(text)
        export(str(run), str(out))
        assert (out / CARD).read_text() == text
    (out / CARD).unlink()
    export(str(run), str(out))
    assert "step 2" in (out / CARD).read_text()
    save_hf(load_hf(str(base)), str(out))  # other weights, of which the old card is not true
    assert not (out / CARD).exists()


def test_adapters_and_merged_models_of_a_local_base_have_cards(base, tmp_path):
    (base / CARD).write_text("---\nlicense: other\nlicense_name: mine\ntags: [x]\n---\n# Base\n")
    cfg = from_hf(json.loads((base / "config.json").read_text()))
    plan = make_adapter(cfg, PeftSection(method="lora", r=2))
    adapter = load_hf(str(base), peft=plan)
    origin = Origin(TrainConfig(objective="dpo", peft=PeftSection(method="lora")), 7, tmp_path)
    save_adapter(
        adapter,
        str(tmp_path / "adapter"),
        load_tokenizer(base),
        card=model_card(adapter, origin, None),
    )
    card = ModelCard.load(tmp_path / "adapter" / CARD)
    own = {"license": "other", "license_name": "mine", "pipeline_tag": "text-generation"}
    tags = ["jaxllm", "dpo", "lora"]
    assert card.data.to_dict() == own | {"library_name": "peft", "tags": tags}
    assert "# base: dpo with lora\n" in card.text and "| base model | `base` |" in card.text
    assert "parameters in float32 |\n| checkpoint | step 7 |" in card.text
    assert "## Data" not in card.text and str(tmp_path) not in card.content
    export(str(tmp_path / "adapter"), str(tmp_path / "merged"), merge=True)
    card = ModelCard.load(tmp_path / "merged" / CARD)
    merged = {"library_name": "transformers", "tags": ["jaxllm", "lora"]}
    assert card.data.to_dict() == own | merged
    assert "| method | lora, merged into the base model |" in card.text


@pytest.mark.parametrize(
    "text",
    ["", "---\n", "---\n- a\n---\n", "---\n{\n---\n", "---\nlicense: [a, b]\n---\n", "---\nlicense"]
    + [f"---\n{'a: &a [*a]' * 9}\n---\n", f"---\nlicense: {'x' * 70_000}\n---\n"],
)
def test_a_base_whose_card_has_no_license_is_accepted(tmp_path, text):
    (tmp_path / CARD).write_text(text)
    assert license_of(str(tmp_path)) == {}


def test_what_is_shown_of_a_path():
    assert tuple(map(shown, SOURCES)) == SHOWN
    assert shown("/no_think") == "/no_think"  # a system prompt
    assert shown("~/runs/sft/final") == "sft/final"
    assert shown("memory:0123") == "data in memory"
    for token in (TOKEN, "sk-0123456789abcdef", "ghp_0123456789abcdef", "AKIA0123456789ABCDEF"):
        assert shown(f"use {token}!") == "use …!"
