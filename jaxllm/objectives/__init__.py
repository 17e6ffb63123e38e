# SPDX-License-Identifier: Apache-2.0
"""Objectives: formulas only. Each returns (sum, weight, {metric: (sum, weight)}).

lm      next-token prediction; log-probabilities of targets
dpo     preference losses on pairs: DPO and its variants, ORPO, SimPO
kto     KTO           reward  the Bradley-Terry loss of a reward model
grpo    GRPO          ppo     PPO with its value head
table   one row per command: config -> Objective

Imports config, data.batch, model and ops.
"""
