# SPDX-License-Identifier: Apache-2.0
"""Rows of preference pairs, judged answers and prompts.

Both answers to a prompt are in the same row, each as a segment with its own copy of the prompt, so
pairs are packed like conversations. `max_length` is the limit for a segment; a row has
2 * max_length tokens.
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
from jaxllm.data.rows import one_per_row, pack
from jaxllm.errors import UserError

Segment = tuple[np.ndarray, np.ndarray]  # (tokens int32 [n], loss_weights float32 [n])


class _PackedPairs(ABC):
    """Examples of two segments each, in rows of 2 * max_length tokens.

    slots: the largest number of examples in a row (P of Batch).
    """

    def __init__(
        self,
        examples: Examples,
        indices: np.ndarray,
        lengths: np.ndarray,
        max_length: int,
        packing: bool,
    ) -> None:
        self._examples, self._indices, self.length = examples, indices, 2 * max_length
        self._packing = pack(lengths, self.length) if packing else one_per_row(len(lengths))
        self.slots = int(np.diff(self._packing.starts).max(initial=1))

    def __len__(self) -> int:
        return len(self._packing)

    @abstractmethod
    def segments(self, index: int, epoch: int) -> tuple[Segment, Segment]:
        """The two segments of an example in pass `epoch` (from 0) over the source."""

    @abstractmethod
    def fields(self, index: int) -> dict[str, Any]:
        """{field of Batch: value for the example's slot}; 1 and 2 are its segments, 0 is none."""

    def _example(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(tokens, loss weights, number of tokens before the boundary)."""
        i = self._indices[index]
        boundary = int(self._examples.boundary[i])
        return self._examples.tokens(i), self._examples.loss_weights(i), boundary

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self.row(row, 0)

    def row(self, row: int, epoch: int) -> dict[str, np.ndarray]:
        """The fields of `Batch` of a row in pass `epoch`, without the batch dim."""
        indices = self._packing[row]
        out = make_row([s for i in indices for s in self.segments(i, epoch)], self.length)
        for slot, index in enumerate(indices):
            for name, value in self.fields(index).items():
                dtype = np.int32 if name.endswith("segment") else np.float32
                field = out.setdefault(name, np.zeros(self.slots, dtype))
                field[slot] = value + 2 * slot if dtype is np.int32 and value else value
        return out


class Pairs(_PackedPairs):
    """Preference pairs: chosen, then rejected."""

    def __init__(
        self, examples: Examples, indices: np.ndarray, max_length: int, *, packing: bool
    ) -> None:
        super().__init__(examples, indices, examples.lengths[indices], max_length, packing)

    def segments(self, index: int, epoch: int) -> tuple[Segment, Segment]:
        tokens, weights, boundary = self._example(index)
        return (tokens[:boundary], weights[:boundary]), (tokens[boundary:], weights[boundary:])

    def fields(self, index: int) -> dict[str, Any]:
        margin = self._examples.value[self._indices[index]]
        return {"chosen_segment": 1, "rejected_segment": 2, "margin": margin}


class Judged(_PackedPairs):
    """Judged answers, each with a mismatched segment: the same prompt and another prompt's answer.

    KTO estimates its KL baseline from the mismatched answers. They are redrawn in each pass from
    `seed` and the number of the pass; `rows[i]` is row i of pass 0. Answers are exchanged within
    blocks of similar length, so that the packing fits every draw, and never between equal prompts
    (the same tokens). Each answer is used once, unless more than half of a block has the same
    prompt. Raises UserError if all prompts are equal.
    """

    MAX_BLOCKS, MIN_BLOCK = 64, 16  # number of blocks, and of answers per block

    def __init__(
        self,
        examples: Examples,
        indices: np.ndarray,
        max_length: int,
        *,
        packing: bool,
        seed: tuple[int, ...] = (0,),
    ) -> None:
        self._limit, self._seed, self._donors = max_length, seed, lru_cache(2)(self.donors)
        lengths = examples.lengths[indices]
        prompt_lengths = examples.boundary[indices].astype(np.int64)
        prompts = (examples.tokens(i)[:n] for i, n in zip(indices, prompt_lengths, strict=True))
        hashes = [xxhash.xxh3_64_intdigest(tokens.tobytes()) for tokens in prompts]
        self._prompt_hashes = np.array(hashes, np.uint64)
        if len(self._prompt_hashes) and (self._prompt_hashes == self._prompt_hashes[0]).all():
            raise UserError(
                f"{examples.name}: all {len(indices)} answers have the same prompt; kto also needs "
                "answers to other prompts, so add some"
            )
        self._blocks = self._blocks_by_length(lengths - prompt_lengths)
        longest = np.zeros_like(lengths)
        for block in self._blocks:
            longest[block] = (lengths - prompt_lengths)[block].max()
        mismatched = np.minimum(prompt_lengths + longest, max_length)
        super().__init__(examples, indices, lengths + mismatched, max_length, packing)

    def _blocks_by_length(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Divide the examples into blocks by the length of their answers.

        A block of which more than half has the same prompt is merged with the next one.
        """

        def has_majority_prompt(block: np.ndarray) -> bool:
            _, counts = np.unique(self._prompt_hashes[block], return_counts=True)
            return 2 * counts.max() > len(block)

        order = np.argsort(lengths, kind="stable")
        count = min(len(order) // self.MIN_BLOCK, self.MAX_BLOCKS)
        blocks: list[np.ndarray] = []
        for block in np.array_split(order, max(count, 1)):
            if blocks and has_majority_prompt(blocks[-1]):
                block = np.concatenate([blocks.pop(), block])
            blocks.append(block)
        while len(blocks) > 1 and has_majority_prompt(blocks[-1]):
            blocks[-2:] = [np.concatenate(blocks[-2:])]
        return blocks

    def donors(self, epoch: int) -> np.ndarray:
        """int64 [N]: the example whose answer each prompt gets in pass `epoch`."""
        rng = np.random.default_rng((*self._seed, epoch))
        donors = np.empty(len(self._indices), np.int64)
        for block in self._blocks:
            block = rng.permutation(block)
            _, first_index, group, sizes = np.unique(
                self._prompt_hashes[block],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            # Sort equal prompts together, the most frequent one first. A shift by its count then
            # pairs different prompts. If it has a majority, the other answers are used repeatedly.
            count, largest = len(block), sizes.max()
            first_index[sizes.argmax()] = -1
            block = block[np.argsort(first_index[group], kind="stable")]
            position = np.arange(count)
            donor = np.where(position < largest, position % (count - largest), position) + largest
            donors[block] = block[donor % count]
        return donors

    def segments(self, index: int, epoch: int) -> tuple[Segment, Segment]:
        *answer, prompt_length = self._example(index)
        *other, start = self._example(self._donors(epoch)[index])
        mismatched, weights = (
            np.concatenate([mine[:prompt_length], theirs[start:]])[: self._limit]
            for mine, theirs in zip(answer, other, strict=True)
        )
        return (answer[0], answer[1]), (mismatched, weights)

    def fields(self, index: int) -> dict[str, Any]:
        good = bool(self._examples.value[self._indices[index]] > 0)
        segments = {"chosen_segment": int(good), "rejected_segment": int(not good)}
        return segments | {"unpaired_segment": 2}


class Prompts:
    """Prompts of an online run: {"tokens", "said", "columns", …}, at most `length` tokens each."""

    def __init__(self, examples: Examples, indices: np.ndarray, length: int) -> None:
        self._examples, self._indices, self.length = examples, indices, length
        self.longest = int(examples.lengths[indices].max(initial=0))  # in tokens

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = self._indices[index]
        record = json.loads(self._examples.record(i))
        return {"tokens": self._examples.tokens(i)} | record


def equalize_slots(parts: list[Any]) -> list[Any]:
    """Give the rows of several sources the same number of slots, so that they can be stacked."""
    for part in parts:
        part.slots = max(p.slots for p in parts)
    return parts
