# SPDX-License-Identifier: Apache-2.0
"""What a compiled program keeps in memory and moves to and from it, read from XLA's dumps.

As in `hlo`, a number is for one device and one call of the program.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from jaxllm.hlo import Instruction, Program, find, nbytes

# Instructions that move no bytes: they rename buffers, or their computations are counted instead.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"}
FREE |= {"conditional", "call", "opt-barrier", "partition-id", "replica-id", "async-update"}
# Parts of a path that jax adds to the named scopes.
PLUMBING = {"", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "shard_map"}
PLUMBING |= {"branch_0_fun", "branch_1_fun", "custom_vjp_call", "custom_jvp_call"}
LOOP = "carried by a loop"
ALIASES = {"copy", "bitcast", "copy-start", "copy-done", "opt-barrier"}


def traffic(program: Program) -> float:
    """Bytes read from and written to the device's memory.

    Each instruction reads its operands and writes its result, but of a tensor that is only sliced,
    or updated in place, only the slice is moved. What a kernel does inside is not seen.
    """
    total = 0.0
    control, waiting = {program.entry}, [program.entry]
    while waiting:
        for one in program.computations[waiting.pop()].values():
            if one.opcode in ("while", "conditional", "call") or one.opcode.startswith("async"):
                inner = set(one.calls()) & program.computations.keys() - control
                control |= inner
                waiting += inner
    for name in control:
        body = program.computations[name]
        moved = sum(_moved(program, body, one) for one in body.values())
        total += moved * program.runs[name]
    return total


def _moved(program: Program, body: Mapping[str, Instruction], one: Instruction) -> float:
    if one.opcode in FREE or one.opcode.endswith("-done") or one.opcode == "async-start":
        return 0.0
    reads = [nbytes(body[o].shape, on_chip=False) if o in body else 0 for o in one.operands]
    result = nbytes(one.shape, on_chip=False)
    if one.opcode.endswith("-start"):
        return 2.0 * sum(reads)
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return 2.0 * result
    if one.opcode in ("dynamic-update-slice", "scatter"):
        return 2.0 * sum(reads[1:])
    if one.opcode == "fusion":
        inner = program.computations.get(next(iter(one.calls()), ""), {})
        return _fusion_moved(inner, reads, result)
    return float(sum(reads) + result)


def _fusion_moved(inner: Mapping[str, Instruction], reads: list[int], result: int) -> float:
    parameters = {i.name: int(i.inside) for i in inner.values() if i.opcode == "parameter"}
    users: dict[str, list[Instruction]] = defaultdict(list)
    for one in inner.values():
        for operand in one.operands:
            users[operand].append(one)
    total = float(result)
    for name, index in parameters.items():
        uses = users[name]
        read = reads[index] if index < len(reads) else 0
        if uses and all(u.opcode in ("dynamic-slice", "gather", "slice") for u in uses):
            read = min(read, sum(nbytes(u.shape) for u in uses))
        elif uses and all(
            u.opcode == "dynamic-update-slice" and u.operands[0] == name for u in uses
        ):
            update = sum(nbytes(inner[u.operands[1]].shape) for u in uses if u.operands[1] in inner)
            total += update - min(result, read)  # written in place, without the rest of the tensor
            read = 0
        total += read
    return max(total, 0.0)


def saved_activations(program: Program) -> int:
    """Bytes that a loop makes and a later loop reads: residuals of the layers for the backward
    pass. The largest sum of any computation, so that the loops of micro-batches and of attention
    are not added up."""
    return max(
        (sum(_passed_on(program, body)) for body in program.computations.values()), default=0
    )


def _passed_on(program: Program, body: Mapping[str, Instruction]) -> Iterator[int]:
    loops = [one for one in body.values() if one.opcode == "while"]
    names, seen = {loop.name for loop in loops}, set()
    for loop in loops:
        start = _source(body, loop.operands[0] if loop.operands else "")
        operands = start.operands if start is not None and start.opcode == "tuple" else ()
        for at, operand in enumerate(operands):
            made = _source(body, operand)
            if not _unchanged(program, loop, at):  # where the loop begins, not what it reads
                continue
            if made is None or made.opcode != "get-tuple-element" or made.operands[0] not in names:
                continue
            index = int(find(r"index=(\d+)", made.attributes, "0"))
            earlier = body[made.operands[0]]
            if (earlier.name, index) not in seen and not _unchanged(program, earlier, index):
                seen.add((earlier.name, index))
                yield nbytes(made.shape)


def _source(body: Mapping[str, Instruction], name: str) -> Instruction | None:
    """The instruction that makes a value, before copies of it."""
    one = body.get(name)
    while one is not None and one.opcode in ALIASES and one.operands:
        one = body.get(one.operands[0])
    return one


def _unchanged(program: Program, loop: Instruction, index: int) -> bool:
    """True if element `index` of what a loop carries is what it was before the loop."""
    inner = program.computations.get(find(r"body=%?([\w.\-]+)", loop.attributes), {})
    root = next((one for one in inner.values() if one.root), None)
    if root is None or root.opcode != "tuple" or index >= len(root.operands):
        return True
    made = _source(inner, root.operands[index])
    if made is None or made.opcode != "get-tuple-element":
        return False
    same = find(r"index=(\d+)", made.attributes) == str(index)
    return same and inner[made.operands[0]].opcode == "parameter"


def at_peak(buffers: str, ranges: str, program: Program) -> dict[str, int]:
    """{named scope: bytes} of the temporary buffers that are alive when most memory is used.

    buffers, ranges: the dumped `*buffer-assignment.txt` and `*live-range.txt`.
    """
    alive = {
        name: (int(first), int(last))
        for name, first, last in re.findall(r"^    (\S+):(\d+)-(\d+)$", ranges, re.MULTILINE)
    }
    events: list[tuple[int, int, int, int, str]] = []
    is_temporary = False
    value = re.compile(
        r" value: <\d+ (\S+?)(\{[\d,]*\})?(?: \(phi\))? @0> \(size=(\d+),offset=(\d+)\)"
    )
    for line in buffers.splitlines():
        if line.startswith("allocation "):
            is_temporary = "temp" in line and "color" not in line
        elif is_temporary and (found := value.match(line)):
            name, index, size, offset = found[1], found[2] or "{}", int(found[3]), int(found[4])
            if name + index in alive:
                first, last = alive[name + index]
                events += [(first, 0, offset, size, name), (last, 1, offset, size, name)]
    slots: dict[int, Counter[tuple[int, str]]] = defaultdict(Counter)
    total, best, peak = 0, 0, {}
    for _, ends, offset, size, name in sorted(events):
        before = max((s for s, _ in slots[offset]), default=0)
        slots[offset][size, name] += -1 if ends else 1
        slots[offset] = +slots[offset]
        total += max((s for s, _ in slots[offset]), default=0) - before
        if total > best:
            best, peak = total, {at: max(held) for at, held in slots.items() if held}
    scopes: Counter[str] = Counter()
    for size, name in peak.values():
        scopes[scope(program.source(name))] += size
    return dict(scopes.most_common())


def scope(op_name: str) -> str:
    """The named scopes of a path that jax wrote, and whether it is the backward pass:
    jit(step)/gradients/transpose(jvp(loss))/dot_general -> gradients/loss, backward."""
    if "/" not in op_name:  # an argument of the program, e.g. state.trainable['embed']['embedding']
        name = re.sub(r"\W+", ".", op_name).strip(".")
        return f"copy of {name}" if name else "other"
    path = re.sub(r"jit\([^()]*\)|\b(?:transpose|jvp|vmap|remat)\b|[()]", "", op_name)
    path = re.sub(r"\bwhile/", "", path)
    *parts, last = [part for part in path.split("/") if part not in PLUMBING] or [""]
    parts += [LOOP] if last == "while" else []
    backward = ", backward" if "transpose(" in op_name else ""
    return ("/".join(parts) + backward) if parts else "other"
