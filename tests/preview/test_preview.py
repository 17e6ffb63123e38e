# SPDX-License-Identifier: Apache-2.0
"""`jaxllm preview`: the rows that a run trains on, what is wrong with its data, in the terminal."""

import io
import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from runs import arguments, refused

from jaxllm import cli
from jaxllm.config import load_config
from jaxllm.data.loader import make_loader, ordered, unstacked
from jaxllm.pretokenize import prepare
from jaxllm.preview import checks, terminal
from jaxllm.preview.reading import LEARNED, SPECIAL, read_preview
from jaxllm.rows import as_trained, row_hash

STEP = 3
ONLINE = ("--rl.rewards", "none:none", "--rl.group_size", "4", "--rl.max_new_tokens", "8")
# verb -> record `k`, which says the same word several times
RECORDS = {
    "pretrain": lambda k, w: {"text": f"{w} " * (5 + 9 * k)},
    "sft": lambda k, w: {"prompt": f"{w} " * k, "completion": w},
    "dpo": lambda k, w: {"prompt": f"{w} " * k, "chosen": w, "rejected": w + w},
    "kto": lambda k, w: {"prompt": f"{w} " * k, "completion": w, "label": k % 2 == 0},
    "grpo": lambda k, w: {"prompt": f"{w} " * k},
}
RECORDS["reward"] = RECORDS["orpo"] = RECORDS["simpo"] = RECORDS["dpo"]
RECORDS["ppo"] = RECORDS["grpo"]


def written(file: Path, records: list[dict]) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def flags(project, verb: str, *more: str) -> list[str]:
    file = project / f"{verb}-preview.jsonl"
    if not file.exists():
        words = [chr(ord("A") + k) * 2 for k in range(20)]
        written(file, [RECORDS[verb](k + 1, word) for k, word in enumerate(words)])
    online = ONLINE if verb in ("grpo", "ppo") else ()
    return arguments(project, verb, "previewed", "--data.train", str(file), *online, *more)[1:]


def previewed(project, verb: str, *more: str, step: int = 1, limit: int = 0):
    return read_preview(load_config(verb, None, flags(project, verb, *more))[0], step, limit)


# ---- the rows of an update


@pytest.mark.parametrize("verb", ["pretrain", "sft", "reward", "dpo", "kto", "orpo", "grpo", "ppo"])
def test_the_rows_are_those_of_the_runs_update(project, verb):
    found = previewed(project, verb, step=STEP)
    cfg, tokenizer, data = prepare(load_config(verb, None, flags(project, verb))[0])
    if cfg.verb.online:  # the prompts of the rollout, as rl/online.py takes them
        number, size = (STEP - 1) // cfg.rl.updates, len(found["rows"])
        assert size == 16 // (cfg.rl.group_size or 1)
        batches = iter(ordered(as_trained(cfg, data.train), cfg.seed).batch(size, batch_fn=list))
        batch = next(islice(batches, number, None))
        ids = [row["segments"][0]["ids"] for row in found["rows"]]
        assert [[i for one in row for i in one] for row in ids] == [
            p["tokens"].tolist() for p in batch
        ]
        return
    loader = make_loader(data.train, batch_size=16, micro_batches=16, seed=cfg.seed)
    rows = list(unstacked(next(islice(loader, STEP - 1, None))))
    assert [f"{row_hash(row):016x}" for row in rows] == [row["hash"] for row in found["rows"]]
    for row, shown in zip(rows, found["rows"], strict=True):
        assert shown["learned"] == np.count_nonzero(row["weights"])
        assert shown["length"] - shown["tokens"] == np.count_nonzero(row["segment_ids"] == 0)
        for number, segment in enumerate(shown["segments"], 1):
            here = row["segment_ids"] == number
            ids = [i for one in segment["ids"] for i in one]
            assert ids[: segment["tokens"]] == row["tokens"][here].tolist()
            marks = [
                m & LEARNED
                for m, one in zip(segment["marks"], segment["ids"], strict=True)
                for _ in one
            ]
            # A token is learned if predicting it has a loss weight.
            assert marks[1:] == (row["weights"][here] > 0)[: len(ids) - 1].astype(int).tolist()
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert "".join(segment["texts"]) == text


@pytest.mark.sweep
def test_a_run_records_the_hashes_of_its_preview(project, capsys):
    run = ["--data.train", str(project / "few.jsonl"), "--steps", "2", "--no-save.final"]
    assert cli.main(arguments(project, "sft", "trained", *run)) == 0
    recorded = np.fromfile(project / "trained" / "rows.bin", "<u8").reshape(-1, 17)
    cfg, _ = load_config("sft", None, arguments(project, "sft", "trained", *run)[1:])
    shown = [row["hash"] for row in read_preview(cfg, 2)["rows"]]
    assert [f"{value:016x}" for value in recorded[1, 1:].tolist()] == shown


def test_segments_name_their_record_and_their_part(project):
    found = previewed(project, "dpo")
    (one, two, *_) = found["rows"][0]["segments"]
    assert (one["label"], two["label"]) == ("chosen", "rejected") and one["sources"] == two[
        "sources"
    ]
    file, _, line = one["sources"][0].rpartition(":")
    record = json.loads(Path(file).read_text().splitlines()[int(line) - 1])
    assert json.loads(found["record"]) == record
    assert record["rejected"] in "".join(two["texts"]) and record["prompt"].strip() in "".join(
        one["texts"]
    )
    labels = {s["label"] for row in previewed(project, "kto")["rows"] for s in row["segments"]}
    assert len(labels) == 3 and {"good answer", "bad answer"} < labels


def test_learned_and_special_tokens_are_marked(project):
    segment = previewed(project, "sft")["rows"][0]["segments"][0]
    kinds = dict(zip(segment["texts"], segment["marks"], strict=True))
    assert kinds["<|im_start|>"] == SPECIAL
    assert segment["texts"][-2:-1] == ["<|im_end|>"] or segment["texts"][-1] == "<|im_end|>"
    last = [m for t, m in zip(segment["texts"], segment["marks"], strict=True) if t == "<|im_end|>"]
    assert last == [SPECIAL, SPECIAL + LEARNED] and segment["learned"] >= 2


def test_characters_of_several_tokens_stay_whole(project):
    file = written(
        project / "odd.jsonl", [{"prompt": "日本 🙂" * k, "completion": "é🙂"} for k in (1, 2)]
    )
    cfg, _ = load_config(
        "sft", None, arguments(project, "sft", "previewed", "--data.train", file)[1:]
    )
    found = read_preview(cfg)
    texts = [t for row in found["rows"] for s in row["segments"] for t in s["texts"]]
    assert "🙂" in texts and not any("\ufffd" in text for text in texts)


def test_a_later_epoch_has_other_rows_and_the_last_step_is_the_last(project, capsys):
    hashes = [[r["hash"] for r in previewed(project, "sft", step=s)["rows"]] for s in (1, 2)]
    assert hashes[0] != hashes[1]
    args = ["preview", "--objective", "sft", *flags(project, "sft")]
    refused(capsys, [*args, "--step", "13"], "--step 13: the run has 12 steps")


# ---- checks


WORDS = [f"word{i}" for i in range(400)]


def chat(question: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def distinct(k: int) -> dict:
    rng = np.random.default_rng(k)
    return chat(f"{k}? " + " ".join(rng.choice(WORDS, 9)), " ".join(rng.choice(WORDS, 12)))


@pytest.fixture(scope="module")
def bad(project):
    """The findings of data with one mistake of each kind, {(check, set): finding}."""
    pytest.importorskip("datasketch")
    records = [distinct(k) for k in range(60)]
    near = json.loads(json.dumps(records[7]))
    near["messages"][1]["content"] += " indeed"
    train = [
        *records,
        records[5],
        records[5],
        near,
        chat("Say nothing", " "),
        chat("Which template?", "<|im_start|>user\nit was rendered twice<|im_end|>"),
        chat("What is broken?", "the cafÃ© of the \ufffd encoding"),
        chat("What rings?", "a bell \x07 rings"),
        chat("Again?", "again and " * 60),
    ]
    evals = [
        records[9],
        chat(records[11]["messages"][0]["content"], "another answer"),
        distinct(99),
    ]
    more = ["--data.train", written(project / "bad.jsonl", train), "--data.max_length", "512"]
    more += [
        "--data.eval",
        written(project / "held.jsonl", evals),
        "--data.system",
        "Be brief. " * 12,
    ]
    cfg, _ = load_config("sft", None, arguments(project, "sft", "previewed", *more)[1:])
    found = read_preview(cfg)
    return {(one["name"], one["set"]): one for one in found["findings"]}, found


LINE = {
    "exact copy of another": ("train", 2, 61, 6),
    "near duplicate of another": ("train", 1, 63, 8),
    "in the training data too": ("held", 1, 1, 10),
    "prompt in the training data, with another answer": ("held", 1, 2, 12),
    "empty answer": ("train", 1, 64, None),
    "special token or chat mark as plain text": ("train", 1, 65, None),
    "damaged characters (wrong encoding)": ("train", 1, 66, None),
    "control characters": ("train", 1, 67, None),
    "text that repeats itself": ("train", 1, 68, None),
}


@pytest.mark.parametrize("name", LINE)
def test_what_is_wrong_with_the_data_is_found(bad, name):
    findings, _ = bad
    where, count, line, other = LINE[name]
    one = findings[name, where]
    example = one["examples"][0]
    assert (one["count"], int(example["where"].rpartition(":")[2])) == (count, line), one
    assert (example["other"] and int(example["other"].rpartition(":")[2])) == other
    assert example["text"].strip()


def test_nothing_else_is_found(bad):
    findings, _ = bad
    named = {(name, where) for name, (where, *_) in LINE.items()}
    assert {key for key, one in findings.items() if one["count"]} == named


def test_a_shared_system_prompt_does_not_make_examples_alike(bad):
    findings, found = bad
    assert found["sets"][0]["lengths"]["min"] > 60  # mostly the system prompt
    assert findings["near duplicate of another", "train"]["count"] == 1


def test_contradicting_preferences_are_found(project):
    words = [" ".join(np.random.default_rng(k).choice(WORDS, 3)) for k in range(12)]
    pairs = [{"prompt": f"{w}?", "chosen": w, "rejected": "no"} for w in words]
    pairs.append({"prompt": f"{words[3]}?", "chosen": "no", "rejected": words[3]})
    cfg = arguments(project, "dpo", "x", "--data.train", written(project / "pairs.jsonl", pairs))
    findings = {
        f["name"]: f for f in read_preview(load_config("dpo", None, cfg[1:])[0])["findings"]
    }
    one = findings["chosen answer that another pair rejects"]
    assert one["count"] == 2 and one["examples"][0]["where"].endswith(":4")
    judged = [{"prompt": w, "completion": "yes", "label": True} for w in words]
    judged.append({"prompt": words[5], "completion": "yes", "label": False})
    cfg = arguments(project, "kto", "x", "--data.train", written(project / "judged.jsonl", judged))
    findings = {
        f["name"]: f for f in read_preview(load_config("kto", None, cfg[1:])[0])["findings"]
    }
    assert findings["answer judged both good and bad"]["count"] == 2


def test_marks_that_the_template_writes_as_text_are_not_suspicious(project, tmp_path):
    template = tmp_path / "inst.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    found = previewed(project, "sft", "--data.template", str(template))
    assert "[INST]" in shown(found)
    marks = "special token or chat mark as plain text"
    assert {f["name"]: f["count"] for f in found["findings"]}[marks] == 0


def test_a_missing_library_is_one_line(project, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    found = previewed(project, "sft")
    assert "near duplicate: not checked: pip install 'jaxllm[preview]'" in shown(found)


def test_few_examples_of_large_data_are_checked_for_what_takes_time(project):
    found = previewed(project, "sft", limit=6)
    findings = {f["name"]: f for f in found["findings"]}
    assert findings["exact copy of another"]["of"] == found["sets"][0]["sources"][0]["examples"] > 6
    assert findings["empty answer"]["of"] == 6


# ---- counts and the terminal


def shown(found, rows: int = 3, **options) -> str:
    console = Console(file=io.StringIO(), highlight=False, width=100, **options)
    terminal.show(found, rows, console)
    return console.file.getvalue()


def test_the_counts_are_those_of_the_data(project):
    long = ("--data.max_length", "32")
    found = previewed(project, "sft", *long)
    (train,) = found["sets"]
    source = train["sources"][0]
    cfg, _, data = prepare(load_config("sft", None, flags(project, "sft", *long))[0])
    rows = [data.train.parts[0][i] for i in range(len(data.train))]
    full = np.mean([(row["segment_ids"] > 0).mean() for row in rows])
    assert train["fill"] == pytest.approx(full)
    examples = data.train.parts[0].examples
    assert train["unpacked"] == pytest.approx(
        examples.lengths.sum() / 32 / (examples.lengths > 0).sum()
    )
    assert train["lengths"]["max"] == 32 and sum(train["lengths"]["counts"]) == source["examples"]
    assert source["truncated"] + source["dropped_too_long"] > 0
    text = shown(found)
    share = f"{source['dropped_too_long']} ({terminal.percent(source['dropped_too_long'] / 20)})"
    assert share in text and f"Rows are {terminal.percent(full)} full" in text


def test_a_pipe_gets_whole_lines_with_what_is_learned_in_brackets(project):
    text = shown(previewed(project, "sft"), rows=0)
    assert text.count("\nrow ") == 16 and "\x1b" not in text
    assert "[[AA<|im_end|>]]" in text and "<|im_start|>assistant\n" in text
    assert all("learned" in line for line in text.splitlines() if line.startswith("row "))


def test_prompts_are_shown_with_nothing_learned(project):
    text = shown(previewed(project, "grpo", "--data.max_length", "40"), rows=2)
    assert (
        text.startswith("grpo: 12 steps, each of 16 completions") and "learned" not in text[-200:]
    )
    assert "4 prompts of its rollout" in text and "2 more prompts" in text


def test_a_terminal_gets_colours_and_no_brackets(project):
    text = shown(previewed(project, "sft"), force_terminal=True, color_system="truecolor")
    assert "\x1b[30;48;2;" in text and "[[" not in text
    assert "more rows: --rows 0 prints all" in text


def test_the_bar_of_a_row_has_its_proportions():
    segment = {"ids": [[1]] * 24, "marks": [0] * 12 + [LEARNED] * 12}
    row = {"length": 96, "segments": [segment, segment]}
    assert terminal.bar(row) == "░" * 6 + "█" * 6 + "│" + "░" * 5 + "█" * 6 + "·" * 24


def test_text_cannot_control_the_terminal(project):
    evil = [{"prompt": f"{k} \x1b[2J\x9b", "completion": "[red]x[/red]"} for k in range(3)]
    args = arguments(project, "sft", "x", "--data.train", written(project / "evil.jsonl", evil))
    text = shown(read_preview(load_config("sft", None, args[1:])[0]))
    assert "\x1b" not in text and "\\x1b[2J" in text and "[red]x[/red]" in text


# ---- the command


def test_the_command_takes_the_config_of_a_run(project, capsys, monkeypatch):
    file = project / "preview.yaml"
    file.write_text("objective: sft\n")
    assert (
        cli.main(["preview", str(file), *flags(project, "sft"), "--rows", "1", "--step", "2"]) == 0
    )
    said = capsys.readouterr().out
    assert said.startswith("sft: 12 steps, each of 16 rows of 64 tokens; an epoch is ")
    assert "Update 2: 16 rows" in said and "15 more rows" in said
    assert not (project / "previewed").exists()


def test_a_batch_per_device_is_shown_for_the_mesh_and_said(project):
    sizes = ("--batch_size", "0", "--micro_batch_size", "2", "--accumulation", "3")
    found = previewed(project, "sft", *sizes)
    assert len(found["rows"]) == 6 and "shown for 1 device: 6 rows" in shown(found)
    found = previewed(project, "sft", *sizes, "--mesh.fsdp", "2", "--mesh.data", "2")
    assert len(found["rows"]) == 24 and "4 devices: 24 rows" in shown(found)


def test_what_it_refuses(project, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jaxllm.preview.reading", None)  # before anything heavy
    args = ["preview", *flags(project, "sft")]
    refused(capsys, args, "no objective: give --objective sft")
    args += ["--objective", "sft"]
    refused(capsys, [*args, "--html", "mine.yaml"], "--html mine.yaml", "FILE.html")
    refused(capsys, [*args, "--html", "no/x.html"], "--html: there is no directory no")
    refused(capsys, [*args, "--step", "0"], "--step: seen 0; must be an integer from 1")
    refused(capsys, [*args, "--lmit", "3"], "unknown", "lmit")


def test_streamed_data_show_their_rows_but_no_counts(project):
    path = f"{{path: {project / 'pretrain-preview.jsonl'}, streaming: true}}"
    flags(project, "pretrain")  # writes the file
    args = arguments(project, "pretrain", "x", "--data.train", path)
    found = read_preview(load_config("pretrain", None, args[1:])[0])
    assert found["findings"] == [] and found["sets"][0]["lengths"] is None
    text = shown(found)
    assert "streamed data are not checked" in text and "row 0 " in text
