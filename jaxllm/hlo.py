# SPDX-License-Identifier: Apache-2.0
"""A compiled program and its collectives, read from the text that XLA dumps.

Text in, numbers out: nothing here imports jax. A number is for one device and one call of the
program; instructions in a loop count as often as the loop runs.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1, "f8e8m0fnu": 1, "f4e2m1fn": 0.5}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all")
COLLECTIVES += ("collective-permute", "collective-broadcast")
SHAPE = re.compile(r"\b([a-z]+\d\w*|pred)\[([\d,<=]*)\](\{[^{}]*\})?")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|\w+_computations?)=(?:%?([\w.\-]+)|\{([^}]*)\})"
)


def nbytes(shape: str, *, on_chip: bool = True) -> int:
    """Bytes of a shape, or of all parts of a tuple; without those in a TPU's VMEM if not
    `on_chip`."""
    total = 0.0
    for dtype, dims, layout in SHAPE.findall(shape):
        if dtype in BYTES and (on_chip or "S(1)" not in layout):
            sizes = [int(dim.lstrip("<=")) for dim in dims.split(",") if dim]
            total += math.prod(sizes) * BYTES[dtype]
    return math.ceil(total)


# ---- the program


@dataclass(frozen=True)
class Instruction:
    """`name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    """the text between the parentheses"""
    attributes: str
    root: bool

    @property
    def base(self) -> str:
        """The opcode without the -start of an asynchronous pair."""
        return self.opcode.removesuffix("-start")

    @property
    def op_name(self) -> str:
        """The path of jax's named scopes."""
        return find(r'op_name="([^"]*)"', self.attributes)

    def calls(self) -> Iterator[str]:
        """Computations that it runs. Of an asynchronous pair, only the start runs them."""
        if not self.opcode.endswith(("-done", "-update")):
            for one, several in CALLED.findall(self.attributes):
                yield from [one] if one else re.findall(r"[\w.\-]+", several)


def find(pattern: str, text: str, default: str = "") -> str:
    found = re.search(pattern, text)
    return found[1] if found else default


@dataclass(frozen=True)
class Program:
    """An HLO module: its computations by name, and the number of devices it runs on."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    devices: int

    @cached_property
    def fused(self) -> set[str]:
        """The computations inside fusions."""
        found: set[str] = set()
        for body in self.computations.values():
            for instruction in body.values():
                found |= set(instruction.calls()) if instruction.opcode == "fusion" else set()
        return found

    @cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs; both branches of a conditional count."""
        callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for name, body in self.computations.items():
            for instruction in body.values():
                times = self.trips(instruction) if instruction.opcode == "while" else 1
                for called in instruction.calls():
                    callers[called].append((name, times))
        runs = {self.entry: 1}

        def count(name: str) -> int:
            if name not in runs:
                runs[name] = sum(count(caller) * times for caller, times in callers[name])
            return runs[name]

        return {name: count(name) for name in self.computations}

    def trips(self, loop: Instruction) -> int:
        """Iterations of a while; 1 if they depend on the data, as over the chunks of a loss."""
        known = find(r'known_trip_count"?[:=]\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known)
        condition = self.computations.get(find(r"condition=%?([\w.\-]+)", loop.attributes), {})
        bodies = [condition]
        for instruction in condition.values():
            bodies += [self.computations.get(name, {}) for name in instruction.calls()]
        if not any("direction=LT" in i.attributes for body in bodies for i in body.values()):
            return 1
        every = [i for body in bodies for i in body.values() if i.opcode == "constant"]
        limits = [int(i.inside) for i in every if re.fullmatch(r"[su]32\[\].*", i.shape)]
        return limits[0] if len(limits) == 1 and limits[0] > 0 else 1

    def runs_in(self, name: str) -> str:
        """The computation that is not a fusion in which `name` runs."""
        while name in self.fused:
            name = next(
                caller
                for caller, body in self.computations.items()
                if any(name in i.calls() for i in body.values())
            )
        return name

    @cached_property
    def named(self) -> dict[str, Instruction]:
        """All instructions by name, which is unique in a module."""
        return {one.name: one for body in self.computations.values() for one in body.values()}

    @cached_property
    def loops(self) -> dict[str, Instruction]:
        """{parameter of a loop's body: the loop}."""
        whiles = [one for one in self.named.values() if one.opcode == "while"]
        return {
            one.name: loop
            for loop in whiles
            for name in loop.calls()
            for one in self.computations.get(name, {}).values()
            if one.opcode == "parameter"
        }

    def source(self, name: str, depth: int = 4) -> str:
        """The op_name of an instruction, or of the nearest one that it is made of."""
        one = self.loops.get(name) or self.named.get(name)
        if one is None or one.op_name or depth == 0:
            return one.op_name if one else ""
        inner = [i for called in one.calls() for i in self.computations.get(called, {}).values()]
        found = next((i.op_name for i in reversed(inner) if "/" in i.op_name), "")
        return found or next(filter(None, (self.source(o, depth - 1) for o in one.operands)), "")

    def narrow(self, body: Mapping[str, Instruction], name: str) -> str:
        """The shape of an operand, in the dtype that it was converted from right before."""
        shape, one = body[name].shape, body.get(name)
        while one is not None and one.opcode in ("bitcast", "copy", "fusion"):
            name = one.operands[0] if one.operands else ""
            if one.opcode == "fusion":
                body = self.computations.get(next(one.calls(), ""), {})
                name = next((i.name for i in body.values() if i.root), "")
            one = body.get(name)
        if one is None or one.opcode != "convert" or one.operands[0] not in body:
            return shape
        wide, narrow = shape.partition("[")[0], body[one.operands[0]].shape.partition("[")[0]
        return shape.replace(wide, narrow) if BYTES[narrow] < BYTES[wide] else shape


def parse(text: str) -> Program:
    """The program of an HLO dump (`*after_optimizations.txt`)."""
    computations: dict[str, dict[str, Instruction]] = {}
    body: dict[str, Instruction] | None = None
    entry = ""
    for line in text.splitlines():  # a kernel's text may have lines of its own, also a lone "}"
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            entry = header[2] if header[1] else entry
            body = computations[header[2]] = {}
        elif body is not None and (found := _instruction(line)):
            body[found.name] = found
    computations.setdefault(entry, {})
    head = text[: text.find("\n")]
    devices = int(find(r"num_partitions=(\d+)", head, "1"))
    devices *= int(find(r"replica_count=(\d+)", head, "1"))
    return Program(computations, entry, devices)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest[len(opcode) :]) + len(opcode)
    inside = rest[len(opcode) + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(found[2], shape, opcode, operands, inside, rest[end:], bool(found[1]))


def _closing(text: str) -> int:
    """The index after the parenthesis that closes the first one."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


# ---- collectives


@dataclass(frozen=True)
class Collective:
    """A collective and how often it runs. payload: bytes of the unsharded tensor."""

    op: str
    dtype: str
    payload: int
    groups: tuple[tuple[int, ...], ...]
    """devices that exchange data, as indices into the mesh; of a permute its (source, target)"""
    count: int

    @property
    def size(self) -> int:
        """Devices in a group."""
        return max(map(len, self.groups), default=1)

    @property
    def wire(self) -> float:
        """Bytes that a device sends in all runs, if the collective is a ring."""
        if self.op in ("collective-permute", "collective-broadcast"):
            return float(self.payload * self.count)
        rounds = 2 if self.op == "all-reduce" else 1
        return rounds * self.payload * self.count * (self.size - 1) / self.size

    def axes(self, mesh: Mapping[str, int]) -> str:
        """The axes of a mesh {axis: size} along which the devices of a group differ."""
        shape = tuple(mesh.values())
        places = [np.stack(np.unravel_index(group, shape)) for group in self.groups]
        differs = [any(np.ptp(place[dim]) for place in places) for dim in range(len(shape))]
        return "+".join(axis for axis, yes in zip(mesh, differs, strict=True) if yes)


def collectives(program: Program, *, imitated: bool = False) -> list[Collective]:
    """Every collective once, but none of a single device.

    An asynchronous pair is one; so are the copies of one in the fusions that start, continue and
    end it on a TPU, and the transfers between TPU slices. An all-reduce fused with a dynamic-slice
    of its result is a reduce-scatter. Channel ids do not tell collectives apart: all those of
    shard_map have the same.

    imitated: the program is XLA:CPU's, but of other devices. It has converted bfloat16 to float32
    before each collective, which counts as bfloat16 here.
    """
    found: dict[tuple, Collective] = {}
    for name, body in program.computations.items():
        is_fused = name in program.fused
        slices = any(i.opcode == "dynamic-slice" for i in body.values())
        for one in body.values():
            if across := _across_slices(one, body, program.devices, program.runs[name]):
                found[name, one.name] = across
            if one.base not in COLLECTIVES:
                continue
            widened = imitated and (
                "to_apply" not in one.attributes or "_promoted," in one.attributes
            )
            shape = program.narrow if widened else lambda body, name: body[name].shape
            operands = [shape(body, operand) for operand in one.operands if operand in body]
            groups = replica_groups(one.attributes, program.devices)
            size = max(map(len, groups), default=1)
            if size == 1:
                continue
            payload = sum(map(nbytes, operands)) * (size if one.base == "all-gather" else 1)
            op = "reduce-scatter" if one.base == "all-reduce" and is_fused and slices else one.base
            dtype = find(r"([a-z]+\d\w*|pred)\[", max(operands, key=nbytes, default=""))
            made = Collective(op, dtype, payload, groups, program.runs[name])
            key: tuple = (name, one.name)
            if is_fused and op != "reduce-scatter":
                # The configs of the copies differ: only those after the start have its flags.
                attributes = one.attributes.partition(", backend_config=")[0]
                key = (program.runs_in(name), op, one.shape, attributes)
            if made.count and (key not in found or found[key].payload < payload):
                found[key] = made
    return list(found.values())


def _across_slices(
    one: Instruction, body: Mapping[str, Instruction], devices: int, count: int
) -> Collective | None:
    """The collective between TPU slices that libtpu wrote as a host transfer, a `send`. The program
    is that of one slice; slices are consecutive devices of the mesh."""
    kind = find(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
    if one.opcode != "send" or not kind or not count:
        return None
    op = "collective-permute" if kind == "ONE_TO_ONE" else kind.lower().replace("_", "-")
    slices = len(find(r'_xla_megascale_target="\{([^}]*)\}', one.attributes).split(","))
    shape = body[one.operands[0]].shape if one.operands[0] in body else one.shape
    payload = nbytes(shape) * (slices if op == "all-gather" else 1)
    groups = tuple(tuple(range(i, devices * slices, devices)) for i in range(devices))
    dtype = find(r"([a-z]+\d\w*|pred)\[", shape)
    return Collective(op, dtype, payload, groups, count)


def replica_groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups of devices of a collective, in any of HLO's spellings."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    listed = pairs or re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    if listed:
        groups = [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed[1])]
        return tuple(groups) or (tuple(range(devices)),)
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _rows(_iota(iota[1]))
    order = r"device_ids=\(([\d,\[\]]+(?:T\([\d,]+\))?)\)"
    mesh = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, {order})? \{{([^}}]*)\}}", attributes)
    return _mesh_groups(*mesh.groups()) if mesh else (tuple(range(devices)),)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(text: str) -> np.ndarray:
    """[4,2]<=[2,4]T(1,0): the numbers from 0 in the shape [2,4], transposed, in the shape [4,2].
    Without the part before <=, as transposed; or the numbers themselves."""
    found = re.fullmatch(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        return np.array(_numbers(text))
    shape, dims, order = (_numbers(part or "") for part in found.groups())
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose(order) if order else ids
    return ids.reshape(shape) if shape else ids


def _mesh_groups(sizes: str, order: str | None, along: str) -> tuple[tuple[int, ...], ...]:
    """mesh['a'=2,'b'=4] {'b'}: one group along b for each index of a. 'b':(2)2 is a part of b: the
    2 indices below the first factor 2."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    dims: list[tuple[str, int]] = []
    chosen: list[int] = []
    parts = {n: (int(b or 1), int(s or axes[n])) for n, b, s in
             re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)}  # fmt: skip
    for name, size in axes.items():
        before, inner = parts.get(name, (size, 1))
        dims += [(name, before), (name, inner), (name, size // before // inner)]
        chosen += [len(dims) - 2] if name in parts else []
    count = math.prod(axes.values())
    ids = _iota(order).reshape(-1) if order else np.arange(count)
    ids = np.moveaxis(ids.reshape([n for _, n in dims]), chosen, range(-len(chosen), 0))
    return _rows(ids.reshape(-1, math.prod(dims[i][1] for i in chosen)))


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, ids.reshape(ids.shape[0], -1).tolist()))
