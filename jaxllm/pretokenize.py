# SPDX-License-Identifier: Apache-2.0
"""`jaxllm tokenize`: fills the cache of tokenized data without a model or an accelerator."""

from __future__ import annotations

from typing import Any

import jax

from jaxllm.config import TrainConfig
from jaxllm.config.checks import check, recorded_config, resolve
from jaxllm.data.chat import run_tokenizer
from jaxllm.data.dataset import Data, load_data
from jaxllm.hf_config import source_config
from jaxllm.model.families import from_hf
from jaxllm.peft.files import make_adapter
from jaxllm.program import with_length
from jaxllm.run import started_from
from jaxllm.watch import connected


def prepare(cfg: TrainConfig) -> tuple[TrainConfig, Any, Data]:
    """(config with the defaults that depend on the model, tokenizer, data) of a run.

    Only jax's CPU backend is used. Raises UserError for a config or data that a run would refuse.
    """
    check(cfg)
    jax.config.update("jax_platforms", "cpu")
    with connected(cfg):
        cfg = resolve(cfg, recorded=recorded_config(cfg))
        source, scores = cfg.model.path or str(cfg.model.config), cfg.verb.head == "score"
        config, _ = source_config(source, cfg.model.overrides, scores=scores, weights=False)
        shape = from_hf(config)
        cfg = with_length(cfg, shape, make_adapter(shape, started_from(cfg)))
        tokenizer = run_tokenizer(cfg, shape.vocab_size)
        return cfg, tokenizer, load_data(cfg, tokenizer)


def tokenize(cfg: TrainConfig) -> dict[str, Any]:
    """Tokenizes the data of a run, or finds it in the cache; returns the data's manifest."""
    return prepare(cfg)[2].manifest
