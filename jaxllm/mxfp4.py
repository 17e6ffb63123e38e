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
PAIRS = VALUES[np.stack([np.arange(256) & 15, np.arange(256) >> 4], -1)].view(np.uint64).ravel()
TURNED = 4  # groups that are transposed at a time, while they are in a processor's cache


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
        assert step == 1
        groups = slice(first // GROUP, -(-stop // GROUP))
        blocks, scales = (x[experts, outputs, groups] for x in (self.blocks, self.scales))
        scales = np.ldexp(np.float32(1), scales.astype(int) - 127)
        E, outs, G = scales.shape
        value = np.empty((E, G * GROUP, outs), np.float32)
        for g in range(0, G, TURNED):
            part = np.take(PAIRS, blocks[:, :, g : g + TURNED]).view(np.float32)
            part *= scales[:, :, g : g + TURNED, None]
            inputs = slice(g * GROUP, (g + TURNED) * GROUP)
            value[:, inputs] = part.reshape(E, outs, -1).swapaxes(1, 2)
        return value[:, first - groups.start * GROUP :][:, : stop - first]
