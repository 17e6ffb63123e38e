# SPDX-License-Identifier: Apache-2.0
"""Online reinforcement learning: rollouts and rewards."""
