# SPDX-License-Identifier: Apache-2.0
"""`report.html`: a run, or several, as one page that needs no network.

reading.py   what a run folder says, as values for JSON
columns.py   the columns of metrics.jsonl, reduced to what a screen can show; histograms
charts.py    which metrics share a chart, with titles and units
page.py      the page: its files put together; pictures of it
live.py      rewrites the page while the run trains
page.html, page.css, charts.js, frame.js    parts of every page, also of `preview/`
page.js      the page's own part
uPlot.*      the chart library (npm package uplot), which is not ours, with its licence

Text of a run (names, samples, config) is data: it is in the page as JSON and is shown as text only.
Nothing here imports jax.
"""
