# SPDX-License-Identifier: Apache-2.0
"""The decoder: shapes and modules. Nothing here reads files or depends on the platform.

config      ModelConfig, a model's shape
families    HF config <-> ModelConfig, and the HF name of every weight
adapter     what a PEFT method may add to a model
context     Context, the inputs of a layer besides the residual stream
rope, cache rotary positions; keys and values of past tokens
parts       a layer's weights, of which a device has parts: gathered, and in blocks
layers      Linear, Embed, norms, MLP
moe         a mixture of experts in place of the MLP; routing: what its routers did
mla, delta, conv   in place of attention: latent attention, gated delta nets, short convolutions
layer_embeds       per-layer embeddings; mtp: modules of multi-token prediction
attention, block, stack, decoder: from the inside out; a reader starts with decoder

May import config, errors, mesh and ops. peft, objectives, hf and sampling import it.
"""
