# SPDX-License-Identifier: Apache-2.0
"""`jaxllm preview`: what a run will see, from its config, tokenizer and data alone.

reading.py     the rows of an update as tokens, the counts of the data, as values for JSON
checks.py      duplicates, overlap of training and evaluation data, suspicious examples
terminal.py    a preview as lines
page.py        a preview as one HTML page, with the parts of `report/`
preview.css, preview.js    the page's own parts
"""
