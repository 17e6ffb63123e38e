# SPDX-License-Identifier: Apache-2.0
"""The families: how each model type differs from plain Llama.

A family is a row of FAMILIES, made of options that name ModelConfig fields (family.Family).
"""

from __future__ import annotations

from jaxllm.model.families.dense import DENSE
from jaxllm.model.families.experts import EXPERTS
from jaxllm.model.families.hybrid import HYBRID

FAMILIES = DENSE | EXPERTS | HYBRID

# Model types of code on the hub, and transformers' name of the same architecture.
SAME_AS = {"kimi_k2": "deepseek_v3"}

# Features that the decoder lacks, and the model types that need them.
MISSING = {
    "delta-net layers with a gate of each feature": ("kimi_linear",),
    "state-space layers of another form": (
        *("mamba", "mamba2", "jamba"),
        *("zamba", "zamba2", "falcon_mamba"),
    ),
    "attention and a state space side by side in a layer": ("falcon_h1",),
    "attention to the blocks of keys that an indexer chooses for each key/value head": (
        "minimax_m3_vl_text",
    ),
    "layers with other numbers of heads, and other gates": ("laguna",),
    "routing by SparseMixer": ("phimoe",),
    "alternating updates of several residual streams": ("gemma3n_text",),
    "learned positions": ("gpt2", "gpt_bigcode", "opt"),
}
