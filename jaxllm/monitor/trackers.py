# SPDX-License-Identifier: Apache-2.0
"""Experiment trackers, an optional extra each: Weights & Biases and TensorBoard."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Receives the numbers of metrics.jsonl. Created with (run folder, config, resume step)."""

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _Wandb:
    """Weights & Biases. A resumed run keeps its id. Offline unless the user is logged in."""

    def __init__(self, run: Path, config: dict[str, Any], step: int):
        import wandb  # pyright: ignore[reportMissingImports]

        mode = os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        id_file = run / "wandb-id.txt"
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4))
        self.session = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxllm"),
            name=run.resolve().name,
            dir=run,
            config=config,
            mode=mode,
            id=id_file.read_text(),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # wandb's own step must increase, but a resumed run repeats the steps after its checkpoint.
        self.session.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        self.session.log({"step": step} | {f"{kind}/{k}": v for k, v in numbers.items()})

    def close(self) -> None:
        self.session.finish()


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, config: dict[str, Any], step: int):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(f"{kind}/{key}", value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
}
