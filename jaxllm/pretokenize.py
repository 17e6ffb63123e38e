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
from jaxllm.model.config import ModelConfig
from jaxllm.program import model_config
from jaxllm.tokenizer import check_vocabulary, load_tokenizer
from jaxllm.watch import Watch

HELP = """\
usage: jaxllm tokenize [CONFIG.yaml] --objective VERB [--section.key value ...]

Reads and tokenizes the data of a training run into data.cache_dir, and prints its counts. The run
then starts without tokenizing anything. No accelerator is used and no weights are read. Several
processes share the work; a command that was killed continues where it stopped.

  --objective VERB
      the training verb of the run; also `objective:` in the file, or the config.json of a run

All other keys are those of the run (`jaxllm sft --help`)."""


def tokenize(cfg: TrainConfig) -> dict[str, Any]:
    """Tokenizes the data of a run, or finds it in the cache; returns the data's manifest.

    Only jax's CPU backend is used. Raises UserError for a config or data that a run would refuse.
    """
    check(cfg)
    jax.config.update("jax_platforms", "cpu")
    dist.start(cfg.cluster)
    with Watch(cfg.cluster, Path(cfg.output_dir)):
        cfg = resolve(cfg, recorded=recorded_config(cfg))
        return load_data(cfg, run_tokenizer(cfg, model_config(cfg)[0])).manifest


def run_tokenizer(cfg: TrainConfig, shape: ModelConfig) -> Any:
    """The tokenizer of a run, with the chat template's settings of the config.

    Raises UserError if it does not fit the model.
    """
    tokenizer = with_settings(load_tokenizer(tokenizer_path(cfg)), cfg.data)
    tokenizer = padded(tokenizer) if shape.scores else tokenizer
    check_vocabulary(tokenizer, shape.vocab_size)
    return tokenizer
