# SPDX-License-Identifier: Apache-2.0
"""Rows in which the completions of a group follow their prompt, so that it is computed once.

Dims: R completions, G of a group, Q = R / G groups, T tokens of a prompt with its completion, W
tokens of a shared row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.config import TrainConfig
from jaxllm.ops.attention import EVERYWHERE, shares_prefixes

Fields = dict[str, np.ndarray]


def can_share(cfg: TrainConfig, policy: Any, mesh: Any) -> bool:
    """True if the groups of a rollout can share their prompts.

    A group must be whole in one micro-batch of one device. Prompts precede all tokens of their row,
    where the positions of virtual tokens would be, and where frequencies that depend on the length
    of a text would not know it. Delta nets and convolutions have the state of one text. Routers'
    losses and loads count the tokens of each text.
    """
    group, size = cfg.rl.group_size or 1, cfg.micro_batch_size
    if cfg.model.balance_loss or cfg.model.router_z_loss or cfg.model.router_bias_rate:
        return False
    if group == 1 or size % group or cfg.rl.minibatches > 1 or dict(mesh.shape)["context"] > 1:
        return False
    kinds = {rope.kind for rope in policy.cfg.ropes}
    plain = policy.peft.length == 0 and not kinds & {"longrope", "dynamic"}
    plain = plain and not policy.cfg.recurrent
    return plain and shares_prefixes(cfg.model.attention)


class SharedRows:
    """Where the tokens of rows [R, T], each a prompt with its completion, are in rows [Q, W].

    A shared row is the prompt without its last token, which every completion sees; then for each
    completion the prompt's last token, from which its first one is predicted, and the completion
    without its last token, as a segment.
    """

    def __init__(self, rows: Fields, group: int, width: int):
        learned = rows["weights"] > 0
        count, lengths = len(learned) // group, learned.sum(1)
        self.shape, self.width = learned.shape, width
        self.row = np.zeros((count, width), np.intp)
        self.column = np.zeros((count, width), np.intp)
        self.segments = np.zeros((count, width), np.int32)  # 0 = padding
        for q in range(count):
            first = int(learned[q * group].argmax())  # the prompt's last token
            spans = [(q * group, 0, first, EVERYWHERE)]
            spans += [
                (r, first, int(lengths[r]), j)
                for j, r in enumerate(range(q * group, (q + 1) * group), 1)
            ]
            at = 0
            for r, start, n, segment in spans:
                self.row[q, at : at + n] = r
                self.column[q, at : at + n] = np.arange(start, start + n)
                self.segments[q, at : at + n] = segment
                at += n

    def pack(self, fields: Fields) -> Fields:
        """{name: [R, T]} -> {name: [Q, W]}, 0 in padding."""
        used = self.segments != 0
        packed = {n: np.where(used, x[self.row, self.column], 0) for n, x in fields.items()}
        return packed | {"segment_ids": self.segments}

    def unpack(self, x: np.ndarray) -> np.ndarray:
        """Values of the completions, [Q, W] -> [R, T]; 0 elsewhere."""
        out, own = np.zeros(self.shape, x.dtype), self.segments > 0
        out[self.row[own], self.column[own]] = x.reshape(-1, self.width)[own]
        return out
