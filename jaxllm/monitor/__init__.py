# SPDX-License-Identifier: Apache-2.0
"""Metrics, progress and FLOPs of a run.

flops.py     FLOPs of a model and peaks of devices, for MFU; peak memory
meter.py     means of the metrics between two log lines, training time
metrics.py   metrics.jsonl, samples.jsonl, data.json; trackers (log.report_to)
progress.py  the bar or the lines in the terminal

Imports dist, config, model.config, files, paths and errors only, so any module from data upward may
use it.
"""
