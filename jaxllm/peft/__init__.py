# SPDX-License-Identifier: Apache-2.0
"""PEFT methods: they add trainable weights to a frozen base model.

targets         the weights that target_modules and modules_to_save name
base            PeftAdapter, the base class of the methods; tensors to and from a file
experts         LoRA on experts in peft's two spellings
lora            LoRA, rsLoRA, DoRA, PiSSA, LoRA+
bottleneck      Houlsby and Pfeiffer adapters
virtual_tokens  prefix tuning and prompt tuning
combine         several LoRA adapters in one model; one merged into the base weights
files           adapter directories in peft's format
A module imports those above it, config, files, ops and model. All layers above peft may import it.
"""

from importlib import import_module

from jaxllm.config import PEFT_METHODS
from jaxllm.peft.base import PeftAdapter


def _import(name: str) -> type[PeftAdapter]:
    module, _, kind = name.partition(".")
    return getattr(import_module(f"jaxllm.peft.{module}"), kind)


# {peft.method: its class}; the class names are in the config's table.
METHODS = {name: _import(row.adapter) for name, row in PEFT_METHODS.items() if row.adapter}
