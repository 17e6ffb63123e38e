# SPDX-License-Identifier: Apache-2.0
"""`jaxllm export --check`: the written directory in transformers or peft, in vLLM, and in jaxllm.

All sides read the files and compute in float32, whatever the dtype of the weights: bfloat16 values
are float32 values too, so what is left is the order of float32 sums. That is 1e-5 to 1e-4 for
log-probabilities, and one tolerance holds for all dtypes. In bfloat16 arithmetic each side would
differ from the other by several hundredths, which hides a wrong weight.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm import __version__
from jaxllm.card import table
from jaxllm.config import MeshSection, TrainConfig
from jaxllm.data.examples import Examples, tokenize_table
from jaxllm.data.sources import locate, read
from jaxllm.errors import UserError
from jaxllm.files import DTYPES, header, local_dir, tensor_files
from jaxllm.hf import SCORE, load_hf
from jaxllm.mesh import make_mesh
from jaxllm.model.decoder import Decoder
from jaxllm.parity.exported import python_of_vllm, token_values, vllm_values
from jaxllm.paths import as_path, file_size, is_bucket
from jaxllm.peft.files import is_adapter
from jaxllm.rl.rewards import RewardModel

PROMPTS, LENGTH = 32, 128  # tokens of a prompt at most
ROWS = 4  # prompts at a time
WHOLE, MAX_BYTES = ("text", "parquet", "arrow"), 1 << 28  # formats of files that are read whole
TOLERANCE = 1e-3  # of a log-probability or score


@dataclass(frozen=True)
class Check:
    """The figures of a check."""

    where: str
    """the library that jaxllm is compared with"""
    what: str
    """log-probabilities or scores"""
    values: int
    largest: float
    mean: float
    """largest, mean: of the absolute differences"""
    dtype: str
    """of the weights in the files"""
    prompts: str
    """how many, and where they are from"""
    tokens: int
    versions: dict[str, str] = field(default_factory=dict)
    changed: float | None = None
    """the largest difference between the merged model and its base"""

    @property
    def agrees(self) -> bool:
        return self.largest <= TOLERANCE  # false for NaN

    def line(self) -> str:
        """The figures as a line for the terminal."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        line = (
            f"check: {self.values:,} {self.what} of {self.prompts} ({self.tokens:,} tokens) differ "
            f"by at most {self.largest:.1e}, {self.mean:.1e} on average, from those of {versions}; "
            f"{self.dtype} weights, computed in float32"
        )
        if self.changed is None:
            return line
        return f"{line}; merging changed them by up to {self.changed:.1e}"

    def section(self) -> str:
        """The figures as a section of the model card."""
        rows = [
            ("compared", f"{self.values:,} {self.what} of {self.prompts}, {self.tokens:,} tokens"),
            ("largest difference", f"{self.largest:.1e} (tolerance {TOLERANCE:g})"),
            ("mean difference", f"{self.mean:.1e}"),
            ("weights", f"{self.dtype}, computed in float32"),
            ("versions", ", ".join(f"{name} {number}" for name, number in self.versions.items())),
        ]
        if self.changed is not None:
            rows.append(("merged against base", f"differs by up to {self.changed:.1e}"))
        rows.append(("result", "they agree" if self.agrees else "**they differ**"))
        return "\n".join(["", f"## Check in {self.where}", "", *table(("", ""), rows), ""])


def check(out: str, cfg: TrainConfig | None, tokenizer: Any, base: str | None) -> list[Check]:
    """Compares an exported directory in transformers or peft with itself in jaxllm, and in vLLM
    where it is installed and loads the directory.

    cfg: of the run, whose data gives the prompts. base: the model that an adapter was merged into.
    Raises UserError if transformers or peft do not load the directory, and if merging changed
    nothing.
    """
    folder, adapter = as_path(out), is_adapter(out)
    stored = "float32" if adapter else _dtype(folder)
    model = _load(out, stored)
    longest = min(LENGTH, model.cfg.max_positions - model.peft.length)
    prompts, about = prompts_of(cfg, tokenizer, longest, model.cfg.vocab_size)
    scores, wrapped = model.cfg.scores, bool(model.cfg.wrapper)
    if scores:  # transformers finds the end of a text by its padding, which may be its eos
        pad = tokenizer.pad_token_id
        prompts = [prompt[: max(1, _length_without(prompt, pad))] for prompt in prompts]
    ours = values_of(model, prompts)
    changed = None
    score = model.score
    del model
    if base is not None:
        plain = _load(base, stored, scores=scores)
        if scores and SCORE not in tensor_files(local_dir(base)):  # a random head would differ
            plain.score = score
        changed = float(np.abs(ours - values_of(plain, prompts)).max())
        del plain
        if not changed:
            raise UserError(
                f"{out} is written, but the adapter changes nothing: the merged model has the "
                f"{'scores' if scores else 'log-probabilities'} of {base}. Either it was not "
                f"trained, or its changes are lost in {stored}"
            )
    try:
        theirs, versions = token_values(folder, prompts, scores=scores, wrapped=wrapped)
    except UserError as error:
        raise UserError(f"{out} is written, but {error}") from error

    def compared(
        where: str, theirs: list[np.ndarray], versions: dict[str, str], changed: float | None = None
    ) -> Check:
        difference = np.abs(ours - np.concatenate(theirs))
        return Check(
            where=where,
            what="scores" if scores else "log-probabilities",
            values=len(ours),
            largest=float(difference.max()),
            mean=float(difference.mean()),
            dtype=stored,
            prompts=about,
            tokens=sum(map(len, prompts)),
            versions={"jaxllm": __version__} | versions,
            changed=changed,
        )

    found = [compared("peft" if adapter else "transformers", theirs, versions, changed)]
    if not scores and (python := python_of_vllm()):
        print("check: loading it in vLLM", file=sys.stderr)
        try:
            found.append(compared("vLLM", *vllm_values(python, folder, prompts)))
        except UserError as error:
            print(f"check: not compared with vLLM: {error}", file=sys.stderr)
    return found


def _dtype(folder: Path) -> str:
    """The dtype of most weights in a model's files."""
    sizes: dict[str, int] = {}
    for file in {*tensor_files(folder).values()}:
        for tensor in header(file)[1].values():
            first, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - first
    names = {stored: dtype for dtype, stored in DTYPES.items()}
    return names.get(max(sizes, key=lambda name: sizes[name]), "float32")


# ---- prompts


def prompts_of(
    cfg: TrainConfig | None, tokenizer: Any, longest: int, vocabulary: int
) -> tuple[list[np.ndarray], str]:
    """(PROMPTS prompts of at most `longest` tokens, where they are from).

    The first records of the run's evaluation or training data, if it has files on this machine;
    else, and if they are too few, random tokens of the tokenizer, the same each time.
    """
    found: list[np.ndarray] = []
    with suppress(UserError, OSError):  # the data may have changed since
        records = _records(cfg, tokenizer, longest) if cfg else iter(())
        found += islice((tokens for tokens in records if len(tokens) > 1), PROMPTS)
    about = f"{len(found)} prompts of the run's data" if found else ""
    if missing := PROMPTS - len(found):
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        ids = [i for i in range(min(len(tokenizer), vocabulary)) if i not in special]
        found += [*np.random.default_rng(0).choice(ids, (missing, longest)).astype(np.int32)]
        about += f"{' and ' if about else ''}{missing} prompts of random tokens"
    return found, about


def _records(cfg: TrainConfig, tokenizer: Any, longest: int) -> Iterator[np.ndarray]:
    """The tokens of the first records of the sources that are local files, long ones in pieces."""
    # The tokenizer's template has the run's settings.
    settings: dict[str, Any] = {"template": None, "template_kwargs": {}, "system": None}
    settings |= {"user_template": None, "workers": 1, "date": cfg.data.date or "2000-01-01"}
    own = replace(cfg, data=replace(cfg.data, **settings), log=replace(cfg.log, progress=False))
    for source in cfg.data.eval or cfg.data.train:
        if is_bucket(source.path) or not as_path(source.path).exists():
            continue
        located = locate(source)
        located = replace(located, files=located.files[:PROMPTS])
        if located.format in WHOLE and sum(map(file_size, located.files)) > MAX_BYTES:
            continue
        with tempfile.TemporaryDirectory(prefix="jaxllm-check-") as folder:
            raw = read(located, Path(folder), PROMPTS)
            raw = raw.select(range(min(PROMPTS, len(raw))))
            examples = Examples(tokenize_table(source, own, tokenizer, raw, Path(folder)), source)
            for index in range(len(examples)):
                # A pair is its chosen and its rejected text.
                end = examples.first[index] if cfg.verb.data == "pairs" else None
                tokens = np.array(examples.tokens(index)[:end])
                for start in range(0, len(tokens), longest) if cfg.verb.data == "text" else (0,):
                    yield tokens[start : start + longest]


def _length_without(prompt: np.ndarray, pad: int | None) -> int:
    """The length of a prompt without the padding tokens at its end."""
    others = np.flatnonzero(prompt != pad) if pad is not None else np.arange(len(prompt))
    return int(others[-1]) + 1 if len(others) else 0


# ---- our side


def _load(path: str, dtype: str, scores: bool = False) -> Decoder:
    return load_hf(path, dtype, compute_dtype="float32", attention="xla", scores=scores)


def values_of(model: Decoder, prompts: Sequence[np.ndarray]) -> np.ndarray:
    """float32: the log-probabilities of the prompts' tokens but the first, or their scores."""
    with jax.default_matmul_precision("highest"):  # accelerators round float32 products otherwise
        if model.cfg.scores:
            mesh = make_mesh(MeshSection())
            return RewardModel.of(model, None, mesh).score_tokens(prompts)
        width = max(map(len, prompts))
        found = []
        for start in range(0, len(prompts), ROWS):
            some = prompts[start : start + ROWS]
            tokens = np.zeros((ROWS, width), np.int32)
            for row, prompt in zip(tokens, some, strict=False):
                row[: len(prompt)] = prompt
            logps = np.asarray(_logps(model, jnp.asarray(tokens)))
            found += [row[: len(p) - 1] for row, p in zip(logps, some, strict=False)]
    return np.concatenate(found)


@nnx.jit
def _logps(model: Decoder, tokens_BT: jax.Array) -> jax.Array:
    """float32 [B, T - 1]; what follows a prompt in its row does not change them."""
    logps_BTV = jax.nn.log_softmax(model(tokens_BT)[:, :-1].astype(jnp.float32))
    return jnp.take_along_axis(logps_BTV, tokens_BT[:, 1:, None], -1)[..., 0]
