# SPDX-License-Identifier: Apache-2.0
"""Train language models with JAX: a HuggingFace directory in, a HuggingFace directory out.

Importing this package imports nothing heavy and touches no device: a function's module is imported
when the function is first used.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxllm.config import (
    AlignSection,
    DataSection,
    EvalSection,
    LogSection,
    MeshSection,
    ModelSection,
    OptimSection,
    PeftSection,
    RlSection,
    SaveSection,
    Source,
    TrainConfig,
    load_config,
)
from jaxllm.errors import UserError

if TYPE_CHECKING:
    from jaxllm.chat import generate_text
    from jaxllm.data.tokenizer_training import train_tokenizer
    from jaxllm.evaluate import evaluate_files
    from jaxllm.exports import export
    from jaxllm.hf import load_hf, save_adapter, save_hf
    from jaxllm.peft.combine import choose, merged
    from jaxllm.sampling import Sampling, generate
    from jaxllm.tokenizer import load_tokenizer
    from jaxllm.training import train

__version__ = "0.1.0"
# fmt: off
__all__ = [
    "AlignSection", "DataSection", "EvalSection", "LogSection", "MeshSection", "ModelSection",
    "OptimSection", "PeftSection", "RlSection", "Sampling", "SaveSection", "Source", "TrainConfig",
    "UserError", "choose", "evaluate_files", "export", "generate", "generate_text", "load_config",
    "load_hf", "load_tokenizer", "merged", "save_adapter", "save_hf", "train", "train_tokenizer",
]
# fmt: on
_LAZY = {  # module -> the names that are imported from it when first used
    "chat": ("generate_text",),
    "data.tokenizer_training": ("train_tokenizer",),
    "evaluate": ("evaluate_files",),
    "exports": ("export",),
    "hf": ("load_hf", "save_adapter", "save_hf"),
    "peft.combine": ("choose", "merged"),
    "sampling": ("Sampling", "generate"),
    "tokenizer": ("load_tokenizer",),
    "training": ("train",),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f"jaxllm.{module}"), name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _of_torch(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("PyTorch was not found")


# transformers warns when it is imported without torch, which is never needed here. The filter is on
# this one logger: its children and the user's levels and handlers stay as they are.
logging.getLogger("transformers").addFilter(_of_torch)
