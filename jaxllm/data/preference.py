# SPDX-License-Identifier: Apache-2.0
"""Pairs of answers, judged answers and prompts as rows.

Both answers to a prompt lie in one row, each a segment with the prompt of its own, so preferences
are packed as conversations are. `max_length` is of one answer with its prompt; a row holds two.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash

from jaxllm.data.batch import make_row
from jaxllm.data.examples import Examples
from jaxllm.data.packing import one_per_row, pack
from jaxllm.errors import UserError

Segment = tuple[np.ndarray, np.ndarray]  # (tokens int32 [n], learn float32 [n])


class _Packed(ABC):
    """Examples of two segments each in rows of 2 * max_length tokens.

    slots: the most examples in a row; every row has room for the segments of as many.
    """

    def __init__(self, lengths: np.ndarray, max_length: int, *, packing: bool) -> None:
        self.length = 2 * max_length
        self._plan = pack(lengths, self.length) if packing else one_per_row(len(lengths))
        self.slots = int(np.diff(self._plan.starts).max(initial=1))

    def __len__(self) -> int:
        return len(self._plan)

    @abstractmethod
    def segments(self, index: int, epoch: int) -> tuple[Segment, Segment]:
        """The two segments of an example in pass `epoch` (from 0) over the source."""

    @abstractmethod
    def names(self, index: int) -> dict[str, Any]:
        """{field of Batch: its value in the example's slot}; 1 and 2 mean its segments."""

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self.row(row, 0)

    def row(self, row: int, epoch: int) -> dict[str, np.ndarray]:
        """The fields of `Batch` of a row in pass `epoch`, without the batch dim."""
        indices = self._plan[row]
        out = make_row([s for i in indices for s in self.segments(i, epoch)], self.length)
        for slot, index in enumerate(indices):
            for name, value in self.names(index).items():
                kind = np.int32 if name.endswith("segment") else np.float32
                field = out.setdefault(name, np.zeros(self.slots, kind))
                field[slot] = value + 2 * slot if kind is np.int32 and value else value
        return out


class Pairs(_Packed):
    """Pairs of answers: chosen, then rejected."""

    def __init__(
        self, examples: Examples, chosen: np.ndarray, max_length: int, *, packing: bool
    ) -> None:
        self._examples, self._chosen = examples, chosen
        super().__init__(examples.lengths[chosen], max_length, packing=packing)

    def segments(self, index: int, epoch: int) -> tuple[Segment, Segment]:
        i = self._chosen[index]
        tokens, learn = self._examples.tokens(i), self._examples.learn(i)
        first = int(self._examples.first[i])
        return (tokens[:first], learn[:first]), (tokens[first:], learn[first:])

    def names(self, index: int) -> dict[str, Any]:
        margin = self._examples.value[self._chosen[index]]
        return {"chosen_segment": 1, "rejected_segment": 2, "margin": margin}


class Judged(_Packed):
    """Judged answers, each beside its prompt with the answer to another prompt.

    The latter, the mismatched answer, tells how far the model is from the reference on what it was
    not judged on (KTO). Which answer is lent to which prompt is drawn anew for each pass, by `seed`
    and the number of the pass; `rows[i]` is row i of pass 0. Answers are exchanged within
    blocks of about the same length, so that a row has room for every draw. Equal prompts (the same
    tokens) never lend to each other. Each answer is lent once, unless more than half of all have
    the same prompt. Raises ValueError when all have.
    """

    BLOCKS, LEAST = 64, 16  # blocks at most, and answers in a block at least

    def __init__(
        self,
        examples: Examples,
        chosen: np.ndarray,
        max_length: int,
        *,
        packing: bool,
        seed: tuple[int, ...] = (0,),
    ) -> None:
        self._examples, self._chosen, self._limit = examples, chosen, max_length
        self._seed, self._lent = seed, lru_cache(2)(self.lenders)
        whole, prompt = examples.lengths[chosen], examples.first[chosen].astype(np.int64)
        asked = (examples.tokens(i)[:n].tobytes() for i, n in zip(chosen, prompt, strict=True))
        self._asked = np.array([xxhash.xxh3_64_intdigest(tokens) for tokens in asked], np.uint64)
        if len(self._asked) and (self._asked == self._asked[0]).all():
            raise UserError(
                f"{examples.name}: all of its answers ({len(chosen)}) have the same prompt; kto "
                "compares with answers to other prompts, so give some"
            )
        self._blocks = self._alike(whole - prompt)
        longest = np.zeros_like(whole)
        for block in self._blocks:
            longest[block] = (whole - prompt)[block].max()
        other = np.minimum(prompt + longest, max_length)
        super().__init__(whole + other, max_length, packing=packing)

    def _alike(self, lengths: np.ndarray) -> list[np.ndarray]:
        """The examples in blocks, by the length of their answers; where more than half of a block
        have the same prompt, it is joined with the next."""

        def crowded(block: np.ndarray) -> bool:
            return 2 * np.unique(self._asked[block], return_counts=True)[1].max() > len(block)

        order = np.argsort(lengths, kind="stable")
        count = min(len(order) // self.LEAST, self.BLOCKS)
        blocks: list[np.ndarray] = []
        for block in np.array_split(order, max(count, 1)):
            if blocks and crowded(blocks[-1]):
                block = np.concatenate([blocks.pop(), block])
            blocks.append(block)
        while len(blocks) > 1 and crowded(blocks[-1]):
            blocks[-2:] = [np.concatenate(blocks[-2:])]
        return blocks

    def lenders(self, epoch: int) -> np.ndarray:
        """int64 [N]: the example whose answer each prompt is given in pass `epoch`."""
        rng = np.random.default_rng((*self._seed, epoch))
        lenders = np.empty(len(self._chosen), np.int64)
        for block in self._blocks:
            block = rng.permutation(block)
            _, first, group, sizes = np.unique(
                self._asked[block], return_index=True, return_inverse=True, return_counts=True
            )
            # Equal prompts together, the most frequent one in front: that many places further
            # stands another one. Where it has more than half, the others lend more than once.
            count, most = len(block), sizes.max()
            first[sizes.argmax()] = -1
            block = block[np.argsort(first[group], kind="stable")]
            place = np.arange(count)
            place = np.where(place < most, place % (count - most), place) + most
            lenders[block] = block[place % count]
        return lenders

    def segments(self, index: int, epoch: int) -> tuple[Segment, Segment]:
        (tokens, learn), prompt = self._answer(index)
        (others, weights), start = self._answer(self._lent(epoch)[index])
        other = np.concatenate([tokens[:prompt], others[start:]])[: self._limit]
        weigh = np.concatenate([learn[:prompt], weights[start:]])[: self._limit]
        return (tokens, learn), (other, weigh)

    def _answer(self, index: int) -> tuple[Segment, int]:
        i = self._chosen[index]
        return (self._examples.tokens(i), self._examples.learn(i)), int(self._examples.first[i])

    def names(self, index: int) -> dict[str, Any]:
        good = bool(self._examples.value[self._chosen[index]] > 0)
        return {
            "chosen_segment": int(good),
            "rejected_segment": int(not good),
            "unpaired_segment": 2,
        }


class Prompts:
    """Prompts for an online run: {"tokens", "said", "columns", …} each, of at most `length`."""

    def __init__(self, examples: Examples, chosen: np.ndarray, length: int) -> None:
        self._examples, self._chosen, self.length = examples, chosen, length
        self.longest = int(examples.lengths[chosen].max(initial=0))  # tokens of a prompt

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = self._chosen[index]
        record = json.loads(self._examples.record(i))
        return {"tokens": self._examples.tokens(i)} | record


def share_slots(parts: list[Any]) -> list[Any]:
    """Gives the rows of several sources room for as many pairs, so that they stack."""
    for part in parts:
        part.slots = max(p.slots for p in parts)
    return parts
