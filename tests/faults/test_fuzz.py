# SPDX-License-Identifier: Apache-2.0
"""300 odd inputs of all kinds end in success or in one line, as the thousands of `make faults`."""

import json
import resource
import sys
from collections import Counter

from fuzz import BYTES, FAULT, SECONDS, run
from inputs import kinds

from jaxllm import untrusted

EXAMPLES, SLOW = 21, 8
LONG = ("adapter", "checkpoint")  # what these names begin takes longest


def test_odd_inputs_end_in_success_or_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "SECONDS", 1)
    faults, counts, slowest = [], Counter(), 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def report(which, detail, value, seconds):
        nonlocal slowest
        counts[which] += 1
        slowest = max(slowest, seconds)
        if which == FAULT:
            faults.append((detail, repr(value)[:300]))

    for name, kind in kinds(tmp_path / "files").items():
        run(kind, SLOW if name.startswith(LONG) else EXAMPLES, report)
    assert not faults, json.dumps(faults, indent=1)
    assert counts.total() >= 300 and min(counts.values()) > 30, counts
    assert slowest < 3 * SECONDS  # wall time, and other tests run beside this one
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < BYTES
