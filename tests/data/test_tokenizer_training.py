# SPDX-License-Identifier: Apache-2.0
"""Trained tokenizers can be saved and loaded, encode any text, and know their stop ids."""

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxllm.config import DataSection
from jaxllm.data.chat import stop_ids
from jaxllm.data.template import with_settings
from jaxllm.data.tokenizer_training import END, PAD, TURN, TURN_END, train_tokenizer
from jaxllm.data.tokenizer_training import _texts as read_texts
from jaxllm.tokenizer import load_tokenizer, special_tokens

TEXT = (
    "def f(x):\n    return x + 1024\n\nThe answer is 42, isn't it?\r\nÜber größere Straßen.\n" * 20
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a small tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_bytes(TEXT.encode())
    train_tokenizer([folder / "text.txt"], folder / "out", 400)
    return folder / "out"


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_tokenizer(trained)


def test_a_trained_tokenizer_is_complete(trained, tokenizer):
    named = tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token
    assert named == (END, END, PAD)
    assert tokenizer.convert_tokens_to_ids([END, PAD, TURN, TURN_END]) == [0, 1, 2, 3]
    assert special_tokens(tokenizer) == [END, TURN, TURN_END, PAD]
    assert "<|im_start|>" in tokenizer.chat_template
    assert stop_ids(tokenizer) == (0, 3)
    assert len(tokenizer) <= 400
    config = json.loads((trained / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_end_of_text_is_not_padding(tokenizer):
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text())
@example(text="  \t\r\n\n  x  \n")
@example(text="\ufeff\u0300\ue000\U0001f469\u200d\U0001f680 12345678\0")
@example(text="a <|im_end|> b")
def test_any_text_comes_back_unchanged(text, tokenizer):
    for plain in (True, False):
        tokens = tokenizer(text, split_special_tokens=plain).input_ids
        assert tokenizer.decode(tokens) == text


def test_nothing_is_added_to_a_text(tokenizer):
    assert not set(tokenizer("The answer").input_ids) & {0, 1, 2, 3}


def test_a_number_is_read_digit_by_digit(tokenizer):
    assert tokenizer.tokenize("1024") == ["1", "0", "2", "4"]
    assert tokenizer.tokenize("x1024")[1:] == ["1", "0", "2", "4"]
    assert not [t for t in tokenizer.get_vocab() if sum(c.isdigit() for c in t) and len(t) > 1]


def test_words_and_indents_are_learned(tokenizer):
    assert len(tokenizer.tokenize("    return")) == 2
    assert tokenizer.tokenize(" answer") == ["Ġanswer"]


def test_the_same_text_gives_the_same_tokenizer(trained, tmp_path):
    """In another process, whose hashes are seeded otherwise."""
    code = (
        "import sys; from jaxllm.data.tokenizer_training import train_tokenizer; "
        "train_tokenizer(sys.argv[1:2], sys.argv[2], 400)"
    )
    text = str(trained.parent / "text.txt")
    subprocess.run([sys.executable, "-c", code, text, str(tmp_path)], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_a_long_file_is_read_in_pieces_that_end_with_a_line(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(TEXT.encode())
    pieces = list(read_texts([file], 100))
    assert "".join(pieces) == TEXT
    assert len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces)


def test_texts_are_read_as_files_are(trained, tmp_path):
    train_tokenizer([], tmp_path, 400, texts=[TEXT])
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "record",
    [
        {"text": TEXT},
        {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}], "image": "x"},
        {"messages": [{"role": "user", "content": TEXT}], "text": None},
    ],
)
def test_of_a_data_file_the_text_is_read(record, trained, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record) + "\n")
    train_tokenizer([file], tmp_path / "out", 400)
    written = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert written == (trained / "tokenizer.json").read_bytes()


def test_special_tokens_and_template_can_be_chosen(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}<turn>{{ m.content }}</turn>{% endfor %}")
    names = ["<turn>", "</turn>"]
    out = tmp_path / "out"
    train_tokenizer([], out, 300, texts=["a"], special_tokens=names, template=str(file))
    tokenizer = load_tokenizer(out)
    assert set(special_tokens(tokenizer)) == {END, PAD, *names}
    assert stop_ids(tokenizer) == (0, 3)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a"], {"vocab_size": 259}, "vocab_size 259 is too small for 256 bytes and 4 special"),
        ([], {}, "no text to train"),
        (["", ""], {}, "no text to train"),
        (["a"], {"template": "nosuch"}, "'nosuch' is neither a file nor one of"),
    ],
)
def test_mistakes_in_training_are_told(texts, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_tokenizer([], tmp_path / "out", texts=texts, **options)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_missing_or_not_text_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nosuch.txt: no such file"):
        train_tokenizer([tmp_path / "nosuch.txt"], tmp_path / "out")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt: not UTF-8"):
        train_tokenizer([tmp_path / "latin.txt"], tmp_path / "out")


def test_a_directory_to_train_on_is_told_from_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory; give its files, such as .*/\*\.txt"):
        train_tokenizer([tmp_path], tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (r'"a \ud83d"', "is a lone surrogate"),
        ("1" * 5_000, "an integer has more than 4300 digits"),
        ("[" * 100_000, "it is nested too deeply"),
        ('"a"}', "Extra data"),
    ],
)
def test_a_data_file_that_cannot_be_read_names_its_line(value, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "b"}}\n{{"text": {value}}}')
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: malformed JSON: .*{message}"):
        train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "out")


def test_an_older_tokenizer_is_replaced_and_nothing_else(trained, tmp_path):
    train_tokenizer([], tmp_path, 300, texts=["a"])
    train_tokenizer([], tmp_path, 400, texts=[TEXT])
    assert (tmp_path / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="contains config.json, so no tokenizer is written to it"):
        train_tokenizer([], tmp_path, 300, texts=["a"])
    with pytest.raises(ValueError, match="config.json is a file; choose another directory"):
        train_tokenizer([], tmp_path / "config.json", 300, texts=["a"])


# ---- stop ids


def write(folder, **files):
    folder.mkdir()
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("eos", "ids"), [(7, (0, 3, 7)), ([7, 3, 9], (0, 3, 7, 9)), (None, (0, 3))]
)
def test_the_models_own_list_ends_a_text_too(eos, ids, tokenizer, tmp_path):
    write(tmp_path / "m", generation_config__json={"eos_token_id": eos})
    assert stop_ids(tokenizer, tmp_path / "m") == ids
    assert stop_ids(tokenizer, tmp_path) == (0, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id is 'x'; use an integer or a list of integers"),
        ({"eos_token_id": [3, None]}, r"eos_token_id is \[3, None\]; use an integer"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"eos_token_id": 2**40}, "eos_token_id is 1099511627776; use an integer"),
        (["x"], r"the file must be a JSON object, seen \['x'\]"),
        ("{", "malformed JSON: Expecting"),
    ],
)
def test_a_malformed_list_of_the_model_is_told(content, message, tokenizer, tmp_path):
    write(tmp_path / "m", generation_config__json=content)
    with pytest.raises(ValueError, match=rf"m/generation_config\.json(:1)?: {message}"):
        stop_ids(tokenizer, tmp_path / "m")


def test_without_a_template_eos_ends_a_text(trained):
    tokenizer = load_tokenizer(trained)
    tokenizer.chat_template = None
    assert stop_ids(tokenizer) == (0,)
    tokenizer = with_settings(tokenizer, DataSection(template="seed-qwen"))
    assert stop_ids(tokenizer) == (0, 3)
