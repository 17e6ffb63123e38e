# SPDX-License-Identifier: Apache-2.0
"""What a multimodal model has beside its language model: copied from the model it was loaded from.

Tensors of the vision tower and the like are never loaded. An export reads the bytes of one after
the other, and writes them in the dtype and under the names that they have.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxllm import dist
from jaxllm.errors import UserError
from jaxllm.files import PROCESSOR, Tensor, header, local_dir, read_array, tensor_files
from jaxllm.fp8 import STORED
from jaxllm.hf_config import read_config, text_tensors
from jaxllm.model.families.wrappers import WRAPPER, is_text, module_name
from jaxllm.paths import as_path, copy, is_bucket

VISION = "vision_config"
TEMPLATE = "chat_template.jinja"


def other_tensors(folder: Path, wrapper: str) -> list[Tensor]:
    """The tensors of a multimodal model that are not of its language model.

    Raises UserError for one in FP8, whose scales the config would no longer describe.
    """
    tensors = []
    for name, file in sorted(tensor_files(folder).items()):
        if is_text(module_name(name, wrapper), wrapper):
            continue
        start, entries = header(file)
        entry = entries[name]
        first, end = (start + offset for offset in entry["data_offsets"])
        if entry["dtype"] == STORED:
            raise UserError(f"{file}: {name}, which would be copied, is quantized to {STORED}")

        def read(process: int = 0, file=file, first=first, end=end) -> Any:
            return read_array(file, first, end) if dist.index() == process else None

        shape = tuple(entry["shape"])
        tensors.append(Tensor(name, shape, read, (entry["dtype"], end - first)))
    return tensors


def base_of(model: Any) -> Path:
    """The directory of the multimodal model that a model was loaded from.

    Raises UserError if it is gone or is another model now.
    """
    needs = f"the rest of the {model.cfg.wrapper} model is copied from {model.base or 'its base'}"
    if not model.base:
        raise UserError(f"{needs}, but the model was not loaded from a directory")
    try:
        folder = local_dir(model.base)
        config = read_config(str(folder))
        tensor_files(folder)
    except UserError as error:
        raise UserError(f"{needs}; put it back: {error}") from None
    outer = json.loads(model.hf_config)[WRAPPER]
    if any(config.get(key) != outer.get(key) for key in ("model_type", VISION)):
        raise UserError(f"{needs}, which is another model now (its {VISION} differs); put it back")
    return folder


def with_the_rest(model: Any, tensors: dict[str, Tensor], out: str) -> dict[str, Tensor]:
    """The tensors of a language model under the names that they have in its multimodal model's
    files, and the other tensors of those, to be written to `out`."""
    folder, wrapper = base_of(model), model.cfg.wrapper
    if is_bucket(out) and as_path(out) == folder:  # which is emptied first (`new_folder`)
        raise UserError(f"{out} is what the model was loaded from; choose another directory")
    names = {name: stored for name, (_, stored) in text_tensors(folder, wrapper).items()}
    everything = [replace(t, name=names.get(t.name, t.name)) for t in tensors.values()]
    return {t.name: t for t in everything + other_tensors(folder, wrapper)}


def copy_processor(base: str, folder: Path) -> None:
    """Copies what prepares images and video. A run's chat template takes the place of an old
    processor's, which transformers would prefer."""
    source = local_dir(base)
    for name in PROCESSOR:
        replaced = name == "chat_template.json" and (folder / TEMPLATE).is_file()
        if (source / name).is_file() and not replaced:
            copy(source / name, folder / name)
