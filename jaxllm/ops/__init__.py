# SPDX-License-Identifier: Apache-2.0
"""Arithmetic in the form that suits the platform; no other package depends on the platform.

Imports config, errors, mesh and collectives only. In the order in which a model uses them:

    embedding          lookup in a token table that is split over devices
    quantized          int8 and nf4 kernels, and their dequantization
    matmul             products with float32 accumulation, and their gradients
    grouped            products of rows with the matrices of their groups: experts
    residuals          values that a layer stores for its backward pass
    attention          grouped-query attention: the table of kernels, and their shards
    attention_mask     which keys a query sees
    attention_blocks   attention in blocks of XLA operations
    attention_context  rows that are split along the mesh axis `context`
    attention_gpu      fused kernels for NVIDIA GPUs
    attention_tpu      splash attention for TPUs
    cross_entropy      the loss over a large vocabulary, in chunks
    conditional        an update that keeps the old values if a condition is false
    decoding           dtype of the cache, layout of the weights, greedy argmax
"""
