# SPDX-License-Identifier: Apache-2.0
"""PEFT methods: what is trained while the base model is frozen.

config.PEFT_METHODS has a row per method: its class here, default learning rate and config keys.
  base            PeftAdapter, the base class of the methods; tensors to and from a file
  targets         the weights that target_modules and modules_to_save name
  lora            LoRA, rsLoRA, DoRA, PiSSA, LoRA+
  bottleneck      Houlsby and Pfeiffer adapters
  virtual_tokens  prefix tuning and prompt tuning
  methods         METHODS, {peft.method: class}
  merge           LoRA merged into the base weights
  combine         several LoRA adapters in one model
  files           adapter directories in peft's format
A module imports those above it, config, files and model; everything above `peft` may import it.
"""
