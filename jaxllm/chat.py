# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: a model with its tokenizer, completions of texts, a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxllm.data.chat import chat_tokenizer, prompt_tokens, stop_ids
from jaxllm.data.template import apply_user_template
from jaxllm.errors import UserError
from jaxllm.files import local_dir
from jaxllm.hf import load_hf
from jaxllm.model.decoder import Decoder
from jaxllm.peft.combine import Choice
from jaxllm.peft.files import tokenizer_of
from jaxllm.sampling import Sampling, generate, stream
from jaxllm.tokenizer import check_vocabulary


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(`text` up to its first stop string, True if it has one)."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def load_with_tokenizer(
    path: str, template: str | None = None, **options: Any
) -> tuple[Decoder, Any]:
    """A model and its tokenizer, from a HF directory or hub id.

    template: as data.template; options: of `load_hf`. Raises UserError or FileNotFoundError if one
    of them is missing or they do not fit each other.
    """
    tokenizer = chat_tokenizer(tokenizer_of(path), template)
    model = load_hf(path, **options)
    check_vocabulary(tokenizer, model.cfg.vocab_size)
    return model, tokenizer


@dataclass(frozen=True)
class TextModel:
    """A model that generates text, with its tokenizer and stop ids."""

    model: Decoder
    tokenizer: Any
    stop_ids: tuple[int, ...]

    @staticmethod
    def load(path: str, **options: Any) -> TextModel:
        """As `load_with_tokenizer`; raises UserError for a reward model too."""
        model, tokenizer = load_with_tokenizer(path, **options)
        if model.cfg.scores:
            raise UserError(f"{path} is a reward model; it scores texts and generates none")
        return TextModel(model, tokenizer, tuple(stop_ids(tokenizer, local_dir(model.base))))

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of the rendered messages with the generation prompt."""
        return prompt_tokens(self.tokenizer, apply_user_template(self.tokenizer, messages)).tolist()

    def text(self, tokens: Sequence[int]) -> str:
        """Decoded tokens without stop ids."""
        return self.tokenizer.decode([t for t in tokens if t not in self.stop_ids])


def generate_text(
    model: str,
    prompts: list[str],
    *,
    chat: bool = False,
    system: str | None = None,
    template: str | None = None,
    stop: Sequence[str] = (),
    dtype: str = "float32",
    sampling: Sampling = Sampling(),
    adapter: Mapping[str, str] | None = None,
    use: Sequence[Choice] = (),
) -> list[str]:
    """Continues texts, or answers them as user messages through the chat template.

    A text ends at a stop id of the model or of `sampling`, and before a string of `stop`. adapter:
    {name: directory} of LoRA adapters; use: one choice among them per prompt, or one for all
    prompts. Raises UserError as `check_prompts` does.
    """
    loaded = TextModel.load(model, template=template, dtype=dtype, adapter=adapter)
    if len(use) not in (0, 1, len(prompts)):
        raise UserError(f"{len(use)} choices of adapters for {len(prompts)} prompts; give one each")
    use = list(use) * len(prompts) if len(use) == 1 else use
    before = [{"role": "system", "content": system}] if system else []
    if chat:
        rows = [loaded.prompt([*before, {"role": "user", "content": p}]) for p in prompts]
    else:
        rows = [loaded.tokenizer(p).input_ids for p in prompts]
    sampling = replace(sampling, stop_ids=(*sampling.stop_ids, *loaded.stop_ids))
    ended = None if not stop else (lambda tokens: cut(loaded.text(tokens), stop)[1])
    outs = generate(loaded.model, rows, sampling, ended, use)
    return [cut(loaded.text(tokens), stop)[0] for tokens in outs]


def chat_loop(
    model: str,
    *,
    system: str | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling = Sampling(),
    use: Sequence[Choice] = (),
    **options: Any,
) -> None:
    """A conversation in the terminal, streamed; ends at the end of input or at an empty line.

    options: of `load_with_tokenizer`.
    """
    loaded = TextModel.load(model, **options)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        messages.append({"role": "user", "content": line})
        tokens: list[int] = []
        shown = ""
        try:
            for new in stream(loaded.model, [loaded.prompt(messages)], sampling, 1, use):
                tokens.append(int(new[0, 0]))
                text, ended = cut(loaded.text(tokens), stop)
                if not text.endswith("\ufffd"):  # an incomplete UTF-8 character
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
                if ended or tokens[-1] in (*sampling.stop_ids, *loaded.stop_ids):
                    break
        except KeyboardInterrupt:
            pass  # ends the answer, not the conversation
        print()
        messages.append({"role": "assistant", "content": shown})
