# SPDX-License-Identifier: Apache-2.0
"""The base class of the PEFT methods; loads and saves the tensors of an adapter file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import numpy as np

from jaxllm import dist
from jaxllm.config import PEFT_METHODS, PeftSection, from_dict
from jaxllm.errors import UserError
from jaxllm.files import ADAPTER_CONFIG
from jaxllm.model.adapter import Adapter, AdapterParam
from jaxllm.model.config import ModelConfig
from jaxllm.model.families.tensors import key_table, tensor_names
from jaxllm.peft.targets import shortened

SEQUENCE_CLASSIFICATION = "SEQ_CLS"  # peft's task_type of a reward model


@dataclass(frozen=True)
class Slot:
    """A tensor of an adapter file and its place in the model, `variable[index]`.

    transpose: the file has the transpose, as torch's Linear does. outputs: where it has each of our
    outputs, the last dim, if in another order.
    """

    name: str
    variable: Any
    index: Any = ...
    transpose: bool = False
    outputs: tuple[int, ...] = ()

    def to_file(self, value: np.ndarray) -> np.ndarray:
        """The file's tensor, from the value in the model."""
        value = value[..., np.argsort(self.outputs)] if self.outputs else value
        return value.T if self.transpose else value

    def from_file(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The value in the model, which has this shape."""
        value = tensor.T if self.transpose else tensor
        return value[..., self.outputs] if self.outputs else value


def read_slots(slots: Iterable[Slot]) -> dict[str, np.ndarray]:
    """{name in the file: float32 array}, from the model."""
    slots = list(slots)
    variables = {id(slot.variable): slot.variable for slot in slots}
    # A list, since a dict of ids would be gathered in another order by each process.
    values = dist.gather([variable.get_value() for variable in variables.values()])
    gathered = dict(zip(variables, values, strict=True))
    tensors = {}
    for slot in slots:
        value = gathered[id(slot.variable)][slot.index]
        tensors[slot.name] = np.ascontiguousarray(slot.to_file(value))
    return tensors


def set_value(variable: Any, value: Any) -> None:
    """Replaces a variable's value and keeps its sharding."""
    variable.set_value(jax.device_put(value, variable.get_value().sharding))


@dataclass(frozen=True)
class PeftAdapter(Adapter):
    """The adapter of a PEFT method. The method's config keys and default learning rate are in
    config.PEFT_METHODS, everything else in a subclass."""

    peft_type: ClassVar[str]  # peft's name of the method
    decayed: ClassVar[Mapping[str, bool]]  # {leaf name: True if weight decay applies}
    root: ClassVar[str] = "base_model.model."  # what peft puts before the name of an HF tensor

    @classmethod
    def from_section(cls, cfg: ModelConfig, section: PeftSection, strict: bool = True) -> Self:
        """The adapter that a peft section describes. Raises UserError for what the model does not
        have; with strict False, names that match no module are ignored, as in peft."""
        raise NotImplementedError

    @classmethod
    def section_values(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The keys of the peft section that an adapter_config.json gives.

        Raises UserError for an option that jaxllm does not support.
        """
        return {key: config[key] for key in PEFT_METHODS[cls.method].shape if key in config}

    @classmethod
    def from_config(cls, cfg: ModelConfig, config: dict[str, Any], file: Path) -> Self:
        """The adapter that the adapter_config.json `file` describes, without dropout."""
        given = {key: value for key, value in config.items() if value is not None}
        values = {"method": cls.method} | cls.section_values(given)
        try:
            section = from_dict({"peft": values}).peft
        except ValueError as error:
            raise UserError(f"{ADAPTER_CONFIG}: {error}") from None
        return cls.from_section(cfg, section, strict=False)

    def to_config(self, model: Any) -> dict[str, Any]:
        """The adapter_config.json of the model's adapter."""
        cfg = model.cfg
        config: dict[str, Any] = {
            "peft_type": self.peft_type,
            "task_type": SEQUENCE_CLASSIFICATION if cfg.scores else "CAUSAL_LM",
            "base_model_name_or_path": model.base or None,
            "inference_mode": True,
        }
        if saved := list[str](self.saved):
            modules = {k.path: k.name.rpartition(".")[0] for k in key_table(cfg)}
            every = {path: tensor_names(cfg, module) for path, module in modules.items()}
            layered = [path for path, module in modules.items() if "{" in module]
            in_layers = [name for path in layered if path in saved for name in every[path]]
            if cfg.wrapper:  # whose other parts have modules of the same names
                names = in_layers
            else:
                names = shortened(in_layers, chain(*(every[path] for path in layered)))
            names += [modules[path] for path in saved if path not in layered]
            config["modules_to_save"] = sorted(names)
        return config

    def trains(self, path: tuple[Any, ...], variable: Any) -> bool:
        return isinstance(variable, AdapterParam) or ".".join(map(str, path)) in self.saved

    def slots(self, model: Any, which: int = 0) -> Iterator[Slot]:
        """The tensors of the adapter's file, of the `which`th adapter if there are several."""
        raise NotImplementedError

    def tensors(self, model: Any) -> dict[str, np.ndarray]:
        """{name in the adapter's file: float32 array}, without modules_to_save."""
        return read_slots(self.slots(model))

    def check(
        self, model: Any, shapes: Mapping[str, tuple[int, ...]], file: Path, which: int = 0
    ) -> None:
        """Raises UserError unless the tensors of `file`, with `shapes`, fit the model's adapter.

        The model may be abstract: nothing is allocated for an adapter that does not fit.
        """
        for slot in self.slots(model, which):
            if slot.name not in shapes:
                raise UserError(f"{file} has no {slot.name}, which its config asks for")
            place = np.broadcast_to(np.float32(0), slot.variable.get_value().shape)[slot.index]
            ours = slot.to_file(place).shape
            if ours != shapes[slot.name]:
                raise UserError(
                    f"{file}: {slot.name} does not fit the model: its shape is "
                    f"{shapes[slot.name]}, the model's is {ours}"
                )

    def load(self, model: Any, tensors: dict[str, np.ndarray], which: int = 0) -> None:
        """Copies the tensors of a file, which `check` accepts, to the model's adapter, and removes
        them from `tensors`."""
        slots = list(self.slots(model, which))
        variables = {id(slot.variable): slot.variable for slot in slots}
        values = dist.gather([v.get_value() for v in variables.values()])
        arrays = {key: np.array(value) for key, value in zip(variables, values, strict=True)}
        for slot in slots:
            array = arrays[id(slot.variable)]
            shape = array[slot.index].shape
            array[slot.index] = slot.from_file(tensors.pop(slot.name), shape)
        for key, variable in variables.items():
            set_value(variable, arrays[key])
