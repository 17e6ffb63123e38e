# SPDX-License-Identifier: Apache-2.0
"""Reward models: what a score depends on, and round trips through transformers and peft."""

import copy
import json
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import V, hf_config, one_device
from transformers import AutoConfig, AutoModelForSequenceClassification

from jaxllm.config import PeftSection
from jaxllm.data.batch import make_row
from jaxllm.hf import load_hf, save_adapter, save_hf
from jaxllm.model.families import from_hf
from jaxllm.model.families.table import FAMILIES
from jaxllm.peft.files import make_adapter

EOS, PAD = 7, 3
LENGTHS = (5, 9, 3)


def magnified(config):
    """A torch reward model of random weights large enough that a mistake shows."""
    values = copy.deepcopy({k: v for k, v in config.items() if k != "model_type"})
    values |= dict(num_labels=1, pad_token_id=PAD, eos_token_id=EOS)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(config["model_type"], **values), attn_implementation="eager"
    ).float()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = 1.0 if "embed" in path else 1.2 / weight.shape[1] ** 0.5
                weight.copy_(torch.randn_like(weight) * scale)
    return model.eval()


def torch_model(path):
    return AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation="eager"
    ).float()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    magnified(hf_config("llama")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(base):
    return load_hf(base, mesh=one_device())


def some_texts(seed=0):
    """Token ids of ragged texts, none of which is padding; each has an eos inside."""
    rng = np.random.default_rng(seed)
    found = [rng.integers(EOS + 1, V, n) for n in LENGTHS]
    for text in found:
        text[1] = EOS
    return found


def rows_of(groups, length=24):
    rows = [make_row([(t, np.zeros(len(t))) for t in group], length) for group in groups]
    return [np.stack([r[k] for r in rows]) for k in ("tokens", "segment_ids", "positions")]


@nnx.jit(static_argnames="count")
def scored(model, tokens, segment_ids, positions, count=3):
    return model(tokens, segment_ids, positions, segments=count)


def alone(model, text):
    return float(scored(model, *rows_of([[text]], len(text)), count=1)[0, 0])


def padded_in_torch(model, texts):
    """Scores of a batch that transformers pads."""
    length = max(map(len, texts))
    ids = np.full((len(texts), length), PAD)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    ids = torch.from_numpy(ids)
    with torch.no_grad():
        out = model.eval()(ids, attention_mask=(ids != PAD).long())
    return out.logits[:, 0].numpy()


# ---- what a score depends on


def test_scores_do_not_change_with_padding_packing_or_batch_mates(model):
    texts = some_texts()
    want = [alone(model, t) for t in texts]
    assert np.ptp(want) > 0.1
    one_each = scored(model, *rows_of([[t] for t in texts]))
    np.testing.assert_allclose(one_each[:, 0], want, atol=1e-5)
    np.testing.assert_array_equal(one_each[:, 1:], 0.0)  # there is no such segment
    together = scored(model, *rows_of([texts, texts[::-1]]))
    np.testing.assert_allclose(together, [want, want[::-1]], atol=1e-5)
    tokens, segments, positions = rows_of([texts])
    noise = np.where(segments == 0, 11, tokens)  # whatever padding holds
    np.testing.assert_allclose(scored(model, noise, segments, positions)[0], want, atol=1e-5)


def test_scores_change_with_the_question_and_with_each_token(model):
    text = some_texts()[1]
    for at in range(len(text)):
        other = text.copy()
        other[at] = (other[at] + 5) % V
        assert abs(alone(model, other) - alone(model, text)) > 1e-4, at


@pytest.mark.parametrize("token", [EOS, PAD, 0])
def test_a_text_ends_where_its_segment_does_whatever_its_tokens_are(model, token):
    """eos inside a text, and at its end, or what elsewhere is padding: it is read to its end."""
    text = some_texts()[1]
    inside, last = text.copy(), text.copy()
    inside[3], last[-1] = token, token
    for each in (inside, last):
        h = model.hidden(*(np.asarray(x) for x in rows_of([[each]], len(each)))).x
        want = float(h[0, len(each) - 1] @ model.score.kernel[...][:, 0])
        found = scored(model, *rows_of([[each, text]]))
        np.testing.assert_allclose(found[0, :2], [want, alone(model, text)], atol=1e-5)
    assert abs(alone(model, last) - alone(model, last[:-1])) > 1e-4


def test_without_segments_a_row_is_one_text(model):
    text = some_texts()[1]
    np.testing.assert_allclose(model(text[None])[0, 0], alone(model, text), atol=1e-5)


# ---- transformers


@pytest.mark.parametrize("family", [n for n, f in FAMILIES.items() if f.scores_as is not None])
def test_scores_equal_transformers_both_ways(tmp_path, family):
    theirs = magnified(hf_config(family))
    theirs.save_pretrained(tmp_path / "theirs")
    texts = some_texts()
    want = padded_in_torch(theirs, texts)
    assert np.ptp(want) > 0.1
    ours = load_hf(str(tmp_path / "theirs"), mesh=one_device())
    got = scored(ours, *rows_of([texts]))[0]
    np.testing.assert_allclose(got, want, atol=1e-4)
    save_hf(ours, str(tmp_path / "ours"))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert config["pad_token_id"] == PAD
    back, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert back.config.num_labels == 1
    np.testing.assert_allclose(padded_in_torch(back.float(), texts), want, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_language_model_begins_as_a_reward_model_whose_score_is_drawn(tmp_path, family):
    """Its head is left out (qwen2's is tied here), the same seed draws the same score."""
    from tiny import magnified as language_model

    language_model(hf_config(family)).save_pretrained(tmp_path)
    one, same, other = (
        load_hf(str(tmp_path), mesh=one_device(), scores=True, seed=s) for s in (0, 0, 1)
    )
    values = [np.asarray(m.score.kernel[...]) for m in (one, same, other)]
    assert one.head is None and values[0].shape == (32, 1) and np.abs(values[0]).min() > 0
    np.testing.assert_array_equal(values[0], values[1])
    assert np.abs(values[0] - values[2]).max() > 1e-3


def test_more_than_one_label_is_refused(base):
    config = json.loads(torch_model(base).config.to_json_string())
    config |= {
        "id2label": {"0": "a", "1": "b"},
        "architectures": ["LlamaForSequenceClassification"],
    }
    with pytest.raises(ValueError, match="num_labels is 2; a reward model gives one score"):
        from_hf(config)


# ---- adapters

SECTIONS = {
    "lora": PeftSection(method="lora", r=4),
    "lora of all linear modules": PeftSection(method="lora", r=4, target_modules=("all-linear",)),
    "dora": PeftSection(method="lora", r=4, use_dora=True),
    "prefix": PeftSection(method="prefix", num_virtual_tokens=3),
    "prompt": PeftSection(method="prompt", num_virtual_tokens=3),
    "adapter": PeftSection(method="adapter"),
}


def trained(base, section):
    """A reward model with an adapter, as if trained: nothing at its start, the score too."""
    cfg = from_hf(json.loads((Path(base) / "config.json").read_text()))
    plan = make_adapter(cfg, section)
    model = load_hf(base, mesh=one_device(), scores=True, peft=plan)
    graph, weights, rest = nnx.split(model, plan.trains, ...)
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved), rest)


def in_peft(folder):
    """The adapter in peft, where a missing or an unexpected key is an error."""
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, attn_implementation="eager"
    )
    if not model.active_peft_config.is_prompt_learning:
        found = set_peft_model_state_dict(model, load_file(f"{folder}/adapter_model.safetensors"))
        own = [k for k in found.missing_keys if "lora_" in k or "to_save" in k]
        assert not own and not found.unexpected_keys
    return model


@pytest.mark.parametrize("name", SECTIONS)
def test_adapters_of_reward_models_go_to_peft_and_back(tmp_path, base, model, name):
    ours, folder = trained(base, SECTIONS[name]), str(tmp_path / "adapter")
    texts = some_texts()
    want = scored(ours, *rows_of([texts]))[0]
    assert np.abs(want - scored(model, *rows_of([texts]))[0]).max() > 0.05
    save_adapter(ours, folder)
    for loaded in (
        load_hf(base, adapter=folder, mesh=one_device()),
        load_hf(folder, mesh=one_device()),
    ):
        np.testing.assert_allclose(scored(loaded, *rows_of([texts]))[0], want, atol=1e-5)
    if name == "adapter":
        return  # peft has no bottlenecks
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "score" not in (config.get("target_modules") or ())
    assert "score" not in str(config.get("rank_pattern", ""))
    theirs = in_peft(folder)
    # With embeddings for input transformers reads a padded text at its padding: one at a time.
    batches = [[t] for t in texts] if name == "prompt" else [texts]
    got = np.concatenate([padded_in_torch(theirs, batch) for batch in batches])
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_tied_base_has_no_head_that_an_adapter_of_its_table_would_be_tied_to(tmp_path):
    magnified(hf_config("qwen2")).save_pretrained(tmp_path / "base")
    section = PeftSection(method="lora", r=4, modules_to_save=("embed_tokens",))
    ours, folder = trained(str(tmp_path / "base"), section), str(tmp_path / "adapter")
    save_adapter(ours, folder)
    want = scored(ours, *rows_of([some_texts()]))[0]
    np.testing.assert_allclose(padded_in_torch(in_peft(folder), some_texts()), want, atol=1e-4)
    again = load_hf(folder, mesh=one_device())
    np.testing.assert_allclose(scored(again, *rows_of([some_texts()]))[0], want, atol=1e-5)


@pytest.mark.parametrize("saves", [None, ["score"]])
def test_an_adapter_that_peft_made_is_read(tmp_path, base, saves):
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=saves
    )
    theirs = peft.get_peft_model(torch_model(base), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))
    theirs.save_pretrained(tmp_path / "theirs")
    texts = some_texts()
    want = padded_in_torch(theirs, texts)
    ours = load_hf(base, adapter=str(tmp_path / "theirs"), mesh=one_device())
    np.testing.assert_allclose(scored(ours, *rows_of([texts]))[0], want, atol=1e-4)
