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
READ = """
import sys, numpy as np, torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
tokens = torch.from_numpy(np.load("tokens.npy")).long()
for name in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        name, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        np.save(name + ".npy", model(tokens).logits.numpy())
"""


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """{case: (transformers 5's logits of the source, 4.57's of what was written)}"""
    folder = tmp_path_factory.mktemp("older")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run([*pip, str(folder / "old"), *OLD], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed: {done.stderr.strip()[-200:]}")
    np.save(folder / "tokens.npy", tokens := some_tokens())
    want = {}
    for number, (name, config) in enumerate(ROPES.items()):
        theirs = magnified(config)
        want[name] = torch_logits(theirs, tokens)
        theirs.save_pretrained(folder / "in")
        save_hf(load_hf(str(folder / "in"), mesh=one_device()), str(folder / str(number)))
    command = [sys.executable, "-c", READ, *map(str, range(len(ROPES)))]
    env = os.environ | {"PYTHONPATH": str(folder / "old")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: (x, np.load(folder / f"{i}.npy")) for i, (name, x) in enumerate(want.items())}


@pytest.mark.parametrize("name", ROPES)
def test_logits_are_those_of_transformers_5(logits, name):
    want, got = logits[name]
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=2e-4)
