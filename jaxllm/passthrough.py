# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint that the decoder does not use: an export copies them from there.

    of a multimodal model         all but its language model: the vision tower and the like
    of multi-token prediction     `Family.mtp`: layers or modules that predict further tokens, if
                                  they are not trained (`ModelConfig.mtp`)
    of keys and values            in layers that use those of others; a model without a wrapper is
                                  saved without them, as by transformers

They are never loaded. An export reads one after the other, and writes its bytes in the dtype and
under the name that it has. A quantized one is dequantized as weights are, and written in the dtype
of the export, whose config describes no quantization.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxllm import dist, fp8
from jaxllm.errors import UserError
from jaxllm.files import PROCESSOR, Tensor, header, local_dir, read_array, tensor_files
from jaxllm.hf_config import read_config, text_tensors
from jaxllm.model.config import ModelConfig
from jaxllm.model.families import mtp_modules
from jaxllm.model.families.table import FAMILIES
from jaxllm.model.families.tensors import module_name, mtp_copies, root_of, stored_name
from jaxllm.model.families.wrappers import WRAPPER, is_text
from jaxllm.paths import as_path, copy, is_bucket

VISION = "vision_config"
TEMPLATE = "chat_template.jinja"
MTP = "multi-token prediction"
SAMPLES = 64  # rows of a table that are compared


def mtp_names(names: Iterable[str], cfg: ModelConfig, config: dict[str, Any]) -> set[str]:
    """The names, of modules as transformers has them today, that belong to multi-token prediction.

    config: the unwrapped HF config.
    """
    place = FAMILIES[cfg.family].mtp
    if place != "layers":
        return {name for name in names if place and name.startswith(place)}
    layers = range(cfg.num_layers, cfg.num_layers + mtp_modules(cfg, config))
    pattern = re.compile(rf"{root_of(cfg.family, cfg.wrapper)}layers\.(\d+)\.")
    return {n for n in names if (found := pattern.match(n)) and int(found[1]) in layers}


def kept_names(
    folder: Path, names: Iterable[str], cfg: ModelConfig, config: dict[str, Any]
) -> set[str]:
    """Those of the names that belong to multi-token prediction and are not loaded: all, or, if it
    is trained, its copies of the model's table and head.

    Raises UserError if it is to be trained and there is none.
    """
    mtp = mtp_names(names, cfg, config)
    if cfg.mtp and not mtp:
        raise UserError(f"{folder} has no weights of {MTP}; set model.mtp_loss to 0")
    return mtp & mtp_copies(cfg).keys() if cfg.mtp else mtp


def unread_names(names: Iterable[str], cfg: ModelConfig) -> set[str]:
    """The names of what makes keys and values in layers that use those of others."""
    starts = tuple(
        f"{root_of(cfg.family, cfg.wrapper)}layers.{layer}.self_attn.{part}_"
        for layer, kind in enumerate(cfg.kinds_by_layer)
        for part in ("kv" if kind.uses is not None else "")
    )
    return {name for name in names if name.startswith(starts)}


def unused_tensors(
    folder: Path, cfg: ModelConfig, config: dict[str, Any], scheme: fp8.Fp8 | None
) -> list[Tensor]:
    """The tensors of a checkpoint that the decoder does not use, to be written to an export.

    scheme: of its quantized weights. Raises UserError for a quantized tensor that it does not fit.
    """
    places = fp8.located(tensor_files(folder), scheme)
    modules = {name: module_name(name, cfg.family, cfg.wrapper) for name in places}
    own = set() if cfg.scores or cfg.mtp else mtp_names(modules.values(), cfg, config)
    own |= unread_names(modules.values(), cfg)
    unused = {
        n for n, module in modules.items() if module in own or not is_text(module, cfg.wrapper)
    }
    return [_copied(places, name, scheme) for name in sorted(fp8.without_scales(unused, scheme))]


def _copied(places: fp8.Locations, name: str, scheme: fp8.Fp8 | None) -> Tensor:
    file, stored = places[name]
    start, entries = header(file)
    entry = entries[stored]
    first, end = (start + offset for offset in entry["data_offsets"])
    scale = name + scheme.suffix if scheme else ""
    if entry["dtype"] != fp8.STORED and scale not in places:

        def read(process: int = 0) -> Any:
            return read_array(file, first, end) if dist.index() == process else None

        return Tensor(name, tuple(entry["shape"]), read, (entry["dtype"], end - first))
    own = {n: places[n] for n in (name, scale) if n in places}
    with fp8.opened(own, scheme) as tensor:
        shape = tuple(tensor(name).get_shape())

    def dequantised(process: int = 0) -> Any:
        if dist.index() != process:
            return None
        with fp8.opened(own, scheme) as tensor:
            return tensor(name)[tuple(slice(0, n) for n in shape)]

    return Tensor(name, shape, dequantised)


def check_unused(
    folder: Path, cfg: ModelConfig, config: dict[str, Any], scheme: fp8.Fp8 | None, mtp: set[str]
) -> None:
    """Says what becomes of the tensors `mtp` of multi-token prediction. Raises UserError for
    tensors that an export could not copy."""
    unused = unused_tensors(folder, cfg, config, scheme)
    unused = {module_name(t.name, cfg.family, cfg.wrapper): t for t in unused}
    if cfg.mtp:
        return _check_copies(folder, cfg, scheme, mtp)
    if not (names := sorted(fp8.without_scales(mtp, scheme))):
        return
    fate = "saved with a reward model" if cfg.scores else "trained; exports copy them from there"
    dist.say(
        f"jaxllm: {folder}: {len(names)} tensors of {MTP} ({names[0]}{' …' if names[1:] else ''}) "
        f"are neither loaded nor {fate}"
    )
    for name in names if unused else ():
        rows = unused[name].shape[0] if unused[name].shape else 0
        if name.endswith(("embed_tokens.weight", "head.weight")) and rows != cfg.vocab_size:
            dist.say(
                f"warning: {folder}: {name} has {rows:,} rows, the vocabulary {cfg.vocab_size:,} "
                f"tokens, so its {MTP} does not work"
            )


def _check_copies(folder: Path, cfg: ModelConfig, scheme: fp8.Fp8 | None, copies: set[str]) -> None:
    """Warns of copies that differ from the model's table or head, in evenly spaced rows."""
    files, copied = text_tensors(folder, cfg.family, cfg.wrapper, scheme), mtp_copies(cfg)
    with fp8.opened(files, scheme) as tensor:
        for name in sorted(name for name in copies if copied[name] in files):
            own, ours = tensor(name), tensor(copied[name])
            rows = ours.get_shape()[0]
            same = own.get_shape() == ours.get_shape() and all(
                (own[at] == ours[at]).all()
                for at in (slice(i, i + 1) for i in range(0, rows, max(1, rows // SAMPLES)))
            )
            if not same:
                dist.say(
                    f"warning: {folder}: {name} differs from {copied[name]}, which replaces it"
                )


def base_of(model: Any) -> tuple[Path, dict[str, Any]]:
    """(the directory that a model was loaded from, its config.json).

    Raises UserError if it is gone or is another model now.
    """
    if not model.base:
        raise UserError("the model was not loaded from a directory")
    try:
        folder = local_dir(model.base)
        config = read_config(str(folder))
        tensor_files(folder)
    except UserError as error:
        raise UserError(f"{model.base} cannot be read; put it back: {error}") from None
    ours = json.loads(model.hf_config)
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    if model.cfg.wrapper:
        ours, keys = ours[WRAPPER], ("model_type", VISION)
    if other := next((key for key in keys if config.get(key) != ours.get(key)), ""):
        raise UserError(f"{model.base} is another model now (its {other} differs); put it back")
    return folder, config


def with_unused(model: Any, tensors: dict[str, Tensor], out: str) -> dict[str, Tensor]:
    """A model's tensors under the names that they have in files, those it was loaded from, and the
    tensors there that it does not use, to be written to `out`. Trained modules of multi-token
    prediction have copies of the table and the head.

    If those files cannot be read any more, a multimodal model raises UserError; of others a line
    says that multi-token prediction is left out.
    """
    cfg, config, problem = model.cfg, json.loads(model.hf_config or "{}"), ""
    copies = mtp_copies(cfg).items()
    tensors = tensors | {name: replace(tensors[of], name=name) for name, of in copies}
    own = {name: stored_name(cfg, name) for name in tensors}
    tensors = {own[name]: replace(t, name=own[name]) for name, t in tensors.items()}
    if not cfg.wrapper and (cfg.scores or not (model.base and _may_have_mtp(cfg, config))):
        return tensors
    try:
        folder, stored = base_of(model)
    except UserError as error:
        if cfg.wrapper:
            raise UserError(
                f"the rest of the {cfg.wrapper} model must be copied: {error}"
            ) from None
        problem = str(error)
    if found := dist.agree(problem):  # all processes write the same tensors
        dist.say(f"warning: {found}; {out} lacks its weights of {MTP}, if it has some")
        return tensors
    if problem:
        raise UserError(problem)
    if is_bucket(out) and as_path(out) == folder:  # which is emptied first (`new_folder`)
        raise UserError(f"{out} is what the model was loaded from; choose another directory")
    scheme = fp8.split_quantization(stored, folder)[1]
    names = {
        name: there for name, (_, there) in text_tensors(folder, cfg.family, cfg.wrapper).items()
    }
    everything = [replace(t, name=names.get(t.name, t.name)) for t in tensors.values()]
    unused = unused_tensors(folder, cfg, config, scheme)
    return {t.name: t for t in everything + unused}


def _may_have_mtp(cfg: ModelConfig, config: dict[str, Any]) -> bool:
    """True if the files of such a model may have tensors of multi-token prediction, which it has
    not loaded."""
    place = FAMILIES[cfg.family].mtp
    return bool(place) and not cfg.mtp and (place != "layers" or mtp_modules(cfg, config) > 0)


def copy_processor(base: str, folder: Path) -> None:
    """Copies what prepares images and video. A run's chat template takes the place of an old
    processor's, which transformers would prefer."""
    source = local_dir(base)
    for name in PROCESSOR:
        replaced = name == "chat_template.json" and (folder / TEMPLATE).is_file()
        if (source / name).is_file() and not replaced:
            copy(source / name, folder / name)
