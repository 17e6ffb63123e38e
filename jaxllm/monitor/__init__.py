# SPDX-License-Identifier: Apache-2.0
"""What a run reports about itself.

flops.py     FLOPs of a model and peaks of devices, for MFU; peak memory
meter.py     means of the metrics between two log lines, training time
metrics.py   metrics.jsonl, samples.jsonl, data.json; wandb and TensorBoard, if log.report_to asks
progress.py  the bar or the lines in the terminal

Imports dist, config, model.config and errors only, so any module from data upward may use it.
"""
