# SPDX-License-Identifier: Apache-2.0
import ast
import json
import os
import platform
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import datasets
import numpy as np
import pytest

from jaxllm.config import DataSection, LogSection, Source, TrainConfig
from jaxllm.data import cache as cache_module
from jaxllm.data import examples as examples_module
from jaxllm.data import tokenization
from jaxllm.data.cache import Cache
from jaxllm.data.chat import EOS_APPENDED, SEPARATE_EXAMPLE
from jaxllm.data.examples import fingerprint, tokenize
from jaxllm.data.tokenization import COMPLETE, NOTHING_TO_LEARN, TOO_LONG, TRUNCATED

BOS, EOS = 0, 1


def config(tmp_path: Path, objective: str = "pretrain", **data) -> TrainConfig:
    section = DataSection(**({"cache_dir": str(tmp_path / "cache"), "workers": 1} | data))
    return TrainConfig(objective=objective, data=section, log=LogSection(progress=False))


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path, cfg: TrainConfig, tokenizer) -> examples_module.Examples:
    found = tokenize(Source(str(file)), cfg, tokenizer, fingerprint(tokenizer))
    return found


def documents(file: Path, cfg: TrainConfig, tokenizer) -> list[list[int]]:
    found = read(file, cfg, tokenizer)
    return [found.tokens(i).tolist() for i in range(len(found))]


# ---- documents


def test_each_document_ends_with_exactly_one_eos(tmp_path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "c"}])
    first, second = documents(file, config(tmp_path), tokenizer)
    assert first == [*tokenizer("ab").input_ids, EOS]
    assert second == [*tokenizer("c").input_ids, EOS]


def test_bos_and_eos_stand_once_when_the_tokenizer_adds_them(
    tmp_path, bos_tokenizer, bos_eos_tokenizer
):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "<s>ab<eos>"}])
    for made_by in (bos_tokenizer, bos_eos_tokenizer):
        for tokens in documents(file, config(tmp_path), made_by):
            assert tokens[0] == BOS and tokens.count(BOS) == 1
            assert tokens[-1] == EOS and tokens.count(EOS) == 1


def test_special_tokens_in_text_stay_text(tmp_path, tokenizer):
    text = "a<eos>b<|im_end|><s>"
    file = write_lines(tmp_path / "a.jsonl", [{"text": text}])
    (tokens,) = documents(file, config(tmp_path), tokenizer)
    assert len(tokens) == len(text) + 1  # a token a byte, and the end
    assert min(tokens[:-1]) > 3  # none of the four special ids
    assert tokenizer.decode(tokens[:-1]) == text


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_keep_order_and_borders_across_batches_and_workers(workers, tmp_path, tokenizer):
    texts = [chr(97 + i % 26) * (1 + i % 5) for i in range(4100)]
    file = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    got = documents(file, config(tmp_path, workers=workers), tokenizer)
    assert got == [[*tokenizer(t).input_ids, EOS] for t in texts]


@pytest.mark.parametrize(
    ("workers", "cores", "rows", "processes"),
    [(0, 8, 4100, 2), (0, 1, 4100, None), (0, 8, 3000, None), (3, 1, 10, 3), (9, 1, 2, 2)],
)
@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_workers_are_as_many_as_asked_for(
    workers, cores, rows, processes, system, tmp_path, tokenizer, monkeypatch
):
    """Left to us, there is one a core, and no more than have 2,000 examples each."""

    class Raw:
        column_names = ("text",)

        def __len__(self) -> int:
            return rows

        def map(self, _, *, num_proc, **options):
            return num_proc

    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    if system == "Linux":
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    cfg = config(tmp_path, workers=workers)
    asked = examples_module.tokenize_table(Source("a"), cfg, tokenizer, Raw(), tmp_path)
    assert asked == processes


def test_a_bad_record_met_by_a_worker_still_names_its_line(tmp_path, tokenizer):
    rows = [{"text": "a"} if i != 3000 else {"body": "a"} for i in range(4100)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a\.jsonl:3001: found the columns body"):
        read(file, config(tmp_path, workers=2), tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_empty_documents_are_dropped_and_counted(tmp_path, tokenizer, bos_eos_tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": None}, {"text": "a"}])
    for made_by in (tokenizer, bos_eos_tokenizer):
        found = read(file, config(tmp_path), made_by)
        assert found.outcome.tolist() == [NOTHING_TO_LEARN, NOTHING_TO_LEARN, COMPLETE]
        assert found.lengths[:2].tolist() == [0, 0]
        assert found.learned[2] == found.lengths[2] - 1


def test_a_null_document_of_a_table_is_dropped_and_counted(tmp_path, tokenizer):
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"text": None}, {"text": "a"}]).to_parquet(str(file))
    assert read(file, config(tmp_path), tokenizer).outcome.tolist() == [NOTHING_TO_LEARN, COMPLETE]


def test_an_empty_source_is_named(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: has no records"):
        read(tmp_path / "a.jsonl", config(tmp_path), tokenizer)


@pytest.mark.parametrize("place", ["file", "file/in/it"])
def test_a_cache_that_cannot_be_a_directory_is_named(place, tmp_path, tokenizer):
    file = write_lines(tmp_path / "file", [])
    source = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=f"data.cache_dir: {tmp_path / place} is a file, or is"):
        read(source, config(tmp_path, cache_dir=str(tmp_path / place)), tokenizer)
    assert file.read_text() == ""


# ---- conversations

LONG = {"prompt": "q" * 20, "completion": "a" * 20}
SHORT = {"prompt": "q", "completion": "a"}


def test_long_conversations_are_cut_but_keep_something_to_learn(tmp_path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [SHORT, LONG])
    whole = read(file, config(tmp_path, "sft", max_length=200), tokenizer)
    assert whole.outcome.tolist() == [COMPLETE, COMPLETE]
    first_learned = int(np.flatnonzero(whole.learn(1))[0])
    cut = read(file, config(tmp_path, "sft", max_length=first_learned + 1), tokenizer)
    assert cut.outcome[1] == TRUNCATED
    assert cut.learned[1] == 1
    np.testing.assert_array_equal(cut.tokens(1), whole.tokens(1)[: first_learned + 1])
    dropped = read(file, config(tmp_path, "sft", max_length=first_learned), tokenizer)
    assert dropped.outcome[1] == TOO_LONG
    assert dropped.lengths[1] == dropped.learned[1] == 0


def test_long_conversations_are_dropped_when_asked(tmp_path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [SHORT, LONG])
    length = len(read(file, config(tmp_path, "sft"), tokenizer).tokens(1))
    fits = config(tmp_path, "sft", max_length=length, too_long="drop")
    assert read(file, fits, tokenizer).outcome.tolist() == [COMPLETE, COMPLETE]
    over = config(tmp_path, "sft", max_length=length - 1, too_long="drop")
    assert read(file, over, tokenizer).outcome.tolist() == [COMPLETE, TOO_LONG]


def test_conversations_with_nothing_to_learn_are_dropped(tmp_path, tokenizer):
    mute = {"role": "assistant", "content": "a", "weight": 0}
    rows = [{"messages": [{"role": "user", "content": "q"}, mute]}, SHORT | {"messages": None}]
    file = write_lines(tmp_path / "a.jsonl", rows)
    assert read(file, config(tmp_path, "sft"), tokenizer).outcome.tolist() == [
        NOTHING_TO_LEARN,
        COMPLETE,
    ]


# An earlier answer loses its reasoning, as in Qwen3's template.
DROPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}{{ m.reasoning_content }}"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def reasoned(*answers: str) -> list[dict]:
    return [
        message
        for answer in answers
        for message in (
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer, "reasoning_content": f"so {answer}. "},
        )
    ]


def test_turns_that_stand_alone_are_examples_of_the_same_record(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(DROPS)
    rows = [{"messages": reasoned("a", "b", "c")}, {"messages": reasoned("d")}]
    file = write_lines(tmp_path / "a.jsonl", rows)
    cfg = config(tmp_path, "sft", template=str(tmp_path / "t.jinja"))
    found = read(file, cfg, tokenizer)
    assert found.source_record.tolist() == [0, 0, 0, 1]
    learned = [tokenizer.decode(found.tokens(i)[found.learn(i) > 0]) for i in range(4)]
    assert learned == [f"so {x}. {x}<|im_end|>" for x in "abcd"]
    assert found.notes == {SEPARATE_EXAMPLE: 2}
    cut = read(file, config(tmp_path, "sft", template=cfg.data.template, max_length=60), tokenizer)
    assert cut.outcome.tolist()[0] == COMPLETE and cut.outcome.tolist()[2] != COMPLETE
    assert cut.source_record.tolist() == [0, 0, 0, 1]


def test_reasoning_can_be_dropped(tmp_path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [{"messages": reasoned("a")}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: message 2 has reasoning_content.*drop"):
        read(file, config(tmp_path, "sft"), tokenizer)
    found = read(file, config(tmp_path, "sft", reasoning="drop"), tokenizer)
    assert tokenizer.decode(found.tokens(0)[found.learn(0) > 0]) == "a<|im_end|>"


def test_notes_are_counted_by_source(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<s>{{ m.content }}{% endfor %}")
    file = write_lines(tmp_path / "a.jsonl", [SHORT] * 3)
    found = read(file, config(tmp_path, "sft", template=str(tmp_path / "t.jinja")), tokenizer)
    assert found.notes == {EOS_APPENDED: 3}


def test_without_a_home_directory_the_cache_must_be_named(tmp_path, tokenizer, monkeypatch):
    def expanduser(self):
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.setattr(Path, "expanduser", expanduser)
    file = write_lines(tmp_path / "a.jsonl", [SHORT])
    with pytest.raises(ValueError, match=r"no home directory .* set data\.cache_dir"):
        read(file, config(tmp_path, "sft", cache_dir=None), tokenizer)


def test_a_date_changes_tokens_of_templates_that_write_it_alone(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%Y') }}" + DROPS)
    file = write_lines(tmp_path / "a.jsonl", [SHORT])
    for template, differ in ((str(tmp_path / "t.jinja"), True), ("chatml", False)):
        one, other = (
            read(file, config(tmp_path, "sft", template=template, date=f"{y}-01-02"), tokenizer)
            for y in (2024, 2025)
        )
        assert (one.fingerprint != other.fingerprint) == differ
        assert (one.tokens(0).tolist() != other.tokens(0).tolist()) == differ


def test_a_pairs_answer_is_one_text_or_is_refused(tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(DROPS)
    template = str(tmp_path / "t.jinja")
    asked, answer = reasoned("a")
    good = {"prompt": [asked], "chosen": [answer], "rejected": [answer | {"content": "b"}]}
    found = read(
        write_lines(tmp_path / "a.jsonl", [good]),
        config(tmp_path, "dpo", template=template),
        tokenizer,
    )
    learned = tokenizer.decode(found.tokens(0)[found.learn(0) > 0])
    assert learned == "so a. a<|im_end|>so a. b<|im_end|>" and not found.notes
    long = good | {"chosen": [answer, asked, answer]}
    file = write_lines(tmp_path / "b.jsonl", [long])
    with pytest.raises(ValueError, match=r"b\.jsonl:1: an answer has several assistant turns"):
        read(file, config(tmp_path, "dpo", template=template), tokenizer)


def test_only_the_completion_is_learned_of_a_prompt_with_examples(tmp_path, tokenizer):
    shots = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "shown"}]
    row = {"prompt": [*shots, shots[0]], "completion": "said"}
    found = read(write_lines(tmp_path / "a.jsonl", [row]), config(tmp_path, "sft"), tokenizer)
    assert tokenizer.decode(found.tokens(0)[found.learn(0) > 0]) == "said<|im_end|>"


@pytest.mark.parametrize("template", ["{{ 1/0 }}", "{{ messages[0].x.y }}"])
def test_a_template_that_fails_names_the_record(template, tmp_path, tokenizer):
    (tmp_path / "t.jinja").write_text(template)
    file = write_lines(tmp_path / "a.jsonl", [SHORT])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the chat template rejects"):
        read(file, config(tmp_path, "sft", template=str(tmp_path / "t.jinja")), tokenizer)


def test_a_record_nested_too_deeply_to_render_is_named(tmp_path, tokenizer, monkeypatch):
    def render(*_, **__):
        raise RecursionError

    monkeypatch.setattr(tokenization, "render", render)
    file = write_lines(tmp_path / "a.jsonl", [SHORT])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the record is nested too deeply"):
        read(file, config(tmp_path, "sft"), tokenizer)


# ---- the cache


def test_the_same_input_is_tokenised_once(tmp_path, tokenizer, monkeypatch):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}])
    before = documents(file, config(tmp_path), tokenizer)
    monkeypatch.setattr(examples_module, "tokenize_table", None)
    tokenizer("this call must not change the fingerprint", truncation=True, max_length=4)
    assert documents(file, config(tmp_path, workers=2), tokenizer) == before
    assert documents(file.rename(tmp_path / "b.jsonl"), config(tmp_path), tokenizer) == before
    # Settings of the other objective do not matter either.
    assert documents(tmp_path / "b.jsonl", config(tmp_path, max_length=8), tokenizer) == before


@pytest.mark.parametrize("how", ["changed", "torn", "emptied", "gone"])
def test_damaged_tokens_are_made_again(tmp_path, tokenizer, capsys, how):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "cd"}])
    before = documents(file, config(tmp_path), tokenizer)
    for name in ("*.arrow", "state.json", "sums.json"):
        (part,) = (tmp_path / "cache").glob(f"*/*/{name}")
        data = part.read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        damaged = {"changed": flipped, "torn": data[:middle], "emptied": b""}
        part.unlink() if how == "gone" else part.write_bytes(damaged[how])
        assert documents(file, config(tmp_path), tokenizer) == before
        assert f"{part.parent} is damaged, so it is made again" in capsys.readouterr().err
    assert documents(file, config(tmp_path), tokenizer) == before
    assert capsys.readouterr().err == ""


def test_the_bytes_of_cached_tokens_are_read_once(tmp_path, tokenizer, monkeypatch):
    """To read all of a large cache at each start would take minutes."""
    file = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}])
    read, checked = [], []

    def is_intact(*args, real=Cache._is_intact):
        checked.append(args)
        return real(*args)

    def file_hash(path, real=cache_module.file_hash):
        read.append(path.suffix)
        return real(path)

    monkeypatch.setattr(cache_module, "file_hash", file_hash)
    monkeypatch.setattr(Cache, "_is_intact", is_intact)
    for starts in range(3):
        documents(file, config(tmp_path), tokenizer)
        assert read.count(".arrow") == 1  # when it is made
        assert len(checked) == starts  # by the process that made it or would make it


def test_get_does_not_delete_a_damaged_entry(tmp_path, capsys):
    """Another process may read it as well. The one that makes it again deletes it."""
    cache = Cache(str(tmp_path))
    made = cache.root / "making-it"
    made.mkdir()
    (made / "state.json").write_text("{}")
    entry = cache.put(made, "entry")
    assert cache.check("entry")
    (entry / "state.json").write_text("{ }")
    assert cache.get("entry") == entry and entry.is_dir() and not capsys.readouterr().err
    assert not cache.check("entry") and not entry.exists()
    assert "is damaged, so it is made again" in capsys.readouterr().err


def test_another_content_tokenizer_or_setting_is_tokenised_anew(tmp_path, tokenizer, bos_tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [SHORT | {"other": "x"}])
    cfg = config(tmp_path, "sft", max_length=64)
    seen = {read(file, cfg, tokenizer).fingerprint, read(file, cfg, bos_tokenizer).fingerprint}
    changes = [{"max_length": 63}, {"too_long": "drop"}, {"train_on_prompt": True}]
    changes += [{"system": "s"}, {"roles": {"x": "user"}}, {"drop_columns": ("other",)}]
    for change in changes:
        seen.add(read(file, replace(cfg, data=replace(cfg.data, **change)), tokenizer).fingerprint)
    mapped = Source(str(file), columns={"prompt": "other"})
    found = tokenize(mapped, cfg, tokenizer, fingerprint(tokenizer))
    seen.add(found.fingerprint)
    write_lines(file, [SHORT, SHORT])
    seen.add(read(file, cfg, tokenizer).fingerprint)
    assert len(seen) == 10


def test_every_module_that_decides_tokens_is_in_the_caches_key():
    """All modules of the package that encoding a record imports, directly or not."""
    package = Path(examples_module.__file__).parents[1]
    found, todo = set(), [package / "data" / "tokenization.py", package / "data" / "examples.py"]
    while todo:
        file = todo.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxllm."):
                todo.append(package.parent / (node.module.replace(".", "/") + ".py"))
    # Config values are in the key. Errors, finding files and keeping tokens do not change them.
    ignored = {"errors.py", "files.py", "paths.py", "run_folder.py", "data/cache.py"}
    ignored |= {"config/fields.py", "config/source.py"}
    found -= {package / name for name in ignored}
    assert found == set(examples_module._CODE)


@pytest.mark.parametrize("name", ["jinja2", "tokenizers", "transformers", "datasets", "pyarrow"])
def test_the_caches_key_has_the_versions_of_packages_that_decide_tokens(name, monkeypatch):
    before = examples_module.cache_key({})
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "0" if n == name else version(n))
    decides = name not in ("datasets", "pyarrow")
    assert (examples_module.cache_key({}) != before) == decides


def test_another_version_of_python_keeps_the_caches_key(monkeypatch):
    before = examples_module.cache_key({})
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.1")
    monkeypatch.setattr(sys, "version_info", (3, 99, 1))
    assert examples_module.cache_key({}) == before


@pytest.mark.parametrize("name", ["tokenizer", "chat", "tokenization"])
def test_another_code_changes_the_caches_key(name, monkeypatch, tmp_path):
    before = examples_module.cache_key({})
    (file,) = (f for f in examples_module._CODE if f.stem == name)
    (tmp_path / file.name).write_text(file.read_text(encoding="utf-8") + "# changed\n")
    code = [tmp_path / f.name if f == file else f for f in examples_module._CODE]
    monkeypatch.setattr(examples_module, "_CODE", code)
    assert examples_module.cache_key({}) != before
