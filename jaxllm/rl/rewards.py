# SPDX-License-Identifier: Apache-2.0
"""Texts and conversations scored by a reward model, or by a function of the user's."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.config import MeshSection
from jaxllm.data.chat import render
from jaxllm.data.template import chat_tokenizer
from jaxllm.errors import UserError
from jaxllm.mesh import data_parallel, make_mesh, put
from jaxllm.peft.files import tokenizer_of
from jaxllm.sampling import bucketed
from jaxllm.tokenizer import check_vocabulary

ROWS = 8  # texts that a device scores at a time


@dataclass(frozen=True)
class RewardModel:
    """A model that scores conversations."""

    graph: Any
    params: Any
    tokenizer: Any
    mesh: Mesh
    most: int  # tokens of a conversation at most

    @staticmethod
    def load(path: str, mesh: Mesh, dtype: str = "float32") -> RewardModel:
        """From a directory or hub id of a reward model or its adapter, laid over `mesh`.

        Raises ValueError for a model that gives no scores.
        """
        from jaxllm.hf import load_hf

        model = load_hf(path, dtype, mesh=mesh)
        if not model.cfg.scores:
            raise UserError(f"{path} is no reward model; it is a model that writes")
        tokenizer = chat_tokenizer(tokenizer_of(path))
        check_vocabulary(tokenizer, model.cfg.vocab_size)
        graph, params = nnx.split(model)
        most = model.cfg.max_positions - model.peft.length
        return RewardModel(graph, params, tokenizer, mesh, most)

    def score(self, conversations: Sequence[list[dict[str, Any]]]) -> np.ndarray:
        """float32 [N]: each conversation's score, rendered as for training, at its last token."""
        rendered = [render(self.tokenizer, c, learn="last") for c in conversations]
        return self.score_tokens([example.tokens for (example,) in rendered])

    def score_tokens(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N] of texts of tokens; a text over the model's positions loses its beginning."""
        texts = [text[-self.most :] for text in texts]
        size = ROWS * data_parallel(self.mesh)
        order = np.argsort([-len(text) for text in texts], kind="stable")
        scores = np.zeros(len(texts), np.float32)
        with jax.set_mesh(self.mesh):
            for start in range(0, len(texts), size):
                some = order[start : start + size]
                width = min(bucketed(len(texts[some[0]])), self.most)
                tokens, segments = np.zeros((2, size, width), np.int32)
                for row, index in enumerate(some):
                    tokens[row, : len(texts[index])] = texts[index]
                    segments[row, : len(texts[index])] = 1
                rows = put(self.mesh, {"tokens": tokens, "segments": segments})
                found = _scores(self.graph, self.params, rows["tokens"], rows["segments"])
                scores[some] = np.asarray(found)[: len(some), 0]
        return scores


@jax.jit(static_argnames="graph")
def _scores(graph: Any, params: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(tokens, segments, segments=1)


def best_of(
    path: str,
    prompts: Sequence[str],
    texts: Sequence[str],
    *,
    system: str | None = None,
    dtype: str = "float32",
) -> list[dict[str, Any]]:
    """[{prompt, text, score}] with the text of each prompt that the reward model in `path` scores
    highest; texts are as many for each prompt, one prompt's after another's."""
    model = RewardModel.load(path, make_mesh(MeshSection()), dtype)
    before = [{"role": "system", "content": system}] if system else []
    count = len(texts) // len(prompts)
    conversations = [
        [*before, {"role": "user", "content": prompts[i // count]}]
        + [{"role": "assistant", "content": text}]
        for i, text in enumerate(texts)
    ]
    scores = model.score(conversations).reshape(len(prompts), count)
    best = [(i, int(row.argmax())) for i, row in enumerate(scores)]
    return [
        {"prompt": prompts[i], "text": texts[i * count + j], "score": float(scores[i, j])}
        for i, j in best
    ]


# ---- rewards of completions


@dataclass(frozen=True)
class Completion:
    """A prompt as its record has it, and what was made of it."""

    prompt: dict[str, Any]  # an element of data.preference.Prompts
    text: str

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return [*self.prompt["messages"], {"role": "assistant", "content": self.text}]

    @property
    def said(self) -> Any:
        """As reward functions see it: text after a prompt that is text, else messages."""
        if isinstance(self.prompt["said"], str):
            return self.text
        return [{"role": "assistant", "content": self.text}]


@dataclass(frozen=True)
class Reward:
    """One reward by its name: completions -> float32 [N], NaN where it gives none."""

    name: str
    score: Callable[[Sequence[Completion]], np.ndarray]


def load_reward(name: str, mesh: Mesh, dtype: str = "float32") -> Reward:
    """A reward model's directory (or hub id), `module:function` or `file.py:function`.

    The function is called with lists: (prompts, completions, **columns of the data) and returns a
    list of numbers, None where it has no opinion. Raises ValueError for what is neither.
    """
    place, colon, function = name.rpartition(":")
    if not colon or Path(name).expanduser().is_dir():
        model = RewardModel.load(name, mesh, dtype)
        return Reward(Path(name).name, lambda made: model.score([c.conversation for c in made]))
    try:
        call = getattr(_module(place), function)
    except Exception as error:  # whatever the user's module does while it is imported
        raise UserError(f"rl.rewards {name}: {type(error).__name__}: {error}") from error
    return Reward(function, lambda made: _called(name, call, made))


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # where the user stands, as `python -m` has it
        return importlib.import_module(place)
    file = Path(place).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {place}")
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _called(name: str, call: Callable[..., Any], made: Sequence[Completion]) -> np.ndarray:
    """What a function of the user's gives; ValueError names it and the row it fails at."""

    taken = ("prompts", "completions")  # a column of that name is not passed on
    names = dict.fromkeys(k for c in made for k in c.prompt["columns"] if k not in taken)

    def run(some: Sequence[Completion]) -> Any:
        columns = {k: [c.prompt["columns"].get(k) for c in some] for k in names}
        return call([c.prompt["said"] for c in some], [c.said for c in some], **columns)

    try:
        found = run(made)
    except Exception as error:  # whatever the user's code raises is the user's to mend
        one = next((c for c in made if _fails(run, c)), made[0])
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"reward {name} failed at {one.prompt['at']}: {what}") from error
    if not isinstance(found, list | tuple | np.ndarray) or len(found) != len(made):
        seen = f"{len(found)} rewards" if hasattr(found, "__len__") else repr(found)
        first = made[0].prompt["at"]
        raise UserError(
            f"reward {name} returned {seen} for {len(made)} completions, from {first} on; it "
            "returns a list with one number (or None) for each"
        )
    for value, one in zip(found, made, strict=True):
        good = value is None or (
            isinstance(value, int | float | np.number | np.bool_) and math.isfinite(value)
        )
        if not good:
            raise UserError(
                f"reward {name} returned {value!r} at {one.prompt['at']}; a reward is a number, or "
                "None for no opinion"
            )
    return np.array([np.nan if v is None else float(v) for v in found], np.float32)


def _fails(run: Callable[..., Any], one: Completion) -> bool:
    """Whether a function that raised on all completions raises on this one alone."""
    try:
        run([one])
    except Exception:  # the caller reports what was raised on all of them
        return True
    return False
