# SPDX-License-Identifier: Apache-2.0
"""Tokenizers are loaded from directories and hub ids, or refused with the reason."""

import json

import pytest

from jaxllm.data.tokenizer_training import train_tokenizer
from jaxllm.paths import hub_id
from jaxllm.tokenizer import check_vocabulary, load_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([], folder, 300, texts=["a b c"])
    return folder


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_tokenizer(trained)


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("owner/name", True),
        ("Owner-1/na.me_2", True),
        ("bare", False),
        ("a/b/c", False),
        ("./a", False),
        ("~/a", False),
        ("/a", False),
        ("..", False),
        ("a/", False),
        ("here/typo", False),
        ("", False),
    ],
)
def test_a_hub_id_is_an_owner_and_a_name_and_no_place_here(path, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_id(path) is known


def test_a_file_beside_the_tokenizer_names_it_too(trained, tokenizer):
    assert load_tokenizer(trained / "tokenizer.json").get_vocab() == tokenizer.get_vocab()


def write(folder, **files):
    folder.mkdir()
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_directory_without_a_tokenizer_is_refused_not_filled_in(tmp_path):
    """transformers makes an empty tokenizer of these two files."""
    config = {"tokenizer_class": "LlamaTokenizer"}
    folder = write(
        tmp_path / "m", config__json={"model_type": "llama"}, tokenizer_config__json=config
    )
    with pytest.raises(ValueError, match="m: has no tokenizer .*give a directory that has"):
        load_tokenizer(folder)


def test_a_file_without_a_tokenizer_beside_it_is_named_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("")
    with pytest.raises(ValueError, match="^afile: is a file in a directory without a tokenizer"):
        load_tokenizer("afile")


@pytest.mark.parametrize("sign", ["config", "checkpoints"])
def test_a_run_folder_says_where_its_model_is(sign, tmp_path):
    config = {"objective": "sft", "optim": {}, "data": {}} if sign == "config" else []
    folder = write(tmp_path / "run", config__json=config)
    if sign == "checkpoints":
        (folder / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="run is a run folder without a final.*jaxllm export"):
        load_tokenizer(folder)
    (folder / "final").mkdir()
    with pytest.raises(ValueError, match="run is a run folder; its model is .*run/final$"):
        load_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="run: has no tokenizer"):  # a model with such folders
        load_tokenizer(folder)


def test_a_missing_path_is_not_looked_for_elsewhere(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nosuch: no such directory.* `jaxllm tokenizer train"
    ):
        load_tokenizer(tmp_path / "nosuch")
    for path in ("./nosuch", "gpt2"):
        with pytest.raises(FileNotFoundError, match=f"{path}: no such directory"):
            load_tokenizer(path)


def test_a_name_that_is_no_directory_and_not_on_the_hub_is_told():
    with pytest.raises(ValueError, match="nosuch/model: no such directory, and the hub"):
        load_tokenizer("nosuch/model")  # HF_HUB_OFFLINE is set in tests


def test_a_broken_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="m: the tokenizer cannot be loaded"):
        load_tokenizer(write(tmp_path / "m", tokenizer__json="{"))


def test_code_in_the_directory_is_never_run(tmp_path):
    folder = write(
        tmp_path / "m",
        vocab__json={"a": 0},
        tokenizer_config__json={"auto_map": {"AutoTokenizer": ["own.Own", None]}},
        own__py=f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass",
    )
    with pytest.raises(ValueError, match="tokenizer cannot be loaded"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_slow_tokenizer_is_refused(tmp_path):
    folder = write(
        tmp_path / "m",
        vocab__json={"a": 0, "<unk>": 1},
        merges__txt="#version: 0.2\n",
        tokenizer_config__json={"tokenizer_class": "CTRLTokenizer"},
    )
    with pytest.raises(ValueError, match="CTRLTokenizer is a slow tokenizer.*tokenizer.json"):
        load_tokenizer(folder)


def test_a_tokenizer_without_an_end_of_text_is_refused(trained, tmp_path):
    folder = write(tmp_path / "m", tokenizer__json=(trained / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match="m: .*set eos_token in tokenizer_config.json"):
        load_tokenizer(folder)


def test_a_vocabulary_larger_than_the_models_is_refused(tokenizer):
    size = max(tokenizer.get_vocab().values()) + 1
    check_vocabulary(tokenizer, size)
    check_vocabulary(tokenizer, size + 100)  # padded models are fine
    with pytest.raises(ValueError, match=f"largest id is {size - 1}.*vocab_size is {size - 1}"):
        check_vocabulary(tokenizer, size - 1)
