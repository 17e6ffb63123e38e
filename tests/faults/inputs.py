# SPDX-License-Identifier: Apache-2.0
"""Odd and hostile inputs of every kind that a user can give, and what reads each of them.

`kinds` gives {kind: (a hypothesis strategy, the function that reads a drawn value)}. Reading may
succeed, or raise an exception that `jaxllm.errors.mistake` turns into one line. All else is a
fault.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny import SHAPE, one_device

from jaxllm import hf
from jaxllm.checkpoint import ITEMS, Checkpoints, list_files
from jaxllm.config import (
    VERBS,
    DataSection,
    Source,
    TrainConfig,
    checks,
    describe,
    load_config,
    to_dict,
)
from jaxllm.config.aliases import NAMES
from jaxllm.config.schema import leaves
from jaxllm.data.chat import prompt_tokens, render, stop_ids
from jaxllm.data.examples import fingerprint, tokenize_table
from jaxllm.data.sources import locate, read
from jaxllm.data.template import with_settings
from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.files import tensor_files
from jaxllm.hf_config import source_config, updated_configs
from jaxllm.model.families import from_hf
from jaxllm.model.families.table import FAMILIES
from jaxllm.model.families.tensors import key_table, tensor_names
from jaxllm.model.families.wrappers import WRAPPERS
from jaxllm.peft.files import with_base
from jaxllm.report.page import page
from jaxllm.report.reading import read_run
from jaxllm.tokenizer import check_vocabulary, generation_stop_ids, load_tokenizer, special_tokens

Kind = tuple[st.SearchStrategy[Any], Callable[[Any], Any]]

# ---- values

DIGITS, DEEP = "@digits", "@deep"  # stand for what json.dumps cannot write, see `as_json`
NUMBERS = (0, 1, 2, 3, 7, -1, 0.5, 10**9, 2**31, 2**63, 10**40, 1e308, 5e-324)
NUMBERS += (float("inf"), float("-inf"), float("nan"))
TEXTS = ("", " ", "a", "auto", "none", "é\u0301", "\0", "\ud800", "a" * 300, "../model", "{{", "%s")
TEXTS += ("/dev/zero", "owner/name", "(.*a)*(.*b)*(.*c)*(.*d)*(.*e)*z", "true", "1e9", DIGITS, DEEP)
scalars = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS)
values = st.recursive(
    scalars | st.text(max_size=8) | st.integers(-300, 300),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


seldom = st.integers(0, 3).map(lambda n: n == 0)


@st.composite
def changed(draw: Any, base: Any, keys: tuple[str, ...] = ()) -> Any:
    """A JSON object with up to three of its parts changed, removed or added. keys: further names
    that it may get."""
    value = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        at: Any = value
        while True:
            more = keys if at is value and keys else ("a",)
            key = draw(st.sampled_from(range(len(at)) if isinstance(at, list) else [*at, *more]))
            inner = at[key] if isinstance(at, list) else at.get(key)
            if not inner or not isinstance(inner, dict | list) or draw(seldom):
                break
            at = inner
        if draw(seldom) and (isinstance(at, list) or key in at):
            del at[key]
        else:
            at[key] = draw(values)
    return value


def as_json(value: Any) -> bytes:
    """JSON, with a number of 5,000 digits for DIGITS and 100,000 lists in another for DEEP."""
    text = json.dumps(value).replace(f'"{DIGITS}"', "9" * 5000)
    return text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).encode()


# ---- files

NO_FILES = ("missing", "folder", "fifo", "link to itself", "link to nothing", "link to /dev/zero")


def damaged(content: bytes) -> st.SearchStrategy[bytes | str]:
    """The bytes of a file with something wrong, or one of NO_FILES in its place."""

    def cut(at: int) -> bytes:
        return content[: at % (len(content) + 1)]

    def flip(place: tuple[int, int]) -> bytes:
        at, byte = place[0] % max(len(content), 1), place[1]
        return content[:at] + bytes([byte]) + content[at + 1 :]

    where = st.integers(0, 1 << 20)
    forms = (b"", b"\xef\xbb\xbf" + content, b"\0" * 64, content + content)
    forms += (b"\xff\xfe" + content.decode("utf-8", "replace").encode("utf-16-le"),)
    forms += (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"null", b"[]", b'"a"', b"{}")
    return st.one_of(
        where.map(cut),
        st.tuples(where, st.integers(0, 255)).map(flip),
        st.sampled_from(forms),
        st.sampled_from(NO_FILES),
    )


def place(file: Path, form: bytes | str) -> None:
    """Puts bytes, or one of NO_FILES, in a file's place."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    if isinstance(form, bytes):
        file.write_bytes(form)
    elif form == "folder":
        file.mkdir()
    elif form == "fifo":
        os.mkfifo(file)
    elif form.startswith("link"):
        targets = {"itself": file.name, "nothing": "nothing", "/dev/zero": "/dev/zero"}
        file.symlink_to(targets[form.removeprefix("link to ")])


def edited(folder: Path, name: str, **changes: Any) -> Path:
    """Changes keys of a JSON file in a directory."""
    file = folder / name
    file.write_bytes(as_json(json.loads(file.read_text()) | changes))
    return folder


def json_file(base: Any, keys: tuple[str, ...] = ()) -> st.SearchStrategy[bytes | str]:
    """A JSON file with odd values four times out of five, else damaged."""
    odd = changed(base, keys).map(as_json)
    return st.one_of(odd, odd, odd, odd, damaged(as_json(base)))


class Place:
    """A model, an adapter and a tokenizer in one directory, of which each input gets a copy."""

    def __init__(self, root: Path):
        self.root, self.good = root, root / "good"
        self.good.mkdir(parents=True)
        datasets.disable_progress_bars()
        text = "Once upon a time there was a model that read every file with care. " * 30
        train_tokenizer([], self.good / "tokenizer", 300, texts=[text])
        self.tokenizer = load_tokenizer(self.good / "tokenizer")
        self.config = SHAPE | {"model_type": "llama", "vocab_size": 300, "num_hidden_layers": 2}
        self.config |= {"tie_word_embeddings": False, "max_position_embeddings": 64}
        shutil.copytree(self.good / "tokenizer", self.good / "model")
        self._write_model(self.good / "model")
        self._write_adapter(self.good / "adapter")
        texts = datasets.Dataset.from_dict({"text": ["Once upon", "a time"]})
        texts.to_parquet(self.good / "texts.parquet")
        datasets.DatasetDict(train=texts).save_to_disk(self.good / "dataset")

    def _write_model(self, folder: Path) -> None:
        (folder / "config.json").write_bytes(as_json(self.config))
        (folder / "generation_config.json").write_bytes(as_json({"eos_token_id": [0, 1]}))
        model = hf.abstract_model(from_hf(self.config), one_device(), self.config)
        tensors = {t.name: np.zeros(t.shape, np.float32) for t in hf.hf_tensors(model)}
        names = sorted(tensors)
        halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        mapping = {name: file for file, part in halves.items() for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": mapping}
        (folder / "model.safetensors.index.json").write_bytes(as_json(index))

    def _write_adapter(self, folder: Path) -> None:
        folder.mkdir()
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
        config |= {"target_modules": ["q_proj"], "rank_pattern": {}, "alpha_pattern": {}}
        config |= {"base_model_name_or_path": str(self.good / "model"), "bias": "none"}
        (folder / "adapter_config.json").write_bytes(as_json(config))
        tensors = {}
        for layer in range(2):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
            tensors[f"{name}A.weight"] = np.zeros((2, 32), np.float32)
            tensors[f"{name}B.weight"] = np.zeros((32, 2), np.float32)
        save_file(tensors, folder / "adapter_model.safetensors")

    def write_run(self) -> None:
        """A run folder with a checkpoint of two small arrays."""
        folder = self.good / "run"
        folder.mkdir()
        cfg = TrainConfig(output_dir=str(folder), data=DataSection(train=(Source("a.txt"),)))
        lines = {"config.json": to_dict(cfg), "data.json": {"train": {"sources": []}, "eval": {}}}
        lines["starts.jsonl"] = {"time": 1.0, "last": 0.0, "step": 0, "steps": 4, "mesh": {}}
        lines["samples.jsonl"] = {"step": 4, "prompt": "a", "text": "b"}
        lines["metrics.jsonl"] = {"kind": "train", "step": 4, "time": 2.0, "loss": 1.0, "mfu": None}
        for name, value in lines.items():
            (folder / name).write_bytes(as_json(value) + b"\n")
        saves = Checkpoints(folder / "checkpoints")
        saves.save(4, STATE, {"seconds": 1.0, "identity": {"config": {}}})
        saves.close()

    def copy(self, name: str, into: str = "odd") -> Path:
        """A fresh copy of a directory."""
        folder = self.root / into
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(self.good / name, folder)
        return folder

    def bytes(self, name: str) -> bytes:
        return (self.good / name).read_bytes()

    def json(self, name: str) -> Any:
        return json.loads(self.bytes(name))


# ---- what reads them


def read_settings(verb: str, args: list[str]) -> None:
    """A config file and flags, as a training command reads them before it trains."""
    path = args.pop(0) if args and not args[0].startswith("-") else None
    names = {arg.partition("=")[0] for arg in args}
    for flag in {"--model.path", "--data.train"} - names:
        args += [flag, "owner/name"]
    cfg, origins = load_config(verb, path, args)
    describe.explanation(cfg, origins)
    checks.check(cfg)


def read_model(folder: Path) -> None:
    """A model directory, as training and generation read it."""
    config, _ = source_config(str(folder), {})
    model = hf.load_hf(str(folder), mesh=one_device())
    hf.weights_hash(tensor_files(folder).values())
    updated_configs(config, "float32", model.cfg.vocab_size, None)


STATE = {"step": jnp.int32(4), "weights": {"a": jnp.ones((8, 4))}}


def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def read_checkpoint(folder: Path) -> None:
    """The checkpoint of a run, as a resumed run and an export read it."""
    saves = Checkpoints(folder / "checkpoints")
    try:
        step = saves.latest()
        if step is not None:
            saves.best(), saves.meta(step)
            saves.restore(step, jax.tree.map(abstract, STATE))
    finally:
        saves.close()


def read_report(folder: Path) -> None:
    """A run folder, as `report` reads it."""
    page([read_run(folder)])


def read_shape(folder: Path) -> None:
    """A model directory, as a run with random weights reads it, without making the weights."""
    config, _ = source_config(str(folder), {}, weights=False)
    cfg = from_hf(config)
    for key in key_table(cfg):
        tensor_names(cfg, key.name)
    hf.abstract_model(cfg, one_device(), config)
    updated_configs(config, "float32", cfg.vocab_size, None)


CHAT = [
    {"role": "user", "content": "Once upon?"},
    {"role": "assistant", "content": "A time."},
    {"role": "user", "content": "There was?"},
    {"role": "assistant", "content": "A model."},
]


def read_tokenizer(folder: Path) -> None:
    """A tokenizer, as training and generation use it."""
    tokenizer = with_settings(load_tokenizer(folder), TrainConfig().data)
    fingerprint(tokenizer)
    check_vocabulary(tokenizer, 300)
    special_tokens(tokenizer)
    ids = tokenizer(["Once upon a time", "", "<eos> é"], split_special_tokens=True)["input_ids"]
    tokenizer.decode(ids[0])
    stop_ids(tokenizer, folder)
    render(tokenizer, CHAT)
    prompt_tokens(tokenizer, CHAT[:1])


def read_data(at: Place, verb: str, file: Path) -> None:
    """A data file, as a training command tokenizes it."""
    cfg, _ = load_config(verb, None, ["--data.train", str(file), "--data.workers", "1"])
    tokenizer = with_settings(at.tokenizer, cfg.data)
    source = Source(str(file))
    with tempfile.TemporaryDirectory(dir=at.root) as folder:
        raw = read(locate(source), Path(folder))
        tokenize_table(source, cfg, tokenizer, raw, Path(folder))


# ---- the kinds of input

TEMPLATES = (
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[9].content }}",
    "{{ 1 / 0 }}",
    "{% if %}",
    "{{ raise_exception('no') }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "{% set x = namespace(v=[1]) %}{% for i in range(60) %}{% set x.v = x.v + x.v %}{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ strftime_now('%' * 9) }}",
    "{% generation %}{% endgeneration %}",
    "{{ messages | map(attribute='content') | join('|') }}",
    "{{ [] | first }}{{ {} | last }}",
    "\ud800",
    "{{ none + 1 }}",
    "{%- for m in messages -%}<|{{ m.role }}|>{{ m.content }}<eos>{%- endfor -%}",
)
YAML = (
    "!!int ''", "!!float ''", "!!bool x", "!!null x", "!!int a", "!!timestamp 1", "!!binary x",
    "!!python/object/apply:os.system [ls]", "!x y", "&a [*a]", "*a", "? [a]\n: b", "{[a]: b}",
    "<<: 1", "<<: [1]", "- a", "%YAML 9.9\n---\na: 1", "\t", "{", "'", '"\\x"', "2020-99-99", "0x_",
    "1_", "0b", "190:20:30", ".inf", "-.nan", "~", "---\n---", "!!str {}", "!!seq a", "!!map [a]",
    "!!set {a}", "!!omap [a]", "a: &x 1\nb: *x", "|\n a", ">", "@", "`", "@digits", "!!int 1:99:9_",
    "a:\n" + "".join(f"  k{i}: &k{i} [{','.join([f'*k{i - 1}'] * 9) if i else 1}]\n"
                     for i in range(12)),
    "[" * 100_000, "- " * 50_000, "{a: " * 50_000, "model: {path: " + "[" * 3000 + "}",
    "!!int 0o9", "!!float 1e", "!!float 1:2", "!!int 0b2", "!!int -", "=", "!!value =",
)  # fmt: skip
LAYOUTS: dict[str, list[Any]] = {
    "pretrain": [{"text": "Once upon a time."}],
    "sft": [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "input": "c", "output": "b", "history": [["d", "e"]]},
        {"question": "a", "answer": "b"},
    ],
    "dpo": [
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0},
        {"chosen": CHAT, "rejected": [*CHAT[:-1], {"role": "assistant", "content": "No."}]},
    ],
    "kto": [{"prompt": "a", "completion": "b", "label": True}],
    "grpo": [{"prompt": "a", "answer": "b"}, {"messages": CHAT[:1]}],
}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "object", "properties": {"a": {"type": "integer"}}}
AGENT = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": TOOL}}],
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Run."}], "weight": 0},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "Two.", "weight": 1.0},
    ],
}
DEEPSPEED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8}},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {"warmup_num_steps": 9, "total_num_steps": 9},
    },
}
HF_KEYS = tuple(
    "architectures is_causal quantization_config compression_config rope_scaling rope_theta "
    "rope_parameters layer_types sliding_window use_sliding_window head_dim hidden_act id2label "
    "no_rope_layers query_pre_attn_scalar final_logit_softcapping attention_bias auto_map dtype "
    "partial_rotary_factor original_max_position_embeddings initializer_range rms_norm_eps "
    "num_labels max_window_layers attention_dropout pretraining_tp torch_dtype text_config "
    "vision_config wrapper_config tie_word_embeddings".split()
)
ADAPTER_KEYS = tuple(
    "exclude_modules layers_to_transform modules_to_save use_dora use_rslora init_lora_weights "
    "num_virtual_tokens bottleneck placement lora_dropout ensure_weight_tying".split()
)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
TOKENIZER_KEYS = tuple(
    "truncation padding model_max_length eos_token bos_token pad_token unk_token chat_template "
    "added_tokens_decoder tokenizer_class auto_map add_prefix_space additional_special_tokens "
    "extra_special_tokens normalizer pre_tokenizer post_processor decoder model".split()
)
TOKENIZER_PARTS = (
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "x"}},
    {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 300}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(.*a)*(.*b)*z"}, "invert": False,
                       "behavior": "Isolated"}},
    {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "q",
                        "type_id": 0}}], "pair": [], "special_tokens": {}}},
    {"post_processor": {"type": "BertProcessing", "sep": ["a", 10**9], "cls": ["b", 2**31]}},
    {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
    {"truncation": {"max_length": 0, "stride": 9, "strategy": "LongestFirst",
                    "direction": "Right"}},
    {"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}},
    {"decoder": {"type": "WordPiece", "prefix": "", "cleanup": True}},
    {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": [["a", "b"]]}},
    {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": [], "unk_token": "q"}},
    {"model": {"type": "Unigram", "vocab": [["a", float("-inf")]], "unk_id": 7}},
    {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
    {"model": {"type": "WordPiece", "vocab": {}, "unk_token": "q",
               "continuing_subword_prefix": "", "max_input_chars_per_word": 0}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "q"}},
    {"model": {"type": "BPE", "vocab": {}, "merges": [], "dropout": 7.0}},
    {"added_tokens": [{"id": 10**9, "content": "", "special": True, "single_word": False,
                       "lstrip": False, "rstrip": False, "normalized": False}]},
)  # fmt: skip


def _safetensors(header: Any, length: int | None, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else as_json(header)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _header_of(content: bytes) -> tuple[Any, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def safetensors(content: bytes) -> st.SearchStrategy[bytes | str]:
    """A safetensors file with an odd header, or damaged."""
    header, data = _header_of(content)
    lengths = st.sampled_from([None, None, None, None, 0, 7, 2**20, 2**40, 2**64 - 1])
    odd = st.builds(partial(_safetensors, data=data), changed(header), lengths)
    raw = st.builds(
        partial(_safetensors, data=data), st.sampled_from([b"", b"[]", b"\xff", b"{"]), lengths
    )
    return st.one_of(odd, odd, odd, raw, damaged(content))


def _is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


def _words(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value).decode()[:50_000]


def _flags() -> st.SearchStrategy[tuple[str, list[str]]]:
    names = st.sampled_from([*leaves(), *NAMES, *(n.replace("_", "-") for n in NAMES), "a" * 9999])
    texts = values.map(_words) | st.sampled_from(YAML)

    def written(parts: list[tuple[str, list[str], bool]]) -> list[str]:
        args = []
        for name, given, joined in parts:
            texts = [text.replace("\0", "") for text in given]
            args += [f"--{name}={texts[0]}"] if joined and texts else [f"--{name}", *texts]
        return args

    part = st.tuples(names, st.lists(texts, max_size=2), st.booleans())
    return st.tuples(st.sampled_from([*VERBS]), st.lists(part, min_size=1, max_size=3).map(written))


def kinds(root: Path) -> dict[str, Kind]:
    """The kinds of input. root: an empty directory for their files."""
    from http_requests import http_requests  # which uses this module

    at = Place(root)

    def one_file(directory: str, name: str, then: Callable[[Path], Any]) -> Callable[[Any], Any]:
        """Reads a copy of a directory in which one file is another."""

        def read_form(form: bytes | str) -> None:
            folder = at.copy(directory)
            place(folder / name, form)
            then(folder)

        return read_form

    def settings(form: bytes | str, *flags: str) -> None:
        place(root / "settings.yaml", form)
        read_settings("sft", [*flags, str(root / "settings.yaml")])

    def tokenizer_file(drawn: tuple[str, bytes | str]) -> None:
        folder = at.copy("tokenizer")
        place(folder / drawn[0], drawn[1])
        read_tokenizer(folder)

    def template(text: str) -> None:
        tokenizer = copy.copy(at.tokenizer)
        tokenizer.chat_template = text
        tokenizer = with_settings(tokenizer, TrainConfig().data)
        render(tokenizer, CHAT)
        prompt_tokens(tokenizer, CHAT[:1])

    def adapter(form: bytes | str, name: str) -> None:
        folder = at.copy("adapter")
        place(folder / name, form)
        base, named = with_base(str(folder), None)
        hf.load_hf(str(at.good / "model"), mesh=one_device(), adapter=named)

    at.write_run()
    listed = [p for p in (at.good / "run/checkpoints/4").rglob("*") if p.is_file()]
    saved_files = {str(p.relative_to(at.good / "run")): p.read_bytes() for p in sorted(listed)}

    def checkpoint(drawn: tuple[str, bytes | str, bool]) -> None:
        folder = at.copy("run")
        place(folder / drawn[0], drawn[1])
        if drawn[2]:  # as if it had been saved so
            saved = folder / "checkpoints/4"
            files = [p for item in ITEMS for p in (saved / item).rglob("*") if p.is_file()]
            list_files(saved, [p for p in files if p.resolve() != Path("/dev/zero")], {})
        read_checkpoint(folder)

    def run_file(drawn: tuple[str, bytes | str]) -> None:
        folder = at.copy("run")
        place(folder / drawn[0], drawn[1])
        read_report(folder)

    def rows(drawn: tuple[str, Any]) -> None:
        verb, record = drawn
        file = root / "rows.jsonl"
        lines = [LAYOUTS[verb][0], record]
        file.write_bytes(b"\n".join(map(as_json, lines)) + b"\n")
        read_data(at, verb, file)

    def saved_dataset(drawn: tuple[str, bytes | str]) -> None:
        folder = at.copy("dataset")
        place(folder / drawn[0], drawn[1])
        read_data(at, "pretrain", folder)

    def data_file(drawn: tuple[str, bytes | str]) -> None:
        file = root / f"data{drawn[0]}"
        place(file, drawn[1])
        read_data(at, "pretrain", file)
        place(file, "missing")

    config = at.config
    variants = [config | {"model_type": name} for name in FAMILIES]
    variants += [{"model_type": name, "text_config": config} for name in WRAPPERS]
    configs = st.one_of(*(json_file(one, HF_KEYS) for one in variants))
    tokenizers = [at.json(f"tokenizer/{name}") for name in TOKENIZER_FILES[:2]]
    tokenizers += [{"eos_token": "<eos>", "pad_token": {"content": "<pad>"}}, {"<x>": 299}]
    tokenizer_forms = st.one_of(
        *(
            st.tuples(st.just(name), json_file(content, TOKENIZER_KEYS))
            for name, content in zip(TOKENIZER_FILES, tokenizers, strict=True)
        ),
        st.sampled_from(TOKENIZER_PARTS).map(
            lambda part: ("tokenizer.json", as_json(tokenizers[0] | part))
        ),
        st.tuples(st.just("chat_template.jinja"), damaged(b"{{ messages }}")),
    )
    layouts = st.one_of(
        *(
            st.tuples(st.just(verb), st.sampled_from(records).flatmap(changed))
            for verb, records in LAYOUTS.items()
        )
    )
    chats = st.tuples(st.just("sft"), changed(AGENT))
    yaml_base = {"model": {"path": "a/b"}, "data": {"train": ["a.jsonl"]}, "optim": {"warmup": 9}}
    yaml_files = st.one_of(
        json_file(yaml_base, tuple(leaves())),
        st.sampled_from(YAML).map(lambda text: text.encode()),
        st.tuples(st.sampled_from([*leaves()]), st.sampled_from(YAML)).map(
            lambda pair: f"{pair[0]}: {pair[1]}".encode()
        ),
    )
    csv = b'text,b\n"Once, upon",1\na time,2\n'
    files = st.one_of(
        *(
            st.tuples(st.just(suffix), damaged(content))
            for suffix, content in {
                ".txt": b"Once upon a time.\n",
                ".csv": csv,
                ".tsv": csv.replace(b",", b"\t"),
                ".json": as_json([{"text": "a"}, {"text": "b"}]),
                ".jsonl": b'{"text": "a"}\n{"text": "b"}\n',
                ".jsonl.gz": gzip.compress(b'{"text": "a"}\n', mtime=0),
                ".jsonl.zst": b"(\xb5/\xfd",
                ".parquet": at.bytes("texts.parquet"),
                ".arrow": at.bytes("dataset/train/data-00000-of-00001.arrow"),
                ".array_record": b"a",
            }.items()
        )
    )
    saved = st.one_of(
        *(
            st.tuples(st.just(name), json_file(at.json(f"dataset/{name}")))
            for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json")
        )
    )
    checkpoints = st.one_of(
        *(
            st.tuples(
                st.just(name),
                json_file(json.loads(content)) if _is_json(content) else damaged(content),
                st.booleans(),
            )
            for name, content in saved_files.items()
        )
    )
    run_files = st.one_of(
        *(
            st.tuples(st.just(name), json_file(at.json(f"run/{name}")))
            for name in ("config.json", "data.json", "starts.jsonl", "samples.jsonl")
            + ("metrics.jsonl",)
        )
    )
    half = "a.safetensors"
    index = "model.safetensors.index.json"
    model = at.json(f"model/{index}")
    adapter_config = at.json("adapter/adapter_config.json")
    adapter_weights = "adapter_model.safetensors"
    generation = {"eos_token_id": [0, 1], "bos_token_id": 0, "pad_token_id": None, "top_p": 0.9}
    return {
        "flags": (_flags(), lambda drawn: read_settings(*copy.deepcopy(drawn))),
        "YAML configs": (yaml_files, settings),
        "DeepSpeed JSON": (
            json_file(DEEPSPEED),
            lambda form: settings(form, "--deepspeed"),
        ),
        "config.json, random weights": (configs, one_file("tokenizer", "config.json", read_shape)),
        "config.json of weights": (
            json_file(config, HF_KEYS),
            one_file("model", "config.json", read_model),
        ),
        "generation_config.json": (
            json_file(generation),
            one_file(
                "model",
                "generation_config.json",
                lambda folder: (read_generation(folder), generation_stop_ids(folder)),
            ),
        ),
        "safetensors": (
            safetensors(at.bytes(f"model/{half}")),
            one_file("model", half, read_model),
        ),
        "index.json": (json_file(model), one_file("model", index, read_model)),
        "adapter_config.json": (
            json_file(adapter_config, ADAPTER_KEYS),
            lambda form: adapter(form, "adapter_config.json"),
        ),
        "adapter weights": (
            safetensors(at.bytes(f"adapter/{adapter_weights}")),
            lambda form: adapter(form, adapter_weights),
        ),
        "tokenizer files": (tokenizer_forms, tokenizer_file),
        "chat templates": (st.sampled_from(TEMPLATES) | st.text(max_size=30), template),
        "data rows": (layouts, rows),
        "chats": (chats, rows),
        "data files": (files, data_file),
        "saved datasets": (saved, saved_dataset),
        "HTTP requests": http_requests(at.good / "tokenizer"),
        "checkpoints": (checkpoints, checkpoint),
        "files of a run, in a report": (run_files, run_file),
    }


def read_generation(folder: Path) -> None:
    """generation_config.json, as an export writes it anew."""
    config, _ = source_config(str(folder), {})
    updated_configs(config, "float32", 300, load_tokenizer(folder))
