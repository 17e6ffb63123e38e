# SPDX-License-Identifier: Apache-2.0
"""Online RL: prompts -> completions, sampled on the mesh -> rewards -> batches of experience.

A rollout is a function of the seed, its number and the weights, so a resumed run repeats it.

Dims: A micro-batches of an update, B rows of a micro-batch, R completions of a rollout, T tokens of
a row, N new tokens of a completion at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxllm import dist
from jaxllm.config import TrainConfig
from jaxllm.data.batch import Batch, Experience, make_row
from jaxllm.data.chat import stop_ids
from jaxllm.data.loader import ordered
from jaxllm.data.rows import Rows
from jaxllm.mesh import data_parallel, put
from jaxllm.objectives.grpo import group_advantages, kl_terms
from jaxllm.objectives.ppo import KlController, act, gae, token_rewards, whiten
from jaxllm.ops.decoding import shared_length
from jaxllm.rl.rewards import Completion, Reward, RewardError
from jaxllm.rl.shared import SharedRows, can_share
from jaxllm.sampling import Completions, Sampling, completions
from jaxllm.step import Models

Sums = dict[str, tuple[float, float]]  # {metric: (Σ, weight)}
SAMPLES = 4  # completions of a rollout that are written to samples.jsonl


def prompts_per_rollout(cfg: TrainConfig) -> int:
    """Prompts of a rollout, each of which gets a group of completions."""
    return cfg.batch_size * cfg.rl.minibatches // (cfg.rl.group_size or 1)


@dataclass(frozen=True)
class Rollout:
    """Completions with their rewards, and the log-probabilities and values of their tokens.

    The last five fields are float32 [R, T], 0 where nothing is learned. On policy only the first of
    them is given; reference_logps is None without a reference.
    """

    sampled: Completions
    rows: dict[str, np.ndarray]
    """fields of `Batch`, [R, T]: each prompt with its completion"""
    scores: dict[str, np.ndarray]
    """{reward: float32 [R]}, NaN if it gave no score"""
    rewards: np.ndarray
    """float64 [R]: weighted sum of the scores, NaN if there is none"""
    sampler_logps: np.ndarray
    logps: Any = None
    entropy: Any = None
    values: Any = None
    reference_logps: Any = None


def make_evaluation(cfg: TrainConfig, models: Models) -> Callable[[Any, Any, Experience], Any]:
    """(trainable, frozen, rows [A, B, T]) -> the models' fields of `Rollout`, [A, B, T]."""
    forward = partial(act, temperature=cfg.rl.temperature, chunk=cfg.model.loss_chunk)

    def evaluate(trainable: Any, frozen: Any, rows: Experience) -> Any:
        def micro_batch(rows: Experience) -> Any:
            policy, reference = models(trainable, frozen)
            logps, entropy, values, _ = forward(policy, rows)
            out = {"logps": logps, "entropy": entropy, "values": values}
            if reference is not None:
                out["reference_logps"] = forward(reference, rows)[0]
            return out

        return jax.lax.map(micro_batch, rows)

    return evaluate


class Rollouts:
    """The batches of an online run: `rollouts(step, trainable)` samples when a rollout is due.

    rows: prompts; models, frozen: those of the step; samples: writes lines of samples.jsonl;
    record: receives (step, prompts) of each rollout; on_policy: `Objective.on_policy`; state: of a
    checkpoint, {} for a new run.
    """

    phase = "rollout"

    def __init__(
        self,
        cfg: TrainConfig,
        mesh: Mesh,
        rows: Rows,
        models: Models,
        frozen: Any,
        rewards: Sequence[Reward],
        tokenizer: Any,
        samples: Callable[[int, list[dict[str, Any]]], None],
        record: Callable[[int, list[Any]], None],
        *,
        on_policy: bool = False,
        state: dict[str, float],
    ):
        rl = cfg.rl
        assert rl.group_size and cfg.align.beta is not None  # config.checks.resolve
        self.cfg, self.mesh, self.models, self.frozen = cfg, mesh, models, frozen
        self.tokenizer, self.samples, self.record = tokenizer, samples, record
        self.rewards = {reward.name: reward for reward in rewards}
        if len(self.rewards) < len(rewards):  # two have the same name: use the config's longer ones
            self.rewards = dict(zip(rl.rewards, rewards, strict=True))
        self.group, self.size = rl.group_size, cfg.batch_size * rl.minibatches
        self.prompts = ordered(rows, cfg.seed).batch(prompts_per_rollout(cfg), batch_fn=list)
        self.longest = max(part.longest for part in rows.parts)  # one program for all rollouts
        self.controller = KlController(state.get("beta", cfg.align.beta), rl.kl_target)
        self.sampling = Sampling(
            rl.max_new_tokens, rl.temperature, rl.top_k, rl.top_p, rl.min_p, stop_ids(tokenizer)
        )
        self.experience: dict[str, np.ndarray] = {}
        self.shared: SharedRows | None = None  # of the last rollout
        self.evaluation = None if on_policy else jax.jit(make_evaluation(cfg, models))

    def state(self) -> dict[str, float]:
        """The state that a checkpoint saves besides the weights."""
        return {"beta": self.controller.beta}

    def __call__(self, step: int, trainable: Any) -> tuple[Batch, Sums]:
        """(batch [A, B, T] of update `step`, from 0; the metrics of a rollout made for it)."""
        cfg = self.cfg
        number, update = divmod(step, cfg.rl.updates)
        metrics: Sums = {}
        if update == 0:
            self.experience, metrics = self._rollout(number, step + 1, trainable)
        if self.shared is not None:
            return self._batch(self.experience), metrics
        iteration, minibatch = divmod(update, cfg.rl.minibatches)
        order = np.random.default_rng((cfg.seed, number, iteration)).permutation(self.size)
        rows = order[minibatch * cfg.batch_size : (minibatch + 1) * cfg.batch_size]
        return self._batch({name: x[rows] for name, x in self.experience.items()}), metrics

    def _batch(self, fields: dict[str, np.ndarray]) -> Experience:
        """Rows [R, T] in micro-batches [A, B, T] on the devices."""
        size = self.cfg.micro_batch_size * data_parallel(self.mesh)
        if self.shared is not None:
            fields, size = self.shared.pack(fields), size // self.group
        split = {name: x.reshape(-1, size, x.shape[1]) for name, x in fields.items()}
        return Experience(**put(self.mesh, split))

    def _rollout(
        self, number: int, step: int, trainable: Any
    ) -> tuple[dict[str, np.ndarray], Sums]:
        """(fields of Experience [R, T], metrics) of a rollout. step: of the first update that
        learns from it, from 1."""
        start, cfg = time.perf_counter(), self.cfg
        groups: Any = self.prompts[number]
        self.record(step, groups)
        prompts = [prompt for prompt in groups for _ in range(self.group)]
        policy = self.models(trainable, self.frozen)[0]
        graph, params = nnx.split(policy)
        key = jax.random.fold_in(jax.random.key(cfg.seed), number)
        options = {"mesh": self.mesh, "key": key, "longest": self.longest, "copies": self.group}
        given = [prompt["tokens"].tolist() for prompt in groups]
        sampled = completions(graph, params, given, self.sampling, **options)
        made = zip(prompts, sampled.tokens.tolist(), sampled.lengths.tolist(), strict=True)
        answers = [Completion(prompt, self._text(row[:n])) for prompt, row, n in made]
        sampling_seconds = time.perf_counter() - start

        scores = self._score(step, answers)
        rewards = self._combine(scores) - cfg.rl.missing_eos_penalty * sampled.truncated
        if cfg.verb.critic and np.isnan(rewards).any():
            at = prompts[int(np.isnan(rewards).argmax())]["at"]
            raise RewardError(
                f"step {step}: rl.rewards gave no reward at all at {at}; ppo needs one for each"
            )
        rows = self._rows([prompt["tokens"] for prompt in prompts], sampled)
        if can_share(cfg, policy, self.mesh):
            width = shared_length(self.longest - 1 + self.group * sampled.tokens.shape[1])
            self.shared = SharedRows(rows, self.group, width)
        evaluated = self._evaluate(trainable, rows)
        sampler_logps = _at_tokens(sampled, rows["weights"])
        rollout = Rollout(sampled, rows, scores, rewards, sampler_logps, **evaluated)
        experience, metrics = self._ppo(rollout) if cfg.verb.critic else self._grpo(rollout)
        metrics |= self._metrics(rollout)
        metrics["rollout_seconds"] = (time.perf_counter() - start, 1.0)
        metrics["sampling_seconds"] = (sampling_seconds, 1.0)
        shown = [
            {
                "prompt": answer.prompt["said"],
                "text": answer.text,
                "reward": _number(rewards[i]),
                "rewards": {name: _number(values[i]) for name, values in scores.items()},
                "truncated": bool(sampled.truncated[i]),
            }
            for i, answer in enumerate(answers[:SAMPLES])
        ]
        self.samples(step, shown)
        return experience, metrics

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode([t for t in tokens if t not in self.sampling.stop_ids])

    def _score(self, step: int, answers: list[Completion]) -> dict[str, np.ndarray]:
        """{reward: its scores}."""
        try:
            return {name: reward.score(answers) for name, reward in self.rewards.items()}
        except RewardError as error:
            raise RewardError(f"step {step}: {error}") from error

    def _combine(self, scores: dict[str, np.ndarray]) -> np.ndarray:
        """The weighted sum of a completion's rewards, float64 [R]; NaN if it has none."""
        weights = self.cfg.rl.reward_weights or (1.0,) * len(scores)
        table = np.stack([w * s for w, s in zip(weights, scores.values(), strict=True)])
        return np.where(np.isnan(table).all(0), np.nan, np.nansum(table.astype(np.float64), 0))

    def _rows(self, prompts: list[np.ndarray], sampled: Completions) -> dict[str, np.ndarray]:
        """A row for each prompt with its completion, [R, T]; T is that of all rollouts."""
        width = shared_length(self.longest + sampled.tokens.shape[1])
        rows = []
        for prompt, tokens, n in zip(prompts, sampled.tokens, sampled.lengths, strict=True):
            text = np.concatenate([prompt.astype(np.int32), tokens[:n]])
            learn = np.arange(len(text)) >= len(prompt)
            rows.append(make_row([(text, learn.astype(np.float32))], width))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _evaluate(self, trainable: Any, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The models' fields of `Rollout`, {} where the update computes them."""
        if self.evaluation is None:
            return {}
        out = dist.gather(self.evaluation(trainable, self.frozen, self._batch(rows)))
        if self.shared is not None:
            return {name: self.shared.unpack(x) for name, x in out.items()}
        learned = rows["weights"] > 0
        return {name: np.where(learned, x.reshape(learned.shape), 0.0) for name, x in out.items()}

    def _groups(self, rollout: Rollout) -> list[np.ndarray]:
        """The rewards of each prompt's completions, without NaN."""
        return [group[~np.isnan(group)] for group in rollout.rewards.reshape(-1, self.group)]

    def _grpo(self, rollout: Rollout) -> tuple[dict[str, np.ndarray], Sums]:
        """(fields of Experience, metrics) with the advantages of a completion in its group."""
        rl, rewards, weights = self.cfg.rl, rollout.rewards, rollout.rows["weights"]
        masked = np.isnan(rewards) | (rollout.sampled.truncated if rl.mask_truncated else False)
        learned = np.logical_not(masked)[:, None]
        advantages = group_advantages(rewards, self.group, scale=rl.scale_rewards)
        old = rollout.sampler_logps if rollout.logps is None else rollout.logps
        experience = rollout.rows | {
            "weights": weights * learned,
            "old_logps": old * learned,
            "advantages": advantages[:, None] * weights,
        }
        if rollout.reference_logps is not None:
            experience["reference_logps"] = rollout.reference_logps
        groups = self._groups(rollout)
        constant = sum(len(group) < 2 or np.ptp(group) == 0 for group in groups)
        return experience, {"zero_variance_groups": (float(constant), float(len(groups)))}

    def _ppo(self, rollout: Rollout) -> tuple[dict[str, np.ndarray], Sums]:
        """(fields of Experience, metrics) with advantages by GAE; updates the KL coefficient."""
        rl, weights, beta = self.cfg.rl, rollout.rows["weights"], self.controller.beta
        logps, values, rewards = rollout.logps, rollout.values, rollout.rewards
        kl = kl_terms(logps, rollout.reference_logps, rl.kl or "k1")
        per_token = token_rewards(np.asarray(kl), rewards, weights, beta)
        advantages, returns = gae(per_token, values, weights, rl.discount, rl.gae_lambda)
        experience = rollout.rows | {
            "old_logps": logps,
            "advantages": whiten(advantages, weights),
            "returns": returns,
            "old_values": values,
        }
        learned = weights > 0
        variance = float(np.var(returns[learned]))
        residual = float(np.var((returns - values)[learned]))
        metrics = {
            "explained_variance": (1 - residual / variance, 1.0) if variance else (0.0, 0.0),
            "value_mean": (float(values[learned].sum()), float(learned.sum())),
            "beta": (beta, 1.0),
        }
        mean_kl = float((logps - rollout.reference_logps).sum(1).mean())
        self.controller.update(mean_kl, len(rewards))
        return experience, metrics

    def _metrics(self, rollout: Rollout) -> Sums:
        """The metrics of every rollout. Weight 0 where no completion has a reward."""
        sampled, logps, count = rollout.sampled, rollout.logps, float(len(rollout.rewards))
        stds = [np.std(group) for group in self._groups(rollout) if len(group)]
        metrics: Sums = {
            **_mean_and_std("reward", "reward_std", rollout.rewards),
            "reward_group_std": (float(np.sum(stds)), float(len(stds))),
            "completion_length": (float(sampled.lengths.sum()), count),
            "truncated": (float(sampled.truncated.sum()), count),
        }
        if logps is not None:
            tokens, gap = float(sampled.lengths.sum()), np.abs(rollout.sampler_logps - logps)
            metrics["sampling_entropy"] = (float(rollout.entropy.sum()), tokens)
            metrics["sampler_gap"] = (float(gap.sum()), tokens)
            metrics["sampler_gap_max"] = (float(gap.max()), 1.0)
        if rollout.reference_logps is not None:
            k1, k3 = (kl_terms(logps, rollout.reference_logps, kind) for kind in ("k1", "k3"))
            metrics["kl"] = (float(np.sum(k1)), count)  # nats per completion
            metrics["kl_k3"] = (float(np.sum(k3)), count)
        for name, values in rollout.scores.items():
            metrics |= _mean_and_std(f"reward/{name}", f"reward_std/{name}", values)
        return metrics


def _at_tokens(sampled: Completions, weights: np.ndarray) -> np.ndarray:
    """The sampler's log-probabilities where rows [R, T] learn its tokens, 0 elsewhere."""
    logps = np.zeros(weights.shape, np.float32)
    logps[weights > 0] = sampled.logps[np.arange(sampled.logps.shape[1]) < sampled.lengths[:, None]]
    return logps


def _mean_and_std(mean: str, std: str, values: np.ndarray) -> Sums:
    """Both metrics of the values that are not NaN; weight 0 if there is none."""
    values = values[~np.isnan(values)].astype(np.float64)
    n = float(len(values))
    return {mean: (float(values.sum()), n), std: (float(np.std(values)), 1.0) if n else (0.0, 0.0)}


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
