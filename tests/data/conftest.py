# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of bytes: small, offline, and nothing it reads is unknown to it."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<s>", "<eos>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(adds: str | None = None) -> PreTrainedTokenizerFast:
    """Ids 0..3 are SPECIALS, then one id a byte; `adds` is the template of what it adds itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIALS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[("<s>", 0), ("<eos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<eos>",
        extra_special_tokens=SPECIALS[2:],
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(adds="<s> $A")


@pytest.fixture(scope="session")
def bos_eos_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(adds="<s> $A <eos>")
