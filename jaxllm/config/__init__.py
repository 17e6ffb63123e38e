# SPDX-License-Identifier: Apache-2.0
"""What a user writes, as one frozen TrainConfig.

`sections` and `schema` hold the fields, `checks` tests what several fields must agree on, `aliases`
and `deepspeed` translate other names. Imports nothing of jaxllm but `errors`.
"""

from jaxllm.config.schema import (
    PATHS,
    READ,
    SECTIONS,
    SHORT_FORMS,
    USUAL,
    Leaf,
    TrainConfig,
    from_dict,
    json_schema,
    leaf_of,
    leaves,
    load_config,
    read_sources,
    to_dict,
    tokenizer_path,
    validated,
    value_of,
)
from jaxllm.config.sections import (
    PEFT_METHODS,
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
)
from jaxllm.config.verbs import VERBS, Verb, unread

__all__ = [
    "AlignSection",
    "DataSection",
    "EvalSection",
    "Leaf",
    "LogSection",
    "MeshSection",
    "ModelSection",
    "OptimSection",
    "PATHS",
    "PEFT_METHODS",
    "PeftSection",
    "READ",
    "RlSection",
    "SECTIONS",
    "SHORT_FORMS",
    "SaveSection",
    "Source",
    "TrainConfig",
    "USUAL",
    "from_dict",
    "json_schema",
    "leaf_of",
    "leaves",
    "load_config",
    "read_sources",
    "unread",
    "VERBS",
    "Verb",
    "to_dict",
    "tokenizer_path",
    "validated",
    "value_of",
]
