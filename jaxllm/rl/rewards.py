# SPDX-License-Identifier: Apache-2.0
"""Rewards: scores of texts from a reward model or from a function that the user writes."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm import dist
from jaxllm.chat import load_with_tokenizer
from jaxllm.config import DataSection, MeshSection, Source, TrainConfig
from jaxllm.data.batch import make_row
from jaxllm.data.chat import render
from jaxllm.data.dataset import load_data, summarize
from jaxllm.data.loader import eval_batches
from jaxllm.data.rows import Rows
from jaxllm.data.sources import locate, read, records
from jaxllm.errors import MissingFile, UserError
from jaxllm.mesh import data_parallel, make_mesh, put
from jaxllm.model.decoder import Decoder
from jaxllm.monitor.progress import track
from jaxllm.paths import as_path
from jaxllm.sampling import bucketed

ROWS = 8  # texts that each data-parallel device scores at a time


@dataclass(frozen=True)
class RewardModel:
    """A model that scores texts, with its tokenizer."""

    graph: Any
    params: Any
    tokenizer: Any
    mesh: Mesh
    max_length: int
    """tokens of a text at most"""

    @staticmethod
    def of(model: Decoder, tokenizer: Any, mesh: Mesh) -> RewardModel:
        """From a loaded model."""
        graph, params = nnx.split(model)
        max_length = model.cfg.max_positions - model.peft.length
        return RewardModel(graph, params, tokenizer, mesh, max_length)

    @staticmethod
    def load(path: str, mesh: Mesh, dtype: str = "float32") -> RewardModel:
        """From a directory or hub id of a reward model or of its adapter, sharded over `mesh`.

        Raises UserError for a model without a score head.
        """
        model, tokenizer = load_with_tokenizer(path, dtype=dtype, mesh=mesh)
        if not model.cfg.scores:
            raise UserError(f"{path} is not a reward model: it is a language model")
        return RewardModel.of(model, tokenizer, mesh)

    def score(self, conversations: Sequence[list[dict[str, Any]]]) -> np.ndarray:
        """float32 [N]: the scores of conversations, rendered as in training."""
        rendered = [render(self.tokenizer, c, learn="last") for c in conversations]
        return self.score_tokens([example.tokens for (example,) in rendered])

    def score_tokens(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N]: the score of each text. A text over max_length loses its beginning."""
        texts = [text[-self.max_length :] for text in texts]
        size = ROWS * data_parallel(self.mesh)
        order = np.argsort([-len(text) for text in texts], kind="stable")
        scores = np.zeros(len(texts), np.float32)
        for start in range(0, len(texts), size):
            indices = order[start : start + size]
            width = min(bucketed(len(texts[indices[0]])), self.max_length)
            rows = [make_row([(texts[i], np.zeros(len(texts[i])))], width) for i in indices]
            batch = next(eval_batches(Rows((rows,), None, width), size))
            scores[indices] = self.score_rows(batch, 1)[: len(indices), 0]
        return scores

    def score_rows(self, rows: Mapping[str, np.ndarray], segments: int) -> np.ndarray:
        """float32 [B, segments]: the scores of segments 1, 2, … of each row; 0 for missing ones.

        rows: fields of `Batch`, int32 [B, T].
        """
        fields = put(self.mesh, {k: rows[k] for k in ("tokens", "segment_ids", "positions")})
        with jax.set_mesh(self.mesh):
            return dist.gather(_scores(self.graph, self.params, segments=segments, **fields))


@jax.jit(static_argnames=("graph", "segments"))
def _scores(graph: Any, params: Any, *, segments: int, **fields: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(**fields, segments=segments)


def best_of(
    path: str,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    system: str | None = None,
    dtype: str = "float32",
) -> list[dict[str, Any]]:
    """[{prompt, text, score}]: for each prompt the text with the highest score.

    path: a reward model; texts: the same number for each prompt, grouped by prompt.
    """
    model = RewardModel.load(path, make_mesh(MeshSection()), dtype)
    system_turn = [{"role": "system", "content": system}] if system else []
    count = len(texts) // len(prompts)
    asked = [prompt for prompt in prompts for _ in range(count)]
    conversations = [
        [*system_turn, {"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in zip(asked, texts, strict=True)
    ]
    scores = model.score(conversations).reshape(len(prompts), count)
    best = np.arange(len(prompts)) * count + scores.argmax(1)
    return [{"prompt": asked[i], "text": texts[i], "score": float(scores.flat[i])} for i in best]


def evaluate_rewards(
    reward_model: RewardModel, sources: Sequence[Source], *, max_length: int, batch_size: int
) -> dict[str, float]:
    """Evaluates a reward model on pairs or on conversations, whichever the first source has.

    Returns {examples, tokens} and the distribution of the scores, reward_*; for pairs also {loss,
    accuracy, margin}, chosen_* and rejected_*. A tie counts as wrong.
    """
    paired = _has_pairs(sources[0])
    cfg = TrainConfig(
        objective="reward" if paired else "sft",
        data=DataSection(eval=tuple(sources), max_length=max_length, train_on_prompt=not paired),
    )
    data = load_data(cfg, reward_model.tokenizer)
    print(*summarize(data.manifest), sep="\n", file=sys.stderr)
    parts = data_parallel(reward_model.mesh)
    size = -(-batch_size // parts) * parts
    scored: list[np.ndarray] = []  # [1 or 2 answers, examples] of each batch
    tokens, count = 0, 1
    for rows in data.evals.values():
        for batch in track(eval_batches(rows, size), "scoring", -(-len(rows) // size)):
            texts = batch["segment_ids"].max(1, keepdims=True)  # in each row
            while count < texts.max():
                count *= 2  # each count compiles a program
            scores = reward_model.score_rows(batch, count)
            if paired:
                pairs = batch["chosen_segment"], batch["rejected_segment"]
                picked = [np.take_along_axis(scores, x - 1, 1)[pairs[0] > 0] for x in pairs]
            else:
                picked = [scores[np.arange(count) < texts]]
            scored.append(np.stack(picked))
            tokens += int((batch["segment_ids"] > 0).sum())
    table = np.concatenate(scored, 1).astype(np.float64)
    out: dict[str, float] = {"examples": table.shape[1], "tokens": tokens}
    if paired:
        margin = table[0] - table[1]
        out["loss"] = float(np.logaddexp(0, -margin).mean())
        out |= {"accuracy": float((margin > 0).mean()), "margin": float(margin.mean())}
        out |= _distribution(table[0], "chosen") | _distribution(table[1], "rejected")
    return out | _distribution(table.ravel(), "reward")


def _has_pairs(source: Source) -> bool:
    """True if the first record of a source is a pair of answers."""
    with TemporaryDirectory() as folder:
        table = read(locate(source, held_out=True), Path(folder))
        if not len(table):
            raise UserError(f"{source.path}: has no examples")
        _, record = next(records(table[:1], [0], source.path))
    columns = {name for name, value in record.items() if value is not None}
    return bool({"chosen", "rejected"} & (columns | source.columns.keys()))


def _distribution(scores: np.ndarray, name: str) -> dict[str, float]:
    """{NAME_mean, _std, _min, _q1, _median, _q3, _max} of some scores."""
    quantiles = np.quantile(scores, (0, 0.25, 0.5, 0.75, 1))
    values = (scores.mean(), scores.std(), *quantiles)
    names = ("mean", "std", "min", "q1", "median", "q3", "max")
    return {f"{name}_{k}": float(v) for k, v in zip(names, values, strict=True)}


@dataclass(frozen=True)
class Completion:
    """A prompt and the text that the policy wrote for it."""

    prompt: dict[str, Any]  # an element of data.preference.Prompts
    text: str

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return [*self.prompt["messages"], {"role": "assistant", "content": self.text}]

    @property
    def content(self) -> Any:
        """The completion for a reward function: text if the prompt is text, else messages."""
        if isinstance(self.prompt["said"], str):
            return self.text
        return [{"role": "assistant", "content": self.text}]


@dataclass(frozen=True)
class Reward:
    """A named reward: completions -> float32 [N], NaN for a completion that it does not score."""

    name: str
    score: Callable[[Sequence[Completion]], np.ndarray]


def load_reward(name: str, mesh: Mesh, dtype: str = "float32") -> Reward:
    """A reward model's directory (or hub id), `module:function` or `file.py:function`.

    The function gets lists (prompts, completions, **columns of the data) and returns a list of
    numbers, with None for a completion that it does not score. Raises UserError for a name that is
    neither.
    """
    module, colon, function = name.rpartition(":")
    if not colon or as_path(name).is_dir():
        model = RewardModel.load(name, mesh, dtype)
        return Reward(Path(name).name, lambda batch: model.score([c.conversation for c in batch]))
    try:
        call = getattr(_import(module), function)
    except Exception as error:  # the user's module may raise anything on import
        raise UserError(f"rl.rewards {name}: {type(error).__name__}: {error}") from error
    return Reward(function, lambda batch: _shared(name, call, batch))


def _shared(name: str, function: Callable[..., Any], batch: Sequence[Completion]) -> np.ndarray:
    """The rewards of a function; each process calls it for all completions of some prompts."""
    prompts = [list(group) for _, group in groupby(batch, lambda one: id(one.prompt))]
    start, stop = (len(prompts) * (dist.index() + i) // dist.count() for i in (0, 1))
    part = list(chain(*prompts[start:stop]))
    parts = dist.everyone(_call(name, function, part).tolist() if part else [])
    return np.array([reward for part in parts for reward in part], np.float32)


def _import(name: str) -> Any:
    """Imports a module by its dotted name or from a .py file."""
    if not name.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        return importlib.import_module(name)
    file = Path(name).expanduser()
    if not file.is_file():
        raise MissingFile(f"there is no file {name}")
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(name: str, function: Callable[..., Any], completions: Sequence[Completion]) -> np.ndarray:
    """Calls a reward function and checks what it returns; UserError names the failing record."""
    reserved = ("prompts", "completions")  # arguments, so columns of these names are not passed
    names = dict.fromkeys(k for c in completions for k in c.prompt["columns"] if k not in reserved)

    def run(batch: Sequence[Completion]) -> Any:
        columns = {k: [c.prompt["columns"].get(k) for c in batch] for k in names}
        return function([c.prompt["said"] for c in batch], [c.content for c in batch], **columns)

    try:
        rewards = run(completions)
    except Exception as error:  # the user's function may raise anything
        culprit = next((c for c in completions if _raises(run, c)), completions[0])
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"reward {name} failed at {culprit.prompt['at']}: {what}") from error
    if not isinstance(rewards, list | tuple | np.ndarray) or len(rewards) != len(completions):
        seen = f"{len(rewards)} rewards" if hasattr(rewards, "__len__") else repr(rewards)
        first = completions[0].prompt["at"]
        raise UserError(
            f"reward {name} returned {seen} for {len(completions)} completions, starting at "
            f"{first}; return a list with one number (or None) for each"
        )
    for reward, completion in zip(rewards, completions, strict=True):
        numeric = isinstance(reward, int | float | np.number | np.bool_)
        if not (reward is None or (numeric and math.isfinite(reward))):
            raise UserError(
                f"reward {name} returned {reward!r} at {completion.prompt['at']}; a reward is a "
                "finite number, or None for no score"
            )
    return np.array([np.nan if r is None else float(r) for r in rewards], np.float32)


def _raises(run: Callable[..., Any], completion: Completion) -> bool:
    """True if a function that raised on the batch raises on this completion alone."""
    try:
        run([completion])
    except Exception:  # the caller reports the error of the batch
        return True
    return False
