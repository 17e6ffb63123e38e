# SPDX-License-Identifier: Apache-2.0
"""The model card of an export: README.md, with the metadata that the hub reads.

The same checkpoint gives the same text, whichever command or machine writes it. Local paths are
shortened to names, and what may be a secret in a URL is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from huggingface_hub import ModelCardData, try_to_load_from_cache

from jaxllm.config import TrainConfig, to_dict
from jaxllm.config.loading import parse
from jaxllm.config.source import MEMORY
from jaxllm.errors import UserError
from jaxllm.files import CARD
from jaxllm.identity import fixed
from jaxllm.model.decoder import Decoder
from jaxllm.paths import as_path, hub_id, is_bucket
from jaxllm.report.columns import number, parsed
from jaxllm.report.reading import lines_in, object_in
from jaxllm.run import versions
from jaxllm.untrusted import read_text

# Keys whose values are in other sections of the card, or are paths.
ELSEWHERE = {"objective", "peft.method", "data.train", "data.eval"}
ELSEWHERE |= {"model.path", "model.config", "model.tokenizer", "peft.path"}
NO_METRICS = ("step", "time", "epoch", "tokens_seen")  # of a line of metrics.jsonl
LICENSE = ("license", "license_name", "license_link")
ALWAYS = {"batch_size", "data.max_length", "optim.name", "optim.learning_rate", "seed"}
ALWAYS_LORA = {"peft.r", "peft.lora_alpha", "peft.target_modules"}
MAX_METADATA = 1 << 16  # characters of a base model's metadata
_TOKEN = re.compile(r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|AKIA)[\w-]{8,}")


@dataclass(frozen=True)
class Origin:
    """The run and the checkpoint that a model comes from."""

    cfg: TrainConfig
    step: int
    folder: Path
    """has data.json and metrics.jsonl"""


def model_card(
    model: Decoder, origin: Origin | None, dtype: str | None, merged: str | None = None
) -> str:
    """The text of a model or adapter to be saved; `--check` adds a section.

    dtype: of the weights in the files; None: their own. merged: the method of a merged adapter.
    """
    adapter, base = model.peft.method if model.peft.frozen else None, model.base
    cfg = origin.cfg if origin else None
    method = adapter or merged
    how = " with ".join(filter(None, (cfg.objective if cfg else "", method)))
    title = (shown(base) if base else model.cfg.family) + (f": {how}" if how else "")
    trained = nnx.state(model, model.peft.trains) if adapter else nnx.state(model)
    count = sum(x.size for x in jax.tree.leaves(trained))
    of = f"`{model.cfg.family}`, " if not adapter else ""
    dtype = "float32" if adapter else dtype or str(model.embed.embedding.get_value().dtype)
    facts = [("base model", code(shown(base)) if base else "none: trained from random weights")]
    if cfg:
        facts.append(("objective", f"{cfg.objective}: {cfg.verb.about}"))
    if method:
        facts.append(("method", f"{method}{', merged into the base model' if merged else ''}"))
    facts.append(("adapter" if adapter else "model", f"{of}{count:,} parameters in {dtype}"))
    if origin:
        facts.append(("checkpoint", f"step {origin.step:,}"))
    lines = [f"# {title}", "", *table(("", ""), facts)]
    if origin:
        lines += [*_settings(origin.cfg), *_data(origin.folder), *_evaluation(origin)]
    lines += ["", "## Versions", "", ", ".join(f"{k} {v}" for k, v in versions().items())]
    return f"---\n{_metadata(model, cfg, method)}\n---\n\n" + "\n".join(lines) + "\n"


def _metadata(model: Decoder, cfg: TrainConfig | None, method: str | None) -> str:
    """The YAML at the top. The hub accepts a base model and datasets of its own only."""
    adapter, base = model.peft.frozen, model.base
    tags = ["jaxllm", *([cfg.objective] if cfg else ()), *([method] if method else ())]
    kind = "text-classification" if model.cfg.scores else "text-generation"
    kind = "image-text-to-text" if model.cfg.wrapper else kind
    sources = cfg.data.train if cfg else ()
    hub: dict[str, Any] = {"base_model": base} if hub_id(base) else {}
    if hub and cfg:
        hub["base_model_relation"] = "adapter" if adapter else "finetune"
    if datasets := [s.path for s in sources if hub_id(s.path) and not as_path(s.path).exists()]:
        hub["datasets"] = datasets
    library = "peft" if adapter else "transformers"
    more = hub | license_of(base)
    return ModelCardData(library_name=library, pipeline_tag=kind, tags=tags, **more).to_yaml()


def license_of(base: str) -> dict[str, Any]:
    """What the card of the base model, if it is on this machine, says of its license."""
    if not base or is_bucket(base):
        return {}
    file = as_path(base) / CARD
    if not file.is_file():
        cached = try_to_load_from_cache(base, CARD) if hub_id(base) else None
        if not isinstance(cached, str):
            return {}
        file = Path(cached)
    with suppress(UserError, OSError):
        top = re.match(r"---\n(.*?)\n---\n", read_text(file), re.DOTALL)
        values = parse(top[1]) if top and len(top[1]) <= MAX_METADATA else None
        values = values if isinstance(values, dict) else {}
        return {key: values[key] for key in LICENSE if isinstance(values.get(key), str)}
    return {}


# ---- sections


def _settings(cfg: TrainConfig) -> list[str]:
    """The main ones, and others without their default, of those that a resumed run must share."""
    given, default = (fixed(to_dict(c)) for c in (cfg, TrainConfig(objective=cfg.objective)))
    main = ALWAYS | (ALWAYS_LORA if cfg.peft.method == "lora" else set())
    lines = [
        f"{key}: {json.dumps(_clean(value), ensure_ascii=False)}"
        for key, value in given.items()
        if key in main or (key not in ELSEWHERE and value != default.get(key))
    ]
    return ["", "## Settings", "", "```yaml", *lines, "```"]


def _clean(value: Any) -> Any:
    """A value of a config, with its strings as `shown`."""
    if isinstance(value, dict):
        return {str(key): _clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return shown(value) if isinstance(value, str) else value


def _data(folder: Path) -> list[str]:
    """The sources in a run's manifest."""
    found = object_in(folder / "data.json")
    sets = {"train": found.get("train"), **(found.get("eval") or {})}
    rows = []
    for name, entry in sets.items():
        for source in (entry or {}).get("sources", ()):
            counts = (number(source.get(key)) for key in ("examples", "tokens", "learned_tokens"))
            counts = ["streamed" if n is None else f"{n:,.0f}" for n in counts]
            rows.append((code(name), code(shown(str(source.get("path")))), *counts))
    head = ("set", "source", "examples", "tokens", "learned tokens")
    return ["", "## Data", "", *table(head, rows)] if rows else []


def _evaluation(origin: Origin) -> list[str]:
    """The metrics of the run's evaluation at the checkpoint."""
    found: dict[str, dict[str, Any]] = {}
    for line in parsed(lines_in(origin.folder / "metrics.jsonl")):
        if line.get("kind") == "eval" and line.get("step") == origin.step:
            found[str(line.get("name"))] = line
    rows = [
        (code(name), key, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        for name, line in found.items()
        for key, value in line.items()
        if key not in NO_METRICS and number(value) is not None
    ]
    return ["", "## Evaluation", "", *table(("set", "metric", "value"), rows)] if rows else []


# ---- text


def shown(text: str) -> str:
    """A path, or another string of a config, for everybody: a local path or one in a bucket is
    shortened to its name, and a URL has no user, password or query."""
    if text.startswith(MEMORY):
        return "data in memory"
    text = _TOKEN.sub("…", re.sub(r"(\w://)[^/\s]*@", r"\1", text))
    text = re.sub(r"(\w://[^\s?#]*)[?#]\S*", r"\1", text)
    if is_bucket(text) or (text.startswith(("/", "~/")) and text.count("/") > 1):
        parts = text.rstrip("/").split("/")
        return "/".join(parts[-2:] if parts[-1] == "final" else parts[-1:])
    return text


def code(text: str) -> str:
    """Text in a cell of a table."""
    return "`" + re.sub(r"\s+", " ", text.replace("`", "'")).replace("|", "\\|") + "`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
