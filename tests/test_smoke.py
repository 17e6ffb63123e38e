# SPDX-License-Identifier: Apache-2.0
"""The main path in a minute, without torch: train, save, load, generate, tune by LoRA."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np

WITHOUT_TORCH = """
import importlib, json, pkgutil, sys
# As if they were not installed. lm_eval imports scipy, which stumbles over this stand-in of torch.
sys.modules |= {"torch": None, "lm_eval": None, "evaluate": None}
import jaxllm
for module in pkgutil.walk_packages(jaxllm.__path__, "jaxllm."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:
            if missing.name.split(".")[0] not in ("starlette", "uvicorn", "lm_eval", "evaluate"):
                raise
import transformers
assert not transformers.is_torch_available()
from dataclasses import replace
from pathlib import Path
from jaxllm.config import MeshSection, ModelSection, TrainConfig
from jaxllm.config.checks import resolve
from jaxllm.program import build
from jaxllm.run import RunFolder
from jaxllm.mesh import make_mesh
from jaxllm.model.families import as_reward, from_hf, to_hf
from jaxllm.model.families.table import FAMILIES
tokenizer = jaxllm.train_tokenizer([], "tokenizer", 300, texts=["some text " * 20])
shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
shape |= dict(num_key_value_heads=1, head_dim=8, vocab_size=300, max_position_embeddings=64)
shape |= dict(n_routed_experts=16, num_experts_per_tok=1)  # of which dots1 has no defaults
shape |= dict(mamba_n_heads=4)  # granitemoehybrid's default divides no size as small
shape |= dict(hybrid_override_pattern="M")  # nemotron_h has four by default
ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
for name, family in FAMILIES.items():
    # Past the length that YaRN has by default; transformers warns if its factor is another.
    longest = 2**17 if name == "gpt_oss" else 2**18
    # transformers warns if the last layer of gemma4 is another.
    full = dict(layer_types=["full_attention"]) if name.startswith("gemma4") else {}
    # olmo_hybrid has layers of two kinds.
    full |= dict(num_hidden_layers=2) if name == "olmo_hybrid" else {}
    own = full | dict(model_type=name, max_position_embeddings=longest)
    config = to_hf(from_hf(shape | ids | own))
    reward = family.scores_as is not None and to_hf(from_hf(as_reward(config | ids)))
    print(name, *config["architectures"], *(reward["architectures"] if reward else ()))
Path("config.json").write_text(json.dumps(shape | ids | dict(model_type="llama")))
for objective in ("sft", "reward"):
    cfg = TrainConfig(objective=objective, model=ModelSection(config="config.json"))
    program = build(resolve(replace(cfg, output_dir=objective)), make_mesh(MeshSection()))
    RunFolder(program.cfg).save_start(program.policy, jaxllm.load_tokenizer("tokenizer"))
"""


def test_pretrain_then_load_then_generate_then_lora(tmp_path):
    import jaxllm
    from jaxllm.config import (
        DataSection,
        LogSection,
        ModelSection,
        PeftSection,
        Source,
        TrainConfig,
    )
    from jaxllm.data.tokenizer_training import train_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 400)
    train_tokenizer([text], tmp_path / "tokenizer", vocab_size=300)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, vocab_size=300, max_position_embeddings=64)
    (tmp_path / "model.json").write_text(json.dumps(shape | {"model_type": "llama"}))
    cfg = TrainConfig(
        output_dir=str(tmp_path / "run"),
        steps=20,
        batch_size=8,
        model=ModelSection(
            config=str(tmp_path / "model.json"), tokenizer=str(tmp_path / "tokenizer")
        ),
        data=DataSection(
            train=(Source(str(text)),), max_length=32, workers=1, cache_dir=str(tmp_path / "cache")
        ),
        log=LogSection(every=5),
    )
    result = jaxllm.train(cfg)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines if x["kind"] == "train"]
    assert result.step == 20 and losses[-1] < losses[0]
    model = jaxllm.load_hf(result.final)
    assert np.isfinite(np.asarray(model(np.ones((1, 5), np.int32)))).all()
    [answer] = jaxllm.generate_text(
        result.final, ["one two"], sampling=jaxllm.Sampling(max_new_tokens=4)
    )
    assert isinstance(answer, str)
    peft = PeftSection(method="lora", r=4, quantize_base="nf4")
    over = replace(cfg, output_dir=str(tmp_path / "lora"), model=ModelSection(path=result.final))
    tuned = jaxllm.train(replace(over, peft=peft, steps=4))
    jaxllm.export(str(tmp_path / "lora"), str(tmp_path / "merged"), merge=True)
    want = jaxllm.load_hf(str(tuned.final))(np.ones((1, 5), np.int32))
    got = jaxllm.load_hf(str(tmp_path / "merged"))(np.ones((1, 5), np.int32))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_without_torch_every_family_is_read_and_written_and_nothing_is_said(tmp_path):
    from jaxllm.model.families.table import FAMILIES

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert len(done.stdout.splitlines()) == len(FAMILIES)
    assert "gemma3_text Gemma3ForCausalLM Gemma3TextForSequenceClassification" in done.stdout
    written = json.loads((tmp_path / "reward" / "model" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"]
