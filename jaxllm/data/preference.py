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
from jaxllm.data.rows import Origin, PackedRows
from jaxllm.errors import UserError

Segment = tuple[np.ndarray, np.ndarray]  # (tokens int32 [n], loss_weights float32 [n])


class _PackedPairs(PackedRows, ABC):
    """Examples of two segments each.

    slots: the largest number of examples in a row (P of Batch).
    """

    def __init__(self, examples, indices, max_length: int, **packing: Any) -> None:
        super().__init__(examples, indices, 2 * max_length, **packing)
        self.slots = int(np.diff(self._packing.starts).max(initial=1))

    @abstractmethod
    def pair(self, index: int, epoch: int) -> tuple[Segment, Segment, dict[str, Any]]:
        """The two segments of an example in pass `epoch` (from 0) over the source, and its fields.

        Fields: {field of Batch: value for the example's slot}; 1 and 2 are its segments, 0 is none.
        """

    def segments_of(self, index: int, epoch: int) -> list[list[int]]:
        return [[index], [index]]

    def _halves(self, index: int) -> tuple[Segment, Segment]:
        """(tokens, loss weights) of an example before and from token `first` on."""
        i = self.indices[index]
        tokens, weights = self.examples.tokens(i), self.examples.learn(i)
        n = self.examples.first[i]
        return (tokens[:n], weights[:n]), (tokens[n:], weights[n:])

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self.row(row, 0)

    def row(self, row: int, epoch: int) -> dict[str, np.ndarray]:
        """The fields of `Batch` of a row in pass `epoch`, without the batch dim."""
        pairs = [self.pair(index, epoch) for index in self._packing[row]]
        out = make_row([s for *segments, _ in pairs for s in segments], self.length)
        for slot, (*_, fields) in enumerate(pairs):
            for name, value in fields.items():
                dtype = np.int32 if name.endswith("segment") else np.float32
                field = out.setdefault(name, np.zeros(self.slots, dtype))
                field[slot] = value + 2 * slot if dtype is np.int32 and value else value
        return out


class Pairs(_PackedPairs):
    """Preference pairs: chosen, then rejected."""

    def pair(self, index: int, epoch: int) -> tuple[Segment, Segment, dict[str, Any]]:
        margin = self.examples.value[self.indices[index]]
        fields = {"chosen_segment": 1, "rejected_segment": 2, "margin": margin}
        return *self._halves(index), fields


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
        self, examples: Examples, indices: np.ndarray, max_length: int, *, packing, seed=(0,)
    ) -> None:
        self._max_length, self._seed, self._donors = max_length, seed, lru_cache(2)(self.donors)
        prompt_lengths = examples.first[indices].astype(np.int64)
        answer_lengths = examples.lengths[indices] - prompt_lengths
        prompts = (examples.tokens(i)[:n] for i, n in zip(indices, prompt_lengths, strict=True))
        hashes = [xxhash.xxh3_64_intdigest(tokens.tobytes()) for tokens in prompts]
        self._prompt_hashes = np.array(hashes, np.uint64)
        if len(set(hashes)) == 1:
            raise UserError(
                f"{examples.name}: all {len(indices)} answers have the same prompt; kto also needs "
                "answers to other prompts, so add some"
            )
        self._blocks = self._blocks_by_length(answer_lengths)
        longest = np.zeros_like(answer_lengths)
        for block in self._blocks:
            longest[block] = answer_lengths[block].max()
        mismatched = np.minimum(prompt_lengths + longest, max_length)
        lengths = examples.lengths[indices] + mismatched
        super().__init__(examples, indices, max_length, packing=packing, lengths=lengths)

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
        donors = np.empty(len(self.indices), np.int64)
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

    def segments_of(self, index: int, epoch: int) -> list[list[int]]:
        return [[index], [index, int(self._donors(epoch)[index])]]

    def pair(self, index: int, epoch: int) -> tuple[Segment, Segment, dict[str, Any]]:
        prompt, answer = self._halves(index)
        _, other_answer = self._halves(self._donors(epoch)[index])

        def after_prompt(half: Segment) -> Segment:
            tokens, weights = map(np.concatenate, zip(prompt, half, strict=True))
            return tokens[: self._max_length], weights[: self._max_length]

        good = bool(self.examples.value[self.indices[index]] > 0)
        fields = {"chosen_segment": int(good), "rejected_segment": int(not good)}
        return after_prompt(answer), after_prompt(other_answer), fields | {"unpaired_segment": 2}


class Prompts:
    """Prompts of an online run: {"tokens", "said", "columns", …}, at most `length` tokens each."""

    def __init__(self, examples: Examples, indices: np.ndarray, length: int) -> None:
        self.examples, self.indices, self.length = examples, indices, length
        self.longest = int(examples.lengths[indices].max(initial=0))  # in tokens

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i = self.indices[index]
        record = json.loads(self.examples.record(i))
        return {"tokens": self.examples.tokens(i)} | record

    def origins(self, index: int, epoch: int) -> list[list[Origin]]:
        """The example of a prompt, its only segment."""
        return [[(self.examples, int(self.indices[index]))]]
