# SPDX-License-Identifier: Apache-2.0
"""Online learning: prompts -> completions on the mesh -> rewards -> batches for the one step.

A rollout is a function of (seed, its number, the weights): what an interrupted run has made and not
learned from is made again. Dims: R completions of a rollout, B of an update, T tokens of a row, N
tokens of a completion at most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm.config import TrainConfig
from jaxllm.data.batch import Batch, Experience, make_row
from jaxllm.data.loader import Rows, ordered
from jaxllm.errors import UserError
from jaxllm.mesh import put
from jaxllm.objectives.grpo import group_advantages, kl_terms
from jaxllm.objectives.ppo import (
    KlController,
    act,
    gae,
    token_rewards,
    whiten,
)
from jaxllm.objectives.table import loss_chunk
from jaxllm.rl.rewards import Completion, Reward
from jaxllm.sampling import Completions, Sampling, bucketed, completions
from jaxllm.step import Models
from jaxllm.tokenizer import stop_ids

Sums = dict[str, tuple[float, float]]  # metrics, each (Σ, weight)
SHOWN = 4  # completions of a rollout that samples.jsonl gets


def online_steps(cfg: TrainConfig, prompts: int) -> int:
    """Updates of a run over so many prompts: whole rollouts, in which each is asked every epoch."""
    rl, each = cfg.rl, updates_per_rollout(cfg)
    if cfg.steps:
        return -(-cfg.steps // each) * each
    made = Fraction(str(cfg.epochs)) * prompts * (rl.group_size or 1)
    return math.ceil(made / (cfg.batch_size * rl.minibatches)) * each


def updates_per_rollout(cfg: TrainConfig) -> int:
    """Updates between two rollouts: a run stops, saves and goes on there alone."""
    return cfg.rl.minibatches * (cfg.rl.iterations or 1)


class Rollouts:
    """The batches of an online run, made from the weights as they are: `rollouts(step, trainable)`.

    rows: prompts; count: micro-batches of an update.
    """

    def __init__(self, cfg: TrainConfig, mesh: Mesh, rows: Rows, count: int, start: int):
        rl = cfg.rl
        assert rl.group_size and cfg.align.beta is not None  # resolve
        self.cfg, self.mesh, self.count = cfg, mesh, count
        self.group, self.size = rl.group_size, cfg.batch_size * rl.minibatches
        self.prompts = ordered(rows, cfg.seed).batch(self.size // self.group, batch_fn=list)
        self.controller = KlController(cfg.align.beta, rl.kl_target)
        self.longest = max(part.longest for part in rows.parts)  # one program for all rollouts
        self.made: dict[str, np.ndarray] = {}

    def begin(
        self,
        models: Models,
        frozen: Any,
        rewards: Sequence[Reward],
        tokenizer: Any,
        sample: Callable[..., None],
    ) -> None:
        """What completions are made and judged with; models and frozen as in `make_step`, `sample`
        writes a line of samples.jsonl."""
        self.models, self.frozen = models, frozen
        short = [r.name for r in rewards]
        names = short if len(set(short)) == len(short) else self.cfg.rl.rewards
        self.rewards = dict(zip(names, rewards, strict=True))
        self.tokenizer, self.sample = tokenizer, sample
        rl = self.cfg.rl
        self.sampling = Sampling(
            rl.max_new_tokens, rl.temperature, rl.top_k, rl.top_p, rl.min_p, stop_ids(tokenizer)
        )
        look = partial(act, temperature=rl.temperature, chunk=loss_chunk(self.cfg))

        def judge(trainable: Any, frozen: Any, rows: Experience) -> Any:
            """What policy, critic and reference think of rows [A, B, T]."""

            def one(rows: Experience) -> Any:
                policy, reference = self.models(trainable, frozen)
                logp, entropy, values = look(policy, rows)
                found = {"logps": logp, "entropy": entropy, "values": values}
                if reference is not None:
                    found["reference"] = look(reference, rows)[0]
                return found

            return jax.lax.map(one, rows)

        self._judge = jax.jit(judge)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps beside the weights."""
        return {"beta": self.controller.beta}

    def restore(self, state: dict[str, float]) -> None:
        """Goes on from the `state` of a checkpoint; {}: from the beginning."""
        self.controller.beta = state.get("beta", self.controller.beta)

    def __call__(self, step: int, trainable: Any) -> tuple[Batch, Sums]:
        """(batch [A, B, T] of update `step`, from 0; what is logged of a rollout made for it)."""
        cfg = self.cfg
        number, inner = divmod(step, updates_per_rollout(cfg))
        seen: Sums = {}
        if inner == 0:
            self.made, seen = self._roll(number, trainable)
        turn, part = divmod(inner, cfg.rl.minibatches)
        order = np.random.default_rng((cfg.seed, number, turn)).permutation(self.size)
        rows = order[part * cfg.batch_size : (part + 1) * cfg.batch_size]
        split = {k: v[rows].reshape(self.count, -1, v.shape[1]) for k, v in self.made.items()}
        return Experience(**put(self.mesh, split)), seen

    def _roll(self, number: int, trainable: Any) -> tuple[dict[str, np.ndarray], Sums]:
        """Rollout `number`: (fields of Experience [R, T], what is logged of it)."""
        began, rl = time.perf_counter(), self.cfg.rl
        prompts: Any = self.prompts[number]
        asked = [prompt for prompt in prompts for _ in range(self.group)]
        policy = self.models(trainable, self.frozen)[0]
        graph, params = nnx.split(policy)
        key = jax.random.fold_in(jax.random.key(self.cfg.seed), number)
        tokens = [prompt["tokens"].tolist() for prompt in asked]
        made = completions(
            graph, params, tokens, self.sampling, mesh=self.mesh, key=key, longest=self.longest
        )
        ends = set(self.sampling.stop_ids)
        texts = [
            self.tokenizer.decode([t for t in row[:n] if t not in ends])
            for row, n in zip(made.tokens.tolist(), made.lengths.tolist(), strict=True)
        ]
        sampled = time.perf_counter()
        each = [Completion(p, text) for p, text in zip(asked, texts, strict=True)]
        scores = {name: r.score(each) for name, r in self.rewards.items()}
        total = self._total(scores) - rl.missing_eos_penalty * made.truncated
        if self.cfg.verb.critic and np.isnan(total).any():
            at = asked[int(np.isnan(total).argmax())]["at"]
            raise UserError(f"rl.rewards gave no reward at all at {at}; ppo needs one each")
        rows = self._rows(tokens, made)
        judged = self._judged(trainable, rows)
        learned, seen = self._learn(rows, judged, total, made)
        seen |= self._seen(scores, total, made, rows, judged)
        seen["rollout_seconds"] = (time.perf_counter() - began, 1.0)
        seen["sampling_seconds"] = (sampled - began, 1.0)
        step = number * updates_per_rollout(self.cfg) + 1  # the first update that learns from it
        for i in range(min(SHOWN, len(each))):
            named = {name: _known(values[i]) for name, values in scores.items()}
            self.sample(
                step,
                prompt=asked[i]["said"],
                text=texts[i],
                reward=_known(total[i]),
                rewards=named,
                truncated=bool(made.truncated[i]),
            )
        return learned, seen

    def _total(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """The weighted sum of the rewards that there are, float64 [R]; NaN where there is none."""
        weights = self.cfg.rl.reward_weights or (1.0,) * len(scores)
        table = np.stack([w * s for w, s in zip(weights, scores.values(), strict=True)])
        return np.where(np.isnan(table).all(0), np.nan, np.nansum(table.astype(np.float64), 0))

    def _rows(self, prompts: list[list[int]], made: Completions) -> dict[str, np.ndarray]:
        """Each prompt with its completion in a row of its own, [R, T]; T is bucketed."""
        width = bucketed(self.longest + made.tokens.shape[1])
        rows = []
        for prompt, tokens, n in zip(prompts, made.tokens, made.lengths, strict=True):
            text = np.concatenate([np.asarray(prompt, np.int32), tokens[:n]])
            learn = np.arange(len(text)) >= len(prompt)
            rows.append(make_row([(text, learn.astype(np.float32))], width))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _judged(self, trainable: Any, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What `judge` finds, float32 [R, T], on rows of as many micro-batches as an update's."""
        size = self.cfg.batch_size // self.count
        split = {k: v.reshape(-1, size, v.shape[1]) for k, v in rows.items()}
        found = jax.device_get(
            self._judge(trainable, self.frozen, Experience(**put(self.mesh, split)))
        )
        here = rows["weights"] > 0
        return {k: np.where(here, v.reshape(here.shape), 0.0) for k, v in found.items()}

    def _learn(
        self,
        rows: dict[str, np.ndarray],
        judged: dict[str, np.ndarray],
        total: np.ndarray,
        made: Completions,
    ) -> tuple[dict[str, np.ndarray], Sums]:
        """The fields of Experience that rewards make of rows, and what is logged of them."""
        rl, weights = self.cfg.rl, rows["weights"]
        out = rows | {"old_logps": judged["logps"]}
        if not self.cfg.verb.critic:
            left = np.isnan(total) | (made.truncated if rl.mask_truncated else False)
            advantages = group_advantages(total, self.group, scale=rl.scale_rewards)
            kept = np.logical_not(left)[:, None]
            out |= {"weights": weights * kept, "old_logps": judged["logps"] * kept}
            out |= {"reference_logps": judged["reference"]} if "reference" in judged else {}
            out["advantages"] = advantages[:, None] * weights
            groups = total.reshape(-1, self.group)
            known = [g[~np.isnan(g)] for g in groups]
            flat = sum(len(g) < 2 or np.ptp(g) == 0 for g in known)
            return out, {"zero_variance_groups": (float(flat), float(len(groups)))}
        assert not np.isnan(total).any()
        kl = kl_terms(judged["logps"], judged["reference"], rl.kl or "k1")
        rewards = token_rewards(np.asarray(kl), total, weights, self.controller.beta)
        values = judged["values"]
        advantages, returns = gae(rewards, values, weights, rl.discount, rl.gae_lambda)
        out |= {"advantages": whiten(advantages, weights), "returns": returns}
        out["old_values"] = values
        here = weights > 0
        spread = float(np.var(returns[here]))
        explained = 1 - float(np.var((returns - values)[here])) / spread if spread else 0.0
        seen = {
            "explained_variance": (explained, 1.0),
            "value_mean": (float(values[here].sum()), float(here.sum())),
            "beta": (self.controller.beta, 1.0),
        }
        gap = (judged["logps"] - judged["reference"]).sum(1)
        self.controller.update(float(gap.mean()), len(total))
        return out, seen

    def _seen(
        self,
        scores: dict[str, np.ndarray],
        total: np.ndarray,
        made: Completions,
        rows: dict[str, np.ndarray],
        judged: dict[str, np.ndarray],
    ) -> Sums:
        """What is logged of any rollout."""
        weights, count = rows["weights"], float(len(total))
        known = total[~np.isnan(total)]
        tokens = float(weights.sum())
        gap = np.abs(_sampled(made, weights) - judged["logps"])
        groups = [g[~np.isnan(g)] for g in total.reshape(-1, self.group)]
        stds = [np.std(g) for g in groups if len(g)]
        seen: Sums = {
            "reward": (float(known.sum()), float(len(known))),
            "reward_std": (float(np.std(known)) if len(known) else 0.0, 1.0),
            "reward_group_std": (float(np.sum(stds)), float(len(stds))),
            "completion_length": (float(made.lengths.sum()), count),
            "truncated": (float(made.truncated.sum()), count),
            "sampling_entropy": (float(judged["entropy"].sum()), tokens),
            "sampler_gap": (float(gap.sum()), tokens),
            "sampler_gap_max": (float(gap.max()), 1.0),
        }
        if "reference" in judged:
            k1, k3 = (kl_terms(judged["logps"], judged["reference"], k) for k in ("k1", "k3"))
            seen["kl"] = (float(np.sum(k1)), count)  # nats of a completion
            seen["kl_k3"] = (float(np.sum(k3)), count)
        for name, values in scores.items():
            some = values[~np.isnan(values)].astype(np.float64)
            seen[f"reward/{name}"] = (float(some.sum()), float(len(some)))
            seen[f"reward_std/{name}"] = (float(np.std(some)) if len(some) else 0.0, 1.0)
        return seen


def _known(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _sampled(made: Completions, weights: np.ndarray) -> np.ndarray:
    """The sampler's log-probabilities laid out as the rows' targets are, [R, T]."""
    out = np.zeros(weights.shape, np.float32)
    for row, (logps, n) in enumerate(zip(made.logps, made.lengths, strict=True)):
        out[row, weights[row] > 0] = logps[:n]
    return out
