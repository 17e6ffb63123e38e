# SPDX-License-Identifier: Apache-2.0
"""A run, an adapter or a model as a directory that others load."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.checkpoint import Checkpoints, same_base
from jaxllm.config import DataSection, MeshSection, OptimSection, from_dict, tokenizer_path
from jaxllm.data.template import with_settings
from jaxllm.errors import UserError
from jaxllm.files import DTYPES, read_json
from jaxllm.hf import (
    START,
    blank_model,
    identity,
    load_hf,
    load_model,
    model_config,
    save_adapter,
    save_hf,
    started_from,
)
from jaxllm.mesh import make_mesh
from jaxllm.model.decoder import Decoder
from jaxllm.optim import eval_params, make_optimizer, opt_state_shardings
from jaxllm.peft.files import is_adapter, make_adapter, tokenizer_of
from jaxllm.peft.lora import LoraStart
from jaxllm.peft.merge import merged
from jaxllm.tokenizer import load_tokenizer


def export(
    run: str,
    out: str,
    dtype: str | None = None,
    step: int | Literal["best"] | None = None,
    merge: bool = False,
) -> str:
    """A run as a HF directory, or as an adapter where that is what it trained; its path returned.

    run: a run folder (its checkpoint `step`; `best`: that of the best evaluation; default: best for
    a run with save.load_best, else the newest good one; stderr says which), one checkpoint of it
    (RUN/checkpoints/STEP), a HF directory (to change the dtype), or an adapter. dtype default: the
    run's `save.dtype`, else the weights' own. merge: fold the adapter into the model, in float32
    whatever the base was held in, and say on stderr by how much the logits change.
    """
    folder = Path(run).expanduser()
    if folder.parent.name == "checkpoints" and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    if is_adapter(str(folder)) or _is_model(run, folder):
        if step is not None:
            raise UserError(f"{run} is a model; it has no checkpoint {step}")
        if is_adapter(str(folder)):
            model, tokenizer = load_hf(str(folder)), load_tokenizer(tokenizer_of(str(folder)))
        else:
            config = read_json(folder / "config.json")
            stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
            model = load_hf(str(folder), stored if stored in DTYPES else "float32")
            tokenizer = load_tokenizer(str(folder))
    else:
        model, tokenizer, kept = _load_run(run, folder, step, merge)
        if merge or not model.peft.frozen:
            dtype = dtype or kept
    if merge:
        save_hf(_merge_and_compare(model, dtype), out, dtype, tokenizer)
    elif not model.peft.frozen:
        save_hf(model, out, dtype, tokenizer)
    elif dtype not in (None, "float32"):
        raise UserError("an adapter is kept in float32; --dtype goes with --merge")
    else:
        save_adapter(model, out, tokenizer)
    return out


def _is_model(run: str, folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        raise UserError(f"{run} is no run folder (nor a HF directory): it has no config.json")
    return "model_type" in read_json(folder / "config.json")


def _load_run(
    run: str, folder: Path, step: int | Literal["best"] | None, whole: bool
) -> tuple[Decoder, Any, str | None]:
    """(model, tokenizer, save.dtype) of a run's checkpoint.

    A frozen base is loaded when `whole`, or where what was trained depends on it; else its weights
    are shapes.
    """
    cfg = from_dict(read_json(folder / "config.json"))
    base = cfg.model.path or ""
    start = cfg
    if (folder / START).is_dir():
        section = replace(cfg.model, path=str(folder / START), config=None, tokenizer=None)
        section = replace(section, overrides={})
        start = replace(cfg, model=section, data=DataSection())  # its template has all of data's
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{run} has no checkpoints/")
    saves = Checkpoints(folder / "checkpoints")
    known = saves.manager.all_steps()
    if step == "best" and (step := saves.best()) is None:
        raise UserError(
            f"{run} kept no best checkpoint: it has no evaluation, or not save.keep_best"
        )
    best = saves.best() if step is None and cfg.save.load_best else None
    step = best if best is not None and saves.is_good(best) else step
    if step is not None and step not in known:
        there = ", ".join(map(str, known)) or "none"
        raise UserError(f"{run} has no checkpoint {step}; it has {there}")
    step = saves.latest() if step is None else step
    if step is None:
        raise UserError(f"{run} has no good checkpoint yet")
    print(f"exporting checkpoint {step}", file=sys.stderr)
    own = replace(cfg, output_dir=str(folder), overwrite=False)
    mesh, plan = make_mesh(MeshSection()), make_adapter(model_config(start)[0], started_from(own))
    if plan.frozen and (whole or plan.needs_base):
        same_base(saves, step, identity(cfg))
        cfg = replace(cfg, peft=replace(cfg.peft, path=None))  # its values are the checkpoint's
        # PiSSA began with the weights as they were held in training.
        began = nnx.state(load_model(cfg, mesh, peft=plan), LoraStart) if plan.needs_base else {}
        wide = replace(cfg.model, weight_dtype="float32")
        section = replace(cfg.peft, quantize_base="none")
        model = load_model(replace(cfg, peft=section, model=wide), mesh, peft=plan)
        nnx.update(model, began)
    else:
        model = blank_model(start, mesh, peft=plan)
    model.base = base
    graph, trained, rest = nnx.split(model, plan.trains, ...)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        nnx.to_pure_dict(trained),
    )
    nnx.replace_by_pure_dict(trained, _trained(saves, step, like, cfg.optim))
    saves.close()
    tokenizer = with_settings(load_tokenizer(tokenizer_path(start)), start.data)
    return nnx.merge(graph, trained, rest), tokenizer, cfg.save.dtype


def _merge_and_compare(model: Decoder, dtype: str | None) -> Decoder:
    """The merged model; says how far its logits are from the unmerged one's, on random tokens."""
    plain = merged(model)
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 0, model.cfg.vocab_size)
    want = np.asarray(model(tokens))
    apart = float(np.abs(np.asarray(plain(tokens)) - want).max())
    said = f"merged: the logits differ by at most {apart:.1e} in float32"
    if dtype not in (None, "float32"):
        graph, state = nnx.split(plain)
        rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), state)
        apart = float(np.abs(np.asarray(nnx.merge(graph, rounded)(tokens)) - want).max())
        said += f", by {apart:.1e} once rounded to {dtype}"
    print(f"{said} (the largest of them is {np.abs(want).max():.1f})", file=sys.stderr)
    return plain


def _trained(saves: Any, step: int, like: Any, optim: OptimSection) -> Any:
    """The weights of a checkpoint that are evaluated and exported (see `eval_params`)."""
    if optim.name != "schedule_free_adamw":
        return saves.restore_part(step, {"trainable": like})["trainable"]
    opt_state = jax.eval_shape(make_optimizer(optim, lambda _: 0.0).init, like)
    lay = opt_state_shardings(opt_state, like, jax.tree.map(lambda x: x.sharding, like))
    opt_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), opt_state, lay
    )
    state = saves.restore_part(step, {"trainable": like, "opt_state": opt_state})
    return eval_params(state["opt_state"], state["trainable"])
