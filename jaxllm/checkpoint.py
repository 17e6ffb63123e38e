# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: asynchronous, atomic, the last few and the best; and whose folder it is."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxllm.config import TrainConfig, to_dict

# What a resumed run may change: it keeps the data, the model and the course of the optimizer.
FREE = ("output_dir", "overwrite", "resume", "epochs", "steps", "micro_batch_size", "eval_every")
FREE_SECTIONS = ("mesh", "log", "save")
FREE_MODEL = ("remat", "scan_unroll", "loss_chunk")

logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """Steps of training state in a folder.

    keep: how many of the newest stay (0 = all); keep_best: the one with the lowest eval loss stays
    too, whatever its age.
    """

    def __init__(self, directory: Path | str, keep: int = 0, keep_best: bool = True):
        policies = ocp.checkpoint_managers
        keepers: list[Any] = [policies.LatestN(keep) if keep else policies.PreserveAll()]
        if keep_best:
            keepers.append(
                policies.BestN(
                    get_metric_fn=lambda m: m["eval_loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keepers), create=True
        )
        self.directory = Path(directory).absolute()
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: Any, meta: dict[str, Any], eval_loss: float | None = None) -> None:
        """Copies `state` to the host, then writes it in the background; visible when whole."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        metrics = None if eval_loss is None else {"eval_loss": eval_loss}
        self.manager.save(step, args=args, metrics=metrics, force=True)

    def latest(self) -> int | None:
        """The newest step whose files are whole; a broken one is named on stderr and passed over."""
        self.manager.wait_until_finished()
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                self.meta(step)
                self.manager.item_metadata(step)
                state = self.directory / str(step) / "state"
                if not (state / "_METADATA").is_file() or not (state / "manifest.ocdbt").is_file():
                    raise FileNotFoundError(f"{state} is not whole")
                return step
            except Exception as error:  # whatever a torn file makes the reader raise
                reason = str(error).split("\n")[0]
                print(f"jaxllm: checkpoint {step} is not whole, passed over: {reason}", file=sys.stderr)
        return None

    def best(self) -> int | None:
        """The step with the lowest eval loss."""
        return self.manager.best_step()

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved beside the state."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step`, laid out as the ShapeDtypeStructs (with shardings) of `like`."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self.manager.restore(step, args=args)["state"]

    def restore_weights(self, step: int, like: Any) -> Any:
        """The weights alone, without reading the optimizer's state."""
        with ocp.PyTreeCheckpointer() as reader:
            item = {"trainable": like}
            args = ocp.checkpoint_utils.construct_restore_args(item)
            folder = self.directory / str(step) / "state"
            return reader.restore(
                folder, args=ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
            )["trainable"]

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written."""
        self.manager.wait_until_finished()
        self.manager.close()


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys of a config that another run of the same folder must share."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in FREE_SECTIONS:
            free = FREE_MODEL if key == "model" else ("workers", "cache_dir") if key == "data" else ()
            flat |= {f"{key}.{k}": v for k, v in value.items() if k not in free}
        elif key not in FREE + FREE_SECTIONS:
            flat[key] = value
    return flat


def guard(cfg: TrainConfig) -> None:
    """Makes the run folder and its config.json, or checks that the folder is this run's.

    Raises ValueError when the folder has checkpoints of another config, naming the keys, or is used
    by something else. `overwrite` empties it first.
    """
    run = Path(cfg.output_dir)
    file = run / "config.json"
    config = json.loads(json.dumps(to_dict(cfg)))
    if run.exists() and any(run.iterdir()) and not file.is_file():
        raise ValueError(f"output_dir {run} holds something that is no run; choose another place")
    if cfg.overwrite and jax.process_index() == 0:
        shutil.rmtree(run, ignore_errors=True)
    if file.is_file() and any((run / "checkpoints").glob("[0-9]*")):
        if not cfg.resume:
            raise ValueError(f"{run} has checkpoints; resume them, or say --overwrite true")
        before, now = _fixed(json.loads(file.read_text())), _fixed(config)
        differ = [k for k in now if k in before and now[k] != before[k]]
        if differ:
            what = "; ".join(f"{k} was {before[k]!r}, is {now[k]!r}" for k in differ[:3])
            raise ValueError(f"{run} belongs to another run ({what}); change output_dir or --overwrite true")
    run.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config, indent=2) + "\n")
