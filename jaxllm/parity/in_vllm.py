# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of prompts in vLLM: python -P in_vllm.py FOLDER PROMPTS.json VALUES.json.

A program for the Python that has vLLM, which needs other versions of torch and transformers than
jaxllm may have, and takes over the accelerator. It imports nothing of jaxllm.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices for max_lora_rank
CACHE = 1 << 30  # bytes


def logps(folder: Path, prompts: list[list[int]]) -> list[list[float]]:
    """The log-probabilities of each prompt's tokens but the first, computed in float32."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that errors are raised here
    os.environ["TRITON_F32_DEFAULT"] = "ieee"  # else its attention rounds to tf32 on a GPU
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # it would report its use over the network
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # for the token after the longest prompt
    vllm: Any = import_module("vllm")
    lora: Any = import_module("vllm.lora.request")

    model: str = str(folder)
    options: dict[str, Any] = {}
    request = None
    if (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text())
        if adapter["peft_type"] != "LORA":
            raise ValueError("of adapters, it has LoRA only")
        model = adapter["base_model_name_or_path"]
        ranks = [adapter["r"], *(adapter.get("rank_pattern") or {}).values()]
        options["max_lora_rank"] = next((rank for rank in RANKS if rank >= max(ranks)), RANKS[-1])
        options["enable_lora"] = True
        options["max_num_seqs"] = 1  # on a CPU, vLLM 0.32 fails with LoRA and several prompts
        request = lora.LoRARequest("adapter", 1, str(folder))
    llm = vllm.LLM(
        model,
        dtype="float32",
        skip_tokenizer_init=True,
        trust_remote_code=False,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(map(len, prompts)) + 1,
        kv_cache_memory_bytes=CACHE,
        gpu_memory_utilization=0.01,  # what must be free at the start, beside the cache
        **options,
    )
    done = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        lora_request=request,
        use_tqdm=False,
    )
    found = []
    for out, prompt in zip(done, prompts, strict=True):
        pairs = zip(out.prompt_logprobs[1:], prompt[1:], strict=True)
        found.append([chosen[token].logprob for chosen, token in pairs])
    return found


if __name__ == "__main__":
    folder, prompts, values = map(Path, sys.argv[1:])
    try:
        found: dict[str, Any] = {"version": import_module("vllm").__version__}
        found["values"] = logps(folder, json.loads(prompts.read_text()))
    except Exception as error:
        # A ValueError within pydantic's message, or the message.
        reason = str(error).rpartition("Value error, ")[2].strip().splitlines()
        found = {"error": f"{type(error).__name__}: {reason[0][:300] if reason else ''}"}
    values.write_text(json.dumps(found))
