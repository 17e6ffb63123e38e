# SPDX-License-Identifier: Apache-2.0
"""Online reinforcement learning, and rewards.

rewards.py  reward models and reward functions: load, score, evaluate, best of n
worker.py   the process that runs reward functions
shared.py   rows in which a group of completions follows its prompt
online.py   prompts -> completions -> rewards -> advantages -> batches for the step

Losses and estimators are in objectives/ppo.py and objectives/grpo.py, sampling in sampling.py.
May import those, chat, data and monitor; only training and the CLI import it (evaluate: rewards).
"""
