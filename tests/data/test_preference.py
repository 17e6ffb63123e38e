# SPDX-License-Identifier: Apache-2.0
"""Pairs, judged answers and prompts: every row laid out."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import batch_at

from jaxllm.config import DataSection, LogSection, Source, TrainConfig
from jaxllm.data.dataset import load_data, summarize
from jaxllm.data.loader import eval_batches
from jaxllm.data.preference import Judged
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


def load(folder, tokenizer, objective, *sources, seed=0, **data):
    keys = {"cache_dir": str(folder / "cache"), "workers": 1, "max_length": 64} | data
    section = DataSection(train=sources, **keys)
    log = LogSection(progress=False)
    return load_data(TrainConfig(objective=objective, data=section, log=log, seed=seed), tokenizer)


def pairs(count, seed=0):
    rng = np.random.default_rng(seed)

    def text(low, high):
        return "".join(map(chr, rng.integers(97, 123, rng.integers(low, high))))

    return [
        {"prompt": text(1, 9), "chosen": text(1, 6), "rejected": text(1, 6), "margin": i / 4}
        for i in range(count)
    ]


def texts(row, tokenizer):
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


def in_slots(data, tokenizer, *names, epoch=None):
    """[(value or what the segment says, …) of the fields `names`] of every slot in use, of the
    stored rows or of a pass of the run over them."""
    rows = [part[i] for part in data.train.parts for i in range(len(part))]
    if epoch is not None:
        batch = batch_at(data.train, 0, epoch, len(data.train))
        rows = [{name: value[i] for name, value in batch.items()} for i in range(len(data.train))]
    out = []
    for row in rows:
        said = texts(row, tokenizer)
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


JUDGED = ("chosen_segment", "rejected_segment", "unpaired_segment")


@pytest.mark.parametrize("packing", [True, False])
def test_judged_answers_lie_beside_others_that_are_drawn_anew_each_epoch(
    tmp_path, tokenizer, packing
):
    records = judged(pairs(40))
    source = write(tmp_path, records)
    data = load(tmp_path, tokenizer, "kto", source, packing=packing, max_length=80)
    own = {
        str((mine, None) if r["label"] else (None, mine)): (r["prompt"], r["completion"])
        for r in records
        for mine in [(chat(r["prompt"], r["completion"]), r["completion"] + "<|im_end|>")]
    }
    others = {chat(p, a): (p, a) for p, _ in own.values() for _, a in own.values()}
    draws = []
    for epoch in range(4):
        got = in_slots(data, tokenizer, *JUDGED, epoch=epoch)
        lent = {own[str(slot[:2])]: others[slot[2][0]] for slot in got}
        assert sorted(lent) == sorted(own.values()) and len(got) == len(records)
        assert all(prompt == its for (prompt, _), (its, _) in lent.items())
        assert sorted(a for _, a in lent.values()) == sorted(a for _, a in own.values())
        assert all(slot[2][1] == others[slot[2][0]][1] + "<|im_end|>" for slot in got)
        draws.append([lent[one] for one in sorted(lent)])
    for i, draw in enumerate(draws):
        assert all(draw != other for other in draws[:i])
    assert len(data.train) == 40 if not packing else len(data.train) < 40


def test_the_draw_is_of_seed_and_epoch_and_evaluations_have_one(tmp_path, tokenizer):
    train, held_out = (write(tmp_path, judged(pairs(20, n)), f"{n}.jsonl") for n in (0, 1))
    one, again, other = (
        load(tmp_path, tokenizer, "kto", train, eval=(held_out,), seed=seed, workers=1 + seed)
        for seed in (0, 0, 1)
    )
    for step in (0, 7, 2):
        ours, same, new = (batch_at(d.train, 0, step, 4)["tokens"] for d in (one, again, other))
        assert (ours == same).all() and (ours != new).any()
    kept = [next(eval_batches(d.evals["1"], 20))["tokens"] for d in (one, other)]
    assert (kept[0] == kept[1]).all()


class Answers:
    """Stands for Examples: (prompt, tokens of prompt, tokens of answer) each."""

    name = "a.jsonl"

    def __init__(self, answers):
        self.made = [np.array([prompt] * n + [9] * m, np.int32) for prompt, n, m in answers]
        self.first = np.array([n for _, n, _ in answers], np.int32)
        self.lengths = np.array([len(tokens) for tokens in self.made], np.int64)
        self.value = np.ones(len(answers), np.float32)

    def tokens(self, index):
        return self.made[index]

    def learn(self, index):
        return (np.arange(len(self.made[index])) >= self.first[index]).astype(np.float32)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 9)), max_size=60),
    st.integers(0, 30),
    st.booleans(),
)
def test_equal_prompts_never_lend_to_each_other_and_rows_have_room(answers, more, packing):
    answers = [(8, 10, 1), (9, 2, 4), *((p, p, m) for p, _, m in answers), *[(7, 7, 9)] * more]
    examples = Answers(answers)
    rows = Judged(examples, np.arange(len(answers)), 16, packing=packing)
    prompts = np.array([p for p, _, _ in answers])
    for epoch in range(3):
        lenders = rows.donors(epoch)
        assert (prompts[lenders] != prompts).all()
        if 2 * np.bincount(prompts).max() <= len(prompts):
            assert sorted(lenders) == list(range(len(prompts)))  # each lends once
        found = [rows.row(i, epoch) for i in range(len(rows))]
        assert sum((row["unpaired_segment"] > 0).sum() for row in found) == len(answers)
        learned = sum((row["weights"] > 0).sum() for row in found)
        mine = examples.lengths - examples.first
        lent = np.minimum(mine[lenders], 16 - examples.first)  # cut at max_length alone
        assert learned == mine.sum() + lent.sum()


def test_judged_answers_to_one_prompt_are_refused(tmp_path, tokenizer):
    source = write(tmp_path, [{"prompt": "q", "completion": a, "label": True} for a in "abc"])
    with pytest.raises(ValueError, match=r"a\.jsonl: all 3 answers have the same prompt; kto"):
        load(tmp_path, tokenizer, "kto", source)


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
    records = [{"messages": turns, "label": True}, {"prompt": "q", "completion": "n", "label": 0}]
    data = load(tmp_path, tokenizer, "kto", write(tmp_path, records))
    (good,) = (slot[0] for slot in in_slots(data, tokenizer, *JUDGED) if slot[0])
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
    with pytest.raises(ValueError, match="4 pairs with an empty answer or equal answers"):
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
    if objective == "kto":  # no two prompts are equal
        short, long = (
            judged([r | {"prompt": f"{n:02}" + r["prompt"]} for n, r in enumerate(records)])
            for records in (short, long)
        )
    records = [short, long]
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
