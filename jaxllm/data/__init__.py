# SPDX-License-Identifier: Apache-2.0
"""From files to batches. In the order of the data:

sources (files, datasets) -> formats (records) -> conversations, with messages and prompts (one
layout) -> template, turns, chat (rendering, tokens, loss weights) -> tokenization (one encoder per
`Verb.data`) -> examples (tokenized examples, the cache) -> rows, preference, stream (rows of
tokens) -> batch (`Batch`, `Experience`) -> dataset (`load_data`: rows and manifest of a run) ->
loader (batches as a function of seed and step). tokenizer_training trains a tokenizer on sources.

This package imports config, errors, files and tokenizer. Runs import dataset, loader and batch;
objectives import batch; sampling and rewards import chat and template.
"""
