# SPDX-License-Identifier: Apache-2.0
"""What a run tells about itself: metrics.jsonl, trackers, the terminal, FLOPs and memory."""
