# SPDX-License-Identifier: Apache-2.0
"""The config of a run: from a YAML file and flags to one frozen TrainConfig.

verbs      the training commands and PEFT methods: what each reads, and its defaults
sections   TrainConfig and its sections: documentation, ranges, units and short forms
evaluation the section `eval`
optimizers what each optimizer and schedule reads
source     a source of data, which may be in the memory of a Python program
aliases    names of transformers, TRL and LLaMA-Factory, from the tables in names, by the rules in
           rules and datasets
deepspeed  keys of a DeepSpeed file
schema     the fields as a table of dotted keys; validation; conversion from and to dicts
loading    YAML + flags + DeepSpeed file -> TrainConfig and the origin of each value
checks     contradictions between fields; defaults that depend on other fields
describe   --help, --explain, --schema

Imports `errors`, `paths` and `untrusted` alone; every other module may import it.
"""

# ruff: noqa: F401
from jaxllm.config.loading import load_config, read_sources
from jaxllm.config.schema import (
    SECTIONS,
    from_dict,
    leaves,
    to_dict,
    tokenizer_path,
    value_of,
)
from jaxllm.config.sections import (
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
    TrainConfig,
)
from jaxllm.config.verbs import PEFT_METHODS, VERBS
