# SPDX-License-Identifier: Apache-2.0
"""`jaxllm parity`: the user's run of TRL and ours, step by step, and why they differ.

reading   the user's file or script -> arguments; no code of it is run
theirs    transformers, TRL and PEFT, in a process of its own
ours      the records as our rows, and the compiled step on them
causes    what differs, tried one after another
command   the command and its table
"""
