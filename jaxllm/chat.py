# SPDX-License-Identifier: Apache-2.0
"""Text in, text out: a model with its tokenizer, completions of texts, a conversation."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

from jaxllm.config.fields import home
from jaxllm.data.chat import chat_tokenizer, prompt_tokens, stop_ids
from jaxllm.data.template import apply_user_template
from jaxllm.errors import UserError, mistake
from jaxllm.files import local_dir
from jaxllm.hf import load_hf
from jaxllm.model.decoder import Decoder
from jaxllm.peft.combine import Choice
from jaxllm.peft.files import tokenizer_of
from jaxllm.sampling import Sampling, for_decoding, generate, stream
from jaxllm.tokenizer import check_vocabulary, is_settled


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(`text` up to its first stop string, True if it has one)."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


WINDOW, OVERLAP = 32, 8  # tokens, of `Streamed`


class Streamed:
    """The text of an answer while its tokens are generated.

    Each part is of whole characters, and holds back what may begin a stop string. settled: true for
    a token after which the text before it stays as it is (`tokenizer.is_settled`).
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str],
        settled: Callable[[int], bool],
    ) -> None:
        self.decode, self.stops, self.settled = decode, stops, settled
        self.shown, self.ended = "", False  # text so far; True after a stop string
        self._start, self._skipped, self._before = 0, 0, ""

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """What can be shown in addition, now that there are these tokens. last: there are no
        more."""
        text, self.ended = cut(self._decoded(tokens), self.stops)
        if not (last or self.ended):
            text = text.rstrip("\ufffd")  # an incomplete UTF-8 character
            begun = (n for stop in self.stops for n in range(1, len(stop)) if text[-n:] == stop[:n])
            text = text[: len(text) - max(begun, default=0)]
        before, self.shown = len(self.shown), max(text, self.shown, key=len)
        return self.shown[before:]

    def _decoded(self, tokens: Sequence[int]) -> str:
        """`decode(tokens)`, in a time that does not grow with the answer.

        `_before` is the text up to a token that is settled. Tokens are decoded from `_start`, a few
        before that one, because a decoder may drop a space at the beginning; `_skipped` is the
        length of their text.
        """
        text = self._before + self.decode(tokens[self._start :])[self._skipped :]
        start = len(tokens) - OVERLAP
        if start - self._start >= WINDOW and self.settled(tokens[-1]):
            last = self.decode(tokens[start:])
            if last and text.endswith(last) and not text.endswith("\ufffd"):
                self._start, self._skipped, self._before = start, len(last), text
        return text


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
    def load(path: str, template: str | None = None, **options: Any) -> TextModel:
        """As `load_with_tokenizer`; raises UserError for a reward model too."""
        tokenizer = chat_tokenizer(tokenizer_of(path), template)
        return TextModel.of(load_hf(path, **options), tokenizer)

    @staticmethod
    def of(model: Decoder, tokenizer: Any = None) -> TextModel:
        """A loaded model and its tokenizer, by default that of the directory it was loaded from.

        Raises UserError if there is none, if it does not fit, and for a reward model.
        """
        if model.cfg.scores:
            what = model.base or "the model"
            raise UserError(f"{what} is a reward model; it scores texts and generates none")
        if tokenizer is None:
            if not model.base:
                raise UserError("the model was not loaded from a directory; give its tokenizer")
            tokenizer = chat_tokenizer(tokenizer_of(model.base))
        check_vocabulary(tokenizer, model.cfg.vocab_size)
        folder = local_dir(model.base) if model.base else None
        return TextModel(model, tokenizer, tuple(stop_ids(tokenizer, folder)))

    def for_decoding(self) -> TextModel:
        """Lays its model out for generation alone, with the weights in memory once; returns it."""
        for_decoding(self.model)
        return self

    def summary(self, name: str, template: str | None) -> str:
        """What the model is, and its chat template."""
        family = json.loads(self.model.hf_config)["model_type"]
        count = sum(x.size for x in jax.tree.leaves(nnx.state(self.model)))
        template = template or "the tokenizer's"
        return (
            f"{name}: {family}, {count:,} parameters, {self.model.compute_dtype}; chat template: "
            f"{template}"
        )

    def answer(
        self,
        messages: list[dict[str, Any]],
        stop: Sequence[str],
        sampling: Sampling,
        use: Sequence[Choice],
    ) -> Iterator[str]:
        """The text of an answer to the messages, as it is generated."""
        tokens: list[int] = []
        text = Streamed(self.text, stop, self.settled)
        for new in stream(self.model, [self.prompt(messages)], sampling, 1, use):
            tokens.append(int(new[0, 0]))
            last = tokens[-1] in (*sampling.stop_ids, *self.stop_ids)
            yield text.add(tokens, last or len(tokens) == sampling.max_new_tokens)
            if last or text.ended:
                return

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of the rendered messages with the generation prompt."""
        return prompt_tokens(self.tokenizer, apply_user_template(self.tokenizer, messages)).tolist()

    def text(self, tokens: Sequence[int]) -> str:
        """Decoded tokens without stop ids."""
        return self.tokenizer.decode([t for t in tokens if t not in self.stop_ids])

    def settled(self, token: int) -> bool:
        """True if no later token changes the text before this one (`is_settled`)."""
        return is_settled(self.tokenizer, token)


def generate_text(
    model: str | Decoder,
    prompts: str | list[str],
    *,
    tokenizer: Any = None,
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

    model: a HF directory or hub id, which is loaded with `template`, `dtype` and `adapter`, {name:
    directory} of LoRA adapters; or a loaded model with its `tokenizer`, by default that of the
    directory it was loaded from. A text ends at a stop id of the model or of `sampling`, and before
    a string of `stop`. use: one choice among the adapters per prompt, or one for all prompts.
    Raises UserError as `check_prompts` does.
    """
    if not isinstance(model, str):
        if (template, dtype, adapter) != (None, "float32", None):
            raise UserError("template, dtype and adapter apply to a model given by its path")
        loaded = TextModel.of(model, tokenizer)
    elif tokenizer is not None:
        raise UserError("tokenizer is used only with a loaded model; a directory has its own")
    else:
        loaded = TextModel.load(model, template=template, dtype=dtype, adapter=adapter)
        loaded = loaded.for_decoding()
    prompts = [prompts] if isinstance(prompts, str) else prompts
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


# ---- a conversation in the terminal

COMMANDS = {
    "/system TEXT": "replace the system message; without TEXT, remove it",
    "/clear": "clear the conversation and keep the system message",
    "/save FILE": "append the conversation to FILE, as a record that `jaxllm sft` reads",
    "/help": "show this",
    "/exit": "end, as Ctrl-D does",
}
_HELP = "\n".join(f"{name:<14}{about}" for name, about in COMMANDS.items())


class Conversation:
    """The messages of a chat, which commands change."""

    def __init__(self, system: str | None) -> None:
        self.messages: list[dict[str, str]] = []
        self.system(system)

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages but the system message."""
        return [message for message in self.messages if message["role"] != "system"]

    def system(self, text: str | None) -> None:
        """Replaces the system message; an empty one is removed."""
        first = [{"role": "system", "content": text}] if text else []
        self.messages = first + self.turns

    def add(self, role: str, text: str) -> None:
        self.messages.append({"role": role, "content": text})

    def run(self, command: str, argument: str) -> str:
        """Runs a command other than /exit; returns what to print."""
        match command:
            case "/help":
                return _HELP
            case "/system":
                self.system(argument)
                return "system message " + ("replaced" if argument else "removed")
            case "/clear":
                self.messages = [m for m in self.messages if m["role"] == "system"]
                return "conversation cleared"
            case "/save" if argument and self.turns:
                record = json.dumps({"messages": self.messages}, ensure_ascii=False)
                try:
                    with open(home(argument), "a", encoding="utf-8") as file:
                        file.write(record + "\n")
                except OSError as error:
                    return f"not saved: {mistake(error) or error}"
                return f"{len(self.messages)} messages appended to {argument}"
            case "/save":
                return "nothing to save yet" if argument else "write /save FILE"
            case _:
                return f"{command} is not a command (/help); a space before it makes it a message"


def typed(conversation: Conversation) -> Iterator[str]:
    """The messages that a user types in a terminal, with line editing and history.

    Pasted lines are one message. A line that begins with /NAME is a command. Ctrl-C clears the
    line; Ctrl-D ends the chat.
    """
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    while True:
        try:
            text = session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        match = re.fullmatch(r"(/[a-z]+)(?:\s+(.*?))?\s*", text, re.DOTALL)
        if match and match[1] == "/exit":
            return
        if match:
            print(conversation.run(match[1], match[2] or ""))
        elif text.strip():
            yield text


def piped() -> Iterator[str]:
    """The lines of standard input up to its end or an empty line."""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        yield line


def chat_loop(
    model: str,
    *,
    system: str | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling = Sampling(),
    use: Sequence[Choice] = (),
    **options: Any,
) -> None:
    """A conversation in the terminal, streamed, or with the lines of standard input if that is no
    terminal. options: of `load_with_tokenizer`.
    """
    loaded, conversation = TextModel.load(model, **options).for_decoding(), Conversation(system)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print(loaded.summary(model, options.get("template")))
        print("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat")
    for text in typed(conversation) if interactive else piped():
        conversation.add("user", text)
        shown = ""
        try:
            for more in loaded.answer(conversation.messages, stop, sampling, use):
                print(more, end="", flush=True)
                shown += more
        except KeyboardInterrupt:
            pass  # ends the answer, not the conversation
        except UserError as error:  # such as a conversation that is too long
            if not interactive:
                raise
            conversation.messages.pop()
            print(f"error: {error}; /clear or /system may help")
            continue
        print()
        conversation.add("assistant", shown)
