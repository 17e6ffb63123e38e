# SPDX-License-Identifier: Apache-2.0
"""Rewards: scores of texts from a reward model or from a function that the user writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from multiprocessing.connection import Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
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
from jaxllm.data.template import with_settings
from jaxllm.errors import MissingFile, UserError
from jaxllm.files import local_dir
from jaxllm.finite import check_finite
from jaxllm.mesh import data_parallel, make_mesh, put
from jaxllm.model.decoder import Decoder
from jaxllm.monitor.progress import track
from jaxllm.paths import absolute, as_path
from jaxllm.peft.files import is_adapter, with_base
from jaxllm.rl import worker
from jaxllm.sampling import bucketed

ROWS = 8  # texts that each data-parallel device scores at a time


class RewardError(UserError):
    """A reward that fails in a rollout, in every process alike."""


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
    def load(path: str, mesh: Mesh, dtype: str = "float32", **options: Any) -> RewardModel:
        """From a directory or hub id of a reward model or of its adapter, sharded over `mesh`.

        options: of `load_hf`. Raises UserError for a model without a score head, and for weights
        that are not finite.
        """
        model, tokenizer = load_with_tokenizer(path, dtype=dtype, mesh=mesh, **options)
        if not model.cfg.scores:
            raise UserError(f"{path} is not a reward model: it is a language model")
        weights = nnx.to_pure_dict(nnx.state(model))
        check_finite(weights, model.cfg, f"reward model {path}", "train it again, or use another")
        return RewardModel.of(model, tokenizer, mesh)

    def score(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        tools: Sequence[list[Any] | None] = (),
        date: str | None = None,
    ) -> np.ndarray:
        """float32 [N]: the scores of conversations, rendered as in training.

        tools: of each conversation; date: as in `render`.
        """
        given = zip(conversations, tools or [None] * len(conversations), strict=True)
        rendered = [
            render(self.tokenizer, c, tools=functions, learn="last", date=date)
            for c, functions in given
        ]
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
    if not np.isfinite(scores).all():
        raise UserError(f"reward model {path} gives scores that are not finite; use another")
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
    dist.say(*summarize(data.manifest))
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
    about: str = ""
    """a line that the run prints at the start"""


class Worker:
    """The process that runs the reward functions of a module (worker.py), until this is deleted.

    A function may print, change the working directory, start processes, or end its own: the run is
    not affected. Raises UserError if the module cannot be imported.
    """

    def __init__(self, module: str):
        self.module = module
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the run has the accelerators
            process_group=0,  # Ctrl-C in a terminal is for the run
        )
        theirs.close()
        weakref.finalize(self, _end, self.connection, self.process)
        answer = self.ask({"path": sys.path, "module": module}, "while it was imported")
        if "error" in answer:
            raise UserError(f"rl.rewards {module}: {answer['error']}")

    def ask(self, message: dict[str, Any], when: str = "") -> dict[str, Any]:
        """The answer to a message; {"error"}, with `when`, if the process ends instead."""
        try:
            self.connection.send_bytes(json.dumps(message).encode())
            while not self.connection.poll(1.0):
                if self.process.poll() is not None and not self.connection.poll():
                    raise EOFError  # another process still has its end of the connection
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        code = self.process.returncode
        if code is None:
            return {"error": f"closed its connection to the run {when}"}
        if code < 0:
            return {"error": f"lost its process {when}: {signal.Signals(-code).name} killed it"}
        return {"error": f"ended its process {when}, with status {code}; it must return instead"}


def _end(connection: Any, process: subprocess.Popen) -> None:
    """Ends the process of a Worker, and those that it started."""
    connection.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(2)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def load_rewards(cfg: TrainConfig, mesh: Mesh, frozen: Any) -> list[Reward]:
    """The rewards of rl.rewards: a reward model's directory (or hub id), `module:function` or
    `file.py:function`.

    A function gets lists (prompts, completions, **columns of the data) and returns a list of
    numbers, with None for a completion that it does not score. Those of one module share a process.
    A reward adapter over the policy's base model uses the arrays in `frozen`, the policy's frozen
    weights. Raises UserError for a name that is neither, and for a reward model whose weights are
    not finite.
    """
    workers: dict[str, Worker] = {}
    rewards = []
    for name in cfg.rl.rewards:
        if ":" in name and not as_path(name).is_dir():
            rewards.append(_load_function(name, workers))
        else:
            rewards.append(_load_model(name, cfg, mesh, frozen))
    return rewards


def _load_model(name: str, cfg: TrainConfig, mesh: Mesh, frozen: Any) -> Reward:
    options: dict[str, Any] = {"dtype": cfg.model.compute_dtype}
    if frozen and cfg.peft.quantize_base == "none" and is_adapter(name):
        base, path = with_base(name, None)[0], cfg.model.path
        if path and absolute(local_dir(base)) == absolute(local_dir(path)):
            options |= {"dtype": cfg.model.weight_dtype, "compute_dtype": options["dtype"]}
            options["shared"] = flatten_dict(frozen)
    model = RewardModel.load(name, mesh, **options)
    settings = DataSection(template_kwargs=cfg.data.template_kwargs)  # of the prompts
    model = replace(model, tokenizer=with_settings(model.tokenizer, settings))
    score = partial(_model_scores, name, model, cfg.data.date)
    weights = jax.tree.leaves(model.params)
    own = {id(x): x.nbytes for x in weights}
    shared = sum(own.pop(id(x), 0) for x in jax.tree.leaves(frozen))
    about = f"reward model {name}: {sum(own.values()) / 2**20:,.1f} MiB of weights"
    about += f", and {shared / 2**20:,.1f} MiB shared with the policy" if shared else ""
    return Reward(Path(name).name, score, about)


def _load_function(name: str, workers: dict[str, Worker]) -> Reward:
    module, _, function = name.rpartition(":")
    if module.endswith(".py") and not Path(module).expanduser().is_file():
        raise MissingFile(f"rl.rewards {name}: there is no file {module}")
    if module not in workers:
        workers[module] = Worker(module)
    answer = workers[module].ask({"function": function}, "before it was called")
    if "error" in answer:
        raise UserError(f"rl.rewards {name}: {answer['error']}")
    return Reward(function, partial(_function_scores, name, workers[module], function))


def _model_scores(
    name: str, model: RewardModel, date: str | None, batch: Sequence[Completion]
) -> np.ndarray:
    tools = [completion.prompt["tools"] for completion in batch]
    try:
        scores = model.score([c.conversation for c in batch], tools, date)
    except UserError as error:  # its template refuses a conversation
        raise RewardError(f"reward {name} cannot render a prompt: {error}") from error
    if not np.isfinite(scores).all():
        index = int(np.isfinite(scores).argmin())
        raise RewardError(
            f"reward {name} is {scores[index]} at {batch[index].prompt['at']}; the model's weights "
            "or activations are not finite"
        )
    return scores


def _function_scores(
    name: str, worker: Worker, function: str, batch: Sequence[Completion]
) -> np.ndarray:
    """The rewards of a function; each process calls it for all completions of some prompts."""
    prompts = [list(group) for _, group in groupby(batch, lambda one: id(one.prompt))]
    start, stop = (len(prompts) * (dist.index() + i) // dist.count() for i in (0, 1))
    part = list(chain(*prompts[start:stop]))
    answer: dict[str, Any] = {"rewards": []}
    if part:
        when = f"when called for {len(part)} completions, starting at {part[0].prompt['at']}"
        answer = worker.ask(_request(function, part), when)
    answers = dist.everyone(answer)
    for each in answers:
        if "error" in each:
            raise RewardError(f"reward {name} {each['error']}")
    rewards = [reward for each in answers for reward in each["rewards"]]
    return np.array([np.nan if reward is None else reward for reward in rewards], np.float32)


def _request(function: str, completions: Sequence[Completion]) -> dict[str, Any]:
    """The message by which a worker calls a function."""
    reserved = ("prompts", "completions")  # arguments, so columns of these names are not passed
    names = dict.fromkeys(k for c in completions for k in c.prompt["columns"] if k not in reserved)
    return {
        "function": function,
        "prompts": [c.prompt["said"] for c in completions],
        "completions": [c.content for c in completions],
        "columns": {k: [c.prompt["columns"].get(k) for c in completions] for k in names},
        "places": [c.prompt["at"] for c in completions],
    }
