# SPDX-License-Identifier: Apache-2.0
"""Experts in MXFP4, as gpt-oss is published: 4-bit floats, of which 32 share a power of two.

    X_blocks   uint8 [E, O, I / 32, 16]   two values in a byte, the lower four bits first
    X_scales   uint8 [E, O, I / 32]       the exponent of 2, plus 127

Dims: E experts, I inputs, O outputs; G = I / 32 groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32  # values that share a scale
STORED = "U8"
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = np.array([*POSITIVE, *(-value for value in POSITIVE)], np.float32)
# The two values of each byte, as one element: numpy takes those faster than pairs.
PAIRS = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], -1).view(np.uint64)


class Mxfp4:
    """A weight [E, I, O] with the interface of safe_open's slices: `part[experts, inputs, outputs]`
    is float32."""

    def __init__(self, blocks: Any, scales: Any):
        self.blocks, self.scales = blocks, scales

    def get_shape(self) -> list[int]:
        E, outputs, G, _ = self.blocks.shape
        return [E, G * GROUP, outputs]

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        experts, inputs, outputs = index
        first, stop, step = inputs.indices(self.get_shape()[1])
        groups = slice(first // GROUP, -(-stop // GROUP))
        scales = self.scales[experts, outputs, groups]
        values = np.take(PAIRS, self.blocks[experts, outputs, groups, :]).view(np.float32)
        values *= np.ldexp(np.float32(1), scales.astype(int) - 127)[..., None]
        values = values.reshape(*scales.shape[:2], -1)
        skipped = groups.start * GROUP
        return values[..., first - skipped : stop - skipped : step].swapaxes(1, 2)
