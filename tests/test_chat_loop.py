# SPDX-License-Identifier: Apache-2.0
"""Completions as text."""

from jaxllm.chat import cut


def test_text_is_cut_before_the_first_stop_string():
    assert cut("one two three", ["three", "two"]) == ("one ", True)
    assert cut("one", ["two"]) == ("one", False)
