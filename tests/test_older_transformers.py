# SPDX-License-Identifier: Apache-2.0
"""What transformers 4.57, and with it readers of its config spelling, make of what is written."""

import os
import subprocess
import sys

import numpy as np
import pytest
from tiny import CASES, LONGROPE, hf_config, magnified, one_device, some_tokens, torch_logits

from jaxllm.hf import load_hf, save_hf

pytestmark = pytest.mark.real

OLD = ("transformers==4.57.*", "tokenizers<0.23", "huggingface_hub<1")
# Of lengths of their own, since longrope's factors are chosen by it.
ROPES = {name: hf_config(name) for name in CASES} | {
    "llama longrope": hf_config("llama mha, gelu")
    | {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 16, "factor": 3.0}},
    "llama yarn without a factor": hf_config("llama")
    | {
        "head_dim": 24,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": None}
        | {"original_max_position_embeddings": 256},
    },
}
# Cases that 4.57 computes otherwise, whatever is written.
LISTED = "its config has no attention_bias, num_experts or layer_types of transformers 5"
OTHERWISE = {
    "olmo3": "it has one base of RoPE for all layers",
    "deepseek_v2": "it leaves YaRN's mscale out of the scale of attention",
    "deepseek_v3 without q_lora, halves, biases": "it takes 0 for experts of masked groups",
    "glm4_moe groups, norms, no biases": "it takes 0 for experts of masked groups",
    "llama4_text without norms, two experts, biases, tied": LISTED,
    "gpt_oss": "it has one limit and one alpha of SwiGLU",
    "gpt_oss no biases, tied": "it has one limit and one alpha of SwiGLU",
    "granitemoehybrid": LISTED,
    "granitemoehybrid without experts, rotated, biases": LISTED,
    "bamba": "it repeats groups in another order",
    "bamba biases": "it repeats groups in another order",
    "qwen3_moe": LISTED,
    "qwen3_moe renormalised, sliding, biases": LISTED,
    "qwen3_moe some dense": LISTED,
    "qwen3_next some dense, biases": "it has one activation of delta nets",
}
READ = """
import sys, numpy as np, torch, transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
assert transformers.__version__.startswith("4.57"), transformers.__version__
tokens = torch.from_numpy(np.load("tokens.npy")).long()
for name in sys.argv[1:]:
    kind = transformers.PretrainedConfig.get_config_dict(name)[0]["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        continue
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, torch_dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            np.save(name + ".npy", model(tokens).logits.numpy())
    except Exception as e:
        with open(name + ".txt", "w") as file:
            file.write(f"{type(e).__name__}: {e}")
"""


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """{case: (transformers 5's logits of the source, where 4.57 has what it made of the files)}"""
    folder = tmp_path_factory.mktemp("older")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run([*pip, str(folder / "old"), *OLD], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed: {done.stderr.strip()[-200:]}")
    np.save(folder / "tokens.npy", tokens := some_tokens())
    want = {}
    for number, (name, config) in enumerate(ROPES.items()):
        if name in OTHERWISE:
            continue
        theirs = magnified(config)
        want[name] = torch_logits(theirs, tokens)
        theirs.save_pretrained(folder / "in")
        save_hf(load_hf(str(folder / "in"), mesh=one_device()), str(folder / str(number)))
    read = [str(i) for i, name in enumerate(ROPES) if name in want]
    command = [sys.executable, "-c", READ, *read]
    env = os.environ | {"PYTHONPATH": str(folder / "old")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: (want[name], folder / f"{i}.npy") for i, name in zip(read, want, strict=True)}


@pytest.mark.parametrize("name", ROPES)
def test_logits_are_those_of_transformers_5(logits, name):
    if name in OTHERWISE:
        pytest.skip(f"transformers 4.57 differs: {OTHERWISE[name]}")
    want, file = logits[name]
    error = file.with_suffix(".txt")
    assert not error.exists(), error.read_text()
    if not file.exists():
        pytest.skip(f"transformers 4.57 has no {ROPES[name]['model_type']}")
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(np.load(file), want, atol=2e-4)
