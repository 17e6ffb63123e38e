# SPDX-License-Identifier: Apache-2.0
"""The trace of some steps, and the table of their time by named scope."""

import re
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.monitor.profile import Profile, covered


class Meter:
    pauses = 0

    @contextmanager
    def paused(self):
        self.pauses += 1
        yield


def step(x):
    with jax.named_scope("attention"):
        y = jax.lax.scan(lambda c, _: (jnp.tanh(c @ x), None), x, None, length=3)[0]
    with jax.named_scope("mlp"):
        return jax.nn.softmax(y @ x)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """(lines, folder, meter) of a run of 17 steps."""
    folder, meter, run = tmp_path_factory.mktemp("run"), Meter(), jax.jit(step)
    state, lines = jnp.ones((256, 256)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxllm.dist.say", lambda *some: lines.extend(some))
        with Profile(folder, 0, 1, meter, True) as profile:
            for number in range(1, 18):
                profile(number, state)
                state = run(state)
    return lines, folder, meter


def test_the_table_has_the_time_of_every_scope(traced):
    lines, _, _ = traced
    assert lines[0].startswith("time by named scope")
    rows = [re.match(r"(.+?) +([\d.]+) +([\d.]+)%$", line) for line in lines]
    found = {row[1]: (float(row[2]), float(row[3])) for row in rows if row}
    assert found["mlp"][0] > 0 and found["attention"][0] > found["mlp"][0]  # three products, one
    assert sum(share for _, share in found.values()) == pytest.approx(100, abs=1)
    assert re.fullmatch(r"a step +[\d.]+", lines[-2])


def test_the_trace_is_of_steps_10_to_15_and_its_path_is_printed(traced):
    lines, folder, meter = traced
    said = re.fullmatch(r"profile: steps 10 to 15 are in (.*)", lines[-1])
    assert said and Path(said[1]).is_file() and folder in Path(said[1]).parents
    planes = jax.profiler.ProfileData.from_file(said[1]).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert len({dict(event.stats).get("run_id") for event in events} - {None}) == 6
    assert meter.pauses == 2


@pytest.mark.parametrize(
    ("start", "stride", "first", "last"),
    [(0, 1, 10, 15), (100, 1, 110, 115), (0, 4, 13, 20), (8, 8, 25, 32)],
)
def test_a_resumed_run_counts_from_its_start_and_an_online_one_whole_rollouts(
    start, stride, first, last, tmp_path
):
    profile = Profile(tmp_path, start, stride, Meter(), True)
    assert (profile.first, profile.last) == (first, last)
    assert (first - 1 - start) % stride == 0 == (last - start) % stride


def test_a_run_that_ends_before_says_so(tmp_path, capsys):
    with Profile(tmp_path, 0, 1, Meter(), True) as profile:
        profile(9, None)
    assert "no step was traced; the first would be 10" in capsys.readouterr().err
    with Profile(tmp_path, 0, 1, Meter(), False) as profile:
        profile(10, None)
    assert not capsys.readouterr().err and not any(tmp_path.iterdir())


def test_an_error_within_the_trace_ends_it_and_is_the_one_to_be_seen(tmp_path, capsys):
    for _ in range(2):  # another trace can begin afterwards
        with pytest.raises(ZeroDivisionError), Profile(tmp_path, 0, 1, Meter(), True) as profile:
            profile(10, None)
            raise ZeroDivisionError
    assert not capsys.readouterr().err


def test_time_in_which_two_operations_run_counts_once():
    assert covered([(0, 2), (1, 3), (5, 6), (5, 6)]) == 4
