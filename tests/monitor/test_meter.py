# SPDX-License-Identifier: Apache-2.0
"""Means between log lines: what they cover, what is timed and which steps stop a run."""

import json

import jax
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.monitor.flops import Flops
from jaxllm.monitor.meter import Meter, means


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test advances."""
    now = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def step_of(tokens, learned=0.0):
    ones = {name: (np.float32(1), np.float32(1)) for name in ("loss", "grad_norm")}
    return ones | {"tokens": (np.float32(tokens), 0), "learned": (np.float32(learned), 0)}


def test_only_training_time_is_counted(clock):
    compiling = "/jax/core/compile/backend_compile_duration"
    with Meter({}, 0.0) as meter:
        with meter.paused():
            clock[0] += 100  # the step is compiled
            jax.monitoring.record_event_duration_secs(compiling, 99.0)  # inside the pause
        clock[0] += 30  # a rollout; its programs took 28 to compile
        jax.monitoring.record_event_duration_secs(compiling, 28.0)
        meter.add(1, step_of(50))
        line = meter.line()
        assert (line["step_seconds"], line["tokens_per_second"]) == (2.0, 25.0)
        meter.add(2, step_of(50))
        clock[0] += 4
        with meter.paused():
            clock[0] += 60
            assert meter.seconds == 4.0  # saved in a checkpoint
        assert meter.line()["step_seconds"] == 4.0
    clock[0] += 5
    jax.monitoring.record_event_duration_secs(compiling, 3.0)  # the listener is gone
    assert meter.seconds == 5.0


def test_a_log_line_of_a_resumed_run_covers_the_steps_before_it(clock):
    straight, killed = Meter({}, 0.0), Meter({}, 0.0)
    for meter in (straight, killed):
        clock[0] += 2
        meter.add(1, step_of(10))
        meter.read()
    resumed = Meter(killed.sums, 2.0)
    resumed.add(2, step_of(30))
    straight.add(2, step_of(30))
    assert resumed.line()["tokens"] == straight.line()["tokens"] == 40


def test_at_most_one_update_is_queued_behind_the_one_that_runs(monkeypatch):
    """So that a signal stops a run of long steps soon: JAX queues up to 32."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waited.extend(s for s, _ in tree))
    meter = Meter({}, 0.0)
    meter.add(1, step_of(1))
    assert waited == []
    meter.add(2, step_of(1))
    meter.add(3, step_of(1))
    assert waited == [1, 2]


def test_tokens_seen_are_counted_over_lines_and_restarts():
    meter = Meter({}, 0.0)
    meter.add(1, step_of(10))
    assert (meter.line()["tokens"], meter.tokens_seen) == (10, 10)
    meter.add(2, step_of(20))
    meter.read()
    saved = json.loads(json.dumps(meter.sums))  # in a checkpoint between two lines
    meter.add(3, step_of(40))
    assert meter.tokens_seen == 30  # of an evaluation after step 2
    resumed = Meter(saved, 0.0)
    resumed.add(3, step_of(40))
    for one in (meter, resumed):
        assert (one.line()["tokens"], one.tokens_seen) == (60, 70)


def test_mfu_counts_layers_for_real_tokens_and_the_head_for_learned_ones(clock):
    meter = Meter({}, 0.0, peak=1000.0)
    meter.add(1, step_of(10, learned=4))
    clock[0] += 2
    meter.flops = Flops(layers=50.0, head=100.0)
    line = meter.line()
    assert line["mfu"] == (10 * 50 + 4 * 100) / (2 * 1000)
    assert "learned" not in line
    meter = Meter({}, 0.0)  # a device of unknown peak
    meter.flops = Flops(1.0, 1.0)
    meter.add(1, step_of(10))
    assert meter.line()["mfu"] is None


def test_a_metric_that_counted_nothing_is_left_out_and_the_loss_is_zero():
    sums = {"loss": (0.0, 0.0), "accuracy": (0.0, 0.0), "tokens": (7.0, 0.0), "margin": (3.0, 2.0)}
    assert means(sums) == {"loss": 0.0, "margin": 1.5}
    meter = Meter({}, 0.0)
    for step, (value, weight) in enumerate([(0, 0), (3, 4), (0, 0)], 1):
        meter.add(step, step_of(10) | {"accuracy": (np.float32(value), np.float32(weight))})
    assert meter.line()["accuracy"] == 0.75  # steps without a pair do not lower it
    meter.add(4, step_of(10) | {"accuracy": (np.float32(0), np.float32(0))})
    assert "accuracy" not in meter.line()


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_named_although_later_ones_are(name, value):
    """A step that skips such an update leaves the weights, and so the later losses, finite."""
    meter = Meter({}, 0.0)
    for step in range(1, 5):
        meter.add(step, step_of(10) | ({name: (np.float32(value), 1.0)} if step == 3 else {}))
    with pytest.raises(UserError, match=f"step 3: {name} is {value}; the last good checkpoint"):
        meter.line()
