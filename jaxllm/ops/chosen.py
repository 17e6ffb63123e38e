# SPDX-License-Identifier: Apache-2.0
"""What runs on the devices of a mesh, and why, in words: `jaxllm doctor` prints it."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from jaxllm.mesh import platform
from jaxllm.ops.attention import choose
from jaxllm.ops.matmul import has_bfloat16


def chosen(mesh: Mesh) -> dict[str, tuple[str, str]]:
    """{what is computed: (what runs, why it is nothing faster; empty if it is the fastest)}, with
    the defaults of a config."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = {
            f"attention, {dtype}": choose("auto", dtype=dtype, softcap=0.0)
            for dtype in ("bfloat16", "float32")
        }
        on_cpu = platform() == "cpu"
        widens = on_cpu and not has_bfloat16()
    why = "this processor has no instructions for bfloat16 products"
    found["products, bfloat16"] = ("float32, rounded", why) if widens else ("bfloat16", "")
    loop, ragged = "a loop over the experts", "ragged_dot"
    found["experts"] = (loop if on_cpu else ragged, "")
    found["quantized base"] = ("dequantized layer by layer", "")
    return found
