# SPDX-License-Identifier: Apache-2.0
"""The main path in a minute, without torch: train, save, load, generate, tune by LoRA."""

import json
from dataclasses import replace

import numpy as np


def test_pretrain_then_load_then_generate_then_lora(tmp_path):
    import jaxllm
    from jaxllm.config import (
        DataSection,
        LogSection,
        ModelSection,
        PeftSection,
        Source,
        TrainConfig,
    )
    from jaxllm.tokenizer import train_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 400)
    train_tokenizer([text], tmp_path / "tokenizer", vocab_size=300)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, vocab_size=300, max_position_embeddings=64)
    (tmp_path / "model.json").write_text(json.dumps(shape | {"model_type": "llama"}))
    cfg = TrainConfig(
        output_dir=str(tmp_path / "run"),
        steps=20,
        batch_size=8,
        model=ModelSection(
            config=str(tmp_path / "model.json"), tokenizer=str(tmp_path / "tokenizer")
        ),
        data=DataSection(
            train=(Source(str(text)),), max_length=32, workers=1, cache_dir=str(tmp_path / "cache")
        ),
        log=LogSection(every=5),
    )
    result = jaxllm.train(cfg)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines if x["kind"] == "train"]
    assert result.step == 20 and losses[-1] < losses[0]
    model = jaxllm.load_hf(result.final)
    assert np.isfinite(np.asarray(model(np.ones((1, 5), np.int32)))).all()
    [answer] = jaxllm.generate_text(
        result.final, ["one two"], sampling=jaxllm.Sampling(max_new_tokens=4)
    )
    assert isinstance(answer, str)
    peft = PeftSection(method="lora", r=4, quantize_base="nf4")
    over = replace(cfg, output_dir=str(tmp_path / "lora"), model=ModelSection(path=result.final))
    tuned = jaxllm.train(replace(over, peft=peft, steps=4))
    jaxllm.export(str(tmp_path / "lora"), str(tmp_path / "merged"), merge=True)
    want = jaxllm.load_hf(str(tuned.final))(np.ones((1, 5), np.int32))
    got = jaxllm.load_hf(str(tmp_path / "merged"))(np.ones((1, 5), np.int32))
    np.testing.assert_allclose(got, want, atol=1e-4)
