# SPDX-License-Identifier: Apache-2.0
"""`jaxllm tokenize`: fills the cache of tokenized data without a model or an accelerator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from jaxllm import dist
from jaxllm.config import TrainConfig, tokenizer_path
from jaxllm.config.checks import check, recorded_config, resolve
from jaxllm.data.chat import padded
from jaxllm.data.dataset import load_data
from jaxllm.data.template import with_settings
from jaxllm.hf_config import source_config
from jaxllm.model.config import ModelConfig
from jaxllm.model.families import from_hf
from jaxllm.tokenizer import check_vocabulary, load_tokenizer
from jaxllm.watch import Watch


def tokenize(cfg: TrainConfig) -> dict[str, Any]:
    """Tokenizes the data of a run, or finds it in the cache; returns the data's manifest.

    Only jax's CPU backend is used. Raises UserError for a config or data that a run would refuse.
    """
    check(cfg)
    jax.config.update("jax_platforms", "cpu")
    dist.start(cfg.cluster)
    with Watch(cfg.cluster, Path(cfg.output_dir)):
        cfg = resolve(cfg, recorded=recorded_config(cfg))
        source, scores = cfg.model.path or str(cfg.model.config), cfg.verb.head == "score"
        config, _ = source_config(source, cfg.model.overrides, scores=scores, weights=False)
        return load_data(cfg, run_tokenizer(cfg, from_hf(config))).manifest


def run_tokenizer(cfg: TrainConfig, shape: ModelConfig) -> Any:
    """The tokenizer of a run, with the chat template's settings of the config.

    Raises UserError if it does not fit the model.
    """
    tokenizer = with_settings(load_tokenizer(tokenizer_path(cfg)), cfg.data)
    tokenizer = padded(tokenizer) if shape.scores else tokenizer
    check_vocabulary(tokenizer, shape.vocab_size)
    return tokenizer
