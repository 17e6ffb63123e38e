# SPDX-License-Identifier: Apache-2.0
"""Export: a run, an adapter or a model as a directory that transformers, peft and vLLM load."""

from __future__ import annotations

import gc
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.card import Origin, model_card
from jaxllm.checkpoint import Checkpoints, changed_file
from jaxllm.config import DataSection, MeshSection, TrainConfig, from_dict, tokenizer_path
from jaxllm.data.template import with_settings
from jaxllm.errors import UserError
from jaxllm.export_check import TOLERANCE
from jaxllm.export_check import check as compare
from jaxllm.files import DTYPES, own_card, read_json, write_card
from jaxllm.hf import load_hf, save_adapter, save_hf
from jaxllm.identity import base_weights, check_same_run
from jaxllm.mesh import make_mesh
from jaxllm.model.decoder import Decoder
from jaxllm.optim import eval_params
from jaxllm.parity.exported import check_installed
from jaxllm.paths import as_path, local_path
from jaxllm.peft.combine import merged
from jaxllm.peft.files import is_adapter, tokenizer_of
from jaxllm.peft.lora import LoraStart
from jaxllm.program import build, load_model
from jaxllm.run import START
from jaxllm.run_folder import checkpoint_step, is_run
from jaxllm.tokenizer import load_tokenizer

Step = int | Literal["best"] | None  # a checkpoint


def export(
    run: str,
    out: str,
    dtype: str | None = None,
    step: Step = None,
    merge: bool = False,
    check: bool = False,
) -> str:
    """Writes a run as a HF directory, or as an adapter if it trained one; returns `out`.

    run: a run folder, one of its checkpoints (RUN/checkpoints/STEP), a HF directory (to change the
    dtype) or an adapter. step: the checkpoint, or `best` for the best evaluation; default: the best
    one of a run with save.load_best, else the latest valid one. dtype: of the written weights;
    default: the run's save.dtype, else that of the weights. merge: merge the adapter into the base
    model in float32, and print how much the logits change. check: compare what was written in
    transformers or peft, which needs the extra `parity`, and in vLLM if there (export_check.py).

    Raises UserError for a missing file or checkpoint, for arguments that contradict each other, and
    if the check fails; then `out` stays.
    """
    if check:
        local_path(out)  # torch reads no bucket
        check_installed(adapter=not merge)
    cfg, tokenizer, base, card = _export(run, out, dtype, step, merge)
    if check:
        gc.collect()  # the model, whose memory the check needs
        found = compare(out, cfg, tokenizer, base if merge else None)
        card += "".join(one.section() for one in found)
        write_card(as_path(out), card, own_card(as_path(out)))
        for one in found:
            print(one.line(), file=sys.stderr)
        if differ := [one for one in found if not one.agrees]:
            advice = "Do not use it"
            if agree := [one.where for one in found if one.agrees]:
                advice = f"In {agree[0]} they agree, so do not use it in {differ[0].where}"
            raise UserError(
                f"{out} is written, but its {differ[0].what} differ by up to "
                f"{max(one.largest for one in differ):.1e} between jaxllm and "
                f"{' and '.join(one.where for one in differ)}; up to {TOLERANCE:g} is rounding. "
                f"{advice}, and please report this"
            )
    return out


def _export(
    run: str, out: str, dtype: str | None, step: Step, merge: bool
) -> tuple[TrainConfig | None, Any, str, str]:
    """Writes `out`; returns the run's config, the tokenizer, the base model, and the card."""
    folder, origin = as_path(run), None
    if (named := checkpoint_step(folder)) is not None:
        if step not in (None, named):
            raise UserError(f"{run} is checkpoint {named}; drop --step {step}")
        folder, step = folder.parent.parent, named
    config = {} if is_adapter(str(folder)) else _config(run, folder)
    if config and "model_type" not in config:
        cfg = from_dict(config)
        model, tokenizer, step = _load_run(run, folder, cfg, step, merge)
        origin = Origin(cfg, step, folder)
        if merge or not model.peft.frozen:
            dtype = dtype or cfg.save.dtype
    elif step is not None:
        raise UserError(f"{run} is a model; it has no checkpoint {step}")
    else:
        stored = str(config.get("dtype") or config.get("torch_dtype"))
        model = load_hf(str(folder), stored if stored in DTYPES else "float32")
        tokenizer = load_tokenizer(tokenizer_of(str(folder)))
    method = model.peft.method if merge else None
    if merge:
        model = _merge_and_compare(model, dtype)
    card = model_card(model, origin, dtype, method)
    if not model.peft.frozen:
        save_hf(model, out, dtype, tokenizer, card=card)
    elif dtype not in (None, "float32"):
        raise UserError("an adapter is always written in float32; --dtype needs --merge")
    else:
        save_adapter(model, out, tokenizer, card=card)
    return origin.cfg if origin else None, tokenizer, model.base, card


def _config(run: str, folder: Path) -> dict[str, Any]:
    """The config.json of a run folder or HF directory."""
    file, ours = folder / "config.json", is_run(folder)
    if not file.is_file() and not ours:
        raise UserError(f"{run} is neither a run folder nor a HF directory: it has no config.json")
    try:
        return read_json(file)
    except UserError as error:
        if not ours:
            raise
        remedy = "delete it and resume the run" if file.is_file() else "resume the run"
        raise UserError(f"{error}; {remedy}, which writes the file again") from None


def _load_run(
    run: str, folder: Path, cfg: TrainConfig, step: Step, merge: bool
) -> tuple[Decoder, Any, int]:
    """(model, tokenizer, step) of a run's checkpoint.

    A frozen base model is loaded if it is to be merged, or if the trained weights depend on it;
    otherwise its weights are ShapeDtypeStructs.
    """
    # What a step needs of the run's devices is not asked of these.
    model = replace(cfg.model, mlp_blocks=1, remat="full")
    cfg = replace(cfg, model=model, optim=replace(cfg.optim, offload=False), mesh=MeshSection())
    start = replace(cfg, output_dir=str(folder), overwrite=False)
    if (folder / START).is_dir():
        if problem := changed_file(folder / START):
            raise UserError(
                f"{folder / START} is damaged ({problem}); start the run again, which restores it"
            )
        saved = {"path": str(folder / START), "config": None, "tokenizer": None, "overrides": {}}
        # The saved template has the settings of the data section.
        start = replace(start, model=replace(cfg.model, **saved), data=DataSection())
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{run} has no checkpoints/")
    with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        step = _chosen_step(run, checkpoints, step, cfg)
        print(f"exporting checkpoint {step}", file=sys.stderr)
        mesh = make_mesh(start.mesh)
        program = build(start, mesh)
        model, adapter = program.policy, program.adapter
        if adapter.frozen and (merge or adapter.needs_base):
            # The run's cache may be of another machine.
            here = replace(cfg, data=replace(cfg.data, cache_dir=None))
            saved, now = checkpoints.meta(step).get("identity", {}), {"weights": base_weights(here)}
            kept = {n: saved["weights"].get(n) for n in now["weights"]} if saved else {}
            check_same_run(folder, {"weights": kept} if saved else {}, now, resumes=False)
            cfg = replace(cfg, peft=replace(cfg.peft, path=None))  # the checkpoint has its values
            load = partial(load_model, mesh=mesh, shape=program.shape, adapter=adapter)
            # PiSSA started from the base weights in the dtype and quantization of training.
            pissa = nnx.state(load(cfg), LoraStart) if adapter.needs_base else {}
            section = replace(cfg.peft, quantize_base="none")
            full = replace(cfg.model, weight_dtype="float32", compute_dtype="float32")
            model = load(replace(cfg, peft=section, model=full))
            nnx.update(model, pissa)
        model.base = cfg.model.path or ""
        graph, trained, rest = nnx.split(model, adapter.trains, ...)
        trainable = {k: v for k, v in program.state.trainable.items() if k != "value"}  # no critic
        fields: dict[str, Any] = {"trainable": trainable}
        if cfg.optim.name == "schedule_free_adamw":
            fields = {"trainable": program.state.trainable, "opt_state": program.state.opt_state}
        state = checkpoints.restore(step, fields, partial=True)
        weights = eval_params(state.get("opt_state"), state["trainable"])
        like = nnx.to_pure_dict(trained)
        weights = {name: weights[name] for name in trainable}
        weights = jax.tree.map(lambda x, w: w.astype(x.dtype), like, weights)
        nnx.replace_by_pure_dict(trained, weights)
    tokenizer = with_settings(load_tokenizer(tokenizer_path(start)), start.data)
    return nnx.merge(graph, trained, rest), tokenizer, step


def _chosen_step(run: str, checkpoints: Checkpoints, step: Step, cfg: TrainConfig) -> int:
    """The checkpoint to export. Raises UserError if it does not exist."""
    if step == "best" and (step := checkpoints.best()) is None:
        raise UserError(
            f"{run} has no best checkpoint: it was not evaluated, or save.keep_best is false"
        )
    if step is None and cfg.save.load_best:
        best = checkpoints.best()
        step = best if best is not None and checkpoints.is_good(best) else None
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise UserError(f"{run} has no checkpoint yet")
    checkpoints.check(step)
    return step


def _merge_and_compare(model: Decoder, dtype: str | None) -> Decoder:
    """The merged model; prints how much its logits differ from those of the adapter, on random
    tokens."""
    plain = merged(model)
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 0, model.cfg.vocab_size)
    logits = np.asarray(model(tokens))
    difference = float(np.abs(np.asarray(plain(tokens)) - logits).max())
    line = f"merged: the logits differ by at most {difference:.1e} in float32"
    if dtype not in (None, "float32"):
        graph, state = nnx.split(plain)
        rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), state)
        difference = float(np.abs(np.asarray(nnx.merge(graph, rounded)(tokens)) - logits).max())
        line += f", by {difference:.1e} when rounded to {dtype}"
    print(f"{line} (the largest logit is {np.abs(logits).max():.1f})", file=sys.stderr)
    return plain
