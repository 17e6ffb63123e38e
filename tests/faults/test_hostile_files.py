# SPDX-License-Identifier: Apache-2.0
"""What a hostile or odd file may not do: end in a traceback, hang, or fill the memory."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import (
    CHAT,
    Place,
    as_json,
    edited,
    place,
    read_data,
    read_model,
    read_shape,
    read_tokenizer,
)
from tiny import one_device

from jaxllm import hf, untrusted
from jaxllm.config import Source, load_config
from jaxllm.data import chat, tokenization
from jaxllm.data.chat import render
from jaxllm.data.template import with_settings
from jaxllm.errors import LONGEST, UserError, mistake, nearest, seen, together
from jaxllm.files import tensor_files
from jaxllm.tokenizer import load_tokenizer, special_tokens
from jaxllm.untrusted import Exceeded, bounded, read_json, rust

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("faults") / "place")


@pytest.fixture
def quick(monkeypatch):
    """Shortens the time that a template or a pattern may take."""
    monkeypatch.setattr(untrusted, "SECONDS", 1)


# ---- JSON and YAML


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.json:1: malformed JSON: Expecting value .*the end of the file"),
        (b'{"a": 1,\n]', r"a\.json:2: malformed JSON"),
        (b"[1]", r"the file must be a JSON object, seen \[1\]"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"a": [' + b"1," * (1 << 22) + b"1]}", "it has more than 4,194,304 values"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer has more than 4300 digits"),
        (b'{"a": "\\ud800"}', "a lone surrogate"),
        (b"\xff\xfe{", "not UTF-8 text"),
        (b"\0" * 9, "malformed JSON"),
    ],
)
def test_json_is_read_within_limits(content, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_json(file)
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == {"a": 1}


@pytest.mark.parametrize("form", ["missing", "folder", "fifo", "link to itself", "link to nothing"])
def test_what_is_no_file_is_not_waited_for(form, tmp_path):
    place(tmp_path / "a.json", form)
    with pytest.raises((UserError, OSError)) as caught:
        read_json(tmp_path / "a.json")
    assert "a.json" in (mistake(caught.value) or "")


def test_a_json_file_has_a_size_that_memory_has_room_for(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 30)  # takes no space
    with pytest.raises(UserError, match=r"a file has at most 67,108,864 bytes, seen 1,073,741,824"):
        read_json(tmp_path / "a.json")


LAUGHS = "\n".join(f"- &k{i} [{','.join([f'*k{i - 1}'] * 9) if i else 1}]" for i in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!int ''", r"'' is not a YAML value"),
        ("!!float ''", r"'' is not a YAML value"),
        ("!!bool x", r"'x' is not a YAML value"),
        ("{[a]: b}", "found unhashable key"),
        ("[" * 3000, "nested too deeply"),
        ("9" * 5000, "is not a YAML value"),
        ("&a [*a]", "recursive"),
        (f"\n{LAUGHS}", "nested or repeated too often"),
    ],
)
def test_yaml_is_read_within_limits(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(f"steps: {text}")
    with pytest.raises(UserError, match=rf"a\.yaml:?.*{message}"):
        load_config("sft", str(tmp_path / "a.yaml"))
    if "\n" not in text:
        with pytest.raises(UserError, match="steps"):
            load_config("sft", None, [f"--steps={text}"])


@pytest.mark.parametrize("value", ["[[]]", "[{}]", "[1]", "{a: b}"])
def test_a_tracker_is_a_name(value):
    with pytest.raises(UserError, match="log.report_to"):
        load_config("sft", None, [f"--log.report_to={value}"])


def test_brackets_are_counted_before_they_are_read():
    began = time.process_time()
    with pytest.raises(UserError, match="--eos_token: set it"):
        load_config("sft", None, ["--eos_token", "[" * 100_000])
    assert time.process_time() - began < 1  # it was 3 s for 500 brackets


def test_a_key_of_yaml_is_text(tmp_path):
    (tmp_path / "a.yaml").write_text("? [a, b]\n: 1")
    with pytest.raises(UserError, match=r"a\.yaml:1: a key must be text"):
        load_config("sft", str(tmp_path / "a.yaml"))


def test_a_config_of_a_megabyte_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 1\n" + "# \n" * 400_000)
    with pytest.raises(UserError, match="a config file has at most 1,048,576 bytes"):
        load_config("sft", str(tmp_path / "a.yaml"))


# ---- messages


def test_values_in_messages_are_cut():
    assert len(seen("a" * 10_000)) == len(seen([1] * 10_000)) == LONGEST
    ends = f"the prompt ends with {seen('a ' * 500)}, not with {seen(['b'] * 500)}; keep one"
    assert mistake(UserError(ends)) == ends and "a…', not with ['b'" in ends and "…]; keep" in ends
    word, quoted = "a" * 10_000, "b c " * 3000
    line = mistake(UserError(f"key {word} is\n'{quoted}'; write another"))
    assert line is not None and len(line) < 2.5 * LONGEST
    assert line.startswith("key aaa") and "…" in line and line.endswith("b c '; write another")
    path = f"{'/folder' * 50}/config.json:12: it's wrong"
    assert (mistake(UserError(path)) or "").endswith("/config.json:12: it's wrong")
    several = together([UserError(f"'a' is {'x ' * 150}"), UserError("b is 'c'; use 'd'")])
    assert (mistake(several) or "").endswith("(2) b is 'c'; use 'd'")
    line = mistake(UserError(f"seen {[1] * 10_000}; write another"))
    assert line is not None and len(line) < 1.2 * LONGEST and line.endswith("…; write another")
    assert mistake(UserError("a [1] is {2: [3]}; write [4]")) == "a [1] is {2: [3]}; write [4]"
    line = mistake(UserError("a; " * 100_000 + "the end"))
    assert line is not None and len(line) < 20_000 and line.endswith("the end")


def test_a_long_name_is_compared_with_no_other():
    assert nearest("a" * 100_000, ["a" * 99_999]) is None


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(OSError) as caught:
        load_config("sft", str(tmp_path / ("a" * 300)))
    assert "File name too long" in (mistake(caught.value) or "")


class PanicException(BaseException):
    """The name and the base of what Rust code raises when it panics."""


def test_a_panic_in_rust_is_one_line():
    with pytest.raises(UserError, match="a.jsonl:3: index out of bounds"), rust("a.jsonl:3"):
        raise PanicException("index out of bounds")
    with pytest.raises(UserError, match="unk_id is missing"), rust("a.jsonl:3"):
        raise Exception("unk_id is missing")
    assert mistake(PanicException("index out of bounds")) is not None
    with pytest.raises(KeyError), rust("a"):
        raise KeyError("a bug of ours")


def test_a_tokenizer_that_panics_when_it_is_loaded_is_refused(at):
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    folder = edited(at.copy("tokenizer"), "tokenizer.json", normalizer=normalizer)
    with pytest.raises(UserError, match="the tokenizer cannot be loaded: .*panic"):
        read_tokenizer(folder)


def test_a_tokenizer_that_panics_names_the_record(at, tmp_path, monkeypatch):
    def panic(*_: Any, **__: Any) -> Iterator[Any]:
        raise PanicException("index out of bounds")

    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    monkeypatch.setattr(chat._Renderer, "encode", panic)
    with pytest.raises(UserError, match=r"a\.jsonl:1: the tokenizer cannot handle it: index"):
        read_data(at, "sft", tmp_path / "a.jsonl")


# ---- models


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "", 7, "a/../../b"])
def test_an_index_names_files_in_its_folder(name, at):
    folder = at.copy("model")
    (at.root / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    mapping = json.loads((folder / INDEX).read_text())["weight_map"]
    edited(folder, INDEX, weight_map=mapping | {min(mapping): name})
    with pytest.raises(UserError, match="not a file in its folder"):
        tensor_files(folder)


def test_an_index_names_tensors_that_are_there(at):
    folder = at.copy("model")
    mapping = json.loads((folder / INDEX).read_text())["weight_map"]
    edited(folder, INDEX, weight_map=mapping | {"a": "a.safetensors"})
    with pytest.raises(UserError, match=r"index\.json says that a\.safetensors has 'a'"):
        tensor_files(folder)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (b"", 2**62, "a header of 4,611,686"),
        (b"", 2**20, "a header of 1,048,576"),
        (b"\xff", None, "its header is not text"),
        (b"[" * 5000, None, "nested too deeply"),
        (b"[]", None, r"its header is \[\]"),
        ({"a": 1}, None, "it says that 'a' is 1"),
        ({"a": ENTRY | {"shape": [3]}}, None, "it says that 'a' is"),
        ({"a": ENTRY | {"shape": [-2]}}, None, "it says that 'a' is"),
        ({"a": ENTRY | {"shape": [True, 2]}}, None, "it says that 'a' is"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, None, "it says that 'a' is"),
        ({"a": ENTRY | {"data_offsets": [0, 10**12], "shape": [10**12 // 4]}}, None, "it has"),
        ({"a": ENTRY | {"shape": [1], "data_offsets": [0, 4]}}, None, "it has .* bytes"),
    ],
)
def test_a_safetensors_header_describes_its_file(header, length, message, tmp_path):
    text = header if isinstance(header, bytes) else as_json(header)
    size = len(text) if length is None else length
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(UserError, match=f"model.safetensors.*{message}"):
        tensor_files(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be .* to 10,000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 0}, "hidden_size|ZeroDivision"),
        ({"hidden_size": 10**9, "head_dim": 8}, "has shape"),
        ({"vocab_size": 10**9}, "has shape"),
        ({"vocab_size": -1}, "vocab_size is -1; it must be an integer from 1"),
        ({"vocab_size": "@digits"}, "more than 4300 digits"),
        ({"num_hidden_layers": 9000}, "lacks .* tensors"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number"),
        ({"rope_theta": float("inf")}, "theta is inf"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"architectures": 7}, None),
    ],
)
def test_a_config_is_compared_with_the_weights_before_memory_is_taken(
    changes, message, at, monkeypatch
):
    folder = edited(at.copy("model"), "config.json", **changes)
    if message is None:
        return read_model(folder)
    monkeypatch.setattr(hf, "make_sharded", lambda *_, **__: pytest.fail("memory is taken"))
    with pytest.raises(UserError, match=message):
        read_model(folder)


def test_random_weights_that_memory_has_no_room_for_are_refused(at):
    sizes = {"hidden_size": 10**6, "intermediate_size": 10**6, "vocab_size": 10**6}
    folder = edited(at.copy("model"), "config.json", **sizes)
    read_shape(folder)  # shapes take no memory
    with pytest.raises(UserError, match=r"GiB of each device, which has"):
        from jaxllm.hf_config import source_config
        from jaxllm.model.families import from_hf

        config, _ = source_config(str(folder), {}, weights=False)
        hf.random_model(from_hf(config), one_device(), config)


# ---- adapters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 60_000}, r"lora_A.weight does not fit the model: its shape is \(2, 32\)"),
        ({"r": 10**9}, "peft.r is 1000000000; it should be less than or equal to 65536"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern"),
        ({"target_modules": ["q_proj", "k_proj"]}, "has no .*k_proj"),
        ({"target_modules": {"a": 1}}, "target_modules"),
        ({"peft_type": ["LORA"]}, r"peft_type \['LORA'\] is not supported"),
        ({"target_modules": [r"(.|\w)*!"]}, "names of modules takes more than 1 seconds"),
        ({"base_model_name_or_path": 7}, "does not name its base"),
    ],
)
def test_an_adapter_is_compared_with_its_file_before_memory_is_taken(
    changes, message, at, monkeypatch, quick
):
    folder = edited(at.copy("adapter"), "adapter_config.json", **changes)
    monkeypatch.setattr(hf, "make_sharded", lambda *_, **__: pytest.fail("memory is taken"))
    with pytest.raises(UserError, match=message):
        hf.load_hf(str(folder), mesh=one_device())


# ---- tokenizers and templates


@pytest.mark.parametrize("form", ["fifo", "link to /dev/zero", "link to nothing"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_of_pipes_and_devices_is_not_read(form, name, at):
    folder = at.copy("tokenizer")
    place(folder / name, form)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        read_tokenizer(folder)


def test_a_tokenizer_that_cannot_tokenize_is_refused_when_it_is_loaded(at):
    model = {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}
    folder = edited(at.copy("tokenizer"), "tokenizer.json", model=model, pre_tokenizer=None)
    with pytest.raises(UserError, match="the tokenizer cannot be loaded: .*unk_id"):
        read_tokenizer(folder)


@pytest.mark.parametrize("value", [True, 7, [1], {"default": 3}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_chat_template_is_text(file, value, at):
    folder = at.copy("tokenizer")
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    for left in ("chat_template.jinja", "additional_chat_templates"):
        place(folder / left, "missing")
    with pytest.raises(UserError, match="chat.template|cannot be loaded"):
        read_tokenizer(edited(folder, file, chat_template=value))


def test_an_empty_special_token_is_left_out(at):
    """It stands everywhere, so that the tokens that close a turn would not end."""
    folder = at.copy("tokenizer")
    (folder / "special_tokens_map.json").write_text("{}")
    tokenizer = load_tokenizer(edited(folder, "tokenizer_config.json", pad_token=""))
    assert "" in tokenizer.all_special_tokens and "" not in special_tokens(tokenizer)
    read_tokenizer(folder)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWING = (
    "{% set x = namespace(v='a') %}{% for i in range(40) %}{% set x.v = x.v + x.v %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10 ** 8 }}", "the chat template renders more than 67,108,864 characters"),
        ("{{ 'a' * 10 ** 10 }}", "the chat template takes more than 512 MiB of memory"),
        (LOOP, "the chat template takes more than 1 seconds, so it may never end"),
        (GROWING, "the chat template takes more than 512 MiB of memory"),
    ],
)
def test_a_template_that_does_not_end_is_stopped(template, message, at, monkeypatch):
    if template == LOOP:  # the others need more seconds where page faults are slow
        monkeypatch.setattr(untrusted, "SECONDS", 1)
    tokenizer = copy.copy(at.tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(Exceeded, match=message):
        render(with_settings(tokenizer, load_config("sft")[0].data), CHAT)


def test_what_takes_too_much_memory_is_stopped(monkeypatch):
    monkeypatch.setattr(untrusted, "GROWTH", 1 << 27)
    kept = []
    with pytest.raises(Exceeded, match="a pattern takes more than"), bounded("a pattern"):
        while True:
            kept.append(np.ones(1 << 20))
    kept.clear()


# ---- data


def test_a_long_document_has_the_tokens_of_the_whole(at, monkeypatch, tmp_path):
    text = Path(json.__file__).read_text() * 3 + "é😀" * 300 + "a" * 5000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    cfg, _ = load_config("pretrain", None, [])
    records = [("a.jsonl:1", {"text": text})]

    def tokens() -> np.ndarray:
        (encoded,) = tokenization._encode_documents(records, Source(""), cfg, at.tokenizer)
        return encoded.tokens

    whole = tokens()
    monkeypatch.setattr(tokenization, "OVERLAP", 256)
    for size in (1000, 1537, 4096):
        monkeypatch.setattr(tokenization, "PIECE", size)
        pieces = tokens()
        assert at.tokenizer.decode(pieces) == at.tokenizer.decode(whole)
        words = len(whole) - 3000  # where there are words; one of 5,000 characters has no break
        assert np.array_equal(pieces[:words], whole[:words])


@pytest.mark.parametrize("content", [b"[" * 99, b"\xff\xff\xff\xff[[[[" * 9, b""])
def test_an_arrow_file_starts_as_one(content, at, tmp_path):
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.arrow: not readable as arrow: it starts with"):
        read_data(at, "pretrain", tmp_path / "a.arrow")


def test_the_types_that_a_table_names_are_read_within_limits(at, tmp_path):
    features = {"info": {"features": {"text": {"_type": "Value"}}}}  # without its dtype
    table = pa.table({"text": ["a"]}).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not readable as parquet: .*dtype"):
        read_data(at, "pretrain", tmp_path / "a.parquet")


def test_a_conversation_that_memory_has_no_room_for_is_refused(at, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "MAX_TEXT", 20)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(UserError, match=r"a\.jsonl:1: the conversation has more than 20 char"):
        read_data(at, "sft", tmp_path / "a.jsonl")


MEASURED = """
import resource, sys
from pathlib import Path
from inputs import Place, read_data
at = Place(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_data(at, "pretrain", Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.sweep
def test_a_line_of_100_megabytes_takes_bounded_memory(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "Once upon a time. " * 6_000_000}))
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "place"), str(file)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=os.environ | paths, stdout=subprocess.PIPE, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    # The text, twice, and 0.3 GiB of tokens, twice. It was 5.5 GiB while malloc could not reuse the
    # memory of the pieces.
    assert int(done.stdout) * unit < 2 << 30
