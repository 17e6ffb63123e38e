# SPDX-License-Identifier: Apache-2.0
"""How a model family differs from plain Llama: what a row of FAMILIES says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxllm.model.families.options import SHARED, Option


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` differ from plain Llama.

    name: prefix of transformers' class names; scores_as: that of reward models, if it differs, None
      where transformers has none. transformers' own tables of these names need torch.
    fixed: ModelConfig fields with the same value in every model of the family.
    options: fields that the config sets, besides SHARED.
    window: which layers have `sliding_window`: none, all, or those that `layer_types` names
      ("typed"); or those with "chunked_attention" there, and `attention_chunk_size`. switched: only
      if `use_sliding_window` says so too.
    mixer: of the layers without attention, which `layer_types` names: a delta net or a state space
      ("linear_attention"), or a short convolution ("conv").
    norms_of_mixer: `norm_placement` of those layers, where it is not that of attention's.
    attention_listed: `attn_layer_indices` lists those with attention, in place of `layer_types`.
    alone: a layer is a mixer, an MLP ("mlp") or experts ("moe"), which `layers_block_type` names.
    dense: which layers have an MLP in place of experts: none, the `first_k_dense_replace` first,
      the `num_dense_layers` first ("leading"), those that `decoder_sparse_step` and
      `mlp_only_layers` leave out ("steps"), those outside `moe_layer_interval` ("interval"), those
      that `mlp_layer_types` names ("typed"), or those that `moe_layers` does not list ("unlisted").
    nope: which layers have no rotary positions: none, those that `no_rope_layers` lists, those
      that see all keys while others have a window ("full"), all unless
      `position_embedding_type` is "rope", all if `rope_theta` is null ("baseless"), or "always"
      all.
    rotates_dense: layers with an MLP in place of experts have rotary positions whatever `nope` says
      if `prefix_dense_sliding_window_pattern` is 1.
    rope_by_type: `rope_parameters` holds one entry for each kind of `layer_types`.
    theta_listed: `layer_rope_theta` has the base of each layer's RoPE, 0 for none.
    shapes_by_layer: layers have sizes of their own (`per_layer_config`), take the values of full
      layers from their keys (`attention_k_eq_v`), and the last `num_kv_shared_layers` use the keys
      and values of the last layer of their type before them.
    doubled_windows: layers with a window have twice the key/value heads of others, and sinks.
    partial_rope: `partial_rotary_factor` may rotate only the first part of each head. partial: its
      value where a RoPE of type "default" gives none.
    static_ntk: `alpha` of `rope_parameters` stretches the base of type "dynamic" once and for all.
    scaled_queries: `llama_4_scaling_beta` of `rope_parameters` scales queries by their position.
    scaled_nope: `attn_scale` does so in layers without rotary positions.
    root: what the names of modules but the head begin with.
    fused: "qkv" if q, k and v are concatenated in one tensor, "qkv_heads" if those of each head
      are, "gate_up" if gate and up are concatenated,
      "experts" if those of all experts are one tensor, columns of gate and up in turn,
      "expert_halves" if all columns of gate come first, "expert_rows" if these are rows;
      "expert_halves_turned" if transformers 5 saves that with the last two dims swapped.
    modules: HF names of modules that are named otherwise than in Llama; "mlp" of all in it.
    stored: (a part of the names of tensors in files, what modules of transformers have there), for
      names that differ. read: the same, of names that are read and not written.
    mtp: where checkpoints have weights of multi-token prediction: in "layers" after the last one
      (`num_nextn_predict_layers`), or in tensors whose names begin so; "" = nowhere. mtp_trained:
      False where they are not modules as in model/mtp.py, as those of ernie4_5_moe, which read
      hidden states before the final norm.
    refused: HF keys that must be empty, each with the reason.
    """

    name: str
    fixed: dict[str, Any] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    window: Literal["none", "all", "typed", "chunked"] = "none"
    switched: bool = False
    mixer: Literal["", "delta", "conv", "mamba"] = ""
    norms_of_mixer: Literal["pre"] | None = None
    attention_listed: bool = False
    alone: bool = False
    dense: Literal["none", "first", "leading", "steps", "interval", "typed", "unlisted"] = "none"
    nope: Literal["none", "listed", "full", "all", "baseless", "always"] = "none"
    rotates_dense: bool = False
    rope_by_type: bool = False
    theta_listed: bool = False
    shapes_by_layer: bool = False
    doubled_windows: bool = False
    partial_rope: bool = False
    partial: float = 1.0
    static_ntk: bool = False
    scaled_queries: bool = False
    scaled_nope: bool = False
    root: str = "model."
    fused: tuple[str, ...] = ()
    modules: dict[str, str] = field(default_factory=dict)
    stored: tuple[tuple[str, str], ...] = ()
    read: tuple[tuple[str, str], ...] = ()
    mtp: str = ""
    mtp_trained: bool = True
    refused: dict[str, str] = field(default_factory=dict)
    scores_as: str | None = ""

    def every_option(self) -> tuple[Option, ...]:
        """The options of the family, and the shared ones of fields that it does not set itself."""
        own = {option.field for option in self.options} | self.fixed.keys()
        return tuple(o for o in SHARED if o.field not in own) + self.options
