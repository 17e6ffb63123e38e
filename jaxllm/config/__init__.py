# SPDX-License-Identifier: Apache-2.0
"""The config of a run: from a YAML file and flags to one frozen TrainConfig.

sections   the fields of each section: documentation, ranges, units and short forms
verbs      the training verbs: what each reads, and its defaults
aliases    names of transformers and TRL        deepspeed  keys of a DeepSpeed file
schema     TrainConfig; its fields as a table; validation; conversion from and to dicts
loading    YAML + flags + DeepSpeed file -> TrainConfig and the origin of each value
checks     contradictions between fields; defaults that depend on other fields
describe   --help, --explain, --schema

Imports nothing of jaxllm but `errors`; every other module may import it.
"""

# ruff: noqa: F401
from jaxllm.config.loading import load_config, read_sources
from jaxllm.config.schema import (
    SECTIONS,
    Leaf,
    TrainConfig,
    from_dict,
    leaves,
    to_dict,
    tokenizer_path,
    validated,
    value_of,
)
from jaxllm.config.sections import (
    PEFT_METHODS,
    AlignSection,
    ClusterSection,
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
)
from jaxllm.config.verbs import VERBS
