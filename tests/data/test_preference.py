# SPDX-License-Identifier: Apache-2.0
"""Pairs, judged answers and prompts: every row laid out."""

import json

import numpy as np
import pytest

from jaxllm.config import DataSection, LogSection, Source, TrainConfig
from jaxllm.data.loader import batch_at, load_data, summarize
from jaxllm.objectives.table import OBJECTIVES

EOS, END = 1, 3


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


# ---- rows


def write(folder, records, name="a.jsonl"):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return Source(str(folder / name))


def load(folder, tokenizer, objective, *sources, **data):
    keys = {"cache_dir": str(folder / "cache"), "workers": 1, "max_length": 64} | data
    section = DataSection(train=sources, **keys)
    cfg = TrainConfig(objective=objective, data=section, log=LogSection(progress=False))
    return load_data(cfg, tokenizer)


def pairs(count, seed=0):
    rng = np.random.default_rng(seed)

    def text(low, high):
        return "".join(map(chr, rng.integers(97, 123, rng.integers(low, high))))

    return [
        {"prompt": text(1, 9), "chosen": text(1, 6), "rejected": text(1, 6), "margin": i / 4}
        for i in range(count)
    ]


def texts(rows, row, tokenizer):
    """What each segment of a row says, and what of it is learned."""
    found = {0: None}
    for s in range(1, row["segment_ids"].max() + 1):
        at = row["segment_ids"] == s
        tokens, learned = row["tokens"][at], row["weights"][at] > 0
        assert row["positions"][at].tolist() == list(range(at.sum()))
        assert (row["targets"][at][:-1] == tokens[1:]).all()
        found[s] = (tokenizer.decode(tokens), tokenizer.decode(row["targets"][at][learned]))
    assert not row["weights"][row["segment_ids"] == 0].any()
    return found


def in_slots(data, tokenizer, *names):
    """[(value or what the segment says, …) of the fields `names`] of every slot in use."""
    out = []
    for part in data.train.parts:
        for i in range(len(part)):
            row = part[i]
            said = texts(part, row, tokenizer)
            for slot in range(len(row[names[0]])):
                values = [row[n][slot] for n in names]
                if not any(values[:2]):
                    continue
                out.append(
                    tuple(
                        said[int(v)] if n.endswith("segment") else float(v)
                        for n, v in zip(names, values, strict=True)
                    )
                )
    return out


def chat(q, a):
    return f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"


PAIR = ("chosen_segment", "rejected_segment", "margin")


@pytest.mark.parametrize("objective", ["reward", "dpo", "orpo", "simpo"])
@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_pairs_hold_both_answers_with_their_prompt(tmp_path, tokenizer, objective, packing):
    assert objective in OBJECTIVES
    records = pairs(20)
    source = write(tmp_path, records)
    data = load(tmp_path, tokenizer, objective, source, packing=packing, max_length=80)
    want = [
        tuple(
            (chat(r["prompt"], r[side]), r[side] + "<|im_end|>") for side in ("chosen", "rejected")
        )
        + (r["margin"],)
        for r in records
    ]
    got = in_slots(data, tokenizer, *PAIR)
    assert sorted(got) == sorted(want)
    assert data.train.length == 160
    assert len(data.train) == 20 if not packing else len(data.train) < 20


def judged(records):
    return [
        {"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0}
        for i, r in enumerate(records)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_judged_answers_hold_the_previous_ones_answer_too(tmp_path, tokenizer, packing):
    records = judged(pairs(20))
    source = write(tmp_path, records)
    data = load(tmp_path, tokenizer, "kto", source, packing=packing, max_length=80)
    want = []
    for i, r in enumerate(records):
        own, other = r["completion"], records[i - 1]["completion"]
        mine = (chat(r["prompt"], own), own + "<|im_end|>")
        sides = (mine, None) if r["label"] else (None, mine)
        want.append((*sides, (chat(r["prompt"], other), other + "<|im_end|>")))
    got = in_slots(data, tokenizer, "chosen_segment", "rejected_segment", "unpaired_segment")
    assert sorted(map(str, got)) == sorted(map(str, want))
    assert len(data.train) == 20 if not packing else len(data.train) < 20


def test_a_mismatched_answer_is_cut_to_the_length_and_a_row_holds_it(tmp_path, tokenizer):
    long = {"prompt": "q" * 20, "completion": "a", "label": True}
    wordy = {"prompt": "q", "completion": "a" * 20, "label": False}
    limit = len(tokenizer(chat("q" * 20, "a")).input_ids)
    for packing in (True, False):
        data = load(
            tmp_path, tokenizer, "kto", write(tmp_path, [long, wordy]), max_length=limit,
            packing=packing,
        )  # fmt: skip
        longest = max(np.bincount(row["segment_ids"])[1:].max() for row in data.train.parts[0])
        assert longest == limit and data.train.length == 2 * limit


def test_only_the_last_answer_is_judged_and_all_of_a_pairs_are(tmp_path, tokenizer):
    turns = [user("a"), says("b"), user("c"), says("d")]
    data = load(tmp_path, tokenizer, "kto", write(tmp_path, [{"messages": turns, "label": True}]))
    ((good, _, _),) = in_slots(
        data, tokenizer, "chosen_segment", "rejected_segment", "unpaired_segment"
    )
    assert good[1] == "d<|im_end|>"
    pair = {"chosen": [turns[0], says("x"), *turns[2:]], "rejected": turns}
    data = load(tmp_path, tokenizer, "dpo", write(tmp_path, [pair]))
    ((one, two, _),) = in_slots(data, tokenizer, *PAIR)
    assert (one[1], two[1]) == ("x<|im_end|>d<|im_end|>", "b<|im_end|>d<|im_end|>")


def test_texts_end_with_eos_and_are_learned_where_they_part(tmp_path, tokenizer):
    source = write(tmp_path, [{"chosen": "Q: a <eos> A: yes", "rejected": "Q: a <eos> A: no"}])
    data = load(tmp_path, tokenizer, "dpo", source)
    ((one, two, _),) = in_slots(data, tokenizer, *PAIR)
    assert one == ("Q: a <eos> A: yes<eos>", "yes<eos>")
    assert two == ("Q: a <eos> A: no<eos>", "no<eos>")
    row = data.train.parts[0][0]
    assert (row["tokens"] == EOS).sum() == 2  # what the text spells is no token of the end


def test_a_tokenizer_that_ends_texts_itself_ends_them_once(tmp_path, bos_eos_tokenizer):
    source = write(tmp_path, [{"chosen": "Q: a A: yes", "rejected": "Q: a A: no"}])
    data = load(tmp_path, bos_eos_tokenizer, "dpo", source)
    ((one, two, _),) = in_slots(data, bos_eos_tokenizer, *PAIR)
    assert one == ("<s>Q: a A: yes<eos>", "yes<eos>")
    assert two == ("<s>Q: a A: no<eos>", "no<eos>")


def test_pairs_that_tell_nothing_are_dropped_and_counted(tmp_path, tokenizer):
    records = [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": " ", "rejected": "no"},
        {"prompt": "q", "chosen": "yes", "rejected": ""},
        {"chosen": "a text", "rejected": "a text"},
        {"prompt": "q", "chosen": "y" * 90 + "es", "rejected": "y" * 90},
    ]
    data = load(tmp_path, tokenizer, "dpo", write(tmp_path, records))
    (entry,) = data.manifest["train"]["sources"]
    assert (entry["read"], entry["examples"], entry["rows"]) == (6, 1, 1)
    assert entry["dropped_no_preference"] == 4
    assert entry["dropped_too_long"] == 1  # they differ beyond the cut
    line = summarize(data.manifest)[0]
    assert "4 dropped as empty or equal pairs" in line and "1 of 6 examples" in line
    with pytest.raises(ValueError, match="4 pairs with an empty side or two equal ones"):
        load(tmp_path, tokenizer, "dpo", write(tmp_path, records[1:], "b.jsonl"))


@pytest.mark.parametrize(("objective", "words"), [("dpo", "rejected"), ("kto", "label")])
def test_what_is_missing_in_a_file_names_file_and_line(tmp_path, tokenizer, objective, words):
    whole = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    whole |= {"completion": "yes", "label": True}
    lacking = {k: v for k, v in whole.items() if k != words}
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {words} is"):
        load(tmp_path, tokenizer, objective, write(tmp_path, [whole, lacking]))


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_several_sources_have_room_for_as_many_pairs(tmp_path, tokenizer, objective):
    short = [{"prompt": "q", "chosen": "yes", "rejected": "no", "margin": 1.0}] * 12
    long = [{"prompt": "q" * 30, "chosen": "y" * 9, "rejected": "n" * 9}] * 3
    records = [short, long] if objective == "dpo" else [judged(short), judged(long)]
    sources = [write(tmp_path, r, f"{i}.jsonl") for i, r in enumerate(records)]
    data = load(tmp_path, tokenizer, objective, *sources)
    few, many = (
        load(tmp_path, tokenizer, objective, s).train.parts[0].slots for s in sources[::-1]
    )
    assert few < many
    fields = batch_at(data.train, 0, 0, len(data.train))
    assert fields["chosen_segment"].shape == (len(data.train), many)
    count = ((fields["chosen_segment"] > 0) | (fields["rejected_segment"] > 0)).sum()
    assert count == 15
    for name, value in fields.items():
        assert value.dtype == (np.int32 if name.endswith("segment") else np.float32) or name in (
            "tokens", "targets", "segment_ids", "positions",
        )  # fmt: skip


@pytest.mark.parametrize("objective", ["ppo", "grpo"])
def test_prompts_end_where_an_answer_begins_and_keep_their_record(tmp_path, tokenizer, objective):
    records = [{"prompt": "why?", "answer": "42"}, {"prompt": "q" * 90}]
    data = load(tmp_path, tokenizer, objective, write(tmp_path, records))
    (part,) = data.train.parts
    assert len(part) == 1 and data.manifest["train"]["sources"][0]["dropped_too_long"] == 1
    row = part[0]
    want = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row["tokens"]) == want
    assert row["said"] == "why?" and row["columns"]["answer"] == "42"
    assert row["messages"] == [user("why?")] and row["at"].endswith("a.jsonl:1")
