# SPDX-License-Identifier: Apache-2.0
"""Pairs of answers, judged answers and prompts as rows.

Both answers to a prompt lie in one row, each a segment with the prompt of its own, so preferences
are packed as conversations are. `max_length` is of one answer with its prompt; a row holds two.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from jaxllm.data.batch import make_row
from jaxllm.data.examples import Examples
from jaxllm.data.packing import one_per_row, pack

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
    def segments(self, index: int) -> tuple[Segment, Segment]:
        """The two segments of an example."""

    @abstractmethod
    def names(self, index: int) -> dict[str, Any]:
        """{field of Batch: its value in the example's slot}; 1 and 2 mean its segments."""

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        indices = self._plan[row]
        out = make_row([s for i in indices for s in self.segments(i)], self.length)
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

    def segments(self, index: int) -> tuple[Segment, Segment]:
        i = self._chosen[index]
        tokens, learn = self._examples.tokens(i), self._examples.learn(i)
        first = int(self._examples.first[i])
        return (tokens[:first], learn[:first]), (tokens[first:], learn[first:])

    def names(self, index: int) -> dict[str, Any]:
        margin = self._examples.value[self._chosen[index]]
        return {"chosen_segment": 1, "rejected_segment": 2, "margin": margin}


class Judged(_Packed):
    """Judged answers, each beside its prompt with another example's answer.

    The latter tells how far the model is from the reference on what it was not judged on (KTO); the
    other example is the one before, and the last one's for the first.
    """

    def __init__(
        self, examples: Examples, chosen: np.ndarray, max_length: int, *, packing: bool
    ) -> None:
        self._examples, self._chosen, self._limit = examples, chosen, max_length
        whole, prompt = examples.lengths[chosen], examples.first[chosen].astype(np.int64)
        other = np.minimum(prompt + np.roll(whole - prompt, 1), max_length)
        super().__init__(whole + other, max_length, packing=packing)

    def segments(self, index: int) -> tuple[Segment, Segment]:
        (tokens, learn), prompt = self._answer(index)
        (others, weights), start = self._answer(index - 1)
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
